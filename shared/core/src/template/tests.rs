//! Templates as authors write them, with names as recipients have them.

use proptest::prelude::*;

use super::*;

const URL: &str = "https://mail.example/u/_a_*b*?x=1&y=2";

fn ann(name: Option<&str>) -> Recipient<'_> {
    Recipient { email: "ann@example.org", name, unsubscribe_url: None }
}

fn render(body: &str, name: Option<&str>) -> Rendered {
    Template::new("Hello", body).unwrap().render(&ann(name)).unwrap()
}

/// The content of the card, without the frame around it.
fn card(rendered: &Rendered) -> &str {
    rendered.html.split_once("break-word;\">\n").unwrap().1.split_once("</td>").unwrap().0
}

fn refused(subject: &str, body: &str) -> String {
    Template::new(subject, body).unwrap_err().to_string()
}

#[test]
fn a_template_can_be_shared_among_senders() {
    fn shared<T: Clone + Send + Sync + std::fmt::Debug>() {}
    shared::<Template>();
}

#[test]
fn the_text_is_as_written_and_the_html_is_its_markdown() {
    let rendered = render("Dear **{{ name }}**,\ncome!\n", Some("Ann"));
    assert_eq!(rendered.text, "Dear **Ann**,\ncome!\n");
    assert_eq!(card(&rendered), "<p>Dear <strong>Ann</strong>,<br />\ncome!</p>\n");
}

#[test]
fn a_recipient_may_have_no_name() {
    for body in [
        "Hi {{ name or 'there' }}",
        "Hi {{ name | default('there') }}",
        "Hi {% if name %}{{ name }}{% else %}there{% endif %}",
    ] {
        assert_eq!(render(body, None).text, "Hi there");
        assert_eq!(render(body, Some("Ann")).text, "Hi Ann");
    }
}

#[test]
fn conditions_and_defaults_depend_on_the_recipients_fields() {
    let url = Some("https://x.org/u");
    let of = |body: &str, name, unsubscribe_url| {
        let template = Template::new("Hello", body).unwrap();
        template.render(&Recipient { unsubscribe_url, ..ann(name) }).unwrap().text
    };
    let body = "{% if not name %}nobody{% elif unsubscribe_url %}{{ unsubscribe_url }}{% else %}{{ name }}{% endif %}!";
    assert_eq!(of(body, None, None), "nobody!");
    assert_eq!(of(body, Some(""), None), "nobody!");
    assert_eq!(of(body, Some("Ann"), None), "Ann!");
    assert_eq!(of(body, Some("Ann"), url), "https://x.org/u!");
    assert!(of(body, None, url).starts_with("nobody!\n\n-- \n"));
    let nested =
        "{% if name %}a{% if unsubscribe_url %}b{% else %}c{% endif %}{% else %}{% if email %}d{% endif %}{% endif %}";
    assert_eq!([of(nested, Some("Ann"), None), of(nested, None, None)], ["ac", "d"]);
    assert_eq!(of("{{ name | default(unsubscribe_url) or email }}", None, None), "ann@example.org");
    assert_eq!(of("{{ name | default }}{{ name|default() }}{{ '' }}", None, None), "");
    assert_eq!(of(r#"{{ 'it\'s \\' }}{{ "a\nb" }}"#, None, None), "it's \\a\nb");
    assert_eq!(of("a {{- name -}} b {%- if name %} c {% endif +%} d {#- x -#} e", Some("Ann"), None), "aAnnb c  de");
}

#[test]
fn a_default_is_a_value_and_not_markdown() {
    let rendered = render("*{{ name or '*<b>x</b>*' }}* {{ name or 'https://x.org' }}", None);
    assert_eq!(card(&rendered), "<p><em>*&lt;b&gt;x&lt;/b&gt;*</em> https://x.org</p>\n");
}

#[test]
fn syntax_errors_are_reported_in_plain_words() {
    for (text, error) in [
        ("{{ }}", "is not understood: a placeholder is missing"),
        ("{{ -name }}", "is not understood: unexpected -"),
        ("{{ name email }}", "is not understood: unexpected email"),
        ("{{ 'a' if name }}", "is not understood: unexpected if"),
        ("{{ name | default('a' }}", "is not understood: default( without )"),
        ("{{ name | }}", "is not understood: no filter after |; the only filter is default"),
        ("{# a", "is not understood: {# without #}"),
        ("{% if name", "is not understood: {% without %}"),
        ("{% if name %}", "is not understood: {% if %} without {% endif %}"),
        ("{% endif %}", "is not understood: {% endif %} without {% if %}"),
        ("{% if name %}{% else %}{% else %}{% endif %}", "is not understood: {% else %} without {% if %}"),
        ("{% if name %}{% else name %}{% endif %}", "is not understood: unexpected name after else"),
        (
            "{% if email == 'x' %}{% endif %}",
            "has the condition email == 'x'; only a placeholder, or not and a placeholder, can be one",
        ),
    ] {
        assert_eq!(refused("Hello", &format!("\n{text}")), format!("line 2 of the text {error}"));
    }
}

#[test]
fn values_in_links_are_escaped_and_never_choose_the_target() {
    let hostile = Some("'&\"\n/..");
    assert_eq!(
        card(&render("[a](https://x.org/{{ name }} \"{{ name }}\")", hostile)),
        "<p><a href=\"https://x.org/&#x27;&amp;%22%0A/..\" title=\"&#39;&amp;&quot;\n/..\">a</a></p>\n"
    );
    assert_eq!(
        card(&render("![a {{ name }} `{{ name }}`](https://x.org) {{ name }}", Some("'\"<"))),
        "<p><img src=\"https://x.org\" alt=\"a &#39;&quot;&lt; &#39;&quot;&lt;\" /> '\"&lt;</p>\n"
    );
    for body in ["[a]({{ name }})", "[a]({{ name or 'https://x.org' }})", "[a](java{{ name }})"] {
        assert_eq!(card(&render(body, Some("https://evil.example"))), "<p>a</p>\n", "{body}");
    }
    assert_eq!(
        card(&render("[a]({{ name or 'https://x.org' }}/b)", None)),
        "<p><a href=\"https://x.org/b\">a</a></p>\n"
    );
    assert_eq!(card(&render("<{{ name }}@x.org> <a@{{ name }}>", Some("n"))), "<p>&lt;n@x.org&gt; &lt;a@n&gt;</p>\n");
}

#[test]
fn mistakes_are_reported_with_their_line() {
    assert_eq!(
        refused("Hello", "a\nb {{ nmae }}"),
        "line 2 of the text has the placeholder nmae; known are name, email and unsubscribe_url"
    );
    assert!(refused("Hello", "\n{% if email == 'x' %}{{ nmae }}{% endif %}").starts_with("line 2 of the text has the"));
    assert!(refused("Hello", "\n{% if not email %}{{ nmae }}{% endif %}").starts_with("line 2 of the text has the pl"));
    assert!(refused("{{ who }}", "").starts_with("the subject has the placeholder who;"));
    assert!(refused("Hello", "a\n\n{{ name").starts_with("line 3 of the text is not understood:"));
    assert!(
        refused("Hello", "a\n{{ name | upper }}").starts_with("line 2 of the text is not understood: filter upper")
    );
    assert_eq!(
        refused("Hello", "{% for i in name %}{% endfor %}"),
        "line 1 of the text has {% for %}; only if, elif, else and endif are known"
    );
    assert!(refused("Hello", "{%- include 'x' %}").contains("{% include %}"));
    assert!(refused("Hello", "{{ name.first }}").contains("does not exist"));
    assert!(refused("Hello", "{{ range(9) }}").contains("placeholder range"));
}

#[test]
fn the_subject_is_one_nonempty_line() {
    assert_eq!(refused(" ", ""), "the subject is empty");
    assert_eq!(refused("a\nb", ""), "the subject is one line, without control characters");
    assert_eq!(refused("{{ name }}", ""), "the subject is empty for a recipient without a name");
    assert!(refused(&"x".repeat(251), "").contains("more than 250"));
    let template = Template::new("For {{ name or 'you' }}", "").unwrap();
    let rendered = template.render(&ann(Some("Ann\r\nBcc: eve@example.org"))).unwrap();
    assert_eq!(rendered.subject, "For Ann  Bcc: eve@example.org");
}

#[test]
fn only_markdown_produces_html() {
    let rendered = render("<script>x</script>\n\nA <b>b</b> & {{ name }}\n\n<div>\n*c*\n</div>", Some("<i>Ann</i>"));
    let card = card(&rendered);
    for tag in ["<script", "<b>", "<i>", "<div"] {
        assert!(!card.contains(tag), "{card}");
    }
    assert!(card.contains("&lt;script&gt;x&lt;/script&gt;") && card.contains("&lt;i&gt;Ann&lt;/i&gt;"), "{card}");
    assert!(rendered.text.contains("<i>Ann</i>"));
}

#[test]
fn a_hostile_name_stays_a_name() {
    for name in
        ["*<b>x</b>*", "# x", "- x", "[x](https://evil.example)", "https://evil.example", "`x`", "![x](y)", "| x |"]
    {
        let escaped = name.replace('<', "&lt;").replace('>', "&gt;");
        assert_eq!(card(&render("{{ name }}", Some(name))), format!("<p>{escaped}</p>\n"));
        assert_eq!(card(&render("`{{ name }}`", Some(name))), format!("<p><code>{escaped}</code></p>\n"));
    }
}

#[test]
fn links_may_only_lead_to_the_web_and_to_mail() {
    let card_of = |body: &str, name| card(&render(body, name)).to_owned();
    assert_eq!(card_of("[a](javascript:alert)", None), "<p>a</p>\n");
    assert_eq!(card_of("[a]({{ name }})", Some("javascript:alert(1)")), "<p>a</p>\n");
    assert_eq!(card_of("![a](file:///x)", None), "<p>a</p>\n");
    assert_eq!(card_of("<a@x.org>", None), "<p><a href=\"mailto:a@x.org\">a@x.org</a></p>\n");
    assert_eq!(
        card_of("See https://x.org/a_b_c. Or (http://y.org)", None),
        "<p>See <a href=\"https://x.org/a_b_c\">https://x.org/a_b_c</a>. \
         Or (<a href=\"http://y.org\">http://y.org</a>)</p>\n"
    );
    assert_eq!(
        card_of("[a](https://x.org/?n={{ name }})", Some("A\"><b>")),
        "<p><a href=\"https://x.org/?n=A%22%3E%3Cb%3E\">a</a></p>\n"
    );
}

#[test]
fn a_bare_link_is_the_same_in_both_parts() {
    for url in [
        "https://x.org/_a_b_",
        "https://x.org/*a*",
        "https://x.org/**a**/__b__",
        "https://x.org/a[1][2]",
        "https://x.org/[a](b)",
        "https://x.org/wiki/A_(b)",
        "https://x.org/~~a~~?b=_c_&d=*",
    ] {
        let rendered = render(&format!("Hi {{{{ name }}}},\nsee {url}, *please*."), Some("_Ann_"));
        assert!(rendered.text.contains(url));
        let shown = url.replace('&', "&amp;");
        assert_eq!(
            card(&rendered),
            format!("<p>Hi _Ann_,<br />\nsee <a href=\"{shown}\">{shown}</a>, <em>please</em>.</p>\n")
                .replace("href=\"https://x.org/[a](b)", "href=\"https://x.org/%5Ba%5D(b)")
                .replace("href=\"https://x.org/a[1][2]", "href=\"https://x.org/a%5B1%5D%5B2%5D")
        );
    }
    assert!(card(&render("**https://x.org/a_b**", None)).contains("<strong><a href=\"https://x.org/a_b\">"));
    assert!(
        card(&render("https://x.org/?n={{ name }}&e=_x_", Some("A B")))
            .contains("href=\"https://x.org/?n=A%20B&amp;e=_x_\"")
    );
    assert!(card(&render(r"https://x.org/a\_b", None)).contains("href=\"https://x.org/a_b\""));
}

#[test]
fn the_unsubscribe_url_is_used_or_added() {
    let recipient = Recipient { unsubscribe_url: Some(URL), ..ann(None) };
    let render = |body: &str| Template::new("Hello", body).unwrap().render(&recipient).unwrap();
    let href = "<a href=\"https://mail.example/u/_a_*b*?x=1&amp;y=2\"";
    let added = render("Hi");
    assert_eq!(added.text, format!("Hi\n\n-- \nUnsubscribe: {URL}\n"));
    assert!(added.html.contains(href) && added.html.contains(">Unsubscribe</a>"), "{}", added.html);
    for body in ["Enough? {{ unsubscribe_url }}", "[Enough]({{ unsubscribe_url }})", "<{{ unsubscribe_url }}>"] {
        let used = render(body);
        assert!(!used.text.contains("-- \n"));
        assert_eq!(used.html.matches(href).count(), 1, "{}", used.html);
        assert!(!used.html.contains(">Unsubscribe</a>"));
    }
    assert_eq!(Template::new("Hello", "{{ unsubscribe_url }}").unwrap().render(&ann(None)).unwrap().text, "");
}

#[test]
fn a_text_can_not_exhaust_the_process_that_parses_it() {
    for (repeated, after) in
        [("-", "name"), ("not ", "name"), ("(", "name"), ("[", ""), ("name or ", "name"), ("name|default(", "name")]
    {
        let error = refused("Hello", &format!("a\n{{{{ {}{after} }}}}", repeated.repeat(90_000 / repeated.len())));
        assert_eq!(error, "line 2 of the text has more than 500 characters after {{");
    }
    for tail in [".a", "[0]", " or name", "|default('')", " ~ name", " == name", " if name else name"] {
        assert!(refused("Hello", &format!("{{{{ name{} }}}}", tail.repeat(9_000))).contains("more than 500"));
    }
    // Ends of a tag that the parser ignores do not end it here.
    for hidden in ["'}}'", "'\\'}}'", "\"%}'}}\""] {
        assert!(refused("Hello", &format!("{{{{ {hidden}{} }}}}", " or name".repeat(9_000))).contains("more than 500"));
    }
    assert_eq!(refused("Hello", "a\n{{ 'x' * 1000000000 }}"), "line 2 of the text has * after {{");
    assert_eq!(refused("Hello", "{% if 2 ** 999 %}{% endif %}"), "line 1 of the text has * after {%");
    assert_eq!(refused("Hello", "{{ {'a': {}} }}"), "line 1 of the text has { after {{");
    let elifs = |count: usize| format!("{{% if name %}}{}{{% endif %}}", "{% elif email %}".repeat(count));
    assert!(Template::new("Hello", &elifs(50)).is_ok());
    assert_eq!(refused("Hello", &elifs(51)), "line 1 of the text has more than 50 times {% elif %}");
    let ifs = |count: usize| format!("{}{}", "{% if name %}".repeat(count), "{% endif %}".repeat(count));
    assert!(Template::new("Hello", &ifs(50)).is_ok());
    assert!(refused("Hello", &ifs(3_000)).contains("recursion"));
    // The deepest nesting that fits.
    for tag in [format!("{}name", "-".repeat(490)), format!("name{}", ".a".repeat(240)), "not ".repeat(120) + "name"] {
        let text = "{% if name %}".repeat(70) + &elifs(50).replacen("name", &tag, 1) + &"{% endif %}".repeat(70);
        let _ = Template::new("Hello", &text);
    }
}

#[test]
fn text_outside_of_tags_is_not_limited() {
    for text in ["*a* {b} { {", "{# {{ ** #} ** *", "{{ name }}{# x #}{{ '*}}{' }} * {"] {
        let text = format!("{text}{}", " * long".repeat(200));
        assert!(Template::new("Hello", &text).is_ok(), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_text_of_any_structure_takes_bounded_room(
        pieces in prop::collection::vec((prop::sample::select(&[
            "{{", "}}", "{%", "%}", "{#", "#}", " name ", " email", "{{ name }}", "{{ name ~ name ~ name ~ name }}", "{% if name %}",
            "{% elif name %}", "{% else %}", "{% endif %}", " or ", "-", "not ", "(", ")", "[", "]", "{", "'", "\"", "\\", "|default(", ".a", " * 999",
            ">", "> ", "* ", "- ", "1. ", "`", "```\n", "_", "**", "~~", "![", "](", "<", "<a@", "https://", "|", "|-", "&", "\n", "\n\n", "    ", "# ",
        ][..]), prop::sample::select(&[1usize, 1, 1, 2, 9, 400][..])), 1..14)
    ) {
        let text: String = pieces.iter().map(|(piece, count)| piece.repeat(*count)).collect();
        let long = "N".repeat(200);
        let rendered = Template::new("Hello", &text).and_then(|template| template.render(&ann(Some(&long))));
        if let Ok(rendered) = rendered {
            prop_assert!(rendered.text.len() <= 200 * text.len() + 200);
            prop_assert!(rendered.html.len() <= 2_000 * text.len() + 4_000, "{} from {}", rendered.html.len(), text.len());
        }
    }

    #[test]
    fn no_name_changes_what_the_page_is(name in "(\\PC|[\\s\\S]){0,60}|[<>&\"'*_`#\\[\\]()!~|\\\\\r\n -]{0,30}") {
        let template = Template::new("For {{ name or 'you' }}", "# Hi {{ name }}\n\n- {{ name }}\n\n**{{ name }}** {{ name }}").unwrap();
        let quiet = template.render(&ann(Some("Ann"))).unwrap();
        let rendered = template.render(&ann(Some(&name)));
        let rendered = rendered.unwrap();
        prop_assert!(!rendered.subject.chars().any(char::is_control));
        prop_assert!(!rendered.subject.is_empty());
        let tags = |html: &str| html.split('<').skip(1).map(|tag| tag.split(['>', ' ']).next().unwrap_or_default().to_owned()).collect::<Vec<_>>();
        prop_assert_eq!(tags(&quiet.html), tags(&rendered.html));
    }

    #[test]
    fn whatever_is_written_nothing_panics(subject in "\\PC{0,40}", body in "([\\s\\S]|\\{\\{|\\}\\}|\\{%|%\\}|name| if ){0,40}") {
        let _ = Template::new(&subject, &body).map(|template| template.render(&ann(Some("Ann"))));
    }
}

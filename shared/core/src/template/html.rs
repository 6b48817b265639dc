//! From Markdown to a page that mail readers show as it is meant.

use std::mem::take;

use pulldown_cmark::{CowStr, Event, LinkType, Options, Parser, Tag, TagEnd, TextMergeStream, html::push_html};

use super::{
    links::veil_links,
    veil::{link, unveil, veil},
};

/// Where a link or an image may lead; anything else is shown as text.
const SCHEMES: [&str; 3] = ["https://", "http://", "mailto:"];

/// Readers drop style sheets more often than attributes, so what matters stands in attributes.
const HEAD: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="supported-color-schemes" content="light dark">
<title>"#;
const BODY: &str = r#"</title>
<style>
:root { color-scheme: light dark; supported-color-schemes: light dark; }
img { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  .page { background: #17181b !important; }
  .card { background: #212327 !important; color: #e8e8ea !important; }
  .card a { color: #8ab4ff !important; }
  .foot, .foot a { color: #a0a3aa !important; }
}
</style>
</head>
<body class="page" style="margin:0;padding:0;background:#f4f4f6;">
<table role="presentation" class="page" width="100%" cellpadding="0" cellspacing="0" border="0" style="background:#f4f4f6;">
<tr><td align="center" style="padding:32px 16px;">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" style="max-width:560px;">
<tr><td class="card" style="background:#ffffff;border-radius:12px;padding:28px 32px;color:#1d1d1f;font:16px/1.6 -apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;word-break:break-word;">
"#;
const FOOT: &str = "</td></tr>\n";
const END: &str = "</table>\n</td></tr>\n</table>\n</body>\n</html>\n";

/// The page: `markdown` with veiled values, `subject` as its title, and a line with the address `footer`, if there is one.
/// `unsubscribe_url` is a link wherever it stands.
pub fn page(subject: &str, markdown: &str, unsubscribe_url: Option<&str>, footer: Option<&str>) -> String {
    let mut page = String::with_capacity(2_048 + 2 * markdown.len());
    page.push_str(HEAD);
    escape(&mut page, subject);
    page.push_str(BODY);
    let options = Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TABLES;
    let markdown = veil_links(markdown, options);
    push_html(&mut page, harmless(&markdown, options, unsubscribe_url).into_iter());
    page.push_str(FOOT);
    if let Some(url) = footer {
        page.push_str(r#"<tr><td class="foot" align="center" style="padding:16px;color:#6e6e73;font:13px/1.5 -apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"><a href=""#);
        escape(&mut page, url);
        page.push_str("\" style=\"color:#6e6e73;\">Unsubscribe</a></td></tr>\n");
    }
    page.push_str(END);
    page
}

/// What is written, with every tag shown as text, and lines broken as in the plain part.
fn harmless<'a>(markdown: &'a str, options: Options, unsubscribe_url: Option<&str>) -> Vec<Event<'a>> {
    let unsubscribe = unsubscribe_url.map(veil);
    let mut shown = Vec::new();
    // Of links and images within each other, whether they are shown as such.
    let mut linked: Vec<bool> = Vec::new();
    let parser = Parser::new_ext(markdown, options);
    let as_text = parser.map(|event| match event {
        Event::Html(text) | Event::InlineHtml(text) => Event::Text(text),
        event => event,
    });
    for event in TextMergeStream::new(as_text) {
        match event {
            Event::Text(text) if linked.is_empty() => push_text(&mut shown, &text, unsubscribe.as_deref()),
            Event::Text(text) => shown.push(Event::Text(unveil(&text).into())),
            Event::Code(text) => shown.push(Event::Code(unveil(&text).into())),
            Event::SoftBreak => shown.push(Event::HardBreak),
            // The tags of a block of HTML are text by now; around them stands an ordinary paragraph.
            Event::Start(Tag::HtmlBlock) => shown.push(Event::Start(Tag::Paragraph)),
            Event::End(TagEnd::HtmlBlock) => shown.push(Event::End(TagEnd::Paragraph)),
            Event::Start(Tag::Link { link_type, dest_url, title, id }) => {
                let dest_url = address(&dest_url, link_type);
                linked.push(dest_url.is_some());
                if let Some(dest_url) = dest_url {
                    let title = unveil(&title).into();
                    // An address of mail gets its scheme above, once.
                    let link_type = if link_type == LinkType::Email { LinkType::Autolink } else { link_type };
                    shown.push(Event::Start(Tag::Link { link_type, dest_url, title, id }));
                }
            }
            Event::Start(Tag::Image { link_type, dest_url, title, id }) => {
                let dest_url = address(&dest_url, link_type);
                linked.push(dest_url.is_some());
                if let Some(dest_url) = dest_url {
                    shown.push(Event::Start(Tag::Image { link_type, dest_url, title: unveil(&title).into(), id }));
                }
            }
            Event::End(TagEnd::Link | TagEnd::Image) => {
                if linked.pop().unwrap_or_default() {
                    shown.push(event);
                }
            }
            // What programming language a block is in is of no use to a reader of mail.
            Event::Start(Tag::CodeBlock(_)) => {
                shown.push(Event::Start(Tag::CodeBlock(pulldown_cmark::CodeBlockKind::Indented)));
            }
            event => shown.push(event),
        }
    }
    shown
}

/// Where a link leads, if it may lead there.
fn address(destination: &str, link_type: LinkType) -> Option<CowStr<'static>> {
    let mut destination = unveil(destination);
    if link_type == LinkType::Email {
        destination.insert_str(0, "mailto:");
    }
    let known = SCHEMES
        .iter()
        .any(|scheme| destination.get(..scheme.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(scheme)));
    (known && !destination.chars().any(char::is_control)).then(|| destination.into())
}

/// Shows a text, and makes links of those that its author wrote out and of the unsubscribe address. A link within a value is
/// none: a name on a list must not lead anybody anywhere.
fn push_text(shown: &mut Vec<Event<'_>>, text: &str, unsubscribe: Option<&str>) {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let out = unsubscribe.filter(|url| rest.starts_with(url)).map(|url| (unveil(url), url.len()));
        let Some((url, length)) = out.or_else(|| link(rest)) else {
            plain.push(next);
            rest = &rest[next.len_utf8()..];
            continue;
        };
        shown.push(Event::Text(unveil(&take(&mut plain)).into()));
        let url: CowStr<'static> = url.into();
        let link = Tag::Link { link_type: LinkType::Inline, dest_url: url.clone(), title: "".into(), id: "".into() };
        shown.extend([Event::Start(link), Event::Text(url), Event::End(TagEnd::Link)]);
        rest = &rest[length..];
    }
    shown.push(Event::Text(unveil(&plain).into()));
}

fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            character => out.push(character),
        }
    }
}

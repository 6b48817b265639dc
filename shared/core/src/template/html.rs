//! Converts Markdown to an HTML page that mail readers display correctly.

use std::mem::take;

use pulldown_cmark::{CowStr, Event, LinkType, Options, Parser, Tag, TagEnd, TextMergeStream, html::push_html};

use super::{
    Escape, Segments,
    links::hide_links,
    syntax::{Field, Piece},
    words::{Part, Words},
};

/// The schemes allowed for links and images. Anything else is shown as text.
const SCHEMES: [&str; 3] = ["https://", "http://", "mailto:"];

/// Mail readers drop style sheets more often than attributes, so essential styles are attributes.
pub const HEAD: &str = r#"<!DOCTYPE html>
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

/// The page after the start of its title, with an unsubscribe line if `footer` is set. `body` is the source of `pieces`.
pub fn page(body: &str, pieces: &[Piece<'_>], footer: bool) -> Segments {
    let options = Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TABLES;
    let mut words = Words::new(body);
    let mut markdown = String::with_capacity(body.len());
    for piece in pieces {
        match piece {
            Piece::Text(text) => markdown.push_str(text),
            Piece::Value(_) | Piece::Default(_) => markdown.push_str(&words.for_value(piece)),
        }
    }
    let markdown = hide_links(&markdown, options, &mut words);
    let mut card = String::with_capacity(2 * markdown.len());
    push_html(&mut card, harmless(&markdown, options, &words).into_iter());

    let mut page = Segments::default();
    page.push_text(BODY);
    words.push_segments(&card, &mut page);
    page.push_text(FOOT);
    if footer {
        page.push_text(r#"<tr><td class="foot" align="center" style="padding:16px;color:#6e6e73;font:13px/1.5 -apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"><a href=""#);
        page.push_value(Field::UnsubscribeUrl, Escape::Attribute);
        page.push_text("\" style=\"color:#6e6e73;\">Unsubscribe</a></td></tr>\n");
    }
    page.push_text(END);
    page
}

/// Renders the events, with every HTML tag shown as text, and lines broken as in the plain part.
fn harmless<'a>(markdown: &'a str, options: Options, words: &Words<'_>) -> Vec<Event<'a>> {
    let mut shown = Vec::new();
    // For nested links and images: whether each is rendered as such.
    let mut linked: Vec<bool> = Vec::new();
    // The text of an image becomes an attribute.
    let mut images = 0_usize;
    let parser = Parser::new_ext(markdown, options);
    let as_text = parser.map(|event| match event {
        Event::Html(text) | Event::InlineHtml(text) => Event::Text(text),
        event => event,
    });
    for event in TextMergeStream::new(as_text) {
        let escape = if images > 0 { Escape::Attribute } else { Escape::Html };
        match &event {
            Event::Start(Tag::Image { .. }) => images += 1,
            Event::End(TagEnd::Image) => images = images.saturating_sub(1),
            _ => {}
        }
        match event {
            Event::Text(text) if linked.is_empty() => push_text(&mut shown, &text, words),
            Event::Text(text) => shown.push(Event::Text(words.to_html(&text, escape).into())),
            Event::Code(text) => shown.push(Event::Code(words.to_html(&text, escape).into())),
            Event::SoftBreak => shown.push(Event::HardBreak),
            // HTML tags are text here, so an HTML block becomes an ordinary paragraph.
            Event::Start(Tag::HtmlBlock) => shown.push(Event::Start(Tag::Paragraph)),
            Event::End(TagEnd::HtmlBlock) => shown.push(Event::End(TagEnd::Paragraph)),
            Event::Start(Tag::Link { link_type, dest_url, title, id }) => {
                let dest_url = address(&dest_url, link_type, words);
                linked.push(dest_url.is_some());
                if let Some(dest_url) = dest_url {
                    let title = words.to_html(&title, Escape::Attribute).into();
                    // The scheme of a mail address is added once, above.
                    let link_type = if link_type == LinkType::Email { LinkType::Autolink } else { link_type };
                    shown.push(Event::Start(Tag::Link { link_type, dest_url, title, id }));
                }
            }
            Event::Start(Tag::Image { link_type, dest_url, title, id }) => {
                let dest_url = address(&dest_url, link_type, words);
                linked.push(dest_url.is_some());
                if let Some(dest_url) = dest_url {
                    shown.push(Event::Start(Tag::Image {
                        link_type,
                        dest_url,
                        title: words.to_html(&title, Escape::Attribute).into(),
                        id,
                    }));
                }
            }
            Event::End(TagEnd::Link | TagEnd::Image) => {
                if linked.pop().unwrap_or_default() {
                    shown.push(event);
                }
            }
            // The language of a code block is of no use in a mail.
            Event::Start(Tag::CodeBlock(_)) => {
                shown.push(Event::Start(Tag::CodeBlock(pulldown_cmark::CodeBlockKind::Indented)));
            }
            event => shown.push(event),
        }
    }
    shown
}

/// The target of a link, if it is allowed.
fn address(destination: &str, link_type: LinkType, words: &Words<'_>) -> Option<CowStr<'static>> {
    let scheme = if link_type == LinkType::Email { "mailto:" } else { "" };
    let destination = format!("{scheme}{destination}");
    let may_lead_there = has_known_scheme(&destination, words) && !destination.chars().any(char::is_control);
    may_lead_there.then(|| words.to_html(&destination, Escape::Href).into())
}

/// Whether the author chose the scheme, and not a value: a name in a list must not decide where a link leads.
fn has_known_scheme(destination: &str, words: &Words<'_>) -> bool {
    let mut beginning = String::new();
    for part in words.split(destination) {
        match part {
            Part::Value(index, _) if beginning.is_empty() && words.is_unsubscribe_url(index) => return true,
            Part::Value(index, _) => match words.value(index) {
                Some(Piece::Default(text)) => beginning.push_str(text),
                _ => break,
            },
            Part::Text(text) | Part::Link(text) => beginning.push_str(text),
        }
    }
    SCHEMES
        .iter()
        .any(|scheme| beginning.get(..scheme.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(scheme)))
}

/// Writes text, turning written-out links of the author and the unsubscribe URL into links. A link within a value stays text.
fn push_text(shown: &mut Vec<Event<'_>>, text: &str, words: &Words<'_>) {
    let mut plain = String::new();
    for part in words.split(text) {
        let (address, url) = match part {
            Part::Text(text) => {
                plain.push_str(text);
                continue;
            }
            Part::Value(index, _) if !words.is_unsubscribe_url(index) => {
                plain.push_str(&words.in_html(index, Escape::Html));
                continue;
            }
            Part::Value(index, _) => (words.in_html(index, Escape::Href), words.in_html(index, Escape::Html)),
            Part::Link(url) => (words.to_html(url, Escape::Href), words.to_html(url, Escape::Html)),
        };
        shown.push(Event::Text(take(&mut plain).into()));
        let link = Tag::Link { link_type: LinkType::Inline, dest_url: address.into(), title: "".into(), id: "".into() };
        shown.extend([Event::Start(link), Event::Text(url.into()), Event::End(TagEnd::Link)]);
    }
    shown.push(Event::Text(plain.into()));
}

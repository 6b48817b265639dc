//! Finds the links that an author wrote out, before Markdown interprets `_`, `*` and brackets in them. So the HTML part has the
//! same link as the plain part.

use std::{borrow::Cow, ops::Range};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::words::Words;

/// The schemes of written-out links.
const SCHEMES: [&str; 2] = ["https://", "http://"];
/// Longer links are shown as text.
const MAX_LINK_BYTES: usize = 4_096;
/// Punctuation that ends a sentence is not part of the link before it.
const AFTER_A_LINK: &str = ".,;:!?'。，、！？：；）】》」』”’…";

/// Replaces every written-out link with a placeholder word. Links in code, and those that Markdown itself recognises, are left
/// alone.
pub fn hide_links<'m>(markdown: &'m str, options: Options, words: &mut Words<'_>) -> Cow<'m, str> {
    if schemes(markdown).next().is_none() {
        return Cow::Borrowed(markdown);
    }
    let mut hidden = String::with_capacity(markdown.len());
    let mut done = 0;
    for Link { range, literal } in find(markdown, options) {
        hidden.push_str(&markdown[done..range.start]);
        let url = &markdown[range.clone()];
        hidden.push_str(&words.for_link(if literal { url.to_owned() } else { without_escapes(url) }));
        done = range.end;
    }
    hidden.push_str(&markdown[done..]);
    Cow::Owned(hidden)
}

/// A written-out link.
struct Link {
    range: Range<usize>,
    /// It is in a code block, where a backslash is literal.
    literal: bool,
}

/// Emphasis around a link; the innermost ends first.
struct Emphasis {
    end: usize,
    delimiter_bytes: usize,
}

fn find(markdown: &str, options: Options) -> Vec<Link> {
    let mut found: Vec<Link> = Vec::new();
    let mut emphasis: Vec<Emphasis> = Vec::new();
    let mut cell_end = None;
    // Markdown's own links and images contain no written-out links.
    let mut linked = 0_u32;
    let mut literal = false;
    let mut starts = schemes(markdown).peekable();
    for (event, range) in Parser::new_ext(markdown, options).into_offset_iter() {
        match event {
            Event::Start(Tag::Link { .. } | Tag::Image { .. }) => linked += 1,
            Event::End(TagEnd::Link | TagEnd::Image) => linked = linked.saturating_sub(1),
            Event::Start(Tag::CodeBlock(_)) => literal = true,
            Event::End(TagEnd::CodeBlock) => literal = false,
            Event::Start(Tag::TableCell) => cell_end = Some(range.end),
            Event::End(TagEnd::TableCell) => cell_end = None,
            Event::Start(Tag::Emphasis) => emphasis.push(Emphasis { end: range.end, delimiter_bytes: 1 }),
            Event::Start(Tag::Strong) => emphasis.push(Emphasis { end: range.end, delimiter_bytes: 2 }),
            Event::Start(Tag::Strikethrough) => {
                let doubled = markdown[range.clone()].starts_with("~~");
                emphasis.push(Emphasis { end: range.end, delimiter_bytes: 1 + usize::from(doubled) });
            }
            Event::End(TagEnd::Emphasis | TagEnd::Strong | TagEnd::Strikethrough) => {
                emphasis.pop();
            }
            Event::Text(_) | Event::Html(_) | Event::InlineHtml(_) if linked == 0 => {
                while let Some(start) = starts.next_if(|start| *start < range.end) {
                    // What is before this position is not text, or belongs to the previous link.
                    if start < range.start || found.last().is_some_and(|link| start < link.range.end) {
                        continue;
                    }
                    let limit = cell_end.unwrap_or(markdown.len()).max(start);
                    let end = start + length(&markdown[start..limit], start, &emphasis);
                    if end > start {
                        found.push(Link { range: start..end, literal });
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// The positions of schemes.
fn schemes(text: &str) -> impl Iterator<Item = usize> + '_ {
    text.match_indices("://").filter_map(|(colon, _)| {
        let before = &text.as_bytes()[..colon];
        let names = SCHEMES.iter().map(|scheme| scheme.trim_end_matches("://").as_bytes());
        let is_before =
            |name: &&[u8]| before.len() >= name.len() && before[before.len() - name.len()..].eq_ignore_ascii_case(name);
        names.filter(is_before).map(|name| colon - name.len()).min()
    })
}

/// The length in bytes of the link at the start of `text`; 0 if nothing follows the scheme. `offset` is the position of `text`, in
/// the unit of `emphasis`.
fn length(text: &str, offset: usize, emphasis: &[Emphasis]) -> usize {
    let stops = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '<' | '>' | '"' | '`');
    let mut end = text.find(stops).unwrap_or(text.len());
    if end > MAX_LINK_BYTES {
        return 0;
    }
    let scheme = text.find("://").map_or(text.len(), |index| index + 3);
    while end > scheme {
        let url = &text[..end];
        let Some(last) = url.chars().next_back() else { break };
        let inner = emphasis.partition_point(|emphasis| emphasis.end > offset + end);
        let closed = emphasis.get(inner).filter(|emphasis| emphasis.end == offset + end);
        end -= match (last, closed) {
            (_, Some(emphasis)) => emphasis.delimiter_bytes,
            (')', _) if is_unbalanced(url, '(', ')') => 1,
            (']', _) if is_unbalanced(url, '[', ']') => 1,
            ('}', _) if is_unbalanced(url, '{', '}') => 1,
            (last, _) if AFTER_A_LINK.contains(last) => last.len_utf8(),
            _ => break,
        };
    }
    if end > scheme { end } else { 0 }
}

/// Whether the text around the link opened the bracket that its last character closes.
fn is_unbalanced(url: &str, open: char, close: char) -> bool {
    url.matches(close).count() > url.matches(open).count()
}

/// Removes backslashes: they escape the next character in Markdown, and are not part of the link.
fn without_escapes(url: &str) -> String {
    let mut characters = url.chars().peekable();
    std::iter::from_fn(|| match characters.next()? {
        '\\' if characters.peek().is_some_and(char::is_ascii_punctuation) => characters.next(),
        character => Some(character),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn links(markdown: &str) -> Vec<&str> {
        let options = Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TABLES;
        find(markdown, options).into_iter().map(|link| &markdown[link.range]).collect()
    }

    #[test]
    fn a_link_is_kept_whole_whatever_it_contains() {
        for url in [
            "https://x.org/a_b_c",
            "https://x.org/_a_",
            "https://x.org/__init__",
            "https://x.org/*a*/b",
            "https://x.org/**a**",
            "https://x.org/a[1]",
            "https://x.org/[a](b)",
            "https://x.org/wiki/A_(b)",
            "https://x.org/?q={a}&r=~b",
            "HTTPS://x.org/a!b",
            "http://x.org",
        ] {
            for text in [
                "{}",
                "See {} now",
                "({})",
                "[{}]",
                "See {}.",
                "a {}, b",
                "**{}**",
                "*see {}*",
                "~~{}~~!",
                "- {}\n- b",
                "> {}",
                "# {}",
            ] {
                let text = text.replace("{}", url);
                assert_eq!(links(&text), [url], "{text}");
            }
        }
    }

    #[test]
    fn links_that_markdown_recognises_are_left_alone() {
        for text in [
            "[a](https://x.org/a_b)",
            "<https://x.org/a_b>",
            "![a](https://x.org/*a*)",
            "`https://x.org`",
            "https://",
            "(http://).",
        ] {
            assert!(links(text).is_empty(), "{text}");
        }
        assert_eq!(links("[a](https://x.org/_) https://y.org/_a_"), ["https://y.org/_a_"]);
        assert_eq!(links("| a | b |\n|---|---|\n| https://x.org/a| c |"), ["https://x.org/a"]);
        assert_eq!(links("<a href=\"https://x.org/a_b\">c</a>"), ["https://x.org/a_b"]);
        assert_eq!(links(&format!("https://x.org/{}", "a".repeat(5_000))), [""; 0]);
    }

    proptest! {
        #[test]
        fn links_are_in_order_and_do_not_overlap(text in "(https://|http://|x|_|\\*|~|\\[|\\]|\\(|\\)|`|<|>| |\n|\\||-|é|\"|\\\\){0,40}") {
            let options = Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TABLES;
            let mut end = 0;
            for link in find(&text, options) {
                prop_assert!(link.range.start >= end && link.range.end > link.range.start);
                end = link.range.end;
                prop_assert!(text.is_char_boundary(link.range.start) && text.is_char_boundary(end));
            }
            hide_links(&text, options, &mut Words::new(&text));
        }
    }
}

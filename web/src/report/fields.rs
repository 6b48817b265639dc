//! The fields of a mail header and of the machine-readable part of a report.

/// The fields with their values unfolded.
pub(super) fn fields(lines: &mut dyn Iterator<Item = &str>) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        if line.trim().is_empty() {
            if !fields.is_empty() {
                break;
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    fields
}

/// The first field of this name.
pub(super) fn field<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1.as_str())
}

/// `rfc822; ann@example.org` without its type. The type is optional.
pub(super) fn untyped(value: &str) -> &str {
    let is_type = |kind: &str| kind.len() < 40 && kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match value.split_once(';') {
        Some((kind, value)) if is_type(kind.trim()) => value.trim(),
        _ => value.trim(),
    }
}

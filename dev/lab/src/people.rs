//! Fictional people, as the demo, the bench and the fault bench invite them: numbered, so that a mail server can tell them apart.

use std::fmt::Write as _;

/// A list of `count` people, one a line, numbered from 1.
pub fn people(name: &str, count: usize) -> String {
    people_at("example.org", name, count)
}

/// The same, at `domain`: where those of one domain stand beside each other in an index of addresses, the same names at
/// several domains come in between each other.
pub fn people_at(domain: &str, name: &str, count: usize) -> String {
    let mut list = String::with_capacity(count * (name.len() + domain.len() + 10));
    for number in 1..=count {
        // Writing to a string does not fail.
        let _ = writeln!(list, "{name}-{number:07}@{domain}");
    }
    list
}

/// The number of the guest with this address.
pub fn guest_number(address: &str) -> Option<u32> {
    address.strip_prefix("guest-")?.split('@').next()?.parse().ok()
}

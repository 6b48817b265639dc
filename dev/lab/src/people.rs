//! Fictional people for the demo, the bench and the fault bench: numbered, so that a mail server can tell them apart.

use std::fmt::Write as _;

/// A list of `count` people, one per line, numbered from 1.
pub fn people(name: &str, count: usize) -> String {
    people_at("example.org", name, count)
}

/// The same at `domain`. In an index of addresses, those of one domain are adjacent, while the same names at several domains are
/// interleaved.
pub fn people_at(domain: &str, name: &str, count: usize) -> String {
    let mut list = String::with_capacity(count * (name.len() + domain.len() + 10));
    for number in 1..=count {
        // Writing to a string cannot fail.
        let _ = writeln!(list, "{name}-{number:07}@{domain}");
    }
    list
}

/// The number of the guest with this address.
pub fn guest_number(address: &str) -> Option<u32> {
    address.strip_prefix("guest-")?.split('@').next()?.parse().ok()
}

//! Messages that a rate limit does not allow yet: held in memory for a short time instead of passing through RabbitMQ.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    time::{Duration, Instant},
};

/// Messages are held for at most this time. Longer waits use a retry queue.
pub const LONGEST: Duration = Duration::from_secs(2);

/// A queue ordered by due time.
#[derive(Debug)]
pub struct Held<T> {
    room: usize,
    /// A counter that keeps entries with the same due time in insertion order.
    count: u64,
    waiting: BinaryHeap<Reverse<Entry<T>>>,
}

#[derive(Debug)]
struct Entry<T> {
    at: Instant,
    number: u64,
    value: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl<T> Held<T> {
    /// Holds at most `room` values.
    pub fn new(room: usize) -> Self {
        Self { room, count: 0, waiting: BinaryHeap::new() }
    }

    /// Holds a value until `at`.
    ///
    /// # Errors
    /// Returns the value if there is no room, or if it would be held for longer than [`LONGEST`].
    pub fn put(&mut self, value: T, at: Instant, now: Instant) -> Result<(), T> {
        if self.waiting.len() >= self.room || at > now + LONGEST {
            return Err(value);
        }
        self.count += 1;
        self.waiting.push(Reverse(Entry { at, number: self.count, value }));
        Ok(())
    }

    /// When the next value is due.
    pub fn next_at(&self) -> Option<Instant> {
        self.waiting.peek().map(|Reverse(entry)| entry.at)
    }

    /// Takes the earliest value that is due.
    pub fn take_due(&mut self, now: Instant) -> Option<T> {
        self.next_at().filter(|at| *at <= now)?;
        self.waiting.pop().map(|Reverse(entry)| entry.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_entries_come_out_in_order() {
        let (mut held, now) = (Held::new(3), Instant::now());
        let at = |ms| now + Duration::from_millis(ms);
        held.put("late", at(20), now).unwrap();
        held.put("first", at(10), now).unwrap();
        held.put("second", at(10), now).unwrap();
        assert_eq!(held.put("no room", at(0), now), Err("no room"));
        assert_eq!((held.next_at(), held.take_due(now)), (Some(at(10)), None));
        assert_eq!(
            [held.take_due(at(15)), held.take_due(at(15)), held.take_due(at(15))],
            [Some("first"), Some("second"), None]
        );
        assert_eq!(held.put("too long", now + LONGEST + LONGEST, now), Err("too long"));
    }
}

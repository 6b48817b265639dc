//! Mailrun under load and under faults: the benchmark and the fault bench, and the whole of Mailrun as children of this process.

pub mod bench;
pub mod chaos;
pub mod doubler;
pub mod local;
pub mod people;
pub mod supervise;
pub mod visitor;

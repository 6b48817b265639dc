//! The benchmark and the fault bench, and a complete Mailrun as children of this process.

pub mod bench;
pub mod chaos;
pub mod children;
pub mod doubler;
pub mod local;
pub mod people;
pub mod proxy;
pub mod visitor;

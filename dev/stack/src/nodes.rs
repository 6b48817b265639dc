//! How many nodes the private RabbitMQ has.

use clap::ValueEnum;

/// The nodes of a cluster besides the first.
pub(crate) const PEERS: usize = 2;

/// The number of RabbitMQ nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Nodes {
    /// A single node.
    #[default]
    #[value(name = "1", help = "One node")]
    One,
    /// A cluster.
    #[value(name = "3", help = "A cluster of three nodes")]
    Three,
}

impl Nodes {
    /// The value on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::One => "1",
            Self::Three => "3",
        }
    }
}

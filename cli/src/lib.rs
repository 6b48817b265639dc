//! What the mailrun program is made of beside the pipeline itself: the local stack, and the children it runs.

pub mod stack;
pub mod supervise;

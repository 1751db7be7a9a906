//! Units: the life of each as a state machine, and the task that lives it.

pub mod machine;

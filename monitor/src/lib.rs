//! Running one instance.

pub mod engine;

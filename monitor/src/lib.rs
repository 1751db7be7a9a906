//! Running one instance.

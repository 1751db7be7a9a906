//! The name server as its clients see it.

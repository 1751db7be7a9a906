//! A static site server.
fn main() {}

//! The host side of an instance's network.

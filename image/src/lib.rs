//! Building and reading images.

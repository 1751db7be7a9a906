//! What Kiln's parts agree on.
//!
//! The kernel, the shims under it and the monitor beside it are built apart and meet only through
//! the types of this crate:
//!
//! * [`host`]: the calls a shim offers to the kernel, and the traps it delivers to it;
//! * [`image`]: how an image file is laid out;
//! * [`manifest`]: what an image says about its program;
//! * [`configuration`]: what one run adds to the manifest;
//! * [`encoding`]: how the kernel gets both when it boots;
//! * [`link`]: the messages between a running kernel and its monitor;
//! * [`process`]: how the monitor starts the process shim.
//!
//! The crate holds data and its encoding only: no input or output, no policy.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod configuration;
pub mod encoding;
pub mod host;
pub mod image;
pub mod link;
pub mod manifest;
pub mod process;

//! The programs that images and engines are made of, as bytes: built by this crate's build script.

#![forbid(unsafe_code)]

/// The kernel: a static PIE, loaded by a shim.
pub const KERNEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kiln-kernel"));

/// The floor under the kernel in a confined process.
pub const PROCESS_SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kiln-shim-process"));

/// The floor under the kernel in a virtual machine.
pub const VM_SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kiln-shim-vm"));

/// The static site server: an ordinary Linux program, statically linked.
pub const SITE_SERVER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kiln-site-server"));

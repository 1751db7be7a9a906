//! The VM shim's logic that needs no privileged instruction, so that it is tested on the host: what the boot loader says,
//! the kernel's ELF file, physical frames and page tables.
//!
//! The machine itself (entry, descriptor tables, interrupts, time) is in the freestanding program, `main.rs`.
//!
//! What always holds:
//!
//! * nothing here allocates but from [`frames::Frames`];
//! * every number that comes from outside (boot loader, image, kernel) is checked before it is used as an address;
//! * no mapping is ever both writable and executable.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod command_line;
pub mod elf;
pub mod frames;
pub mod memory;
pub mod page;
pub mod physical;
pub mod ranges;
pub mod start_info;

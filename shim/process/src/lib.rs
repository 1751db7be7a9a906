//! The parts of the process shim that need no machine: they are ordinary safe code with unit tests.
//!
//! * [`elf`]: which pieces of an ELF file to map where;
//! * [`layout`]: which addresses the kernel may ask for.
//!
//! The program itself is `main.rs`.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod elf;
pub mod layout;

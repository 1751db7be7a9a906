//! The process shim: the floor under the kernel as a confined Linux process.
//!
//! A freestanding static PIE that the monitor executes from a memory file. It maps the kernel and the pieces of the
//! image, confines itself (no new privileges, syscall user dispatch, seccomp) and calls the kernel. From then on it is
//! a table of functions ([`host`](kiln_abi::host)) and a set of signal handlers ([`trap`]).
//!
//! It is not the isolation boundary towards the program: program, kernel and shim share one address space, and what
//! holds them is the seccomp filter and the namespaces that the monitor made. The shim's own checks keep an honest
//! kernel from hurting itself.
//!
//! What always holds:
//! * every `syscall` instruction lies in the section `kiln_syscall` ([`linux`]); one anywhere else becomes a trap;
//! * no mapping is writable and executable;
//! * signals are never blocked: an upcall leaves a handler without `rt_sigreturn`.
//!
//! | module | concern |
//! |---|---|
//! | [`start`] | from the first instruction to the kernel's entry |
//! | [`linux`] | system calls of the host |
//! | [`host`](mod@host) | console, events, descriptors, end |
//! | [`memory`] | mappings and the memory limit |
//! | [`time`] | clocks and the timer |
//! | [`trap`] | signals to upcalls |
//! | [`state`] | what handlers and calls share |
//! | [`message`] | the shim's own words |
//! | [`support`] | what the compiler expects to find |

#![no_std]
#![no_main]
#![deny(unsafe_code)]

mod host;
mod linux;
mod memory;
mod message;
mod start;
mod state;
mod support;
mod time;
mod trap;

//! Kiln's library operating system: everything that an unmodified Linux program expects, as an
//! unprivileged Rust program.
//!
//! # Scope
//!
//! The kernel gives one program (with any number of threads) the system-call interface of Linux for x86-64. It shares
//! the program's address space and privilege level (ring 3) and reaches the machine only through the host interface of
//! [`kiln_abi::host`]. It knows nothing of page tables, interrupt tables or the host's system calls, so the same binary
//! runs confined as a process and in a virtual machine.
//!
//! It is not a security boundary against its own program: the boundary is the engine (a confined process, or a virtual
//! machine).
//!
//! # What always holds
//!
//! * One CPU, no preemption inside the kernel: a program is interrupted, the kernel never is. State is nevertheless
//!   reached through [`sync::Mutex`], never through mutable statics, so that a second CPU is a matter of work, not of
//!   design. No lock is held while a program runs, nor across an `await`.
//! * Program memory is touched only by [`memory::user`], which turns bad addresses into `EFAULT`.
//! * A system call that is not supported says so: `ENOSYS`, or the error an older Linux would give, and one line in the
//!   log.
//!
//! # Where things are
//!
//! [`boot`] starts the program; [`cpu`] switches between kernel and program; [`task`] has threads, signals and futexes;
//! [`memory`] the address space; [`file`] open files, pipes, epoll and friends; [`fs`] file systems; [`net`] sockets;
//! [`link`] the line to the monitor; [`driver`] virtio devices; [`syscall`] decodes and encodes calls; [`trace`] logs.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod boot;
pub mod cpu;
pub mod driver;
pub mod error;
pub mod event;
pub mod file;
pub mod fs;
pub mod hash;
pub mod host;
pub mod kernel;
pub mod link;
pub mod memory;
pub mod net;
pub mod sync;
pub mod syscall;
pub mod task;
pub mod time;
pub mod trace;

pub use error::{Errno, Result};
pub use kernel::Kernel;

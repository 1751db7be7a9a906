//! System calls: decode, check, call the concept, encode.
//!
//! Each submodule has thin functions for one family and a table [`Entry`] for each; [`table`] joins them. What is in
//! the tables *is* what is supported: the dispatcher, the documentation and `kiln check` read the same data.
//!
//! A function gets a [`Call`] and gives an [`Outcome`]: done, or a future to wait for. Calls that can finish at once
//! never allocate.

pub mod event;
pub mod file;
pub mod memory;
pub mod path;
pub mod poll;
pub mod process;
pub mod signal;
pub mod socket;
pub mod table;
pub mod thread;
pub mod time;

use alloc::{boxed::Box, sync::Arc};
use core::{future::Future, pin::Pin};

use crate::{Errno, Kernel, Result, cpu::UserContext, task::Process, task::Thread};

/// A system call being made.
pub struct Call<'a> {
    /// The thread that makes it.
    pub thread: &'a Arc<Thread>,
    /// Its registers, for the few calls that read or change them.
    pub context: &'a mut UserContext,
    /// Raw arguments.
    pub arguments: [u64; 6],
}

impl Call<'_> {
    /// The raw argument `index`.
    #[must_use]
    pub fn raw(&self, index: usize) -> u64 {
        self.arguments[index]
    }

    /// Argument `index` as a C `int`.
    #[must_use]
    pub fn int(&self, index: usize) -> i32 {
        self.arguments[index] as i32
    }

    /// Argument `index` as a C `unsigned int`.
    #[must_use]
    pub fn unsigned(&self, index: usize) -> u32 {
        self.arguments[index] as u32
    }

    /// Argument `index` as a length.
    #[must_use]
    pub fn length(&self, index: usize) -> usize {
        self.arguments[index] as usize
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &Arc<Process> {
        &self.thread.process
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.thread.process.kernel
    }
}

/// Whether a call that a signal interrupts is made again after the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// If the handler has `SA_RESTART` (or there is no handler to run): `ERESTARTSYS`.
    WithFlag,
    /// Never: `EINTR` whenever a handler ran (`epoll_wait`, `nanosleep`, calls with a timeout).
    Never,
}

/// A call's future.
pub type Waiting = Pin<Box<dyn Future<Output = Result<u64>> + Send>>;

/// What became of a call.
pub enum Outcome {
    /// Finished.
    Done(Result<u64>),
    /// Must wait. Dropping the future takes the call back (a signal came).
    Wait(Waiting, Restart),
    /// Finished, with all registers already as they are to be (`rt_sigreturn`).
    Registers,
    /// The thread ends.
    Exit,
}

impl Outcome {
    /// A call that waits.
    pub fn wait(
        restart: Restart,
        future: impl Future<Output = Result<u64>> + Send + 'static,
    ) -> Outcome {
        Outcome::Wait(Box::pin(future), restart)
    }

    /// A call that failed.
    #[must_use]
    pub fn fail(error: Errno) -> Outcome {
        Outcome::Done(Err(error))
    }
}

macro_rules! outcome_from {
    ($($kind:ty),*) => {
        $(impl From<Result<$kind>> for Outcome {
            fn from(result: Result<$kind>) -> Outcome {
                Outcome::Done(result.map(|value| value as u64))
            }
        })*
    };
}
outcome_from!(u64, i64, u32, i32, usize, isize);

impl From<Result<()>> for Outcome {
    fn from(result: Result<()>) -> Outcome {
        Outcome::Done(result.map(|()| 0))
    }
}

/// A supported call.
pub struct Entry {
    /// Number on x86-64.
    pub number: u32,
    /// Linux's name.
    pub name: &'static str,
    /// The function.
    pub handler: fn(&mut Call<'_>) -> Outcome,
    /// What is not supported of it, for the documentation; empty when all is.
    pub limits: &'static str,
}

/// A call that may have to wait for a file: tries once now, and only if that gives `EAGAIN` and the file is
/// blocking makes a future that waits for `interest`.
pub fn retry_on_file(
    file: &Arc<crate::file::OpenFile>,
    interest: crate::file::Readiness,
    restart: Restart,
    mut attempt: impl FnMut() -> Result<usize> + Send + Unpin + 'static,
) -> Outcome {
    match attempt() {
        Err(Errno::EAGAIN) if !file.is_non_blocking() => {
            let file = Arc::clone(file);
            Outcome::wait(restart, async move {
                crate::file::watch::retry(Arc::clone(&file.file), interest, attempt)
                    .await
                    .map(|count| count as u64)
            })
        }
        result => result.into(),
    }
}

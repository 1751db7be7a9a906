//! The host's process behind a started unikernel, which all engines have in common.
//!
//! For: starting it from a thread that stays as long as it does, waiting for its end, ending it.
//! Not for: what the process executes and inherits; that is each engine's.
//!
//! What always holds: a dropped [`Kept`] has been killed and reaped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::{End, Running, StartError};

/// Bytes of stack of the thread that waits for the process.
const KEEPER_STACK: usize = 64 << 10;

/// A started process. Not reaped yet.
pub struct Started {
    /// Its number.
    pub pid: u32,
    /// Its descriptor.
    pub pidfd: OwnedFd,
}

/// Starts a process by `start`, in a thread that stays until the process has ended: Linux ends a child with the thread that
/// started it. What `start` owns is dropped before the process is told of.
///
/// # Errors
/// When there is no thread to be had. The error within is that of `start`.
pub fn start<E: Send + 'static>(
    start: impl FnOnce() -> Result<Started, E> + Send + 'static,
) -> Result<Result<Started, E>, StartError> {
    let failed = |what: &str, error: io::Error| StartError {
        what: what.to_owned(),
        remedy: None,
        source: Some(error),
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("kiln-instance".into())
        .stack_size(KEEPER_STACK)
        .spawn(move || keep(start, &sender))
        .map_err(|error| failed("cannot start a thread", error))?;
    receiver.recv().map_err(|_| {
        failed(
            "the thread for the instance ended",
            io::ErrorKind::Other.into(),
        )
    })
}

fn keep<E>(
    start: impl FnOnce() -> Result<Started, E>,
    sender: &mpsc::SyncSender<Result<Started, E>>,
) {
    let result = start();
    let watched = result
        .as_ref()
        .ok()
        .and_then(|started| started.pidfd.try_clone().ok());
    if sender.send(result).is_err() {
        return;
    }
    if let Some(pidfd) = watched {
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        while poll(&mut ended, None) == Err(Errno::INTR) {}
    }
}

/// A started process as a running unikernel.
pub struct Kept {
    process: Started,
    end: Option<End>,
    /// What an exit code of the process says.
    code: fn(i32) -> End,
    /// Whether the kernel in it takes `SIGIO` as a reason to look at the link.
    interruptible: bool,
}

impl Kept {
    /// A process whose exit code is the unikernel's and whose kernel can be interrupted.
    pub fn unikernel(process: Started) -> Self {
        Self {
            process,
            end: None,
            code: End::Exited,
            interruptible: true,
        }
    }

    /// A virtual machine's process, whose exit code means what `code` says.
    pub fn machine(process: Started, code: fn(i32) -> End) -> Self {
        Self {
            process,
            end: None,
            code,
            interruptible: false,
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.end.is_some() {
            return Ok(());
        }
        match pidfd_send_signal(&self.process.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Running for Kept {
    fn pid(&self) -> u32 {
        self.process.pid
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.process.pidfd.as_fd()
    }

    fn wait(&mut self) -> io::Result<End> {
        if let Some(end) = &self.end {
            return Ok(end.clone());
        }
        let status = loop {
            match waitid(WaitId::PidFd(self.ended()), WaitIdOptions::EXITED) {
                Err(Errno::INTR) | Ok(None) => {}
                Err(error) => return Err(error.into()),
                Ok(Some(status)) => break status,
            }
        };
        let end = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => (self.code)(code),
            (None, Some(signal)) => End::Signalled(signal),
            (None, None) => return Err(io::ErrorKind::InvalidData.into()),
        };
        self.end = Some(end.clone());
        Ok(end)
    }

    fn kill(&mut self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn interrupt(&self) -> io::Result<()> {
        if self.interruptible {
            self.signal(Signal::IO)
        } else {
            Ok(())
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.end.is_none() {
            let _ = self.kill();
            let _ = self.wait();
        }
    }
}

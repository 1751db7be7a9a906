//! Starting QEMU as a child that ends with its parent and inherits a few descriptors under their own numbers.

#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::engine::kept::Started;

/// Starts a program. What it says goes to `console`.
pub fn start(
    program: &Path,
    arguments: &[OsString],
    inherited: &[BorrowedFd<'_>],
    console: BorrowedFd<'_>,
) -> io::Result<Started> {
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = std::process::id();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(console.try_clone_to_owned()?)
        .stderr(console.try_clone_to_owned()?)
        // The terminal's Ctrl-C is for the monitor.
        .process_group(0);
    let prepare = move || {
        // SAFETY: system calls without memory arguments, which may be made between fork and exec.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have ended before.
            if libc::getppid() != parent.cast_signed() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for &number in &numbers {
                if libc::fcntl(number, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: `prepare` makes system calls and neither allocates nor locks.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn()?;
    let pid = child.id();
    // Whoever has the pidfd waits for it; the standard library's handle is dropped without waiting.
    let pidfd = Pid::from_raw(pid.cast_signed())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
    match pidfd {
        Ok(pidfd) => Ok(Started { pid, pidfd }),
        Err(error) => {
            let mut child = child;
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

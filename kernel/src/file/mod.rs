//! Open files: what a descriptor refers to, and how to wait for it.
//!
//! * [`File`] is what every open thing offers: pipes, sockets, regular files, epoll instances.
//! * [`OpenFile`] is Linux's *open file description*: a [`File`] with status flags and a position.
//! * [`table::FileTable`] maps descriptor numbers to open files.
//! * [`watch`] has the one mechanism by which anything waits for a file: readiness plus a list of watchers.
//! * [`io`] has the two ends of a copy: [`io::Sink`], where a read puts bytes, and [`io::Source`], where a write takes
//!   them.
//!
//! No method of [`File`] ever blocks: what cannot be done now is `EAGAIN`, and the system-call layer waits with
//! [`watch::retry`] unless the file is non-blocking.

pub mod console;
pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod io;
pub mod locks;
pub mod pipe;
pub mod signalfd;
pub mod table;
pub mod timerfd;
pub mod watch;

use alloc::{string::String, sync::Arc};
use core::any::Any;

use bitflags::bitflags;
use linux_raw_sys::general as linux;

pub use io::{Sink, Source};
pub use table::{FileTable, OpenFile};
pub use watch::{Readiness, WatchList, Watcher};

use crate::{Errno, Result, fs::Inode, fs::Metadata, task::Thread};

bitflags! {
    /// Status flags of an open file: `O_*` of `open(2)`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpenFlags: u32 {
        /// Bits of the access mode.
        const ACCESS_MODE = linux::O_ACCMODE;
        /// Only writing.
        const WRITE_ONLY = linux::O_WRONLY;
        /// Reading and writing.
        const READ_WRITE = linux::O_RDWR;
        /// Create if missing.
        const CREATE = linux::O_CREAT;
        /// With `CREATE`: must not exist.
        const EXCLUSIVE = linux::O_EXCL;
        /// Not to become the controlling terminal; has no effect here.
        const NO_CONTROLLING_TERMINAL = linux::O_NOCTTY;
        /// Cut to length zero.
        const TRUNCATE = linux::O_TRUNC;
        /// Writes go to the end.
        const APPEND = linux::O_APPEND;
        /// Never block.
        const NON_BLOCKING = linux::O_NONBLOCK;
        /// Data is on the disk when a write returns.
        const DATA_SYNC = linux::O_DSYNC;
        /// Signal-driven input and output.
        const ASYNC = linux::FASYNC;
        /// Bypass caches.
        const DIRECT = linux::O_DIRECT;
        /// Allow large offsets; always so.
        const LARGE_FILE = linux::O_LARGEFILE;
        /// Must be a directory.
        const DIRECTORY = linux::O_DIRECTORY;
        /// Do not follow a symbolic link at the end.
        const NO_FOLLOW = linux::O_NOFOLLOW;
        /// Do not update the access time.
        const NO_ACCESS_TIME = linux::O_NOATIME;
        /// Close on exec (kept in the descriptor table, not here).
        const CLOSE_ON_EXEC = linux::O_CLOEXEC;
        /// As `DATA_SYNC`, for metadata too (`O_SYNC` includes `O_DSYNC`).
        const FULL_SYNC = linux::__O_SYNC;
        /// A path only: no access to contents.
        const PATH = linux::O_PATH;
        /// An unnamed temporary file (`O_TMPFILE` includes `O_DIRECTORY`).
        const TEMPORARY = linux::__O_TMPFILE;
    }
}

impl OpenFlags {
    /// Whether the access mode allows reading.
    #[must_use]
    pub fn readable(self) -> bool {
        !self.contains(OpenFlags::PATH) && self.bits() & linux::O_ACCMODE != linux::O_WRONLY
    }

    /// Whether the access mode allows writing.
    #[must_use]
    pub fn writable(self) -> bool {
        !self.contains(OpenFlags::PATH) && self.bits() & linux::O_ACCMODE != linux::O_RDONLY
    }
}

/// Something that can be open.
///
/// Files with contents at positions (regular files, many of `/proc`) implement the `_at` methods and say so with
/// [`File::is_seekable`]; streams implement [`File::read`] and [`File::write`].
pub trait File: Send + Sync + Any {
    /// This file as `Any`, to find its concrete type (`let Some(socket) = file.as_any().downcast_ref::<Socket>()`).
    fn as_any(&self) -> &dyn Any;

    /// This file as a socket, if it is one.
    fn as_socket(&self) -> Option<&dyn crate::net::Socket> {
        None
    }

    /// Whether it has positions (`lseek`, `pread`).
    fn is_seekable(&self) -> bool {
        false
    }

    /// Stream: takes bytes out. `Ok(0)` is the end. `EAGAIN` when there is nothing now.
    ///
    /// # Errors
    /// As `read(2)`.
    fn read(&self, sink: &mut Sink<'_>, flags: OpenFlags) -> Result<usize> {
        let _ = (sink, flags);
        Err(Errno::EINVAL)
    }

    /// Stream: puts bytes in. `EAGAIN` when there is no room now. A short count is what fitted.
    ///
    /// # Errors
    /// As `write(2)`.
    fn write(&self, source: &mut Source<'_>, flags: OpenFlags) -> Result<usize> {
        let _ = (source, flags);
        Err(Errno::EINVAL)
    }

    /// Reads at a position.
    ///
    /// # Errors
    /// As `pread(2)`; `ESPIPE` for streams.
    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let _ = (position, sink);
        Err(Errno::ESPIPE)
    }

    /// Writes at a position.
    ///
    /// # Errors
    /// As `pwrite(2)`; `ESPIPE` for streams.
    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        let _ = (position, source);
        Err(Errno::ESPIPE)
    }

    /// What can be done now without blocking.
    fn readiness(&self) -> Readiness {
        Readiness::READABLE | Readiness::WRITABLE
    }

    /// Who wants to hear when readiness changes. `None` for files that are always ready (such a file cannot be
    /// added to an epoll instance: `EPERM`).
    fn watch_list(&self) -> Option<&WatchList> {
        None
    }

    /// Attributes for `fstat(2)`.
    ///
    /// # Errors
    /// What the file system says.
    fn metadata(&self) -> Result<Metadata>;

    /// The inode behind, if it was opened by path.
    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        None
    }

    /// `ioctl(2)`; `argument` is the raw third argument.
    ///
    /// # Errors
    /// `ENOTTY` for requests that the file does not know.
    fn ioctl(&self, thread: &Thread, request: u32, argument: u64) -> Result<usize> {
        let _ = (thread, request, argument);
        Err(Errno::ENOTTY)
    }

    /// `fsync(2)` and `fdatasync(2)`.
    ///
    /// # Errors
    /// `EINVAL` for what cannot be synchronised.
    fn synchronize(&self, data_only: bool) -> Result<()> {
        let _ = data_only;
        Err(Errno::EINVAL)
    }

    /// What `/proc/self/fd/N` shows when there is no path: `pipe:[7]`, `socket:[9]`, `anon_inode:[eventpoll]`.
    fn describe(&self) -> String;

    /// Called for each `close(2)` of a descriptor: what was written goes where errors can still be told.
    ///
    /// # Errors
    /// What delayed writes ran into.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Called when the last descriptor of the open file is closed, with its status flags.
    fn on_close(&self) {}
}

/// Attributes of a file that no file system has: a pipe, an event counter.
#[must_use]
pub fn anonymous_metadata(kind: crate::fs::Kind, permissions: u32, inode: u64) -> Metadata {
    Metadata {
        device: crate::fs::device_number(0, 15),
        inode,
        kind,
        permissions,
        links: 1,
        uid: 0,
        gid: 0,
        special_device: 0,
        size: 0,
        block_size: 4096,
        blocks: 0,
        accessed: 0,
        modified: 0,
        changed: 0,
    }
}

//! Open files and the table of descriptors.

use alloc::{string::String, sync::Arc, vec::Vec};

use linux_raw_sys::general as linux;

use super::{File, OpenFlags, Readiness, Sink, Source, watch};
use crate::{Errno, Result, sync::Mutex};

/// Linux's *open file description*: a file, its status flags and its position. Shared by duplicated descriptors.
pub struct OpenFile {
    /// The file.
    pub file: Arc<dyn File>,
    flags: Mutex<OpenFlags>,
    position: Mutex<u64>,
    /// Absolute path it was opened by, if any.
    pub path: Option<String>,
}

impl OpenFile {
    /// Opens `file` with status flags.
    #[must_use]
    pub fn new(file: Arc<dyn File>, flags: OpenFlags) -> Arc<OpenFile> {
        OpenFile::with_path(file, flags, None)
    }

    /// Opens `file` that was found by an absolute path.
    #[must_use]
    #[inline(never)]
    pub fn with_path(file: Arc<dyn File>, flags: OpenFlags, path: Option<String>) -> Arc<OpenFile> {
        let kept = flags
            - OpenFlags::CREATE
            - OpenFlags::EXCLUSIVE
            - OpenFlags::TRUNCATE
            - OpenFlags::CLOSE_ON_EXEC
            - OpenFlags::NO_CONTROLLING_TERMINAL;
        Arc::new(OpenFile {
            file,
            flags: Mutex::new(kept),
            position: Mutex::new(0),
            path,
        })
    }

    /// Status flags, access mode included (`F_GETFL`).
    pub fn flags(&self) -> OpenFlags {
        *self.flags.lock()
    }

    /// Replaces the flags that `F_SETFL` may change.
    pub fn set_flags(&self, new: OpenFlags) {
        let changeable = OpenFlags::APPEND
            | OpenFlags::NON_BLOCKING
            | OpenFlags::ASYNC
            | OpenFlags::DIRECT
            | OpenFlags::NO_ACCESS_TIME;
        let mut flags = self.flags.lock();
        *flags = (*flags - changeable) | (new & changeable);
    }

    /// Whether calls that would block give `EAGAIN`.
    pub fn is_non_blocking(&self) -> bool {
        self.flags().contains(OpenFlags::NON_BLOCKING)
    }

    /// Current position.
    pub fn position(&self) -> u64 {
        *self.position.lock()
    }

    /// Moves the position.
    pub fn set_position(&self, position: u64) {
        *self.position.lock() = position;
    }

    /// Reads at the current position, or the next bytes of a stream. Never blocks.
    ///
    /// # Errors
    /// `EBADF` if not open for reading; else what the file says.
    pub fn read(&self, sink: &mut Sink<'_>) -> Result<usize> {
        let flags = self.flags();
        if !flags.readable() {
            return Err(Errno::EBADF);
        }
        if !self.file.is_seekable() {
            return self.file.read(sink, flags);
        }
        let mut position = self.position.lock();
        let count = self.file.read_at(*position, sink)?;
        *position += count as u64;
        Ok(count)
    }

    /// Writes at the current position (or the end, with `O_APPEND`), or to a stream. Never blocks.
    ///
    /// # Errors
    /// `EBADF` if not open for writing; else what the file says.
    pub fn write(&self, source: &mut Source<'_>) -> Result<usize> {
        let flags = self.flags();
        if !flags.writable() {
            return Err(Errno::EBADF);
        }
        if !self.file.is_seekable() {
            return self.file.write(source, flags);
        }
        let mut position = self.position.lock();
        if flags.contains(OpenFlags::APPEND) {
            *position = self.file.metadata()?.size;
        }
        let count = self.file.write_at(*position, source)?;
        *position += count as u64;
        drop(position);
        if flags.intersects(OpenFlags::DATA_SYNC) {
            self.file
                .synchronize(!flags.contains(OpenFlags::FULL_SYNC))?;
        }
        Ok(count)
    }

    /// Tries until the file gives something other than `EAGAIN`; once if the file is non-blocking.
    ///
    /// # Errors
    /// What `attempt` gives.
    pub async fn wait<T>(
        &self,
        interest: Readiness,
        mut attempt: impl FnMut() -> Result<T> + Unpin,
    ) -> Result<T> {
        if self.is_non_blocking() {
            return attempt();
        }
        watch::retry(Arc::clone(&self.file), interest, attempt).await
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.file.on_close();
    }
}

/// One descriptor.
#[derive(Clone)]
pub struct Descriptor {
    /// What it refers to.
    pub file: Arc<OpenFile>,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// Descriptors of a process, by number.
#[derive(Default)]
pub struct FileTable {
    descriptors: Vec<Option<Descriptor>>,
    /// No free number lies below.
    lowest_free: usize,
    /// `RLIMIT_NOFILE`, soft.
    limit: usize,
}

impl FileTable {
    /// An empty table.
    #[must_use]
    pub fn new(limit: usize) -> FileTable {
        FileTable {
            descriptors: Vec::new(),
            lowest_free: 0,
            limit,
        }
    }

    /// Changes the limit (`RLIMIT_NOFILE`). Descriptors above it stay open.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The open file of a descriptor.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn get(&self, number: i32) -> Result<&Arc<OpenFile>> {
        self.descriptor(number).map(|descriptor| &descriptor.file)
    }

    /// A descriptor.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn descriptor(&self, number: i32) -> Result<&Descriptor> {
        let index = usize::try_from(number).map_err(|_| Errno::EBADF)?;
        self.descriptors
            .get(index)
            .and_then(Option::as_ref)
            .ok_or(Errno::EBADF)
    }

    /// A descriptor, to change its flag.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn descriptor_mut(&mut self, number: i32) -> Result<&mut Descriptor> {
        let index = usize::try_from(number).map_err(|_| Errno::EBADF)?;
        self.descriptors
            .get_mut(index)
            .and_then(Option::as_mut)
            .ok_or(Errno::EBADF)
    }

    /// Gives `file` the lowest free number.
    ///
    /// # Errors
    /// `EMFILE`.
    #[inline(never)]
    pub fn insert(&mut self, file: Arc<OpenFile>, close_on_exec: bool) -> Result<i32> {
        self.insert_from(0, file, close_on_exec)
    }

    /// Gives `file` the lowest free number that is at least `minimum` (`F_DUPFD`).
    ///
    /// # Errors
    /// `EMFILE`; `EINVAL` when `minimum` is beyond the limit.
    pub fn insert_from(
        &mut self,
        minimum: usize,
        file: Arc<OpenFile>,
        close_on_exec: bool,
    ) -> Result<i32> {
        if minimum > 0 && minimum >= self.limit {
            return Err(Errno::EINVAL);
        }
        let mut index = minimum.max(self.lowest_free);
        while self.descriptors.get(index).is_some_and(Option::is_some) {
            index += 1;
        }
        if index >= self.limit {
            return Err(Errno::EMFILE);
        }
        if minimum <= self.lowest_free {
            self.lowest_free = index + 1;
        }
        self.put(
            index,
            Descriptor {
                file,
                close_on_exec,
            },
        );
        i32::try_from(index).map_err(|_| Errno::EMFILE)
    }

    /// Gives `file` this very number (`dup2`); returns what had it before, to be dropped without the table's lock.
    ///
    /// # Errors
    /// `EBADF` when the number is beyond the limit.
    pub fn replace(
        &mut self,
        number: i32,
        file: Arc<OpenFile>,
        close_on_exec: bool,
    ) -> Result<Option<Descriptor>> {
        let index = usize::try_from(number).map_err(|_| Errno::EBADF)?;
        if index >= self.limit {
            return Err(Errno::EBADF);
        }
        Ok(self.put(
            index,
            Descriptor {
                file,
                close_on_exec,
            },
        ))
    }

    fn put(&mut self, index: usize, descriptor: Descriptor) -> Option<Descriptor> {
        if index >= self.descriptors.len() {
            self.descriptors.resize_with(index + 1, || None);
        }
        self.descriptors[index].replace(descriptor)
    }

    /// Frees a number; returns what had it, to be dropped without the table's lock.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn remove(&mut self, number: i32) -> Result<Descriptor> {
        let index = usize::try_from(number).map_err(|_| Errno::EBADF)?;
        let descriptor = self
            .descriptors
            .get_mut(index)
            .and_then(Option::take)
            .ok_or(Errno::EBADF)?;
        self.lowest_free = self.lowest_free.min(index);
        Ok(descriptor)
    }

    /// All open descriptors, by number.
    pub fn iter(&self) -> impl Iterator<Item = (i32, &Descriptor)> {
        self.descriptors
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| Some((i32::try_from(index).ok()?, slot.as_ref()?)))
    }
}

/// Whether a `whence` of `lseek(2)` is one of the plain three, and the base position it means.
///
/// # Errors
/// `EINVAL` for an unknown one or a result below zero.
pub fn seek_position(whence: u32, offset: i64, current: u64, size: u64) -> Result<u64> {
    let base = match whence {
        linux::SEEK_SET => 0,
        linux::SEEK_CUR => current,
        linux::SEEK_END => size,
        _ => return Err(Errno::EINVAL),
    };
    base.checked_add_signed(offset)
        .filter(|&position| position <= i64::MAX as u64)
        .ok_or(Errno::EINVAL)
}

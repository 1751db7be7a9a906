//! System calls on open files.

use alloc::{sync::Arc, vec::Vec};
use core::{any::Any, task::Poll};

use linux_raw_sys::{general as linux, ioctl as requests};

use super::{Call, Entry, Outcome, Restart};
use crate::{
    Errno, Kernel, Result,
    file::{
        File, FileTable, OpenFile, OpenFlags, Readiness, Sink, Source, WatchList, Watcher,
        io::MAX_TRANSFER,
        locks::{FileIdentity, Lock, LockTable, Owner, Range},
        pipe::{self, PipeEnd},
        table::{Descriptor, seek_position},
        watch,
    },
    fs::{Kind, Metadata, tmpfs::Node, tmpfs::Tmpfs, vfs::Place},
    memory::user::{self, UserRange},
    task::{Process, Thread, signal},
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_read,
        name: "read",
        handler: read,
        limits: "",
    },
    Entry {
        number: linux::__NR_write,
        name: "write",
        handler: write,
        limits: "",
    },
    Entry {
        number: linux::__NR_readv,
        name: "readv",
        handler: readv,
        limits: "",
    },
    Entry {
        number: linux::__NR_writev,
        name: "writev",
        handler: writev,
        limits: "",
    },
    Entry {
        number: linux::__NR_pread64,
        name: "pread64",
        handler: pread,
        limits: "",
    },
    Entry {
        number: linux::__NR_pwrite64,
        name: "pwrite64",
        handler: pwrite,
        limits: "",
    },
    Entry {
        number: linux::__NR_preadv,
        name: "preadv",
        handler: preadv,
        limits: "",
    },
    Entry {
        number: linux::__NR_pwritev,
        name: "pwritev",
        handler: pwritev,
        limits: "",
    },
    Entry {
        number: linux::__NR_preadv2,
        name: "preadv2",
        handler: preadv2,
        limits: "RWF_HIPRI and RWF_NOWAIT change nothing; newer flags give EOPNOTSUPP",
    },
    Entry {
        number: linux::__NR_pwritev2,
        name: "pwritev2",
        handler: pwritev2,
        limits: "RWF_HIPRI and RWF_NOWAIT change nothing; newer flags give EOPNOTSUPP",
    },
    Entry {
        number: linux::__NR_lseek,
        name: "lseek",
        handler: lseek,
        limits: "SEEK_DATA sees no holes",
    },
    Entry {
        number: linux::__NR_sendfile,
        name: "sendfile",
        handler: sendfile,
        limits: "",
    },
    Entry {
        number: linux::__NR_copy_file_range,
        name: "copy_file_range",
        handler: copy_file_range,
        limits: "",
    },
    Entry {
        number: linux::__NR_splice,
        name: "splice",
        handler: splice,
        limits: "",
    },
    Entry {
        number: linux::__NR_tee,
        name: "tee",
        handler: tee,
        limits: "",
    },
    Entry {
        number: linux::__NR_close,
        name: "close",
        handler: close,
        limits: "",
    },
    Entry {
        number: linux::__NR_close_range,
        name: "close_range",
        handler: close_range,
        limits: "CLOSE_RANGE_UNSHARE changes nothing: threads of a process share descriptors only with each other",
    },
    Entry {
        number: linux::__NR_dup,
        name: "dup",
        handler: dup,
        limits: "",
    },
    Entry {
        number: linux::__NR_dup2,
        name: "dup2",
        handler: dup2,
        limits: "",
    },
    Entry {
        number: linux::__NR_dup3,
        name: "dup3",
        handler: dup3,
        limits: "",
    },
    Entry {
        number: linux::__NR_fcntl,
        name: "fcntl",
        handler: fcntl,
        limits: "no leases, no directory notification, no signal-driven input",
    },
    Entry {
        number: linux::__NR_flock,
        name: "flock",
        handler: flock,
        limits: "not seen by the host on volumes",
    },
    Entry {
        number: linux::__NR_ioctl,
        name: "ioctl",
        handler: ioctl,
        limits: "requests of files and sockets only",
    },
    Entry {
        number: linux::__NR_ftruncate,
        name: "ftruncate",
        handler: ftruncate,
        limits: "",
    },
    Entry {
        number: linux::__NR_fallocate,
        name: "fallocate",
        handler: fallocate,
        limits: "no collapsing, inserting or unsharing",
    },
    Entry {
        number: linux::__NR_fsync,
        name: "fsync",
        handler: fsync,
        limits: "",
    },
    Entry {
        number: linux::__NR_fdatasync,
        name: "fdatasync",
        handler: fdatasync,
        limits: "",
    },
    Entry {
        number: linux::__NR_sync,
        name: "sync",
        handler: sync,
        limits: "",
    },
    Entry {
        number: linux::__NR_syncfs,
        name: "syncfs",
        handler: syncfs,
        limits: "",
    },
    Entry {
        number: linux::__NR_sync_file_range,
        name: "sync_file_range",
        handler: sync_file_range,
        limits: "",
    },
    Entry {
        number: linux::__NR_fadvise64,
        name: "fadvise64",
        handler: fadvise,
        limits: "",
    },
    Entry {
        number: linux::__NR_readahead,
        name: "readahead",
        handler: readahead,
        limits: "",
    },
    Entry {
        number: linux::__NR_getdents,
        name: "getdents",
        handler: getdents,
        limits: "",
    },
    Entry {
        number: linux::__NR_getdents64,
        name: "getdents64",
        handler: getdents64,
        limits: "",
    },
    Entry {
        number: linux::__NR_pipe,
        name: "pipe",
        handler: pipe_call,
        limits: "",
    },
    Entry {
        number: linux::__NR_pipe2,
        name: "pipe2",
        handler: pipe2,
        limits: "no packet mode (O_DIRECT)",
    },
    Entry {
        number: linux::__NR_memfd_create,
        name: "memfd_create",
        handler: memfd_create,
        limits: "no huge pages; MFD_NOEXEC_SEAL and MFD_EXEC change nothing",
    },
];

type Tried = Result<usize>;

/// Tries, and waits if that is what the file wants.
fn wait_for(
    thread: &Arc<Thread>,
    file: &Arc<OpenFile>,
    interest: Readiness,
    mut attempt: impl FnMut() -> Tried + Send + Unpin + 'static,
) -> Outcome {
    match attempt() {
        // Sockets have timeouts of their own.
        Err(Errno::EAGAIN) if !file.is_non_blocking() && file.file.as_socket().is_some() => {
            super::socket::wait_on(thread.kernel(), file, interest, attempt)
        }
        Err(Errno::EAGAIN) if !file.is_non_blocking() && file.file.watch_list().is_some() => {
            let file = Arc::clone(&file.file);
            Outcome::wait(Restart::WithFlag, async move {
                watch::retry(file, interest, attempt)
                    .await
                    .map(|count| count as u64)
            })
        }
        result => result.into(),
    }
}

macro_rules! attempt {
    ($expression:expr) => {
        match $expression {
            Ok(value) => value,
            Err(error) => return Outcome::fail(error),
        }
    };
}
pub(super) use attempt;

fn read(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    read_range(call.thread, &file, range)
}

/// `read(2)`, and `recv(2)` without flags.
pub(super) fn read_range(thread: &Arc<Thread>, file: &Arc<OpenFile>, range: UserRange) -> Outcome {
    match file.read(&mut Sink::user(range)) {
        Err(Errno::EAGAIN) => {
            let again = Arc::clone(file);
            wait_for(thread, file, Readiness::READABLE, move || {
                again.read(&mut Sink::user(range))
            })
        }
        result => result.into(),
    }
}

fn readv(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let ranges = attempt!(user::read_ranges(call.raw(1), call.raw(2)));
    read_ranges(call.thread, &file, ranges)
}

fn read_ranges(thread: &Arc<Thread>, file: &Arc<OpenFile>, ranges: Vec<UserRange>) -> Outcome {
    let again = Arc::clone(file);
    wait_for(thread, file, Readiness::READABLE, move || {
        again.read(&mut Sink::user_vector(&ranges)?)
    })
}

/// Whether a signal is about to take the thread out of its call.
pub(super) fn is_interrupted(thread: &Thread) -> bool {
    let mask = thread.signals.lock().mask();
    signal::pending(thread).0 & !mask.0 != 0
}

/// Writes all of a source, of which `done` bytes are written already: a blocking stream takes everything before the
/// call ends, or until an error.
fn write_source(
    thread: &Arc<Thread>,
    file: &Arc<OpenFile>,
    mut source: Source<'static>,
    mut done: usize,
) -> Outcome {
    let (waiting, again) = (thread, Arc::clone(file));
    let thread = Arc::clone(thread);
    let whole = !file.file.is_seekable() && !file.is_non_blocking();
    let attempt = move || loop {
        match again.write(&mut source) {
            Ok(count) => {
                done += count;
                if count == 0 || source.remaining() == 0 || !whole {
                    return Ok(done);
                }
            }
            // What has been written must be told: a call that a signal takes back would be made again as a whole.
            Err(Errno::EAGAIN) if done > 0 && (!whole || is_interrupted(&thread)) => {
                return Ok(done);
            }
            Err(Errno::EAGAIN) => return Err(Errno::EAGAIN),
            Err(error) => {
                if error == Errno::EPIPE {
                    thread.raise_broken_pipe();
                }
                return if done > 0 { Ok(done) } else { Err(error) };
            }
        }
    };
    wait_for(waiting, file, Readiness::WRITABLE, attempt)
}

fn write(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    let mut source = Source::user(range);
    // Nearly always everything goes at once.
    match file.write(&mut source) {
        Ok(count)
            if source.remaining() == 0 || file.file.is_seekable() || file.is_non_blocking() =>
        {
            Ok(count).into()
        }
        Ok(0) => Outcome::Done(Ok(0)),
        Ok(count) => write_source(call.thread, &file, source, count),
        Err(Errno::EAGAIN) if !file.is_non_blocking() => {
            write_source(call.thread, &file, source, 0)
        }
        Err(Errno::EPIPE) => {
            call.thread.raise_broken_pipe();
            Outcome::fail(Errno::EPIPE)
        }
        Err(error) => Outcome::fail(error),
    }
}

fn writev(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let ranges = attempt!(user::read_ranges(call.raw(1), call.raw(2)));
    let source = attempt!(Source::user_vector(&ranges));
    write_source(call.thread, &file, source, 0)
}

/// A file to read or write at a position.
fn positioned(call: &Call<'_>, write: bool, position: i64) -> Result<(Arc<OpenFile>, u64)> {
    let file = call.process().file(call.int(0))?;
    let position = u64::try_from(position).map_err(|_| Errno::EINVAL)?;
    let flags = file.flags();
    if if write {
        !flags.writable()
    } else {
        !flags.readable()
    } {
        return Err(Errno::EBADF);
    }
    if !file.file.is_seekable() {
        return Err(Errno::ESPIPE);
    }
    Ok((file, position))
}

fn pread(call: &mut Call<'_>) -> Outcome {
    let (file, position) = attempt!(positioned(call, false, call.raw(3).cast_signed()));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    file.file.read_at(position, &mut Sink::user(range)).into()
}

/// Writes at a position; `O_APPEND` wins over the position, as in Linux.
fn write_at(
    file: &OpenFile,
    position: u64,
    source: &mut Source<'_>,
    append: bool,
    sync: bool,
) -> Result<usize> {
    let flags = file.flags();
    let position = if append || flags.contains(OpenFlags::APPEND) {
        file.file.metadata()?.size
    } else {
        position
    };
    let count = file.file.write_at(position, source)?;
    if sync || flags.intersects(OpenFlags::DATA_SYNC) {
        file.file.synchronize(false)?;
    }
    Ok(count)
}

fn pwrite(call: &mut Call<'_>) -> Outcome {
    let (file, position) = attempt!(positioned(call, true, call.raw(3).cast_signed()));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    write_at(&file, position, &mut Source::user(range), false, false).into()
}

fn preadv(call: &mut Call<'_>) -> Outcome {
    let (file, position) = attempt!(positioned(call, false, call.raw(3).cast_signed()));
    let ranges = attempt!(user::read_ranges(call.raw(1), call.raw(2)));
    let mut sink = attempt!(Sink::user_vector(&ranges));
    file.file.read_at(position, &mut sink).into()
}

fn pwritev(call: &mut Call<'_>) -> Outcome {
    let (file, position) = attempt!(positioned(call, true, call.raw(3).cast_signed()));
    let ranges = attempt!(user::read_ranges(call.raw(1), call.raw(2)));
    let mut source = attempt!(Source::user_vector(&ranges));
    write_at(&file, position, &mut source, false, false).into()
}

/// Flags of `preadv2` and `pwritev2` (`RWF_*`).
const RWF_KNOWN: u32 = 0x1f;
const RWF_DSYNC: u32 = 0x2;
const RWF_SYNC: u32 = 0x4;
const RWF_APPEND: u32 = 0x10;

fn preadv2(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(5) & !RWF_KNOWN != 0 {
        return Outcome::fail(Errno::EOPNOTSUPP);
    }
    if call.raw(3).cast_signed() == -1 {
        readv(call)
    } else {
        preadv(call)
    }
}

fn pwritev2(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(5);
    if flags & !RWF_KNOWN != 0 {
        return Outcome::fail(Errno::EOPNOTSUPP);
    }
    if call.raw(3).cast_signed() == -1 {
        return writev(call);
    }
    let (file, position) = attempt!(positioned(call, true, call.raw(3).cast_signed()));
    let ranges = attempt!(user::read_ranges(call.raw(1), call.raw(2)));
    let mut source = attempt!(Source::user_vector(&ranges));
    let sync = flags & (RWF_DSYNC | RWF_SYNC) != 0;
    write_at(&file, position, &mut source, flags & RWF_APPEND != 0, sync).into()
}

fn lseek(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    if file.flags().contains(OpenFlags::PATH) {
        return Outcome::fail(Errno::EBADF);
    }
    if !file.file.is_seekable() {
        return Outcome::fail(Errno::ESPIPE);
    }
    let (offset, whence) = (call.raw(1).cast_signed(), call.unsigned(2));
    let result = (|| {
        let size = || file.file.metadata().map(|metadata| metadata.size);
        Ok(match whence {
            // Everything up to the end is data; the hole is at the end.
            linux::SEEK_DATA | linux::SEEK_HOLE => {
                let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
                let size = size()?;
                match whence {
                    _ if offset >= size => return Err(Errno::ENXIO),
                    linux::SEEK_DATA => offset,
                    _ => size,
                }
            }
            linux::SEEK_END => seek_position(whence, offset, 0, size()?)?,
            _ => seek_position(whence, offset, file.position(), 0)?,
        })
    })();
    if let Ok(position) = result {
        file.set_position(position);
    }
    result.into()
}

/// Bytes that are copied at once where nothing can be read in place.
const COPY_CHUNK: usize = 64 << 10;

/// Takes bytes of a file at a position to `store`; returns how many `store` took. 0 at the end of the file.
fn transfer(
    from: &Arc<dyn File>,
    position: u64,
    limit: usize,
    buffer: &mut Vec<u8>,
    mut store: impl FnMut(&mut Source<'_>) -> Result<usize>,
) -> Result<usize> {
    if let Some(bytes) = from.inode().and_then(|inode| inode.in_place(position)) {
        let bytes = &bytes[..bytes.len().min(limit)];
        return store(&mut Source::kernel(bytes));
    }
    buffer.resize(limit.min(COPY_CHUNK), 0);
    let count = from.read_at(position, &mut Sink::kernel(buffer))?;
    if count == 0 {
        return Ok(0);
    }
    store(&mut Source::kernel(&buffer[..count]))
}

fn sendfile(call: &mut Call<'_>) -> Outcome {
    let to = attempt!(call.process().file(call.int(0)));
    let from = attempt!(call.process().file(call.int(1)));
    if !from.flags().readable() || !to.flags().writable() {
        return Outcome::fail(Errno::EBADF);
    }
    if !from.file.is_seekable() || to.flags().contains(OpenFlags::APPEND) {
        return Outcome::fail(Errno::EINVAL);
    }
    let pointer = call.raw(2);
    let start = if pointer == 0 {
        from.position()
    } else {
        let offset = attempt!(user::read::<i64>(pointer));
        attempt!(u64::try_from(offset).map_err(|_| Errno::EINVAL))
    };
    let count = call.length(3).min(MAX_TRANSFER);
    let mut done = 0;
    let mut buffer = Vec::new();
    let (thread, target) = (Arc::clone(call.thread), Arc::clone(&to));
    let blocking = !to.is_non_blocking();
    let attempt = move || {
        let result = loop {
            if done == count {
                break Ok(());
            }
            let position = start + done as u64;
            match transfer(&from.file, position, count - done, &mut buffer, |source| {
                target.write(source)
            }) {
                Ok(0) => break Ok(()),
                Ok(taken) => done += taken,
                Err(Errno::EAGAIN) if blocking && (done == 0 || !is_interrupted(&thread)) => {
                    return Err(Errno::EAGAIN);
                }
                Err(error) => break Err(error),
            }
        };
        if result == Err(Errno::EPIPE) {
            thread.raise_broken_pipe();
        }
        if done == 0 {
            return result.map(|()| 0);
        }
        if pointer == 0 {
            from.set_position(start + done as u64);
        } else {
            user::write(pointer, &(start + done as u64))?;
        }
        Ok(done)
    };
    wait_for(call.thread, &to, Readiness::WRITABLE, attempt)
}

fn copy_file_range(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let from = call.process().file(call.int(0))?;
        let to = call.process().file(call.int(2))?;
        if call.unsigned(5) != 0 {
            return Err(Errno::EINVAL);
        }
        if !from.flags().readable()
            || !to.flags().writable()
            || to.flags().contains(OpenFlags::APPEND)
        {
            return Err(Errno::EBADF);
        }
        let (source, target) = (from.file.metadata()?, to.file.metadata()?);
        if source.kind == Kind::Directory || target.kind == Kind::Directory {
            return Err(Errno::EISDIR);
        }
        if source.kind != Kind::Regular || target.kind != Kind::Regular {
            return Err(Errno::EINVAL);
        }
        let start = |file: &OpenFile, pointer: u64| match pointer {
            0 => Ok(file.position()),
            pointer => u64::try_from(user::read::<i64>(pointer)?).map_err(|_| Errno::EINVAL),
        };
        let (read_from, write_to) = (start(&from, call.raw(1))?, start(&to, call.raw(3))?);
        let count = call.length(4).min(MAX_TRANSFER);
        let same = (source.device, source.inode) == (target.device, target.inode);
        if same
            && read_from < write_to.saturating_add(count as u64)
            && write_to < read_from.saturating_add(count as u64)
        {
            return Err(Errno::EINVAL);
        }
        let mut done = 0;
        let mut buffer = Vec::new();
        while done < count {
            let at = write_to + done as u64;
            let store = |source: &mut Source<'_>| to.file.write_at(at, source);
            match transfer(
                &from.file,
                read_from + done as u64,
                count - done,
                &mut buffer,
                store,
            ) {
                Ok(0) => break,
                Ok(taken) => done += taken,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        let finish = |file: &OpenFile, pointer: u64, position: u64| match pointer {
            0 => {
                file.set_position(position);
                Ok(())
            }
            pointer => user::write(pointer, &position),
        };
        finish(&from, call.raw(1), read_from + done as u64)?;
        finish(&to, call.raw(3), write_to + done as u64)?;
        Ok(done)
    })();
    result.into()
}

/// Moves bytes between a pipe and a file, or two pipes, once.
fn splice_once(
    from: &OpenFile,
    from_position: Option<u64>,
    to: &OpenFile,
    to_position: Option<u64>,
    limit: usize,
    keep: bool,
) -> Result<usize> {
    let limit = limit.min(COPY_CHUNK);
    let source_pipe = from.file.as_any().downcast_ref::<PipeEnd>();
    let target_pipe = to.file.as_any().downcast_ref::<PipeEnd>();
    // Nothing is taken that has no place to go.
    let room = match target_pipe {
        Some(pipe) => pipe.room()?.min(limit),
        None => limit,
    };
    let bytes = match source_pipe {
        Some(pipe) => pipe.peek(room)?,
        None => {
            let mut bytes = alloc::vec![0; room];
            let mut sink = Sink::kernel(&mut bytes);
            let count = match from_position {
                Some(position) => from.file.read_at(position, &mut sink)?,
                None => from.read(&mut sink)?,
            };
            bytes.truncate(count);
            bytes
        }
    };
    if bytes.is_empty() {
        return Ok(0);
    }
    // Small writes into a pipe are whole or nothing, but here there is room for all of it.
    let mut source = Source::kernel(&bytes);
    let count = match to_position {
        Some(position) => to.file.write_at(position, &mut source)?,
        None => to.write(&mut source)?,
    };
    if let Some(pipe) = source_pipe
        && !keep
    {
        pipe.consume(count);
    }
    Ok(count)
}

/// An end of a transfer: its file, and where its position lies if the program keeps that itself.
fn splice_end(
    call: &Call<'_>,
    descriptor: usize,
    pointer: u64,
    writes: bool,
) -> Result<(Arc<OpenFile>, Option<u64>)> {
    let file = call.process().file(call.int(descriptor))?;
    let flags = file.flags();
    if if writes {
        !flags.writable()
    } else {
        !flags.readable()
    } {
        return Err(Errno::EBADF);
    }
    if pointer == 0 {
        return Ok((file, None));
    }
    if !file.file.is_seekable() {
        return Err(Errno::ESPIPE);
    }
    let position = user::read::<i64>(pointer)?;
    Ok((
        file,
        Some(u64::try_from(position).map_err(|_| Errno::EINVAL)?),
    ))
}

/// Transfers, waiting for both ends unless one of them or the call does not block.
fn splice_files(
    call: &Call<'_>,
    from: (Arc<OpenFile>, Option<u64>, u64),
    to: (Arc<OpenFile>, Option<u64>, u64),
    limit: usize,
    flags: u32,
    keep: bool,
) -> Outcome {
    const KNOWN: u32 = linux::SPLICE_F_MOVE
        | linux::SPLICE_F_NONBLOCK
        | linux::SPLICE_F_MORE
        | linux::SPLICE_F_GIFT;
    if flags & !KNOWN != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    if limit == 0 {
        return Outcome::Done(Ok(0));
    }
    let blocks = flags & linux::SPLICE_F_NONBLOCK == 0
        && !from.0.is_non_blocking()
        && !to.0.is_non_blocking();
    let thread = Arc::clone(call.thread);
    let (watch_from, watch_to) = (Arc::clone(&from.0.file), Arc::clone(&to.0.file));
    let attempt = move || {
        let result = splice_once(&from.0, from.1, &to.0, to.1, limit, keep);
        match result {
            Ok(count) => {
                for (position, pointer) in [(from.1, from.2), (to.1, to.2)] {
                    if let Some(position) = position {
                        user::write(pointer, &(position + count as u64))?;
                    }
                }
            }
            Err(Errno::EPIPE) => thread.raise_broken_pipe(),
            Err(_) => {}
        }
        result
    };
    match attempt() {
        Err(Errno::EAGAIN) if blocks => Outcome::wait(Restart::WithFlag, async move {
            let watcher = Arc::new(watch::WakeWatcher::default());
            let _watches = [
                (watch_from, Readiness::READABLE),
                (watch_to, Readiness::WRITABLE),
            ]
            .map(|(file, interest)| {
                watch::Watch::new(&file, interest, Arc::clone(&watcher) as Arc<dyn Watcher>)
            });
            core::future::poll_fn(|context| {
                watcher.set(context.waker());
                match attempt() {
                    Err(Errno::EAGAIN) => Poll::Pending,
                    result => Poll::Ready(result.map(|count| count as u64)),
                }
            })
            .await
        }),
        result => result.into(),
    }
}

fn pipe_end(file: &OpenFile) -> Option<&PipeEnd> {
    file.file.as_any().downcast_ref::<PipeEnd>()
}

fn splice(call: &mut Call<'_>) -> Outcome {
    let (from_pointer, to_pointer) = (call.raw(1), call.raw(3));
    let (from, from_position) = attempt!(splice_end(call, 0, from_pointer, false));
    let (to, to_position) = attempt!(splice_end(call, 2, to_pointer, true));
    match (pipe_end(&from), pipe_end(&to)) {
        (None, None) => return Outcome::fail(Errno::EINVAL),
        (Some(one), Some(other)) if one.is_same_pipe(other) => return Outcome::fail(Errno::EINVAL),
        _ => {}
    }
    if to.flags().contains(OpenFlags::APPEND) {
        return Outcome::fail(Errno::EINVAL);
    }
    let (from, to) = (
        (from, from_position, from_pointer),
        (to, to_position, to_pointer),
    );
    splice_files(call, from, to, call.length(4), call.unsigned(5), false)
}

fn tee(call: &mut Call<'_>) -> Outcome {
    let (from, _) = attempt!(splice_end(call, 0, 0, false));
    let (to, _) = attempt!(splice_end(call, 1, 0, true));
    match (pipe_end(&from), pipe_end(&to)) {
        (Some(one), Some(other)) if !one.is_same_pipe(other) => {}
        _ => return Outcome::fail(Errno::EINVAL),
    }
    splice_files(
        call,
        (from, None, 0),
        (to, None, 0),
        call.length(2),
        call.unsigned(3),
        true,
    )
}

/// What must happen when a descriptor goes: locks are given up, delayed writes are finished.
pub(super) fn after_close(process: &Process, descriptor: Descriptor) -> Result<()> {
    let file = &descriptor.file;
    if let Some(locks) = process.kernel.files.get().map(|files| &files.locks)
        && !locks.is_empty()
        && let Ok(metadata) = file.file.metadata()
    {
        let identity = (metadata.device, metadata.inode);
        // Any descriptor's end releases the process's locks on the file: POSIX wants it so.
        locks.release(
            identity,
            Owner::Process(process.id),
            Range {
                start: 0,
                end: u64::MAX,
            },
        );
        if Arc::strong_count(file) == 1 {
            let owner = Arc::as_ptr(file) as usize;
            locks.release(
                identity,
                Owner::OpenFile(owner),
                Range {
                    start: 0,
                    end: u64::MAX,
                },
            );
            // Giving up a lock never fails.
            let _ = locks.set_whole(identity, owner, None);
        }
    }
    file.file.flush()
}

fn close(call: &mut Call<'_>) -> Outcome {
    let removed = call.process().files.lock().remove(call.int(0));
    removed
        .and_then(|descriptor| after_close(call.process(), descriptor))
        .into()
}

/// `CLOSE_RANGE_*`.
const CLOSE_RANGE_UNSHARE: u32 = 2;
const CLOSE_RANGE_CLOEXEC: u32 = 4;

fn close_range(call: &mut Call<'_>) -> Outcome {
    let (first, last, flags) = (call.unsigned(0), call.unsigned(1), call.unsigned(2));
    if first > last || flags & !(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let process = call.process();
    let mut removed = Vec::new();
    {
        let mut files = process.files.lock();
        let numbers: Vec<i32> = files
            .iter()
            .map(|(number, _)| number)
            .filter(|&number| (first..=last).contains(&number.cast_unsigned()))
            .collect();
        for number in numbers {
            if flags & CLOSE_RANGE_CLOEXEC != 0 {
                if let Ok(descriptor) = files.descriptor_mut(number) {
                    descriptor.close_on_exec = true;
                }
            } else if let Ok(descriptor) = files.remove(number) {
                removed.push(descriptor);
            }
        }
    }
    for descriptor in removed {
        // close_range(2) tells of no errors of single files.
        let _ = after_close(process, descriptor);
    }
    Outcome::Done(Ok(0))
}

fn dup(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    call.process().add_file(file, false).into()
}

fn replace(process: &Process, old: i32, new: i32, close_on_exec: bool) -> Result<i32> {
    let replaced = {
        let mut files = process.files.lock();
        let file = Arc::clone(files.get(old)?);
        files.replace(new, file, close_on_exec)?
    };
    if let Some(descriptor) = replaced {
        // dup2(2) tells of no errors of the file it closes.
        let _ = after_close(process, descriptor);
    }
    Ok(new)
}

fn dup2(call: &mut Call<'_>) -> Outcome {
    let (old, new) = (call.int(0), call.int(1));
    if old == new {
        attempt!(call.process().file(old));
        return Ok(new).into();
    }
    replace(call.process(), old, new, false).into()
}

fn dup3(call: &mut Call<'_>) -> Outcome {
    let (old, new, flags) = (call.int(0), call.int(1), call.unsigned(2));
    if old == new || flags & !linux::O_CLOEXEC != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    replace(call.process(), old, new, flags & linux::O_CLOEXEC != 0).into()
}

fn fcntl(call: &mut Call<'_>) -> Outcome {
    let (number, command, argument) = (call.int(0), call.unsigned(1), call.raw(2));
    let process = Arc::clone(call.process());
    let file = attempt!(process.file(number));
    if file.flags().contains(OpenFlags::PATH)
        && !matches!(
            command,
            linux::F_DUPFD
                | linux::F_DUPFD_CLOEXEC
                | linux::F_GETFD
                | linux::F_SETFD
                | linux::F_GETFL
        )
    {
        return Outcome::fail(Errno::EBADF);
    }
    match command {
        linux::F_DUPFD | linux::F_DUPFD_CLOEXEC => {
            let minimum = attempt!(usize::try_from(argument as i32).map_err(|_| Errno::EINVAL));
            process
                .files
                .lock()
                .insert_from(minimum, file, command == linux::F_DUPFD_CLOEXEC)
                .into()
        }
        linux::F_GETFD => {
            let files = process.files.lock();
            files
                .descriptor(number)
                .map(|descriptor| u32::from(descriptor.close_on_exec))
                .into()
        }
        linux::F_SETFD => {
            let mut files = process.files.lock();
            files
                .descriptor_mut(number)
                .map(|descriptor| {
                    descriptor.close_on_exec = argument as u32 & linux::FD_CLOEXEC != 0
                })
                .into()
        }
        linux::F_GETFL => Ok((file.flags() | OpenFlags::LARGE_FILE).bits()).into(),
        linux::F_SETFL => {
            file.set_flags(OpenFlags::from_bits_truncate(argument as u32));
            Outcome::Done(Ok(0))
        }
        linux::F_GETLK | linux::F_OFD_GETLK => get_lock(&process, &file, command, argument).into(),
        linux::F_SETLK | linux::F_SETLKW | linux::F_OFD_SETLK | linux::F_OFD_SETLKW => {
            set_lock(&process, &file, command, argument)
        }
        // Nobody is told of input by signal.
        linux::F_GETOWN => Outcome::Done(Ok(0)),
        linux::F_SETOWN => Outcome::Done(Ok(0)),
        linux::F_GETPIPE_SZ | linux::F_SETPIPE_SZ => {
            let pipe = attempt!(
                file.file
                    .as_any()
                    .downcast_ref::<PipeEnd>()
                    .ok_or(Errno::EBADF)
            );
            if command == linux::F_GETPIPE_SZ {
                Ok(pipe.capacity()).into()
            } else {
                pipe.set_capacity(argument as u32 as usize).into()
            }
        }
        linux::F_GET_SEALS | linux::F_ADD_SEALS => {
            let node = file
                .file
                .inode()
                .and_then(|inode| inode.as_any().downcast_ref::<Node>());
            let node = attempt!(node.ok_or(Errno::EINVAL));
            if command == linux::F_GET_SEALS {
                node.seals().into()
            } else if file.flags().writable() {
                node.add_seals(argument as u32).into()
            } else {
                Outcome::fail(Errno::EPERM)
            }
        }
        linux::F_GETLEASE => Ok(linux::F_UNLCK).into(),
        _ => Outcome::fail(Errno::EINVAL),
    }
}

fn identity(file: &OpenFile) -> Result<FileIdentity> {
    let metadata = file.file.metadata()?;
    Ok((metadata.device, metadata.inode))
}

/// The lock that a `struct flock` describes; `None` to give up the range.
fn read_lock(
    process: &Process,
    file: &OpenFile,
    command: u32,
    argument: u64,
) -> Result<(Option<Lock>, Owner, Range)> {
    let request: linux::flock = user::read(argument)?;
    let open_file_lock = matches!(
        command,
        linux::F_OFD_GETLK | linux::F_OFD_SETLK | linux::F_OFD_SETLKW
    );
    if open_file_lock && request.l_pid != 0 {
        return Err(Errno::EINVAL);
    }
    let owner = if open_file_lock {
        Owner::OpenFile(core::ptr::from_ref(file) as usize)
    } else {
        Owner::Process(process.id)
    };
    let size = if request.l_whence as u32 == linux::SEEK_END {
        file.file.metadata()?.size
    } else {
        0
    };
    let start = seek_position(
        request.l_whence as u32,
        request.l_start,
        file.position(),
        size,
    )?;
    let range = match request.l_len {
        0 => Range {
            start,
            end: u64::MAX,
        },
        length if length > 0 => {
            let end = start
                .checked_add_signed(length)
                .filter(|&end| end <= i64::MAX as u64 + 1);
            Range {
                start,
                end: end.ok_or(Errno::EOVERFLOW)?,
            }
        }
        length => Range {
            start: start.checked_add_signed(length).ok_or(Errno::EINVAL)?,
            end: start,
        },
    };
    let exclusive = match request.l_type as u32 {
        linux::F_RDLCK => false,
        linux::F_WRLCK => true,
        linux::F_UNLCK => return Ok((None, owner, range)),
        _ => return Err(Errno::EINVAL),
    };
    Ok((
        Some(Lock {
            owner,
            range,
            exclusive,
        }),
        owner,
        range,
    ))
}

fn get_lock(process: &Process, file: &OpenFile, command: u32, argument: u64) -> Result<()> {
    let (lock, ..) = read_lock(process, file, command, argument)?;
    let lock = lock.ok_or(Errno::EINVAL)?;
    let conflict = locks(process)?.conflict(identity(file)?, lock);
    let mut answer: linux::flock = user::read(argument)?;
    match conflict {
        None => answer.l_type = linux::F_UNLCK as i16,
        Some(other) => {
            answer.l_type = (if other.exclusive {
                linux::F_WRLCK
            } else {
                linux::F_RDLCK
            }) as i16;
            answer.l_whence = linux::SEEK_SET as i16;
            answer.l_start = other.range.start.cast_signed();
            answer.l_len = if other.range.end == u64::MAX {
                0
            } else {
                (other.range.end - other.range.start).cast_signed()
            };
            answer.l_pid = match other.owner {
                Owner::Process(id) => id.cast_signed(),
                Owner::OpenFile(_) => -1,
            };
        }
    }
    user::write(argument, &answer)
}

fn locks(process: &Process) -> Result<&Arc<LockTable>> {
    process
        .kernel
        .files
        .get()
        .map(|files| &files.locks)
        .ok_or(Errno::ENOLCK)
}

/// Lets a thread wait for the release of a lock.
struct LockQueue(Arc<LockTable>);

impl File for LockQueue {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.0.released)
    }

    fn metadata(&self) -> Result<Metadata> {
        Err(Errno::EBADF)
    }

    fn describe(&self) -> alloc::string::String {
        alloc::string::String::from("locks")
    }
}

fn take_lock(
    table: &Arc<LockTable>,
    wait: bool,
    mut attempt: impl FnMut() -> Tried + Send + Unpin + 'static,
) -> Outcome {
    match attempt() {
        Err(Errno::EAGAIN) if wait => {
            let queue: Arc<dyn File> = Arc::new(LockQueue(Arc::clone(table)));
            Outcome::wait(Restart::WithFlag, async move {
                watch::retry(queue, Readiness::READABLE, attempt)
                    .await
                    .map(|count| count as u64)
            })
        }
        result => result.into(),
    }
}

fn set_lock(process: &Arc<Process>, file: &Arc<OpenFile>, command: u32, argument: u64) -> Outcome {
    let (lock, owner, range) = attempt!(read_lock(process, file, command, argument));
    let identity = attempt!(identity(file));
    let table = Arc::clone(attempt!(locks(process)));
    let Some(lock) = lock else {
        table.release(identity, owner, range);
        return Outcome::Done(Ok(0));
    };
    let flags = file.flags();
    if if lock.exclusive {
        !flags.writable()
    } else {
        !flags.readable()
    } {
        return Outcome::fail(Errno::EBADF);
    }
    let wait = matches!(command, linux::F_SETLKW | linux::F_OFD_SETLKW);
    let setter = Arc::clone(&table);
    take_lock(&table, wait, move || setter.set(identity, lock).map(|()| 0))
}

fn flock(call: &mut Call<'_>) -> Outcome {
    let process = call.process();
    let file = attempt!(process.file(call.int(0)));
    if file.flags().contains(OpenFlags::PATH) {
        return Outcome::fail(Errno::EBADF);
    }
    let operation = call.unsigned(1);
    let kind = match operation & !linux::LOCK_NB {
        linux::LOCK_SH => Some(false),
        linux::LOCK_EX => Some(true),
        linux::LOCK_UN => None,
        _ => return Outcome::fail(Errno::EINVAL),
    };
    let identity = attempt!(identity(&file));
    let table = Arc::clone(attempt!(locks(process)));
    let owner = Arc::as_ptr(&file) as usize;
    let setter = Arc::clone(&table);
    take_lock(&table, operation & linux::LOCK_NB == 0, move || {
        setter.set_whole(identity, owner, kind).map(|()| 0)
    })
}

fn ioctl(call: &mut Call<'_>) -> Outcome {
    let (number, request, argument) = (call.int(0), call.unsigned(1), call.raw(2));
    let process = call.process();
    let file = attempt!(process.file(number));
    if file.flags().contains(OpenFlags::PATH) {
        return Outcome::fail(Errno::EBADF);
    }
    match request {
        requests::FIOCLEX | requests::FIONCLEX => {
            let mut files = process.files.lock();
            files
                .descriptor_mut(number)
                .map(|descriptor| descriptor.close_on_exec = request == requests::FIOCLEX)
                .into()
        }
        requests::FIONBIO | requests::FIOASYNC => {
            let on = attempt!(user::read::<i32>(argument)) != 0;
            let flag = if request == requests::FIONBIO {
                OpenFlags::NON_BLOCKING
            } else {
                OpenFlags::ASYNC
            };
            let flags = file.flags();
            file.set_flags(if on { flags | flag } else { flags - flag });
            Outcome::Done(Ok(0))
        }
        requests::FIONREAD if file.file.inode().is_some() && file.file.is_seekable() => {
            let metadata = attempt!(file.file.metadata());
            if metadata.kind != Kind::Regular {
                return Outcome::fail(Errno::ENOTTY);
            }
            let left = metadata
                .size
                .saturating_sub(file.position())
                .min(i32::MAX as u64) as i32;
            user::write(argument, &left).into()
        }
        _ => file.file.ioctl(call.thread, request, argument).into(),
    }
}

fn ftruncate(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let file = call.process().file(call.int(0))?;
        let size = u64::try_from(call.raw(1).cast_signed()).map_err(|_| Errno::EINVAL)?;
        if file.flags().contains(OpenFlags::PATH) {
            return Err(Errno::EBADF);
        }
        let inode = file.file.inode().ok_or(Errno::EINVAL)?;
        if !file.flags().writable() || inode.metadata()?.kind != Kind::Regular {
            return Err(Errno::EINVAL);
        }
        inode.change(&crate::fs::MetadataChange {
            size: Some(size),
            ..Default::default()
        })
    })();
    result.into()
}

fn fallocate(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let file = call.process().file(call.int(0))?;
        if !file.flags().writable() {
            return Err(Errno::EBADF);
        }
        let position = u64::try_from(call.raw(2).cast_signed()).map_err(|_| Errno::EINVAL)?;
        let length = u64::try_from(call.raw(3).cast_signed()).map_err(|_| Errno::EINVAL)?;
        if length == 0 {
            return Err(Errno::EINVAL);
        }
        let inode = file.file.inode().ok_or(if file.file.is_seekable() {
            Errno::ENODEV
        } else {
            Errno::ESPIPE
        })?;
        inode.allocate(call.unsigned(1), position, length)
    })();
    result.into()
}

fn synchronize(call: &Call<'_>, data_only: bool) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    if file.flags().contains(OpenFlags::PATH) {
        return Outcome::fail(Errno::EBADF);
    }
    file.file.synchronize(data_only).into()
}

fn fsync(call: &mut Call<'_>) -> Outcome {
    synchronize(call, false)
}

fn fdatasync(call: &mut Call<'_>) -> Outcome {
    synchronize(call, true)
}

fn synchronize_all(kernel: &Kernel) {
    if let Some(root) = kernel.root.get() {
        for mount in root.mount().all() {
            // sync(2) tells of no errors.
            let _ = mount.root_inode().synchronize(false);
        }
    }
}

fn sync(call: &mut Call<'_>) -> Outcome {
    synchronize_all(call.kernel());
    Outcome::Done(Ok(0))
}

fn syncfs(call: &mut Call<'_>) -> Outcome {
    attempt!(call.process().file(call.int(0)));
    synchronize_all(call.kernel());
    Outcome::Done(Ok(0))
}

fn sync_file_range(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(3) & !7 != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let file = attempt!(call.process().file(call.int(0)));
    if !file.file.is_seekable() {
        return Outcome::fail(Errno::ESPIPE);
    }
    file.file.synchronize(true).into()
}

fn fadvise(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    if !file.file.is_seekable() {
        return Outcome::fail(Errno::ESPIPE);
    }
    // All file data is in memory already, or with the host: advice changes nothing, but bad advice is told.
    if call.unsigned(3) > linux::POSIX_FADV_NOREUSE {
        Outcome::fail(Errno::EINVAL)
    } else {
        Outcome::Done(Ok(0))
    }
}

fn readahead(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    if !file.flags().readable() {
        return Outcome::fail(Errno::EBADF);
    }
    if file.file.inode().is_none() {
        Outcome::fail(Errno::EINVAL)
    } else {
        Outcome::Done(Ok(0))
    }
}

/// Entries asked of a file system at once.
const DIRECTORY_BATCH: usize = 64;
/// Positions of `.` and `..`; those of the file system's entries are shifted by two.
const DOTS: u64 = 2;

struct DirectoryWriter {
    buffer: Vec<u8>,
    limit: usize,
    wide: bool,
}

impl DirectoryWriter {
    /// Adds a record; false when it does not fit.
    fn add(&mut self, inode: u64, next: u64, kind: Kind, name: &str) -> bool {
        // `getdents` has the kind in the last byte, `getdents64` before the name.
        let header = if self.wide { 19 } else { 18 };
        let length = (header + name.len() + if self.wide { 1 } else { 2 }).next_multiple_of(8);
        if self.buffer.len() + length > self.limit {
            return false;
        }
        let end = self.buffer.len() + length;
        self.buffer.extend_from_slice(&inode.to_ne_bytes());
        self.buffer.extend_from_slice(&next.to_ne_bytes());
        self.buffer
            .extend_from_slice(&(length as u16).to_ne_bytes());
        if self.wide {
            self.buffer.push(kind.directory_type());
        }
        self.buffer.extend_from_slice(name.as_bytes());
        self.buffer.resize(end, 0);
        if !self.wide
            && let Some(last) = self.buffer.last_mut()
        {
            *last = kind.directory_type();
        }
        true
    }
}

fn list(call: &Call<'_>, wide: bool) -> Result<usize> {
    let file = call.process().file(call.int(0))?;
    if !file.flags().readable() {
        return Err(Errno::EBADF);
    }
    let place = file
        .file
        .as_any()
        .downcast_ref::<Place>()
        .ok_or(Errno::ENOTDIR)?;
    let location = place.location();
    let metadata = location.inode().metadata()?;
    if metadata.kind != Kind::Directory {
        return Err(Errno::ENOTDIR);
    }
    let limit = (call.unsigned(2) as usize).min(1 << 20);
    let range = UserRange::new(call.raw(1), limit as u64)?;
    let mut writer = DirectoryWriter {
        buffer: Vec::new(),
        limit,
        wide,
    };
    let mut position = file.position();
    let mut full = false;
    while position < DOTS && !full {
        let (inode, name) = match position {
            0 => (metadata.inode, "."),
            _ => match location.parent() {
                Some(parent) => (parent.inode().metadata()?.inode, ".."),
                None => (metadata.inode, ".."),
            },
        };
        if writer.add(inode, position + 1, Kind::Directory, name) {
            position += 1;
        } else {
            full = true;
        }
    }
    while !full {
        let entries = location.inode().entries(position - DOTS, DIRECTORY_BATCH)?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            if !writer.add(entry.inode, entry.next + DOTS, entry.kind, &entry.name) {
                full = true;
                break;
            }
            position = entry.next + DOTS;
        }
    }
    if full && writer.buffer.is_empty() {
        return Err(Errno::EINVAL);
    }
    range.write(&writer.buffer)?;
    file.set_position(position);
    Ok(writer.buffer.len())
}

fn getdents(call: &mut Call<'_>) -> Outcome {
    list(call, false).into()
}

fn getdents64(call: &mut Call<'_>) -> Outcome {
    list(call, true).into()
}

fn make_pipe(call: &Call<'_>, flags: u32) -> Result<()> {
    if flags & !(linux::O_CLOEXEC | linux::O_NONBLOCK) != 0 {
        return Err(Errno::EINVAL);
    }
    let (reader, writer) = pipe::pipe();
    let status = OpenFlags::from_bits_truncate(flags & linux::O_NONBLOCK);
    let reader = OpenFile::new(reader, status);
    let writer = OpenFile::new(writer, status | OpenFlags::WRITE_ONLY);
    insert_pair(
        &call.process().files,
        reader,
        writer,
        flags & linux::O_CLOEXEC != 0,
        call.raw(0),
    )
}

/// Gives two open files descriptors and writes the numbers to the program; or does nothing at all.
fn insert_pair(
    files: &crate::sync::Mutex<FileTable>,
    first: Arc<OpenFile>,
    second: Arc<OpenFile>,
    close_on_exec: bool,
    address: u64,
) -> Result<()> {
    let one = files.lock().insert(first, close_on_exec)?;
    let other = files.lock().insert(second, close_on_exec);
    let result = other.and_then(|other| user::write(address, &[one, other]));
    if result.is_err() {
        let mut files = files.lock();
        let removed = (files.remove(one), other.map(|other| files.remove(other)));
        drop(files);
        drop(removed);
    }
    result
}

fn pipe_call(call: &mut Call<'_>) -> Outcome {
    make_pipe(call, 0).into()
}

fn pipe2(call: &mut Call<'_>) -> Outcome {
    make_pipe(call, call.unsigned(1)).into()
}

fn memfd_create(call: &mut Call<'_>) -> Outcome {
    const KNOWN: u32 =
        linux::MFD_CLOEXEC | linux::MFD_ALLOW_SEALING | linux::MFD_NOEXEC_SEAL | linux::MFD_EXEC;
    let result = (|| {
        let flags = call.unsigned(1);
        let name = user::read_c_string(call.raw(0), 250).map_err(|error| match error {
            Errno::ENAMETOOLONG => Errno::EINVAL,
            error => error,
        })?;
        if flags & !KNOWN != 0
            || flags & (linux::MFD_NOEXEC_SEAL | linux::MFD_EXEC)
                == linux::MFD_NOEXEC_SEAL | linux::MFD_EXEC
        {
            return Err(Errno::EINVAL);
        }
        let files = call.kernel().files.get().ok_or(Errno::ENOMEM)?;
        let credentials = call.thread.credentials();
        let node = Tmpfs::unnamed_file(
            files.memory_files(),
            0o777,
            credentials.effective_uid(),
            credentials.effective_gid(),
            flags & (linux::MFD_ALLOW_SEALING | linux::MFD_NOEXEC_SEAL) != 0,
        )
        .ok_or(Errno::ENOMEM)?;
        let path = alloc::format!(
            "/memfd:{} (deleted)",
            alloc::string::String::from_utf8_lossy(&name)
        );
        let flags_open = OpenFlags::READ_WRITE | OpenFlags::LARGE_FILE;
        let file = OpenFile::with_path(
            crate::fs::regular::RegularFile::open(node),
            flags_open,
            Some(path),
        );
        call.process()
            .add_file(file, flags & linux::MFD_CLOEXEC != 0)
    })();
    result.into()
}

//! Pipes, with and without a name.
//!
//! A pipe is a ring of bytes with a number of readers and of writers. Reading from an empty pipe without writers is the
//! end of the file; writing to one without readers is `EPIPE` (the system-call layer adds `SIGPIPE`). Writes of at most
//! [`ATOMIC`] bytes go in as a whole or not at all.

use alloc::{format, string::String, sync::Arc, vec::Vec};
use core::{
    any::Any,
    sync::atomic::{AtomicU64, Ordering},
};

use linux_raw_sys::ioctl;

use super::{File, OpenFlags, Readiness, Sink, Source, WatchList, anonymous_metadata};
use crate::{
    Errno, Result,
    fs::{Inode, Kind, Metadata},
    memory::user,
    sync::Mutex,
    task::Thread,
};

/// Writes of so many bytes are not mixed with others': Linux's `PIPE_BUF`.
pub const ATOMIC: usize = 4096;
/// Bytes that fit into a pipe when nobody asks for another size.
pub const DEFAULT_CAPACITY: usize = 65536;
/// Largest capacity that may be asked for: Linux's default for `/proc/sys/fs/pipe-max-size`.
pub const MAX_CAPACITY: usize = 1 << 20;
const FIRST_ALLOCATION: usize = 4096;

static NEXT_INODE: AtomicU64 = AtomicU64::new(1);

/// Bytes in a circle.
#[derive(Default)]
struct Ring {
    bytes: Vec<u8>,
    head: usize,
    length: usize,
}

impl Ring {
    /// Makes room for `needed` bytes in all, but not for more than `capacity`.
    fn grow(&mut self, needed: usize, capacity: usize) {
        if needed <= self.bytes.len() {
            return;
        }
        let size = needed
            .next_power_of_two()
            .max(FIRST_ALLOCATION)
            .min(capacity.max(needed));
        let mut bytes = Vec::with_capacity(size);
        let (first, second) = self.slices();
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        bytes.resize(size, 0);
        self.bytes = bytes;
        self.head = 0;
    }

    fn slices(&self) -> (&[u8], &[u8]) {
        let end = self.head + self.length;
        if end <= self.bytes.len() {
            (&self.bytes[self.head..end], &[])
        } else {
            (
                &self.bytes[self.head..],
                &self.bytes[..end - self.bytes.len()],
            )
        }
    }

    fn take_into(&mut self, sink: &mut Sink<'_>) -> Result<usize> {
        let (first, second) = self.slices();
        let mut done = sink.put(first)?;
        if done == first.len() && !second.is_empty() {
            match sink.put(second) {
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => {}
            }
        }
        self.consume(done);
        Ok(done)
    }

    fn consume(&mut self, count: usize) {
        self.length -= count;
        self.head = if self.length == 0 {
            0
        } else {
            (self.head + count) % self.bytes.len()
        };
    }

    fn fill_from(&mut self, source: &mut Source<'_>, limit: usize) -> Result<usize> {
        let mut done = 0;
        while done < limit {
            let start = (self.head + self.length) % self.bytes.len();
            let end = self.bytes.len().min(start + (limit - done));
            match source.take(&mut self.bytes[start..end]) {
                Ok(0) => break,
                Ok(count) => {
                    self.length += count;
                    done += count;
                }
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

struct State {
    ring: Ring,
    capacity: usize,
    readers: u32,
    writers: u32,
    /// Openings for reading and writing ever made, for those who wait for the other side of a named pipe.
    reader_openings: u64,
    writer_openings: u64,
}

/// What both ends share.
pub struct Pipe {
    state: Mutex<State>,
    /// Those who watch an end that reads (or both reads and writes).
    reading: WatchList,
    writing: WatchList,
    inode: u64,
}

impl Pipe {
    fn new() -> Arc<Pipe> {
        Arc::new(Pipe {
            state: Mutex::new(State {
                ring: Ring::default(),
                capacity: DEFAULT_CAPACITY,
                readers: 0,
                writers: 0,
                reader_openings: 0,
                writer_openings: 0,
            }),
            reading: WatchList::new(),
            writing: WatchList::new(),
            inode: NEXT_INODE.fetch_add(1, Ordering::Relaxed),
        })
    }

    fn notify(&self, readiness: Readiness) {
        self.reading.notify(readiness);
        self.writing.notify(readiness);
    }
}

/// An open end of a pipe.
pub struct PipeEnd {
    pipe: Arc<Pipe>,
    reads: bool,
    writes: bool,
    /// The name, for named pipes.
    inode: Option<Arc<dyn Inode>>,
    /// Openings of the other side that had been made when this was opened.
    openings_before: u64,
}

/// Makes a pipe: the end to read from and the end to write to.
#[must_use]
pub fn pipe() -> (Arc<PipeEnd>, Arc<PipeEnd>) {
    let pipe = Pipe::new();
    (
        PipeEnd::open(Arc::clone(&pipe), true, false, None),
        PipeEnd::open(pipe, false, true, None),
    )
}

/// A named pipe.
pub struct Fifo {
    pipe: Arc<Pipe>,
}

impl Fifo {
    /// A pipe that nobody has open.
    #[must_use]
    pub fn new() -> Arc<Fifo> {
        Arc::new(Fifo { pipe: Pipe::new() })
    }

    /// Opens it. Whoever opens only one direction, blocking, must then wait for [`PipeEnd::peer_has_come`].
    ///
    /// # Errors
    /// `ENXIO` when opened for writing only, non-blocking, without a reader.
    pub fn open(self: Arc<Fifo>, inode: Arc<dyn Inode>, flags: OpenFlags) -> Result<Arc<dyn File>> {
        let (reads, writes) = (flags.readable(), flags.writable());
        if writes
            && !reads
            && flags.contains(OpenFlags::NON_BLOCKING)
            && self.pipe.state.lock().readers == 0
        {
            return Err(Errno::ENXIO);
        }
        Ok(PipeEnd::open(
            Arc::clone(&self.pipe),
            reads,
            writes,
            Some(inode),
        ))
    }
}

impl PipeEnd {
    fn open(
        pipe: Arc<Pipe>,
        reads: bool,
        writes: bool,
        inode: Option<Arc<dyn Inode>>,
    ) -> Arc<PipeEnd> {
        let openings_before = {
            let mut state = pipe.state.lock();
            let before = if reads {
                state.writer_openings
            } else {
                state.reader_openings
            };
            state.readers += u32::from(reads);
            state.writers += u32::from(writes);
            state.reader_openings += u64::from(reads);
            state.writer_openings += u64::from(writes);
            before
        };
        pipe.notify(Readiness::READABLE | Readiness::WRITABLE);
        Arc::new(PipeEnd {
            pipe,
            reads,
            writes,
            inode,
            openings_before,
        })
    }

    /// Opens the same pipe once more (through `/proc/self/fd`).
    #[must_use]
    pub fn reopen(&self, flags: OpenFlags) -> Arc<PipeEnd> {
        PipeEnd::open(
            Arc::clone(&self.pipe),
            flags.readable(),
            flags.writable(),
            self.inode.clone(),
        )
    }

    /// Whether the other side is open, or was opened since this end was: then the opening of a named pipe is complete.
    #[must_use]
    pub fn peer_has_come(&self) -> bool {
        let state = self.pipe.state.lock();
        match (self.reads, self.writes) {
            (true, false) => state.writers > 0 || state.writer_openings > self.openings_before,
            (false, true) => state.readers > 0 || state.reader_openings > self.openings_before,
            _ => true,
        }
    }

    /// Whether it has a name.
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.inode.is_some()
    }

    /// The next bytes in the pipe, which stay in it; nothing at the end of the file.
    ///
    /// # Errors
    /// `EBADF` for an end that does not read, `EAGAIN` when there is nothing now.
    pub fn peek(&self, limit: usize) -> Result<Vec<u8>> {
        if !self.reads {
            return Err(Errno::EBADF);
        }
        let state = self.pipe.state.lock();
        if state.ring.length == 0 && state.writers > 0 {
            return Err(Errno::EAGAIN);
        }
        let (first, second) = state.ring.slices();
        Ok(first.iter().chain(second).take(limit).copied().collect())
    }

    /// Takes bytes out that [`PipeEnd::peek`] gave.
    pub fn consume(&self, count: usize) {
        {
            let mut state = self.pipe.state.lock();
            let count = count.min(state.ring.length);
            if count > 0 {
                state.ring.consume(count);
            }
        }
        self.pipe.notify(Readiness::WRITABLE);
    }

    /// Bytes that can be written now.
    ///
    /// # Errors
    /// `EBADF` for an end that does not write, `EPIPE` when nobody reads, `EAGAIN` when it is full.
    pub fn room(&self) -> Result<usize> {
        if !self.writes {
            return Err(Errno::EBADF);
        }
        let state = self.pipe.state.lock();
        if state.readers == 0 {
            return Err(Errno::EPIPE);
        }
        match state.capacity.saturating_sub(state.ring.length) {
            0 => Err(Errno::EAGAIN),
            room => Ok(room),
        }
    }

    /// Whether both are ends of one pipe.
    #[must_use]
    pub fn is_same_pipe(&self, other: &PipeEnd) -> bool {
        Arc::ptr_eq(&self.pipe, &other.pipe)
    }

    /// Bytes that fit (`F_GETPIPE_SZ`).
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pipe.state.lock().capacity
    }

    /// Changes how many bytes fit (`F_SETPIPE_SZ`): the next power of two of pages. Returns it.
    ///
    /// # Errors
    /// `EPERM` beyond [`MAX_CAPACITY`], `EBUSY` when more than that is in the pipe, `EINVAL` for zero.
    pub fn set_capacity(&self, wanted: usize) -> Result<usize> {
        if wanted == 0 {
            return Err(Errno::EINVAL);
        }
        if wanted > MAX_CAPACITY {
            return Err(Errno::EPERM);
        }
        let capacity = wanted.max(ATOMIC).next_power_of_two();
        let mut state = self.pipe.state.lock();
        if state.ring.length > capacity {
            return Err(Errno::EBUSY);
        }
        state.capacity = capacity;
        drop(state);
        self.pipe.notify(Readiness::WRITABLE);
        Ok(capacity)
    }
}

impl File for PipeEnd {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        if sink.remaining() == 0 {
            return Ok(0);
        }
        let mut state = self.pipe.state.lock();
        if state.ring.length == 0 {
            // A named pipe that no writer has opened yet is at its end too, when it does not block.
            return if state.writers == 0 {
                Ok(0)
            } else {
                Err(Errno::EAGAIN)
            };
        }
        let was_full = state.capacity - state.ring.length.min(state.capacity) < ATOMIC;
        let count = state.ring.take_into(sink)?;
        drop(state);
        if was_full {
            self.pipe.notify(Readiness::WRITABLE);
        }
        Ok(count)
    }

    fn write(&self, source: &mut Source<'_>, _: OpenFlags) -> Result<usize> {
        let mut state = self.pipe.state.lock();
        if state.readers == 0 {
            return Err(Errno::EPIPE);
        }
        let wanted = source.remaining();
        if wanted == 0 {
            return Ok(0);
        }
        let room = state.capacity.saturating_sub(state.ring.length);
        if room == 0 || (wanted <= ATOMIC && room < wanted) {
            return Err(Errno::EAGAIN);
        }
        let limit = room.min(wanted);
        let (needed, capacity) = (state.ring.length + limit, state.capacity);
        state.ring.grow(needed, capacity);
        let count = state.ring.fill_from(source, limit)?;
        drop(state);
        if count > 0 {
            self.pipe.notify(Readiness::READABLE);
        }
        Ok(count)
    }

    fn readiness(&self) -> Readiness {
        let state = self.pipe.state.lock();
        let mut readiness = Readiness::empty();
        if self.reads {
            if state.ring.length > 0 {
                readiness |= Readiness::READABLE;
            }
            if state.writers == 0
                && (self.inode.is_none() || state.writer_openings > self.openings_before)
            {
                readiness |= Readiness::HANGUP;
            }
        }
        if self.writes {
            if state.capacity.saturating_sub(state.ring.length) >= ATOMIC {
                readiness |= Readiness::WRITABLE;
            }
            if state.readers == 0 {
                readiness |= Readiness::ERROR;
            }
        }
        readiness
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(if self.reads {
            &self.pipe.reading
        } else {
            &self.pipe.writing
        })
    }

    fn metadata(&self) -> Result<Metadata> {
        match &self.inode {
            Some(inode) => inode.metadata(),
            None => Ok(anonymous_metadata(Kind::Fifo, 0o600, self.pipe.inode)),
        }
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        self.inode.as_ref()
    }

    fn ioctl(&self, _: &Thread, request: u32, argument: u64) -> Result<usize> {
        match request {
            ioctl::FIONREAD => {
                let length = self.pipe.state.lock().ring.length as i32;
                user::write(argument, &length)?;
                Ok(0)
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn describe(&self) -> String {
        format!("pipe:[{}]", self.pipe.inode)
    }

    fn on_close(&self) {
        {
            let mut state = self.pipe.state.lock();
            state.readers -= u32::from(self.reads);
            state.writers -= u32::from(self.writes);
            if state.readers == 0 && state.writers == 0 {
                // What nobody has read is lost when nobody has the pipe open.
                state.ring = Ring::default();
            }
        }
        let mut readiness = Readiness::empty();
        if self.writes {
            readiness |= Readiness::HANGUP | Readiness::READABLE;
        }
        if self.reads {
            readiness |= Readiness::ERROR | Readiness::WRITABLE;
        }
        self.pipe.notify(readiness);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(end: &PipeEnd, bytes: &[u8]) -> Result<usize> {
        end.write(&mut Source::kernel(bytes), OpenFlags::empty())
    }

    fn read(end: &PipeEnd, length: usize) -> Result<Vec<u8>> {
        let mut bytes = alloc::vec![0; length];
        let count = end.read(&mut Sink::kernel(&mut bytes), OpenFlags::empty())?;
        bytes.truncate(count);
        Ok(bytes)
    }

    #[test]
    fn bytes_go_through_in_order_around_the_ring() {
        let (reader, writer) = pipe();
        let mut expected = 0u8;
        let mut next = 0u8;
        for round in 0..500usize {
            let chunk: Vec<u8> = (0..(round * 37) % 3000 + 1)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            assert_eq!(write(&writer, &chunk), Ok(chunk.len()));
            while let Ok(bytes) = read(&reader, 1024) {
                for byte in bytes {
                    expected = expected.wrapping_add(1);
                    assert_eq!(byte, expected);
                }
            }
        }
    }

    #[test]
    fn small_writes_are_whole_or_nothing() {
        let (reader, writer) = pipe();
        assert_eq!(write(&writer, &[1; 62000]), Ok(62000));
        assert_eq!(write(&writer, &[2; 4096]), Err(Errno::EAGAIN));
        assert_eq!(write(&writer, &[3; 5000]), Ok(65536 - 62000));
        assert!(!writer.readiness().contains(Readiness::WRITABLE));
        assert_eq!(read(&reader, 4096).unwrap().len(), 4096);
        assert!(writer.readiness().contains(Readiness::WRITABLE));
        assert_eq!(write(&writer, &[2; 4096]), Ok(4096));
    }

    #[test]
    fn ends_see_each_other_go() {
        let (reader, writer) = pipe();
        assert_eq!(read(&reader, 1), Err(Errno::EAGAIN));
        write(&writer, b"x").unwrap();
        writer.on_close();
        assert_eq!(reader.readiness(), Readiness::READABLE | Readiness::HANGUP);
        assert_eq!(read(&reader, 10).unwrap(), b"x");
        assert_eq!(read(&reader, 10).unwrap(), b"");

        let (reader, writer) = pipe();
        reader.on_close();
        assert_eq!(write(&writer, b"x"), Err(Errno::EPIPE));
        assert!(writer.readiness().contains(Readiness::ERROR));
    }

    #[test]
    fn capacity_changes() {
        let (_reader, writer) = pipe();
        assert_eq!(writer.set_capacity(5000), Ok(8192));
        assert_eq!(write(&writer, &[0; 10000]), Ok(8192));
        assert_eq!(writer.set_capacity(4096), Err(Errno::EBUSY));
        assert_eq!(writer.set_capacity(MAX_CAPACITY + 1), Err(Errno::EPERM));
        assert_eq!(writer.set_capacity(16384), Ok(16384));
        assert_eq!(write(&writer, &[0; 10000]), Ok(8192));
    }
}

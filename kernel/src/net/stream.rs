//! Connected byte streams inside the kernel: a pair of ends with a buffer in each direction.
//!
//! Used for TCP to the machine's own addresses and for Unix stream sockets. No packets, no timers.
//!
//! What always holds: watchers are notified with no lock of the pair held. Ancillary data (Unix sockets) is attached to a
//! position of the byte stream and is delivered with the first read that reaches it; a read never goes on past the
//! bytes of one attachment into those of the next, as `unix(7)` demands.

use alloc::{collections::VecDeque, sync::Arc, vec::Vec};

use crate::{
    Errno, Result,
    file::{Readiness, Sink, Source, WatchList},
    sync::Mutex,
};

use super::unix::Ancillary;

/// Smallest buffer that is allocated, in bytes.
const SMALLEST: usize = 4 << 10;

/// A queue of bytes in a ring that grows up to a limit.
struct Ring {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
    limit: usize,
}

impl Ring {
    fn new(limit: usize) -> Ring {
        Ring {
            bytes: Vec::new(),
            start: 0,
            length: 0,
            limit: limit.max(SMALLEST),
        }
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.length)
    }

    /// Room for `wanted` more bytes, or as many as the limit allows.
    fn grow(&mut self, wanted: usize) {
        let needed = (self.length + wanted).min(self.limit);
        if needed <= self.bytes.len() {
            return;
        }
        let capacity = needed
            .next_power_of_two()
            .max(SMALLEST)
            .min(self.limit.max(needed));
        let mut bytes = alloc::vec![0; capacity];
        let (first, second) = self.parts();
        let (first_length, second_length) = (first.len(), second.len());
        bytes[..first_length].copy_from_slice(first);
        bytes[first_length..first_length + second_length].copy_from_slice(second);
        self.bytes = bytes;
        self.start = 0;
    }

    /// The queued bytes, in order.
    fn parts(&self) -> (&[u8], &[u8]) {
        let end = self.start + self.length;
        if end <= self.bytes.len() {
            (self.bytes.get(self.start..end).unwrap_or_default(), &[])
        } else {
            (
                self.bytes.get(self.start..).unwrap_or_default(),
                self.bytes.get(..end - self.bytes.len()).unwrap_or_default(),
            )
        }
    }

    /// Takes bytes of `source` in, as many as fit.
    fn fill(&mut self, source: &mut Source<'_>) -> Result<usize> {
        let wanted = source.remaining().min(self.free());
        self.grow(wanted);
        let mut done = 0;
        while done < wanted {
            let capacity = self.bytes.len();
            let at = (self.start + self.length) % capacity.max(1);
            let end = (at + wanted - done).min(capacity);
            let Some(room) = self.bytes.get_mut(at..end) else {
                break;
            };
            match source.take(room) {
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

    /// Copies up to `limit` bytes out; removes them unless `peek`.
    fn drain(&mut self, sink: &mut Sink<'_>, limit: usize, peek: bool) -> Result<usize> {
        let (first, second) = self.parts();
        let first = first.get(..first.len().min(limit)).unwrap_or_default();
        let second = second
            .get(..second.len().min(limit - first.len()))
            .unwrap_or_default();
        let mut count = sink.put(first)?;
        if count == first.len() && !second.is_empty() {
            count += sink.put(second).unwrap_or(0);
        }
        if !peek {
            self.consume(count);
        }
        Ok(count)
    }

    fn consume(&mut self, count: usize) {
        self.length -= count;
        if self.length == 0 {
            self.start = 0;
            // An idle connection holds no large buffer.
            if self.bytes.len() > 16 * SMALLEST {
                self.bytes = Vec::new();
            }
        } else {
            self.start = (self.start + count) % self.bytes.len().max(1);
        }
    }
}

/// One direction.
struct Direction {
    ring: Ring,
    /// Bytes ever put in and taken out: positions of attachments.
    written: u64,
    read: u64,
    attachments: VecDeque<(u64, Ancillary)>,
    /// Where the bytes of the last attachment end, if nothing has been written since.
    attached_until: Option<u64>,
    /// The writer has shut down: after the buffer comes the end.
    write_closed: bool,
    /// The reader has shut down.
    read_closed: bool,
    /// The reader has gone.
    reader_gone: bool,
}

impl Direction {
    fn new(limit: usize) -> Direction {
        Direction {
            ring: Ring::new(limit),
            written: 0,
            read: 0,
            attachments: VecDeque::new(),
            attached_until: None,
            write_closed: false,
            read_closed: false,
            reader_gone: false,
        }
    }
}

struct PairState {
    /// Index `side` is written by that side and read by the other.
    directions: [Direction; 2],
    /// Error that a side gets once, after a reset.
    errors: [Option<Errno>; 2],
    reset: bool,
}

/// Whose rules a pair follows where they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// `tcp(7)`: what the peer does is learned from segments. A peer that closes looks like one that shut down its
    /// sending, until something sent to it is answered by a reset; a peer's `SHUT_RD` is not seen at all.
    Tcp,
    /// `unix(7)`: what the peer does is seen at once.
    Unix,
}

struct Pair {
    rules: Rules,
    state: Mutex<PairState>,
    watch: [Arc<WatchList>; 2],
}

/// One end of a stream.
pub struct StreamEnd {
    pair: Arc<Pair>,
    side: usize,
}

/// What one read gave.
pub struct Received {
    /// Bytes stored.
    pub count: usize,
    /// What was attached to them.
    pub ancillary: Option<Ancillary>,
}

/// Makes a connected pair of ends; `watch` hear of each end's readiness, `limit` is the buffer of a direction in bytes.
#[must_use]
pub fn pair(rules: Rules, watch: [Arc<WatchList>; 2], limit: usize) -> (StreamEnd, StreamEnd) {
    let pair = Arc::new(Pair {
        rules,
        state: Mutex::new(PairState {
            directions: [Direction::new(limit), Direction::new(limit)],
            errors: [None, None],
            reset: false,
        }),
        watch,
    });
    (
        StreamEnd {
            pair: Arc::clone(&pair),
            side: 0,
        },
        StreamEnd { pair, side: 1 },
    )
}

impl StreamEnd {
    fn notify_peer(&self, readiness: Readiness) {
        self.pair.watch[1 - self.side].notify(readiness);
    }

    fn notify_self(&self, readiness: Readiness) {
        self.pair.watch[self.side].notify(readiness);
    }

    /// Who hears of this end.
    #[must_use]
    pub fn watch(&self) -> &Arc<WatchList> {
        &self.pair.watch[self.side]
    }

    /// Takes bytes out. `count` 0 is the end.
    ///
    /// # Errors
    /// `EAGAIN` when there is nothing; the connection's error after a reset, once; `EFAULT`.
    pub fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Received> {
        let mut state = self.pair.state.lock();
        // What came before a reset is read before its error.
        if state.directions[1 - self.side].ring.length == 0
            && let Some(error) = state.errors[self.side].take()
        {
            return Err(error);
        }
        let direction = &mut state.directions[1 - self.side];
        if sink.remaining() == 0 && (direction.ring.length > 0 || direction.write_closed) {
            return Ok(Received {
                count: 0,
                ancillary: None,
            });
        }
        if direction.ring.length == 0 || direction.read_closed && self.pair.rules == Rules::Unix {
            return if direction.write_closed || direction.read_closed {
                Ok(Received {
                    count: 0,
                    ancillary: None,
                })
            } else {
                Err(Errno::EAGAIN)
            };
        }
        // Attachments lie at the position of the first byte they came with.
        let mut ancillary = None;
        let mut limit = direction.ring.length;
        let at_position = direction
            .attachments
            .front()
            .is_some_and(|attachment| attachment.0 == direction.read);
        if let Some(next) = direction.attachments.get(usize::from(at_position)) {
            limit = limit.min((next.0 - direction.read) as usize);
        }
        let was_full = direction.ring.free() == 0;
        let count = direction.ring.drain(sink, limit, peek)?;
        if at_position && count > 0 {
            ancillary = if peek {
                direction
                    .attachments
                    .front()
                    .map(|attachment| attachment.1.clone())
            } else {
                direction
                    .attachments
                    .pop_front()
                    .map(|attachment| attachment.1)
            };
        }
        if !peek {
            direction.read += count as u64;
        }
        let notify = !peek && (was_full || direction.ring.free() >= direction.ring.limit / 3);
        // Only a writer that found the buffer (nearly) full waits for room.
        let waiting = notify && direction.ring.free() <= direction.ring.limit / 3 + count;
        drop(state);
        if waiting {
            self.notify_peer(Readiness::WRITABLE);
        }
        Ok(Received { count, ancillary })
    }

    /// Puts bytes in, with something attached to the first of them.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room; `EPIPE` when this end was shut down or the peer has gone; the connection's error
    /// after a reset, once; `EFAULT`.
    pub fn send(&self, source: &mut Source<'_>, ancillary: Option<Ancillary>) -> Result<usize> {
        let mut state = self.pair.state.lock();
        if let Some(error) = state.errors[self.side].take() {
            return Err(error);
        }
        let reset = state.reset;
        let direction = &mut state.directions[self.side];
        let unix = self.pair.rules == Rules::Unix;
        if direction.write_closed
            || reset
            || unix && (direction.read_closed || direction.reader_gone)
        {
            return Err(Errno::EPIPE);
        }
        if source.remaining() == 0 {
            return Ok(0);
        }
        if direction.reader_gone {
            // The segment would be answered by a reset, which the next call meets (RFC 9293, section 3.10.7.1).
            let count = source.remaining();
            source.advance(count);
            state.reset = true;
            state.errors[self.side] = Some(Errno::EPIPE);
            drop(state);
            self.notify_self(Readiness::all());
            return Ok(count);
        }
        if direction.ring.free() == 0 {
            return Err(Errno::EAGAIN);
        }
        let position = direction.written;
        let count = direction.ring.fill(source)?;
        if count > 0 {
            direction.written += count as u64;
            // What follows attached bytes is not read together with them either.
            let bounded = direction.attached_until.take() == Some(position);
            if ancillary.is_some() {
                direction.attached_until = Some(direction.written);
            }
            if ancillary.is_some() || bounded {
                direction
                    .attachments
                    .push_back((position, ancillary.unwrap_or_default()));
            }
        }
        drop(state);
        if count > 0 {
            self.notify_peer(Readiness::READABLE);
        }
        Ok(count)
    }

    /// What can be done now.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let state = self.pair.state.lock();
        let incoming = &state.directions[1 - self.side];
        let outgoing = &state.directions[self.side];
        let mut readiness = Readiness::empty();
        let unix = self.pair.rules == Rules::Unix;
        let read_end = incoming.write_closed || incoming.read_closed;
        let write_end =
            outgoing.write_closed || unix && (outgoing.read_closed || outgoing.reader_gone);
        if incoming.ring.length > 0 || read_end {
            readiness |= Readiness::READABLE;
        }
        if read_end {
            readiness |= Readiness::READ_HANGUP;
        }
        if write_end || outgoing.ring.free() > outgoing.ring.limit / 3 {
            readiness |= Readiness::WRITABLE;
        }
        let peer_gone =
            unix && incoming.write_closed && (outgoing.read_closed || outgoing.reader_gone);
        if state.reset || read_end && outgoing.write_closed || peer_gone {
            readiness |= Readiness::HANGUP;
        }
        if state.errors[self.side].is_some() {
            readiness |= Readiness::ERROR | Readiness::READABLE | Readiness::WRITABLE;
        }
        readiness
    }

    /// Shuts directions of this end down.
    pub fn shutdown(&self, read: bool, write: bool) {
        let mut state = self.pair.state.lock();
        if read {
            state.directions[1 - self.side].read_closed = true;
        }
        if write {
            state.directions[self.side].write_closed = true;
        }
        drop(state);
        let mut own = Readiness::empty();
        if read {
            own |= Readiness::READABLE | Readiness::READ_HANGUP;
        }
        if write {
            own |= Readiness::WRITABLE;
            self.notify_peer(Readiness::READABLE | Readiness::READ_HANGUP | Readiness::HANGUP);
        }
        self.notify_self(own | Readiness::HANGUP);
    }

    /// This end goes: what the peer sends from now on meets `EPIPE`. If data was left unread, or with `abort`, the peer
    /// also gets a reset.
    pub fn close(&self, abort: bool) {
        let mut state = self.pair.state.lock();
        let incoming = &mut state.directions[1 - self.side];
        let unread = incoming.ring.length > 0;
        incoming.reader_gone = true;
        incoming.ring.consume(incoming.ring.length);
        let dropped = core::mem::take(&mut incoming.attachments);
        let already = state.directions[self.side].reader_gone;
        if (abort || unread) && !already {
            state.reset = true;
            state.errors[1 - self.side] = Some(Errno::ECONNRESET);
        }
        state.directions[self.side].write_closed = true;
        drop(state);
        drop(dropped);
        self.notify_peer(
            Readiness::READABLE
                | Readiness::WRITABLE
                | Readiness::READ_HANGUP
                | Readiness::HANGUP
                | Readiness::ERROR,
        );
    }

    /// Takes the connection's error.
    #[must_use]
    pub fn take_error(&self) -> Option<Errno> {
        self.pair.state.lock().errors[self.side].take()
    }

    /// Bytes that wait to be read here.
    #[must_use]
    pub fn available(&self) -> usize {
        self.pair.state.lock().directions[1 - self.side].ring.length
    }

    /// Bytes sent from here that the peer has not read.
    #[must_use]
    pub fn unread(&self) -> usize {
        self.pair.state.lock().directions[self.side].ring.length
    }

    /// Sets the buffer of the direction that this end writes (`limit` in bytes), or of the one that it reads.
    pub fn set_buffer(&self, sending: bool, limit: usize) {
        let mut state = self.pair.state.lock();
        let side = if sending { self.side } else { 1 - self.side };
        let ring = &mut state.directions[side].ring;
        ring.limit = limit.max(SMALLEST).max(ring.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(limit: usize) -> (StreamEnd, StreamEnd) {
        pair(
            Rules::Unix,
            [Arc::new(WatchList::new()), Arc::new(WatchList::new())],
            limit,
        )
    }

    fn read(end: &StreamEnd, limit: usize) -> Result<Vec<u8>> {
        let mut bytes = alloc::vec![0; limit];
        let count = end.receive(&mut Sink::kernel(&mut bytes), false)?.count;
        bytes.truncate(count);
        Ok(bytes)
    }

    #[test]
    fn bytes_come_out_as_they_went_in_around_the_ring() {
        let (a, b) = new(10_000);
        let mut sent = 0u32;
        let mut received = 0u32;
        let mut step = 1;
        for _ in 0..2000 {
            step = (step * 7 + 3) % 6007;
            let chunk: Vec<u8> = (sent..sent + step).map(|n| (n % 251) as u8).collect();
            match a.send(&mut Source::kernel(&chunk), None) {
                Ok(count) => sent += count as u32,
                Err(error) => assert_eq!(error, Errno::EAGAIN),
            }
            if let Ok(bytes) = read(&b, step as usize * 2 % 5003 + 1) {
                for byte in bytes {
                    assert_eq!(u32::from(byte), received % 251);
                    received += 1;
                }
            }
        }
        assert!(received > 1_000_000);
    }

    #[test]
    fn half_close_gives_the_end_after_the_data() {
        let (a, b) = new(8192);
        a.send(&mut Source::kernel(b"last"), None).unwrap();
        a.shutdown(false, true);
        assert_eq!(a.send(&mut Source::kernel(b"x"), None), Err(Errno::EPIPE));
        assert_eq!(read(&b, 100).unwrap(), b"last");
        assert_eq!(read(&b, 100).unwrap(), b"");
        assert!(
            b.readiness()
                .contains(Readiness::READ_HANGUP | Readiness::READABLE | Readiness::WRITABLE)
        );
        assert!(!b.readiness().contains(Readiness::HANGUP));
        b.send(&mut Source::kernel(b"still"), None).unwrap();
        assert_eq!(read(&a, 100).unwrap(), b"still");
        b.shutdown(false, true);
        assert!(a.readiness().contains(Readiness::HANGUP));
    }

    #[test]
    fn closing_with_unread_data_resets_the_peer() {
        let (a, b) = new(8192);
        a.send(&mut Source::kernel(b"never read"), None).unwrap();
        b.close(false);
        assert!(a.readiness().contains(Readiness::ERROR | Readiness::HANGUP));
        assert_eq!(read(&a, 10), Err(Errno::ECONNRESET));
        assert_eq!(read(&a, 10).unwrap(), b"");
        assert_eq!(a.send(&mut Source::kernel(b"x"), None), Err(Errno::EPIPE));
    }

    #[test]
    fn what_came_before_a_reset_is_read_before_its_error() {
        let (a, b) = new(8192);
        a.send(&mut Source::kernel(b"never read"), None).unwrap();
        b.send(&mut Source::kernel(b"go away"), None).unwrap();
        b.close(false);
        assert_eq!(read(&a, 100).unwrap(), b"go away");
        assert_eq!(read(&a, 100), Err(Errno::ECONNRESET));
        assert_eq!(read(&a, 100).unwrap(), b"");
    }

    #[test]
    fn closing_cleanly_leaves_data_to_the_peer() {
        let (a, b) = new(8192);
        b.send(&mut Source::kernel(b"bye"), None).unwrap();
        b.close(false);
        assert_eq!(read(&a, 10).unwrap(), b"bye");
        assert_eq!(read(&a, 10).unwrap(), b"");
        assert_eq!(a.send(&mut Source::kernel(b"x"), None), Err(Errno::EPIPE));
        assert!(a.readiness().contains(Readiness::HANGUP));
    }

    #[test]
    fn a_tcp_peer_that_closed_is_found_out_by_sending() {
        let (a, b) = pair(
            Rules::Tcp,
            [Arc::new(WatchList::new()), Arc::new(WatchList::new())],
            8192,
        );
        b.close(false);
        assert!(
            a.readiness()
                .contains(Readiness::READ_HANGUP | Readiness::WRITABLE)
        );
        assert!(!a.readiness().contains(Readiness::HANGUP));
        assert_eq!(a.send(&mut Source::kernel(b"x"), None), Ok(1));
        assert!(a.readiness().contains(Readiness::HANGUP | Readiness::ERROR));
        assert_eq!(a.send(&mut Source::kernel(b"x"), None), Err(Errno::EPIPE));
        assert_eq!(read(&a, 1).unwrap(), b"");
    }

    #[test]
    fn a_full_buffer_is_not_writable_and_peeking_keeps_the_bytes() {
        let (a, b) = new(4096);
        let many = [7; 10_000];
        assert_eq!(a.send(&mut Source::kernel(&many), None), Ok(4096));
        assert_eq!(a.send(&mut Source::kernel(&many), None), Err(Errno::EAGAIN));
        assert!(!a.readiness().contains(Readiness::WRITABLE));
        let mut bytes = [0; 100];
        assert_eq!(
            b.receive(&mut Sink::kernel(&mut bytes), true)
                .unwrap()
                .count,
            100
        );
        assert_eq!(b.available(), 4096);
        assert_eq!(read(&b, 5000).unwrap().len(), 4096);
        assert!(a.readiness().contains(Readiness::WRITABLE));
    }

    #[test]
    fn attachments_come_with_their_bytes() {
        let (a, b) = new(8192);
        let tagged = |pid| Ancillary {
            credentials: Some((pid, 0, 0)),
            files: Vec::new(),
        };
        a.send(&mut Source::kernel(b"plain"), None).unwrap();
        a.send(&mut Source::kernel(b"one"), Some(tagged(1)))
            .unwrap();
        a.send(&mut Source::kernel(b"two"), Some(tagged(2)))
            .unwrap();
        let mut bytes = [0; 100];
        let mut next = || {
            let received = b.receive(&mut Sink::kernel(&mut bytes), false).unwrap();
            (
                received.count,
                received
                    .ancillary
                    .and_then(|ancillary| ancillary.credentials)
                    .map(|c| c.0),
            )
        };
        assert_eq!(next(), (5, None));
        assert_eq!(next(), (3, Some(1)));
        assert_eq!(next(), (3, Some(2)));
    }
}

//! The monitor's end of the link ([`kiln_abi::link`]): frames out of a byte stream and into it.
//!
//! [`FrameReader`] turns bytes into frames and trusts nothing: lengths are checked before anything is kept.
//! [`Sender`] queues frames and sends what the socket takes; it never blocks, so that a kernel that does not read cannot stop its
//! monitor. Whoever sends looks at [`Sender::pending`] and stops producing while it is large.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_abi::link::{CONTROL, HEADER, MAX_PAYLOAD, ToKernel, ToMonitor, header, parse_header};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};

use crate::error::Error;

/// One frame from the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Control, or a volume.
    pub channel: u32,
    /// What it carries.
    pub payload: &'a mut [u8],
}

/// Bytes read at once when no large frame is under way.
const CHUNK: usize = 64 << 10;

/// Collects bytes from the kernel and cuts them into frames.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// More bytes.
    Bytes,
    /// Nothing now.
    Blocked,
    /// The kernel has closed its end.
    End,
}

impl FrameReader {
    /// Reads once. `wait`: blocks until there is something.
    ///
    /// # Errors
    /// Those of `recvmsg(2)`; a reset connection counts as its end.
    pub fn fill(&mut self, socket: BorrowedFd<'_>, wait: bool) -> io::Result<Fill> {
        let room = self.make_room();
        let flags = if wait {
            RecvFlags::empty()
        } else {
            RecvFlags::DONTWAIT
        };
        loop {
            let mut slices = [IoSliceMut::new(&mut self.buffer[room..])];
            match recvmsg(
                socket,
                &mut slices,
                &mut RecvAncillaryBuffer::default(),
                flags | RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(message) if message.bytes == 0 => return Ok(Fill::End),
                Ok(message) => {
                    self.end += message.bytes;
                    return Ok(Fill::Bytes);
                }
                Err(Errno::AGAIN) => return Ok(Fill::Blocked),
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Fill::End),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Moves what is left to the front and makes room behind it. Returns where the room begins.
    fn make_room(&mut self) -> usize {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = match self.frame_length() {
            Some(length) => length.max(self.end + 1).max(CHUNK),
            None => CHUNK,
        };
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
        self.end
    }

    /// Length of the first frame with its header, if the header is there and sound.
    fn frame_length(&self) -> Option<usize> {
        let bytes = self.buffer.get(self.start..self.end)?;
        let (_, length) = parse_header(*bytes.first_chunk::<HEADER>()?);
        (length <= MAX_PAYLOAD).then(|| HEADER + usize::try_from(length).unwrap_or(0))
    }

    /// Puts bytes in as if they had been read, for tests.
    #[cfg(test)]
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.make_room();
            let taken = bytes.len().min(self.buffer.len() - room);
            self.buffer[room..room + taken].copy_from_slice(&bytes[..taken]);
            self.end += taken;
            bytes = &bytes[taken..];
        }
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// When the kernel announces a payload beyond [`MAX_PAYLOAD`].
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, Error> {
        let Some(bytes) = self.buffer.get(self.start..self.end) else {
            return Ok(None);
        };
        let Some(head) = bytes.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let (channel, length) = parse_header(*head);
        if length > MAX_PAYLOAD {
            return Err(Error::Protocol(format!("a frame of {length} bytes")));
        }
        let from = self.start + HEADER;
        let to = from + usize::try_from(length).unwrap_or(usize::MAX);
        if to > self.end {
            return Ok(None);
        }
        self.start = to;
        Ok(self
            .buffer
            .get_mut(from..to)
            .map(|payload| Frame { channel, payload }))
    }
}

/// Decodes a control message.
///
/// # Errors
/// When it is none.
pub fn decode(payload: &[u8]) -> Result<ToMonitor, Error> {
    postcard::from_bytes(payload)
        .map_err(|error| Error::Protocol(format!("a control message that is none ({error})")))
}

struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

/// Sends frames to the kernel; shared by the threads of a monitor.
pub struct Sender {
    socket: OwnedFd,
    queue: Mutex<VecDeque<Outgoing>>,
}

impl Sender {
    /// Sends over `socket`, a connected Unix stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            queue: Mutex::new(VecDeque::new()),
        }
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Outgoing>> {
        // A panic elsewhere leaves the queue whole: frames are put in and taken out in one step each.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many frames wait.
    pub fn pending(&self) -> usize {
        self.queue().len()
    }

    /// Queues a control message, with a descriptor if it tells of one, and sends what can be sent.
    ///
    /// # Errors
    /// Those of `sendmsg(2)`, beyond a full socket. A kernel that is gone is no error here: its end is told by its process.
    pub fn control(&self, message: &ToKernel, descriptor: Option<OwnedFd>) -> io::Result<()> {
        let mut bytes = vec![0; HEADER];
        bytes.reserve(64);
        let bytes = postcard::to_extend(message, bytes)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.send(CONTROL, bytes, descriptor)
    }

    /// Queues a frame whose first [`HEADER`] bytes are left free for the header, and sends what can be sent.
    ///
    /// # Errors
    /// As for [`Sender::control`]; a payload beyond [`MAX_PAYLOAD`] is refused.
    pub fn send(
        &self,
        channel: u32,
        mut bytes: Vec<u8>,
        descriptor: Option<OwnedFd>,
    ) -> io::Result<()> {
        let length = bytes
            .len()
            .checked_sub(HEADER)
            .and_then(|length| u32::try_from(length).ok())
            .filter(|length| *length <= MAX_PAYLOAD)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(place) = bytes.first_chunk_mut::<HEADER>() {
            *place = header(channel, length);
        }
        let mut queue = self.queue();
        queue.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptor,
        });
        self.drain(&mut queue)
    }

    /// Sends what can be sent of the queue.
    ///
    /// # Errors
    /// As for [`Sender::control`].
    pub fn flush(&self) -> io::Result<()> {
        self.drain(&mut self.queue())
    }

    fn drain(&self, queue: &mut VecDeque<Outgoing>) -> io::Result<()> {
        while let Some(first) = queue.front_mut() {
            match self.push(first) {
                Ok(sent) => {
                    // The descriptor went with the first byte; ours closes here.
                    first.descriptor = None;
                    first.sent += sent;
                    if first.sent >= first.bytes.len() {
                        queue.pop_front();
                    }
                }
                // Too many descriptors on their way: the kernel has to take some first, as with a full socket.
                Err(Errno::AGAIN | Errno::TOOMANYREFS) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    queue.clear();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn push(&self, frame: &Outgoing) -> Result<usize, Errno> {
        let slices = [IoSlice::new(
            frame.bytes.get(frame.sent..).unwrap_or_default(),
        )];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match &frame.descriptor {
            None => sendmsg(
                &self.socket,
                &slices,
                &mut SendAncillaryBuffer::default(),
                flags,
            ),
            Some(descriptor) => {
                let descriptors = [descriptor.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(Errno::NOBUFS);
                }
                sendmsg(&self.socket, &slices, &mut ancillary, flags)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn frame(channel: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = header(channel, u32::try_from(payload.len()).unwrap()).to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    /// A small generator with a fixed seed: the same stream on every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self, below: u64) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 % below).unwrap()
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let mut random = Random(0x1234_5678_9abc_def1);
        for _ in 0..50 {
            let mut expected = Vec::new();
            let mut stream = Vec::new();
            for _ in 0..random.next(20) {
                let length = match random.next(4) {
                    0 => 0,
                    1 => random.next(10),
                    2 => random.next(5000),
                    _ => random.next(u64::from(MAX_PAYLOAD) + 1),
                };
                let payload: Vec<u8> = (0..length).map(|_| random.next(256) as u8).collect();
                let channel = random.next(5) as u32;
                stream.extend(frame(channel, &payload));
                expected.push((channel, payload));
            }
            let mut reader = FrameReader::default();
            let mut found = Vec::new();
            let mut rest = stream.as_slice();
            while !rest.is_empty() {
                let cut = (1 + random.next(100_000)).min(rest.len());
                reader.push(&rest[..cut]);
                rest = &rest[cut..];
                while let Some(frame) = reader.next_frame().unwrap() {
                    found.push((frame.channel, frame.payload.to_vec()));
                }
            }
            assert_eq!(found.len(), expected.len());
            assert!(found == expected);
        }
    }

    #[test]
    fn garbage_is_refused_and_never_kept_beyond_one_frame() {
        let mut random = Random(99);
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..random.next(200))
                .map(|_| random.next(256) as u8)
                .collect();
            let mut reader = FrameReader::default();
            reader.push(&bytes);
            while let Ok(Some(frame)) = reader.next_frame() {
                let _ = decode(frame.payload);
            }
            assert!(reader.buffer.len() <= HEADER + MAX_PAYLOAD as usize);
            let _ = decode(&bytes);
        }
        let mut reader = FrameReader::default();
        reader.push(&header(0, MAX_PAYLOAD + 1));
        assert!(matches!(reader.next_frame(), Err(Error::Protocol(_))));
    }

    #[test]
    fn descriptors_come_with_their_frames_and_a_full_socket_loses_nothing() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let sender = Sender::new(ours);
        let count: u16 = 2000;
        for port in 0..count {
            let (descriptor, _) = rustix::pipe::pipe().unwrap();
            let message = ToKernel::Accepted {
                local: "0.0.0.0:80".parse().unwrap(),
                peer: (std::net::Ipv4Addr::LOCALHOST, port).into(),
            };
            if sender.pending() < 100 {
                sender.control(&message, Some(descriptor)).unwrap();
            } else {
                sender.control(&message, None).unwrap();
            }
        }
        assert!(sender.pending() > 0, "the socket should have filled up");
        let mut received = Vec::new();
        let mut descriptors = 0;
        let mut seen = 0;
        let mut reader = FrameReader::default();
        while seen < count {
            sender.flush().unwrap();
            let mut buffer = vec![0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let message = recvmsg(
                &theirs,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut ancillary,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            )
            .unwrap();
            for item in ancillary.drain() {
                if let rustix::net::RecvAncillaryMessage::ScmRights(rights) = item {
                    descriptors += rights.count();
                }
            }
            reader.push(&buffer[..message.bytes]);
            while let Some(frame) = reader.next_frame().unwrap() {
                assert_eq!(frame.channel, CONTROL);
                let Ok(ToKernel::Accepted { peer, .. }) = postcard::from_bytes(frame.payload)
                else {
                    panic!("not the message that was sent");
                };
                received.push(peer.port());
                seen += 1;
            }
        }
        assert_eq!(received, (0..count).collect::<Vec<_>>());
        assert!(descriptors >= 100);
        assert_eq!(sender.pending(), 0);
    }

    #[test]
    fn a_kernel_that_is_gone_is_no_error() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        drop(theirs);
        let sender = Sender::new(ours);
        sender
            .control(&ToKernel::Signal { signal: 15 }, None)
            .unwrap();
        let mut reader = FrameReader::default();
        assert_eq!(reader.fill(sender.socket(), false).unwrap(), Fill::End);
    }
}

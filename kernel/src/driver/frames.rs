//! Ethernet frames over a stream socket to the monitor (engine `process`, `--net direct`): the protocol of QEMU's
//! `-netdev stream`, each frame after its length in four bytes, big endian.

use alloc::{boxed::Box, vec, vec::Vec};

use kiln_abi::host::{Event, event_flags};

use crate::{Errno, Result, host::Host, net::FrameDevice, trace};

/// Bytes before each frame.
const HEADER: usize = 4;
/// Bytes before the packet in a frame.
const ETHERNET: usize = 14;
/// Bytes collected in each direction: a few dozen frames for one call of the host.
const BUFFER: usize = 96 << 10;

/// The stream.
pub struct FrameStream {
    host: Host,
    descriptor: i32,
    mac: [u8; 6],
    mtu: usize,
    received: Vec<u8>,
    /// The bytes of `received` that have not been taken yet.
    start: usize,
    end: usize,
    /// The host said that there is no more for now, or for good.
    drained: bool,
    to_send: Vec<u8>,
    /// Bytes of `to_send` that are sent, and that are ready.
    sent: usize,
    ready: usize,
    /// Length of the frame that was reserved after `ready`.
    reserved: usize,
}

impl FrameStream {
    /// The stream behind `descriptor`, whose events are switched on. `mtu` is the largest packet.
    ///
    /// # Errors
    /// What the host says when it cannot watch the descriptor.
    pub fn new(host: Host, descriptor: i32, mac: [u8; 6], mtu: usize) -> Result<Box<FrameStream>> {
        host.descriptor_watch(descriptor)?;
        let mtu = mtu.min(usize::from(u16::MAX));
        let length = BUFFER.max(HEADER + ETHERNET + mtu);
        Ok(Box::new(FrameStream {
            host,
            descriptor,
            mac,
            mtu,
            received: vec![0; length],
            start: 0,
            end: 0,
            drained: false,
            to_send: vec![0; length],
            sent: 0,
            ready: 0,
            reserved: 0,
        }))
    }

    /// Ends the stream: frames of an impossible length.
    fn give_up(&mut self) {
        trace::warn!("the monitor sent a frame of an impossible length; the network is gone");
        (self.start, self.end, self.drained) = (0, 0, true);
        let _ = self.host.descriptor_close(self.descriptor);
    }

    /// Gets more bytes. False when there are none for now.
    fn fill(&mut self) -> bool {
        if self.drained {
            return false;
        }
        self.received.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let Some(room) = self
            .received
            .get_mut(self.end..)
            .filter(|room| !room.is_empty())
        else {
            return false;
        };
        let wanted = room.len();
        match self.host.descriptor_receive(self.descriptor, room, &mut []) {
            Ok((count, _)) => {
                // Fewer than asked for: the rest makes an event.
                self.drained = count < wanted;
                self.end += count;
                count > 0
            }
            Err(Errno::EINTR) => true,
            Err(_) => {
                self.drained = true;
                false
            }
        }
    }
}

impl FrameDevice for FrameStream {
    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn source(&self) -> u32 {
        self.descriptor.cast_unsigned()
    }

    fn acknowledge(&mut self, event: Event) {
        if event.flags & !event_flags::WRITABLE != 0 {
            self.drained = false;
        }
        if event.flags & event_flags::WRITABLE != 0 {
            self.flush();
        }
    }

    fn receive(&mut self) -> Option<&[u8]> {
        loop {
            let bytes = self.received.get(self.start..self.end).unwrap_or_default();
            if let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
                let length = u32::from_be_bytes(*header) as usize;
                if length > self.received.len() - HEADER {
                    self.give_up();
                    return None;
                }
                if rest.len() >= length {
                    let first = self.start + HEADER;
                    self.start = first + length;
                    return self.received.get(first..first + length);
                }
            }
            if !self.fill() {
                return None;
            }
        }
    }

    fn has_room(&self) -> bool {
        self.to_send.len() - (self.ready - self.sent) >= HEADER + ETHERNET + self.mtu
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        if length > ETHERNET + self.mtu {
            return None;
        }
        if self.to_send.len() - self.ready < HEADER + length {
            self.flush();
            self.to_send.copy_within(self.sent..self.ready, 0);
            (self.sent, self.ready) = (0, self.ready - self.sent);
        }
        let first = self.ready + HEADER;
        let room = self.to_send.get_mut(first..first + length)?;
        self.reserved = length;
        Some(room)
    }

    fn commit(&mut self) {
        let length = core::mem::take(&mut self.reserved);
        if let Some(header) = self
            .to_send
            .get_mut(self.ready..)
            .and_then(|rest| rest.first_chunk_mut::<HEADER>())
        {
            *header = u32::try_from(length).unwrap_or(0).to_be_bytes();
            self.ready += HEADER + length;
        }
    }

    fn flush(&mut self) {
        while self.sent < self.ready {
            let bytes = self.to_send.get(self.sent..self.ready).unwrap_or_default();
            match self.host.descriptor_send(self.descriptor, bytes) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                // An event tells when there is room again.
                Err(Errno::EAGAIN) => return,
                // The monitor is gone; frames may get lost.
                Err(_) => break,
            }
        }
        (self.sent, self.ready) = (0, 0);
    }
}

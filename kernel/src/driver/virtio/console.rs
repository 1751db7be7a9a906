//! The virtio console (virtio 1.2, section 5.3) as a byte stream: its port 1, which is a plain serial port. Port 0 would be a
//! console, whose bytes QEMU throws away while nobody takes them.

use alloc::{string::String, vec::Vec};

use kiln_abi::host::{Event, MmioDevice};
use virtio_drivers::transport::{Transport, mmio::MmioTransport};

use super::{
    Features, Ring,
    memory::{self, Buffer},
    open,
};
use crate::{Errno, Result, link::ByteStream, sync::Mutex};

/// Rings: two of port 0, two for control messages, two of port 1.
const CONTROL: u16 = 3;
const RECEIVE: u16 = 4;
const TRANSMIT: u16 = 5;
/// The port.
const PORT: u32 = 1;
/// Control messages (`struct virtio_console_control`: port, event, value), sent at the start and never again.
const CONTROLS: usize = 4;
const DEVICE_READY: u64 = 0;
const PORT_READY: u64 = 3;
const PORT_OPEN: u64 = 6;
/// Buffers for sending.
const BUFFERS: usize = 8;
/// Bytes in each of them.
const BUFFER: usize = 8 << 10;
/// Most buffers for receiving: with enough for the largest usual reply QEMU fills them with no help from here.
const MOST_RECEIVED: usize = 64;
/// Bytes in each of them: as many as QEMU moves at a time.
const RECEIVED: usize = 4 << 10;

/// A console.
pub struct Console {
    line: u32,
    port: Mutex<Port>,
}

struct Port {
    transport: MmioTransport<'static>,
    receive: Ring<MOST_RECEIVED>,
    received: Vec<Buffer>,
    /// The buffer that is being emptied: its index, the bytes taken and the bytes in it.
    current: Option<(u16, usize, usize)>,
    transmit: Ring<BUFFERS>,
    to_send: Vec<Buffer>,
    /// Bytes in each buffer that the device has.
    lengths: [usize; BUFFERS],
    free: Vec<u16>,
}

impl Console {
    /// Starts a console.
    ///
    /// # Errors
    /// In words, when the device or the devices' memory is not as it should be.
    pub fn new(device: &MmioDevice) -> core::result::Result<Console, String> {
        let wanted = Features::VERSION_1 | Features::CONSOLE_MULTIPORT;
        let (mut transport, features) = open(device, wanted)?;
        if !features.contains(Features::CONSOLE_MULTIPORT) {
            return Err(String::from(
                "the virtio console has no port for the link to the monitor",
            ));
        }
        let mut control = Ring::<CONTROLS>::new(&mut transport, CONTROL)?;
        let receive = Ring::new(&mut transport, RECEIVE)?;
        let transmit = Ring::new(&mut transport, TRANSMIT)?;
        transport.finish_init();
        // Nothing that the device answers is of interest: it gets no buffers for that, and keeps it to itself.
        control.interrupts(false);
        for (index, (identifier, event)) in
            (0..).zip([(0, DEVICE_READY), (PORT, PORT_READY), (PORT, PORT_OPEN)])
        {
            let mut buffer = Buffer::new(8).ok_or("too little memory for the link's buffers")?;
            let message = u64::from(identifier) | event << 32 | 1 << 48;
            buffer.bytes_mut().copy_from_slice(&message.to_le_bytes());
            control.add_filled(index, &buffer, 8);
        }
        control.notify(&mut transport);
        let buffers = |count: usize, length: usize| {
            (0..count)
                .map(|_| Buffer::new(length))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| String::from("too little memory for the link's buffers"))
        };
        // A quarter of the memory, of which the network card needs the most.
        let received = (memory::left() / 4 / RECEIVED).clamp(BUFFERS, MOST_RECEIVED);
        let mut port = Port {
            transport,
            receive,
            received: buffers(received, RECEIVED)?,
            current: None,
            transmit,
            to_send: buffers(BUFFERS, BUFFER)?,
            lengths: [0; BUFFERS],
            free: (0..BUFFERS as u16).rev().collect(),
        };
        for (index, buffer) in (0..).zip(&mut port.received) {
            port.receive.add_empty(index, buffer);
        }
        port.receive.notify(&mut port.transport);
        port.transmit.interrupts(false);
        Ok(Console {
            line: device.interrupt,
            port: Mutex::new(port),
        })
    }
}

impl Port {
    /// Empties filled buffers into `bytes`.
    fn receive(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(room) = bytes.get_mut(done..).filter(|room| !room.is_empty()) {
            let Some((index, taken, length)) = self.current.or_else(|| self.next_filled()) else {
                break;
            };
            let Some(buffer) = self.received.get_mut(usize::from(index)) else {
                break;
            };
            let piece = buffer.bytes().get(taken..length).unwrap_or_default();
            let count = piece.len().min(room.len());
            for (to, from) in room.iter_mut().zip(piece) {
                *to = *from;
            }
            done += count;
            self.current = Some((index, taken + count, length));
            if taken + count >= length {
                self.current = None;
                self.receive.add_empty(index, buffer);
            }
        }
        self.receive.notify(&mut self.transport);
        done
    }

    fn next_filled(&mut self) -> Option<(u16, usize, usize)> {
        let (token, index) = self.receive.next_used()?;
        let buffer = self.received.get_mut(usize::from(index))?;
        let length = self.receive.take_filled(token, buffer)?;
        Some((index, 0, length))
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) {
        while let Some((token, index)) = self.transmit.next_used() {
            let place = usize::from(index);
            let (Some(buffer), Some(&length)) = (self.to_send.get(place), self.lengths.get(place))
            else {
                return;
            };
            self.transmit.take_read(token, buffer, length);
            self.free.push(index);
        }
    }

    /// Fills free buffers from `bytes`.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(index) = self.free.pop() else { break };
            let place = usize::from(index);
            let (Some(buffer), Some(slot)) =
                (self.to_send.get_mut(place), self.lengths.get_mut(place))
            else {
                break;
            };
            let count = rest.len().min(BUFFER);
            for (to, from) in buffer.bytes_mut().iter_mut().zip(rest) {
                *to = *from;
            }
            *slot = count;
            if !self.transmit.add_filled(index, buffer, count) {
                self.free.push(index);
                break;
            }
            done += count;
        }
        self.transmit.notify(&mut self.transport);
        done
    }
}

impl ByteStream for Console {
    fn source(&self) -> u32 {
        self.line
    }

    fn acknowledge(&self, _event: Event) {
        self.port.lock().transport.ack_interrupt();
    }

    fn receive(&self, bytes: &mut [u8], _descriptors: &mut [i32]) -> Result<(usize, usize)> {
        match self.port.lock().receive(bytes) {
            0 if !bytes.is_empty() => Err(Errno::EAGAIN),
            count => Ok((count, 0)),
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<usize> {
        let mut port = self.port.lock();
        port.reclaim();
        let mut done = port.send(bytes);
        if done < bytes.len() {
            // An interrupt tells of room, unless it came before the device saw the wish.
            port.transmit.interrupts(true);
            port.reclaim();
            done += port.send(bytes.get(done..).unwrap_or_default());
        } else {
            port.transmit.interrupts(false);
        }
        if done == 0 && !bytes.is_empty() {
            Err(Errno::EAGAIN)
        } else {
            Ok(done)
        }
    }

    fn taken(&self) -> bool {
        let mut port = self.port.lock();
        port.reclaim();
        if port.free.len() < BUFFERS {
            port.transmit.interrupts(true);
            port.reclaim();
        }
        port.free.len() == BUFFERS
    }

    fn short_means_drained(&self) -> bool {
        true
    }
}

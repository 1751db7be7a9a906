//! The virtio console (virtio 1.2, section 5.3) as a byte stream: its port 1, which is a plain serial port. Port 0 would be a
//! console, whose bytes QEMU throws away while nobody takes them.

use alloc::{string::String, vec::Vec};

use kiln_abi::host::{Event, MmioDevice};

use super::{
    Features,
    device::Device,
    memory,
    ring::{Direction, Ring},
};
use crate::{Errno, Result, link::ByteStream, sync::Mutex};

/// Rings: two of port 0, two for control messages, two of port 1.
const CONTROL: u16 = 3;
const RECEIVE: u16 = 4;
const TRANSMIT: u16 = 5;
/// The port.
const PORT: u32 = 1;
/// Control messages (`struct virtio_console_control`: port, event, value), sent at the start and never again.
const CONTROLS: u16 = 4;
const DEVICE_READY: u64 = 0;
const PORT_READY: u64 = 3;
const PORT_OPEN: u64 = 6;
/// Buffers for sending.
const BUFFERS: u16 = 8;
/// Bytes in each of them.
const BUFFER: usize = 8 << 10;
/// Most buffers for receiving: with enough for the largest usual reply QEMU fills them with no help from here.
const MOST_RECEIVED: u16 = 64;
/// Bytes in each of them: as many as QEMU moves at a time.
const RECEIVED: usize = 4 << 10;

/// A console.
pub struct Console {
    line: u32,
    port: Mutex<Port>,
}

struct Port {
    device: Device,
    receive: Ring,
    /// The buffer that is being emptied: its index, the bytes taken and the bytes in it.
    current: Option<(u16, usize, usize)>,
    transmit: Ring,
    /// Buffers that can be filled.
    free: Vec<u16>,
}

impl Console {
    /// Starts a console.
    ///
    /// # Errors
    /// In words, when the device or the devices' memory is not as it should be.
    pub fn new(place: &MmioDevice) -> core::result::Result<Console, String> {
        let wanted = Features::VERSION_1 | Features::CONSOLE_MULTIPORT;
        let (device, features) = Device::open(place, wanted)?;
        if !features.contains(Features::CONSOLE_MULTIPORT) {
            return Err(String::from(
                "the virtio console has no port for the link to the monitor",
            ));
        }
        let mut control = Ring::new(&device, CONTROL, CONTROLS, Direction::Transmit)?;
        let mut receive = Ring::new(&device, RECEIVE, MOST_RECEIVED, Direction::Receive)?;
        let mut transmit = Ring::new(&device, TRANSMIT, BUFFERS, Direction::Transmit)?;
        device.ready();
        // Nothing that the device answers is of interest: it gets no buffers for that, and keeps it to itself.
        control.interrupts(false);
        control.make_buffers(usize::from(CONTROLS), 8)?;
        for (index, (identifier, event)) in
            (0..).zip([(0, DEVICE_READY), (PORT, PORT_READY), (PORT, PORT_OPEN)])
        {
            let message = u64::from(identifier) | event << 32 | 1 << 48;
            if let Some(buffer) = control.buffer_mut(index) {
                buffer.copy_from_slice(&message.to_le_bytes());
            }
            control.give(index, 8);
        }
        control.notify(&device);
        // A quarter of the memory, of which the network card needs the most.
        let received = (memory::left() / 4 / RECEIVED).max(usize::from(BUFFERS));
        receive.make_buffers(received, RECEIVED)?;
        receive.give_all();
        receive.notify(&device);
        transmit.make_buffers(usize::from(BUFFERS), BUFFER)?;
        transmit.interrupts(false);
        Ok(Console {
            line: place.interrupt,
            port: Mutex::new(Port {
                device,
                receive,
                current: None,
                transmit,
                free: (0..BUFFERS).rev().collect(),
            }),
        })
    }
}

impl Port {
    /// Empties filled buffers into `bytes`.
    fn receive(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(room) = bytes.get_mut(done..).filter(|room| !room.is_empty()) {
            let next = || {
                self.receive
                    .take()
                    .map(|(index, length)| (index, 0, length))
            };
            let Some((index, taken, length)) = self.current.or_else(next) else {
                break;
            };
            let buffer = self.receive.buffer(index).unwrap_or_default();
            let piece = buffer.get(taken..length).unwrap_or_default();
            let count = piece.len().min(room.len());
            for (to, from) in room.iter_mut().zip(piece) {
                *to = *from;
            }
            done += count;
            self.current = Some((index, taken + count, length));
            if taken + count >= length {
                self.current = None;
                self.receive.give(index, RECEIVED);
            }
        }
        self.receive.notify(&self.device);
        done
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) {
        while let Some((index, _)) = self.transmit.take() {
            self.free.push(index);
        }
    }

    /// Fills free buffers from `bytes`.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for rest in bytes.chunks(BUFFER) {
            let Some(index) = self.free.pop() else { break };
            let buffer = self.transmit.buffer_mut(index).unwrap_or_default();
            for (to, from) in buffer.iter_mut().zip(rest) {
                *to = *from;
            }
            self.transmit.give(index, rest.len());
            done += rest.len();
        }
        self.transmit.notify(&self.device);
        done
    }
}

impl ByteStream for Console {
    fn source(&self) -> u32 {
        self.line
    }

    fn acknowledge(&self, _event: Event) {
        self.port.lock().device.acknowledge();
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
        if port.free.len() < usize::from(BUFFERS) {
            port.transmit.interrupts(true);
            port.reclaim();
        }
        port.free.len() == usize::from(BUFFERS)
    }

    fn short_means_drained(&self) -> bool {
        true
    }
}

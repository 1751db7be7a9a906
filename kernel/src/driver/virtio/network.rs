//! The virtio network card (virtio 1.2, section 5.1): one ring each way, no offloads.
//!
//! Sending asks for no interrupts while there is room. Receiving asks for none from the first interrupt until all frames are taken.

use alloc::{boxed::Box, string::String, vec::Vec};

use kiln_abi::host::{Event, MmioDevice};

use super::{
    Features,
    device::Device,
    memory,
    ring::{Direction, Ring},
};
use crate::net::FrameDevice;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Buffers in each ring: the most, and the fewest that are any good.
const BUFFERS: u16 = 64;
const FEWEST_BUFFERS: usize = 8;
/// Bytes before each frame (`struct virtio_net_hdr`): what the offloads would need. The legacy interface has two fewer.
const HEADER: usize = 12;
const LEGACY_HEADER: usize = 10;
/// Bytes before the packet in a frame.
const ETHERNET: usize = 14;
/// Largest packet in bytes where the device does not say.
const DEFAULT_MTU: usize = 1500;
/// Largest packet that buffers are made for.
const MAX_MTU: usize = 9000;
/// Where the configuration has the address and the packet size.
const CONFIGURATION_MAC: usize = 0;
const CONFIGURATION_MTU: usize = 10;

/// A network card.
pub struct Card {
    device: Device,
    line: u32,
    mac: [u8; 6],
    mtu: usize,
    header: usize,
    receive: Ring,
    /// The buffer whose frame was returned last; goes back to the device with the next call.
    returned: Option<u16>,
    receive_interrupts: bool,
    transmit: Ring,
    /// Buffers that can be filled.
    free: Vec<u16>,
    /// The buffer that `reserve` gave out, and the bytes in it.
    reserved: Option<(u16, usize)>,
    transmit_interrupts: bool,
}

impl Card {
    /// Starts a card.
    ///
    /// # Errors
    /// In words, when the device or the devices' memory is not as it should be.
    pub fn new(place: &MmioDevice) -> Result<Box<Card>, String> {
        let wanted = Features::NETWORK_MAC | Features::NETWORK_MTU | Features::VERSION_1;
        let (device, features) = Device::open(place, wanted)?;
        if !features.contains(Features::NETWORK_MAC) {
            return Err("the network card has no Ethernet address".into());
        }
        let unreadable = "the network card's configuration cannot be read";
        let mut mac = [0; 6];
        for (offset, byte) in mac.iter_mut().enumerate() {
            *byte = device
                .configuration_byte(CONFIGURATION_MAC + offset)
                .ok_or(unreadable)?;
        }
        let mtu = if features.contains(Features::NETWORK_MTU) {
            let mtu = device.configuration_half(CONFIGURATION_MTU);
            usize::from(mtu.ok_or(unreadable)?).clamp(68, MAX_MTU)
        } else {
            DEFAULT_MTU
        };
        let mut receive = Ring::new(&device, RECEIVE, BUFFERS, Direction::Receive)?;
        let mut transmit = Ring::new(&device, TRANSMIT, BUFFERS, Direction::Transmit)?;
        device.ready();
        let length = (HEADER + ETHERNET + mtu).next_multiple_of(64);
        // Half of what is left for each way, in a small machine.
        let count = memory::left() / 2 / length;
        if count < FEWEST_BUFFERS {
            return Err("too little memory for the network card's buffers".into());
        }
        receive.make_buffers(count, length)?;
        receive.give_all();
        receive.notify(&device);
        transmit.make_buffers(count, length)?;
        transmit.interrupts(false);
        let header = if features.contains(Features::VERSION_1) {
            HEADER
        } else {
            LEGACY_HEADER
        };
        Ok(Box::new(Card {
            device,
            line: place.interrupt,
            mac,
            mtu,
            header,
            receive,
            returned: None,
            receive_interrupts: true,
            free: (0..transmit.count()).rev().collect(),
            transmit,
            reserved: None,
            transmit_interrupts: false,
        }))
    }

    /// Switches interrupts for room in the transmit ring.
    fn want_room(&mut self, on: bool) {
        if self.transmit_interrupts != on {
            self.transmit_interrupts = on;
            self.transmit.interrupts(on);
        }
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) {
        while let Some((index, _)) = self.transmit.take() {
            self.free.push(index);
        }
    }

    /// Whether there is a free buffer; if not, an interrupt tells when there is one.
    fn make_room(&mut self) -> bool {
        if !self.free.is_empty() {
            return true;
        }
        self.reclaim();
        if self.free.is_empty() {
            // What waits for the doorbell would never come back.
            self.transmit.notify(&self.device);
            self.want_room(true);
            self.reclaim();
        }
        if !self.free.is_empty() {
            self.want_room(false);
        }
        !self.free.is_empty()
    }
}

impl FrameDevice for Card {
    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn source(&self) -> u32 {
        self.line
    }

    fn acknowledge(&mut self, _event: Event) {
        self.device.acknowledge();
        if self.receive_interrupts {
            self.receive_interrupts = false;
            self.receive.interrupts(false);
        }
    }

    fn receive(&mut self) -> Option<&[u8]> {
        if let Some(index) = self.returned.take() {
            self.receive.give(index, usize::MAX);
        }
        let mut next = self.receive.take();
        if next.is_none() {
            self.receive.notify(&self.device);
            if !self.receive_interrupts {
                self.receive_interrupts = true;
                self.receive.interrupts(true);
                // One may have come before the device saw the wish.
                next = self.receive.take();
            }
        }
        let (index, length) = next?;
        self.returned = Some(index);
        self.receive.buffer(index)?.get(self.header..length)
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.transmit.has_used()
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        if length > ETHERNET + self.mtu || !self.make_room() {
            return None;
        }
        let index = match self.reserved.take() {
            Some((index, _)) => index,
            None => self.free.pop()?,
        };
        self.reserved = Some((index, self.header + length));
        let buffer = self.transmit.buffer_mut(index)?;
        let (header, frame) = buffer.split_at_mut_checked(self.header)?;
        header.fill(0);
        frame.get_mut(..length)
    }

    fn commit(&mut self) {
        if let Some((index, length)) = self.reserved.take() {
            self.transmit.give(index, length);
        }
    }

    fn flush(&mut self) {
        self.transmit.notify(&self.device);
    }
}

//! The virtio network card (virtio 1.2, section 5.1): one ring each way, no offloads.
//!
//! Sending asks for no interrupts while there is room. Receiving asks for none from the first interrupt until all frames are taken.

use alloc::{boxed::Box, string::String, vec::Vec};

use kiln_abi::host::{Event, MmioDevice};
use virtio_drivers::transport::{Transport, mmio::MmioTransport};

use super::{
    Features, Ring,
    memory::{self, Buffer},
    open,
};
use crate::net::FrameDevice;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Buffers in each ring: the most, and the fewest that are any good.
const BUFFERS: usize = 64;
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
    transport: MmioTransport<'static>,
    line: u32,
    mac: [u8; 6],
    mtu: usize,
    header: usize,
    receive: Ring<BUFFERS>,
    received: Vec<Buffer>,
    /// The buffer whose frame was returned last; goes back to the device with the next call.
    returned: Option<u16>,
    receive_interrupts: bool,
    transmit: Ring<BUFFERS>,
    to_send: Vec<Buffer>,
    /// Bytes in each buffer that the device has.
    lengths: [usize; BUFFERS],
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
    pub fn new(device: &MmioDevice) -> Result<Box<Card>, String> {
        let wanted = Features::NETWORK_MAC | Features::NETWORK_MTU | Features::VERSION_1;
        let (mut transport, features) = open(device, wanted)?;
        if !features.contains(Features::NETWORK_MAC) {
            return Err("the network card has no Ethernet address".into());
        }
        let unreadable = |_| String::from("the network card's configuration cannot be read");
        let mac = transport
            .read_config_space(CONFIGURATION_MAC)
            .map_err(unreadable)?;
        let mtu = if features.contains(Features::NETWORK_MTU) {
            let mtu: u16 = transport
                .read_config_space(CONFIGURATION_MTU)
                .map_err(unreadable)?;
            usize::from(mtu).clamp(68, MAX_MTU)
        } else {
            DEFAULT_MTU
        };
        let receive = Ring::new(&mut transport, RECEIVE)?;
        let transmit = Ring::new(&mut transport, TRANSMIT)?;
        transport.finish_init();
        let length = (HEADER + ETHERNET + mtu).next_multiple_of(64);
        // Half of what is left for each way, in a small machine.
        let count = BUFFERS.min(memory::left() / 2 / length);
        if count < FEWEST_BUFFERS {
            return Err("too little memory for the network card's buffers".into());
        }
        let buffers = || {
            (0..count)
                .map(|_| Buffer::new(length))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| String::from("too little memory for the network card's buffers"))
        };
        let header = if features.contains(Features::VERSION_1) {
            HEADER
        } else {
            LEGACY_HEADER
        };
        let mut card = Box::new(Card {
            transport,
            line: device.interrupt,
            mac,
            mtu,
            header,
            receive,
            received: buffers()?,
            returned: None,
            receive_interrupts: true,
            transmit,
            to_send: buffers()?,
            lengths: [0; BUFFERS],
            free: (0..count as u16).rev().collect(),
            reserved: None,
            transmit_interrupts: true,
        });
        card.start();
        Ok(card)
    }

    fn start(&mut self) {
        for (index, buffer) in (0..).zip(&mut self.received) {
            self.receive.add_empty(index, buffer);
        }
        self.receive.notify(&mut self.transport);
        self.want_room(false);
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

    /// Whether there is a free buffer; if not, an interrupt tells when there is one.
    fn make_room(&mut self) -> bool {
        if !self.free.is_empty() {
            return true;
        }
        self.reclaim();
        if self.free.is_empty() {
            // What waits for the doorbell would never come back.
            self.transmit.notify(&mut self.transport);
            self.want_room(true);
            self.reclaim();
        }
        if !self.free.is_empty() {
            self.want_room(false);
        }
        !self.free.is_empty()
    }

    /// The next filled buffer.
    fn next_received(&mut self) -> Option<(u16, usize)> {
        let (token, index) = self.receive.next_used()?;
        let buffer = self.received.get_mut(usize::from(index))?;
        let length = self.receive.take_filled(token, buffer)?;
        Some((index, length))
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
        self.transport.ack_interrupt();
        if self.receive_interrupts {
            self.receive_interrupts = false;
            self.receive.interrupts(false);
        }
    }

    fn receive(&mut self) -> Option<&[u8]> {
        if let Some(index) = self.returned.take()
            && let Some(buffer) = self.received.get_mut(usize::from(index))
        {
            self.receive.add_empty(index, buffer);
        }
        let mut next = self.next_received();
        if next.is_none() {
            self.receive.notify(&mut self.transport);
            if !self.receive_interrupts {
                self.receive_interrupts = true;
                self.receive.interrupts(true);
                // One may have come before the device saw the wish.
                next = self.next_received();
            }
        }
        let (index, length) = next?;
        self.returned = Some(index);
        self.received
            .get(usize::from(index))?
            .bytes()
            .get(self.header..length)
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.transmit.next_used().is_some()
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
        let buffer = self.to_send.get_mut(usize::from(index))?.bytes_mut();
        let (header, frame) = buffer.split_at_mut_checked(self.header)?;
        header.fill(0);
        frame.get_mut(..length)
    }

    fn commit(&mut self) {
        let Some((index, length)) = self.reserved.take() else {
            return;
        };
        let place = usize::from(index);
        let (Some(buffer), Some(slot)) = (self.to_send.get(place), self.lengths.get_mut(place))
        else {
            return;
        };
        *slot = length;
        if !self.transmit.add_filled(index, buffer, length) {
            self.free.push(index);
        }
    }

    fn flush(&mut self) {
        self.transmit.notify(&mut self.transport);
    }
}

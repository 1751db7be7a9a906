//! Virtio devices of a virtual machine (virtio 1.2; also the older "legacy" interface, which QEMU's `virtio-mmio` speaks by
//! default), over memory-mapped registers. The rings are those of the crate `virtio-drivers`.
//!
//! All memory that a device reads or writes comes from the part of memory that the shim set aside for it
//! ([`BootInformation::dma`](kiln_abi::host::BootInformation::dma)): frames and link data are copied in and out of buffers there.
//!
//! Interrupt lines are edge-triggered: a driver writes the acknowledgement *before* it looks at the rings, so nothing is missed.

#![allow(unsafe_code)]

pub mod console;
pub mod memory;
pub mod network;

use alloc::{format, string::String};
use core::{
    ptr::NonNull,
    sync::atomic::{Ordering, fence},
};

use bitflags::bitflags;
use kiln_abi::host::MmioDevice;
use virtio_drivers::{
    queue::VirtQueue,
    transport::{
        Transport,
        mmio::{MmioTransport, VirtIOHeader},
    },
};

use memory::{Buffer, DeviceMemory};

/// Kinds of devices.
pub mod kind {
    /// A network card.
    pub const NETWORK: u32 = 1;
    /// A console.
    pub const CONSOLE: u32 = 3;
}

bitflags! {
    /// Features that are asked for. Those of the rings (event indexes, indirect descriptors) would save nothing here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Console: it has several ports.
        const CONSOLE_MULTIPORT = 1 << 1;
        /// Network: the device says how large a packet may be.
        const NETWORK_MTU = 1 << 3;
        /// Network: the device has an Ethernet address.
        const NETWORK_MAC = 1 << 5;
        /// Not the legacy interface.
        const VERSION_1 = 1 << 32;
    }
}

/// Starts a device: the answer is its registers and the features that both sides know.
///
/// # Errors
/// In words, when the registers are not those of a virtio device.
pub fn open(
    device: &MmioDevice,
    wanted: Features,
) -> Result<(MmioTransport<'static>, Features), String> {
    let header = NonNull::new(device.registers as *mut VirtIOHeader)
        .ok_or_else(|| String::from("the shim gives a device without registers"))?;
    // SAFETY: the shim mapped the registers for good, and each device is opened once.
    let mut transport = unsafe { MmioTransport::new(header, device.length) }
        .map_err(|error| format!("a virtio device cannot be used: {error}"))?;
    let features = transport.begin_init(wanted);
    Ok((transport, features))
}

/// A ring of `SIZE` buffers in the devices' memory, each in the ring once.
pub struct Ring<const SIZE: usize> {
    queue: VirtQueue<DeviceMemory, SIZE>,
    number: u16,
    /// For each of the ring's tokens, which buffer it stands for.
    buffers: [u16; SIZE],
    /// Buffers were added since the device was last told.
    added: bool,
}

impl<const SIZE: usize> Ring<SIZE> {
    /// Ring `number` of a device that is being started.
    ///
    /// # Errors
    /// In words, when the device has no such ring or its memory is used up.
    pub fn new(transport: &mut MmioTransport<'static>, number: u16) -> Result<Ring<SIZE>, String> {
        let queue = VirtQueue::new(transport, number, false, false)
            .map_err(|error| format!("ring {number} of a virtio device cannot be used: {error}"))?;
        Ok(Ring {
            queue,
            number,
            buffers: [0; SIZE],
            added: false,
        })
    }

    /// Gives a buffer to the device, for it to fill. False when the ring is full.
    pub fn add_empty(&mut self, index: u16, buffer: &mut Buffer) -> bool {
        // SAFETY: the buffer's owner keeps it until `take` returns its index, and does not look at it before.
        let token = unsafe { self.queue.add(&[], &mut [buffer.bytes_mut()]) };
        self.note(token.ok(), index)
    }

    /// Gives the first `length` bytes of a buffer to the device, for it to read. False when the ring is full.
    pub fn add_filled(&mut self, index: u16, buffer: &Buffer, length: usize) -> bool {
        let bytes = buffer.bytes().get(..length).unwrap_or_default();
        // SAFETY: as above; the owner does not write to it before.
        let token = unsafe { self.queue.add(&[bytes], &mut []) };
        self.note(token.ok(), index)
    }

    fn note(&mut self, token: Option<u16>, index: u16) -> bool {
        let Some(slot) = token.and_then(|token| self.buffers.get_mut(usize::from(token))) else {
            return false;
        };
        *slot = index;
        self.added = true;
        true
    }

    /// The buffer that the device will give back next.
    pub fn next_used(&self) -> Option<(u16, u16)> {
        let token = self.queue.peek_used()?;
        Some((token, *self.buffers.get(usize::from(token))?))
    }

    /// Takes back a buffer that the device has filled. Returns how many bytes it wrote.
    pub fn take_filled(&mut self, token: u16, buffer: &mut Buffer) -> Option<usize> {
        let room = buffer.bytes().len();
        // SAFETY: the same buffer as in `add_empty`, by `buffers`.
        let length = unsafe { self.queue.pop_used(token, &[], &mut [buffer.bytes_mut()]) }.ok()?;
        // What the device says is not trusted.
        Some((length as usize).min(room))
    }

    /// Takes back a buffer that the device has read; `length` as when it was added.
    pub fn take_read(&mut self, token: u16, buffer: &Buffer, length: usize) {
        let bytes = buffer.bytes().get(..length).unwrap_or_default();
        // SAFETY: the same bytes as in `add_filled`, by `buffers`.
        let _ = unsafe { self.queue.pop_used(token, &[bytes], &mut []) };
    }

    /// Tells the device of the buffers added, if it wants to know.
    pub fn notify(&mut self, transport: &mut MmioTransport<'static>) {
        if core::mem::take(&mut self.added) {
            // The device must see the buffers before its wish is read: it may be about to wait.
            fence(Ordering::SeqCst);
            if self.queue.should_notify() {
                transport.notify(self.number);
            }
        }
    }

    /// Asks for interrupts when buffers come back, or for none. After asking, look for buffers once more.
    pub fn interrupts(&mut self, on: bool) {
        self.queue.set_dev_notify(on);
        fence(Ordering::SeqCst);
    }
}

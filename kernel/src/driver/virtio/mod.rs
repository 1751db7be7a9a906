//! Virtio devices of a virtual machine (virtio 1.2; also the older "legacy" interface, which QEMU's `virtio-mmio` speaks by
//! default), over memory-mapped registers.
//!
//! All memory that a device reads or writes comes from the part of memory that the shim set aside for it
//! ([`BootInformation::dma`](kiln_abi::host::BootInformation::dma)): frames and link data are copied in and out of buffers there.
//!
//! Interrupt lines are edge-triggered: a driver writes the acknowledgement *before* it looks at the rings, so nothing is missed.

#![allow(unsafe_code)]

pub mod console;
mod device;
pub mod memory;
pub mod network;
mod ring;

use bitflags::bitflags;

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

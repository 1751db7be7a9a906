//! A virtio device's registers in memory (virtio 1.2, sections 4.2.2 and, for the older interface, 4.2.4), and how a device is started
//! (section 3.1).

use alloc::{format, string::String};
use core::ptr;

use kiln_abi::host::{MmioDevice, PAGE_SIZE};

use super::Features;

const MAGIC: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_WORD: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_WORD: usize = 0x024;
const PAGE_LENGTH: usize = 0x028;
const RING: usize = 0x030;
const RING_MOST: usize = 0x034;
const RING_SIZE: usize = 0x038;
const RING_ALIGNMENT: usize = 0x03c;
const RING_PAGE: usize = 0x040;
const RING_READY: usize = 0x044;
const NOTIFY: usize = 0x050;
const INTERRUPT: usize = 0x060;
const INTERRUPT_ACKNOWLEDGE: usize = 0x064;
const STATUS: usize = 0x070;
/// Addresses of descriptors, ring to the device, ring from the device: each in two words.
const RING_ADDRESSES: [usize; 3] = [0x080, 0x090, 0x0a0];
/// What depends on the kind of device.
const CONFIGURATION: usize = 0x100;

/// "virt", little endian.
const MAGIC_NUMBER: u32 = 0x7472_6976;
/// Versions of the interface.
const LEGACY: u32 = 1;
const MODERN: u32 = 2;

/// Steps of the start, in the status.
const ACKNOWLEDGED: u32 = 1;
const DRIVER: u32 = 2;
const READY: u32 = 4;
const FEATURES_AGREED: u32 = 8;

/// A device.
pub struct Device {
    registers: usize,
    length: usize,
    legacy: bool,
}

impl Device {
    /// Starts a device: the answer also has the features that both sides know. After its rings are made, [`Device::ready`] ends the start.
    ///
    /// # Errors
    /// In words, when the registers are not those of a virtio device, or the device does not agree.
    pub fn open(place: &MmioDevice, wanted: Features) -> Result<(Device, Features), String> {
        if place.registers == 0 || place.length < CONFIGURATION {
            return Err("the shim gives a device without registers".into());
        }
        let mut device = Device {
            registers: place.registers,
            length: place.length,
            legacy: false,
        };
        let (magic, version) = (device.read(MAGIC), device.read(VERSION));
        if magic != MAGIC_NUMBER || !matches!(version, LEGACY | MODERN) {
            return Err(format!(
                "a virtio device cannot be used: it has the magic number {magic:#x} and version {version}"
            ));
        }
        device.legacy = version == LEGACY;
        // The first write resets the device.
        for status in [0, ACKNOWLEDGED, ACKNOWLEDGED | DRIVER] {
            device.write(STATUS, status);
        }
        let mut features = 0;
        for word in 0..2 {
            device.write(DEVICE_FEATURES_WORD, word);
            let known = device.read(DEVICE_FEATURES) & (wanted.bits() >> (32 * word)) as u32;
            device.write(DRIVER_FEATURES_WORD, word);
            device.write(DRIVER_FEATURES, known);
            features |= u64::from(known) << (32 * word);
        }
        if device.legacy {
            device.write(PAGE_LENGTH, PAGE_SIZE as u32);
        } else {
            let status = ACKNOWLEDGED | DRIVER | FEATURES_AGREED;
            device.write(STATUS, status);
            if device.read(STATUS) & FEATURES_AGREED == 0 {
                return Err("a virtio device does not agree to the features it offers".into());
            }
        }
        Ok((device, Features::from_bits_truncate(features)))
    }

    /// Ends the start: from now on the device works.
    pub fn ready(&self) {
        self.write(STATUS, self.read(STATUS) | READY);
    }

    /// Says where a ring is: its descriptors at a physical address, page-aligned, the two rings at distances from there.
    ///
    /// # Errors
    /// In words, when the device has no ring of that number and size.
    pub fn set_ring(
        &self,
        number: u16,
        size: u16,
        physical: u64,
        available: usize,
        used: usize,
    ) -> Result<(), String> {
        self.write(RING, u32::from(number));
        let most = self.read(RING_MOST);
        if most < u32::from(size) {
            return Err(format!(
                "ring {number} of a virtio device cannot be used: it has {most} places, and {size} are needed"
            ));
        }
        self.write(RING_SIZE, u32::from(size));
        if self.legacy {
            let page = u32::try_from(physical / PAGE_SIZE as u64)
                .map_err(|_| "the devices' memory is out of a virtio device's reach")?;
            self.write(RING_ALIGNMENT, PAGE_SIZE as u32);
            self.write(RING_PAGE, page);
        } else {
            for (register, distance) in RING_ADDRESSES.into_iter().zip([0, available, used]) {
                let address = physical + distance as u64;
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(RING_READY, 1);
        }
        Ok(())
    }

    /// Tells the device that there is something in a ring.
    pub fn notify(&self, ring: u16) {
        self.write(NOTIFY, u32::from(ring));
    }

    /// Takes note of what the device's interrupt line says: the line falls.
    pub fn acknowledge(&self) {
        let causes = self.read(INTERRUPT);
        if causes != 0 {
            self.write(INTERRUPT_ACKNOWLEDGE, causes);
        }
    }

    /// A byte of what depends on the kind of device.
    pub fn configuration_byte(&self, offset: usize) -> Option<u8> {
        self.configuration(offset)
    }

    /// Two bytes of what depends on the kind of device; `offset` is even.
    pub fn configuration_half(&self, offset: usize) -> Option<u16> {
        self.configuration(offset)
    }

    fn configuration<T: Copy>(&self, offset: usize) -> Option<T> {
        let start = CONFIGURATION + offset;
        // SAFETY: within the device's registers, which the shim mapped for good; any bytes make an integer.
        (start + size_of::<T>() <= self.length).then(|| unsafe {
            ptr::with_exposed_provenance::<T>(self.registers + start).read_volatile()
        })
    }

    fn read(&self, register: usize) -> u32 {
        // SAFETY: one of the registers above, which the shim mapped for good.
        unsafe { ptr::with_exposed_provenance::<u32>(self.registers + register).read_volatile() }
    }

    fn write(&self, register: usize, value: u32) {
        // SAFETY: as in `read`. What the device then does to memory, it does to that of its rings.
        unsafe {
            ptr::with_exposed_provenance_mut::<u32>(self.registers + register)
                .write_volatile(value);
        }
    }
}

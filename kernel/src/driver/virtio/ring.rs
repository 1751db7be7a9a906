//! A ring of buffers that driver and device pass to each other (virtio 1.2, section 2.7, "split virtqueue").
//!
//! Each buffer has its own descriptor for good, of the same number, and is in one piece: so there is nothing to chain and nothing to
//! look up. A buffer that the device has cannot be reached here.

use alloc::{format, string::String};
use core::{
    ptr,
    sync::atomic::{Ordering, fence},
};

use kiln_abi::host::PAGE_SIZE;

use super::{device::Device, memory};

/// Most buffers in a ring: the bits of a word.
const MOST: u16 = 64;
/// Bytes of a descriptor: address, length, flags, next; and of an entry of the used ring: buffer, length.
const DESCRIPTOR: usize = 16;
const USED: usize = 8;
/// Flag of a descriptor: the device writes to the buffer.
const WRITE: u16 = 2;
/// The first words of both rings are flags and the place after the newest entry; then come the entries. Flag: no interrupt,
/// or no notification.
const QUIET: u16 = 1;
const PLACE: usize = 2;
const ENTRIES: usize = 4;

/// Who fills the buffers of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device.
    Receive,
    /// The driver.
    Transmit,
}

/// A ring and its buffers.
pub struct Ring {
    number: u16,
    size: u16,
    direction: Direction,
    /// Where the descriptors, the ring to the device and the ring from the device are.
    descriptors: usize,
    available: usize,
    used: usize,
    /// Where the buffers are, how many, and how long each is.
    buffers: usize,
    count: u16,
    length: usize,
    /// One bit for each buffer that the device has.
    lent: u64,
    /// Place after the newest entry to the device, and after the last entry from the device that was looked at.
    given: u16,
    taken: u16,
    /// Buffers were given since the device was last told.
    added: bool,
}

impl Ring {
    /// Ring `number` of a device that is being started, with room for `size` buffers, a power of two up to 64.
    ///
    /// # Errors
    /// In words, when the device has no such ring or its memory is used up.
    pub fn new(
        device: &Device,
        number: u16,
        size: u16,
        direction: Direction,
    ) -> Result<Ring, String> {
        let size = size.min(MOST);
        let entries = usize::from(size);
        let available = DESCRIPTOR * entries;
        let used = (available + ENTRIES + 2 * entries + 2).next_multiple_of(PAGE_SIZE);
        let length = used + ENTRIES + USED * entries + 2;
        let (start, physical) = memory::take(length, PAGE_SIZE)
            .ok_or_else(|| format!("too little memory for ring {number} of a virtio device"))?;
        // SAFETY: handed out for this ring alone, and mapped for good.
        unsafe { ptr::with_exposed_provenance_mut::<u8>(start).write_bytes(0, length) };
        device.set_ring(number, size, physical, available, used)?;
        Ok(Ring {
            number,
            size,
            direction,
            descriptors: start,
            available: start + available,
            used: start + used,
            buffers: 0,
            count: 0,
            length: 0,
            lent: 0,
            given: 0,
            taken: 0,
            added: false,
        })
    }

    /// Makes the ring's buffers: as many as fit in it at most, `length` bytes each. To be called once.
    ///
    /// # Errors
    /// In words, when the memory is used up.
    pub fn make_buffers(&mut self, count: usize, length: usize) -> Result<(), String> {
        let count = count.min(usize::from(self.size));
        let (start, physical) = memory::take(count * length, 64)
            .ok_or("too little memory for the buffers of a virtio device")?;
        let flags = match self.direction {
            Direction::Receive => WRITE,
            Direction::Transmit => 0,
        };
        for index in 0..count {
            let descriptor = self.descriptors + DESCRIPTOR * index;
            store(descriptor, physical + (index * length) as u64);
            store(descriptor + 8, length as u32);
            store(descriptor + 12, flags);
        }
        (self.buffers, self.count, self.length) = (start, count as u16, length);
        Ok(())
    }

    /// How many buffers there are.
    pub fn count(&self) -> u16 {
        self.count
    }

    fn has(&self, index: u16) -> bool {
        index < self.count && self.lent & 1 << index == 0
    }

    /// A buffer that the device does not have.
    pub fn buffer(&self, index: u16) -> Option<&[u8]> {
        let start = self.buffers + usize::from(index) * self.length;
        // SAFETY: one of the buffers, which were handed out for this ring alone and are mapped for good. The device does not have it.
        self.has(index).then(|| unsafe {
            core::slice::from_raw_parts(ptr::with_exposed_provenance(start), self.length)
        })
    }

    /// A buffer that the device does not have, to be filled.
    pub fn buffer_mut(&mut self, index: u16) -> Option<&mut [u8]> {
        let start = self.buffers + usize::from(index) * self.length;
        self.has(index).then(|| {
            let pointer = ptr::with_exposed_provenance_mut(start);
            // SAFETY: as in `buffer`.
            unsafe { core::slice::from_raw_parts_mut(pointer, self.length) }
        })
    }

    /// Gives the first `length` bytes of a buffer to the device.
    pub fn give(&mut self, index: u16, length: usize) {
        if !self.has(index) {
            return;
        }
        let descriptor = self.descriptors + DESCRIPTOR * usize::from(index);
        store(descriptor + 8, length.min(self.length) as u32);
        let place = usize::from(self.given % self.size);
        store(self.available + ENTRIES + 2 * place, index);
        self.lent |= 1 << index;
        self.given = self.given.wrapping_add(1);
        // The device must see the entry before it sees that there is one.
        fence(Ordering::Release);
        store(self.available + PLACE, self.given);
        self.added = true;
    }

    /// Gives all buffers to the device, to be filled.
    pub fn give_all(&mut self) {
        for index in 0..self.count {
            self.give(index, self.length);
        }
    }

    /// Whether the device gave a buffer back.
    pub fn has_used(&self) -> bool {
        load::<u16>(self.used + PLACE) != self.taken
    }

    /// Takes back a buffer that the device is done with. Returns which, and how many bytes the device says it wrote, at most its length.
    pub fn take(&mut self) -> Option<(u16, usize)> {
        while self.has_used() {
            fence(Ordering::Acquire);
            let entry = self.used + ENTRIES + USED * usize::from(self.taken % self.size);
            self.taken = self.taken.wrapping_add(1);
            let (index, length) = (load::<u32>(entry), load::<u32>(entry + 4));
            // What the device says is not trusted: it can only give back what it has.
            let bit = 1u64.checked_shl(index).unwrap_or(0);
            if self.lent & bit != 0 {
                self.lent &= !bit;
                return Some((index as u16, (length as usize).min(self.length)));
            }
        }
        None
    }

    /// Tells the device of the buffers given, if it wants to know.
    pub fn notify(&mut self, device: &Device) {
        if core::mem::take(&mut self.added) {
            // The device must see the buffers before its wish is read: it may be about to wait.
            fence(Ordering::SeqCst);
            if load::<u16>(self.used) & QUIET == 0 {
                device.notify(self.number);
            }
        }
    }

    /// Asks for interrupts when buffers come back, or for none. After asking, look for buffers once more.
    pub fn interrupts(&mut self, on: bool) {
        store(self.available, if on { 0 } else { QUIET });
        fence(Ordering::SeqCst);
    }
}

/// Reads a word of a ring's memory.
fn load<T: Copy>(address: usize) -> T {
    // SAFETY: called above with aligned addresses within the memory that was handed out for the ring, for integers only.
    unsafe { ptr::with_exposed_provenance::<T>(address).read_volatile() }
}

/// Writes a word of a ring's memory.
fn store<T>(address: usize, value: T) {
    // SAFETY: as in `load`; nothing in Rust refers to the rings' memory.
    unsafe { ptr::with_exposed_provenance_mut::<T>(address).write_volatile(value) }
}

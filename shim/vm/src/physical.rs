//! Physical memory as the shim sees it: a window in which byte `p` of physical memory lies at `offset + p`.
//!
//! The window is the only way by which the shim reads and writes memory that is not its own image.

#![allow(unsafe_code)]

use core::ptr;

/// Bytes in a frame: a page of physical memory.
pub const FRAME: u64 = 4096;

/// The window on physical memory.
#[derive(Clone, Copy, Debug)]
pub struct Physical {
    offset: usize,
    end: u64,
}

impl Physical {
    /// A window at virtual address `offset` on the physical addresses from 0 to `end`.
    ///
    /// # Safety
    ///
    /// Every byte of the window must be mapped for reading for as long as any copy of the value is used, and every byte that
    /// is written through it for writing. What is written must belong to nobody else.
    #[must_use]
    pub const unsafe fn new(offset: usize, end: u64) -> Self {
        Self { offset, end }
    }

    /// End of the window.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Whether `length` bytes from `address` lie in the window.
    #[must_use]
    pub fn contains(&self, address: u64, length: u64) -> bool {
        // No memory ends where addresses do.
        address.saturating_add(length) <= self.end
    }

    fn pointer(&self, address: u64, length: u64) -> *mut u8 {
        assert!(
            self.contains(address, length),
            "physical address outside of memory"
        );
        ptr::with_exposed_provenance_mut(self.offset + address as usize)
    }

    /// Bytes of memory that nobody changes (the image, what the boot loader left), or `None` if they lie outside.
    #[must_use]
    pub fn bytes(&self, address: u64, length: u64) -> Option<&'static [u8]> {
        if !self.contains(address, length) {
            return None;
        }
        // SAFETY: the range is in the window, which is mapped for as long as it is used; the image and the boot loader's
        // data are excluded from the frames that the shim hands out, so they do not change.
        Some(unsafe { core::slice::from_raw_parts(self.pointer(address, length), length as usize) })
    }

    /// The `N` bytes at `address`, or `None` if they lie outside.
    #[must_use]
    pub fn array<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        self.bytes(address, N as u64)?.first_chunk().copied()
    }

    /// Entry `index` of the table of 8-byte words at `table`.
    #[must_use]
    pub fn word(&self, table: u64, index: usize) -> u64 {
        let pointer = self.pointer(table + 8 * index as u64, 8).cast::<u64>();
        // SAFETY: in the window by the check in `pointer`; tables are aligned.
        unsafe { pointer.read_volatile() }
    }

    /// Replaces entry `index` of the table of 8-byte words at `table`.
    pub fn set_word(&self, table: u64, index: usize, value: u64) {
        let pointer = self.pointer(table + 8 * index as u64, 8).cast::<u64>();
        // SAFETY: in the window by the check in `pointer`; tables are aligned and the caller's own.
        unsafe { pointer.write_volatile(value) }
    }

    /// The 4-byte word at `address`.
    #[must_use]
    pub fn half(&self, address: u64) -> u32 {
        // SAFETY: in the window by the check in `pointer`; callers pass aligned addresses.
        unsafe { self.pointer(address, 4).cast::<u32>().read() }
    }

    /// Replaces the 4-byte word at `address`.
    pub fn set_half(&self, address: u64, value: u32) {
        // SAFETY: in the window by the check in `pointer`; callers pass aligned addresses of their own.
        unsafe { self.pointer(address, 4).cast::<u32>().write(value) }
    }

    /// Fills the frame at `frame` with zeros.
    pub fn zero(&self, frame: u64) {
        // SAFETY: in the window by the check in `pointer`; the frame is the caller's own.
        unsafe { ptr::write_bytes(self.pointer(frame, FRAME), 0, FRAME as usize) }
    }

    /// Copies `length` bytes within physical memory; the ranges must not overlap.
    pub fn copy(&self, from: u64, to: u64, length: u64) {
        let (source, destination) = (self.pointer(from, length), self.pointer(to, length));
        // SAFETY: both ranges are in the window; they are apart as the caller promises, and the destination is its own.
        unsafe { ptr::copy_nonoverlapping(source, destination, length as usize) }
    }

    /// Copies `bytes` to `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let destination = self.pointer(address, bytes.len() as u64);
        // SAFETY: in the window by the check in `pointer`; the destination is the caller's own.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), destination, bytes.len()) }
    }

    /// Fills `bytes` from `address`.
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        let source = self.pointer(address, bytes.len() as u64);
        // SAFETY: in the window by the check in `pointer`; a `&mut` overlaps nothing that the window is used for.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }
}

#[cfg(test)]
pub mod testing {
    //! A piece of the host's memory that plays physical memory.

    use super::{FRAME, Physical};
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    /// Physical memory of a number of frames, filled with a pattern so that missing zeroing shows.
    pub struct TestMemory {
        base: *mut u8,
        layout: Layout,
        /// The window.
        pub physical: Physical,
    }

    impl TestMemory {
        /// `frames` frames from physical address 0.
        #[must_use]
        pub fn new(frames: usize) -> Self {
            let layout = Layout::from_size_align(frames * FRAME as usize, FRAME as usize)
                .expect("a valid layout");
            // SAFETY: the layout is not empty.
            let base = unsafe { alloc_zeroed(layout) };
            assert!(!base.is_null());
            // SAFETY: freshly allocated, `layout.size()` bytes.
            unsafe { base.write_bytes(0xa5, layout.size()) };
            // SAFETY: the window covers the allocation, which lives as long as `self`.
            let physical = unsafe { Physical::new(base.expose_provenance(), layout.size() as u64) };
            Self {
                base,
                layout,
                physical,
            }
        }
    }

    impl Drop for TestMemory {
        fn drop(&mut self) {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.base, self.layout) }
        }
    }
}

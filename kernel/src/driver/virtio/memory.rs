//! Memory that devices reach: handed out once, at the start, never given back.

use core::ptr::NonNull;

use kiln_abi::host::{BootInformation, PAGE_SIZE};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use crate::sync::Mutex;

/// What is left of the memory.
struct Region {
    start: usize,
    end: usize,
    /// First address that is not handed out yet.
    next: usize,
    /// Physical address of `start`.
    physical: u64,
}

static REGION: Mutex<Region> = Mutex::new(Region {
    start: 0,
    end: 0,
    next: 0,
    physical: 0,
});

/// Takes over the memory that the shim set aside. To be called once.
pub fn start(boot: &BootInformation) {
    let mut region = REGION.lock();
    if region.end == 0 {
        let start = boot.dma.start;
        *region = Region {
            start,
            end: start + boot.dma.length,
            next: start,
            physical: boot.dma_physical,
        };
    }
}

/// Bytes that are left.
pub fn left() -> usize {
    let region = REGION.lock();
    region.end - region.next
}

fn take(length: usize, align: usize) -> Option<(PhysAddr, NonNull<u8>)> {
    let mut region = REGION.lock();
    let start = region.next.checked_next_multiple_of(align)?;
    let end = start.checked_add(length).filter(|&end| end <= region.end)?;
    region.next = end;
    let physical = region.physical + (start - region.start) as u64;
    let pointer = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(start))?;
    // SAFETY: the shim mapped the region for the kernel alone, and each byte of it is handed out once.
    unsafe { pointer.as_ptr().write_bytes(0, length) };
    Some((physical, pointer))
}

/// A buffer in the devices' memory.
pub struct Buffer {
    bytes: &'static mut [u8],
}

impl Buffer {
    /// A buffer of zeros; `None` when the memory is used up.
    pub fn new(length: usize) -> Option<Buffer> {
        let (_, pointer) = take(length, 64)?;
        // SAFETY: handed out once, initialised, mapped for good.
        let bytes = unsafe { core::slice::from_raw_parts_mut(pointer.as_ptr(), length) };
        Some(Buffer { bytes })
    }

    /// Its contents. Only while it is not the device's.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// Its contents. Only while it is not the device's.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}

/// The memory as `virtio-drivers` wants it.
pub struct DeviceMemory;

// SAFETY: `dma_alloc` gives zeroed pages that nobody else has; `share` gives the physical address of a buffer that lies in memory that
// devices reach as it is.
unsafe impl Hal for DeviceMemory {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // An address of 0 says that there is none.
        pages
            .checked_mul(PAGE_SIZE)
            .and_then(|length| take(length, PAGE_SIZE))
            .unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        // Only for devices on a PCI bus.
        NonNull::dangling()
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let region = REGION.lock();
        let start = buffer.cast::<u8>().as_ptr().expose_provenance();
        assert!(
            start >= region.start && start + buffer.len() <= region.end,
            "a buffer that devices cannot reach"
        );
        region.physical + (start - region.start) as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

//! The kernel's heap: the allocator talc over a range that is as large as the instance's memory. Pages are
//! provided when they are first touched, so an unused heap costs nothing.

use core::alloc::{GlobalAlloc, Layout};

use kiln_abi::host::{BootInformation, KERNEL_RANGE_START, PAGE_SIZE, Protection, Source};
use talc::{TalcLock, source::Manual};

#[global_allocator]
static HEAP: Heap = Heap(TalcLock::new(Manual));

/// The allocator; large zeroed blocks, such as the buffers of connections, are not written but given back to the host, of whose
/// pages each is zero when it is first touched.
struct Heap(TalcLock<spin::Mutex<()>, Manual>);

/// Bytes of a large block: more than what is taken for one transfer, which is filled at once, so that writing it is cheaper.
const LARGE: usize = 128 << 10;

// SAFETY: as for the allocator within: `alloc_zeroed` changes nothing but bytes of the block that it hands out.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let block = unsafe { self.0.alloc(layout) };
        if block.is_null() {
            return block;
        }
        let length = layout.size();
        let pages = block.align_offset(PAGE_SIZE);
        let whole = length.saturating_sub(pages) & !(PAGE_SIZE - 1);
        let given_back = length >= LARGE
            && crate::runtime::boot()
                .is_some_and(|boot| (boot.host.discard)(block.addr() + pages, whole) == 0);
        // SAFETY: both ranges lie within the block.
        unsafe {
            if given_back {
                block.write_bytes(0, pages);
                block
                    .add(pages + whole)
                    .write_bytes(0, length - pages - whole);
            } else {
                block.write_bytes(0, length);
            }
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.0.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, length: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.0.realloc(block, layout, length) }
    }
}

/// Distance between the possible starts of the heap.
const STEP: usize = 2 << 20;

/// Maps the heap at a random address and gives it to the allocator.
pub fn start(boot: &BootInformation) -> Result<(), ()> {
    let mut random = [0u8; 8];
    if (boot.host.entropy)(random.as_mut_ptr(), random.len()) < 0 {
        return Err(());
    }
    let limit = usize::try_from(boot.memory_limit).map_err(|_| ())?;
    let length = limit.checked_next_multiple_of(STEP).ok_or(())?.min(1 << 40);
    // The lowest sixteenth of the kernel's range is the heap's; windows of the kernel's own lie above.
    let slots = (1 << 39) / STEP;
    let base = KERNEL_RANGE_START + (u64::from_le_bytes(random) as usize % slots) * STEP;
    let access = (Protection::READ | Protection::WRITE).bits();
    if (boot.host.map)(base, length, access, Source::Zero as u32, 0) < 0 {
        return Err(());
    }
    // SAFETY: the range was just mapped for this, and nobody else knows of it.
    unsafe { HEAP.0.lock().claim(base as *mut u8, length) }
        .map(drop)
        .ok_or(())
}

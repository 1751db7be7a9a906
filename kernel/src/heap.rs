//! The kernel's heap: the allocator talc over a range that is as large as the instance's memory. Pages are
//! provided when they are first touched, so an unused heap costs nothing.

use kiln_abi::host::{BootInformation, KERNEL_RANGE_START, Protection, Source};
use talc::{TalcLock, source::Manual};

#[global_allocator]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

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
    unsafe { HEAP.lock().claim(base as *mut u8, length) }
        .map(drop)
        .ok_or(())
}

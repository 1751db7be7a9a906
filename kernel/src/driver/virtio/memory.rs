//! Memory that devices reach: handed out once, at the start, never given back.

use kiln_abi::host::BootInformation;

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

/// Hands out memory with any contents: the address and the physical address. `None` when there is too little.
pub fn take(length: usize, align: usize) -> Option<(usize, u64)> {
    let mut region = REGION.lock();
    let start = region.next.checked_next_multiple_of(align)?;
    let end = start.checked_add(length).filter(|&end| end <= region.end)?;
    region.next = end;
    Some((start, region.physical + (start - region.start) as u64))
}

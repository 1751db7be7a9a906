//! Which addresses the kernel may ask for.
//!
//! The kernel maps memory for programs and for itself in two fixed ranges; everything of the shim and of the host
//! lies outside both, and so does the kernel's own image, of which it may only make pages read-only.

use kiln_abi::host::{
    KERNEL_RANGE_END, KERNEL_RANGE_START, MemoryRange, PAGE_SIZE, PROGRAM_END, PROGRAM_START,
};

/// True if `length` bytes from `address` are whole pages of one of the kernel's two ranges.
#[must_use]
pub fn allowed(address: usize, length: usize) -> bool {
    within(address, length, PROGRAM_START, PROGRAM_END)
        || within(address, length, KERNEL_RANGE_START, KERNEL_RANGE_END)
}

/// True if `length` bytes from `address` are whole pages of `range`.
#[must_use]
pub fn inside(address: usize, length: usize, range: MemoryRange) -> bool {
    range
        .start
        .checked_add(range.length)
        .is_some_and(|end| within(address, length, range.start, end))
}

/// True if any of the bytes from `start` to `end` lie in one of the kernel's two ranges.
#[must_use]
pub fn meets(start: usize, end: usize) -> bool {
    let overlaps = |from: usize, to: usize| start < to && from < end;
    overlaps(0, PROGRAM_END) || overlaps(KERNEL_RANGE_START, KERNEL_RANGE_END)
}

fn within(address: usize, length: usize, start: usize, end: usize) -> bool {
    (address | length).is_multiple_of(PAGE_SIZE)
        && length != 0
        && address >= start
        && address.checked_add(length).is_some_and(|last| last <= end)
}

#[cfg(test)]
mod tests {
    use super::{allowed, inside, meets};
    use kiln_abi::host::{
        KERNEL_RANGE_END, KERNEL_RANGE_START, MemoryRange, PROGRAM_END, PROGRAM_START,
    };

    #[test]
    fn both_ranges_are_allowed_to_their_last_page() {
        assert!(allowed(PROGRAM_START, PROGRAM_END - PROGRAM_START));
        assert!(allowed(
            KERNEL_RANGE_START,
            KERNEL_RANGE_END - KERNEL_RANGE_START
        ));
        assert!(allowed(PROGRAM_END - 4096, 4096));
    }

    #[test]
    fn nothing_else_is() {
        assert!(!allowed(0, 4096), "page zero");
        assert!(!allowed(PROGRAM_START - 4096, 8192));
        assert!(!allowed(PROGRAM_END - 4096, 8192));
        assert!(!allowed(PROGRAM_END, 4096));
        assert!(!allowed(PROGRAM_START, KERNEL_RANGE_START), "across both");
        assert!(!allowed(PROGRAM_START, 0), "empty");
        assert!(!allowed(PROGRAM_START + 1, 4096), "misaligned");
        assert!(!allowed(PROGRAM_START, 4097), "misaligned");
        assert!(!allowed(PROGRAM_START, usize::MAX & !4095), "wraps");
    }

    #[test]
    fn ranges_meet_by_a_byte() {
        assert!(meets(PROGRAM_END - 1, PROGRAM_END + 1));
        assert!(!meets(PROGRAM_END, KERNEL_RANGE_START));
        assert!(meets(PROGRAM_END, KERNEL_RANGE_START + 1));
        assert!(!meets(KERNEL_RANGE_END, KERNEL_RANGE_END + 4096));
    }

    #[test]
    fn inside_a_range() {
        let range = MemoryRange {
            start: 0x10000,
            length: 0x4000,
        };
        assert!(inside(0x11000, 0x3000, range));
        assert!(!inside(0x11000, 0x4000, range));
        assert!(!inside(0x1000, 0x1000, range));
    }
}

//! What signal handlers and host calls share.
//!
//! There is one thread; a handler may interrupt anything. So all of it is atomic (on x86-64 plain loads and stores),
//! and each value stands for itself: no invariant spans two of them once the kernel runs.

use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};

use kiln_abi::host::{CpuArea, MemoryRange};

/// A range of addresses.
pub struct Range {
    start: AtomicUsize,
    length: AtomicUsize,
}

impl Range {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
        }
    }

    /// Replaces the range.
    pub fn set(&self, range: MemoryRange) {
        self.start.store(range.start, Relaxed);
        self.length.store(range.length, Relaxed);
    }

    /// The range.
    pub fn get(&self) -> MemoryRange {
        MemoryRange {
            start: self.start.load(Relaxed),
            length: self.length.load(Relaxed),
        }
    }

    /// True if `address` lies in it.
    pub fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.start.load(Relaxed)) < self.length.load(Relaxed)
    }
}

/// The shim's own image.
pub static SHIM: Range = Range::new();
/// The host's vDSO.
pub static VDSO: Range = Range::new();
/// The kernel's text.
pub static KERNEL_TEXT: Range = Range::new();
/// The kernel's data: what follows its text in the image.
pub static KERNEL_DATA: Range = Range::new();
/// [`kiln_abi::host::Registration::resume`].
pub static RESUME: Range = Range::new();
/// [`kiln_abi::host::Registration::user_copy`].
pub static USER_COPY: Range = Range::new();
/// [`kiln_abi::host::Registration::user_copy_fault`].
pub static USER_COPY_FAULT: AtomicUsize = AtomicUsize::new(0);
/// [`kiln_abi::host::Registration::upcall_entry`].
pub static UPCALL_ENTRY: AtomicUsize = AtomicUsize::new(0);
/// [`kiln_abi::host::Registration::fault_entry`].
pub static FAULT_ENTRY: AtomicUsize = AtomicUsize::new(0);
/// The CPU area; null until the kernel has registered.
pub static CPU: AtomicPtr<CpuArea> = AtomicPtr::new(core::ptr::null_mut());
/// Length of the root file system.
pub static ROOT_LENGTH: AtomicUsize = AtomicUsize::new(0);
/// Where the root lies in the image file.
pub static ROOT_OFFSET: AtomicUsize = AtomicUsize::new(0);
/// Length of the pool.
pub static POOL_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Stands in for [`CpuArea::pending`] until there is a CPU area.
static EARLY_PENDING: AtomicU32 = AtomicU32::new(0);

/// The address of the flag that an event sets while the kernel runs.
pub fn pending() -> *mut u32 {
    let cpu = CPU.load(Relaxed);
    if cpu.is_null() {
        EARLY_PENDING.as_ptr()
    } else {
        cpu.wrapping_byte_add(core::mem::offset_of!(CpuArea, pending))
            .cast()
    }
}

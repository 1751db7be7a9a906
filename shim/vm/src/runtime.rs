//! What the compiler and the precompiled crates expect of every program, where there is no C library.

use core::alloc::{GlobalAlloc, Layout};

mod memory;

/// There is no heap: the shim never allocates. Some modules of `kiln_abi`, which the shim does not use, ask for an allocator to exist.
struct NoHeap;

// SAFETY: handing out no memory is always sound.
unsafe impl GlobalAlloc for NoHeap {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static NO_HEAP: NoHeap = NoHeap;

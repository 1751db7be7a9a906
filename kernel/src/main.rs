//! The kernel as a freestanding program: its entry, what the compiler expects to find, the heap, panics.
//!
//! Everything else is in the library, which also runs on the host under test.

#![no_std]
#![no_main]
#![allow(unsafe_code)]

extern crate alloc;

mod heap;
mod runtime;

use kiln_abi::host::BootInformation;

core::arch::global_asm!(
    ".pushsection .text.kiln_start, \"ax\", @progbits",
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    // Kept over the relocation, whose only input is this image itself.
    "push rdi",
    "sub rsp, 8",
    "lea rdi, [rip + __ehdr_start]",
    "lea rsi, [rip + _DYNAMIC]",
    "call {relocate}",
    "add rsp, 8",
    "pop rdi",
    "and rsp, -16",
    "call {start}",
    "ud2",
    ".popsection",
    relocate = sym runtime::relocate,
    start = sym start,
);

/// The first Rust function with all relocations in place.
unsafe extern "sysv64" fn start(boot: &'static BootInformation) -> ! {
    runtime::remember(boot);
    if boot.magic != kiln_abi::host::BOOT_MAGIC || boot.version != kiln_abi::host::VERSION {
        runtime::say(b"kiln: kernel and engine do not fit together: the image was built by another version of Kiln; rebuild it with this one\n");
        (boot.host.exit)(kiln_abi::host::exit_code::CANNOT_START);
    }
    runtime::seal();
    if heap::start(boot).is_err() {
        runtime::say(b"kiln: not enough memory for the kernel; give the instance more (-m)\n");
        (boot.host.exit)(kiln_abi::host::exit_code::CANNOT_START);
    }
    kiln_kernel::boot::start(boot)
}

//! The functions that the compiler calls for copying, filling and comparing memory, and the symbols that the precompiled `core`
//! expects of an unwinder.
//!
//! Copies go by eight bytes: translators of machine code do string instructions one element at a time.

use core::arch::{asm, global_asm};

// Never called: nothing unwinds with `panic = "abort"`.
global_asm!(
    ".globl rust_eh_personality",
    "rust_eh_personality:",
    ".globl _Unwind_Resume",
    "_Unwind_Resume:",
    "ud2",
);

/// C's `memcpy`.
///
/// # Safety
///
/// As in C: `length` bytes readable and writable, without overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(destination: *mut u8, source: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) length % 8,
            inout("rcx") length / 8 => _,
            inout("rsi") source => _,
            inout("rdi") destination => _,
            options(nostack, preserves_flags),
        );
    }
    destination
}

/// C's `memmove`.
///
/// # Safety
///
/// As in C: `length` bytes readable and writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(
    destination: *mut u8,
    source: *const u8,
    length: usize,
) -> *mut u8 {
    if (destination as usize).wrapping_sub(source as usize) >= length {
        // SAFETY: a forward copy reads every byte before it is overwritten.
        return unsafe { memcpy(destination, source, length) };
    }
    // SAFETY: the caller's promise; a backward copy reads every byte before it is overwritten.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") length => _,
            inout("rsi") source.wrapping_add(length).wrapping_sub(1) => _,
            inout("rdi") destination.wrapping_add(length).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    destination
}

/// C's `memset`.
///
/// # Safety
///
/// As in C: `length` bytes writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(destination: *mut u8, value: i32, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "rep stosq",
            "mov ecx, {rest:e}",
            "rep stosb",
            rest = in(reg) length % 8,
            inout("rcx") length / 8 => _,
            in("rax") 0x0101_0101_0101_0101 * u64::from(value as u8),
            inout("rdi") destination => _,
            options(nostack, preserves_flags),
        );
    }
    destination
}

/// C's `memcmp`.
///
/// # Safety
///
/// As in C: `length` bytes readable at both.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    for index in 0..length {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (*one.add(index), *other.add(index)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// The former name of [`memcmp`] where only equality counts.
///
/// # Safety
///
/// As [`memcmp`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(one, other, length) }
}

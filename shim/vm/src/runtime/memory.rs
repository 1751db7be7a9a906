//! The functions that the compiler calls for copying, filling and comparing memory, and the symbols that the precompiled `core`
//! expects of an unwinder.
//!
//! Long runs go by 64 bytes: translators of machine code do string instructions one element at a time.

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
            "test rcx, rcx",
            "jz 3f",
            "2:",
            "movups xmm0, [rsi]",
            "movups xmm1, [rsi + 16]",
            "movups xmm2, [rsi + 32]",
            "movups xmm3, [rsi + 48]",
            "movups [rdi], xmm0",
            "movups [rdi + 16], xmm1",
            "movups [rdi + 32], xmm2",
            "movups [rdi + 48], xmm3",
            "add rsi, 64",
            "add rdi, 64",
            "sub rcx, 1",
            "jnz 2b",
            "3:",
            "mov rcx, {rest}",
            "rep movsb",
            rest = in(reg) length % 64,
            inout("rcx") length / 64 => _,
            inout("rsi") source => _,
            inout("rdi") destination => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            options(nostack),
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
            "movq xmm0, rax",
            "punpcklqdq xmm0, xmm0",
            "test rcx, rcx",
            "jz 3f",
            "2:",
            "movups [rdi], xmm0",
            "movups [rdi + 16], xmm0",
            "movups [rdi + 32], xmm0",
            "movups [rdi + 48], xmm0",
            "add rdi, 64",
            "sub rcx, 1",
            "jnz 2b",
            "3:",
            "mov rcx, {rest}",
            "rep stosb",
            rest = in(reg) length % 64,
            inout("rcx") length / 64 => _,
            in("rax") 0x0101_0101_0101_0101 * u64::from(value as u8),
            inout("rdi") destination => _,
            out("xmm0") _,
            options(nostack),
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

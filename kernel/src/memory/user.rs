//! Access to program memory: the only place that touches it.
//!
//! The kernel shares the program's address space, so a copy is an ordinary copy; but the program's addresses may be
//! wrong. Every address is checked to lie in the program's range (so that the kernel's own memory is never taken for the
//! program's), and the copying instructions are known to the shim: a fault there continues at `user_copy_fault`, and the
//! caller sees that some bytes were not copied (`EFAULT`).

#![allow(unsafe_code)]

use alloc::{string::String, vec::Vec};
use core::mem::{MaybeUninit, size_of};

use kiln_abi::host::{PROGRAM_END, PROGRAM_START};

use crate::{Errno, Result};

core::arch::global_asm!(
    ".pushsection .text.kiln_user_copy, \"ax\", @progbits",
    ".globl kiln_user_copy, kiln_user_copy_start, kiln_user_copy_end, kiln_user_copy_fault",
    // rdi = destination, rsi = source, rdx = length; returns the bytes not copied. Blocks first: QEMU's translator does string
    // instructions byte by byte. rcx counts what is left.
    "kiln_user_copy:",
    "mov rcx, rdx",
    "kiln_user_copy_start:",
    "cmp rcx, 64",
    "jb 3f",
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
    "sub rcx, 64",
    "cmp rcx, 64",
    "jae 2b",
    "3:",
    "rep movsb",
    "kiln_user_copy_end:",
    "mov rax, rcx",
    "ret",
    // The shim continues here after a fault. The first time the rest of the block is tried byte by byte, up to the one that faults.
    "kiln_user_copy_fault:",
    "test rdx, rdx",
    "mov edx, 0",
    "jne 3b",
    "mov rax, rcx",
    "ret",
    ".popsection",
);

unsafe extern "sysv64" {
    fn kiln_user_copy(destination: *mut u8, source: *const u8, length: usize) -> usize;
    static kiln_user_copy_start: u8;
    static kiln_user_copy_end: u8;
    static kiln_user_copy_fault: u8;
}

/// Addresses of the copying instructions (start, end) and of the place where a fault in them continues.
#[must_use]
pub fn copy_instructions() -> (usize, usize, usize) {
    (
        &raw const kiln_user_copy_start as usize,
        &raw const kiln_user_copy_end as usize,
        &raw const kiln_user_copy_fault as usize,
    )
}

/// Copies bytes, either end of which may be program memory. Returns how many were **not** copied because of a fault.
///
/// # Safety
/// An end that is kernel memory must be valid for the copy; an end that is program memory must lie in the
/// program's range (see [`UserRange::new`]).
#[inline]
pub unsafe fn copy_raw(destination: *mut u8, source: *const u8, length: usize) -> usize {
    // SAFETY: the caller vouches for kernel memory; faults in program memory are caught.
    unsafe { kiln_user_copy(destination, source, length) }
}

/// A range of addresses inside the program's part of the address space. It need not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRange {
    /// First address.
    pub address: usize,
    /// Length in bytes.
    pub length: usize,
}

impl UserRange {
    /// Checks a range. An empty range is good at any address.
    ///
    /// # Errors
    /// `EFAULT` when part of it lies outside the program's part of the address space.
    #[inline]
    pub fn new(address: u64, length: u64) -> Result<UserRange> {
        let end = address.checked_add(length).ok_or(Errno::EFAULT)?;
        if length != 0 && (address < PROGRAM_START as u64 || end > PROGRAM_END as u64) {
            // Unit tests have their "program memory" wherever the host's allocator puts it.
            if !cfg!(test) || address < PROGRAM_START as u64 {
                return Err(Errno::EFAULT);
            }
        }
        Ok(UserRange {
            address: address as usize,
            length: length as usize,
        })
    }

    /// Copies program memory into `bytes`, which has the range's length.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn read(self, bytes: &mut [u8]) -> Result<()> {
        let length = self.length.min(bytes.len());
        // SAFETY: `bytes` is borrowed; the range was checked.
        match unsafe { copy_raw(bytes.as_mut_ptr(), self.address as *const u8, length) } {
            0 => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    /// Copies `bytes` into program memory.
    ///
    /// # Errors
    /// `EFAULT`, also when the range is shorter than `bytes`.
    pub fn write(self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.length {
            return Err(Errno::EFAULT);
        }
        // SAFETY: `bytes` is borrowed; the range was checked.
        match unsafe { copy_raw(self.address as *mut u8, bytes.as_ptr(), bytes.len()) } {
            0 => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }
}

/// Types that are nothing but bytes: any bytes are a valid value.
///
/// # Safety
/// Every bit pattern must be valid. Padding, if the type has any, is written to the program as zeros only if the
/// value was made from zeros ([`zeroed`]).
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($kind:ty),* $(,)?) => {
        $(
            // SAFETY: integers, or C structs of integers and pointers as Linux defines them.
            unsafe impl Plain for $kind {}
        )*
    };
}

plain!(u8, i8, u16, i16, u32, i32, u64, i64, usize, isize);
plain!(
    [u8; 4], [u8; 16], [i32; 2], [u32; 2], [u64; 2], [u64; 4], [u64; 16]
);
plain!(
    linux_raw_sys::general::timespec,
    linux_raw_sys::general::timeval,
    linux_raw_sys::general::timezone,
    linux_raw_sys::general::itimerspec,
    linux_raw_sys::general::stat,
    linux_raw_sys::general::statx,
    linux_raw_sys::general::statfs,
    linux_raw_sys::general::iovec,
    linux_raw_sys::general::pollfd,
    linux_raw_sys::general::epoll_event,
    linux_raw_sys::general::rlimit,
    linux_raw_sys::general::rlimit64,
    linux_raw_sys::general::rusage,
    linux_raw_sys::general::flock,
    linux_raw_sys::general::open_how,
    linux_raw_sys::general::clone_args,
    linux_raw_sys::net::linger,
    linux_raw_sys::net::ucred,
    linux_raw_sys::net::msghdr,
    linux_raw_sys::net::mmsghdr,
    linux_raw_sys::net::cmsghdr,
);

/// A value of zero bytes.
#[must_use]
pub fn zeroed<T: Plain>() -> T {
    // SAFETY: every bit pattern is valid for `Plain`.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// The bytes of a value.
#[must_use]
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: plain data is readable as bytes; structs come from `zeroed`, so padding is initialised.
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A value from its bytes; `None` when there are too few.
#[must_use]
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked; every bit pattern is valid; no alignment is assumed.
    (bytes.len() >= size_of::<T>())
        .then(|| unsafe { core::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// Reads a value from program memory.
///
/// # Errors
/// `EFAULT`.
pub fn read<T: Plain>(address: u64) -> Result<T> {
    let range = UserRange::new(address, size_of::<T>() as u64)?;
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the destination has room for a value, and is initialised when everything was copied.
    unsafe {
        match copy_raw(
            value.as_mut_ptr().cast(),
            range.address as *const u8,
            range.length,
        ) {
            0 => Ok(value.assume_init()),
            _ => Err(Errno::EFAULT),
        }
    }
}

/// Writes a value to program memory.
///
/// # Errors
/// `EFAULT`.
pub fn write<T: Plain>(address: u64, value: &T) -> Result<()> {
    UserRange::new(address, size_of::<T>() as u64)?.write(bytes_of(value))
}

/// Writes values one after the other to program memory.
///
/// # Errors
/// `EFAULT`.
pub fn write_many<T: Plain>(address: u64, values: &[T]) -> Result<()> {
    // SAFETY: plain data is readable as bytes, as in `bytes_of`; the slice says how many there are.
    let bytes = unsafe { core::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
    write_bytes(address, bytes)
}

/// Reads `count` values that lie one after the other.
///
/// # Errors
/// `EFAULT`; `E2BIG` for more than 16 MiB.
pub fn read_many<T: Plain>(address: u64, count: usize) -> Result<Vec<T>> {
    let length = count
        .checked_mul(size_of::<T>())
        .filter(|&length| length <= 1 << 24)
        .ok_or(Errno::E2BIG)?;
    let range = UserRange::new(address, length as u64)?;
    let mut values = Vec::<T>::with_capacity(count);
    // SAFETY: the vector has room for `count` values, all of which are initialised when everything was copied.
    unsafe {
        match copy_raw(
            values.as_mut_ptr().cast(),
            range.address as *const u8,
            length,
        ) {
            0 => {
                values.set_len(count);
                Ok(values)
            }
            _ => Err(Errno::EFAULT),
        }
    }
}

/// Reads bytes.
///
/// # Errors
/// `EFAULT`; `E2BIG` for more than 16 MiB.
pub fn read_bytes(address: u64, length: usize) -> Result<Vec<u8>> {
    read_many::<u8>(address, length)
}

/// Writes bytes.
///
/// # Errors
/// `EFAULT`.
pub fn write_bytes(address: u64, bytes: &[u8]) -> Result<()> {
    UserRange::new(address, bytes.len() as u64)?.write(bytes)
}

/// Reads bytes up to a zero byte (not included), at most `limit` of them.
///
/// # Errors
/// `EFAULT`; `ENAMETOOLONG` when there is no zero byte within `limit`.
pub fn read_c_string(address: u64, limit: usize) -> Result<Vec<u8>> {
    match read_c_prefix(address, limit)? {
        (bytes, true) => Ok(bytes),
        _ => Err(Errno::ENAMETOOLONG),
    }
}

/// Reads a string that a zero byte ends, but no more than `limit` bytes of it. Also says whether it ended before that.
///
/// # Errors
/// `EFAULT`.
pub fn read_c_prefix(address: u64, limit: usize) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let mut position = address;
    let mut chunk = [0u8; 256];
    let mut ended = false;
    while !ended && bytes.len() < limit {
        // Up to the next multiple of the chunk's size, so that no page is touched that the string does not reach.
        let step = chunk.len() - (position as usize % chunk.len());
        let part = &mut chunk[..step];
        UserRange::new(position, step as u64)?.read(part)?;
        let end = part.iter().position(|&byte| byte == 0);
        ended = end.is_some();
        bytes.extend_from_slice(&part[..end.unwrap_or(step)]);
        position += step as u64;
    }
    ended &= bytes.len() < limit;
    bytes.truncate(limit);
    Ok((bytes, ended))
}

/// Reads a path.
///
/// # Errors
/// `EFAULT`; `ENAMETOOLONG` beyond 4096 bytes; `EILSEQ` for bytes that are not UTF-8 (file names of Kiln's file systems
/// are UTF-8).
pub fn read_path(address: u64) -> Result<String> {
    String::from_utf8(read_c_string(address, 4096)?).map_err(|_| Errno::EILSEQ)
}

/// Reads an `iovec` array as checked ranges.
///
/// # Errors
/// `EFAULT`; `EINVAL` for more than 1024, or lengths that overflow.
pub fn read_ranges(address: u64, count: u64) -> Result<Vec<UserRange>> {
    if count > crate::file::io::MAX_SEGMENTS as u64 {
        return Err(Errno::EINVAL);
    }
    let vectors: Vec<linux_raw_sys::general::iovec> = read_many(address, count as usize)?;
    let mut total: u64 = 0;
    let mut ranges = Vec::with_capacity(vectors.len());
    for vector in vectors {
        total = total
            .checked_add(vector.iov_len)
            .filter(|&total| total <= i64::MAX as u64)
            .ok_or(Errno::EINVAL)?;
        match UserRange::new(vector.iov_base as u64, vector.iov_len) {
            Ok(range) => ranges.push(range),
            // Nothing is ever mapped at the lowest addresses: as at any other unmapped address, what lies in the
            // ranges before is transferred.
            Err(_) if (vector.iov_base as usize) < PROGRAM_START && total > vector.iov_len => break,
            Err(error) => return Err(error),
        }
    }
    Ok(ranges)
}

/// Copies within program memory; the ranges do not overlap.
///
/// # Errors
/// `EFAULT`.
pub fn copy_within(destination: usize, source: usize, length: usize) -> Result<()> {
    UserRange::new(destination as u64, length as u64)?;
    UserRange::new(source as u64, length as u64)?;
    // SAFETY: both ranges were checked to be program memory.
    match unsafe { copy_raw(destination as *mut u8, source as *const u8, length) } {
        0 => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_values() {
        let mut word = 7u64;
        let address = &raw mut word as u64;
        assert_eq!(read::<u64>(address), Ok(7));
        write(address, &9u64).unwrap();
        assert_eq!(read::<u64>(address), Ok(9));
    }

    #[test]
    fn page_zero_is_never_program_memory() {
        assert_eq!(read::<u32>(0), Err(Errno::EFAULT));
        assert_eq!(UserRange::new(u64::MAX, 2), Err(Errno::EFAULT));
        assert!(UserRange::new(0, 0).is_ok());
    }

    #[test]
    fn strings_end_at_zero() {
        let text = b"/etc/hosts\0rest";
        assert_eq!(read_path(text.as_ptr() as u64).unwrap(), "/etc/hosts");
        assert_eq!(
            read_c_string(text.as_ptr() as u64, 4),
            Err(Errno::ENAMETOOLONG)
        );
    }
}

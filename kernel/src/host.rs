//! The host interface, made safe to call.
//!
//! Each method is one call of [`kiln_abi::host::HostInterface`]; see there for meaning and errors. Mapping calls are
//! given only addresses of the program's range or the kernel's own window allocator, checked here, so that they cannot
//! take memory away from under Rust's feet.

#![allow(unsafe_code)]

use core::ffi::c_int;

use kiln_abi::host::{
    Event, HostInterface, KERNEL_RANGE_END, KERNEL_RANGE_START, Message, PAGE_SIZE, PROGRAM_END,
    PROGRAM_START, Protection, Registration, Slice, Source,
};

use crate::{Errno, Result};

/// The machine below the kernel.
#[derive(Clone, Copy)]
pub struct Host {
    table: &'static HostInterface,
}

impl Host {
    /// The host behind a table of calls.
    #[must_use]
    pub fn new(table: &'static HostInterface) -> Host {
        Host { table }
    }

    /// Tells the shim where traps go.
    ///
    /// # Errors
    /// When the shim refuses the registration.
    pub fn register(&self, registration: &Registration) -> Result<()> {
        Errno::check((self.table.register)(registration)).map(drop)
    }

    fn check_program_range(address: usize, length: usize) -> Result<()> {
        let end = address.checked_add(length).ok_or(Errno::ENOMEM)?;
        if !address.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) || length == 0 {
            return Err(Errno::EINVAL);
        }
        let program = address >= PROGRAM_START && end <= PROGRAM_END;
        if program { Ok(()) } else { Err(Errno::ENOMEM) }
    }

    /// Maps memory for the program.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, `EACCES` for write with execute, `ENOMEM`.
    pub fn map(
        &self,
        address: usize,
        length: usize,
        protection: Protection,
        source: Source,
        offset: u64,
    ) -> Result<()> {
        Self::check_program_range(address, length)?;
        Errno::check((self.table.map)(
            address,
            length,
            protection.bits(),
            source as u32,
            offset,
        ))
        .map(drop)
    }

    /// Unmaps memory of the program.
    ///
    /// # Errors
    /// `EINVAL` for a bad range.
    pub fn unmap(&self, address: usize, length: usize) -> Result<()> {
        Self::check_program_range(address, length)?;
        Errno::check((self.table.unmap)(address, length)).map(drop)
    }

    /// Changes the access allowed to memory of the program.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, `EACCES` for write with execute.
    pub fn protect(&self, address: usize, length: usize, protection: Protection) -> Result<()> {
        Self::check_program_range(address, length)?;
        Errno::check((self.table.protect)(address, length, protection.bits())).map(drop)
    }

    /// Gives memory of the program back; it reads as its source again.
    ///
    /// # Errors
    /// `EINVAL` for a bad range.
    pub fn discard(&self, address: usize, length: usize) -> Result<()> {
        Self::check_program_range(address, length)?;
        Errno::check((self.table.discard)(address, length)).map(drop)
    }

    /// Maps memory of the kernel's own, in [`KERNEL_RANGE_START`] to [`KERNEL_RANGE_END`].
    ///
    /// # Safety
    /// Nothing that Rust knows of may lie in the range.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, `ENOMEM`.
    pub unsafe fn map_kernel(
        &self,
        address: usize,
        length: usize,
        protection: Protection,
        source: Source,
        offset: u64,
    ) -> Result<()> {
        let end = address.checked_add(length).ok_or(Errno::EINVAL)?;
        if address < KERNEL_RANGE_START || end > KERNEL_RANGE_END {
            return Err(Errno::EINVAL);
        }
        Errno::check((self.table.map)(
            address,
            length,
            protection.bits(),
            source as u32,
            offset,
        ))
        .map(drop)
    }

    /// Gives pages of the kernel's own window back (they read as zeros again).
    ///
    /// # Safety
    /// Nothing that Rust knows of may lie in the range.
    ///
    /// # Errors
    /// `EINVAL` for a bad range.
    pub unsafe fn discard_kernel(&self, address: usize, length: usize) -> Result<()> {
        let end = address.checked_add(length).ok_or(Errno::EINVAL)?;
        if address < KERNEL_RANGE_START || end > KERNEL_RANGE_END {
            return Err(Errno::EINVAL);
        }
        Errno::check((self.table.discard)(address, length)).map(drop)
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        (self.table.memory_used)()
    }

    /// Monotonic clock in nanoseconds.
    #[inline]
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        (self.table.monotonic)()
    }

    /// Wall clock in nanoseconds since 1970.
    #[must_use]
    pub fn realtime(&self) -> u64 {
        (self.table.realtime)()
    }

    /// Asks for an event at a monotonic time; `u64::MAX` for none.
    pub fn set_timer(&self, deadline: u64) {
        (self.table.set_timer)(deadline);
    }

    /// Collects events, waiting until `deadline` if there are none.
    pub fn wait(&self, events: &mut [Event], deadline: u64) -> usize {
        let count = (self.table.wait)(events.as_mut_ptr(), events.len(), deadline);
        usize::try_from(count).unwrap_or(0).min(events.len())
    }

    /// Writes to the console as much as it takes at once.
    ///
    /// # Errors
    /// What the console says.
    pub fn console_write(&self, bytes: &[u8]) -> Result<usize> {
        Errno::check((self.table.console_write)(bytes.as_ptr(), bytes.len()))
    }

    /// Fills `bytes` with randomness.
    ///
    /// # Errors
    /// When the host has none.
    pub fn entropy(&self, bytes: &mut [u8]) -> Result<()> {
        Errno::check((self.table.entropy)(bytes.as_mut_ptr(), bytes.len())).map(drop)
    }

    /// Ends the instance.
    pub fn exit(&self, code: i32) -> ! {
        (self.table.exit)(code)
    }

    /// Starts events for a descriptor.
    ///
    /// # Errors
    /// `ENOSYS` on engines without descriptors.
    pub fn descriptor_watch(&self, descriptor: c_int) -> Result<()> {
        Errno::check((self.table.descriptor_watch)(descriptor)).map(drop)
    }

    /// `sendmsg(2)`.
    ///
    /// # Safety
    /// The message's pointers must be good for the call; slices that lie in program memory may be bad (`EFAULT`).
    ///
    /// # Errors
    /// As `sendmsg(2)`.
    pub unsafe fn descriptor_send_raw(
        &self,
        descriptor: c_int,
        message: &Message,
    ) -> Result<usize> {
        Errno::check((self.table.descriptor_send)(descriptor, message))
    }

    /// `recvmsg(2)`.
    ///
    /// # Safety
    /// As [`Host::descriptor_send_raw`].
    ///
    /// # Errors
    /// As `recvmsg(2)`.
    pub unsafe fn descriptor_receive_raw(
        &self,
        descriptor: c_int,
        message: &mut Message,
    ) -> Result<usize> {
        Errno::check((self.table.descriptor_receive)(descriptor, message))
    }

    /// Sends bytes of the kernel's.
    ///
    /// # Errors
    /// As `sendmsg(2)`; `EAGAIN` when there is no room.
    pub fn descriptor_send(&self, descriptor: c_int, bytes: &[u8]) -> Result<usize> {
        let slice = Slice {
            address: bytes.as_ptr() as usize,
            length: bytes.len(),
        };
        let message = Message {
            slices: &slice,
            slice_count: 1,
            address: core::ptr::null_mut(),
            address_length: 0,
            descriptors: core::ptr::null_mut(),
            descriptor_count: 0,
            flags: 0,
        };
        // SAFETY: the one slice is borrowed for the call; there is no address and no descriptor.
        unsafe { self.descriptor_send_raw(descriptor, &message) }
    }

    /// Receives bytes, and descriptors that come along.
    /// Returns how many bytes and how many descriptors.
    ///
    /// # Errors
    /// As `recvmsg(2)`; `EAGAIN` when there is nothing.
    pub fn descriptor_receive(
        &self,
        descriptor: c_int,
        bytes: &mut [u8],
        descriptors: &mut [i32],
    ) -> Result<(usize, usize)> {
        let slice = Slice {
            address: bytes.as_mut_ptr() as usize,
            length: bytes.len(),
        };
        let mut message = Message {
            slices: &slice,
            slice_count: 1,
            address: core::ptr::null_mut(),
            address_length: 0,
            descriptors: descriptors.as_mut_ptr(),
            descriptor_count: u32::try_from(descriptors.len()).unwrap_or(0),
            flags: 0,
        };
        // SAFETY: slice and descriptors are borrowed mutably for the call.
        let count = unsafe { self.descriptor_receive_raw(descriptor, &mut message)? };
        Ok((
            count,
            (message.descriptor_count as usize).min(descriptors.len()),
        ))
    }

    /// `shutdown(2)`.
    ///
    /// # Errors
    /// As `shutdown(2)`.
    pub fn descriptor_shutdown(&self, descriptor: c_int, how: u32) -> Result<()> {
        Errno::check((self.table.descriptor_shutdown)(descriptor, how)).map(drop)
    }

    /// `close(2)`.
    ///
    /// # Errors
    /// As `close(2)`.
    pub fn descriptor_close(&self, descriptor: c_int) -> Result<()> {
        Errno::check((self.table.descriptor_close)(descriptor)).map(drop)
    }
}

/// A host for tests: its calls succeed and do nothing; there is never an event.
#[cfg(test)]
pub mod quiet {
    use kiln_abi::host::{Event, HostInterface, Message, Registration};

    extern "C" fn register(_: &Registration) -> isize {
        0
    }
    extern "C" fn map(_: usize, _: usize, _: u32, _: u32, _: u64) -> isize {
        0
    }
    extern "C" fn range(_: usize, _: usize) -> isize {
        0
    }
    extern "C" fn protect(_: usize, _: usize, _: u32) -> isize {
        0
    }
    extern "C" fn clock() -> u64 {
        0
    }
    extern "C" fn set_timer(_: u64) {}
    extern "C" fn wait(_: *mut Event, _: usize, _: u64) -> isize {
        0
    }
    extern "C" fn console_write(_: *const u8, length: usize) -> isize {
        length as isize
    }
    extern "C" fn entropy(_: *mut u8, _: usize) -> isize {
        0
    }
    extern "C" fn exit(_: i32) -> ! {
        panic!("exit")
    }
    extern "C" fn descriptor(_: i32) -> isize {
        0
    }
    extern "C" fn send(_: i32, _: &Message) -> isize {
        -11
    }
    extern "C" fn receive(_: i32, _: &mut Message) -> isize {
        -11
    }
    extern "C" fn shutdown(_: i32, _: u32) -> isize {
        0
    }

    /// The calls.
    pub static TABLE: HostInterface = HostInterface {
        register,
        map,
        unmap: range,
        protect,
        discard: range,
        memory_used: clock,
        monotonic: clock,
        realtime: clock,
        set_timer,
        wait,
        console_write,
        entropy,
        exit,
        descriptor_watch: descriptor,
        descriptor_send: send,
        descriptor_receive: receive,
        descriptor_shutdown: shutdown,
        descriptor_close: descriptor,
    };
}

//! System calls of the host.
//!
//! The section `kiln_syscall` holds every `syscall` instruction that the host obeys: syscall user dispatch is told
//! its bounds. It is a few dozen bytes of assembly.
//!
//! Results are zero or positive, or a negated Linux error number.

#![allow(unsafe_code)]

use core::arch::global_asm;

use linux_raw_sys::general::{self as raw, __kernel_timespec as Timespec};

global_asm!(
    r#"
    .section kiln_syscall, "ax", @progbits
    .balign 64

// isize kiln_call(number, a, b, c, d, e, f)
    .globl kiln_call
    .hidden kiln_call
kiln_call:
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    mov rdx, rcx
    mov r10, r8
    mov r8, r9
    mov r9, [rsp + 8]
    syscall
    ret

// isize kiln_wait(epoll, events, capacity, timeout, pending): epoll_pwait2 without a signal mask, unless *pending.
// An event's handler that interrupts it between kiln_wait_check and kiln_wait_done has it continue at
// kiln_wait_pending, so no event is lost between the look at *pending and the sleep.
    .globl kiln_wait
    .hidden kiln_wait
kiln_wait:
    mov r10, rcx
    mov r9, r8
    xor r8d, r8d
    mov eax, {epoll_pwait2}
    .globl kiln_wait_check
    .hidden kiln_wait_check
kiln_wait_check:
    cmp dword ptr [r9], 0
    jne kiln_wait_pending
    syscall
    .globl kiln_wait_done
    .hidden kiln_wait_done
kiln_wait_done:
    ret
    .globl kiln_wait_pending
    .hidden kiln_wait_pending
kiln_wait_pending:
    mov rax, -{interrupted}
    ret

// The end of a signal handler that goes back to what it interrupted; rdi: the ucontext, rsi: pending. If *pending, it
// jumps to kiln_return_pending. An event's handler that interrupts it between kiln_return_check and kiln_return_done has
// it continue there, so no event is lost between the look at *pending and the return.
    .globl kiln_return_check
    .hidden kiln_return_check
kiln_return_check:
    cmp dword ptr [rsi], 0
    jne kiln_return_pending
    mov rsp, rdi
    .globl kiln_signal_return
    .hidden kiln_signal_return
// Without that look; rsp: the ucontext.
kiln_signal_return:
    mov eax, {rt_sigreturn}
    syscall
    .globl kiln_return_done
    .hidden kiln_return_done
kiln_return_done:
    ud2

    .text
"#,
    epoll_pwait2 = const raw::__NR_epoll_pwait2,
    rt_sigreturn = const raw::__NR_rt_sigreturn,
    interrupted = const EINTR,
);

unsafe extern "C" {
    fn kiln_call(
        number: usize,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        e: usize,
        f: usize,
    ) -> isize;
    fn kiln_wait(
        epoll: i32,
        events: *mut raw::epoll_event,
        capacity: i32,
        timeout: *const Timespec,
        pending: *const u32,
    ) -> isize;
    fn kiln_wait_check();
    fn kiln_wait_done();
    fn kiln_wait_pending();
    fn kiln_signal_return();
    fn kiln_return_check();
    fn kiln_return_done();
    fn kiln_return_pending();
    static __start_kiln_syscall: u8;
    static __stop_kiln_syscall: u8;
}

/// Linux error numbers that the shim itself gives or looks at.
pub const EINTR: isize = linux_raw_sys::errno::EINTR as isize;
/// Bad descriptor.
pub const EBADF: isize = linux_raw_sys::errno::EBADF as isize;
/// Out of memory.
pub const ENOMEM: isize = linux_raw_sys::errno::ENOMEM as isize;
/// Not allowed.
pub const EACCES: isize = linux_raw_sys::errno::EACCES as isize;
/// Bad argument.
pub const EINVAL: isize = linux_raw_sys::errno::EINVAL as isize;
/// Something is there already.
pub const EEXIST: isize = linux_raw_sys::errno::EEXIST as isize;
/// No such call.
pub const ENOSYS: isize = linux_raw_sys::errno::ENOSYS as isize;
/// The host refuses.
pub const EPERM: isize = linux_raw_sys::errno::EPERM as isize;

/// First address and length of the section of system calls.
pub fn section() -> (usize, usize) {
    let start = &raw const __start_kiln_syscall as usize;
    (start, &raw const __stop_kiln_syscall as usize - start)
}

/// The address that signal handlers return to.
pub fn signal_return() -> usize {
    kiln_signal_return as *const () as usize
}

/// If `address` lies where [`wait`] or the end of a signal handler has looked for a pending event but not yet gone to
/// sleep or back: where to continue when there is one.
pub fn look_again(address: usize) -> Option<usize> {
    [
        (
            kiln_wait_check as *const (),
            kiln_wait_done as *const (),
            kiln_wait_pending as *const (),
        ),
        (
            kiln_return_check as *const (),
            kiln_return_done as *const (),
            kiln_return_pending as *const (),
        ),
    ]
    .into_iter()
    .find(|(check, done, _)| (*check as usize..*done as usize).contains(&address))
    .map(|(.., pending)| pending as usize)
}

/// Any system call.
///
/// # Safety
/// As the call is documented.
pub unsafe fn syscall(number: u32, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's promise.
    unsafe { kiln_call(number as usize, a, b, c, d, e, f) }
}

/// Descriptors and other `int` arguments as the calls take them.
pub const fn int(value: i32) -> usize {
    value as isize as usize
}

/// `write(2)`.
pub fn write(descriptor: i32, bytes: &[u8]) -> isize {
    // SAFETY: reads the slice.
    unsafe {
        syscall(
            raw::__NR_write,
            [
                int(descriptor),
                bytes.as_ptr() as usize,
                bytes.len(),
                0,
                0,
                0,
            ],
        )
    }
}

/// `exit_group(2)`.
pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { syscall(raw::__NR_exit_group, [int(code), 0, 0, 0, 0, 0]) };
    }
}

/// `epoll_pwait2(2)`, or `-EINTR` at once if `*pending` is not zero or becomes so before the process sleeps.
///
/// # Safety
/// `events` has room for `capacity`, `timeout` is null or valid, `pending` is valid.
pub unsafe fn wait(
    epoll: i32,
    events: *mut raw::epoll_event,
    capacity: i32,
    timeout: *const Timespec,
    pending: *const u32,
) -> isize {
    // SAFETY: the caller's promise.
    unsafe { kiln_wait(epoll, events, capacity, timeout, pending) }
}

/// `close(2)`.
pub fn close(descriptor: i32) -> isize {
    // SAFETY: the shim holds nothing that depends on a descriptor that may be closed.
    unsafe { syscall(raw::__NR_close, [int(descriptor), 0, 0, 0, 0, 0]) }
}

/// Size and used bytes of a file, by `fstat(2)`.
pub fn file_size(descriptor: i32) -> Result<(u64, u64), isize> {
    let mut status = core::mem::MaybeUninit::<raw::stat>::zeroed();
    // SAFETY: the structure is as large as the call writes.
    let result = unsafe {
        syscall(
            raw::__NR_fstat,
            [int(descriptor), status.as_mut_ptr() as usize, 0, 0, 0, 0],
        )
    };
    if result < 0 {
        return Err(result);
    }
    // SAFETY: zeroed and filled; plain integers.
    let status = unsafe { status.assume_init() };
    let size = u64::try_from(status.st_size).unwrap_or(0);
    Ok((size, u64::try_from(status.st_blocks).unwrap_or(0) * 512))
}

/// `pread(2)` from the start of a file.
pub fn read_start(descriptor: i32, buffer: &mut [u8]) -> isize {
    // SAFETY: fills the slice.
    unsafe {
        let arguments = [
            int(descriptor),
            buffer.as_mut_ptr() as usize,
            buffer.len(),
            0,
            0,
            0,
        ];
        syscall(raw::__NR_pread64, arguments)
    }
}

/// `mmap(2)` of memory that nothing else uses: at an address of the host's choice, or at `address` exactly if that is
/// free.
pub fn map_new(
    address: usize,
    length: usize,
    protection: u32,
    descriptor: i32,
    offset: usize,
) -> Result<usize, isize> {
    let anonymous = if descriptor < 0 {
        raw::MAP_ANONYMOUS | raw::MAP_NORESERVE
    } else {
        0
    };
    let fixed = if address == 0 {
        0
    } else {
        raw::MAP_FIXED_NOREPLACE
    };
    let flags = (raw::MAP_PRIVATE | anonymous | fixed) as usize;
    // SAFETY: replaces no mapping.
    let result = unsafe {
        let arguments = [
            address,
            length,
            protection as usize,
            flags,
            int(descriptor),
            offset,
        ];
        syscall(raw::__NR_mmap, arguments)
    };
    if result < 0 {
        Err(result)
    } else {
        Ok(result as usize)
    }
}

//! Console, events, descriptors, random bytes, the end: the rest of the host interface.

#![allow(unsafe_code)]

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::Relaxed;

use kiln_abi::host::{Event, HostInterface, Message, Registration, Slice};
use kiln_abi::process::descriptor;
use linux_raw_sys::general as raw;

use crate::linux::{self, EBADF, EEXIST, EINTR, EINVAL, int};
use crate::{memory, state, time, trap};

/// The table that the kernel gets.
pub const INTERFACE: HostInterface = HostInterface {
    register,
    map: memory::map,
    unmap: memory::unmap,
    protect: memory::protect,
    discard: memory::discard,
    memory_used: memory::memory_used,
    monotonic: time::monotonic,
    realtime: time::realtime,
    set_timer: time::set_timer,
    wait,
    console_write,
    entropy,
    exit,
    descriptor_watch,
    descriptor_send,
    descriptor_receive,
    descriptor_shutdown,
    descriptor_close,
};

/// Most events that one call collects.
const EVENTS: usize = 256;
/// Most descriptors that come with one message.
const DESCRIPTORS: usize = 64;

const EPOLLIN: u32 = 0x1;
const EPOLLOUT: u32 = 0x4;
const EPOLLRDHUP: u32 = 0x2000;
const EPOLLET: u32 = 1 << 31;
const EPOLL_CTL_ADD: usize = 1;
const EPOLL_CTL_MOD: usize = 3;

const MSG_DONTWAIT: u32 = 0x40;
const MSG_NOSIGNAL: u32 = 0x4000;
const MSG_CMSG_CLOEXEC: u32 = 0x4000_0000;
const SOL_SOCKET: i32 = 1;
const SCM_RIGHTS: i32 = 1;

/// Linux's `struct user_msghdr`.
#[repr(C)]
struct MessageHeader {
    name: *mut u8,
    name_length: i32,
    slices: *const Slice,
    slice_count: usize,
    control: *mut u8,
    control_length: usize,
    flags: u32,
}

/// Linux's `struct cmsghdr`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ControlHeader {
    length: usize,
    level: i32,
    kind: i32,
}

/// Room for one control message with descriptors.
#[repr(C)]
struct Control {
    header: ControlHeader,
    descriptors: [i32; DESCRIPTORS],
}

extern "C" fn register(registration: &Registration) -> isize {
    if registration.cpu.is_null() || registration.upcall_entry == 0 || registration.fault_entry == 0
    {
        return -EINVAL;
    }
    state::RESUME.set(registration.resume);
    state::USER_COPY.set(registration.user_copy);
    state::USER_COPY_FAULT.store(registration.user_copy_fault, Relaxed);
    state::UPCALL_ENTRY.store(registration.upcall_entry, Relaxed);
    state::FAULT_ENTRY.store(registration.fault_entry, Relaxed);
    state::CPU.store(registration.cpu, Relaxed);
    trap::set_gs_base(registration.cpu as usize);
    0
}

extern "C" fn wait(events: *mut Event, capacity: usize, deadline: u64) -> isize {
    let mut buffer = MaybeUninit::<[raw::epoll_event; EVENTS]>::uninit();
    let capacity = capacity.min(EVENTS);
    let never = 0u32;
    let pending = if deadline == 0 {
        &raw const never
    } else {
        state::pending().cast_const()
    };
    let result = loop {
        let timeout = match deadline {
            0 | u64::MAX => time::timespec(0),
            _ => time::timespec(deadline.saturating_sub(time::monotonic())),
        };
        let timeout = if deadline == u64::MAX {
            core::ptr::null()
        } else {
            &raw const timeout
        };
        // SAFETY: the buffer has room; the flag lives as long as the kernel.
        let result = unsafe {
            let buffer = buffer.as_mut_ptr().cast();
            linux::wait(descriptor::EPOLL, buffer, capacity as i32, timeout, pending)
        };
        // SAFETY: as above. Interrupted without an event: by a check of the memory limit, or a deadline moved back.
        if result != -EINTR || unsafe { pending.read_volatile() } != 0 {
            break result;
        }
    };
    let Ok(count) = usize::try_from(result) else {
        return if result == -EINTR { 0 } else { result };
    };
    for index in 0..count {
        // SAFETY: the call filled `count` entries; the kernel gives room for `capacity` events.
        unsafe {
            let event = buffer.as_ptr().cast::<raw::epoll_event>().add(index).read();
            events.add(index).write(Event {
                source: event.data as u32,
                flags: event.events,
            });
        }
    }
    result
}

extern "C" fn console_write(bytes: *const u8, length: usize) -> isize {
    // SAFETY: Linux checks the memory.
    unsafe {
        let arguments = [int(descriptor::CONSOLE), bytes as usize, length, 0, 0, 0];
        linux::syscall(raw::__NR_write, arguments)
    }
}

extern "C" fn entropy(bytes: *mut u8, length: usize) -> isize {
    let mut done = 0;
    while done < length {
        // SAFETY: Linux checks the memory.
        let result = unsafe {
            let arguments = [bytes as usize + done, length - done, 0, 0, 0, 0];
            linux::syscall(raw::__NR_getrandom, arguments)
        };
        match usize::try_from(result) {
            Ok(count) => done += count,
            Err(_) if result == -EINTR => {}
            Err(_) => return result,
        }
    }
    0
}

extern "C" fn exit(code: i32) -> ! {
    linux::exit(code)
}

/// True for the descriptors that the kernel may use: the link, the frame stream, and those that came over the link.
fn usable(number: i32) -> bool {
    number >= descriptor::LINK
}

extern "C" fn descriptor_watch(number: i32) -> isize {
    if !usable(number) {
        return -EBADF;
    }
    let event = raw::epoll_event {
        events: EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
        data: u64::from(number.unsigned_abs()),
    };
    let control = |operation| {
        let arguments = [
            int(descriptor::EPOLL),
            operation,
            int(number),
            &raw const event as usize,
            0,
            0,
        ];
        // SAFETY: reads the structure.
        unsafe { linux::syscall(raw::__NR_epoll_ctl, arguments) }
    };
    match control(EPOLL_CTL_ADD) {
        // A published datagram socket stays open in the monitor, and with it what was asked for under the same number
        // before. Asking anew tells what it is ready for.
        error if error == -EEXIST => control(EPOLL_CTL_MOD),
        result => result,
    }
}

extern "C" fn descriptor_send(number: i32, message: &Message) -> isize {
    if !usable(number) {
        return -EBADF;
    }
    let flags = message.flags | MSG_DONTWAIT | MSG_NOSIGNAL;
    if message.slice_count == 1 && message.address.is_null() {
        // SAFETY: the kernel gives a valid slice; Linux checks the memory that it describes.
        return unsafe {
            let slice = message.slices.read();
            let arguments = [
                int(number),
                slice.address,
                slice.length,
                flags as usize,
                0,
                0,
            ];
            linux::syscall(raw::__NR_sendto, arguments)
        };
    }
    let header = MessageHeader {
        name: message.address,
        name_length: if message.address.is_null() {
            0
        } else {
            message.address_length as i32
        },
        slices: message.slices,
        slice_count: message.slice_count,
        control: core::ptr::null_mut(),
        control_length: 0,
        flags: 0,
    };
    // SAFETY: Linux checks the memory that the header describes.
    unsafe {
        let arguments = [
            int(number),
            &raw const header as usize,
            flags as usize,
            0,
            0,
            0,
        ];
        linux::syscall(raw::__NR_sendmsg, arguments)
    }
}

extern "C" fn descriptor_receive(number: i32, message: &mut Message) -> isize {
    if !usable(number) {
        return -EBADF;
    }
    let flags = message.flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC;
    let room = if message.descriptors.is_null() {
        0
    } else {
        DESCRIPTORS.min(message.descriptor_count as usize)
    };
    message.descriptor_count = 0;
    if message.slice_count == 1 && message.address.is_null() && room == 0 {
        // SAFETY: as in `descriptor_send`.
        return unsafe {
            let slice = message.slices.read();
            let arguments = [
                int(number),
                slice.address,
                slice.length,
                flags as usize,
                0,
                0,
            ];
            linux::syscall(raw::__NR_recvfrom, arguments)
        };
    }
    let mut control = Control {
        header: ControlHeader {
            length: 0,
            level: 0,
            kind: 0,
        },
        descriptors: [-1; DESCRIPTORS],
    };
    let header_length = size_of::<ControlHeader>();
    let control_length = if room == 0 {
        0
    } else {
        header_length + room * size_of::<i32>()
    };
    let mut header = MessageHeader {
        name: message.address,
        name_length: if message.address.is_null() {
            0
        } else {
            message.address_length as i32
        },
        slices: message.slices,
        slice_count: message.slice_count,
        control: (&raw mut control).cast(),
        control_length,
        flags: 0,
    };
    // SAFETY: Linux checks the memory that the header describes; the control buffer is ours.
    let result = unsafe {
        let arguments = [
            int(number),
            &raw mut header as usize,
            flags as usize,
            0,
            0,
            0,
        ];
        linux::syscall(raw::__NR_recvmsg, arguments)
    };
    if result < 0 {
        return result;
    }
    message.address_length = header.name_length.unsigned_abs();
    if header.control_length > header_length
        && (control.header.level, control.header.kind) == (SOL_SOCKET, SCM_RIGHTS)
    {
        let count = control.header.length.saturating_sub(header_length) / size_of::<i32>();
        for (index, number) in control.descriptors.iter().take(count.min(room)).enumerate() {
            // SAFETY: the kernel gives room for `room` descriptors.
            unsafe { message.descriptors.add(index).write(*number) };
            message.descriptor_count += 1;
        }
    }
    result
}

extern "C" fn descriptor_shutdown(number: i32, how: u32) -> isize {
    if !usable(number) {
        return -EBADF;
    }
    // SAFETY: concerns the socket alone.
    unsafe { linux::syscall(raw::__NR_shutdown, [int(number), how as usize, 0, 0, 0, 0]) }
}

extern "C" fn descriptor_close(number: i32) -> isize {
    if usable(number) {
        linux::close(number)
    } else {
        -EBADF
    }
}

//! The kernel's calls, as `abi/src/host.rs` documents them. Every argument is checked: the kernel is not trusted to be right.

use kiln_abi::host::{
    Event, KERNEL_RANGE_END, KERNEL_RANGE_START, PAGE_SIZE, PROGRAM_END, PROGRAM_START, Protection,
    Registration, Source,
};
use kiln_shim_vm::memory::{Exhausted, USER_END};

use crate::clock;
use crate::console;
use crate::cpu::{self, msr};
use crate::descriptors::PROCESSOR;
use crate::entry::CALLS;
use crate::interrupts;
use crate::machine::{Machine, Registered};

const EIO: isize = -5;
const ENOMEM: isize = -12;
const EACCES: isize = -13;
const EFAULT: isize = -14;
const EBUSY: isize = -16;
const EINVAL: isize = -22;
const ENOSYS: isize = -38;

type Call = extern "C" fn(usize, usize, usize, usize, usize) -> isize;

/// The calls by number: their place in [`kiln_abi::host::HostInterface`]. The clocks are not calls.
#[unsafe(no_mangle)]
static SHIM_CALLS: [Call; CALLS] = [
    register,
    map,
    unmap,
    protect,
    discard,
    memory_used,
    absent,
    absent,
    set_timer,
    wait,
    console_write,
    entropy,
    exit,
    absent,
    absent,
    absent,
    absent,
    absent,
];

/// The machine. Calls do not nest, and no trap from ring 0 uses it.
fn machine() -> &'static mut Machine {
    // SAFETY: each call asks once; see above.
    unsafe { Machine::get() }
}

fn result(result: Result<(), Exhausted>) -> isize {
    if result.is_ok() { 0 } else { ENOMEM }
}

extern "C" fn absent(_: usize, _: usize, _: usize, _: usize, _: usize) -> isize {
    ENOSYS
}

extern "C" fn register(address: usize, _: usize, _: usize, _: usize, _: usize) -> isize {
    let machine = machine();
    if machine.registered.is_some() {
        return EBUSY;
    }
    let mut bytes = [0; size_of::<Registration>()];
    if machine.memory.read(address, &mut bytes).is_err() {
        return EFAULT;
    }
    let mut words = [0; size_of::<Registration>() / 8];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = usize::from_le_bytes(*bytes);
        if *word >= USER_END {
            return EINVAL;
        }
    }
    // In the order of the structure.
    let [
        cpu,
        upcall_entry,
        fault_entry,
        resume,
        resume_length,
        user_copy,
        user_copy_length,
        user_copy_fault,
    ] = words;
    let registered = Registered {
        cpu,
        upcall_entry,
        fault_entry,
        resume: resume..resume + resume_length,
        user_copy: user_copy..user_copy + user_copy_length,
        user_copy_fault,
    };
    // SAFETY: calls do not nest; the gates read the area only on a later entry.
    let processor = unsafe { PROCESSOR.get() };
    processor.cpu = registered.cpu;
    processor.upcall_entry = registered.upcall_entry;
    // SAFETY: the base that ring 3 gets back; an address of the lower half.
    unsafe { cpu::write_msr(msr::KERNEL_GS_BASE, registered.cpu as u64) };
    machine.registered = Some(registered);
    0
}

/// Whether a range is aligned, not empty, and one that the kernel may map.
fn may_map(address: usize, length: usize) -> bool {
    let within =
        |start: usize, end: usize| address >= start && length <= end.saturating_sub(address);
    is_aligned(address, length)
        && (within(PROGRAM_START, PROGRAM_END) || within(KERNEL_RANGE_START, KERNEL_RANGE_END))
}

fn is_aligned(address: usize, length: usize) -> bool {
    address.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE) && length != 0
}

fn protection(bits: usize) -> Result<Protection, isize> {
    let protection = u32::try_from(bits)
        .ok()
        .and_then(Protection::from_bits)
        .ok_or(EINVAL)?;
    if protection.contains(Protection::WRITE | Protection::EXECUTE) {
        Err(EACCES)
    } else {
        Ok(protection)
    }
}

extern "C" fn map(
    address: usize,
    length: usize,
    bits: usize,
    source: usize,
    offset: usize,
) -> isize {
    let protection = match protection(bits) {
        Ok(protection) => protection,
        Err(error) => return error,
    };
    let source = match source {
        0 => Source::Zero,
        1 => Source::Root,
        2 => Source::Pool,
        _ => return EINVAL,
    };
    let machine = machine();
    if !may_map(address, length)
        || !offset.is_multiple_of(PAGE_SIZE)
        || !machine.memory.source_has(source, offset as u64, length)
    {
        return EINVAL;
    }
    result(
        machine
            .memory
            .map(address, length, protection, source, offset as u64),
    )
}

extern "C" fn unmap(address: usize, length: usize, _: usize, _: usize, _: usize) -> isize {
    if !may_map(address, length) {
        return EINVAL;
    }
    result(machine().memory.unmap(address, length))
}

extern "C" fn protect(address: usize, length: usize, bits: usize, _: usize, _: usize) -> isize {
    let protection = match protection(bits) {
        Ok(protection) => protection,
        Err(error) => return error,
    };
    let machine = machine();
    // The kernel takes the right to write from its own relocated data.
    let own = machine.kernel.contains(&address) && length <= machine.kernel.end - address;
    let own = own && is_aligned(address, length) && !protection.contains(Protection::EXECUTE);
    if !own && !may_map(address, length) {
        return EINVAL;
    }
    if own && protection.contains(Protection::WRITE) {
        return EACCES;
    }
    result(machine.memory.protect(address, length, protection))
}

extern "C" fn discard(address: usize, length: usize, _: usize, _: usize, _: usize) -> isize {
    if !may_map(address, length) {
        return EINVAL;
    }
    result(machine().memory.discard(address, length))
}

extern "C" fn memory_used(_: usize, _: usize, _: usize, _: usize, _: usize) -> isize {
    machine().memory.used() as isize
}

extern "C" fn set_timer(deadline: usize, _: usize, _: usize, _: usize, _: usize) -> isize {
    let clock = &mut machine().clock;
    clock.deadline = deadline as u64;
    clock.arm(u64::MAX);
    0
}

extern "C" fn wait(events: usize, capacity: usize, deadline: usize, _: usize, _: usize) -> isize {
    let deadline = deadline as u64;
    let machine = machine();
    loop {
        let mut count = 0;
        while count < capacity {
            let Some(line) = interrupts::take_line() else {
                break;
            };
            let mut bytes = [0; size_of::<Event>()];
            if let Some(source) = bytes.first_chunk_mut() {
                *source = line.to_le_bytes();
            }
            let Some(address) = events.checked_add(count * bytes.len()) else {
                return EFAULT;
            };
            if machine.memory.write(address, &bytes).is_err() {
                return EFAULT;
            }
            count += 1;
        }
        if count > 0 {
            return count as isize;
        }
        if machine.is_pending() {
            return 0;
        }
        let now = clock::now();
        if now >= machine.clock.deadline {
            machine.clock.deadline = u64::MAX;
            return if machine.set_pending().is_ok() {
                0
            } else {
                EFAULT
            };
        }
        if now >= deadline {
            return 0;
        }
        machine.clock.arm(deadline);
        // SAFETY: the traps are set up; a trap from ring 0 uses only `interrupts`.
        unsafe { cpu::halt() };
        machine.clock.improve();
    }
}

extern "C" fn console_write(address: usize, length: usize, _: usize, _: usize, _: usize) -> isize {
    let machine = machine();
    let mut buffer = [0; 256];
    let mut done = 0;
    while done < length {
        let Some(piece) = buffer.get_mut(..(length - done).min(256)) else {
            break;
        };
        let Some(at) = address.checked_add(done) else {
            return EFAULT;
        };
        if machine.memory.read(at, piece).is_err() {
            return if done > 0 { done as isize } else { EFAULT };
        }
        console::write(piece);
        done += piece.len();
    }
    done as isize
}

extern "C" fn entropy(address: usize, length: usize, _: usize, _: usize, _: usize) -> isize {
    let machine = machine();
    let mut done = 0;
    while done < length {
        let Some(word) = cpu::random(&machine.features) else {
            return EIO;
        };
        let bytes = word.to_le_bytes();
        let piece = bytes
            .get(..(length - done).min(bytes.len()))
            .unwrap_or(&bytes);
        let Some(at) = address.checked_add(done) else {
            return EFAULT;
        };
        if machine.memory.write(at, piece).is_err() {
            return EFAULT;
        }
        done += piece.len();
    }
    done as isize
}

extern "C" fn exit(code: usize, _: usize, _: usize, _: usize, _: usize) -> isize {
    crate::power::off(code as i32)
}

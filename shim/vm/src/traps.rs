//! Exceptions and interrupts: which become first touches, events, upcalls, and which end the machine.

use core::fmt;
use core::mem::offset_of;

use kiln_abi::host::{Context, CpuArea, Protection, Trap, TrapKind, exception, page_fault};
use kiln_shim_vm::memory::{AccessError, Memory};

use crate::clock;
use crate::cpu::{self, ProcessorTlb};
use crate::entry::{self, Frame};
use crate::interrupts::{self, TIMER_VECTOR};
use crate::machine::{Machine, Registered};

/// Flags with which the kernel is entered.
const KERNEL_FLAGS: u64 = 0x202;

/// Takes every exception and interrupt.
#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    let vector = frame.vector as usize;
    let exception = frame.vector as u32;
    let from_ring_3 = frame.cs & 3 != 0;
    if vector >= entry::FIRST_INTERRUPT {
        interrupts::take(vector);
        if from_ring_3 {
            // SAFETY: ring 3 was running, so no other reference is in use.
            event(unsafe { Machine::get() }, frame, vector);
        }
        return;
    }
    let gate = (core::ptr::addr_of!(entry::system_call_entry) as u64
        ..core::ptr::addr_of!(entry::system_call_end) as u64)
        .contains(&frame.rip);
    if !(from_ring_3 || exception == exception::PAGE_FAULT && gate) {
        die(frame);
    }
    // SAFETY: ring 3 was running, or a system call gate, which uses no reference.
    let machine = unsafe { Machine::get() };
    let trap = if exception == exception::PAGE_FAULT {
        let address = cpu::fault_address();
        match first_touch(machine, address, frame.error as u32) {
            None => return,
            Some(_) if !from_ring_3 => die(frame),
            Some(trap) => trap,
        }
    } else {
        Trap {
            kind: TrapKind::Exception as u64,
            address: 0,
            exception,
            error: frame.error as u32,
        }
    };
    if fault(machine, frame, trap).is_err() {
        die(frame);
    }
}

/// Provides the page that was touched, or says why not.
fn first_touch(machine: &mut Machine, address: usize, error: u32) -> Option<Trap> {
    let access = match error & (page_fault::WRITE | page_fault::FETCH) {
        0 => Protection::READ,
        page_fault::WRITE => Protection::WRITE,
        _ => Protection::EXECUTE,
    };
    let kind = match machine.memory.resolve(address, access) {
        Ok(_) => return None,
        Err(AccessError::Exhausted) => TrapKind::Unavailable,
        Err(AccessError::Unmapped | AccessError::Denied) => TrapKind::Exception,
    };
    Some(Trap {
        kind: kind as u64,
        address: address as u64,
        exception: exception::PAGE_FAULT,
        error,
    })
}

/// A fault in ring 3 that the kernel has to know of.
fn fault(machine: &mut Machine, frame: &mut Frame, trap: Trap) -> Result<(), AccessError> {
    let rip = frame.rip as usize;
    let Some(registered) = &machine.registered else {
        return Err(AccessError::Unmapped);
    };
    if registered.user_copy.contains(&rip) {
        frame.rip = registered.user_copy_fault as u64;
        return Ok(());
    }
    let memory = &mut machine.memory;
    if !machine.kernel_text.contains(&rip) && !machine.stubs.contains(&rip) {
        return upcall(memory, registered, frame, trap, true);
    }
    if machine.kernel_faulted {
        return Err(AccessError::Denied);
    }
    machine.kernel_faulted = true;
    let context = memory.read_word(registered.cpu + offset_of!(CpuArea, fault_context))? as usize;
    let stack = memory.read_word(registered.cpu + offset_of!(CpuArea, fault_stack))?;
    save(memory, frame, context, trap, true)?;
    go(frame, registered.fault_entry, stack);
    Ok(())
}

/// An interrupt in ring 3: the timer or a device.
fn event(machine: &mut Machine, frame: &mut Frame, vector: usize) {
    if vector == TIMER_VECTOR {
        if clock::now() < machine.clock.deadline {
            // It came for a wait that is over, or the deadline was too far for the timer.
            machine.clock.arm(u64::MAX);
            return;
        }
        machine.clock.deadline = u64::MAX;
    } else if !interrupts::line_waits() {
        return;
    }
    let in_kernel = in_kernel(machine, frame);
    let Some(registered) = &machine.registered else {
        return;
    };
    let event = Trap {
        kind: TrapKind::Event as u64,
        ..Trap::default()
    };
    let resuming = registered.resume.contains(&(frame.rip as usize));
    let result = if in_kernel && !resuming {
        machine.set_pending()
    } else {
        upcall(&mut machine.memory, registered, frame, event, !resuming)
    };
    if result.is_err() {
        die(frame);
    }
}

/// Whether the kernel was interrupted, or a call of the kernel's to the shim. The clocks use no stack and may be called by programs too:
/// there the return address tells.
fn in_kernel(machine: &mut Machine, frame: &Frame) -> bool {
    let rip = frame.rip as usize;
    if machine.clocks.contains(&rip) {
        let caller = machine.memory.read_word(frame.rsp as usize);
        return caller.is_ok_and(|caller| machine.kernel_text.contains(&(caller as usize)));
    }
    machine.kernel_text.contains(&rip) || machine.stubs.contains(&rip)
}

/// Enters the kernel for the program's trap.
fn upcall(
    memory: &mut Memory<ProcessorTlb>,
    registered: &Registered,
    frame: &mut Frame,
    trap: Trap,
    store: bool,
) -> Result<(), AccessError> {
    let context = memory.read_word(registered.cpu + offset_of!(CpuArea, context))? as usize;
    let stack = memory.read_word(registered.cpu + offset_of!(CpuArea, upcall_stack))?;
    save(memory, frame, context, trap, store)?;
    go(frame, registered.upcall_entry, stack);
    Ok(())
}

fn go(frame: &mut Frame, entry: usize, stack: u64) {
    frame.rip = entry as u64;
    frame.rsp = stack;
    frame.rflags = KERNEL_FLAGS;
}

/// Stores what happened in the context, and the registers if they are not there already.
fn save(
    memory: &mut Memory<ProcessorTlb>,
    frame: &Frame,
    context: usize,
    trap: Trap,
    registers: bool,
) -> Result<(), AccessError> {
    if registers {
        memory.write(context, frame.registers.as_flattened())?;
        let rest = [frame.rip, frame.rflags].map(u64::to_le_bytes);
        memory.write(context + offset_of!(Context, rip), rest.as_flattened())?;
    }
    let exception = u64::from(trap.exception) | u64::from(trap.error) << 32;
    let trap = [trap.kind, trap.address, exception].map(u64::to_le_bytes);
    memory.write(context + offset_of!(Context, trap), trap.as_flattened())
}

/// The general registers in words, four in a line.
struct Shown<'a>(&'a Frame);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] = [
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        for (index, (name, value)) in NAMES.iter().zip(self.0.registers).enumerate() {
            let before = if index % 4 == 0 { '\n' } else { ' ' };
            let value = u64::from_le_bytes(value);
            write!(formatter, "{before}{name:3} {value:016x}")?;
        }
        Ok(())
    }
}

/// Ends the machine: a fault of the shim, or one that the kernel cannot take.
fn die(frame: &Frame) -> ! {
    crate::stop(
        kiln_abi::host::exit_code::KERNEL_PANIC,
        format_args!(
            "exception {} (error code {:#x}, address {:#x}) in ring {} at {:#x}{}",
            frame.vector,
            frame.error,
            cpu::fault_address(),
            frame.cs & 3,
            frame.rip,
            Shown(frame),
        ),
    )
}

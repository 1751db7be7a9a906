//! Segments, the task state with its trap stacks, the table of gates, and the registers that system calls go by.

use core::arch::asm;
use core::ptr::addr_of;

use crate::cell::Global;
use crate::cpu::{self, Features, msr};
use crate::entry::{self, FIRST_INTERRUPT, INTERRUPTS, ProcessorArea};

const CODE: u16 = 0x08;
/// Ring 0's data selector, by which SYSCALL loads the stack segment; `boot` has it too.
pub const DATA: u16 = 0x10;
/// Ring 3's data selector. SYSRET wants data and code in this order.
pub const USER_DATA: u16 = 0x18 | 3;
/// Ring 3's code selector.
pub const USER_CODE: u16 = 0x20 | 3;
const TASK: u16 = 0x28;

/// Trap stacks in the task state: for traps, and for what should never happen.
const TRAP_STACK: u8 = 1;
const PANIC_STACK: u8 = 2;

/// In a gate: ring 3 may use it; and what makes the stack for traps the one for what should never happen.
const RING_3: u64 = 3 << 45;
const OTHER_STACK: u64 = ((PANIC_STACK - TRAP_STACK) as u64) << 32;

const BREAKPOINT: usize = 3;
const NON_MASKABLE: usize = 2;
const DOUBLE_FAULT: usize = 8;
const MACHINE_CHECK: usize = 18;

/// Flags that SYSCALL clears: all but the fixed one; those that matter are IF, DF, TF, AC and NT.
const CLEARED_FLAGS: u64 = 0x3f_7fd5;

#[repr(C, packed(4))]
struct TaskState {
    reserved: u32,
    stacks: [u64; 3],
    reserved_2: u64,
    trap_stacks: [u64; 7],
    reserved_3: u64,
    reserved_4: u16,
    port_map: u16,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

static SEGMENTS: Global<[u64; 7]> = Global::new([
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
]);
static TASK_STATE: Global<TaskState> = Global::new(TaskState {
    reserved: 0,
    stacks: [0; 3],
    reserved_2: 0,
    trap_stacks: [0; 7],
    reserved_3: 0,
    reserved_4: 0,
    port_map: size_of::<TaskState>() as u16,
});
static GATES: Global<[[u64; 2]; 256]> = Global::new([[0; 2]; 256]);

/// The shim's data for the one processor.
pub static PROCESSOR: Global<ProcessorArea> = Global::new(ProcessorArea::new());

unsafe extern "C" {
    static shim_call_stack_top: u8;
    static shim_trap_stack_top: u8;
    static shim_panic_stack_top: u8;
}

/// Sets gates for handlers that lie 16 bytes apart, on the stack for traps.
fn set_gates(gates: Option<&mut [[u64; 2]]>, first: *const u8) {
    let mut handler = first as u64;
    for slot in gates.unwrap_or_default() {
        let low = handler & 0xffff
            | u64::from(CODE) << 16
            | u64::from(TRAP_STACK) << 32
            | 0x8e << 40
            | (handler >> 16 & 0xffff) << 48;
        *slot = [low, handler >> 32];
        handler += 16;
    }
}

/// Loads everything.
///
/// # Safety
///
/// To be called once, at the start, with interrupts off.
pub unsafe fn load(features: &Features) {
    // SAFETY: called once, so nobody else has a reference.
    let (segments, task, gates, processor) = unsafe {
        (
            SEGMENTS.get(),
            TASK_STATE.get(),
            GATES.get(),
            PROCESSOR.get(),
        )
    };
    task.trap_stacks[usize::from(TRAP_STACK) - 1] = addr_of!(shim_trap_stack_top) as u64;
    task.trap_stacks[usize::from(PANIC_STACK) - 1] = addr_of!(shim_panic_stack_top) as u64;
    let address = core::ptr::from_ref(task) as u64;
    let limit = size_of::<TaskState>() as u64 - 1;
    segments[5] = limit | (address & 0xff_ffff) << 16 | 0x89 << 40 | (address >> 24 & 0xff) << 56;
    segments[6] = address >> 32;

    let (exceptions, interrupts) = (
        addr_of!(entry::exception_gates),
        addr_of!(entry::interrupt_gates),
    );
    set_gates(gates.get_mut(..32), exceptions);
    set_gates(
        gates.get_mut(FIRST_INTERRUPT..FIRST_INTERRUPT + INTERRUPTS),
        interrupts,
    );
    gates[BREAKPOINT][0] |= RING_3;
    for number in [NON_MASKABLE, DOUBLE_FAULT, MACHINE_CHECK] {
        gates[number][0] += OTHER_STACK;
    }
    processor.stack = addr_of!(shim_call_stack_top) as usize;

    let segments_pointer = TablePointer {
        limit: (7 * 8 - 1) as u16,
        base: segments.as_ptr() as u64,
    };
    let gates_pointer = TablePointer {
        limit: (256 * 16 - 1) as u16,
        base: gates.as_ptr() as u64,
    };
    let entry = if features.smap {
        addr_of!(entry::system_call_entry_guarded)
    } else {
        addr_of!(entry::system_call_entry)
    };
    // SAFETY: the tables are complete and stay for good; code and data selectors mean what they meant before.
    unsafe {
        asm!(
            "lgdt [{segments}]",
            "lidt [{gates}]",
            "ltr {task:x}",
            segments = in(reg) &segments_pointer,
            gates = in(reg) &gates_pointer,
            task = in(reg) TASK,
            options(nostack),
        );
        cpu::write_msr(msr::STAR, u64::from(CODE) << 32 | 0x13 << 48);
        cpu::write_msr(msr::LSTAR, entry as u64);
        cpu::write_msr(msr::FMASK, CLEARED_FLAGS);
        cpu::write_msr(msr::GS_BASE, core::ptr::from_ref(processor) as u64);
        cpu::write_msr(msr::KERNEL_GS_BASE, 0);
    }
}

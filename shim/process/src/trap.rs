//! Signals to upcalls: the trap contract of [`kiln_abi::host`].
//!
//! Every signal that the host sends comes to one handler, on its own stack. It looks at what was interrupted and
//! either returns to it, or leaves for one of the kernel's entries without `rt_sigreturn`: signals are never blocked
//! (`SA_NODEFER`), so there is nothing to undo but the vector registers, which Linux has saved in the signal frame
//! and reset; they are loaded again from there.
//!
//! A second signal may come while the handler runs: it finds the shim's text interrupted, notes the event and
//! returns. Until the jump the stack pointer lies in the signal stack, so the second frame goes below the first. The
//! first handler looks for such an event before it goes back to what it interrupted: a program would run on without it,
//! and a kernel that is about to wait has looked already.

#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use kiln_abi::host::{Context, CpuArea, Trap, TrapKind, exception, exit_code};
use kiln_abi::process::EXIT_MEMORY;
use linux_raw_sys::general as raw;

use crate::memory::Standing;
use crate::message::Line;
use crate::state::{self, KERNEL_TEXT, RESUME, SHIM, USER_COPY, VDSO};
use crate::{linux, memory, time};

/// The part of Linux's `struct ucontext` for x86-64 that we use.
#[repr(C)]
pub struct SignalContext {
    flags: u64,
    link: u64,
    stack: [u64; 3],
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    rflags: u64,
    segments: u64,
    error: u64,
    trap_number: u64,
    old_mask: u64,
    fault_address: u64,
    vectors: u64,
}

/// The part of Linux's `siginfo_t` that we use.
#[repr(C)]
pub struct SignalInformation {
    signal: i32,
    error: i32,
    code: i32,
    padding: i32,
    /// `si_addr` for faults, `si_call_addr` for system calls.
    address: u64,
    /// `si_syscall`.
    system_call: i32,
    /// `si_arch`.
    architecture: u32,
}

/// `si_code` of a system call caught by syscall user dispatch.
const SYS_USER_DISPATCH: i32 = 2;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Bytes of the instruction `int 0x80`.
const INTERRUPT_LENGTH: u64 = 2;
/// The processor's error code for that instruction where it is not allowed: the gate's place in the interrupt table.
const INTERRUPT_ERROR: u32 = 0x80 << 3 | 2;
/// Faults of the kernel itself that are handed to it before the shim gives up on it.
const KERNEL_FAULTS: u32 = 16;

global_asm!(
    r#"
    .text
    .balign 64
    .globl kiln_signal
    .hidden kiln_signal
// (signal, siginfo, ucontext); on the stack the return address kiln_signal_return, then the ucontext.
kiln_signal:
    // Linux leaves the alignment check flag as the program had it; compiled code wants it off.
    test dword ptr [rdx + {rflags}], 0x40000
    jz 2f
    pushfq
    and dword ptr [rsp], ~0x40000
    popfq
2:  push rdx
    call {handle}
    pop rdi
    mov rsi, rdx
    test rax, rax
    jz kiln_return_check
3:  // rax: target, rdx: its stack, rdi: ucontext
    mov r8, rax
    mov r9, rdx
    mov rcx, [rdi + {vectors}]
    test rcx, rcx
    jz 5f
    // The software bytes of the frame (struct _fpx_sw_bytes) tell whether and what XSAVE stored.
    cmp dword ptr [rcx + 464], 0x46505853
    jne 4f
    mov eax, [rcx + 472]
    mov edx, [rcx + 476]
    // Not the protection keys: the kernel keeps the rights that a signal handler has.
    and eax, ~0x200
    xrstor64 [rcx]
    jmp 5f
4:  fxrstor64 [rcx]
5:  mov rsp, r9
    jmp r8
// An event came while a handler ran that was to go back; rdi: ucontext, which lies at a multiple of 16.
    .globl kiln_return_pending
    .hidden kiln_return_pending
kiln_return_pending:
    mov rsp, rdi
    push rdi
    push rdi
    call {event}
    pop rdi
    test rax, rax
    jnz 3b
    mov rsp, rdi
    jmp kiln_signal_return
"#,
    rflags = const core::mem::offset_of!(SignalContext, rflags),
    vectors = const core::mem::offset_of!(SignalContext, vectors),
    handle = sym handle,
    event = sym event,
);

unsafe extern "C" {
    fn kiln_signal();
}

/// Where the handler leaves to: in registers `rax` and `rdx`. Address 0: back to what was interrupted, and in place of
/// a stack the address of the flag for events that came meanwhile.
#[repr(C)]
pub struct Leave {
    address: usize,
    stack: usize,
}

fn back() -> Leave {
    Leave {
        address: 0,
        stack: state::pending() as usize,
    }
}

/// Kernel faults so far.
static FAULTS: AtomicU32 = AtomicU32::new(0);

/// Installs the handler for all signals that concern us. `stack` and `length`: the signal stack.
pub fn install(stack: usize, length: usize) -> Result<(), isize> {
    // `stack_t`: address, flags, size.
    let alternate = [stack, 0, length];
    // SAFETY: the memory is the signal stack's alone.
    let result = unsafe {
        linux::syscall(
            raw::__NR_sigaltstack,
            [alternate.as_ptr() as usize, 0, 0, 0, 0, 0],
        )
    };
    if result < 0 {
        return Err(result);
    }
    let flags =
        raw::SA_SIGINFO | raw::SA_ONSTACK | raw::SA_NODEFER | raw::SA_RESTART | raw::SA_RESTORER;
    // Linux's `struct sigaction`: handler, flags, restorer, mask.
    let action = [
        kiln_signal as *const () as usize,
        flags as usize,
        linux::signal_return(),
        0,
    ];
    let ignore = [1, 0, 0, 0];
    for (signal, action) in [
        (raw::SIGSYS, &action),
        (raw::SIGSEGV, &action),
        (raw::SIGBUS, &action),
        (raw::SIGILL, &action),
        (raw::SIGFPE, &action),
        (raw::SIGTRAP, &action),
        (raw::SIGALRM, &action),
        (raw::SIGPROF, &action),
        (raw::SIGIO, &action),
        (raw::SIGPIPE, &ignore),
    ] {
        // SAFETY: the handler keeps to the rules above.
        let result = unsafe {
            let arguments = [signal as usize, action.as_ptr() as usize, 0, 8, 0, 0];
            linux::syscall(raw::__NR_rt_sigaction, arguments)
        };
        if result < 0 {
            return Err(result);
        }
    }
    let none = 0u64;
    // SAFETY: reads the mask.
    let result = unsafe {
        let arguments = [
            raw::SIG_SETMASK as usize,
            &raw const none as usize,
            0,
            8,
            0,
            0,
        ];
        linux::syscall(raw::__NR_rt_sigprocmask, arguments)
    };
    if result < 0 { Err(result) } else { Ok(()) }
}

/// Sets the GS base.
pub fn set_gs_base(address: usize) {
    // SAFETY: FSGSBASE was checked at the start; the shim itself uses no GS.
    unsafe { asm!("wrgsbase {}", in(reg) address, options(nostack, preserves_flags)) };
}

/// The handler proper.
extern "C" fn handle(
    signal: u32,
    information: &SignalInformation,
    context: &mut SignalContext,
) -> Leave {
    match signal {
        raw::SIGALRM => {
            if time::timer_fired() {
                event(context)
            } else {
                back()
            }
        }
        raw::SIGIO => event(context),
        raw::SIGPROF => match memory::check() {
            Standing::Within => back(),
            Standing::Above => exhausted(context),
            Standing::FarAbove => {
                say_exhausted();
                linux::exit(EXIT_MEMORY)
            }
        },
        // Sent by hand, not by the host's kernel.
        _ if information.code <= 0 => back(),
        raw::SIGSYS => system_call(information, context),
        _ => fault(signal, information, context),
    }
}

/// Where the interrupted instruction lies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Program,
    Resume,
    UserCopy,
    /// The kernel's other text, the shim, the vDSO.
    Kernel,
}

fn place(address: u64) -> Place {
    let address = address as usize;
    if KERNEL_TEXT.contains(address) {
        if RESUME.contains(address) {
            Place::Resume
        } else if USER_COPY.contains(address) {
            Place::UserCopy
        } else {
            Place::Kernel
        }
    } else if SHIM.contains(address) || VDSO.contains(address) {
        Place::Kernel
    } else {
        Place::Program
    }
}

extern "C" fn event(context: &mut SignalContext) -> Leave {
    let trap = Trap {
        kind: TrapKind::Event as u64,
        ..Trap::default()
    };
    match place(context.rip) {
        Place::Program => upcall(context, trap, true),
        Place::Resume => upcall(context, trap, false),
        Place::UserCopy | Place::Kernel => {
            // SAFETY: the flag lives as long as the kernel.
            unsafe { state::pending().write_volatile(1) };
            if let Some(address) = linux::look_again(context.rip as usize) {
                context.rip = address as u64;
            }
            back()
        }
    }
}

/// The memory limit is passed: the program does not go on. The kernel goes on; it gets no more memory.
fn exhausted(context: &SignalContext) -> Leave {
    if !SAID_EXHAUSTED.swap(true, Relaxed) {
        say_exhausted();
    }
    let trap = Trap {
        kind: TrapKind::Exhausted as u64,
        ..Trap::default()
    };
    match place(context.rip) {
        Place::Program => upcall(context, trap, true),
        Place::Resume => upcall(context, trap, false),
        Place::UserCopy | Place::Kernel => back(),
    }
}

/// Once is enough: a program may go on with less.
static SAID_EXHAUSTED: AtomicBool = AtomicBool::new(false);

#[cold]
#[inline(never)]
fn say_exhausted() {
    Line::new()
        .text("out of memory: the instance has passed its limit of ")
        .decimal((memory::limit() >> 20) as usize)
        .text(" MiB (give it more with -m)")
        .print();
}

fn system_call(information: &SignalInformation, context: &mut SignalContext) -> Leave {
    let call = Trap {
        kind: TrapKind::SystemCall as u64,
        ..Trap::default()
    };
    if information.code != SYS_USER_DISPATCH {
        return kernel_fault(context, call);
    }
    // `int 0x80` and `sysenter`, which a Linux without support for 32-bit programs refuses like so. (After `sysenter`
    // the instruction pointer is where Linux thinks the 32-bit vDSO is.)
    if information.architecture != AUDIT_ARCH_X86_64 {
        let refused = Trap {
            kind: TrapKind::Exception as u64,
            address: 0,
            exception: exception::PROTECTION,
            error: INTERRUPT_ERROR,
        };
        return match place(context.rip) {
            Place::Program => {
                context.rip -= INTERRUPT_LENGTH;
                upcall(context, refused, true)
            }
            _ if VDSO.contains(context.rip as usize) => upcall(context, refused, true),
            _ => kernel_fault(context, call),
        };
    }
    if VDSO.contains(context.rip as usize) {
        return vdso_system_call(context);
    }
    match place(context.rip) {
        Place::Program => upcall(context, call, true),
        _ => kernel_fault(context, call),
    }
}

/// The vDSO could not read a clock in user mode and asked Linux: so do we, and do not use it again.
fn vdso_system_call(context: &mut SignalContext) -> Leave {
    if context.rax == u64::from(raw::__NR_clock_gettime) {
        time::vdso_needs_kernel();
        // SAFETY: the arguments are those of our own call of the vDSO; Linux checks the memory.
        let result = unsafe {
            let arguments = [context.rdi as usize, context.rsi as usize, 0, 0, 0, 0];
            linux::syscall(raw::__NR_clock_gettime, arguments)
        };
        context.rax = result as u64;
    } else {
        context.rax = linux::ENOSYS.wrapping_neg() as u64;
    }
    back()
}

fn fault(signal: u32, information: &SignalInformation, context: &mut SignalContext) -> Leave {
    let exception = context.trap_number as u32;
    let page_fault = exception == exception::PAGE_FAULT;
    let kind = if page_fault && signal == raw::SIGBUS {
        TrapKind::Unavailable
    } else {
        TrapKind::Exception
    };
    let trap = Trap {
        kind: kind as u64,
        address: if page_fault { information.address } else { 0 },
        exception,
        error: context.error as u32,
    };
    let step = exception == exception::DEBUG;
    match place(context.rip) {
        Place::Program => upcall(context, trap, true),
        // A single step that began before the jump to the program. The kernel cannot set the flag together with the
        // jump, but a return from a signal can.
        Place::Resume if step => {
            step_into_program(context);
            back()
        }
        Place::UserCopy | Place::Kernel if step => back(),
        // The jump itself failed (an address that is not canonical): the program's fault.
        Place::Resume => upcall(context, trap, false),
        Place::UserCopy => {
            context.rip = state::USER_COPY_FAULT.load(Relaxed) as u64;
            back()
        }
        Place::Kernel => kernel_fault(context, trap),
    }
}

/// Leaves for the kernel's upcall entry.
fn upcall(context: &SignalContext, trap: Trap, store: bool) -> Leave {
    let cpu = state::CPU.load(Relaxed);
    if cpu.is_null() {
        return kernel_fault(context, trap);
    }
    // SAFETY: the kernel has registered the area; `context` points to the running program's registers.
    unsafe {
        let CpuArea {
            context: to,
            upcall_stack,
            ..
        } = &*cpu;
        if store {
            (**to) = Context {
                trap,
                ..registers(context)
            };
        } else {
            (**to).trap = trap;
        }
        // Programs do not get to use GS, but nothing keeps one from writing it.
        set_gs_base(cpu as usize);
        Leave {
            address: state::UPCALL_ENTRY.load(Relaxed),
            stack: *upcall_stack,
        }
    }
}

/// Leaves for the kernel's fault entry; ends the instance if there is none yet, or it faults again and again.
fn kernel_fault(context: &SignalContext, trap: Trap) -> Leave {
    let cpu = state::CPU.load(Relaxed);
    let faults = FAULTS.fetch_add(1, Relaxed);
    if cpu.is_null() || faults >= KERNEL_FAULTS {
        give_up(context, trap, cpu.is_null());
    }
    // SAFETY: as in `upcall`.
    unsafe {
        let CpuArea {
            fault_context,
            fault_stack,
            ..
        } = &*cpu;
        if !fault_context.is_null() {
            (**fault_context) = Context {
                trap,
                ..registers(context)
            };
        }
        set_gs_base(cpu as usize);
        Leave {
            address: state::FAULT_ENTRY.load(Relaxed),
            stack: *fault_stack,
        }
    }
}

/// Says where the kernel faulted and ends the instance. Not a part of `kernel_fault`, whose stack it would enlarge:
/// a fault while a fault is stored comes back there again and again.
#[cold]
#[inline(never)]
fn give_up(context: &SignalContext, trap: Trap, early: bool) -> ! {
    let text = KERNEL_TEXT.get().start;
    let rip = context.rip as usize;
    Line::new()
        .text(if early {
            "the kernel faulted at its start"
        } else {
            "the kernel keeps faulting"
        })
        .text(": trap ")
        .decimal(trap.kind as usize)
        .text(", exception ")
        .decimal(trap.exception as usize)
        .text(", address ")
        .hexadecimal(trap.address as usize)
        .text(", instruction ")
        .hexadecimal(rip)
        .text(" (kernel text + ")
        .hexadecimal(rip.wrapping_sub(text))
        .text("), stack ")
        .hexadecimal(context.rsp as usize)
        .print();
    linux::exit(exit_code::KERNEL_PANIC)
}

/// Has the return from the signal do what the kernel was about to: load the program's registers and go there.
fn step_into_program(to: &mut SignalContext) {
    let cpu = state::CPU.load(Relaxed);
    if cpu.is_null() {
        return;
    }
    // SAFETY: as in `upcall`; in the stretch that was interrupted, the context holds all registers.
    let from = unsafe { (*cpu).context.read() };
    to.rax = from.rax;
    to.rbx = from.rbx;
    to.rcx = from.rcx;
    to.rdx = from.rdx;
    to.rsi = from.rsi;
    to.rdi = from.rdi;
    to.rbp = from.rbp;
    to.rsp = from.rsp;
    to.r8 = from.r8;
    to.r9 = from.r9;
    to.r10 = from.r10;
    to.r11 = from.r11;
    to.r12 = from.r12;
    to.r13 = from.r13;
    to.r14 = from.r14;
    to.r15 = from.r15;
    to.rip = from.rip;
    to.rflags = from.rflags;
}

fn registers(context: &SignalContext) -> Context {
    Context {
        rax: context.rax,
        rbx: context.rbx,
        rcx: context.rcx,
        rdx: context.rdx,
        rsi: context.rsi,
        rdi: context.rdi,
        rbp: context.rbp,
        rsp: context.rsp,
        r8: context.r8,
        r9: context.r9,
        r10: context.r10,
        r11: context.r11,
        r12: context.r12,
        r13: context.r13,
        r14: context.r14,
        r15: context.r15,
        rip: context.rip,
        rflags: context.rflags,
        trap: Trap::default(),
    }
}

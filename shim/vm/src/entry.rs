//! The gates between ring 3 and ring 0, in assembly.
//!
//! * *Stubs*: the functions of the host interface as the kernel sees them: a page of instructions that ring 3 may execute. Most
//!   make a system call; the clocks read the time without leaving ring 3, from the page that is mapped after the stubs.
//! * *System calls*: those from the stubs are the kernel's calls and go to [`SHIM_CALLS`](crate::calls::SHIM_CALLS) on a stack of
//!   the shim; all others are the program's: registers go to its context and the kernel's upcall entry continues, with no
//!   instruction that touches a vector register.
//! * *Traps*: exceptions and interrupts save all that Rust code may change, call [`trap`](crate::traps::trap) and return to where the
//!   frame then says.
//!
//! Ring 0 runs with interrupts off but for one instruction of `wait`. Every trap has a stack by the interrupt stack table, so that
//! the red zone of interrupted code, in either ring, stays whole.

use core::arch::global_asm;
use core::mem::offset_of;

use kiln_abi::host::{Context, CpuArea, TrapKind};

/// Bytes between two stubs.
pub const STUB_SIZE: usize = 32;
/// Functions in the host interface.
pub const CALLS: usize = 18;

/// The shim's own data for one processor, found through GS in ring 0.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct ProcessorArea {
    scratch: usize,
    user_stack: usize,
    /// Top of the stack for the kernel's calls.
    pub stack: usize,
    /// Where the stubs are mapped for ring 3.
    pub stubs: usize,
    /// The kernel's area, or 0 before it is registered.
    pub cpu: usize,
    /// Where upcalls go.
    pub upcall_entry: usize,
}

impl ProcessorArea {
    /// All zero.
    pub const fn new() -> Self {
        Self {
            scratch: 0,
            user_stack: 0,
            stack: 0,
            stubs: 0,
            cpu: 0,
            upcall_entry: 0,
        }
    }
}

/// What a trap saved.
#[repr(C)]
#[derive(Debug)]
pub struct Frame {
    vectors: [[u64; 2]; 16],
    padding: u64,
    /// The registers that a [`Context`] begins with, in its order, little endian.
    pub registers: [[u8; 8]; 16],
    /// Number of the exception or interrupt.
    pub vector: u64,
    /// The exception's error code, or 0.
    pub error: u64,
    /// Interrupted instruction.
    pub rip: u64,
    /// Code selector: tells the ring.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack selector.
    pub ss: u64,
}

unsafe extern "C" {
    /// The stubs' page.
    pub static shim_stubs_start: u8;
    /// `monotonic` in the stubs' page.
    pub static clock_monotonic: u8;
    /// `realtime` in the stubs' page.
    pub static clock_realtime: u8;
    /// Where SYSCALL goes.
    pub static system_call_entry: u8;
    /// Where SYSCALL goes if ring 0 is kept from ring 3's memory.
    pub static system_call_entry_guarded: u8;
    /// End of the system call gates, which touch ring 3's memory.
    pub static system_call_end: u8;
    /// The first of the gates of exceptions 0 to 31, 16 bytes each.
    pub static exception_gates: u8;
    /// The first of the gates of the interrupts from [`FIRST_INTERRUPT`] on.
    pub static interrupt_gates: u8;
    /// Continues at an address in ring 3 with its argument and stack.
    pub fn enter_kernel(argument: usize, stack: usize, entry: usize) -> !;
}

/// First vector that is used for interrupts.
pub const FIRST_INTERRUPT: usize = 64;
/// How many vectors there are from [`FIRST_INTERRUPT`] on.
pub const INTERRUPTS: usize = 64;

// The stubs, and the clocks after them. The page after the stubs' is `clock::SHIM_CLOCK`.
global_asm!(
    r#"
    .section .stubs, "ax"
    .set number, 0
    .rept {calls}
    .balign {stub_size}, 0xcc
    mov r10, rcx
    mov eax, number
    syscall
    ret
    .set number, number + 1
    .endr

    .macro clock_read
    lea r8, [rip + shim_stubs_end]
2:  mov r9, [r8]
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [r8 + 8]
    mul qword ptr [r8 + 16]
    shrd rax, rdx, 32
    add rax, [r8 + 24]
    mov rcx, [r8 + 32]
    cmp r9, [r8]
    jne 2b
    .endm

    .balign {stub_size}, 0xcc
    .globl clock_monotonic
clock_monotonic:
    clock_read
    ret
    .balign {stub_size}, 0xcc
    .globl clock_realtime
clock_realtime:
    clock_read
    add rax, rcx
    ret
    .text
"#,
    calls = const CALLS,
    stub_size = const STUB_SIZE,
);

// System calls. RCX holds the return address, R11 the flags; the stack is still ring 3's.
global_asm!(
    r#"
    .macro system_call guarded
    swapgs
    mov gs:[{scratch}], rbx
    mov rbx, rcx
    sub rbx, gs:[{stubs}]
    cmp rbx, 4096
    jb kernel_call
    mov rbx, gs:[{cpu}]
    .if \guarded
    stac
    .endif
    mov rbx, [rbx + {cpu_context}]
    // Only ring 3 has addresses of the lower half: nothing of the shim can be overwritten.
    test rbx, rbx
    js 3f
    mov [rbx + {rax}], rax
    mov rax, gs:[{scratch}]
    mov [rbx + {rbx}], rax
    mov [rbx + {rcx}], rcx
    mov [rbx + {rdx}], rdx
    mov [rbx + {rsi}], rsi
    mov [rbx + {rdi}], rdi
    mov [rbx + {rbp}], rbp
    mov [rbx + {rsp}], rsp
    mov [rbx + {r8}], r8
    mov [rbx + {r9}], r9
    mov [rbx + {r10}], r10
    mov [rbx + {r11}], r11
    mov [rbx + {r12}], r12
    mov [rbx + {r13}], r13
    mov [rbx + {r14}], r14
    mov [rbx + {r15}], r15
    mov [rbx + {rip}], rcx
    mov [rbx + {rflags}], r11
    mov qword ptr [rbx + {trap}], {kind}
    mov rax, gs:[{cpu}]
    mov rsp, [rax + {cpu_stack}]
    mov rcx, gs:[{upcall}]
    mov r11d, 0x202
    swapgs
    sysretq
3:  ud2
    .endm

    .globl system_call_entry, system_call_entry_guarded, system_call_end
    .balign 16
system_call_entry:
    system_call 0
    .balign 16
system_call_entry_guarded:
    system_call 1
system_call_end:

kernel_call:
    mov rbx, gs:[{scratch}]
    mov gs:[{user_stack}], rsp
    mov rsp, gs:[{stack}]
    push qword ptr gs:[{user_stack}]
    push rcx
    push r11
    push rbx
    cmp rax, {calls}
    jae 4f
    mov rcx, r10
    lea rbx, [rip + SHIM_CALLS]
    call [rbx + rax * 8]
5:  pop rbx
    pop r11
    pop rcx
    pop rsp
    swapgs
    sysretq
4:  mov rax, -38
    jmp 5b

    .globl enter_kernel
enter_kernel:
    push {user_data}
    push rsi
    push 0x202
    push {user_code}
    push rdx
    xor eax, eax
    xor ebx, ebx
    xor ecx, ecx
    xor edx, edx
    xor esi, esi
    xor ebp, ebp
    xor r8d, r8d
    xor r9d, r9d
    xor r10d, r10d
    xor r11d, r11d
    xor r12d, r12d
    xor r13d, r13d
    xor r14d, r14d
    xor r15d, r15d
    swapgs
    iretq
"#,
    scratch = const offset_of!(ProcessorArea, scratch),
    stubs = const offset_of!(ProcessorArea, stubs),
    cpu = const offset_of!(ProcessorArea, cpu),
    stack = const offset_of!(ProcessorArea, stack),
    user_stack = const offset_of!(ProcessorArea, user_stack),
    upcall = const offset_of!(ProcessorArea, upcall_entry),
    cpu_context = const offset_of!(CpuArea, context),
    cpu_stack = const offset_of!(CpuArea, upcall_stack),
    rax = const offset_of!(Context, rax),
    rbx = const offset_of!(Context, rbx),
    rcx = const offset_of!(Context, rcx),
    rdx = const offset_of!(Context, rdx),
    rsi = const offset_of!(Context, rsi),
    rdi = const offset_of!(Context, rdi),
    rbp = const offset_of!(Context, rbp),
    rsp = const offset_of!(Context, rsp),
    r8 = const offset_of!(Context, r8),
    r9 = const offset_of!(Context, r9),
    r10 = const offset_of!(Context, r10),
    r11 = const offset_of!(Context, r11),
    r12 = const offset_of!(Context, r12),
    r13 = const offset_of!(Context, r13),
    r14 = const offset_of!(Context, r14),
    r15 = const offset_of!(Context, r15),
    rip = const offset_of!(Context, rip),
    rflags = const offset_of!(Context, rflags),
    trap = const offset_of!(Context, trap),
    kind = const TrapKind::SystemCall as u64,
    calls = const CALLS,
    user_data = const crate::descriptors::USER_DATA as i32,
    user_code = const crate::descriptors::USER_CODE as i32,
);

// Traps. Exceptions 8, 10 to 14, 17, 21, 29 and 30 bring an error code; the others get a zero in its place.
global_asm!(
    r#"
    .globl exception_gates, interrupt_gates
    .balign 16
exception_gates:
    .set number, 0
    .rept 32
    .balign 16, 0xcc
    .if (0x60227d00 >> number) & 1
    .else
    push 0
    .endif
    push number
    jmp trap_common
    .set number, number + 1
    .endr
    .balign 16
interrupt_gates:
    .set number, {first}
    .rept {interrupts}
    .balign 16, 0xcc
    push 0
    push number
    jmp trap_common
    .set number, number + 1
    .endr

trap_common:
    push r15
    push r14
    push r13
    push r12
    push r11
    push r10
    push r9
    push r8
    push qword ptr [rsp + 13 * 8]           // interrupted RSP
    push rbp
    push rdi
    push rsi
    push rdx
    push rcx
    push rbx
    push rax
    cld
    // As after a system call. A trap leaves a null stack segment, for which translators of machine code, QEMU's at least, keep all of
    // ring 0's code a second time.
    mov eax, {data}
    mov ss, eax
    test byte ptr [rsp + 18 * 8 + 8], 3
    jz 2f
    swapgs
2:  sub rsp, 264
    movaps [rsp], xmm0
    movaps [rsp + 16], xmm1
    movaps [rsp + 32], xmm2
    movaps [rsp + 48], xmm3
    movaps [rsp + 64], xmm4
    movaps [rsp + 80], xmm5
    movaps [rsp + 96], xmm6
    movaps [rsp + 112], xmm7
    movaps [rsp + 128], xmm8
    movaps [rsp + 144], xmm9
    movaps [rsp + 160], xmm10
    movaps [rsp + 176], xmm11
    movaps [rsp + 192], xmm12
    movaps [rsp + 208], xmm13
    movaps [rsp + 224], xmm14
    movaps [rsp + 240], xmm15
    mov rdi, rsp
    call trap
    movaps xmm0, [rsp]
    movaps xmm1, [rsp + 16]
    movaps xmm2, [rsp + 32]
    movaps xmm3, [rsp + 48]
    movaps xmm4, [rsp + 64]
    movaps xmm5, [rsp + 80]
    movaps xmm6, [rsp + 96]
    movaps xmm7, [rsp + 112]
    movaps xmm8, [rsp + 128]
    movaps xmm9, [rsp + 144]
    movaps xmm10, [rsp + 160]
    movaps xmm11, [rsp + 176]
    movaps xmm12, [rsp + 192]
    movaps xmm13, [rsp + 208]
    movaps xmm14, [rsp + 224]
    movaps xmm15, [rsp + 240]
    add rsp, 264
    test byte ptr [rsp + 18 * 8 + 8], 3
    jz 3f
    swapgs
3:  pop rax
    pop rbx
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    pop rbp
    add rsp, 8
    pop r8
    pop r9
    pop r10
    pop r11
    pop r12
    pop r13
    pop r14
    pop r15
    add rsp, 16
    iretq
"#,
    data = const crate::descriptors::DATA as i32,
    first = const FIRST_INTERRUPT,
    interrupts = const INTERRUPTS,
);

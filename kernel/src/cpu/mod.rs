//! Switching between the kernel and a program.
//!
//! [`Cpu::run`] loads a program's registers, jumps into it, and comes back when it traps: a system call, a fault or an
//! event. The kernel is an ordinary caller of `run`: one kernel stack serves all threads.
//!
//! There are two ways back in:
//!
//! * the shim's upcall ([`kiln_abi::host`] tells the contract);
//! * the *fast entry*: a rewritten system-call site jumps straight here through [`CpuArea::fast_entry`], with the
//!   number in `eax` and the return address in `rcx`, never touching the program's stack.
//!
//! # Vector registers
//!
//! The kernel is compiled for baseline x86-64, so it clobbers only the low halves of `xmm0` to `xmm15` and MXCSR: those
//! are saved at every entry and loaded at every exit. Everything else (upper halves, AVX-512, x87) stays in the CPU while
//! the same thread goes on, and is saved with XSAVE only when another thread runs.

#![allow(unsafe_code)]

use alloc::{alloc::handle_alloc_error, boxed::Box, vec::Vec};
use core::{
    alloc::Layout,
    mem::offset_of,
    ptr::NonNull,
    sync::atomic::{AtomicPtr, AtomicU32, Ordering},
};

use kiln_abi::host::{
    BootInformation, Context, CpuArea, MemoryRange, Registration, Trap, TrapKind,
};

use crate::{Errno, Result, host::Host, memory::user};

/// All registers of a program's thread. Offsets are fixed: assembly uses them.
#[repr(C, align(64))]
pub struct UserContext {
    /// General registers.
    pub registers: Context,
    /// Low halves of the vector registers.
    xmm: [[u8; 16]; 16],
    /// SSE control and status.
    mxcsr: u32,
    padding: u32,
    /// FS base: the thread's pointer to its thread-local storage.
    pub fs_base: u64,
    /// Everything else, while the CPU holds another thread's.
    extended: ExtendedState,
}

const _: () = assert!(offset_of!(UserContext, xmm) == 192);
const _: () = assert!(offset_of!(UserContext, mxcsr) == 448);
const _: () = assert!(offset_of!(Context, rip) == 128);
const _: () = assert!(offset_of!(Context, trap) == 144);
const _: () = assert!(offset_of!(CpuArea, scratch) == 56);

/// Flags a program may change: carry, parity, adjust, zero, sign, trap, direction, overflow, alignment check, ID.
const PROGRAM_FLAGS: u64 = 0x24_0dd5;
/// Flags always set: the reserved bit and the interrupt flag.
const FIXED_FLAGS: u64 = 0x202;
/// Slot of the vDSO's clock function in [`CpuArea::scratch`].
const CLOCK_SLOT: usize = 8;
const _: () = assert!(offset_of!(CpuArea, scratch) + CLOCK_SLOT * 8 == 120);
/// Initial MXCSR: all exceptions masked.
const INITIAL_MXCSR: u32 = 0x1f80;
/// Offset of the XSAVE header in an XSAVE area.
const XSAVE_HEADER: usize = 512;

core::arch::global_asm!(
    ".pushsection .text.kiln_cpu, \"ax\", @progbits",
    ".globl kiln_run, kiln_resume_start, kiln_resume_end, kiln_upcall_entry, kiln_fast_entry, kiln_fault_entry",
    // kiln_run(rdi = UserContext): returns after the next trap.
    "kiln_run:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov gs:[24], rdi",
    "mov gs:[16], rsp",
    "ldmxcsr [rdi + 448]",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups xmm\\n, [rdi + 192 + 16 * \\n]",
    ".endr",
    "kiln_resume_start:",
    "cmp dword ptr gs:[48], 0",
    "jne 2f",
    "mov rax, [rdi + 128]",
    "mov gs:[56], rax",
    "push qword ptr [rdi + 136]",
    "popfq",
    "mov rax, [rdi + 0]",
    "mov rbx, [rdi + 8]",
    "mov rcx, [rdi + 16]",
    "mov rdx, [rdi + 24]",
    "mov rsi, [rdi + 32]",
    "mov rbp, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rsp, [rdi + 56]",
    "mov rdi, [rdi + 40]",
    "jmp qword ptr gs:[56]",
    "kiln_resume_end:",
    // An event came before the program ran: as if it had interrupted the program's next instruction.
    "2:",
    "mov qword ptr [rdi + 144], 2",
    "jmp kiln_leave",
    // A rewritten system-call site: eax = number, rcx = return address, rsp = the program's.
    "kiln_fast_entry:",
    "mov gs:[56], rdi",
    "mov rdi, gs:[24]",
    "mov [rdi + 56], rsp",
    "mov rsp, gs:[16]",
    "mov eax, eax",
    "mov [rdi + 0], rax",
    "mov [rdi + 8], rbx",
    "mov [rdi + 16], rcx",
    "mov [rdi + 24], rdx",
    "mov [rdi + 32], rsi",
    "mov rax, gs:[56]",
    "mov [rdi + 40], rax",
    "mov [rdi + 48], rbp",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "mov [rdi + 128], rcx",
    "pushfq",
    "pop rax",
    "mov [rdi + 136], rax",
    "mov [rdi + 88], rax",
    "mov qword ptr [rdi + 144], 1",
    "jmp kiln_save_vectors",
    // From the shim: registers are stored, rsp = gs:[16].
    "kiln_upcall_entry:",
    "mov rdi, gs:[24]",
    "kiln_save_vectors:",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups [rdi + 192 + 16 * \\n], xmm\\n",
    ".endr",
    "stmxcsr [rdi + 448]",
    "kiln_leave:",
    "cld",
    "push {mxcsr}",
    "ldmxcsr [rsp]",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    // From the shim: the kernel itself faulted; rsp = gs:[32], registers in gs:[40].
    "kiln_fault_entry:",
    "and rsp, -16",
    "mov rdi, gs:[40]",
    "call {fault}",
    "ud2",
    ".popsection",
    mxcsr = const INITIAL_MXCSR,
    fault = sym kernel_fault,
);

const _: () = assert!(offset_of!(CpuArea, upcall_stack) == 16);
const _: () = assert!(offset_of!(CpuArea, context) == 24);
const _: () = assert!(offset_of!(CpuArea, fault_context) == 40);
const _: () = assert!(offset_of!(CpuArea, pending) == 48);

unsafe extern "sysv64" {
    fn kiln_run(context: *mut core::ffi::c_void);
    static kiln_resume_start: u8;
    static kiln_resume_end: u8;
    static kiln_upcall_entry: u8;
    static kiln_fast_entry: u8;
    static kiln_fault_entry: u8;
}

/// Called by the fault entry: a fault of the kernel itself.
extern "sysv64" fn kernel_fault(context: &Context) -> ! {
    let trap = context.trap;
    panic!(
        "fault in the kernel: trap {}, exception {} at {:#x} (address {:#x}, error {:#x}), stack pointer {:#x}, frame {:#x}",
        trap.kind, trap.exception, context.rip, trap.address, trap.error, context.rsp, context.rbp
    )
}

/// An XSAVE area on the heap.
#[derive(Default)]
struct ExtendedState {
    area: Option<NonNull<u8>>,
    length: usize,
}

// SAFETY: the area is owned memory.
unsafe impl Send for ExtendedState {}
// SAFETY: it is changed only through a unique reference.
unsafe impl Sync for ExtendedState {}

impl ExtendedState {
    fn layout(length: usize) -> Layout {
        // XSAVE wants 64 bytes of alignment. The length is that of an existing CPU's area: it cannot overflow.
        Layout::from_size_align(length.max(XSAVE_HEADER + 64), 64)
            .unwrap_or(Layout::new::<[u128; 256]>())
    }

    /// The area, made (the initial state of everything) when missing.
    fn ensure(&mut self, length: usize) -> NonNull<u8> {
        if let Some(area) = self.area {
            return area;
        }
        let layout = Self::layout(length);
        // SAFETY: the layout is not empty.
        let area = unsafe { alloc::alloc::alloc(layout) };
        let Some(area) = NonNull::new(area) else {
            handle_alloc_error(layout)
        };
        self.area = Some(area);
        self.length = length;
        self.reset();
        area
    }

    /// Back to the initial state of everything, if there is an area.
    fn reset(&mut self) {
        let Some(area) = self.area else { return };
        // SAFETY: the area has the layout's size; the words lie in its first 576 bytes.
        unsafe {
            core::ptr::write_bytes(area.as_ptr(), 0, Self::layout(self.length).size());
            // The initial x87 control word and MXCSR.
            area.as_ptr().cast::<u16>().write(0x37f);
            area.as_ptr().add(24).cast::<u32>().write(INITIAL_MXCSR);
            // Components 0 (x87) and 1 (SSE) are present.
            area.as_ptr().add(XSAVE_HEADER).cast::<u64>().write(3);
        }
    }
}

impl Drop for ExtendedState {
    fn drop(&mut self) {
        if let Some(area) = self.area {
            // SAFETY: allocated by `ensure` with this layout.
            unsafe { alloc::alloc::dealloc(area.as_ptr(), Self::layout(self.length)) }
        }
    }
}

impl UserContext {
    /// Registers of a thread that starts at `entry` with `stack`, everything else in its initial state.
    #[must_use]
    pub fn new(entry: u64, stack: u64) -> Box<UserContext> {
        Box::new(UserContext {
            registers: Context {
                rip: entry,
                rsp: stack,
                rflags: FIXED_FLAGS,
                ..Context::default()
            },
            xmm: [[0; 16]; 16],
            mxcsr: INITIAL_MXCSR,
            padding: 0,
            fs_base: 0,
            extended: ExtendedState::default(),
        })
    }
}

/// The CPU: its area shared with the shim, and whose vector state it holds.
pub struct Cpu {
    area: NonNull<CpuArea>,
    /// The thread whose vector state is in the CPU (beyond the low halves), or null.
    owner: AtomicPtr<UserContext>,
    xsave_size: usize,
    xsave_mask: u64,
    kernel_text: MemoryRange,
}

// SAFETY: the area is reached by the owning CPU only.
unsafe impl Send for Cpu {}
// SAFETY: as above; the fields that change are atomic.
unsafe impl Sync for Cpu {}

/// Bytes of stack for reporting a fault of the kernel.
const FAULT_STACK: usize = 64 * 1024;

impl Cpu {
    /// Sets up the CPU area and tells the shim.
    ///
    /// # Errors
    /// When the shim refuses.
    pub fn start(host: &Host, boot: &BootInformation) -> Result<Cpu> {
        let stack = Box::leak(alloc::vec![0u128; FAULT_STACK / 16].into_boxed_slice());
        let area = Box::leak(Box::new(CpuArea {
            self_address: 0,
            fast_entry: &raw const kiln_fast_entry as usize,
            upcall_stack: 0,
            context: core::ptr::null_mut(),
            fault_stack: stack.as_ptr_range().end as usize,
            fault_context: Box::leak(Box::new(Context::default())),
            pending: 0,
            reserved: 0,
            scratch: [0; 9],
        }));
        area.self_address = core::ptr::from_mut(area) as usize;
        let (copy_start, copy_end, copy_fault) = user::copy_instructions();
        let resume_start = &raw const kiln_resume_start as usize;
        let area = NonNull::from(area);
        host.register(&Registration {
            cpu: area.as_ptr(),
            upcall_entry: &raw const kiln_upcall_entry as usize,
            fault_entry: &raw const kiln_fault_entry as usize,
            resume: MemoryRange {
                start: resume_start,
                length: &raw const kiln_resume_end as usize - resume_start,
            },
            user_copy: MemoryRange {
                start: copy_start,
                length: copy_end - copy_start,
            },
            user_copy_fault: copy_fault,
        })?;
        Ok(Cpu {
            area,
            owner: AtomicPtr::new(core::ptr::null_mut()),
            xsave_size: boot.xsave_size as usize,
            xsave_mask: boot.xsave_mask,
            kernel_text: boot.kernel_text,
        })
    }

    /// The flag by which the shim tells of events while the kernel runs.
    #[must_use]
    pub fn pending_flag(&self) -> &'static AtomicU32 {
        // SAFETY: the area lives for ever; shim and kernel access the flag as one word.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.area.as_ptr()).pending) }
    }

    /// Whether an event came that the main loop has not yet collected.
    #[inline]
    #[must_use]
    pub fn has_pending(&self) -> bool {
        self.pending_flag().load(Ordering::Relaxed) != 0
    }

    /// Takes note of all events so far; the caller collects them right after.
    pub fn clear_pending(&self) {
        self.pending_flag().store(0, Ordering::Relaxed);
    }

    /// Makes the next [`Cpu::run`] come back at once with an event.
    pub fn set_pending(&self) {
        self.pending_flag().store(1, Ordering::Relaxed);
    }

    /// Sets the function that the vDSO calls to read a clock (`kernel/vdso/vdso.S` knows its place in the CPU area).
    pub fn set_clock_function(&self, function: extern "sysv64" fn(u32) -> u64) {
        // SAFETY: the area lives for ever; no program runs while the kernel does.
        unsafe { (*self.area.as_ptr()).scratch[CLOCK_SLOT] = function as usize };
    }

    /// Runs a program's thread until it traps.
    pub fn run(&self, context: &mut UserContext) -> (TrapKind, Trap) {
        let context_pointer = core::ptr::from_mut(context);
        if self.owner.load(Ordering::Relaxed) != context_pointer {
            self.switch_to(context_pointer);
        }
        let registers = &mut context.registers;
        registers.rflags = (registers.rflags & PROGRAM_FLAGS) | FIXED_FLAGS;
        registers.trap = Trap::default();
        // SAFETY: the context is valid and stays put; the program's own actions cannot break Rust's memory any more
        // than its sharing of the address space allows anyway.
        unsafe { kiln_run(context_pointer.cast()) };
        let trap = context.registers.trap;
        (trap_kind(trap.kind), trap)
    }

    /// Puts the vector state and FS base of another thread into the CPU.
    #[cold]
    fn switch_to(&self, context: *mut UserContext) {
        let previous = self.owner.load(Ordering::Relaxed);
        // SAFETY: `owner` is cleared before its context is dropped (`forget`); `context` is the caller's unique borrow;
        // the areas are large enough and aligned; loads take what XSAVE stored or what `load_extended` checked.
        unsafe {
            if !previous.is_null() {
                let area = (*previous).extended.ensure(self.xsave_size);
                self.save(area.as_ptr());
                let base: u64;
                core::arch::asm!("rdfsbase {}", out(reg) base, options(nostack, nomem, preserves_flags));
                (*previous).fs_base = base;
            }
            let area = (*context).extended.ensure(self.xsave_size);
            self.restore(area.as_ptr());
            core::arch::asm!("wrfsbase {}", in(reg) (*context).fs_base, options(nostack, preserves_flags));
        }
        self.owner.store(context, Ordering::Relaxed);
    }

    /// # Safety
    /// `area` must have the XSAVE size and alignment.
    unsafe fn save(&self, area: *mut u8) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.xsave_size == 0 {
                core::arch::asm!("fxsave64 [{}]", in(reg) area, options(nostack));
            } else {
                core::arch::asm!(
                    "xsave64 [{}]",
                    in(reg) area,
                    in("eax") self.xsave_mask as u32,
                    in("edx") (self.xsave_mask >> 32) as u32,
                    options(nostack)
                );
            }
        }
    }

    /// # Safety
    /// `area` must hold a valid XSAVE image.
    unsafe fn restore(&self, area: *const u8) {
        // SAFETY: as the caller promises. The vector registers are clobbered, which the compiler is told.
        unsafe {
            if self.xsave_size == 0 {
                core::arch::asm!(
                    "fxrstor64 [{}]", in(reg) area,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nostack)
                );
            } else {
                core::arch::asm!(
                    "xrstor64 [{}]", in(reg) area,
                    in("eax") self.xsave_mask as u32,
                    in("edx") (self.xsave_mask >> 32) as u32,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nostack)
                );
            }
        }
    }

    /// Sets the FS base of a thread, in the CPU as well if it is the one that runs.
    pub fn set_fs_base(&self, context: &mut UserContext, base: u64) {
        context.fs_base = base;
        if self.owner.load(Ordering::Relaxed) == core::ptr::from_mut(context) {
            // SAFETY: the caller checked that the address is canonical; the kernel itself does not use FS.
            unsafe {
                core::arch::asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags))
            };
        }
    }

    /// The FS base of the thread that ran last (it may have used WRFSBASE itself).
    pub fn fs_base(&self, context: &mut UserContext) -> u64 {
        if self.owner.load(Ordering::Relaxed) == core::ptr::from_mut(context) {
            let base: u64;
            // SAFETY: reads a register.
            unsafe {
                core::arch::asm!("rdfsbase {}", out(reg) base, options(nostack, nomem, preserves_flags))
            };
            context.fs_base = base;
        }
        context.fs_base
    }

    /// Must be called before a context that ran is dropped.
    pub fn forget(&self, context: &mut UserContext) {
        let pointer = core::ptr::from_mut(context);
        let _ = self.owner.compare_exchange(
            pointer,
            core::ptr::null_mut(),
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// Bytes of the XSAVE image that signal frames carry.
    #[must_use]
    pub fn extended_size(&self) -> usize {
        if self.xsave_size == 0 {
            XSAVE_HEADER
        } else {
            self.xsave_size
        }
    }

    /// State components in an XSAVE image (`XCR0` bits), 0 for FXSAVE.
    #[must_use]
    pub fn extended_mask(&self) -> u64 {
        self.xsave_mask
    }

    /// A copy of all vector and x87 state of a thread, as an XSAVE image.
    pub fn save_extended(&self, context: &mut UserContext) -> Vec<u8> {
        let area = context.extended.ensure(self.xsave_size);
        if self.owner.load(Ordering::Relaxed) == core::ptr::from_mut(context) {
            // SAFETY: `ensure` gives a good area.
            unsafe { self.save(area.as_ptr()) };
        }
        // SAFETY: the area has this size and is initialised.
        let mut image =
            unsafe { core::slice::from_raw_parts(area.as_ptr(), self.extended_size()) }.to_vec();
        image[24..28].copy_from_slice(&context.mxcsr.to_le_bytes());
        for (index, register) in context.xmm.iter().enumerate() {
            image[160 + 16 * index..176 + 16 * index].copy_from_slice(register);
        }
        if let Some(header) = image.get_mut(XSAVE_HEADER) {
            // Component 1 (SSE) is present now.
            *header |= 2;
        }
        image
    }

    /// Replaces all vector and x87 state of a thread by an image that the program may have changed.
    ///
    /// # Errors
    /// `EINVAL` when the image has the wrong size.
    pub fn load_extended(&self, context: &mut UserContext, image: &[u8]) -> Result<()> {
        if image.len() != self.extended_size() || image.len() < XSAVE_HEADER {
            return Err(Errno::EINVAL);
        }
        let area = context.extended.ensure(self.xsave_size);
        // SAFETY: the area has `extended_size` bytes. What XRSTOR would fault on (reserved MXCSR bits, unknown
        // components, a compacted format, reserved header bytes) is overwritten with good values.
        unsafe {
            core::ptr::copy_nonoverlapping(image.as_ptr(), area.as_ptr(), image.len());
            let mxcsr = area.as_ptr().add(24).cast::<u32>();
            mxcsr.write(mxcsr.read() & 0xffff);
            context.mxcsr = mxcsr.read();
            if image.len() > XSAVE_HEADER {
                let components = area.as_ptr().add(XSAVE_HEADER).cast::<u64>();
                components.write(components.read() & self.xsave_mask);
                core::ptr::write_bytes(area.as_ptr().add(XSAVE_HEADER + 8), 0, 56);
                if components.read() & 2 == 0 {
                    core::ptr::write_bytes(area.as_ptr().add(160), 0, 256);
                }
            }
            for (index, register) in context.xmm.iter_mut().enumerate() {
                core::ptr::copy_nonoverlapping(
                    area.as_ptr().add(160 + 16 * index),
                    register.as_mut_ptr(),
                    16,
                );
            }
        }
        // The CPU's contents are stale now.
        self.forget_state_of(context);
        Ok(())
    }

    /// Puts all vector and x87 state of a thread back to its initial state, as Linux has it when a handler begins.
    pub fn reset_extended(&self, context: &mut UserContext) {
        context.extended.reset();
        context.xmm = [[0; 16]; 16];
        context.mxcsr = INITIAL_MXCSR;
        // The CPU's contents are stale now.
        self.forget_state_of(context);
    }

    fn forget_state_of(&self, context: &mut UserContext) {
        let _ = self.fs_base(context);
        self.forget(context);
    }

    /// A copy of a thread's registers for a new thread (`clone`).
    pub fn duplicate(&self, context: &mut UserContext) -> Box<UserContext> {
        let image = self.save_extended(context);
        let fs_base = self.fs_base(context);
        let mut copy = UserContext::new(0, 0);
        copy.registers = context.registers;
        copy.fs_base = fs_base;
        // The image has the right size: it was just made.
        let _ = self.load_extended(&mut copy, &image);
        copy
    }

    /// Where the kernel's text lies.
    #[must_use]
    pub fn kernel_text(&self) -> MemoryRange {
        self.kernel_text
    }
}

fn trap_kind(kind: u64) -> TrapKind {
    match kind {
        1 => TrapKind::SystemCall,
        2 => TrapKind::Event,
        3 => TrapKind::Exception,
        4 => TrapKind::Unavailable,
        5 => TrapKind::Exhausted,
        _ => TrapKind::None,
    }
}

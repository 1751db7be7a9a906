//! Entry, and the way to a program and back.

use core::arch::{asm, global_asm};

use kiln_abi::host::{BootInformation, Context, CpuArea, MemoryRange, Registration, Trap};

global_asm!(
    r#"
    .text
    .globl _start
// rdi: boot information. Applies relocations as the shim's own entry does.
_start:
    lea r8, [rip + __ehdr_start]
    lea r9, [rip + _DYNAMIC]
    xor r10d, r10d
    xor r11d, r11d
2:  mov rax, [r9]
    test rax, rax
    jz 4f
    cmp rax, 7
    cmove r10, [r9 + 8]
    cmp rax, 8
    cmove r11, [r9 + 8]
    add r9, 16
    jmp 2b
4:  add r10, r8
    add r11, r10
5:  cmp r10, r11
    jae 7f
    mov rax, [r10]
    mov rcx, [r10 + 16]
    add rcx, r8
    mov [r8 + rax], rcx
    add r10, 24
    jmp 5b
7:  and rsp, -16
    call {start}
    ud2

// (context, vector area, mask): runs the program until it traps.
    .globl run_program
    .hidden run_program
run_program:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov gs:[64], rsp
    lea rax, [rsp - 256]
    and rax, -16
    mov gs:[16], rax
    mov gs:[24], rdi
    mov rax, [rdi + 128]
    mov gs:[56], rax
    mov gs:[72], rsi
    mov gs:[80], rdx
    mov rax, rdx
    shr rdx, 32
    xrstor64 [rsi]
    .globl resume_start
    .hidden resume_start
resume_start:
    cmp dword ptr gs:[48], 0
    jne 2f
    push qword ptr [rdi + 136]
    popfq
    mov rax, [rdi]
    mov rbx, [rdi + 8]
    mov rcx, [rdi + 16]
    mov rdx, [rdi + 24]
    mov rsi, [rdi + 32]
    mov rbp, [rdi + 48]
    mov rsp, [rdi + 56]
    mov r8, [rdi + 64]
    mov r9, [rdi + 72]
    mov r10, [rdi + 80]
    mov r11, [rdi + 88]
    mov r12, [rdi + 96]
    mov r13, [rdi + 104]
    mov r14, [rdi + 112]
    mov r15, [rdi + 120]
    mov rdi, [rdi + 40]
    jmp qword ptr gs:[56]
    .globl resume_end
    .hidden resume_end
resume_end:

// An event came before the program could run: as if it had interrupted its first instruction.
2:  mov qword ptr [rdi + 144], 2
    .globl upcall_entry
    .hidden upcall_entry
upcall_entry:
    mov rsi, gs:[72]
    mov eax, gs:[80]
    mov edx, gs:[84]
    xsave64 [rsi]
    mov rsp, gs:[64]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

// A fault of the kernel's own: back to fault_probe's caller, with 1.
    .globl fault_entry
    .hidden fault_entry
fault_entry:
    mov rsp, gs:[96]
    mov eax, 1
    ret

// (function, argument) -> 0, or 1 if the call faulted.
    .globl fault_probe
    .hidden fault_probe
fault_probe:
    mov gs:[96], rsp
    mov rax, rdi
    mov rdi, rsi
    push rax
    call rax
    pop rcx
    xor eax, eax
    ret

    .globl store_byte
    .hidden store_byte
store_byte:
    mov byte ptr [rdi], 1
    ret
    .globl own_system_call
    .hidden own_system_call
own_system_call:
    mov eax, 39
    syscall
    ret

// (address) -> the byte there, or -1.
    .globl user_copy
    .hidden user_copy
user_copy:
    movzx eax, byte ptr [rdi]
    .globl user_copy_end
    .hidden user_copy_end
user_copy_end:
    ret
    .globl user_copy_fault
    .hidden user_copy_fault
user_copy_fault:
    mov eax, -1
    ret
"#,
    start = sym crate::start,
);

unsafe extern "C" {
    fn run_program(context: *mut Context, vectors: *mut u8, mask: u64);
    fn resume_start();
    fn resume_end();
    fn upcall_entry();
    fn fault_entry();
    fn fault_probe(function: unsafe extern "C" fn(usize), argument: usize) -> i32;
    fn store_byte(address: usize);
    fn own_system_call(unused: usize);
    fn user_copy(address: usize) -> i32;
    fn user_copy_end();
    fn user_copy_fault();
}

/// Room for vector registers.
#[repr(C, align(64))]
pub struct Vectors(pub [u8; 16384]);

/// A CPU with a program on it.
pub struct Machine {
    boot: &'static BootInformation,
    /// The program's registers.
    pub context: Context,
    /// The program's vector registers, as XSAVE stores them.
    pub vectors: Vectors,
    cpu: CpuArea,
    fault_context: Context,
}

static mut MACHINE: core::mem::MaybeUninit<Machine> = core::mem::MaybeUninit::uninit();

fn range(start: usize, end: usize) -> MemoryRange {
    MemoryRange {
        start,
        length: end - start,
    }
}

impl Machine {
    /// Registers with the shim.
    #[expect(clippy::mut_from_ref, reason = "the machine is a static of its own")]
    pub fn new(boot: &'static BootInformation) -> &'static mut Self {
        let empty = Context::default();
        // SAFETY: called once; there is one thread.
        let machine = unsafe {
            let place = &raw mut MACHINE;
            (*place).write(Self {
                boot,
                context: Context {
                    rflags: 0x202,
                    ..empty
                },
                vectors: Vectors([0; 16384]),
                cpu: CpuArea {
                    self_address: 0,
                    fast_entry: 0,
                    upcall_stack: 0,
                    context: core::ptr::null_mut(),
                    fault_stack: 0,
                    fault_context: core::ptr::null_mut(),
                    pending: 0,
                    reserved: 0,
                    scratch: [0; 9],
                },
                fault_context: empty,
            })
        };
        // Initial state but for MXCSR, whose default is not zero.
        machine.vectors.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        machine.vectors.0[512] = 3;
        machine.cpu.context = &raw mut machine.context;
        machine.cpu.fault_context = &raw mut machine.fault_context;
        let registration = Registration {
            cpu: &raw mut machine.cpu,
            upcall_entry: upcall_entry as *const () as usize,
            fault_entry: fault_entry as *const () as usize,
            resume: range(
                resume_start as *const () as usize,
                resume_end as *const () as usize,
            ),
            user_copy: range(
                user_copy as *const () as usize,
                user_copy_end as *const () as usize,
            ),
            user_copy_fault: user_copy_fault as *const () as usize,
        };
        let result = (boot.host.register)(&registration);
        crate::check(boot, result == 0, "register", &[result as u64]);
        machine
    }

    /// Runs the program until it traps.
    pub fn run(&mut self) -> Trap {
        self.context.trap = Trap::default();
        // SAFETY: registered; programs are our own.
        unsafe {
            let context = &raw mut self.context;
            run_program(context, self.vectors.0.as_mut_ptr(), self.boot.xsave_mask);
            (&raw const self.context.trap).read_volatile()
        }
    }

    /// Reads and clears the flag for events.
    pub fn take_pending(&mut self) -> bool {
        let pending = &raw mut self.cpu.pending;
        // SAFETY: our own field, which signal handlers set.
        unsafe {
            let set = pending.read_volatile() != 0;
            pending.write_volatile(0);
            set
        }
    }

    /// Looks at the flag for events.
    pub fn pending(&self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const self.cpu.pending).read_volatile() != 0 }
    }

    /// Stores to kernel memory; true if that faulted, as `fault_context` must then say.
    pub fn store_faults(&mut self, address: usize) -> bool {
        // SAFETY: the tests give addresses where a store does no harm.
        unsafe { fault_probe(store_byte, address) != 0 }
    }

    /// Makes a system call from kernel text; true if that faulted.
    pub fn own_system_call_faults(&mut self) -> bool {
        // SAFETY: `getpid` at worst.
        unsafe { fault_probe(own_system_call, 0) != 0 }
    }

    /// The page that faults are stored in.
    pub fn fault_page(&self) -> usize {
        &raw const self.fault_context as usize & !4095
    }

    /// What the last fault of the kernel itself was.
    pub fn fault(&self) -> Context {
        // SAFETY: our own field, which signal handlers write.
        unsafe { (&raw const self.fault_context).read_volatile() }
    }
}

/// Reads a byte of program memory as kernels do.
pub fn read_user(address: usize) -> i32 {
    // SAFETY: faults are handled.
    unsafe { user_copy(address) }
}

/// Ends by an invalid instruction, which is a fault of the kernel itself.
pub fn stop() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("ud2", options(noreturn)) }
}

//! A kernel that tests the shim: it uses each promise of the host interface once and says on the console which ones hold. Booted by
//! `tests/boot.rs`, which reads what it says.

#![no_std]
#![no_main]

use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::mem::offset_of;
use core::ptr::{addr_of, addr_of_mut};

use kiln_abi::host::{
    BOOT_MAGIC, BootInformation, Context, CpuArea, Event, KERNEL_RANGE_START, MemoryRange,
    PROGRAM_END, Protection, Registration, Source, TrapKind, VERSION, exception, page_fault,
};

const READ: u32 = Protection::READ.bits();
const BOTH: u32 = Protection::READ.union(Protection::WRITE).bits();
const CODE: u32 = Protection::READ.union(Protection::EXECUTE).bits();
const PROGRAM: usize = 0x40_0000;
const ZERO: u32 = Source::Zero as u32;
const MILLISECOND: u64 = 1_000_000;

static mut BOOT: *const BootInformation = core::ptr::null();
static mut CONTEXT: Context = new_context();
static mut FAULT_CONTEXT: Context = new_context();
static mut STACKS: [[u128; 1024]; 2] = [[0; 1024]; 2];
static mut CPU: CpuArea = CpuArea {
    self_address: 0,
    fast_entry: 0,
    upcall_stack: 0,
    context: core::ptr::null_mut(),
    fault_stack: 0,
    fault_context: core::ptr::null_mut(),
    pending: 0,
    reserved: 0,
    scratch: [0; 9],
};

const fn new_context() -> Context {
    // SAFETY: all of it is numbers, for which zero is a value.
    unsafe { core::mem::zeroed() }
}

unsafe extern "C" {
    fn run_program(context: *const Context);
    fn copy_byte(address: usize) -> isize;
    static upcall_entry: u8;
    static fault_entry: u8;
    static resume_start: u8;
    static resume_end: u8;
    static copy_start: u8;
    static copy_end: u8;
    static copy_fault: u8;
}

global_asm!(
    r#"
    .globl _start
_start:
    push rdi
    // Apply R_X86_64_RELATIVE relocations.
    lea rax, [rip + __ehdr_start]
    lea rsi, [rip + _DYNAMIC]
    xor ecx, ecx
    xor edx, edx
1:  mov r8, [rsi]
    mov r9, [rsi + 8]
    add rsi, 16
    cmp r8, 7
    cmove rcx, r9
    cmp r8, 8
    cmove rdx, r9
    test r8, r8
    jnz 1b
    add rcx, rax
    add rdx, rcx
2:  cmp rcx, rdx
    jae 3f
    mov r8, [rcx]
    mov r9, [rcx + 16]
    add r9, rax
    mov [rax + r8], r9
    add rcx, 24
    jmp 2b
3:  pop rdi
    sub rsp, 8
    call kernel_main

    .globl run_program
run_program:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov gs:[{scratch}], rsp
    mov rax, [rdi + {rip}]
    mov gs:[{scratch} + 8], rax
    push qword ptr [rdi + {rflags}]
    popfq
    mov rsp, [rdi + {rsp}]
    mov rax, [rdi + {rax}]
    mov rbx, [rdi + {rbx}]
    mov rdi, [rdi + {rdi}]
    .globl resume_start
resume_start:
    cmp dword ptr gs:[{pending}], 0
    jne upcall_entry
    jmp gs:[{scratch} + 8]
    .globl resume_end
resume_end:

    .globl upcall_entry
upcall_entry:
    mov rsp, gs:[{scratch}]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .globl copy_byte, copy_start, copy_end, copy_fault
copy_byte:
    mov eax, 14
copy_start:
    movzx edi, byte ptr [rdi]
copy_end:
    mov eax, edi
    ret
copy_fault:
    neg rax
    ret

    .globl fault_entry
fault_entry:
    sub rsp, 8
    and rsp, -16
    call kernel_fault
    "#,
    scratch = const offset_of!(CpuArea, scratch),
    pending = const offset_of!(CpuArea, pending),
    rip = const offset_of!(Context, rip),
    rflags = const offset_of!(Context, rflags),
    rsp = const offset_of!(Context, rsp),
    rax = const offset_of!(Context, rax),
    rbx = const offset_of!(Context, rbx),
    rdi = const offset_of!(Context, rdi),
);

fn boot() -> &'static BootInformation {
    // SAFETY: set first thing; mapped for good.
    unsafe { &*BOOT }
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        (boot().host.console_write)(text.as_ptr(), text.len());
        Ok(())
    }
}

macro_rules! check {
    ($name:literal, $($condition:expr),+ $(,)?) => {
        $(if !$condition { let _ = writeln!(Console, "FAILED {}: {}", $name, stringify!($condition)); })+
        let _ = writeln!(Console, "checked {}", $name);
    };
}

fn text(range: MemoryRange) -> &'static [u8] {
    // SAFETY: the shim says that it is mapped.
    unsafe { core::slice::from_raw_parts(range.start as *const u8, range.length) }
}

/// Runs code in a fresh program page at [`PROGRAM`] until it traps.
fn program(code: &[u8]) {
    let host = &boot().host;
    (host.map)(PROGRAM, 4096, BOTH, ZERO, 0);
    // SAFETY: just mapped.
    unsafe { core::ptr::copy_nonoverlapping(code.as_ptr(), PROGRAM as *mut u8, code.len()) };
    (host.protect)(PROGRAM, 4096, CODE);
    // SAFETY: nobody else looks at it.
    unsafe {
        CONTEXT = new_context();
        CONTEXT.rip = PROGRAM as u64;
        CONTEXT.rflags = 0x202;
    }
    again();
}

fn again() {
    // SAFETY: the program is mapped, the context is its.
    unsafe { run_program(addr_of!(CONTEXT)) };
}

fn context() -> Context {
    // SAFETY: a copy.
    unsafe { addr_of!(CONTEXT).read_volatile() }
}

fn pending() -> bool {
    // SAFETY: a number that the shim sets.
    unsafe { addr_of!(CPU.pending).read_volatile() != 0 }
}

fn clear_pending() {
    // SAFETY: as above.
    unsafe { addr_of_mut!(CPU.pending).write_volatile(0) }
}

#[unsafe(no_mangle)]
extern "C" fn kernel_main(information: &'static BootInformation) -> ! {
    // SAFETY: nobody else runs.
    unsafe { BOOT = information };
    let host = &information.host;
    check!(
        "boot information",
        information.magic == BOOT_MAGIC,
        information.version == VERSION,
        text(information.program) == b"a program",
        text(information.configuration).starts_with(b"{\"realtime\":"),
        text(information.root).len() == 5000,
        text(information.root)
            .iter()
            .enumerate()
            .all(|(index, &byte)| byte == (index / 7) as u8),
        text(information.kernel_file).starts_with(b"\x7fELF"),
        information.kernel.start >= PROGRAM_END,
        information.memory_limit > 1 << 20,
        information.dma.length >= 512 << 10,
        information.xsave_size >= 512,
    );
    let _ = writeln!(
        Console,
        "kernel at {:#x}, {} KiB free",
        information.kernel.start,
        information.memory_limit >> 10
    );
    for device in information
        .devices
        .iter()
        .take(information.device_count as usize)
    {
        // SAFETY: the shim says that it is mapped.
        let magic = unsafe { (device.registers as *const u32).read_volatile() };
        let _ = writeln!(
            Console,
            "device {} line {} magic {magic:#x}",
            device.kind, device.interrupt
        );
    }
    memory();
    let start = (host.monotonic)();
    time();
    // SAFETY: nobody else looks at it.
    unsafe {
        CPU.self_address = addr_of!(CPU) as usize;
        CPU.context = addr_of_mut!(CONTEXT);
        CPU.fault_context = addr_of_mut!(FAULT_CONTEXT);
        CPU.upcall_stack = addr_of!(STACKS[1]) as usize;
        CPU.fault_stack = addr_of!(STACKS) as usize + size_of::<[[u128; 1024]; 2]>();
    }
    let range = |start: *const u8, end: *const u8| MemoryRange {
        start: start as usize,
        length: end as usize - start as usize,
    };
    let registration = Registration {
        cpu: addr_of_mut!(CPU),
        upcall_entry: addr_of!(upcall_entry) as usize,
        fault_entry: addr_of!(fault_entry) as usize,
        resume: range(addr_of!(resume_start), addr_of!(resume_end)),
        user_copy: range(addr_of!(copy_start), addr_of!(copy_end)),
        user_copy_fault: addr_of!(copy_fault) as usize,
    };
    check!(
        "registration",
        (host.register)(&registration) == 0,
        (host.register)(&registration) < 0
    );
    programs();
    events();
    speed();
    let _ = writeln!(
        Console,
        "{} us since the start of the tests",
        ((host.monotonic)() - start) / 1000
    );
    let _ = writeln!(Console, "faulting");
    // SAFETY: faults on purpose.
    unsafe { asm!("mov rax, [{}]", in(reg) 0x1234usize, out("rax") _) };
    (host.exit)(1)
}

fn memory() {
    let host = &boot().host;
    let at = KERNEL_RANGE_START;
    let used = (host.memory_used)();
    check!(
        "reserving",
        (host.map)(at, 1 << 30, BOTH, ZERO, 0) == 0,
        (host.map)(PROGRAM, 64 << 30, BOTH, ZERO, 0) == 0,
        (host.memory_used)() == used,
    );
    // SAFETY: just mapped.
    unsafe {
        (at as *mut u64).write_volatile(7);
        check!(
            "first touch",
            ((at + (1 << 29)) as *const u64).read_volatile() == 0,
            (host.memory_used)() == used + 8192
        );
    }
    check!(
        "bad arguments",
        (host.map)(at, 4096, BOTH | CODE, ZERO, 0) == -13,
        (host.protect)(at, 4096, BOTH | CODE) == -13,
        (host.map)(at + 1, 4096, BOTH, ZERO, 0) == -22,
        (host.map)(at, 0, BOTH, ZERO, 0) == -22,
        (host.map)(at, 4096, 8, ZERO, 0) == -22,
        (host.map)(at, 4096, BOTH, 9, 0) == -22,
        (host.map)(0, 4096, BOTH, ZERO, 0) == -22,
        (host.map)(PROGRAM_END - 4096, 8192, BOTH, ZERO, 0) == -22,
        (host.map)(at, usize::MAX & !4095, BOTH, ZERO, 0) == -22,
        (host.map)(at, 1 << 20, READ, Source::Root as u32, 0) == -22,
        (host.unmap)(boot().kernel.start, 4096) == -22,
        (host.protect)(boot().kernel.start, 4096, BOTH) == -13,
        (host.unmap)(usize::MAX & !4095, 8192) == -22,
        (host.descriptor_close)(0) == -38,
        (host.entropy)(0x10 as *mut u8, 4) == -14,
        (host.console_write)(usize::MAX as *const u8, 4) == -14,
    );
    // SAFETY: mapped by the calls before.
    unsafe {
        check!(
            "root and pool",
            (host.map)(PROGRAM, 8192, BOTH, Source::Root as u32, 0) == 0,
            (PROGRAM as *const u8).add(700).read_volatile() == 100,
            {
                (PROGRAM as *mut u8).add(700).write_volatile(1);
                (PROGRAM as *const u8).add(700).read_volatile() == 1
                    && text(boot().root)[700] == 100
            },
            (host.discard)(PROGRAM, 4096) == 0,
            (PROGRAM as *const u8).add(700).read_volatile() == 100,
            (host.map)(PROGRAM, 8192, BOTH, Source::Pool as u32, 0x10000) == 0,
            (host.map)(at + 8192, 4096, BOTH, Source::Pool as u32, 0x11000) == 0,
            {
                ((PROGRAM + 4096) as *mut u64).write_volatile(99);
                ((at + 8192) as *const u64).read_volatile() == 99
            },
            (host.unmap)(at, 1 << 30) == 0,
            (host.unmap)(PROGRAM, 64 << 30) == 0,
        );
    }
    let (mut one, mut other) = ([0u64; 5], [0u64; 5]);
    check!(
        "entropy",
        (host.entropy)(one.as_mut_ptr().cast(), 37) == 37,
        (host.entropy)(other.as_mut_ptr().cast(), 40) == 40,
        one != other && one[0] != one[1] && one[4] >> 40 == 0,
    );
}

fn time() {
    let host = &boot().host;
    let mut last = (host.monotonic)();
    let start = last;
    let mut forward = true;
    for _ in 0..1000 {
        let now = (host.monotonic)();
        forward &= now >= last;
        last = now;
    }
    let _ = writeln!(Console, "clock: {} ns a call", (last - start) / 1000);
    let mut events = [Event::default(); 4];
    let before = (host.monotonic)();
    let count = (host.wait)(events.as_mut_ptr(), 4, before + 30 * MILLISECOND);
    let took = (host.monotonic)() - before;
    check!(
        "waiting",
        forward,
        count == 0,
        took >= 30 * MILLISECOND,
        took < 200 * MILLISECOND
    );
    check!("not waiting", (host.wait)(events.as_mut_ptr(), 4, 0) == 0);
    let _ = writeln!(Console, "waited {} us", took / 1000);
}

fn programs() {
    let is = |kind: TrapKind| context().trap.kind == kind as u64;
    let raised = |number| is(TrapKind::Exception) && context().trap.exception == number;
    // mov eax, 39; mov ebx, 5; movd xmm3, ebx; syscall
    program(b"\xb8\x27\0\0\0\xbb\x05\0\0\0\x66\x0f\x6e\xdb\x0f\x05");
    let vector: u32;
    // SAFETY: reads a register.
    unsafe { asm!("movd {:e}, xmm3", out(reg) vector) };
    check!(
        "system call",
        is(TrapKind::SystemCall),
        context().rax == 39,
        context().rbx == 5,
        context().rip == PROGRAM as u64 + 16,
        context().rcx == PROGRAM as u64 + 16,
        context().rflags & 0x200 != 0,
        vector == 5,
    );
    // mov [0x12345000], eax
    program(b"\x89\x04\x25\0\x50\x34\x12");
    check!(
        "fault at an unmapped address",
        raised(exception::PAGE_FAULT),
        context().trap.address == 0x1234_5000,
        context().trap.error == page_fault::WRITE | page_fault::USER,
        context().rip == PROGRAM as u64,
    );
    // mov [0x400000], eax
    program(b"\x89\x04\x25\0\0\x40\0");
    check!(
        "fault at a read-only address",
        raised(exception::PAGE_FAULT),
        context().trap.error == page_fault::WRITE | page_fault::USER | page_fault::PRESENT,
    );
    // jmp to a page that is not executable
    (boot().host.map)(PROGRAM + 0x10000, 4096, BOTH, ZERO, 0);
    program(b"\xe9\xfb\xff\0\0");
    check!(
        "no execution of data",
        raised(exception::PAGE_FAULT),
        context().trap.address == PROGRAM as u64 + 0x10000,
        context().trap.error == page_fault::FETCH | page_fault::USER,
    );
    program(b"\x31\xc9\xf7\xf1");
    check!(
        "division by zero",
        raised(exception::DIVIDE),
        context().rip == PROGRAM as u64 + 2
    );
    program(b"\x0f\x0b");
    check!(
        "invalid instruction",
        raised(exception::INVALID_INSTRUCTION)
    );
    program(b"\x90\xcc");
    check!(
        "breakpoint",
        raised(exception::BREAKPOINT),
        context().rip == PROGRAM as u64 + 2
    );
    program(b"\xfa");
    check!("privileged instruction", raised(exception::PROTECTION));
    program(b"\xe6\x80");
    check!("port output", raised(exception::PROTECTION));
    // mov rax, 0x8000000000000000; mov al, [rax]
    program(b"\x48\xb8\0\0\0\0\0\0\0\x80\x8a\0");
    check!("non-canonical address", raised(exception::PROTECTION));
    // mov rax, -0x80000000 + 0x113000 (the shim's data); mov [rax], al
    program(b"\x48\xc7\xc0\0\x30\x11\x80\x88\0");
    check!(
        "the shim is closed",
        raised(exception::PAGE_FAULT),
        context().trap.address == 0xffff_ffff_8011_3000
    );
    // mov rax, the stub page's register function; call with a wrong number: a program cannot reach the shim by itself
    program(b"\x9c\x58");
    check!("a stack that is not there", raised(exception::PAGE_FAULT));
    // SAFETY: the copy faults and recovers.
    unsafe {
        check!(
            "copying from a bad pointer",
            copy_byte(0x9999_0000) == -14,
            copy_byte(PROGRAM) == 0x9c
        );
    }
}

fn events() {
    let host = &boot().host;
    (host.set_timer)((host.monotonic)() + 5 * MILLISECOND);
    // mov ebx, 77; movd xmm5, ebx; jmp self
    program(b"\xbb\x4d\0\0\0\x66\x0f\x6e\xeb\xeb\xfe");
    let vector: u32;
    // SAFETY: reads a register.
    unsafe { asm!("movd {:e}, xmm5", out(reg) vector) };
    check!(
        "timer in a program",
        context().trap.kind == TrapKind::Event as u64,
        context().rip == PROGRAM as u64 + 9,
        context().rbx == 77,
        vector == 77,
        !pending(),
    );
    for _ in 0..100 {
        (host.set_timer)((host.monotonic)() + 20_000);
        again();
        clear_pending();
    }
    check!(
        "many timers",
        context().rip == PROGRAM as u64 + 9,
        context().rbx == 77
    );
    (host.set_timer)((host.monotonic)() + 2 * MILLISECOND);
    let end = (host.monotonic)() + 500 * MILLISECOND;
    while !pending() && (host.monotonic)() < end {}
    check!("timer in the kernel", pending());
    let mut event = Event::default();
    check!(
        "no waiting while an event is pending",
        (host.wait)(&mut event, 1, u64::MAX) == 0
    );
    clear_pending();
    (host.set_timer)((host.monotonic)() + 2 * MILLISECOND);
    check!(
        "timer ends waiting",
        (host.wait)(&mut event, 1, u64::MAX) == 0,
        pending()
    );
    clear_pending();
    (host.set_timer)((host.monotonic)() + 2 * MILLISECOND);
    (host.set_timer)(u64::MAX);
    let until = (host.monotonic)() + 10 * MILLISECOND;
    check!(
        "cancelled timer",
        (host.wait)(&mut event, 1, until) == 0,
        !pending(),
        (host.monotonic)() >= until
    );
}

fn speed() {
    let host = &boot().host;
    let each = |name: &str, count: u64, work: &mut dyn FnMut()| {
        let start = (host.monotonic)();
        (0..count).for_each(|_| work());
        let _ = writeln!(
            Console,
            "{name}: {} ns",
            ((host.monotonic)() - start) / count
        );
    };
    each("host call", 2000, &mut || {
        (host.memory_used)();
    });
    // syscall; jmp back to it
    program(b"\x0f\x05\xeb\xfc");
    each("system call", 2000, &mut again);
    let at = KERNEL_RANGE_START;
    let mut next = at;
    (host.map)(at, 1 << 23, BOTH, ZERO, 0);
    each("first touch", 500, &mut || {
        // SAFETY: just mapped.
        unsafe { (next as *mut u8).write_volatile(1) };
        next += 4096;
    });
    (host.discard)(at, 1 << 23);
    next = at;
    each("first touch of used frames", 500, &mut || {
        // SAFETY: just mapped.
        unsafe { (next as *mut u8).write_volatile(1) };
        next += 4096;
    });
    each("map and unmap", 500, &mut || {
        (host.map)(at + (1 << 24), 0x10000, BOTH, ZERO, 0);
        (host.unmap)(at + (1 << 24), 0x10000);
    });
    (host.unmap)(at, 1 << 23);
}

#[unsafe(no_mangle)]
extern "C" fn kernel_fault() -> ! {
    // SAFETY: a copy.
    let context = unsafe { addr_of!(FAULT_CONTEXT).read_volatile() };
    check!(
        "fault of the kernel",
        context.trap.exception == exception::PAGE_FAULT,
        context.trap.address == 0x1234,
        context.rip as usize >= boot().kernel_text.start,
    );
    (boot().host.exit)(42)
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "FAILED {information}");
    (boot().host.exit)(1)
}

/// There is no heap.
struct NoHeap;

// SAFETY: handing out no memory is always sound.
unsafe impl GlobalAlloc for NoHeap {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static NO_HEAP: NoHeap = NoHeap;

#[path = "../../src/runtime/memory.rs"]
mod runtime;

//! The tests, by name.

use core::arch::global_asm;
use core::fmt::Write;

use kiln_abi::host::{
    BootInformation, Context, Event, Message, PAGE_SIZE, Slice, Source, Trap, TrapKind,
    event_flags, exception, page_fault,
};

use crate::machine::{Machine, read_user, stop};
use crate::{Console, check, holds, same};

const READ: u32 = 1;
const WRITE: u32 = 2;
const EXECUTE: u32 = 4;
const EACCES: isize = -13;
const EINVAL: isize = -22;
const ENOMEM: isize = -12;
const EBADF: isize = -9;
const EAGAIN: isize = -11;

/// Where programs go.
const TEXT: usize = 0x40_0000;
/// Where their data goes.
const DATA: usize = 0x50_0000;

// Programs. Each label begins one.
global_asm!(
    r#"
    .text
    .balign 16
    .globl programs
    .hidden programs
programs:
    .globl program_call
    .hidden program_call
program_call:
    syscall
    ud2
    .globl program_write
    .hidden program_write
program_write:
    mov eax, 1
    mov edi, 1
    lea rsi, [rip + 2f]
    mov edx, 8
    syscall
    ud2
2:  .ascii "ESCAPED\n"
    .globl program_load
    .hidden program_load
program_load:
    mov al, [rbx]
    ud2
    .globl program_store
    .hidden program_store
program_store:
    mov [rbx], al
    ud2
    .globl program_jump
    .hidden program_jump
program_jump:
    jmp rbx
    .globl program_divide
    .hidden program_divide
program_divide:
    xor edx, edx
    xor ecx, ecx
    div ecx
    .globl program_breakpoint
    .hidden program_breakpoint
program_breakpoint:
    int3
    .globl program_old_call
    .hidden program_old_call
program_old_call:
    mov eax, 20
    int 0x80
    .globl program_nothing
    .hidden program_nothing
program_nothing:
    nop
    nop
    ud2
    .globl program_float
    .hidden program_float
program_float:
    divss xmm0, xmm1
    ud2
    .globl program_gs
    .hidden program_gs
program_gs:
    xor eax, eax
    wrgsbase rax
    syscall
    .globl program_count
    .hidden program_count
program_count:
    inc rbx
    inc r12
    jmp program_count
    .globl program_touch
    .hidden program_touch
program_touch:
    mov byte ptr [rbx], 1
    add rbx, 4096
    jmp program_touch
    .globl programs_end
    .hidden programs_end
programs_end:
"#
);

unsafe extern "C" {
    fn programs();
    fn programs_end();
    fn program_call();
    fn program_write();
    fn program_load();
    fn program_store();
    fn program_jump();
    fn program_divide();
    fn program_breakpoint();
    fn program_old_call();
    fn program_nothing();
    fn program_float();
    fn program_gs();
    fn program_count();
    fn program_touch();
}

/// A page of the kernel's data that may become read-only.
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

static mut CONSTANTS: Page = Page([1; PAGE_SIZE]);

/// Address in program memory of one of the programs above.
fn at(program: unsafe extern "C" fn()) -> usize {
    TEXT + program as *const () as usize - programs as *const () as usize
}

/// Maps programs and data.
fn load(boot: &BootInformation) {
    let host = &boot.host;
    let result = (host.map)(TEXT, PAGE_SIZE, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, 0, "map text");
    let start = programs as *const u8;
    let length = programs_end as *const () as usize - start as usize;
    // SAFETY: mapped just now.
    unsafe { core::ptr::copy_nonoverlapping(start, TEXT as *mut u8, length) };
    let result = (host.protect)(TEXT, PAGE_SIZE, READ | EXECUTE);
    same(boot, result, 0, "protect text");
    let result = (host.map)(DATA, PAGE_SIZE, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, 0, "map data");
}

/// Runs the program until it comes back to the kernel, which has to be for this exception.
fn raises(boot: &BootInformation, machine: &mut Machine, number: u32, what: &str) {
    let trap = traps(boot, machine, TrapKind::Exception, what);
    same(boot, trap.exception.into(), u64::from(number), what);
}

/// Runs the program until it comes back to the kernel, which has to be for this reason.
fn traps(boot: &BootInformation, machine: &mut Machine, kind: TrapKind, what: &str) -> Trap {
    let trap = machine.run();
    same(boot, trap.kind, kind as u64, what);
    trap
}

/// Runs a test by name.
pub fn run(boot: &'static BootInformation, name: &str) {
    match name {
        "registers" => registers(boot),
        "faults" => faults(boot),
        "kernel-faults" => kernel_faults(boot),
        "escape" => escape(boot),
        "events" => events(boot),
        "races" => races(boot),
        "memory" => memory(boot),
        "limit" => limit(boot),
        "link" => link(boot),
        "early-fault" => stop(),
        "bad-registration" => {
            // The page with the area for faults is read-only: no fault can be stored.
            let machine = Machine::new(boot);
            let page = machine.fault_page();
            let result = (boot.host.protect)(page, PAGE_SIZE, READ);
            same(boot, result, 0, "protect");
            stop()
        }
        "exit" => (boot.host.exit)(77),
        "sleep" => loop {
            (boot.host.wait)(&mut Event::default(), 1, u64::MAX);
        },
        "measure" => measure(boot),
        "nothing" => {}
        _ => raw_call(boot, name),
    }
}

/// All registers of a program reach the kernel, vectors included, and back.
fn registers(boot: &'static BootInformation) {
    load(boot);
    let machine = Machine::new(boot);
    let context = Context {
        rax: 0x1111_2222_0000_0027,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rbp: 7,
        rsp: 0x8_0000_0001,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: 16,
        rip: at(program_call) as u64,
        // Carry, direction and alignment check, besides what is always set.
        rflags: 0x4_0603,
        ..Context::default()
    };
    machine.context = context;
    // x87, SSE and AVX state, and all else that the processor has: a pattern in the register parts.
    let size = boot.xsave_size as usize;
    check(
        boot,
        (832..=16384).contains(&size),
        "xsave size",
        &[size as u64],
    );
    check(
        boot,
        boot.xsave_mask & 7 == 7,
        "xsave mask",
        &[boot.xsave_mask],
    );
    let pattern = |index: usize| (index * 7 + 3) as u8;
    for index in 160..416 {
        machine.vectors.0[index] = pattern(index);
    }
    for index in 576..832 {
        machine.vectors.0[index] = pattern(index);
    }
    let mut avx512 = 0;
    if boot.xsave_mask >> 5 & 7 == 7 {
        avx512 = 0xe0;
        for (component, length) in [(5, 64), (6, 512), (7, 1024)] {
            let offset = core::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
            for index in offset..offset + length {
                machine.vectors.0[index] = pattern(index);
            }
        }
    }
    machine.vectors.0[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
    machine.vectors.0[512] = 7 | avx512;
    let before = machine.vectors.0;
    for round in 0..3 {
        machine.context.rip = at(program_call) as u64;
        traps(boot, machine, TrapKind::SystemCall, "kind");
        let got = machine.context;
        same(boot, got.rax, context.rax, "rax");
        same(boot, got.rip, context.rip + 2, "rip");
        // The instruction itself changes rcx and r11.
        let kept = [
            (got.rbx, context.rbx),
            (got.rdx, context.rdx),
            (got.rsi, context.rsi),
            (got.rdi, context.rdi),
            (got.rbp, context.rbp),
            (got.rsp, context.rsp),
            (got.r8, context.r8),
            (got.r9, context.r9),
            (got.r10, context.r10),
            (got.r12, context.r12),
            (got.r13, context.r13),
            (got.r14, context.r14),
            (got.r15, context.r15),
            (got.rflags & 0x4_0401, context.rflags & 0x4_0401),
        ];
        for (index, (got, wanted)) in kept.into_iter().enumerate() {
            check(
                boot,
                got == wanted,
                "register",
                &[index as u64, got, wanted],
            );
        }
        for (index, (got, wanted)) in machine.vectors.0.iter().zip(&before).enumerate() {
            let register = (160..416).contains(&index)
                || (576..size).contains(&index)
                || (24..28).contains(&index);
            check(
                boot,
                !register || got == wanted,
                "vector",
                &[round, index as u64, (*got).into()],
            );
        }
    }
    raises(boot, machine, exception::INVALID_INSTRUCTION, "goes on");
    same(boot, machine.context.rip, at(program_call) as u64 + 2, "at");
    // A program that writes GS hurts nobody but itself.
    machine.context.rip = at(program_gs) as u64;
    machine.context.rax = 1;
    traps(boot, machine, TrapKind::SystemCall, "after wrgsbase");
}

/// Every kind of fault in a program.
fn faults(boot: &'static BootInformation) {
    load(boot);
    let machine = Machine::new(boot);
    let mut expect = |program: unsafe extern "C" fn(), argument: usize, number, offset, error| {
        machine.context.rip = at(program) as u64;
        machine.context.rbx = argument as u64;
        let trap = machine.run();
        let (got, code) = (trap.exception.into(), trap.error.into());
        let values = [trap.kind, got, trap.address, code, machine.context.rip];
        check(
            boot,
            trap.kind == TrapKind::Exception as u64,
            "kind",
            &values,
        );
        check(boot, trap.exception == number, "exception", &values);
        check(boot, trap.error == error, "error", &values);
        let page_fault = number == exception::PAGE_FAULT;
        let address = if page_fault { argument } else { 0 };
        check(boot, trap.address == address as u64, "address", &values);
        let rip = if page_fault && error & page_fault::FETCH != 0 {
            argument
        } else {
            at(program) + offset
        };
        check(boot, machine.context.rip == rip as u64, "rip", &values);
    };
    // There from now on.
    // SAFETY: mapped just now, for this.
    unsafe { (DATA as *mut u8).write_volatile(1) };
    let (page, load) = (exception::PAGE_FAULT, page_fault::USER);
    let (store, jump) = (load | page_fault::WRITE, load | page_fault::FETCH);
    let present = page_fault::PRESENT;
    expect(program_load, 0x7000_0000, page, 0, load);
    expect(program_load, 0, page, 0, load);
    expect(program_store, 0x7000_0123, page, 0, store);
    expect(program_store, TEXT + 8, page, 0, store | present);
    expect(program_jump, DATA, page, 0, jump | present);
    expect(program_jump, 0x7000_0000, page, 0, jump);
    expect(program_load, 1 << 63, exception::PROTECTION, 0, 0);
    expect(program_divide, 0, exception::DIVIDE, 4, 0);
    expect(program_breakpoint, 0, exception::BREAKPOINT, 1, 0);
    // What a 64-bit program asks with `int 0x80` is not looked at: it faults, as without 32-bit support.
    expect(program_old_call, 0, exception::PROTECTION, 5, 0x80 << 3 | 2);
    expect(program_nothing, 0, exception::INVALID_INSTRUCTION, 2, 0);

    machine.context.rflags = 0x302;
    machine.context.rip = at(program_nothing) as u64;
    for step in 1..3 {
        raises(boot, machine, exception::DEBUG, "step");
        let wanted = at(program_nothing) as u64 + step;
        same(boot, machine.context.rip, wanted, "step to");
    }
    machine.context.rflags = 0x202;

    // Division by zero not masked in MXCSR.
    machine.vectors.0[24..28].copy_from_slice(&0x1d80u32.to_le_bytes());
    machine.vectors.0[160..164].copy_from_slice(&1f32.to_le_bytes());
    machine.vectors.0[512] = 3;
    machine.context.rip = at(program_float) as u64;
    raises(boot, machine, exception::SIMD, "float");
    machine.vectors.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());

    // An address that cannot be jumped to is the program's fault, though the kernel jumps.
    machine.context.rip = 1 << 62;
    raises(boot, machine, exception::PROTECTION, "jump");
    same(boot, machine.context.rip, 1 << 62, "jump");

    // Misaligned access with the alignment check on; and a system call with it on harms no one.
    machine.context.rip = at(program_call) as u64;
    machine.context.rflags = 0x4_0202;
    traps(boot, machine, TrapKind::SystemCall, "alignment");
}

/// Faults of the kernel itself go to its fault entry.
fn kernel_faults(boot: &'static BootInformation) {
    let machine = Machine::new(boot);
    for round in 0..3 {
        holds(boot, machine.store_faults(0x7000_0000 + round), "unmapped");
        let fault = machine.fault();
        let address = 0x7000_0000 + round as u64;
        let page_fault = u64::from(exception::PAGE_FAULT);
        same(boot, fault.trap.exception.into(), page_fault, "fault");
        same(boot, fault.trap.address, address, "fault");
        same(boot, fault.rdi, address, "fault registers");
    }
    holds(
        boot,
        machine.own_system_call_faults(),
        "system call of the kernel",
    );
    let fault = machine.fault();
    same(boot, fault.trap.kind, TrapKind::SystemCall as u64, "trap");
    for (address, what) in [
        (boot.kernel_text.start, "kernel text"),
        (boot.kernel.start - 1, "guard page below"),
        (boot.kernel.start + boot.kernel.length, "guard above"),
        (boot.program.start, "manifest"),
        (boot.root.start, "root"),
        (boot.host.map as usize, "shim's text"),
    ] {
        holds(boot, machine.store_faults(address), what);
    }
}

/// A system call of the host's, made by program code, is not executed by the host.
fn escape(boot: &'static BootInformation) {
    load(boot);
    let machine = Machine::new(boot);
    machine.context.rip = at(program_write) as u64;
    traps(boot, machine, TrapKind::SystemCall, "kind");
    let context = machine.context;
    check(
        boot,
        context.rax == 1 && context.rdi == 1,
        "arguments",
        &[context.rax, context.rdi],
    );
    // SAFETY: in the program's text.
    let text = unsafe { core::slice::from_raw_parts(context.rsi as *const u8, 8) };
    check(boot, text == b"ESCAPED\n", "text", &[context.rsi]);
}

/// Timer events in a program, in the kernel and while it waits.
fn events(boot: &'static BootInformation) {
    load(boot);
    let host = &boot.host;
    let machine = Machine::new(boot);
    let millisecond = 1_000_000;
    let mut events = [Event::default(); 4];
    let start = (host.monotonic)();

    (host.set_timer)(start + 3 * millisecond);
    machine.context.rip = at(program_count) as u64;
    traps(boot, machine, TrapKind::Event, "program");
    let now = (host.monotonic)();
    check(
        boot,
        now >= start + 3 * millisecond,
        "program's event early",
        &[now - start],
    );
    check(
        boot,
        machine.context.rbx > 1000,
        "program did not run",
        &[machine.context.rbx],
    );

    (host.set_timer)((host.monotonic)() + 3 * millisecond);
    while !machine.pending() {}
    holds(boot, machine.take_pending(), "kernel");

    // Waiting: until the deadline, until the timer, not at all.
    let start = (host.monotonic)();
    let result = (host.wait)(events.as_mut_ptr(), 4, start + 3 * millisecond);
    let waited = (host.monotonic)() - start;
    check(
        boot,
        result == 0 && waited >= 3 * millisecond,
        "deadline",
        &[result as u64, waited],
    );
    let start = (host.monotonic)();
    (host.set_timer)(start + 3 * millisecond);
    let result = (host.wait)(events.as_mut_ptr(), 4, u64::MAX);
    let waited = (host.monotonic)() - start;
    check(
        boot,
        result == 0 && waited >= 3 * millisecond,
        "timer",
        &[result as u64, waited],
    );
    holds(boot, machine.pending(), "timer's flag");
    let result = (host.wait)(events.as_mut_ptr(), 4, u64::MAX);
    same(boot, result, 0, "pending");
    machine.take_pending();
    same(boot, (host.wait)(events.as_mut_ptr(), 4, 0), 0, "no wait");

    // A deadline moved back, and one taken back, wake nobody.
    let start = (host.monotonic)();
    (host.set_timer)(start + millisecond);
    (host.set_timer)(start + 5 * millisecond);
    let result = (host.wait)(events.as_mut_ptr(), 4, u64::MAX);
    let waited = (host.monotonic)() - start;
    check(
        boot,
        result == 0 && waited >= 5 * millisecond,
        "moved",
        &[result as u64, waited],
    );
    machine.take_pending();
    (host.set_timer)((host.monotonic)() + millisecond);
    (host.set_timer)(u64::MAX);
    let start = (host.monotonic)();
    (host.wait)(events.as_mut_ptr(), 4, start + 4 * millisecond);
    let waited = (host.monotonic)() - start;
    check(
        boot,
        waited >= 4 * millisecond && !machine.pending(),
        "taken back",
        &[waited],
    );
    let year = 365 * 24 * 3600 * 1_000_000_000u64;
    check(
        boot,
        (host.realtime)() > 50 * year,
        "wall clock",
        &[(host.realtime)()],
    );
}

/// Events at any instruction: none is lost, and no register either.
fn races(boot: &'static BootInformation) {
    load(boot);
    let host = &boot.host;
    let machine = Machine::new(boot);
    let mut events = [Event::default(); 1];
    let (start, end) = (at(program_count) as u64, at(program_count) as u64 + 8);
    machine.context.rip = start;
    for round in 0..60_000u64 {
        (host.set_timer)((host.monotonic)() + round * 7 % 3000);
        let trap = machine.run();
        let context = machine.context;
        let values = [round, trap.kind, context.rip, context.rbx, context.r12];
        check(boot, trap.kind == TrapKind::Event as u64, "kind", &values);
        check(boot, (start..end).contains(&context.rip), "rip", &values);
        // Between the two increments, one is ahead.
        let ahead = u64::from(context.rip == start + 3);
        check(
            boot,
            context.rbx == context.r12 + ahead,
            "registers",
            &values,
        );
        machine.take_pending();
    }
    // A deadline moved back a little: the handler of the first finds it early and arms the timer again, whose signal
    // then comes while that handler runs.
    let moved_back = |round: u64| {
        let deadline = (host.monotonic)() + 5000 + round * 7 % 3000;
        (host.set_timer)(deadline);
        (host.set_timer)(deadline + round * 13 % 60_000);
    };
    for round in 0..20_000 {
        moved_back(round);
        let trap = machine.run();
        same(boot, trap.kind, TrapKind::Event as u64, "moved back");
        machine.take_pending();
    }
    for round in 0..20_000 {
        moved_back(round);
        (host.wait)(events.as_mut_ptr(), 1, u64::MAX);
        let pending = machine.take_pending();
        check(boot, pending, "wait ended without the event", &[round]);
    }
    for round in 0..60_000u64 {
        (host.set_timer)((host.monotonic)() + round * 11 % 5000);
        (host.wait)(events.as_mut_ptr(), 1, u64::MAX);
        check(
            boot,
            machine.take_pending(),
            "wait ended without an event",
            &[round],
        );
    }
}

/// Mappings.
fn memory(boot: &'static BootInformation) {
    load(boot);
    let host = &boot.host;
    let machine = Machine::new(boot);
    let zero = Source::Zero as u32;
    let (root, pool) = (Source::Root as u32, Source::Pool as u32);
    let map = |address, length, protection, source, offset, wanted: isize, what: &str| {
        let result = (host.map)(address, length, protection, source, offset);
        check(
            boot,
            result == wanted,
            what,
            &[address as u64, result as u64],
        );
    };
    let mebibyte = 1 << 20;
    let base = 0x1_0000_0000;
    let window = 0x6000_0000_0000;
    map(
        base,
        mebibyte,
        WRITE | EXECUTE,
        zero,
        0,
        EACCES,
        "writable and executable",
    );
    map(
        base,
        mebibyte,
        READ | WRITE | EXECUTE,
        root,
        0,
        EACCES,
        "writable and executable",
    );
    map(base, mebibyte, 8, zero, 0, EINVAL, "unknown protection");
    map(base, mebibyte, READ, 3, 0, EINVAL, "unknown source");
    map(base + 1, mebibyte, READ, zero, 0, EINVAL, "misaligned");
    map(0, PAGE_SIZE, READ, zero, 0, EINVAL, "page zero");
    map(
        boot.kernel.start,
        PAGE_SIZE,
        READ,
        zero,
        0,
        EINVAL,
        "the kernel's image",
    );
    map(
        host.map as usize & !4095,
        PAGE_SIZE,
        READ,
        zero,
        0,
        EINVAL,
        "the shim",
    );
    map(
        base,
        mebibyte,
        READ,
        root,
        1 << 40,
        EINVAL,
        "outside the root",
    );
    let result = (host.unmap)(boot.kernel.start, PAGE_SIZE);
    same(boot, result, EINVAL, "unmapped the kernel");
    let result = (host.protect)(boot.kernel_text.start, PAGE_SIZE, READ);
    same(boot, result, EINVAL, "protected the kernel's text");

    // Zero pages; a write to them; their discard; their end.
    map(base, mebibyte, READ | WRITE, zero, 0, 0, "zero pages");
    let read = |address: usize| read_user(address);
    let write = |address: usize, byte: u8| {
        // SAFETY: mapped by the tests.
        unsafe { (address as *mut u8).write_volatile(byte) };
    };
    same(boot, read(base + 5), 0, "zero");
    write(base + 5, 9);
    same(boot, read(base + 5), 9, "written");
    same(boot, (host.discard)(base, mebibyte), 0, "discard");
    same(boot, read(base + 5), 0, "discarded");
    let result = (host.protect)(base, mebibyte, WRITE | EXECUTE);
    same(boot, result, EACCES, "protect to write and execute");
    let result = (host.protect)(base, PAGE_SIZE, 0);
    same(boot, result, 0, "protect to nothing");
    same(boot, read(base + 5), -1, "a copy from protected memory");
    same(boot, (host.unmap)(base, mebibyte), 0, "unmap");
    same(boot, read(base + 5), -1, "a copy from nowhere");
    same(boot, read(1 << 63), -1, "a copy from an impossible address");

    // The root: its bytes, a private copy, its bytes again.
    map(
        base,
        2 * PAGE_SIZE,
        READ | WRITE,
        root,
        PAGE_SIZE as u64,
        0,
        "root",
    );
    // SAFETY: the shim mapped the root.
    let wanted = unsafe { *((boot.root.start + PAGE_SIZE + 7) as *const u8) };
    check(
        boot,
        read(base + 7) == i32::from(wanted),
        "root's byte",
        &[wanted.into()],
    );
    write(base + 7, wanted ^ 0xff);
    same(boot, read(base + 7), i32::from(wanted ^ 0xff), "own byte");
    same(
        boot,
        read(boot.root.start + PAGE_SIZE + 7),
        i32::from(wanted),
        "root changed",
    );
    same(boot, (host.discard)(base, 2 * PAGE_SIZE), 0, "discard");
    same(boot, read(base + 7), i32::from(wanted), "root's byte again");
    same(boot, (host.unmap)(base, 2 * PAGE_SIZE), 0, "unmap");

    // The pool: one page at two addresses.
    map(base, mebibyte, READ | WRITE, pool, 1 << 30, 0, "pool");
    map(
        window,
        mebibyte,
        READ | WRITE,
        pool,
        1 << 30,
        0,
        "pool again",
    );
    write(base + 3, 77);
    same(boot, read(window + 3), 77, "shared");
    let used = (host.memory_used)();
    same(boot, (host.discard)(window, mebibyte), 0, "discard");
    holds(boot, (host.memory_used)() < used, "freed");
    same(boot, read(base + 3), 0, "discarded for all");

    // What is in use is known, to within Linux's own batches of counters.
    let large = 32 * mebibyte;
    let before = (host.memory_used)();
    map(base, large, READ | WRITE, zero, 0, 0, "32 MiB");
    for page in (0..large).step_by(PAGE_SIZE) {
        write(base + page, 1);
    }
    let grown = (host.memory_used)() - before;
    let near = (large - mebibyte) as u64..(large + mebibyte) as u64;
    check(boot, near.contains(&grown), "memory in use", &[grown]);

    // Constants after relocation become read-only, once and for all.
    let constants = &raw const CONSTANTS as usize;
    let result = (host.protect)(constants, PAGE_SIZE, READ);
    same(boot, result, 0, "constants");
    holds(
        boot,
        machine.store_faults(constants + 8),
        "constants are written",
    );
    let result = (host.protect)(constants, PAGE_SIZE, READ | WRITE);
    same(boot, result, EINVAL, "constants made writable");

    let mut random = [0u64; 64];
    let length = size_of_val(&random);
    let result = (host.entropy)(random.as_mut_ptr().cast(), length);
    same(boot, result, 0, "entropy");
    check(
        boot,
        random.iter().all(|word| *word != 0),
        "entropy",
        &random,
    );
}

/// A program that touches more memory than there is gets stopped, and no more is mapped.
fn limit(boot: &'static BootInformation) {
    load(boot);
    let host = &boot.host;
    let machine = Machine::new(boot);
    let (base, length) = (0x1_0000_0000, 1usize << 40);
    let result = (host.map)(base, length, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, 0, "reserving is free");
    machine.context.rip = at(program_touch) as u64;
    machine.context.rbx = base as u64;
    traps(boot, machine, TrapKind::Exhausted, "kind");
    let used = (host.memory_used)();
    let limit = boot.memory_limit;
    check(
        boot,
        used >= limit && used < limit + (256 << 20),
        "used",
        &[used, limit],
    );
    let result = (host.map)(0x10_0000, PAGE_SIZE, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, ENOMEM, "more memory");
    same(boot, (host.unmap)(base, length), 0, "unmap");
    let result = (host.map)(0x10_0000, PAGE_SIZE, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, 0, "memory again");
    // A program that does not care is ended: by the shim, whatever the kernel does.
    let result = (host.map)(base, length, READ | WRITE, Source::Zero as u32, 0);
    same(boot, result, 0, "reserving is free");
    loop {
        machine.run();
    }
}

/// Echoes what comes over the link, and says "hello" to a descriptor that comes along.
fn link(boot: &'static BootInformation) {
    let host = &boot.host;
    let link = boot.link_descriptor;
    let mut events = [Event::default(); 8];
    let mut buffer = [0u8; 64];
    let mut descriptors = [-1i32; 4];
    for descriptor in 0..6 {
        let result = (host.descriptor_close)(descriptor);
        same(boot, result, EBADF, "closed the shim's descriptor");
        let result = (host.descriptor_watch)(descriptor);
        same(boot, result, EBADF, "watched the shim's descriptor");
    }
    same(boot, (host.descriptor_watch)(link), 0, "watch");
    let mut message = Message {
        slices: core::ptr::null(),
        slice_count: 1,
        address: core::ptr::null_mut(),
        address_length: 0,
        descriptors: core::ptr::null_mut(),
        descriptor_count: 0,
        flags: 0,
    };
    loop {
        let slice = Slice {
            address: buffer.as_mut_ptr() as usize,
            length: buffer.len(),
        };
        message.slices = &raw const slice;
        message.descriptors = descriptors.as_mut_ptr();
        message.descriptor_count = 4;
        let result = (host.descriptor_receive)(link, &mut message);
        if result == EAGAIN {
            let count = (host.wait)(events.as_mut_ptr(), 8, u64::MAX);
            for event in events.iter().take(count as usize) {
                same(boot, event.source, link as u32, "source");
                let wanted = event_flags::READABLE | event_flags::WRITABLE | event_flags::HANGUP;
                check(
                    boot,
                    event.flags & wanted != 0,
                    "flags",
                    &[event.flags.into()],
                );
            }
            continue;
        }
        check(boot, result >= 0, "receive", &[result as u64]);
        if result == 0 {
            return;
        }
        for descriptor in descriptors.iter().take(message.descriptor_count as usize) {
            check(boot, *descriptor >= 8, "number", &[*descriptor as u64]);
            // In two pieces, so as to take the other path.
            let text = b"hello";
            let slices = [
                Slice {
                    address: text.as_ptr() as usize,
                    length: 2,
                },
                Slice {
                    address: text.as_ptr() as usize + 2,
                    length: 3,
                },
            ];
            let hello = Message {
                slices: slices.as_ptr(),
                slice_count: 2,
                descriptors: core::ptr::null_mut(),
                ..message
            };
            let result = (host.descriptor_send)(*descriptor, &hello);
            same(boot, result, 5, "hello");
            let result = (host.descriptor_shutdown)(*descriptor, 1);
            same(boot, result, 0, "shutdown");
            same(boot, (host.descriptor_close)(*descriptor), 0, "close");
        }
        let echo = Slice {
            address: buffer.as_ptr() as usize,
            length: result as usize,
        };
        message.slices = &raw const echo;
        let sent = (host.descriptor_send)(link, &message);
        same(boot, sent, result, "echo");
    }
}

/// Calls the host through the shim's own instruction, as a hostile program could. The filter ends the instance.
fn raw_call(boot: &'static BootInformation, name: &str) {
    // `mov rax, rdi; mov rdi, rsi; mov rsi, rdx` begins the shim's function for system calls.
    const BEGINNING: [u8; 9] = [0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0x48, 0x89, 0xd6];
    let mut address = boot.host.map as usize;
    // SAFETY: the section of system calls follows the shim's other text.
    while unsafe { *(address as *const [u8; 9]) } != BEGINNING {
        address += 1;
    }
    type Call = extern "C" fn(usize, usize, usize, usize, usize, usize, usize) -> isize;
    // SAFETY: found above.
    let call = unsafe { core::mem::transmute::<usize, Call>(address) };
    let path = c"/etc/passwd".as_ptr() as usize;
    let none = usize::MAX;
    let result = match name {
        // Allowed, so that the others prove something.
        "call-getrandom" => call(318, DATA, 0, 0, 0, 0, 0),
        "call-open" => call(2, path, 0, 0, 0, 0, 0),
        "call-openat" => call(257, none, path, 0, 0, 0, 0),
        "call-socket" => call(41, 2, 1, 0, 0, 0, 0),
        "call-connect" => call(42, 6, path, 16, 0, 0, 0),
        "call-clone" => call(56, 17, 0, 0, 0, 0, 0),
        "call-execve" => call(59, path, 0, 0, 0, 0, 0),
        "call-kill" => call(62, 1, 0, 0, 0, 0, 0),
        "call-ptrace" => call(101, 0, 0, 0, 0, 0, 0),
        "call-prctl" => call(157, 59, 0, 0, 0, 0, 0),
        "call-sigaction" => call(13, 14, 0, 0, 8, 0, 0),
        "call-read-image" => call(0, 0, DATA, 1, 0, 0, 0),
        "call-write-link" => call(1, 6, DATA, 1, 0, 0, 0),
        "call-send-address" => call(44, 6, DATA, 1, 0, path, 16),
        "call-fast-open" => call(44, 6, DATA, 1, 0x2000_0000, 0, 0),
        "call-mmap-write-execute" => call(9, DATA, 4096, 7, 0x4032, none, 0),
        "call-mmap-shared-image" => call(9, DATA, 4096, 1, 0x11, 0, 0),
        "call-mprotect-write-execute" => call(10, DATA, 4096, 6, 0, 0, 0),
        "call-x32" => call(0x4000_0000 + 318, DATA, 0, 0, 0, 0, 0),
        _ => {
            check(boot, false, "no such test", &[]);
            0
        }
    };
    same(boot, result, 0, "the call returned");
}

/// Prints what things cost.
fn measure(boot: &'static BootInformation) {
    load(boot);
    let host = &boot.host;
    let machine = Machine::new(boot);
    let mut console = Console(boot);
    let mut time = |what: &str, rounds: u64, work: &mut dyn FnMut()| {
        let mut best = u64::MAX;
        for _ in 0..10 {
            let start = (host.monotonic)();
            for _ in 0..rounds {
                work();
            }
            best = best.min(((host.monotonic)() - start) / rounds);
        }
        let _ = writeln!(console, "{what}: {best} ns");
    };
    time("system call of a program and back", 20_000, &mut || {
        machine.context.rip = at(program_call) as u64;
        machine.run();
    });
    time("monotonic", 100_000, &mut || {
        (host.monotonic)();
    });
    let mut later = (host.monotonic)() + 1_000_000_000_000;
    time("set_timer, earlier each time", 20_000, &mut || {
        later -= 1;
        (host.set_timer)(later);
    });
    time("set_timer, later each time", 100_000, &mut || {
        later += 1;
        (host.set_timer)(later);
    });
    time("memory_used", 20_000, &mut || {
        (host.memory_used)();
    });
    time("wait without waiting", 20_000, &mut || {
        (host.wait)(&mut Event::default(), 1, 0);
    });
    time("map and unmap of a page", 20_000, &mut || {
        (host.map)(DATA, PAGE_SIZE, READ | WRITE, Source::Zero as u32, 0);
        (host.unmap)(DATA, PAGE_SIZE);
    });
    let byte = 0u8;
    let slice = Slice {
        address: &raw const byte as usize,
        length: 1,
    };
    let message = Message {
        slices: &raw const slice,
        slice_count: 1,
        address: core::ptr::null_mut(),
        address_length: 0,
        descriptors: core::ptr::null_mut(),
        descriptor_count: 0,
        flags: 0,
    };
    time(
        "send of a byte over the link, perhaps into a full buffer",
        2_000,
        &mut || {
            (host.descriptor_send)(boot.link_descriptor, &message);
        },
    );
}

//! From the first instruction to the kernel's entry.
//!
//! Everything here happens once. Until the seccomp filter is in place the shim may make any system call; what fails is
//! said on the console, with what to do, and ends the process with
//! [`EXIT_SHIM`](kiln_abi::process::EXIT_SHIM).

#![allow(unsafe_code)]

use core::arch::{asm, global_asm, x86_64};
use core::sync::atomic::Ordering::Relaxed;

use kiln_abi::host::{
    BOOT_MAGIC, BootInformation, Engine, MAX_DEVICES, MemoryRange, MmioDevice, PAGE_SIZE, VERSION,
};
use kiln_abi::process::{Extent, Parameters, descriptor};
use kiln_shim_process::elf::{self, Program, page_up};
use kiln_shim_process::layout;
use linux_raw_sys::{auxvec, general as raw, prctl};

use crate::linux::{self, int};
use crate::message::fail;
use crate::{host, memory, state, time, trap};

// Entry: applies the image's relocations (R_X86_64_RELATIVE only), since no line of Rust may run before that.
global_asm!(
    r#"
    .text
    .globl _start
_start:
    xor ebp, ebp
    mov rdi, rsp
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
    cmp dword ptr [r10 + 8], 8
    jne 6f
    mov rax, [r10]
    mov rcx, [r10 + 16]
    add rcx, r8
    mov [r8 + rax], rcx
6:  add r10, 24
    jmp 5b
7:  and rsp, -16
    call {start}
    ud2
"#,
    start = sym start,
);

unsafe extern "C" {
    static __ehdr_start: u8;
    static _end: u8;
}

/// Bytes of the stack that the kernel starts on.
const KERNEL_STACK: usize = 256 << 10;
/// Bytes of the signal stack besides room for signal frames.
const SIGNAL_STACK: usize = 64 << 10;
/// Signal frames that may lie on the signal stack at once: one of each asynchronous signal on top of a fault.
const SIGNAL_FRAMES: usize = 5;
/// Where kernels are mapped: above the kernel's own range and below what Linux places.
const KERNEL_AREA: core::ops::Range<usize> = 0x7100_0000_0000..0x7e00_0000_0000;
/// Instances with less memory get no transparent huge pages, which hosts may be set up to give on any first touch:
/// the heap alone would fill several.
const HUGE_PAGE_LIMIT: u64 = 128 << 20;
/// Most instructions of a seccomp filter (`BPF_MAXINSNS`).
const MAX_FILTER: usize = 4096;
/// State components that the kernel does not save: protection keys (9), and the matrix tiles (17, 18) that Linux gives
/// only to programs that ask.
const UNSAVED_COMPONENTS: u64 = 1 << 9 | 1 << 17 | 1 << 18;

/// Address space that the shim's own mappings need below what Linux has placed: image, stacks, and gaps.
const ROOM: usize = 64 << 30;
/// How often the shim executes itself again to be placed better.
const ATTEMPTS: usize = 8;

const SECCOMP_MODE_FILTER: usize = 2;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_GNU_RELRO: u32 = 0x6474_e552;

/// What Linux tells a new program in its auxiliary vector.
#[derive(Default)]
struct Auxiliary {
    hardware_features: usize,
    signal_frame: usize,
    random: usize,
    vdso: usize,
    headers: usize,
    header_count: usize,
    /// Where the stack was at the start.
    stack: usize,
    /// The first argument: a name for process lists.
    name: usize,
    /// How many environment strings there are: how often the shim has executed itself.
    attempts: usize,
}

/// Linux's `Elf64_Phdr`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: usize,
    address: usize,
    physical: usize,
    file_length: usize,
    memory_length: usize,
    alignment: usize,
}

extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: the stack is as Linux's execve(2) leaves it.
    let auxiliary = unsafe { read_auxiliary(stack) };
    // FSGSBASE is bit 1 of AT_HWCAP2.
    if auxiliary.hardware_features & 2 == 0 {
        fail(
            "this processor or kernel has no FSGSBASE instructions, which Kiln needs \
             (Linux 5.9 or later, no `nofsgsbase`); use --engine qemu",
            None,
        );
    }
    locate_shim(&auxiliary);
    // SAFETY: the auxiliary vector names the vDSO and our own headers.
    unsafe {
        find_clock(auxiliary.vdso);
        protect_constants(&auxiliary);
    }
    let (parameters, parameter_file) = read_parameters();
    let image_length = match linux::file_size(descriptor::IMAGE) {
        Ok((size, _)) => size,
        Err(error) => fail("the image file is not open", Some(error)),
    };
    let piece = |extent, name| map_piece(descriptor::IMAGE, image_length, extent, name);
    let kernel_file = piece(parameters.kernel, "kernel");
    let manifest = piece(parameters.program, "program");
    let root = piece(parameters.root, "root file system");
    let configuration = part(parameter_file, parameters.configuration, "configuration");
    let filter = part(parameter_file, parameters.filter, "seccomp filter");
    state::ROOT_OFFSET.store(parameters.root.offset as usize, Relaxed);
    state::ROOT_LENGTH.store(root.length, Relaxed);
    state::POOL_LENGTH.store(parameters.pool_length as usize, Relaxed);

    // SAFETY: mapped just now, as long as the mapping says.
    let bytes =
        unsafe { core::slice::from_raw_parts(kernel_file.start as *const u8, kernel_file.length) };
    let program = match elf::parse(bytes) {
        Ok(program) => program,
        Err(error) => fail_kernel(error),
    };
    // SAFETY: Linux's sixteen random bytes.
    let random = unsafe { core::ptr::replace(auxiliary.random as *mut usize, 0) };
    let kernel = map_kernel(&program, parameters.kernel.offset as usize, random);
    let (signal_stack, kernel_stack) = map_stacks(&auxiliary);

    let (xsave_mask, xsave_size) = vector_state();
    let boot = BootInformation {
        magic: BOOT_MAGIC,
        version: VERSION,
        engine: Engine::Process as u32,
        host: host::INTERFACE,
        kernel,
        kernel_text: state::KERNEL_TEXT.get(),
        kernel_file,
        program: manifest,
        configuration,
        root,
        memory_limit: parameters.memory_limit,
        dma: MemoryRange::default(),
        dma_physical: 0,
        link_descriptor: if parameters.link {
            descriptor::LINK
        } else {
            -1
        },
        network_descriptor: if parameters.network {
            descriptor::NETWORK
        } else {
            -1
        },
        device_count: 0,
        xsave_size,
        xsave_mask,
        devices: [MmioDevice::default(); MAX_DEVICES],
    };
    // The boot information lies above the stack that the kernel starts on.
    let stack_end = kernel_stack.start + kernel_stack.length;
    let boot_address = (stack_end - size_of::<BootInformation>()) & !63;
    // SAFETY: the stack is ours, and larger.
    unsafe { (boot_address as *mut BootInformation).write(boot) };

    make_epoll();
    occupy(&parameters);
    if let Err(error) = time::create_timers() {
        fail("Linux refuses a timer", Some(error));
    }
    if let Err(error) = trap::install(signal_stack.start, signal_stack.length) {
        fail("Linux refuses the signal handlers", Some(error));
    }
    memory::set_limit(parameters.memory_limit);
    confine(filter, parameters.memory_limit);
    // SAFETY: the entry was checked to lie in the kernel's text; the stack is 16-byte aligned, and as after a call.
    unsafe {
        asm!(
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "push 0",
            "jmp {entry}",
            stack = in(reg) boot_address,
            entry = in(reg) kernel.start + program.entry,
            in("rdi") boot_address,
            options(noreturn),
        )
    }
}

/// # Safety
/// `stack` points to the argument count on a new program's stack.
unsafe fn read_auxiliary(stack: *const usize) -> Auxiliary {
    let mut auxiliary = Auxiliary {
        stack: stack as usize,
        ..Auxiliary::default()
    };
    // SAFETY: argument count, arguments, null, environment, null, pairs up to AT_NULL.
    unsafe {
        auxiliary.name = stack.add(1).read();
        let mut pointer = stack.add(1 + stack.read() + 1);
        while pointer.read() != 0 {
            pointer = pointer.add(1);
            auxiliary.attempts += 1;
        }
        pointer = pointer.add(1);
        loop {
            let (kind, value) = (pointer.read() as u32, pointer.add(1).read());
            match kind {
                0 => return auxiliary,
                auxvec::AT_HWCAP2 => auxiliary.hardware_features = value,
                auxvec::AT_MINSIGSTKSZ => auxiliary.signal_frame = value,
                auxvec::AT_RANDOM => auxiliary.random = value,
                auxvec::AT_SYSINFO_EHDR => auxiliary.vdso = value,
                auxvec::AT_PHDR => auxiliary.headers = value,
                auxvec::AT_PHNUM => auxiliary.header_count = value,
                _ => {}
            }
            pointer = pointer.add(2);
        }
    }
}

/// Linux has placed something of ours where the kernel's or the program's memory belongs. Where addresses are as random
/// as can be (vm.mmap_rnd_bits = 32) one start in a thousand comes to this; so another attempt may do.
fn place_again(auxiliary: &Auxiliary) -> ! {
    if auxiliary.attempts < ATTEMPTS {
        let arguments = [auxiliary.name, 0];
        // What counts is how many environment strings there are.
        let mut environment = [0; ATTEMPTS + 1];
        for place in environment.iter_mut().take(auxiliary.attempts + 1) {
            *place = c"".as_ptr() as usize;
        }
        // SAFETY: replaces the process by itself.
        unsafe {
            let arguments = [
                int(descriptor::SHIM),
                c"".as_ptr() as usize,
                arguments.as_ptr() as usize,
                environment.as_ptr() as usize,
                raw::AT_EMPTY_PATH as usize,
                0,
            ];
            linux::syscall(raw::__NR_execveat, arguments);
        }
    }
    fail(
        "Linux places the shim where the program's memory belongs: set the sysctl vm.mmap_rnd_bits to 28 and \
         vm.legacy_va_layout to 0",
        None,
    )
}

fn locate_shim(auxiliary: &Auxiliary) {
    let start = &raw const __ehdr_start as usize;
    let end = &raw const _end as usize;
    // New mappings go below the lowest of what Linux has placed; there are to be some pages between it and the range.
    let clear = |low: usize| !layout::meets(low.saturating_sub(ROOM), low);
    let vdso = auxiliary.vdso;
    if !clear(start)
        || layout::meets(start, end)
        || !clear(auxiliary.stack)
        || vdso != 0 && !clear(vdso)
    {
        place_again(auxiliary);
    }
    state::SHIM.set(MemoryRange {
        start,
        length: end - start,
    });
    if auxiliary.random == 0 {
        fail("Linux gave no random bytes (AT_RANDOM)", None);
    }
}

/// Makes what only relocation writes to read-only.
///
/// # Safety
/// The auxiliary vector is Linux's.
unsafe fn protect_constants(auxiliary: &Auxiliary) {
    let base = &raw const __ehdr_start as usize;
    for index in 0..auxiliary.header_count {
        // SAFETY: our own program headers.
        let header = unsafe {
            (auxiliary.headers as *const ProgramHeader)
                .add(index)
                .read()
        };
        if header.kind == PT_GNU_RELRO {
            let start = (base + header.address) & !(PAGE_SIZE - 1);
            let end = (base + header.address + header.memory_length) & !(PAGE_SIZE - 1);
            // SAFETY: the linker put nothing else there.
            unsafe { protect(start, end - start, raw::PROT_READ) };
        }
    }
}

/// Finds `__vdso_clock_gettime`. Without it, clocks are read with the system call.
///
/// # Safety
/// `vdso` is the address of Linux's vDSO, or 0.
unsafe fn find_clock(vdso: usize) {
    const NAME: &[u8] = b"__vdso_clock_gettime\0";
    if vdso == 0 {
        return;
    }
    // SAFETY: an ELF image of Linux's making, mapped as a whole.
    unsafe {
        let headers = (vdso + *((vdso + 32) as *const usize)) as *const ProgramHeader;
        let count = usize::from(*((vdso + 56) as *const u16));
        let (mut length, mut dynamic) = (PAGE_SIZE, 0);
        for index in 0..count {
            let header = headers.add(index).read();
            match header.kind {
                PT_LOAD => length = length.max(header.offset + header.memory_length),
                PT_DYNAMIC => dynamic = vdso + header.offset,
                _ => {}
            }
        }
        state::VDSO.set(MemoryRange {
            start: vdso,
            length: page_up(length).unwrap_or(length),
        });
        if dynamic == 0 {
            return;
        }
        let (mut strings, mut symbols) = (0, 0);
        let mut entry = dynamic as *const usize;
        while entry.read() != 0 {
            match entry.read() {
                5 => strings = vdso + entry.add(1).read(),
                6 => symbols = vdso + entry.add(1).read(),
                _ => {}
            }
            entry = entry.add(2);
        }
        // The symbol table has no length of its own; the string table follows it.
        if symbols == 0 || strings < symbols {
            return;
        }
        for symbol in (symbols..strings).step_by(24) {
            let name = strings + *(symbol as *const u32) as usize;
            let value = *((symbol + 8) as *const usize);
            let matches = NAME
                .iter()
                .enumerate()
                .all(|(index, byte)| *((name + index) as *const u8) == *byte);
            if value != 0 && matches {
                time::set_clock(vdso + value);
                return;
            }
        }
    }
}

fn read_parameters() -> (Parameters, MemoryRange) {
    const FOREIGN: &str =
        "started with foreign parameters: the shim is not a program to run by hand";
    let length = match linux::file_size(descriptor::PARAMETERS) {
        Ok((size, _)) if size >= Parameters::SIZE as u64 => size as usize,
        _ => fail(FOREIGN, None),
    };
    let start = match linux::map_new(0, length, raw::PROT_READ, descriptor::PARAMETERS, 0) {
        Ok(start) => start,
        Err(error) => fail("cannot map the parameters", Some(error)),
    };
    // SAFETY: mapped just now, and long enough.
    let bytes = unsafe { &*(start as *const [u8; Parameters::SIZE]) };
    match Parameters::from_bytes(bytes) {
        Some(parameters) => (parameters, MemoryRange { start, length }),
        None => fail(FOREIGN, None),
    }
}

/// A piece of the parameter file.
fn part(file: MemoryRange, extent: Extent, what: &'static str) -> MemoryRange {
    let end = extent.offset.checked_add(extent.length);
    if end.is_none_or(|end| end > file.length as u64) {
        fail_piece(what);
    }
    MemoryRange {
        start: file.start + extent.offset as usize,
        length: extent.length as usize,
    }
}

fn fail_piece(what: &str) -> ! {
    crate::message::Line::new()
        .text("the file ends before its ")
        .text(what)
        .text(" does")
        .print();
    fail("the image is damaged: build it again", None)
}

fn fail_kernel(error: elf::Error) -> ! {
    crate::message::Line::new()
        .text("the kernel cannot be used: ")
        .text(error.describe())
        .print();
    fail("the image is damaged: build it again", None)
}

/// Maps a piece of the image read-only.
fn map_piece(file: i32, file_length: u64, extent: Extent, what: &'static str) -> MemoryRange {
    let end = extent.offset.checked_add(extent.length);
    if end.is_none_or(|end| end > file_length) {
        fail_piece(what);
    }
    let length = extent.length as usize;
    if length == 0 {
        return MemoryRange::default();
    }
    let (page, rest) = (
        extent.offset as usize & !(PAGE_SIZE - 1),
        extent.offset as usize % PAGE_SIZE,
    );
    match linux::map_new(0, length + rest, raw::PROT_READ, file, page) {
        Ok(start) => MemoryRange {
            start: start + rest,
            length,
        },
        Err(error) => fail("cannot map the image", Some(error)),
    }
}

/// # Safety
/// The range holds nothing that needs other access.
unsafe fn protect(start: usize, length: usize, protection: u32) {
    // SAFETY: the caller's promise.
    let result = unsafe {
        linux::syscall(
            raw::__NR_mprotect,
            [start, length, protection as usize, 0, 0, 0],
        )
    };
    if result < 0 {
        fail("Linux refuses to protect the shim's memory", Some(result));
    }
}

/// Maps the kernel's segments at a random address, with a guard page at either end.
fn map_kernel(program: &Program, file_offset: usize, mut random: usize) -> MemoryRange {
    if !file_offset.is_multiple_of(PAGE_SIZE) {
        fail_piece("kernel");
    }
    let length = program.span + 2 * PAGE_SIZE;
    let places = (KERNEL_AREA.end - KERNEL_AREA.start - length) / PAGE_SIZE;
    let reserved = loop {
        let address = KERNEL_AREA.start + random % places * PAGE_SIZE;
        match linux::map_new(address, length, raw::PROT_NONE, -1, 0) {
            Ok(address) => break address,
            // Taken, which is all but impossible: try elsewhere.
            Err(error) if error == -linux::EEXIST => {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            }
            Err(error) => fail("cannot map the kernel", Some(error)),
        }
    };
    let base = reserved + PAGE_SIZE;
    let mut text = MemoryRange::default();
    let mut data = MemoryRange {
        start: base + program.span,
        length: 0,
    };
    for segment in program.segments() {
        let delta = segment.address % PAGE_SIZE;
        let start = base + segment.address - delta;
        let protection = raw::PROT_READ
            | if segment.write { raw::PROT_WRITE } else { 0 }
            | if segment.execute { raw::PROT_EXEC } else { 0 };
        let file_length = page_up(delta + segment.file_length).unwrap_or(0);
        let memory_length = page_up(delta + segment.memory_length).unwrap_or(0);
        if segment.file_length > 0 {
            let position = file_offset + segment.offset - delta;
            map_fixed(start, file_length, protection, descriptor::IMAGE, position);
        }
        if segment.write {
            let from = start + delta + segment.file_length;
            let zeros = if segment.file_length > 0 {
                start + file_length - from
            } else {
                0
            };
            // SAFETY: the rest of the last page from the file, which is a private copy.
            unsafe { core::ptr::write_bytes(from as *mut u8, 0, zeros) };
            data.start = data.start.min(start);
        } else if data.start < start {
            // Text among the data could be made unexecutable by `protect`; no linker puts it there.
            fail_kernel(elf::Error::Segments);
        }
        let file_length = if segment.file_length > 0 {
            file_length
        } else {
            0
        };
        if memory_length > file_length {
            map_fixed(
                start + file_length,
                memory_length - file_length,
                protection,
                -1,
                0,
            );
        }
        if segment.execute {
            if text.length != 0 {
                fail_kernel(elf::Error::Segments);
            }
            text = MemoryRange {
                start,
                length: memory_length,
            };
        }
    }
    data.length = base + program.span - data.start;
    state::KERNEL_TEXT.set(text);
    state::KERNEL_DATA.set(data);
    MemoryRange {
        start: base,
        length: program.span,
    }
}

/// Maps pages over a part of the kernel's reservation.
fn map_fixed(start: usize, length: usize, protection: u32, file: i32, offset: usize) {
    let anonymous = if file < 0 { raw::MAP_ANONYMOUS } else { 0 };
    let flags = (raw::MAP_PRIVATE | raw::MAP_FIXED | anonymous) as usize;
    // SAFETY: lies in the reservation.
    let result = unsafe {
        let arguments = [start, length, protection as usize, flags, int(file), offset];
        linux::syscall(raw::__NR_mmap, arguments)
    };
    if result == -linux::EPERM || result == -linux::EACCES {
        fail(
            "Linux refuses to execute from the image file: its file system is mounted noexec; \
             put the image elsewhere",
            None,
        );
    }
    if result < 0 {
        fail("cannot map the kernel", Some(result));
    }
}

/// The signal stack and the kernel's first stack, with guard pages around each.
fn map_stacks(auxiliary: &Auxiliary) -> (MemoryRange, MemoryRange) {
    let frame = auxiliary.signal_frame.max(4096);
    let Some(signal) = page_up(frame * SIGNAL_FRAMES + SIGNAL_STACK) else {
        fail("Linux says that signal frames fill the memory", None);
    };
    let length = signal + KERNEL_STACK + 3 * PAGE_SIZE;
    let start = match linux::map_new(0, length, raw::PROT_NONE, -1, 0) {
        Ok(start) => start,
        Err(error) => fail("no memory for stacks", Some(error)),
    };
    let signal = MemoryRange {
        start: start + PAGE_SIZE,
        length: signal,
    };
    let kernel = MemoryRange {
        start: signal.start + signal.length + PAGE_SIZE,
        length: KERNEL_STACK,
    };
    for stack in [signal, kernel] {
        // SAFETY: mapped just now.
        unsafe { protect(stack.start, stack.length, raw::PROT_READ | raw::PROT_WRITE) };
    }
    (signal, kernel)
}

/// State components that the kernel is to save, and how many bytes XSAVE needs for them.
fn vector_state() -> (u64, u32) {
    const OSXSAVE: u32 = 1 << 27;
    if x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
        return (0, 0);
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV exists where OSXSAVE says so.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    let enabled = u64::from(high) << 32 | u64::from(low);
    let saved = enabled & !UNSAVED_COMPONENTS;
    if enabled & !UNSAVED_COMPONENTS == enabled {
        return (saved, x86_64::__cpuid_count(0xd, 0).ebx);
    }
    let mut size = 576;
    for component in (2..63).filter(|component| saved >> component & 1 != 0) {
        let leaf = x86_64::__cpuid_count(0xd, component);
        size = size.max(leaf.eax + leaf.ebx);
    }
    (saved, size)
}

fn make_epoll() {
    // SAFETY: makes a descriptor.
    let made = unsafe { linux::syscall(raw::__NR_epoll_create1, [0; 6]) };
    if made < 0 {
        fail("Linux refuses an epoll descriptor", Some(made));
    }
    if made != descriptor::EPOLL as isize {
        // SAFETY: nothing is open at that number.
        let moved = unsafe {
            let arguments = [made as usize, int(descriptor::EPOLL), 0, 0, 0, 0];
            linux::syscall(raw::__NR_dup3, arguments)
        };
        if moved < 0 {
            fail("Linux refuses an epoll descriptor", Some(moved));
        }
        linux::close(made as i32);
    }
}

/// Leaves no number below [`descriptor::FIRST_FREE`] for descriptors that come over the link: the unused ones
/// hold the parameters, with which the filter allows nothing.
fn occupy(parameters: &Parameters) {
    for (used, number) in [
        (parameters.link, descriptor::LINK),
        (parameters.network, descriptor::NETWORK),
    ] {
        if !used {
            // SAFETY: nothing is open at that number.
            let result = unsafe {
                let arguments = [int(descriptor::PARAMETERS), int(number), 0, 0, 0, 0];
                linux::syscall(raw::__NR_dup3, arguments)
            };
            if result < 0 {
                fail("Linux refuses a descriptor", Some(result));
            }
        }
    }
}

/// The last step: from here on the process can do what the filter lists.
fn confine(filter: MemoryRange, memory_limit: u64) {
    let control = |option: u32, arguments: [usize; 4]| {
        let [a, b, c, d] = arguments;
        // SAFETY: each call below is as prctl(2) documents it, and takes rights away.
        unsafe { linux::syscall(raw::__NR_prctl, [option as usize, a, b, c, d, 0]) }
    };
    control(
        prctl::PR_SET_NAME,
        [c"kiln-instance".as_ptr() as usize, 0, 0, 0],
    );
    control(prctl::PR_SET_DUMPABLE, [0; 4]);
    if memory_limit < HUGE_PAGE_LIMIT {
        control(prctl::PR_SET_THP_DISABLE, [1, 0, 0, 0]);
    }
    let result = control(prctl::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]);
    if result < 0 {
        fail("Linux refuses no_new_privs", Some(result));
    }
    let (start, length) = linux::section();
    // Without a selector byte nothing outside the section is ever let through.
    let arguments = [prctl::PR_SYS_DISPATCH_ON as usize, start, length, 0];
    let result = control(prctl::PR_SET_SYSCALL_USER_DISPATCH, arguments);
    if result < 0 {
        fail(
            "this Linux has no syscall user dispatch (version 5.11 or later with CONFIG_GENERIC_ENTRY); \
             use --engine qemu",
            Some(result),
        );
    }
    let count = filter.length / 8;
    if count == 0 || count > MAX_FILTER {
        fail("no usable seccomp filter among the parameters", None);
    }
    // `struct sock_fprog`: a 16-bit count, padding, address.
    let program = [count, filter.start];
    let result = control(
        prctl::PR_SET_SECCOMP,
        [SECCOMP_MODE_FILTER, program.as_ptr() as usize, 0, 0],
    );
    if result < 0 {
        fail(
            "this Linux has no seccomp filters (CONFIG_SECCOMP_FILTER), or an outer sandbox forbids them; \
             use --engine qemu",
            Some(result),
        );
    }
}

//! What a freestanding program needs: relocation, memory functions, unwinding symbols, panics with a backtrace.

use core::{
    fmt::{self, Write},
    panic::PanicInfo,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use kiln_abi::host::{BootInformation, MemoryRange, PAGE_SIZE, Protection, exit_code};

static BOOT: AtomicPtr<BootInformation> = AtomicPtr::new(ptr::null_mut());

/// Keeps the boot information for panics.
pub fn remember(boot: &'static BootInformation) {
    BOOT.store(ptr::from_ref(boot).cast_mut(), Ordering::Relaxed);
}

/// The boot information, once it is kept.
pub fn boot() -> Option<&'static BootInformation> {
    // SAFETY: null, or what `remember` stored: a reference for ever.
    unsafe { BOOT.load(Ordering::Relaxed).as_ref() }
}

/// Writes to the console; what it does not take is lost.
pub fn say(bytes: &[u8]) {
    if let Some(boot) = boot() {
        (boot.host.console_write)(bytes.as_ptr(), bytes.len());
    }
}

/// An entry of the dynamic section (`Elf64_Dyn`).
#[repr(C)]
pub struct Dynamic {
    tag: i64,
    value: u64,
}

/// A relocation with addend (`Elf64_Rela`).
#[repr(C)]
pub struct Relocation {
    offset: u64,
    info: u64,
    addend: u64,
}

const DT_NULL: i64 = 0;
const DT_RELA: i64 = 7;
const DT_RELASZ: i64 = 8;
const DT_RELRSZ: i64 = 35;
const DT_RELR: i64 = 36;
const R_X86_64_RELATIVE: u64 = 8;

/// Applies the image's relative relocations. Runs before they are applied, so it uses nothing that needs one.
pub unsafe extern "sysv64" fn relocate(base: u64, mut dynamic: *const Dynamic) {
    let (mut table, mut length) = (0, 0);
    let (mut packed, mut packed_length) = (0, 0);
    // SAFETY: the linker made the section and ended it with DT_NULL; its relocations lie in the image's data.
    unsafe {
        while (*dynamic).tag != DT_NULL {
            match (*dynamic).tag {
                DT_RELA => table = (*dynamic).value,
                DT_RELASZ => length = (*dynamic).value,
                DT_RELR => packed = (*dynamic).value,
                DT_RELRSZ => packed_length = (*dynamic).value,
                _ => {}
            }
            dynamic = dynamic.add(1);
        }
        let mut relocation = (base + table) as *const Relocation;
        let end = (base + table + length) as *const Relocation;
        while relocation < end {
            if (*relocation).info == R_X86_64_RELATIVE {
                let place = (base + (*relocation).offset) as *mut u64;
                place.write_unaligned(base.wrapping_add((*relocation).addend));
            }
            relocation = relocation.add(1);
        }
        // Packed ones (System V ABI, DT_RELR): an even word is an address, an odd one a map of the 63 words that follow
        // the last address.
        let mut word = (base + packed) as *const u64;
        let end = (base + packed + packed_length) as *const u64;
        let mut place = core::ptr::null_mut::<u64>();
        while word < end {
            let entry = *word;
            if entry & 1 == 0 {
                place = (base + entry) as *mut u64;
                *place = base.wrapping_add(*place);
                place = place.add(1);
            } else {
                let mut bits = entry >> 1;
                let mut target = place;
                while bits != 0 {
                    if bits & 1 != 0 {
                        *target = base.wrapping_add(*target);
                    }
                    bits >>= 1;
                    target = target.wrapping_add(1);
                }
                place = place.wrapping_add(63);
            }
            word = word.add(1);
        }
    }
}

unsafe extern "C" {
    static __ehdr_start: u8;
}

/// Makes what only relocation had to write read-only (the image's `PT_GNU_RELRO`).
pub fn seal() {
    const PT_GNU_RELRO: u32 = 0x6474_e552;
    let base = &raw const __ehdr_start;
    // SAFETY: the image's own ELF header and program headers are mapped at its base.
    let range = unsafe {
        let table = base.add(base.add(32).cast::<u64>().read_unaligned() as usize);
        let count = base.add(56).cast::<u16>().read_unaligned();
        (0..usize::from(count)).find_map(|index| {
            let header = table.add(index * 56);
            (header.cast::<u32>().read_unaligned() == PT_GNU_RELRO).then(|| {
                let address = header.add(16).cast::<u64>().read_unaligned() as usize;
                let size = header.add(40).cast::<u64>().read_unaligned() as usize;
                (base as usize + address, base as usize + address + size)
            })
        })
    };
    if let (Some((start, end)), Some(boot)) = (range, boot()) {
        let start = start & !(PAGE_SIZE - 1);
        let end = end & !(PAGE_SIZE - 1);
        if end > start {
            (boot.host.protect)(start, end - start, Protection::READ.bits());
        }
    }
}

core::arch::global_asm!(
    ".pushsection .text.kiln_memory, \"ax\", @progbits",
    ".globl memcpy, memmove, memset, memcmp, bcmp",
    // memcpy(rdi = to, rsi = from, rdx = length)
    "memcpy:",
    "mov rax, rdi",
    "cmp rdx, 16",
    "jb 3f",
    // The last sixteen bytes are loaded first and stored last: so the length need not be a multiple.
    "movups xmm1, [rsi + rdx - 16]",
    "lea rcx, [rdi + rdx - 16]",
    "cmp rdx, 512",
    "ja 2f",
    "1:",
    "movups xmm0, [rsi]",
    "movups [rdi], xmm0",
    "add rsi, 16",
    "add rdi, 16",
    "sub rdx, 16",
    "8:",
    "cmp rdx, 16",
    "jae 1b",
    "movups [rcx], xmm1",
    "ret",
    // Not by a string instruction: QEMU's translator does those byte by byte, and here they are no faster on a processor.
    "2:",
    "movups xmm0, [rsi]",
    "movups xmm2, [rsi + 16]",
    "movups xmm3, [rsi + 32]",
    "movups xmm4, [rsi + 48]",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm2",
    "movups [rdi + 32], xmm3",
    "movups [rdi + 48], xmm4",
    "add rsi, 64",
    "add rdi, 64",
    "sub rdx, 64",
    "cmp rdx, 64",
    "jae 2b",
    "jmp 8b",
    // Fewer than sixteen: two overlapping pieces, both loaded before either is stored.
    "3:",
    "cmp edx, 8",
    "jb 4f",
    "mov r8, [rsi]",
    "mov r9, [rsi + rdx - 8]",
    "mov [rdi], r8",
    "mov [rdi + rdx - 8], r9",
    "ret",
    "4:",
    "cmp edx, 4",
    "jb 5f",
    "mov r8d, [rsi]",
    "mov r9d, [rsi + rdx - 4]",
    "mov [rdi], r8d",
    "mov [rdi + rdx - 4], r9d",
    "ret",
    "5:",
    "cmp edx, 1",
    "jb 7f",
    "je 6f",
    "movzx r8d, word ptr [rsi]",
    "movzx r9d, byte ptr [rsi + rdx - 1]",
    "mov [rdi], r8w",
    "mov [rdi + rdx - 1], r9b",
    "ret",
    "6:",
    "movzx r8d, byte ptr [rsi]",
    "mov [rdi], r8b",
    "7:",
    "ret",
    // memmove: forwards unless the destination begins inside the source.
    "memmove:",
    "mov rcx, rdi",
    "sub rcx, rsi",
    "cmp rcx, rdx",
    "jae memcpy",
    "mov rax, rdi",
    "cmp rdx, 16",
    "jb 3b",
    "movups xmm1, [rsi]",
    "1:",
    "movups xmm0, [rsi + rdx - 16]",
    "movups [rdi + rdx - 16], xmm0",
    "sub rdx, 16",
    "cmp rdx, 16",
    "jae 1b",
    "movups [rdi], xmm1",
    "ret",
    // memset(rdi = to, esi = byte, rdx = length): as memcpy.
    "memset:",
    "mov rax, rdi",
    "movzx esi, sil",
    "mov rcx, 0x0101010101010101",
    "imul rsi, rcx",
    "movq xmm0, rsi",
    "cmp rdx, 16",
    "jb 4f",
    "punpcklqdq xmm0, xmm0",
    "movups [rdi + rdx - 16], xmm0",
    "cmp rdx, 64",
    "jb 3f",
    "2:",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm0",
    "movups [rdi + 32], xmm0",
    "movups [rdi + 48], xmm0",
    "add rdi, 64",
    "sub rdx, 64",
    "cmp rdx, 64",
    "jae 2b",
    "3:",
    "cmp rdx, 16",
    "jb 7f",
    "movups [rdi], xmm0",
    "add rdi, 16",
    "sub rdx, 16",
    "jmp 3b",
    "4:",
    "cmp edx, 8",
    "jb 5f",
    "mov [rdi], rsi",
    "mov [rdi + rdx - 8], rsi",
    "ret",
    "5:",
    "cmp edx, 4",
    "jb 6f",
    "mov [rdi], esi",
    "mov [rdi + rdx - 4], esi",
    "ret",
    // Up to three: first, last and middle.
    "6:",
    "test edx, edx",
    "je 7f",
    "mov [rdi], sil",
    "mov [rdi + rdx - 1], sil",
    "shr edx, 1",
    "mov [rdi + rdx], sil",
    "7:",
    "ret",
    // memcmp(rdi, rsi, rdx)
    "memcmp:",
    "bcmp:",
    "1:",
    "cmp rdx, 8",
    "jb 3f",
    "mov rax, [rdi]",
    "mov rcx, [rsi]",
    "cmp rax, rcx",
    "jne 2f",
    "add rdi, 8",
    "add rsi, 8",
    "sub rdx, 8",
    "jmp 1b",
    "2:",
    "bswap rax",
    "bswap rcx",
    "cmp rax, rcx",
    "sbb eax, eax",
    "or eax, 1",
    "ret",
    "3:",
    "test rdx, rdx",
    "je 4f",
    "movzx eax, byte ptr [rdi]",
    "movzx ecx, byte ptr [rsi]",
    "sub eax, ecx",
    "jne 5f",
    "inc rdi",
    "inc rsi",
    "dec rdx",
    "jmp 3b",
    "4:",
    "xor eax, eax",
    "5:",
    "ret",
    ".popsection",
);

/// Never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() {}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        say(text.as_bytes());
        Ok(())
    }
}

/// Most frames of a backtrace.
const DEPTH: usize = 40;

#[panic_handler]
fn panic(information: &PanicInfo<'_>) -> ! {
    let mut console = Console;
    // Nothing can be done about a console that does not take the message.
    let _ = writeln!(console, "kiln: kernel panic: {information}");
    let Some(boot) = boot() else { loop {} };
    let mut frame: u64;
    // SAFETY: reads a register.
    unsafe {
        core::arch::asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags))
    };
    let inside = |range: MemoryRange, address: u64| {
        address >= range.start as u64 && address - (range.start as u64) < range.length as u64
    };
    for depth in 0..DEPTH {
        if frame == 0 || !frame.is_multiple_of(8) {
            break;
        }
        // SAFETY: frame pointers of the kernel's own stack; the chain ends with zero, and is left when an address does
        // not lie in the kernel's text.
        let (next, address) = unsafe {
            (
                (frame as *const u64).read(),
                (frame as *const u64).add(1).read(),
            )
        };
        if !inside(boot.kernel_text, address) {
            break;
        }
        let offset = address - boot.kernel.start as u64;
        // The call lies before the address to return to, which may be another function's when the call never returns.
        match kiln_kernel::boot::symbols::kernel_symbol(boot.kernel_file, offset - 1) {
            Some((name, distance)) => {
                let distance = distance + 1;
                let _ = writeln!(console, "  #{depth} {offset:#x} {name}+{distance:#x}");
            }
            None => {
                let _ = writeln!(console, "  #{depth} {offset:#x}");
            }
        }
        if next <= frame {
            break;
        }
        frame = next;
    }
    (boot.host.exit)(exit_code::KERNEL_PANIC)
}

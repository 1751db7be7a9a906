//! Turns system call instructions into jumps, so that a call costs no trap.
//!
//! In front of each `syscall` instruction, five bytes or more of whole instructions are replaced by a jump to a stub,
//! which lies in a segment added to the file. The stub executes what was replaced, puts the address behind the
//! `syscall` into RCX (as the instruction would) and jumps to the kernel's fast entry, whose address lies at
//! [`FAST_ENTRY_OFFSET`] from the GS base. It touches neither stack nor flags nor any register but RCX.
//!
//! The `syscall` instruction itself stays where it is: whoever jumps straight to it gets the trap, and a call that must
//! be made again after a signal is made by going back to it.
//!
//! A site is rewritten only if nothing can notice:
//!
//! * no jump, call, function or unwinding leads between the replaced instructions. One single instruction of five
//!   bytes or more (the usual `mov eax, N`) leaves no such place at all. Several are taken only in functions without
//!   indirect jumps and landing pads, and no direct jump in the whole file may lead between them;
//! * the replaced instructions mean the same at another address: operands relative to RIP are adjusted, conditional
//!   jumps get their long form, and nothing else that jumps or calls is moved;
//! * it is not `rt_sigreturn`, whose bytes unwinders recognise.
//!
//! A file that cannot be extended (no program header to spare), or whose text is relocated, is left alone.
//! The result is still an ordinary file, but runs on Kiln only.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code as Opcode, Decoder, DecoderOptions, FlowControl, Instruction};
use object::{
    LittleEndian,
    elf::{self as constants, FileHeader64},
    read::elf::{FileHeader, ProgramHeader},
};

use crate::{
    code::{Code, Range},
    elf::{self, Elf},
};

/// Where the fast entry's address lies, from the GS base (`kiln_abi::host::CpuArea::fast_entry`).
pub const FAST_ENTRY_OFFSET: u32 = 8;

const PAGE: u64 = 4096;
/// Length of `jmp rel32`.
const JUMP: usize = 5;
const NOP: u8 = 0x90;
const BREAKPOINT: u8 = 0xcc;
/// Stubs begin at multiples of this.
const STUB_ALIGNMENT: usize = 16;
/// Number of `rt_sigreturn`.
const SIGNAL_RETURN: u32 = 15;
const PROGRAM_HEADER_SIZE: usize = 56;

/// Why a site keeps its trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It is `rt_sigreturn`.
    SignalReturn,
    /// Too few instructions lie in front of it, or one that jumps.
    NoRoom,
    /// A jump leads between the instructions in front of it.
    Target,
    /// Its function has indirect jumps or landing pads, and more than one instruction would have to move; or a jump
    /// leads into the middle of an instruction.
    Unknown,
    /// An instruction in front of it cannot move.
    Fixed,
}

/// What was done to a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Addresses of the `syscall` instructions that are not reached any more.
    pub rewritten: Vec<u64>,
    /// Those that stay, and why.
    pub left: BTreeMap<u64, Reason>,
}

/// Rewrites an ELF file. Returns `None` when there is nothing to rewrite, or the file cannot be rewritten.
#[must_use]
pub fn rewrite(bytes: &[u8]) -> Option<(Vec<u8>, Report)> {
    let elf = elf::parse(bytes).ok()?;
    if elf.text_relocations {
        return None;
    }
    let header = Headers::parse(bytes)?;
    let code = Code::new(bytes, &elf);
    let sites = code.sites();
    if sites.is_empty() {
        return None;
    }
    let targets = code.targets();
    let end = elf
        .segments
        .iter()
        .map(|s| s.address.saturating_add(s.memory_length))
        .max()?;
    let address = end.checked_next_multiple_of(PAGE)?;
    let offset = (bytes.len() as u64).checked_next_multiple_of(PAGE)?;

    let mut output = bytes.to_vec();
    let mut stubs = Vec::new();
    let mut report = Report::default();
    let mut functions: BTreeMap<Range, Vec<Instruction>> = BTreeMap::new();
    // Bytes of one site must not be changed for another.
    let mut taken_to = 0;
    for site in sites {
        if site.number == Some(SIGNAL_RETURN) || is_signal_return(&code, site.address) {
            report.left.insert(site.address, Reason::SignalReturn);
            continue;
        }
        let instructions = functions
            .entry(site.function)
            .or_insert_with(|| code.decode(site.function));
        let moved = movable(
            instructions,
            site.address,
            site.function,
            &targets,
            taken_to,
        )
        .and_then(|window| {
            let stub_address = address + stubs.len() as u64;
            let stub = stub(&code, window, stub_address, site.address + 2)?;
            patch(&mut output, &elf, window, site.address, stub_address)?;
            Ok(stub)
        });
        match moved {
            Ok(stub) => {
                stubs.extend(stub);
                stubs.resize(stubs.len().next_multiple_of(STUB_ALIGNMENT), BREAKPOINT);
                report.rewritten.push(site.address);
            }
            Err(reason) => {
                report.left.insert(site.address, reason);
            }
        }
        taken_to = site.address + 2;
    }
    if report.rewritten.is_empty() {
        return None;
    }
    output.resize(usize::try_from(offset).ok()?, 0);
    let length = stubs.len() as u64;
    output.extend(stubs);
    header.add_segment(&mut output, offset, address, length)?;
    Some((output, report))
}

/// `mov rax, 15` in front of a site, in the form that unwinders look for, however the bytes before it decode.
fn is_signal_return(code: &Code<'_>, site: u64) -> bool {
    site.checked_sub(7)
        .and_then(|start| code.bytes_at(start, site))
        == Some(&[0x48, 0xc7, 0xc0, SIGNAL_RETURN as u8, 0, 0, 0])
}

/// The shortest run of instructions in front of a site that can make room for a jump.
fn movable<'a>(
    instructions: &'a [Instruction],
    site: u64,
    function: Range,
    targets: &BTreeSet<u64>,
    taken_to: u64,
) -> Result<&'a [Instruction], Reason> {
    let end = instructions
        .iter()
        .position(|instruction| instruction.ip() == site)
        .ok_or(Reason::NoRoom)?;
    let mut start = end;
    loop {
        let previous = start.checked_sub(1).ok_or(Reason::NoRoom)?;
        let instruction = instructions.get(previous).ok_or(Reason::NoRoom)?;
        if !(instruction.flow_control() == FlowControl::Next || is_conditional_jump(instruction))
            || instruction.is_invalid()
            || instruction.ip() < taken_to
        {
            return Err(Reason::NoRoom);
        }
        start = previous;
        if site - instruction.ip() >= JUMP as u64 {
            break;
        }
        // Not the first of the run, so nothing may lead here.
        if targets.contains(&instruction.ip()) || instruction.code() == Opcode::Endbr64 {
            return Err(Reason::Target);
        }
    }
    let window = instructions.get(start..end).ok_or(Reason::NoRoom)?;
    // A jump into the middle of an instruction: what looks like these instructions may be others.
    let boundaries: BTreeSet<u64> = instructions.iter().map(Instruction::ip).collect();
    if targets
        .range(function.start..function.end)
        .any(|target| !boundaries.contains(target))
    {
        return Err(Reason::Unknown);
    }
    if window.len() > 1 {
        let indirect = instructions
            .iter()
            .any(|instruction| instruction.flow_control() == FlowControl::IndirectBranch);
        if indirect || function.landing_pads {
            return Err(Reason::Unknown);
        }
    }
    Ok(window)
}

/// A jump on a condition of the flags, not on RCX.
fn is_conditional_jump(instruction: &Instruction) -> bool {
    instruction.is_jcc_short_or_near()
}

/// The condition's four bits, which both forms of such a jump end their opcode with.
fn condition(bytes: &[u8]) -> Option<u8> {
    match *bytes {
        [opcode @ 0x70..=0x7f, _] | [0x0f, opcode @ 0x80..=0x8f, _, _, _, _] => Some(opcode & 0xf),
        _ => None,
    }
}

/// The instructions of a stub.
fn stub(
    code: &Code<'_>,
    window: &[Instruction],
    address: u64,
    return_address: u64,
) -> Result<Vec<u8>, Reason> {
    let relative = |from: u64, to: u64| {
        i32::try_from(to.wrapping_sub(from) as i64)
            .map(i32::to_le_bytes)
            .map_err(|_| Reason::Fixed)
    };
    let mut stub = Vec::new();
    for instruction in window {
        let bytes = code
            .bytes_at(instruction.ip(), instruction.next_ip())
            .filter(|bytes| bytes.len() == instruction.len())
            .ok_or(Reason::Fixed)?;
        if is_conditional_jump(instruction) {
            // Its long form: 0f 8x rel32.
            stub.extend_from_slice(&[0x0f, 0x80 | condition(bytes).ok_or(Reason::Fixed)?]);
            let next = address + stub.len() as u64 + 4;
            stub.extend_from_slice(&relative(next, instruction.near_branch_target())?);
            continue;
        }
        let at = stub.len();
        stub.extend_from_slice(bytes);
        if instruction.is_ip_rel_memory_operand() {
            let mut decoder = Decoder::with_ip(64, bytes, instruction.ip(), DecoderOptions::NONE);
            let again = decoder.decode();
            let offsets = decoder.get_constant_offsets(&again);
            if offsets.displacement_size() != 4 {
                return Err(Reason::Fixed);
            }
            let next = address + stub.len() as u64;
            let field = at + offsets.displacement_offset();
            stub.get_mut(field..field + 4)
                .ok_or(Reason::Fixed)?
                .copy_from_slice(&relative(next, instruction.ip_rel_memory_address())?);
        }
    }
    // lea rcx, [rip + return address]
    stub.extend_from_slice(&[0x48, 0x8d, 0x0d]);
    let next = address + stub.len() as u64 + 4;
    stub.extend_from_slice(&relative(next, return_address)?);
    // jmp qword ptr gs:[FAST_ENTRY_OFFSET]
    stub.extend_from_slice(&[0x65, 0xff, 0x24, 0x25]);
    stub.extend_from_slice(&FAST_ENTRY_OFFSET.to_le_bytes());
    Ok(stub)
}

/// Writes the jump over a run of instructions, and fills up what is left of it.
fn patch(
    output: &mut [u8],
    elf: &Elf,
    window: &[Instruction],
    site: u64,
    stub: u64,
) -> Result<(), Reason> {
    let start = window.first().ok_or(Reason::NoRoom)?.ip();
    let offset = elf
        .offset_of(start)
        .and_then(|o| usize::try_from(o).ok())
        .ok_or(Reason::Fixed)?;
    let distance = stub.wrapping_sub(start + JUMP as u64) as i64;
    let distance = i32::try_from(distance).map_err(|_| Reason::Fixed)?;
    let length = usize::try_from(site - start).map_err(|_| Reason::Fixed)?;
    let room = output
        .get_mut(offset..offset + length)
        .ok_or(Reason::Fixed)?;
    let (jump, rest) = room.split_at_mut_checked(JUMP).ok_or(Reason::NoRoom)?;
    let (opcode, operand) = jump.split_first_mut().ok_or(Reason::NoRoom)?;
    *opcode = 0xe9;
    operand.copy_from_slice(&distance.to_le_bytes());
    rest.fill(NOP);
    Ok(())
}

/// Where the program headers are, and which one can be given another meaning.
struct Headers {
    /// Offset in the file.
    table: usize,
    /// Index of a header that nothing needs at run time.
    spare: usize,
    /// Index of the last segment to load.
    last_load: usize,
}

impl Headers {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let header = FileHeader64::<LittleEndian>::parse(bytes).ok()?;
        let endian = LittleEndian;
        let headers = header.program_headers(endian, bytes).ok()?;
        let last = |kind| {
            headers
                .iter()
                .rposition(|segment| segment.p_type(endian) == kind)
        };
        // Notes say how a file was built; at run time debuggers and core dumps read them.
        let spare = last(constants::PT_NOTE).or_else(|| last(constants::PT_GNU_PROPERTY))?;
        let last_load = last(constants::PT_LOAD)?;
        // Loaders want them in order; a file that is not would be refused anyway.
        let addresses: Vec<u64> = headers
            .iter()
            .filter(|segment| segment.p_type(endian) == constants::PT_LOAD)
            .map(|segment| segment.p_vaddr(endian))
            .collect();
        (addresses.is_sorted() && header.e_phentsize(endian) as usize == PROGRAM_HEADER_SIZE)
            .then_some(())?;
        Some(Self {
            table: usize::try_from(header.e_phoff(endian)).ok()?,
            spare,
            last_load,
        })
    }

    /// Takes the spare header out and puts one for the stubs behind the last segment to load.
    fn add_segment(&self, output: &mut [u8], offset: u64, address: u64, length: u64) -> Option<()> {
        let mut header = Vec::new();
        header.extend_from_slice(&constants::PT_LOAD.0.to_le_bytes());
        header.extend_from_slice(&(constants::PF_R.0 | constants::PF_X.0).to_le_bytes());
        for value in [offset, address, address, length, length, PAGE] {
            header.extend_from_slice(&value.to_le_bytes());
        }
        let (first, last) = (
            self.spare.min(self.last_load),
            self.spare.max(self.last_load),
        );
        let at = |index: usize| self.table + index * PROGRAM_HEADER_SIZE;
        let range = output.get_mut(at(first)..at(last + 1))?;
        if self.spare < self.last_load {
            // Those behind the spare one move up; the new one comes last.
            range.rotate_left(PROGRAM_HEADER_SIZE);
            range
                .last_chunk_mut::<PROGRAM_HEADER_SIZE>()?
                .copy_from_slice(&header);
        } else {
            // Those between move down; the new one comes right behind the last segment.
            let between = range.get_mut(PROGRAM_HEADER_SIZE..)?;
            between.rotate_right(PROGRAM_HEADER_SIZE);
            between
                .first_chunk_mut::<PROGRAM_HEADER_SIZE>()?
                .copy_from_slice(&header);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, process::Command};

    use super::*;

    /// Takes the kernel's place: sets GS up before anything else runs, makes the calls that come to the fast
    /// entry with a real instruction, and counts them.
    const HOST: &str = r#"
__asm__(
    ".globl host_start\n"
    "host_start:\n"
    "  mov $158, %eax\n"            // arch_prctl(ARCH_SET_GS, area)
    "  mov $0x1001, %edi\n"
    "  lea area(%rip), %rsi\n"
    "  lea host_entry(%rip), %rcx\n"
    "  mov %rcx, 8(%rsi)\n"
    "  jmp 1f\n"
    "1: syscall\n"
    "  jmp _start\n"
    "host_entry:\n"
    "  incq calls(%rip)\n"
    "  mov %rcx, back(%rip)\n"
    "  jmp 2f\n"
    "2: syscall\n"
    "  jmp *back(%rip)\n"
    ".bss\n"
    ".globl calls\n"
    "area: .space 64\n"
    "back: .space 8\n"
    "calls: .space 8\n"
    ".text\n");
extern unsigned long calls;
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <signal.h>
static volatile int handled;
static void handler(int number) { handled = number; }
int main(void) {
    signal(SIGUSR1, handler);
    if (raise(SIGUSR1) || handled != SIGUSR1) return 8;
    char text[64] = {0};
    int ends[2];
    struct stat status;
    unsigned long before = calls;
    if (getppid() <= 1 || pipe(ends) || write(ends[1], "through", 7) != 7) return 1;
    if (read(ends[0], text, sizeof text) != 7 || strcmp(text, "through")) return 2;
    int file = open("/proc/self/exe", O_RDONLY);
    if (file < 0 || fstat(file, &status) || lseek(file, 0, SEEK_END) != status.st_size) return 3;
    if (pread(file, text, 4, 0) != 4 || memcmp(text, "\177ELF", 4) || close(file)) return 4;
    if (close(-1) != -1 || syscall(SYS_getpid) != getpid()) return 5;
    free(malloc(1 << 22));
    struct timespec moment = {0, 1000};
    if (nanosleep(&moment, 0)) return 6;
    if (calls - before < 11) return 7;
    printf("%lu\n", calls);
    return 0;
}
"#;

    #[test]
    fn a_rewritten_program_makes_the_same_calls() {
        let directory = std::env::temp_dir().join(format!("kiln-rewrite-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (kind, symbols) in [("-static", "-g"), ("-static", "-s"), ("-static-pie", "-s")] {
            let (source, target) = (directory.join("a.c"), directory.join("a"));
            fs::write(&source, HOST).unwrap();
            let arguments = ["-O2", kind, symbols, "-Wl,-e,host_start", "-o"];
            let compiled = Command::new("cc")
                .args(arguments)
                .args([&target, &source])
                .output();
            let Ok(compiled) = compiled else { break };
            assert!(
                compiled.status.success(),
                "{}",
                String::from_utf8_lossy(&compiled.stderr)
            );
            let (bytes, report) = rewrite(&fs::read(&target).unwrap()).unwrap();
            assert!(report.rewritten.len() > 30, "{report:?}");
            fs::write(&target, bytes).unwrap();
            let output = Command::new(&target).output().unwrap();
            assert!(output.status.success(), "{kind}: {:?}", output.status);
            let calls: u64 = String::from_utf8_lossy(&output.stdout)
                .trim()
                .parse()
                .unwrap();
            assert!(calls >= 11);
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    /// Everything that a rewritten file may differ in, checked with another decoder run.
    fn assert_well_formed(before: &[u8]) -> Option<Report> {
        let (after, report) = rewrite(before)?;
        let (old, new) = (elf::parse(before).unwrap(), elf::parse(&after).unwrap());
        assert_eq!(old.segments.len() + 1, new.segments.len());
        assert!(new.segments.is_sorted_by_key(|segment| segment.address));
        let stubs = *new.segments.last().unwrap();
        assert!(stubs.is_executable() && !stubs.is_writable());
        assert_eq!((stubs.address % PAGE, stubs.offset % PAGE), (0, 0));
        let code = Code::new(&after, &new);
        for site in &report.rewritten {
            assert_eq!(
                code.bytes_at(*site, site + 2).unwrap(),
                crate::code::SYSCALL
            );
        }
        // Outside the places in front of rewritten sites and the program headers, nothing has changed.
        let mut allowed = vec![false; before.len()];
        allowed[..4096].fill(true);
        for site in &report.rewritten {
            let offset = old.offset_of(*site).unwrap() as usize;
            allowed[offset - 20..offset].fill(true);
        }
        for (index, (a, b)) in before.iter().zip(&after).enumerate() {
            assert!(a == b || allowed[index], "{index:#x}");
        }
        Some(report)
    }

    #[test]
    fn system_libraries_stay_well_formed() {
        for path in [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
            "/usr/bin/redis-server",
        ] {
            if let Ok(bytes) = fs::read(Path::new(path))
                && let Some(report) = assert_well_formed(&bytes)
            {
                let share =
                    report.rewritten.len() * 100 / (report.rewritten.len() + report.left.len());
                println!(
                    "{path}: {share} % of {}",
                    report.rewritten.len() + report.left.len()
                );
                for (address, reason) in &report.left {
                    println!("  {address:#x} {reason:?}");
                }
                assert!(share >= 50, "{path}: {share} %");
            }
        }
    }

    #[test]
    fn other_bytes_are_left_alone() {
        assert_eq!(rewrite(b""), None);
        assert_eq!(rewrite(b"\x7fELF\x02\x01\x01"), None);
        assert_eq!(rewrite(&fs::read("/proc/self/maps").unwrap()), None);
    }
}

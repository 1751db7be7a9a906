//! Puts the kernel into the lower half and says to it what there is.

use core::mem::size_of;
use core::ptr::addr_of;

use kiln_abi::host::{
    BOOT_MAGIC, BootInformation, Engine, HostInterface, KERNEL_RANGE_END, KERNEL_RANGE_START,
    MAX_DEVICES, MemoryRange, MmioDevice, PAGE_SIZE, PROGRAM_END, Protection, Source, VERSION,
};
use kiln_abi::image::Piece;
use kiln_shim_vm::command_line::{self, DeviceArgument};
use kiln_shim_vm::elf::Elf;
use kiln_shim_vm::memory::{Exhausted, Memory, USER_END};
use kiln_shim_vm::page::Kind;
use kiln_shim_vm::physical::{FRAME, Physical};
use kiln_shim_vm::start_info::StartInfo;

use crate::clock::CLOCK_PAGE;
use crate::cpu::{self, Features, ProcessorTlb};
use crate::descriptors::PROCESSOR;
use crate::entry::{self, CALLS, STUB_SIZE};
use crate::interrupts;
use crate::machine::Machine;
use crate::tables;

/// Address space for the kernel's first stack.
const STACK: usize = 256 << 10;
/// Address space that all of [`Places`] needs at most, beyond the pieces of the image.
const SPARE: usize = 1 << 30;
/// Registers of a virtio device: magic number, version, kind (virtio 1.2, 4.2.2).
const VIRTIO_MAGIC: (u64, u32) = (0, 0x7472_6976);
const VIRTIO_KIND: u64 = 8;

/// The pieces of the image and the run's configuration, all checked to lie in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pieces {
    /// The kernel's ELF file.
    pub kernel: Piece,
    /// What the manifest says to the kernel.
    pub program: Piece,
    /// The root file system.
    pub root: Piece,
    /// The configuration; empty if there is none.
    pub configuration: Piece,
}

/// Random bits, from the processor's generator if there is one; otherwise by how long things took so far.
fn random(features: &Features) -> u64 {
    let time = cpu::counter().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let time = (time ^ time >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    time ^ time >> 32 ^ cpu::random(features).unwrap_or(0)
}

/// A random page address from which `length` bytes lie between `start` and `end`.
fn random_address(features: &Features, start: usize, end: usize, length: usize) -> usize {
    let pages = (end - start).saturating_sub(length) / PAGE_SIZE;
    start + (random(features) % pages.max(1) as u64) as usize * PAGE_SIZE
}

/// Hands out addresses for what the kernel sees beside its image, an unmapped page between any two. Ends the machine when memory
/// is exhausted.
struct Places<'a> {
    memory: &'a mut Memory<ProcessorTlb>,
    next: usize,
}

impl Places<'_> {
    /// Maps whole frames around physical memory; the answer is the range of just the bytes asked for.
    fn fixed(&mut self, piece: Piece, protection: Protection, kind: Kind) -> MemoryRange {
        if piece.length == 0 {
            return MemoryRange::default();
        }
        let within = (piece.physical % FRAME) as usize;
        let start = self.next;
        let whole = (within + piece.length as usize).next_multiple_of(PAGE_SIZE);
        let first = piece.physical - within as u64;
        done(self.memory.map_fixed(start, whole, protection, kind, first));
        self.next += whole + PAGE_SIZE;
        MemoryRange {
            start: start + within,
            length: piece.length as usize,
        }
    }

    /// Maps memory by its source.
    fn source(&mut self, length: usize, protection: Protection, source: Source) -> MemoryRange {
        if length == 0 {
            return MemoryRange::default();
        }
        let start = self.next;
        let whole = length.next_multiple_of(PAGE_SIZE);
        done(self.memory.map(start, whole, protection, source, 0));
        self.next += whole + PAGE_SIZE;
        MemoryRange { start, length }
    }
}

/// What a mapping gives; ends the machine when memory is exhausted.
fn done<T, E>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(_) => crate::fail(format_args!(
            "too little memory for the kernel: give the machine more (QEMU: -m)"
        )),
    }
}

/// Loads the kernel and enters it.
pub fn run(machine: &mut Machine, pieces: &Pieces, info: &StartInfo) -> ! {
    let physical = machine.memory.physical();
    let features = &machine.features;
    let Some(file) = physical.bytes(pieces.kernel.physical, pieces.kernel.length) else {
        crate::fail(format_args!("the image's kernel lies outside of memory"))
    };
    let elf = match Elf::parse(file) {
        Ok(elf) => elf,
        Err(reason) => crate::fail(format_args!(
            "{reason}; the image is damaged, build it again"
        )),
    };
    let size = elf.size as usize;
    let base = random_address(features, PROGRAM_END, KERNEL_RANGE_START, size);
    let text = place_kernel(
        &mut machine.memory,
        &elf,
        file,
        pieces.kernel.physical,
        base,
    );

    let lengths = [
        pieces.kernel,
        pieces.program,
        pieces.root,
        pieces.configuration,
    ]
    .map(|piece| piece.length as usize);
    let length = lengths.iter().sum::<usize>() + SPARE;
    let next = random_address(features, KERNEL_RANGE_END, USER_END - PAGE_SIZE, length);
    let mut places = Places {
        memory: &mut machine.memory,
        next,
    };
    let (read, write) = (Protection::READ, Protection::READ | Protection::WRITE);

    let stack = places.source(STACK, write, Source::Zero).start + STACK;
    let frame = |pointer: *const u8| Piece {
        physical: tables::physical_of(pointer),
        length: FRAME,
    };
    let stubs = places
        .fixed(
            frame(addr_of!(entry::shim_stubs_start)),
            read | Protection::EXECUTE,
            Kind::Fixed,
        )
        .start;
    // The clocks expect their page right after the stubs.
    places.next = stubs + PAGE_SIZE;
    places.fixed(frame(addr_of!(CLOCK_PAGE).cast()), read, Kind::Fixed);

    let dma_length = (places.memory.left() / 24)
        .clamp(512 << 10, 4 << 20)
        .next_multiple_of(FRAME);
    let dma_piece = Piece {
        physical: done(places.memory.take_together(dma_length).ok_or(Exhausted)),
        length: dma_length,
    };
    let dma = places.fixed(dma_piece, write, Kind::Fixed);
    let root = places.source(pieces.root.length as usize, read, Source::Root);
    let [kernel_file, program, configuration] =
        [pieces.kernel, pieces.program, pieces.configuration]
            .map(|piece| places.fixed(piece, read, Kind::Fixed));
    let mut devices = [MmioDevice::default(); MAX_DEVICES];
    let device_count = map_devices(&mut places, &mut devices, physical, info) as u32;

    machine.clock.finish_start();
    if let Some(time) = crate::clock::battery_clock() {
        crate::clock::set_realtime(time);
    }
    let information = BootInformation {
        magic: BOOT_MAGIC,
        version: VERSION,
        engine: Engine::Vm as u32,
        host: interface(stubs),
        kernel: MemoryRange {
            start: base,
            length: size,
        },
        kernel_text: text,
        kernel_file,
        program,
        configuration,
        root,
        memory_limit: machine.memory.left(),
        dma,
        dma_physical: dma_piece.physical,
        link_descriptor: -1,
        network_descriptor: -1,
        device_count,
        xsave_size: features.xsave_size,
        xsave_mask: features.xsave_mask,
        devices,
    };
    let address = random_address(
        features,
        PROGRAM_END,
        KERNEL_RANGE_START,
        size_of::<BootInformation>(),
    );
    publish(&mut machine.memory, address, &information);

    // SAFETY: nobody else has a reference.
    unsafe { PROCESSOR.get() }.stubs = stubs;
    let clocks = stubs + offset_in_stubs(addr_of!(entry::clock_monotonic));
    machine.kernel = base..base + size;
    machine.kernel_text = text.start..text.start + text.length;
    machine.stubs = stubs..stubs + PAGE_SIZE;
    machine.clocks = clocks..stubs + PAGE_SIZE;
    // SAFETY: the entry point lies in the kernel's text, which is mapped, as is the stack.
    unsafe {
        // As after a call: the stack pointer is 8 below a multiple of 16.
        entry::enter_kernel(address, stack - 8, base + elf.entry as usize)
    }
}

/// Maps the kernel's segments: what is not written in place, what is written as a copy. The answer is where its text is.
fn place_kernel(
    memory: &mut Memory<ProcessorTlb>,
    elf: &Elf,
    file: &[u8],
    physical: u64,
    base: usize,
) -> MemoryRange {
    let mut text = MemoryRange::default();
    for segment in elf.segments() {
        let first = segment.address & !(FRAME - 1);
        let start = base + first as usize;
        let end = segment.address + segment.memory_size;
        let length = (end - first).next_multiple_of(FRAME) as usize;
        let mut protection = Protection::READ;
        protection.set(Protection::WRITE, segment.write);
        protection.set(Protection::EXECUTE, segment.execute);
        if segment.write || segment.memory_size > segment.file_size {
            let writable = Protection::READ | Protection::WRITE;
            done(memory.map(start, length, writable, Source::Zero, 0));
            let bytes =
                file.get(segment.offset as usize..(segment.offset + segment.file_size) as usize);
            done(memory.write(base + segment.address as usize, bytes.unwrap_or_default()));
            if !segment.write {
                done(memory.protect(start, length, protection));
            }
        } else {
            let frame = physical + (segment.offset & !(FRAME - 1));
            done(memory.map_fixed(start, length, protection, Kind::Fixed, frame));
        }
        if segment.execute {
            text = MemoryRange {
                start: base + segment.address as usize,
                length: segment.memory_size as usize,
            };
        }
    }
    text
}

/// Maps the registers of the devices on the command line that are there, and lets their lines interrupt. The answer is how many.
fn map_devices(
    places: &mut Places<'_>,
    devices: &mut [MmioDevice; MAX_DEVICES],
    physical: Physical,
    info: &StartInfo,
) -> usize {
    let mut count = 0;
    let mut mapped = (0, 0);
    for DeviceArgument {
        size,
        address,
        line,
    } in command_line::devices(info.command_line)
    {
        let (frame, within) = (address & !(FRAME - 1), address % FRAME);
        let fits = size >= 0x100 && within.saturating_add(size) <= FRAME && address % 8 == 0;
        if !fits
            || address >= 1 << 46
            || line >= interrupts::LINES
            || info.is_memory(physical, frame)
        {
            continue;
        }
        let [magic, kind] = tables::probe(address, [VIRTIO_MAGIC.0, VIRTIO_KIND]);
        if magic != VIRTIO_MAGIC.1 || kind == 0 {
            continue;
        }
        let Some(slot) = devices.get_mut(count) else {
            break;
        };
        if mapped.0 != frame {
            let piece = Piece {
                physical: frame,
                length: FRAME,
            };
            let access = Protection::READ | Protection::WRITE;
            mapped = (frame, places.fixed(piece, access, Kind::Device).start);
        }
        *slot = MmioDevice {
            registers: mapped.1 + within as usize,
            length: size as usize,
            interrupt: line,
            kind,
        };
        interrupts::enable_line(line);
        count += 1;
    }
    count
}

fn offset_in_stubs(pointer: *const u8) -> usize {
    pointer as usize - addr_of!(entry::shim_stubs_start) as usize
}

/// The table of calls: addresses in the page of stubs as ring 3 sees it.
fn interface(stubs: usize) -> HostInterface {
    const MONOTONIC: usize = core::mem::offset_of!(HostInterface, monotonic) / 8;
    const REALTIME: usize = core::mem::offset_of!(HostInterface, realtime) / 8;
    let mut addresses = [0; CALLS];
    for (number, address) in addresses.iter_mut().enumerate() {
        *address = stubs
            + match number {
                MONOTONIC => offset_in_stubs(addr_of!(entry::clock_monotonic)),
                REALTIME => offset_in_stubs(addr_of!(entry::clock_realtime)),
                _ => number * STUB_SIZE,
            };
    }
    // SAFETY: the interface is a table of function pointers, each to a stub that obeys the calling convention and has its call's number.
    unsafe { core::mem::transmute::<[usize; CALLS], HostInterface>(addresses) }
}

/// Copies the information to a page of its own at `address`, which the kernel can read.
fn publish(memory: &mut Memory<ProcessorTlb>, address: usize, information: &BootInformation) {
    const SIZE: usize = size_of::<BootInformation>();
    let length = SIZE.next_multiple_of(PAGE_SIZE);
    let writable = Protection::READ | Protection::WRITE;
    done(memory.map(address, length, writable, Source::Zero, 0));
    // SAFETY: the bytes of a structure that was just built; all of its padding is written as it is and never read.
    let bytes =
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(information).cast::<u8>(), SIZE) };
    done(memory.write(address, bytes));
    done(memory.protect(address, length, Protection::READ));
}

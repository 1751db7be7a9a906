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
use kiln_shim_vm::page::UNCACHED;
use kiln_shim_vm::physical::{FRAME, Physical};

use crate::clock::{CLOCK_PAGE, Clock};
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

/// What goes wrong for lack of memory.
const TOO_LITTLE: &str = "too little memory for the kernel: give the machine more (QEMU: -m)";

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

/// Hands out addresses for what the kernel sees beside its image, an unmapped page between any two.
struct Places<'a> {
    memory: &'a mut Memory<ProcessorTlb>,
    next: usize,
}

impl Places<'_> {
    /// Maps whole frames around physical memory; the answer is the range of just the bytes asked for.
    fn fixed(
        &mut self,
        piece: Piece,
        protection: Protection,
        bits: u64,
    ) -> Result<MemoryRange, Exhausted> {
        if piece.length == 0 {
            return Ok(MemoryRange::default());
        }
        let within = piece.physical % FRAME;
        let pages = (within + piece.length).div_ceil(FRAME);
        let start = self.next;
        self.memory
            .map_fixed(start, piece.physical - within, pages, protection, bits)?;
        self.next += (pages as usize + 1) * PAGE_SIZE;
        Ok(MemoryRange {
            start: start + within as usize,
            length: piece.length as usize,
        })
    }

    /// Maps memory by its source.
    fn source(
        &mut self,
        length: usize,
        protection: Protection,
        source: Source,
    ) -> Result<usize, Exhausted> {
        let start = self.next;
        let whole = length.next_multiple_of(PAGE_SIZE);
        self.memory.map(start, whole, protection, source, 0)?;
        self.next += whole + PAGE_SIZE;
        Ok(start)
    }
}

/// Loads the kernel and enters it.
pub fn run(
    mut memory: Memory<ProcessorTlb>,
    mut clock: Clock,
    features: Features,
    pieces: Pieces,
    arguments: &[u8],
    is_memory: impl Fn(u64) -> bool,
) -> ! {
    let physical = memory.physical();
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
    let base = random_address(&features, PROGRAM_END, KERNEL_RANGE_START, size);
    let (Ok(text), Ok((information, stubs, stack))) = (
        place_kernel(&mut memory, &elf, file, pieces.kernel, base),
        describe(&mut memory, &features, pieces, arguments, is_memory),
    ) else {
        crate::fail(format_args!("{TOO_LITTLE}"))
    };
    let kernel = MemoryRange {
        start: base,
        length: size,
    };
    clock.finish_start();
    if let Some(time) = crate::clock::battery_clock() {
        crate::clock::set_realtime(time);
    }
    let mut information = information;
    information.kernel = kernel;
    information.kernel_text = text;
    information.memory_limit = memory.left();
    let Ok(address) = publish(&mut memory, &features, &information) else {
        crate::fail(format_args!("{TOO_LITTLE}"))
    };

    // SAFETY: nobody else has a reference yet.
    unsafe { PROCESSOR.get() }.stubs = stubs;
    let clocks = stubs + offset_in_stubs(addr_of!(entry::clock_monotonic));
    let machine = Machine {
        memory,
        clock,
        features,
        kernel: base..base + size,
        kernel_text: text.start..text.start + text.length,
        stubs: stubs..stubs + PAGE_SIZE,
        clocks: clocks..stubs + PAGE_SIZE,
        registered: None,
        kernel_faulted: false,
    };
    // SAFETY: as above. The entry point lies in the kernel's text, which is mapped, as is the stack.
    unsafe {
        machine.install();
        // As after a call: the stack pointer is 8 below a multiple of 16.
        entry::enter_kernel(address, stack - 8, base + elf.entry as usize)
    }
}

/// Maps the kernel's segments: what is not written in place, what is written as a copy. The answer is where its text is.
fn place_kernel(
    memory: &mut Memory<ProcessorTlb>,
    elf: &Elf,
    file: &[u8],
    piece: Piece,
    base: usize,
) -> Result<MemoryRange, Exhausted> {
    let mut text = MemoryRange::default();
    for segment in elf.segments() {
        let first = segment.address & !(FRAME - 1);
        let end = segment.address + segment.memory_size;
        let mut protection = Protection::READ;
        protection.set(Protection::WRITE, segment.write);
        protection.set(Protection::EXECUTE, segment.execute);
        if segment.write || segment.memory_size > segment.file_size {
            let length = (end - first).next_multiple_of(FRAME) as usize;
            memory.map(
                base + first as usize,
                length,
                Protection::READ | Protection::WRITE,
                Source::Zero,
                0,
            )?;
            let bytes =
                file.get(segment.offset as usize..(segment.offset + segment.file_size) as usize);
            memory
                .write(base + segment.address as usize, bytes.unwrap_or_default())
                .map_err(|_| Exhausted)?;
            if !segment.write {
                memory.protect(base + first as usize, length, protection)?;
            }
        } else {
            let frame = piece.physical + (segment.offset & !(FRAME - 1));
            memory.map_fixed(
                base + first as usize,
                frame,
                (end - first).div_ceil(FRAME),
                protection,
                0,
            )?;
        }
        if segment.execute {
            text = MemoryRange {
                start: base + segment.address as usize,
                length: segment.memory_size as usize,
            };
        }
    }
    Ok(text)
}

/// Maps all that the kernel is told of. The answer also has the address of the stubs and the top of the kernel's stack.
fn describe(
    memory: &mut Memory<ProcessorTlb>,
    features: &Features,
    pieces: Pieces,
    arguments: &[u8],
    is_memory: impl Fn(u64) -> bool,
) -> Result<(BootInformation, usize, usize), Exhausted> {
    let sizes = [
        pieces.kernel,
        pieces.program,
        pieces.root,
        pieces.configuration,
    ]
    .map(|piece| piece.length as usize);
    let length = sizes.iter().sum::<usize>() + SPARE;
    let next = random_address(features, KERNEL_RANGE_END, USER_END - PAGE_SIZE, length);
    let mut places = Places { memory, next };

    let stack = places.source(STACK, Protection::READ | Protection::WRITE, Source::Zero)? + STACK;
    let stubs_frame = Piece {
        physical: tables::physical_of(addr_of!(entry::shim_stubs_start)),
        length: FRAME,
    };
    let stubs = places
        .fixed(stubs_frame, Protection::READ | Protection::EXECUTE, 0)?
        .start;
    // The clocks expect their page right after the stubs.
    places.next = stubs + PAGE_SIZE;
    let clock_frame = Piece {
        physical: tables::physical_of(addr_of!(CLOCK_PAGE).cast()),
        length: FRAME,
    };
    places.fixed(clock_frame, Protection::READ, 0)?;

    let dma_length = (places.memory.left() / 24)
        .clamp(512 << 10, 4 << 20)
        .next_multiple_of(FRAME);
    let dma_physical = places.memory.take_together(dma_length).ok_or(Exhausted)?;
    let dma_piece = Piece {
        physical: dma_physical,
        length: dma_length,
    };
    let dma = places.fixed(dma_piece, Protection::READ | Protection::WRITE, 0)?;
    let root = if pieces.root.length == 0 {
        MemoryRange::default()
    } else {
        let start = places.source(pieces.root.length as usize, Protection::READ, Source::Root)?;
        MemoryRange {
            start,
            length: pieces.root.length as usize,
        }
    };
    let kernel_file = places.fixed(pieces.kernel, Protection::READ, 0)?;
    let program = places.fixed(pieces.program, Protection::READ, 0)?;
    let configuration = places.fixed(pieces.configuration, Protection::READ, 0)?;
    let mut devices = [MmioDevice::default(); MAX_DEVICES];
    let count = map_devices(&mut places, &mut devices, arguments, is_memory)?;
    let information = BootInformation {
        magic: BOOT_MAGIC,
        version: VERSION,
        engine: Engine::Vm as u32,
        host: interface(stubs),
        kernel: MemoryRange::default(),
        kernel_text: MemoryRange::default(),
        kernel_file,
        program,
        configuration,
        root,
        memory_limit: 0,
        dma,
        dma_physical,
        link_descriptor: -1,
        network_descriptor: -1,
        device_count: count as u32,
        xsave_size: features.xsave_size,
        xsave_mask: features.xsave_mask,
        devices,
    };
    Ok((information, stubs, stack))
}

/// Maps the registers of the devices on the command line that are there, and lets their lines interrupt.
fn map_devices(
    places: &mut Places<'_>,
    devices: &mut [MmioDevice; MAX_DEVICES],
    arguments: &[u8],
    is_memory: impl Fn(u64) -> bool,
) -> Result<usize, Exhausted> {
    let mut count = 0;
    let mut mapped: Option<(u64, usize)> = None;
    for DeviceArgument {
        size,
        address,
        line,
    } in command_line::devices(arguments)
    {
        let (frame, within) = (address & !(FRAME - 1), address % FRAME);
        let fits = size >= 0x100 && within.saturating_add(size) <= FRAME && address % 8 == 0;
        if !fits || address >= 1 << 46 || is_memory(frame) || line >= interrupts::LINES {
            continue;
        }
        let kind = match tables::probe(address + VIRTIO_MAGIC.0) {
            magic if magic == VIRTIO_MAGIC.1 => tables::probe(address + VIRTIO_KIND),
            _ => 0,
        };
        let Some(slot) = devices.get_mut(count).filter(|_| kind != 0) else {
            continue;
        };
        let page = match mapped {
            Some((known, page)) if known == frame => page,
            _ => {
                let piece = Piece {
                    physical: frame,
                    length: FRAME,
                };
                places
                    .fixed(piece, Protection::READ | Protection::WRITE, UNCACHED)?
                    .start
            }
        };
        mapped = Some((frame, page));
        *slot = MmioDevice {
            registers: page + within as usize,
            length: size as usize,
            interrupt: line,
            kind,
        };
        interrupts::enable_line(line);
        count += 1;
    }
    Ok(count)
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

/// Copies the information to a page of its own that the kernel can read.
fn publish(
    memory: &mut Memory<ProcessorTlb>,
    features: &Features,
    information: &BootInformation,
) -> Result<usize, Exhausted> {
    const SIZE: usize = size_of::<BootInformation>();
    let address = random_address(features, PROGRAM_END, KERNEL_RANGE_START, SIZE);
    let length = SIZE.next_multiple_of(PAGE_SIZE);
    memory.map(
        address,
        length,
        Protection::READ | Protection::WRITE,
        Source::Zero,
        0,
    )?;
    // SAFETY: the bytes of a structure that was just built; all of its padding is written as it is and never read.
    let bytes =
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(information).cast::<u8>(), SIZE) };
    memory.write(address, bytes).map_err(|_| Exhausted)?;
    memory.protect(address, length, Protection::READ)?;
    Ok(address)
}

/// Whether a piece lies in memory.
pub fn is_within(physical: Physical, piece: Piece) -> bool {
    physical.contains(piece.physical, piece.length)
}

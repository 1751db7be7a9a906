//! The VM shim: the only privileged code in a virtual machine.
//!
//! It is for giving the kernel, which runs in ring 3, what the host interface (`abi/src/host.rs`) promises: memory, traps, time,
//! waiting, a console, and the devices' registers. It is not for anything that the kernel can do itself: it has no driver, no
//! scheduler, no file.
//!
//! In the order of reading: `boot` (entry), `start` here, `tables`, `descriptors`, `load` (the kernel and what it is told), `entry`
//! (gates), `traps`, `calls`; beside them `interrupts`, `clock`, `console`, `power`, `cpu`. What can be tested on the host is in the
//! library beside this program.
//!
//! What always holds:
//!
//! * one processor; ring 0 runs with interrupts off but for the halt in `wait`;
//! * ring 0 reaches ring 3's memory only through the window on physical memory, after looking at the tables, and in the system call
//!   gate, which stores the program's registers;
//! * nothing is mapped both writable and executable, in either ring.

#![no_std]
#![no_main]

mod boot;
mod calls;
mod cell;
mod clock;
mod console;
mod cpu;
mod descriptors;
mod entry;
mod interrupts;
mod load;
mod machine;
mod power;
mod runtime;
mod tables;
mod traps;

use core::fmt::{Arguments, Write};

use kiln_abi::host::exit_code;
use kiln_abi::image::{DIRECTORY_MAGIC, DIRECTORY_PHYSICAL, Directory, Piece};
use kiln_shim_vm::frames::Frames;
use kiln_shim_vm::memory::{Memory, Root};
use kiln_shim_vm::physical::{FRAME, Physical};
use kiln_shim_vm::ranges::Ranges;
use kiln_shim_vm::start_info::StartInfo;

use crate::clock::Clock;
use crate::console::Console;
use crate::load::Pieces;
use crate::machine::Machine;

/// The addresses that are looked at before the memory map is known.
const FIRST_WINDOW: u64 = 4 << 30;

/// Says something on the console and ends the machine.
fn stop(code: i32, text: Arguments<'_>) -> ! {
    // The console does not fail.
    let _ = writeln!(Console, "kiln: shim: {text}");
    power::off(code)
}

/// Ends the machine because it cannot start.
fn fail(text: Arguments<'_>) -> ! {
    stop(exit_code::CANNOT_START, text)
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    stop(exit_code::KERNEL_PANIC, format_args!("{information}"))
}

/// First Rust code; `start_info` is the physical address that the boot loader gave.
#[unsafe(no_mangle)]
extern "C" fn start(start_info: u32) -> ! {
    let features = cpu::enable_features();
    if !features.fsgsbase {
        fail(format_args!(
            "the processor has no FSGSBASE, which the kernel needs: choose a newer one (QEMU: -cpu max)"
        ));
    }
    // SAFETY: called once, here.
    let physical = unsafe {
        tables::set_up();
        descriptors::load(&features);
        tables::window(&features, FIRST_WINDOW)
    };
    let frequencies = cpu::frequencies(&features);
    interrupts::start(frequencies.timer);
    let mut clock = Clock::default();
    clock.start(frequencies.counter);

    let Ok(info) = StartInfo::read(physical, u64::from(start_info)) else {
        fail(format_args!(
            "the boot loader gives no PVH start information with a memory map"
        ))
    };
    let (mut free, mut end) = (Ranges::new(), 0);
    // What is said to be in use is not free, whatever else is said of it.
    for wanted in [true, false] {
        for (start, length, usable) in info.memory(physical) {
            if usable != wanted {
                continue;
            }
            if usable {
                free.add(start, start + length);
                end = end.max(start + length);
            } else {
                free.remove(start, start + length);
            }
        }
    }
    // SAFETY: that is where memory ends.
    let physical = unsafe { tables::window(&features, end) };
    let pieces = find_pieces(physical, &info);
    free.remove(DIRECTORY_PHYSICAL, tables::shim_end_physical());
    for piece in [
        pieces.kernel,
        pieces.program,
        pieces.root,
        pieces.configuration,
    ] {
        free.remove(piece.physical, piece.physical + piece.length);
    }
    // Still to be read.
    let line = info.command_line.as_ptr_range();
    let line_physical = (line.start as u64).wrapping_sub(tables::WINDOW as u64);
    free.remove(
        line_physical,
        line_physical + info.command_line.len() as u64,
    );
    let Some(frames) = Frames::new(physical, free) else {
        fail(format_args!("the machine has no free memory"))
    };
    let root = Root {
        physical: pieces.root.physical,
        pages: pieces.root.length.div_ceil(FRAME),
    };
    let memory = Memory::new(frames, cpu::ProcessorTlb, tables::top(), root);
    // SAFETY: called once, before anything else uses the machine.
    let machine = unsafe { Machine::install(memory, clock, features) };
    load::run(machine, &pieces, &info)
}

/// Finds the pieces of the image and the configuration.
fn find_pieces(physical: Physical, info: &StartInfo) -> Pieces {
    let Some(directory) = physical.array::<{ Directory::SIZE }>(DIRECTORY_PHYSICAL) else {
        fail(format_args!(
            "too little memory: the image itself does not fit (QEMU: -m)"
        ))
    };
    let (words, _) = directory.as_chunks::<8>();
    let &[
        magic,
        kernel,
        kernel_length,
        program,
        program_length,
        root,
        root_length,
    ] = words
    else {
        fail(format_args!("the image's directory is not understood"))
    };
    let word = u64::from_le_bytes;
    let piece = |start: [u8; 8], length: [u8; 8]| Piece {
        physical: word(start),
        length: word(length),
    };
    let pieces = Pieces {
        kernel: piece(kernel, kernel_length),
        program: piece(program, program_length),
        root: piece(root, root_length),
        configuration: Piece {
            physical: info.module.0,
            length: info.module.1,
        },
    };
    if word(magic) != DIRECTORY_MAGIC {
        fail(format_args!(
            "no image directory in memory: the image is damaged, or was not loaded as a whole"
        ));
    }
    for (name, piece) in [
        ("kernel", pieces.kernel),
        ("program", pieces.program),
        ("root", pieces.root),
    ] {
        if piece.physical % FRAME != 0 || !physical.contains(piece.physical, piece.length) {
            fail(format_args!(
                "the image's {name} lies outside of memory: give the machine more (QEMU: -m)"
            ));
        }
    }
    pieces
}

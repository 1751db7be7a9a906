//! Engine qemu under TCG: to the first HTTP byte, against QEMU with a kernel that only prints a byte.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use kiln_tests::{Kiln, free_port, run};

use crate::{
    sample::Sample,
    server::{self, FRONT_PAGE, Server},
};

/// Boots both in turn, and prints both medians and what the specification asks.
pub fn measure(rounds: u32) {
    let kiln = Kiln::new();
    let image = server::site_image(&kiln);
    let bare = bare_kernel(kiln.folder());
    let (mut own, mut floor, mut failures) = (Sample::default(), Sample::default(), 0);
    for _ in 0..rounds {
        floor.push(boot_bare(&bare).as_secs_f64() * 1e3);
        let port = free_port();
        let mut command = server::unikernel(&kiln, "qemu", &[], port, 80, &image);
        match Server::start(&mut command, port).first_byte(FRONT_PAGE) {
            Some(time) => own.push(time.as_secs_f64() * 1e3),
            None => failures += 1,
        }
    }
    println!("bare kernel to its byte:       {}", floor.describe("ms"));
    println!("kiln run to the first byte:    {}", own.describe("ms"));
    println!("failures:                      {failures} of {rounds}");
    println!(
        "ratio:                         {:.2}",
        own.median() / floor.median()
    );
    println!(
        "allowed (1.3 x bare + 70 ms):  {:.1} ms",
        1.3 * floor.median() + 70.0
    );
}

/// Assembles the bare kernel.
fn bare_kernel(folder: &Path) -> PathBuf {
    let source = folder.join("bare.s");
    let kernel = folder.join("bare.elf");
    std::fs::write(&source, include_str!("bare.s")).expect("the source can be written");
    let outcome = run(
        Command::new("cc")
            .args([
                "-nostdlib",
                "-static",
                "-no-pie",
                "-Wl,-Ttext=0x100000,-e,entry,--build-id=none",
                "-o",
            ])
            .args([&kernel, &source]),
        Duration::from_secs(30),
    );
    assert_eq!(outcome.code(), 0, "{outcome}");
    kernel
}

/// Time from starting QEMU to the byte.
fn boot_bare(kernel: &Path) -> Duration {
    let start = Instant::now();
    let mut process = Command::new("qemu-system-x86_64")
        // As the engine has it, without network and link.
        .args([
            "-M",
            "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off",
        ])
        .args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "64M",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args([
            "-chardev",
            "stdio,id=console",
            "-device",
            "isa-debugcon,iobase=0xe9,chardev=console",
            "-kernel",
        ])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-system-x86_64 is needed: tests/tools/install");
    let mut byte = [0];
    let got = process
        .stdout
        .take()
        .map(|mut output| output.read_exact(&mut byte));
    let time = start.elapsed();
    let _ = process.kill();
    let _ = process.wait();
    assert!(
        matches!(got, Some(Ok(()))) && byte == *b"!",
        "the bare kernel does not answer"
    );
    time
}

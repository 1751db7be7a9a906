//! Boots the shim with a kernel that tests it, under QEMU. Where QEMU is not installed the test says so and does nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kiln_abi::image::{DIRECTORY_MAGIC, DIRECTORY_PHYSICAL, Directory, Piece};

const FRAME: u64 = 4096;
const QEMU: &str = "qemu-system-x86_64";

fn have_qemu() -> bool {
    let found = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: {QEMU} is not installed (Debian: apt-get install qemu-system-x86)");
    }
    found
}

/// Builds a freestanding program of this package.
fn build(binary: &str, feature: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("freestanding-target");
    let status = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--profile",
            "freestanding",
            "-p",
            "kiln-shim-vm",
            "--bin",
            binary,
            "--features",
            feature,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("CARGO_TARGET_DIR", &target)
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "building {binary}");
    target.join("freestanding").join(binary)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

/// Packs shim, kernel, program and root as `abi/src/image.rs` describes it.
fn pack(shim: &[u8], kernel: &[u8], program: &[u8], root: &[u8]) -> Vec<u8> {
    // Kind, physical address, bytes, length in memory.
    let mut segments: Vec<(u32, u64, Vec<u8>, u64)> = Vec::new();
    let mut end = 0;
    for index in 0..usize::from(shim[56]) {
        let header = &shim[u64_at(shim, 32) as usize + 56 * index..];
        let (kind, offset, physical) = (
            u32::from(header[0]),
            u64_at(header, 8) as usize,
            u64_at(header, 24),
        );
        let (in_file, in_memory) = (u64_at(header, 32), u64_at(header, 40));
        if kind == 1 {
            end = end.max(physical + in_memory);
        }
        if kind == 1 || kind == 4 {
            segments.push((
                kind,
                physical,
                shim[offset..offset + in_file as usize].to_vec(),
                in_memory,
            ));
        }
    }
    let mut place = |bytes: &[u8]| {
        let physical = end.next_multiple_of(FRAME);
        end = physical + bytes.len() as u64;
        segments.push((1, physical, bytes.to_vec(), bytes.len() as u64));
        Piece {
            physical,
            length: bytes.len() as u64,
        }
    };
    let directory = Directory {
        magic: DIRECTORY_MAGIC,
        kernel: place(kernel),
        program: place(program),
        root: place(root),
    };
    segments.push((
        1,
        DIRECTORY_PHYSICAL,
        directory.to_bytes().to_vec(),
        Directory::SIZE as u64,
    ));

    let mut file = shim[..64].to_vec();
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[40..48].fill(0);
    file[56] = segments.len() as u8;
    file[60..64].fill(0);
    let mut offset = FRAME;
    let mut contents = Vec::new();
    for (kind, physical, bytes, in_memory) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let align = if kind == 1 { FRAME } else { 4 };
        for word in [
            offset,
            physical,
            physical,
            bytes.len() as u64,
            in_memory,
            align,
        ] {
            file.extend(word.to_le_bytes());
        }
        contents.extend(&bytes);
        contents.resize(contents.len().next_multiple_of(FRAME as usize), 0);
        offset = FRAME + contents.len() as u64;
    }
    file.resize(FRAME as usize, 0);
    file.extend(contents);
    file
}

fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let shim = std::fs::read(build("kiln-shim-vm", "freestanding")).expect("built");
        let kernel =
            std::fs::read(build("kiln-shim-vm-test-kernel", "test-kernel")).expect("built");
        let root: Vec<u8> = (0..5000).map(|index| (index / 7) as u8).collect();
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("test.kiln");
        std::fs::write(&path, pack(&shim, &kernel, b"a program", &root)).expect("written");
        path
    })
}

/// Runs QEMU to its end; the answer is its exit code and what came over the serial line.
fn boot(image: &Path, configuration: Option<&Path>, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(QEMU);
    command.args([
        "-M",
        "microvm,acpi=off,pit=off,pic=off,rtc=off",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-no-reboot",
    ]);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args(arguments);
    command
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .arg("-kernel")
        .arg(image);
    if let Some(configuration) = configuration {
        command.arg("-initrd").arg(configuration);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("QEMU starts");
    let mut output = child.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        output
            .read_to_end(&mut text)
            .map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    let code = loop {
        if let Some(status) = child.try_wait().expect("waits") {
            break status.code();
        }
        if Instant::now() > deadline {
            child.kill().expect("killed");
            child.wait().expect("waits");
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = reader.join().expect("reads").expect("reads");
    println!("{text}");
    (code, text)
}

#[test]
fn the_host_interface_is_kept() {
    if !have_qemu() {
        return;
    }
    let configuration = Path::new(env!("CARGO_TARGET_TMPDIR")).join("configuration.json");
    std::fs::write(&configuration, b"{\"realtime\":1}").expect("written");
    for memory in ["16M", "128M", "3G"] {
        let (code, text) = boot(
            image(),
            Some(&configuration),
            &["-m", memory, "-device", "virtio-rng-device"],
        );
        assert!(!text.contains("FAILED"), "{memory}: {text}");
        assert!(
            text.contains("checked fault of the kernel"),
            "{memory}: {text}"
        );
        assert!(text.contains("device 4 line "), "{memory}: {text}");
        assert_eq!(code, Some(42 << 1 | 1), "{memory}");
    }
}

#[test]
fn a_processor_without_fsgsbase_is_named() {
    if !have_qemu() {
        return;
    }
    let (code, text) = boot(image(), None, &["-m", "64M", "-cpu", "qemu64"]);
    assert!(text.contains("FSGSBASE"), "{text}");
    assert_eq!(code, Some(255));
}

#[test]
fn a_damaged_image_is_named() {
    if !have_qemu() {
        return;
    }
    let mut bytes = std::fs::read(image()).expect("built");
    // The directory is the last piece.
    let directory = bytes.len() - FRAME as usize;
    bytes[directory] ^= 1;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("damaged.kiln");
    std::fs::write(&path, &bytes).expect("written");
    assert!(
        boot(&path, None, &["-m", "64M"])
            .1
            .contains("no image directory")
    );
    bytes[directory] ^= 1;
    bytes[directory + 16..directory + 24].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &bytes).expect("written");
    assert!(
        boot(&path, None, &["-m", "64M"])
            .1
            .contains("kernel lies outside")
    );
}

//! The engine `qemu`: an image as a virtual machine of QEMU's machine `microvm`.
//!
//! QEMU gets the image by name as its kernel, the run's configuration as its initial RAM disk, and descriptors for the rest: the
//! console (a debug port), the link (a virtio serial port) and the frames (a virtio network card). Nothing of it needs a privilege,
//! and QEMU confines itself by its own system call filter.
//!
//! The same image runs without Kiln, with QEMU's own user network and the serial line as its console:
//!
//! ```text
//! qemu-system-x86_64 -M microvm,acpi=off,pit=off,pic=off,rtc=on -accel tcg -cpu max -m 64M \
//!     -nodefaults -no-user-config -no-reboot -display none -serial stdio \
//!     -device isa-debug-exit,iobase=0xf4,iosize=0x04 \
//!     -netdev user,id=net,hostfwd=tcp:127.0.0.1:8080-:80 -device virtio-net-device,netdev=net \
//!     -kernel site.kiln
//! ```
//!
//! QEMU's exit code is then 0 for 0 and otherwise `2 * code + 1` of the program's code, of which eight bits remain.
//!
//! What always holds: the virtual machine ends with the monitor, however that ends.

mod launch;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_abi::host::exit_code;
use kiln_abi::process::EXIT_SHIM;

use super::kept::{self, Kept};
use super::{End, Engine, Launch, Running, StartError, Unavailable};

/// QEMU's command.
const COMMAND: &str = "qemu-system-x86_64";

/// Where distributions put QEMU's command under other names or outside of the search path.
const OTHER_PLACES: [&str; 4] = [
    "/usr/bin/qemu-system-x86_64",
    "/usr/local/bin/qemu-system-x86_64",
    "/usr/libexec/qemu-kvm",
    "/usr/bin/qemu-kvm",
];

/// The engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct QemuEngine;

impl Engine for QemuEngine {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn available(&self) -> Result<(), Unavailable> {
        match find(std::env::var_os("PATH").as_deref()) {
            Some(_) => Ok(()),
            None => Err(missing()),
        }
    }

    fn start(&self, launch: Launch) -> Result<Box<dyn Running>, StartError> {
        let failed = |what: String, remedy: Option<String>| {
            move |error: io::Error| StartError {
                what,
                remedy,
                source: Some(error),
            }
        };
        let Some(program) = find(std::env::var_os("PATH").as_deref()) else {
            let Unavailable { reason, remedy, .. } = missing();
            return Err(StartError {
                what: reason,
                remedy: Some(remedy),
                source: None,
            });
        };
        let configuration = launch.directory.join("configuration");
        fs::write(&configuration, &launch.configuration).map_err(failed(
            format!("cannot write {}", configuration.display()),
            None,
        ))?;
        let numbers = Numbers {
            console: launch.console.as_raw_fd(),
            link: launch.link.as_raw_fd(),
            frames: launch.frames.as_ref().map(AsRawFd::as_raw_fd),
            mac: launch.mac,
        };
        let arguments = arguments(
            &launch.image_path,
            &configuration,
            launch.memory.saturating_add(image_memory(&launch.pieces)),
            &numbers,
            acceleration(),
        );
        let shown = program.display().to_string();
        let started = kept::start(move || {
            let mut inherited = vec![launch.console.as_fd(), launch.link.as_fd()];
            inherited.extend(launch.frames.as_ref().map(AsFd::as_fd));
            launch::start(&program, &arguments, &inherited, launch.console.as_fd())
        })?
        .map_err(failed(
            format!("cannot run {shown}"),
            Some("check the installation of QEMU".into()),
        ))?;
        Ok(Box::new(Kept::machine(started, end_of)))
    }
}

fn missing() -> Unavailable {
    Unavailable {
        engine: "qemu",
        reason: format!("{COMMAND} is not installed"),
        remedy: "install it (Debian: apt-get install qemu-system-x86, and with qemu-utils from backports also \
                 -t bookworm-backports; Fedora: dnf install qemu-system-x86-core), or use --engine process"
            .into(),
    }
}

/// QEMU's program: in the search path, or in the usual places.
fn find(search_path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    let searched = search_path
        .into_iter()
        .flat_map(std::env::split_paths)
        .map(|folder| folder.join(COMMAND));
    let others = OTHER_PLACES.iter().map(PathBuf::from);
    searched.chain(others).find(|path| {
        path.is_absolute()
            && fs::metadata(path)
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

/// How QEMU runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acceleration {
    /// On the processor.
    Kvm,
    /// By translation.
    Translation,
}

/// KVM if this user may use it and the processor has the instructions for it: a /dev/kvm alone may be an emulation that is slower than
/// QEMU's own.
fn acceleration() -> Acceleration {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if has_virtualization(&flags)
        && fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
    {
        Acceleration::Kvm
    } else {
        Acceleration::Translation
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    flags.is_some_and(|flags| {
        flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

/// Descriptors that QEMU inherits.
struct Numbers {
    console: i32,
    link: i32,
    frames: Option<i32>,
    /// Of the network card.
    mac: [u8; 6],
}

/// Bytes of the machine's memory that the image takes: they come on top of the instance's own, so that it has as much for itself as
/// on other engines. The first MiB of a machine is half devices, the next begins with the shim.
fn image_memory(pieces: &super::Pieces) -> u64 {
    [pieces.kernel, pieces.program, pieces.root]
        .iter()
        .fold(1 << 20, |sum: u64, piece| sum.saturating_add(piece.length))
}

/// QEMU's arguments.
fn arguments(
    image: &Path,
    configuration: &Path,
    memory: u64,
    numbers: &Numbers,
    acceleration: Acceleration,
) -> Vec<OsString> {
    let Numbers {
        console,
        link,
        frames,
        mac: [a, b, c, d, e, f],
    } = numbers;
    let (accelerator, processor) = match acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        Acceleration::Translation => ("tcg", "max"),
    };
    // Whole MiB: QEMU rounds other sizes up by itself, with a warning.
    let memory = format!("{}M", memory.div_ceil(1 << 20));
    let mut arguments: Vec<OsString> = [
        // Without the devices that the shim does not need; `dump-guest-core=off` spares the host's crash dumps the guest's memory.
        "-M",
        "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,dump-guest-core=off",
        "-accel",
        accelerator,
        "-cpu",
        processor,
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x04",
        "-add-fd",
        &format!("fd={console},set=1"),
        "-chardev",
        "file,id=console,path=/dev/fdset/1,append=on",
        "-device",
        "isa-debugcon,iobase=0xe9,chardev=console",
        "-chardev",
        &format!("socket,id=link,fd={link}"),
        "-device",
        // Port 0 would be a console, whose bytes are thrown away when the socket is full.
        "virtio-serial-device,max_ports=2",
        "-device",
        "virtserialport,chardev=link,nr=1",
    ]
    .map(OsString::from)
    .into();
    if let Some(frames) = frames {
        let netdev = format!("stream,id=net,server=off,addr.type=fd,addr.str={frames}");
        arguments.extend(["-netdev".into(), netdev.into()]);
        let device = format!(
            "virtio-net-device,netdev=net,mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},host_mtu={}",
            kiln_network::MACHINE_MTU
        );
        arguments.extend(["-device".into(), device.into()]);
    }
    arguments.extend([
        "-kernel".into(),
        image.into(),
        "-initrd".into(),
        configuration.into(),
    ]);
    arguments
}

/// What QEMU's exit code says of the instance's. The shim uses `isa-debug-exit` for all codes but 0, of which seven bits come through; the
/// kernel's word over the link is exact and goes before it.
fn end_of(code: i32) -> End {
    /// What seven bits leave of the code of a kernel panic.
    const PANIC: i32 = exit_code::KERNEL_PANIC & 0x7f;
    End::Exited(match (code, code >> 1) {
        (0, _) => 0,
        // QEMU's own failures, as when the host has not the memory: the kernel never began.
        (1, _) => EXIT_SHIM,
        (_, PANIC) if code & 1 == 1 => exit_code::KERNEL_PANIC,
        (_, inner) if code & 1 == 1 => inner,
        _ => code,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn kvm_needs_the_processors_instructions() {
        assert!(has_virtualization(
            "processor : 0\nflags\t\t: fpu vme svm nx\n"
        ));
        assert!(has_virtualization("flags : vmx"));
        assert!(!has_virtualization(
            "flags\t\t: fpu vmx_other svme\nbugs: svm\n"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn the_programs_exit_code_comes_through_as_far_as_it_can() {
        assert_eq!(end_of(0), End::Exited(0));
        assert_eq!(end_of(42 << 1 | 1), End::Exited(42));
        assert_eq!(
            end_of((254 << 1 | 1) & 0xff),
            End::Exited(exit_code::KERNEL_PANIC)
        );
        assert_eq!(end_of(1), End::Exited(EXIT_SHIM));
        assert_eq!(
            end_of((exit_code::CANNOT_START << 1 | 1) & 0xff),
            End::Exited(exit_code::CANNOT_START)
        );
    }

    #[test]
    fn frames_make_a_network_card() {
        let numbers = |frames| Numbers {
            console: 5,
            link: 6,
            frames,
            mac: [2, 0, 0, 0, 0, 0xa1],
        };
        let line = |frames| {
            let all = arguments(
                Path::new("/i,mage"),
                Path::new("/c"),
                16 << 20,
                &numbers(frames),
                Acceleration::Translation,
            );
            all.join(&OsString::from(" ")).into_string().expect("text")
        };
        assert!(!line(None).contains("-netdev"));
        assert!(line(Some(9)).contains(
            "-netdev stream,id=net,server=off,addr.type=fd,addr.str=9 -device virtio-net-device,netdev=net,mac=02:00:00:00:00:a1"
        ));
        assert!(line(None).ends_with("-kernel /i,mage -initrd /c"));
        assert!(line(None).contains("-m 16M "));
    }

    #[test]
    fn qemu_is_found_in_the_search_path_only_if_it_is_a_program() {
        let folder = std::env::temp_dir().join(format!("kiln-qemu-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("made");
        let file = folder.join(COMMAND);
        fs::write(&file, "").expect("written");
        assert_ne!(find(Some(folder.as_os_str())), Some(file.clone()));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("set");
        assert_eq!(find(Some(folder.as_os_str())), Some(file));
        fs::remove_dir_all(&folder).expect("removed");
    }

    /// An image that is none: QEMU says so on the console and ends.
    #[test]
    fn what_qemu_says_reaches_the_console() {
        if QemuEngine.available().is_err() {
            eprintln!("skipped: {}", missing());
            return;
        }
        let directory =
            std::env::temp_dir().join(format!("kiln-qemu-start-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("made");
        let image_path = directory.join("bad.kiln");
        fs::write(&image_path, "nothing").expect("written");
        let (reader, console) = io::pipe().expect("made");
        let (link, _other) = std::os::unix::net::UnixStream::pair().expect("made");
        let launch = Launch {
            image: File::open(&image_path).expect("opened"),
            image_path,
            pieces: super::super::Pieces::default(),
            configuration: Vec::new(),
            memory: 32 << 20,
            console: console.into(),
            link: link.into(),
            frames: None,
            mac: [0; 6],
            directory: directory.clone(),
        };
        let mut running = QemuEngine.start(launch).expect("starts");
        let mut said = String::new();
        let mut reader = reader;
        reader.read_to_string(&mut said).expect("read");
        assert!(said.contains("kernel"), "{said}");
        assert_eq!(running.wait().expect("waited"), End::Exited(EXIT_SHIM));
        drop(running);
        fs::remove_dir_all(&directory).expect("removed");
    }
}

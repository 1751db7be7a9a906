//! Starts a test kernel (`test-kernel/`) on the shim, through the engine `process`, and sees that the host interface
//! keeps what `abi/src/host.rs` promises and that the confinement holds.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kiln_abi::host::exit_code;
use kiln_abi::process::{EXIT_MEMORY, EXIT_SHIM};
use kiln_monitor::engine::process::ProcessEngine;
use kiln_monitor::engine::{End, Engine, Launch, Piece, Pieces, Running};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Signal with which the seccomp filter kills.
const SIGSYS: i32 = 31;
const MEBIBYTE: u64 = 1 << 20;
/// No test takes longer on a machine that works.
const DEADLINE: Duration = Duration::from_secs(60);

/// The freestanding programs: shim and test kernel.
struct Programs {
    shim: &'static [u8],
    image: PathBuf,
    pieces: Pieces,
}

/// Builds the programs and an image once.
fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(directory) = std::env::var_os(PREBUILT) {
            let directory = PathBuf::from(directory);
            let shim = std::fs::read(directory.join("shim")).unwrap().leak();
            let pieces = std::fs::read(directory.join("pieces")).unwrap();
            let image = directory.join("image");
            return Programs {
                shim,
                image,
                pieces: serde_json::from_slice(&pieces).unwrap(),
            };
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = directory.join("freestanding-target");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", env!("CARGO_PKG_NAME")])
            .args(["--profile", "freestanding", "--features", "freestanding"])
            .arg("--manifest-path")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .unwrap();
        assert!(status.success(), "the freestanding programs do not build");
        let read = |name: &str| std::fs::read(target.join("freestanding").join(name)).unwrap();
        let shim = read("kiln-shim-process").leak();
        let kernel = read("kiln-shim-process-test-kernel");
        let image = directory.join("image");
        let mut bytes = vec![0; 4096];
        let mut add = |piece: &[u8]| {
            let offset = bytes.len() as u64;
            bytes.extend(piece);
            bytes.resize(bytes.len().next_multiple_of(4096), 0);
            Piece {
                offset,
                length: piece.len() as u64,
            }
        };
        let root: Vec<u8> = (0..20_000u32).map(|index| (index % 251) as u8).collect();
        let pieces = Pieces {
            kernel: add(&kernel),
            program: add(b"{}"),
            root: add(&root),
        };
        // Another process of these tests may do the same now.
        let new = directory.join(format!("image-{}", std::process::id()));
        std::fs::write(&new, bytes).unwrap();
        std::fs::rename(&new, &image).unwrap();
        Programs {
            shim,
            image,
            pieces,
        }
    })
}

/// Names a folder with what [`programs`] would build, for users who cannot.
const PREBUILT: &str = "KILN_TEST_PREBUILT";

/// A folder that is removed again.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs tests of this file as another user, below a wrapping command perhaps.
fn as_user(wrapper: &[&str], tests: &[&str]) {
    let programs = programs();
    let name = format!("kiln-shim-test-{}-{}", std::process::id(), wrapper.len());
    let folder = Folder(std::env::temp_dir().join(name));
    std::fs::create_dir(&folder.0).unwrap();
    let executable = folder.0.join("tests");
    std::fs::copy(std::env::current_exe().unwrap(), &executable).unwrap();
    std::fs::copy(&programs.image, folder.0.join("image")).unwrap();
    std::fs::write(folder.0.join("shim"), programs.shim).unwrap();
    let pieces = serde_json::to_vec(&programs.pieces).unwrap();
    std::fs::write(folder.0.join("pieces"), pieces).unwrap();
    for (path, mode) in [(&folder.0, 0o755), (&folder.0.join("image"), 0o644)] {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let mut words = wrapper
        .iter()
        .map(OsStr::new)
        .chain([executable.as_os_str()]);
    let output = Command::new(words.next().unwrap())
        .args(words)
        .args(["--exact", "--test-threads", "1"])
        .args(tests)
        .env(PREBUILT, &folder.0)
        .current_dir("/")
        .uid(1234)
        .gid(1234)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains(&format!("{} passed", tests.len())), "{text}");
}

struct Instance {
    running: Box<dyn Running>,
    console: File,
    link: UnixStream,
}

impl Instance {
    /// Waits for the end; gives the console's text, too.
    fn end(mut self) -> (End, String) {
        let killer = Deadline::new(&*self.running);
        let mut text = String::new();
        self.console.read_to_string(&mut text).unwrap();
        let end = self.running.wait().unwrap();
        killer.over();
        (end, text)
    }
}

/// Kills an instance that takes too long.
struct Deadline(std::sync::mpsc::Sender<()>);

impl Deadline {
    fn new(running: &dyn Running) -> Self {
        let pidfd = running.ended().try_clone_to_owned().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(DEADLINE).is_err() {
                let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::TERM);
                let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            }
        });
        Self(sender)
    }

    fn over(self) {
        let _ = self.0.send(());
    }
}

fn launch(test: &str, image: &Path, pieces: Pieces) -> (Launch, File, UnixStream) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let launch = Launch {
        image_path: image.to_owned(),
        image: File::open(image).unwrap(),
        pieces,
        configuration: test.as_bytes().to_vec(),
        memory: 64 * MEBIBYTE,
        console: writer,
        link: OwnedFd::from(theirs),
        frames: None,
        mac: [0; 6],
        directory: PathBuf::from("/test"),
    };
    (launch, File::from(reader), ours)
}

fn start(test: &str) -> Instance {
    let programs = programs();
    let (launch, console, link) = launch(test, &programs.image, programs.pieces);
    let running = ProcessEngine::new(programs.shim).start(launch).unwrap();
    Instance {
        running,
        console,
        link,
    }
}

/// Runs a test of the kernel's that ends well.
fn succeeds(test: &str) -> String {
    let (end, text) = start(test).end();
    assert_eq!(end, End::Exited(0), "{test}: {text}");
    assert!(text.ends_with("right\n"), "{test}: {text}");
    text
}

#[test]
fn the_engine_is_available() {
    assert_eq!(ProcessEngine::new(&[]).available(), Ok(()));
}

#[test]
fn registers_reach_the_kernel_and_return() {
    succeeds("registers");
}

#[test]
fn program_faults_reach_the_kernel() {
    succeeds("faults");
}

#[test]
fn kernel_faults_reach_its_fault_entry() {
    succeeds("kernel-faults");
}

#[test]
fn timer_and_wait() {
    succeeds("events");
}

#[test]
fn no_event_is_lost() {
    succeeds("races");
}

#[test]
fn mappings_follow_the_rules() {
    succeeds("memory");
}

#[test]
fn a_system_call_of_the_program_is_not_executed_by_the_host() {
    let text = succeeds("escape");
    assert!(!text.contains("ESCAPED"), "{text}");
}

#[test]
fn calls_outside_the_filter_kill_the_instance() {
    succeeds("call-getrandom");
    for test in [
        "call-open",
        "call-openat",
        "call-socket",
        "call-connect",
        "call-clone",
        "call-execve",
        "call-kill",
        "call-ptrace",
        "call-prctl",
        "call-sigaction",
        "call-read-image",
        "call-write-link",
        "call-send-address",
        "call-fast-open",
        "call-mmap-write-execute",
        "call-mmap-shared-image",
        "call-mprotect-write-execute",
        "call-x32",
    ] {
        let (end, text) = start(test).end();
        assert_eq!(end, End::Signalled(SIGSYS), "{test}: {text}");
    }
}

#[test]
fn memory_has_a_limit() {
    let (end, text) = start("limit").end();
    assert_eq!(end, End::Exited(EXIT_MEMORY), "{text}");
    assert!(text.contains("its limit of 64 MiB"), "{text}");
}

#[test]
fn exit_codes_and_early_faults() {
    assert_eq!(start("exit").end(), (End::Exited(77), String::new()));
    let (end, text) = start("early-fault").end();
    assert_eq!(end, End::Exited(exit_code::KERNEL_PANIC));
    assert!(
        text.starts_with("kiln: the kernel faulted at its start: trap 3, exception 6"),
        "{text}"
    );
}

#[test]
fn a_kernel_that_cannot_take_its_faults_is_ended() {
    let (end, text) = start("bad-registration").end();
    assert_eq!(end, End::Exited(exit_code::KERNEL_PANIC), "{text}");
    assert!(
        text.starts_with("kiln: the kernel keeps faulting"),
        "{text}"
    );
}

#[test]
fn messages_and_descriptors_come_over_the_link() {
    let mut instance = start("link");
    let mut echo = [0; 5];
    instance.link.write_all(b"first").unwrap();
    instance.link.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"first");

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [theirs.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let bytes = [IoSlice::new(b"again")];
    sendmsg(&instance.link, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
    drop(theirs);
    let mut hello = String::new();
    ours.read_to_string(&mut hello).unwrap();
    assert_eq!(hello, "hello");
    instance.link.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"again");

    instance.link.shutdown(std::net::Shutdown::Write).unwrap();
    let (end, text) = instance.end();
    assert_eq!((end, text.as_str()), (End::Exited(0), "right\n"));
}

/// Value of a field in `/proc/PID/status`.
fn status(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
    line.unwrap().to_owned()
}

/// Polls until `condition` holds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_instance_is_alone_and_without_privileges() {
    let instance = start("sleep");
    let pid = instance.running.pid();
    eventually("confined", || status(pid, "Seccomp") == "2");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(pid, field), "0000000000000000", "{field}");
    }
    if rustix::process::geteuid().is_root() && std::env::var_os(PREBUILT).is_none() {
        assert_eq!(status(pid, "Uid"), "65534\t65534\t65534\t65534");
        assert_eq!(status(pid, "Groups").trim(), "");
        let root = std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
        assert_eq!(root.count(), 0, "the root is not empty");
        for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
            let own = std::fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            let its = std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(own, its, "{namespace}");
        }
        let mut open: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| {
                entry
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .parse()
                    .unwrap()
            })
            .collect();
        open.sort_unstable();
        assert_eq!(open, [0, 1, 2, 3, 4, 5, 6, 7]);
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        for line in maps.lines() {
            assert!(!line.split(' ').nth(1).unwrap().contains("wx"), "{line}");
            let start = line.split('-').next().unwrap();
            let start = u64::from_str_radix(start, 16).unwrap();
            assert!(
                start >= kiln_abi::host::PROGRAM_END as u64,
                "in the program's range: {line}"
            );
        }
        assert!(maps.lines().count() > 10);
    }
    // An idle instance uses no CPU.
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let asleep = || {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .unwrap()
            .contains(") S ")
    };
    eventually("asleep", asleep);
    let before = ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(ticks(), before);
    // An interruption by the monitor is an event: the kernel looks, and goes back to sleep.
    instance.running.interrupt().unwrap();
    eventually("interrupted", || ticks() > before);
    let mut running = instance.running;
    running.kill().unwrap();
    assert_eq!(running.wait().unwrap(), End::Signalled(9));
    running.kill().unwrap();
}

#[test]
fn a_dropped_instance_is_gone() {
    let instance = start("sleep");
    let pid = instance.running.pid();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop(instance.running);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

/// Not a test: the monitor that the next test kills.
#[test]
#[ignore = "a part of an_instance_ends_with_its_monitor"]
fn monitor_to_be_killed() {
    if std::env::var_os("KILN_TEST_MONITOR").is_none() {
        return;
    }
    let instance = start("sleep");
    println!("\ninstance {}", instance.running.pid());
    loop {
        std::thread::park();
    }
}

#[test]
fn an_instance_ends_with_its_monitor() {
    programs();
    let mut monitor = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "monitor_to_be_killed",
            "--nocapture",
        ])
        .env("KILN_TEST_MONITOR", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = monitor.stdout.take().unwrap();
    let pid = std::io::BufRead::lines(std::io::BufReader::new(output))
        .find_map(|line| line.unwrap().strip_prefix("instance ").map(str::to_owned))
        .unwrap();
    let alive = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    };
    assert!(alive());
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    eventually("the instance lives on", || !alive());
}

#[test]
fn damaged_images_are_refused() {
    let programs = programs();
    let attempt = |pieces: Pieces| {
        let (launch, console, link) = launch("nothing", &programs.image, pieces);
        let running = ProcessEngine::new(programs.shim).start(launch).unwrap();
        let (end, text) = Instance {
            running,
            console,
            link,
        }
        .end();
        assert_eq!(end, End::Exited(EXIT_SHIM), "{text}");
        text
    };
    let good = programs.pieces;
    let text = attempt(Pieces {
        root: Piece {
            length: good.root.length + 8192,
            ..good.root
        },
        ..good
    });
    assert!(
        text.contains("the file ends before its root file system does"),
        "{text}"
    );
    assert!(text.contains("build it again"), "{text}");
    let text = attempt(Pieces {
        kernel: Piece {
            offset: u64::MAX,
            length: 2,
        },
        ..good
    });
    assert!(text.contains("before its kernel"), "{text}");
    let text = attempt(Pieces {
        kernel: good.root,
        ..good
    });
    assert!(text.contains("no position-independent ELF file"), "{text}");
    let text = attempt(Pieces {
        kernel: Piece {
            length: 9000,
            ..good.kernel
        },
        ..good
    });
    assert!(text.contains("truncated"), "{text}");
}

#[test]
fn a_shim_that_linux_cannot_execute_is_an_error() {
    let programs = programs();
    let (launch, _console, _link) = launch("nothing", &programs.image, programs.pieces);
    let Err(error) = ProcessEngine::new(b"no program").start(launch) else {
        panic!("it was started");
    };
    assert!(error.to_string().contains("execute"), "{error}");
}

const FOR_EVERY_USER: &[&str] = &[
    "a_system_call_of_the_program_is_not_executed_by_the_host",
    "an_instance_is_alone_and_without_privileges",
    "calls_outside_the_filter_kill_the_instance",
    "messages_and_descriptors_come_over_the_link",
    "an_instance_ends_with_its_monitor",
];

#[test]
fn an_unprivileged_user_can_do_the_same() {
    if rustix::process::geteuid().is_root() {
        as_user(&[], FOR_EVERY_USER);
    }
}

/// Within a user namespace that allows no further one, the seccomp filter holds alone.
#[test]
fn hosts_without_namespaces_will_do() {
    if rustix::process::geteuid().is_root() {
        let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all \
                      --inh-caps=-all --no-new-privs -- \"$@\"";
        as_user(
            &[
                "unshare",
                "--user",
                "--map-root-user",
                "sh",
                "-c",
                script,
                "sh",
            ],
            FOR_EVERY_USER,
        );
    }
}

/// Linux is told to place mappings from the bottom, and at no random addresses: the monitor's affair alone.
#[test]
fn addresses_are_random_whatever_the_monitor_has() {
    if rustix::process::geteuid().is_root() {
        let wrapper = ["setarch", "--addr-no-randomize", "--addr-compat-layout"];
        as_user(&wrapper, FOR_EVERY_USER);
    }
}

/// A shim that Linux places where the program belongs executes itself again, but not for ever.
#[test]
fn a_bad_place_is_left() {
    let programs = programs();
    let folder =
        Folder(std::env::temp_dir().join(format!("kiln-shim-place-{}", std::process::id())));
    std::fs::create_dir(&folder.0).unwrap();
    let shim = folder.0.join("shim");
    std::fs::write(&shim, programs.shim).unwrap();
    std::fs::set_permissions(&shim, Permissions::from_mode(0o755)).unwrap();
    let script = "exec env -i setarch --addr-compat-layout \"$0\" 5<\"$0\"";
    let output = Command::new("sh")
        .arg("-c")
        .arg(script)
        .arg(&shim)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(EXIT_SHIM), "{text}");
    assert!(text.contains("vm.legacy_va_layout"), "{text}");
}

#[test]
fn many_starts() {
    for _ in 0..50 {
        succeeds("nothing");
    }
}

/// `cargo test --release -p kiln-shim-process -- --ignored --nocapture costs`
#[test]
#[ignore = "prints measurements"]
fn costs() {
    print!("{}", succeeds("measure"));
    let programs = programs();
    let mut starts = Vec::new();
    let mut wholes = Vec::new();
    for _ in 0..200 {
        let (launch, console, link) = launch("exit", &programs.image, programs.pieces);
        let begin = Instant::now();
        let running = ProcessEngine::new(programs.shim).start(launch).unwrap();
        starts.push(begin.elapsed());
        let (end, _) = Instance {
            running,
            console,
            link,
        }
        .end();
        wholes.push(begin.elapsed());
        assert_eq!(end, End::Exited(77));
    }
    starts.sort_unstable();
    wholes.sort_unstable();
    println!(
        "engine start until the shim is executed: {:?} (median)",
        starts[100]
    );
    println!(
        "engine start until the instance has ended: {:?} (median)",
        wholes[100]
    );
}

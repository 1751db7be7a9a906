//! Where an instance of engine process spends its time under load: a sampling profile with the names of Kiln's kernel.
//!
//! `perf` takes the samples, but knows the names of the host's kernel only: an instance's code is mapped from its image. This
//! finds the kernel in the image and looks its functions up in the table that the kernel carries for its backtraces.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use kiln_kernel::boot::symbols;
use kiln_tests::{Kiln, eventually, free_port, need, run, signal, wait};

use crate::{
    server::{self, Server},
    throughput::{self, WAYS},
};

/// How long `perf` may take to end, and to print what it has.
const LIMIT: Duration = Duration::from_secs(120);
/// Samples a second: no multiple of any timer's frequency.
const FREQUENCY: &str = "1999";
/// Lines of each list that are printed.
const LONGEST: usize = 14;

/// Profiles redis (GET) and nginx (1 KiB) on both nets, prints where the time goes, and leaves the folded stacks in `folder`.
///
/// Folded stacks are lines of frames, outermost first and separated by semicolons, and a count: what flame graph programs read.
pub fn measure(seconds: u32, folder: &Path) {
    for tool in ["redis-benchmark", "wrk"] {
        need(tool);
    }
    assert!(
        Command::new("perf")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok(),
        "perf is missing: apt-get install linux-perf"
    );
    fs::create_dir_all(folder).expect("the folder for the profiles can be made");
    let kiln = Kiln::new();
    let redis = throughput::redis_image(&kiln);
    let nginx = kiln.build(&throughput::nginx_folder(&kiln));
    let seconds = seconds.to_string();
    for way in WAYS {
        let port = free_port();
        let mut command = server::unikernel(&kiln, "process", &["--net", way], port, 6379, &redis);
        command.arg("--").args(throughput::REDIS_ARGUMENTS);
        let mut load = Command::new("timeout");
        load.args([&seconds, "redis-benchmark", "-l", "-q", "-t", "get"])
            .args(["-c", "50", "-p", &port.to_string()]);
        let what = format!("redis-{way}");
        profile(&what, &mut command, port, b"PING\r\n", &redis, &mut load).print(&what, folder);

        let port = free_port();
        let mut command = server::unikernel(&kiln, "process", &["--net", way], port, 80, &nginx);
        let mut load = Command::new("wrk");
        load.args(["-t1", "-c50", "-d", &seconds])
            .arg(format!("http://127.0.0.1:{port}/1k"));
        let what = format!("nginx-{way}");
        let request = throughput::SMALL_FILE;
        profile(&what, &mut command, port, request, &nginx, &mut load).print(&what, folder);
    }
}

/// Starts a server, samples it and its monitor while `load` runs, and reads the samples.
fn profile(
    what: &str,
    command: &mut Command,
    port: u16,
    request: &[u8],
    image: &Path,
    load: &mut Command,
) -> Profile {
    let mut server = Server::start(command, port);
    assert!(
        server.first_byte(request).is_some(),
        "{what} does not answer"
    );
    let instance = instance_of(server.id());
    let kernel = kernel_in(image);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("samples");
    let mut perf = Command::new("perf")
        .args(["record", "-q", "-e", "cpu-clock", "-F", FREQUENCY, "-g"])
        .args(["-p", &format!("{instance},{}", server.id())])
        .arg("-o")
        .arg(&data)
        .stdout(Stdio::null())
        .spawn()
        .expect("perf can be started");
    // Its file has a header as soon as it samples.
    eventually("perf to begin", || data.exists().then_some(()));
    let outcome = run(load, LIMIT);
    assert!(signal(perf.id(), "INT"), "perf ended too early");
    wait(&mut perf, LIMIT).expect("perf ends when it is interrupted");
    assert!(
        !outcome.output.is_empty(),
        "the client of {what} said nothing"
    );
    let samples = run(
        Command::new("perf")
            .args(["script", "-F", "comm,ip,sym,dso", "-i"])
            .arg(&data),
        LIMIT,
    );
    assert_eq!(samples.code(), 0, "{samples}");
    let mut profile = Profile::default();
    for sample in samples.output.split("\n\n") {
        profile.add(sample, &kernel);
    }
    profile
}

/// The process of the instance that a foreground `kiln run` has started.
fn instance_of(monitor: u32) -> u32 {
    let children = |process: u32| -> Vec<u32> {
        let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter();
        threads
            .flatten()
            .flatten()
            .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
            .flat_map(|list| {
                let numbers = list.split_whitespace().filter_map(|word| word.parse().ok());
                numbers.collect::<Vec<u32>>()
            })
            .collect()
    };
    let mut open = vec![monitor];
    while let Some(process) = open.pop() {
        let program = fs::read_link(format!("/proc/{process}/exe")).unwrap_or_default();
        if program.to_string_lossy().starts_with("/memfd:kiln-shim") {
            return process;
        }
        open.extend(children(process));
    }
    panic!("process {monitor} has no instance");
}

/// Whose code a frame of the instance is. `perf` tells the mapped file and the offset in it, the image for all but the shim.
enum Frame {
    Kernel(&'static str),
    Program,
    Shim,
}

impl Frame {
    fn new(offset: u64, file: &str, kernel: &Range<u64>) -> Self {
        if file.contains("kiln-shim") {
            return Self::Shim;
        }
        if !file.contains(".kiln") || !kernel.contains(&offset) {
            return Self::Program;
        }
        // The kernel's code has the same offsets in its file and in memory.
        let name = u32::try_from(offset - kernel.start)
            .ok()
            .and_then(|inside| symbols::function(kiln_guest::KERNEL, inside));
        Self::Kernel(name.map_or("assembly", |(name, _)| name))
    }
}

/// Where in an image the kernel is.
fn kernel_in(image: &Path) -> Range<u64> {
    let bytes = fs::read(image).expect("the image can be read");
    let start = bytes
        .chunks(4096)
        .position(|block| kiln_guest::KERNEL.starts_with(block))
        .expect("an image contains the kernel") as u64
        * 4096;
    start..start + kiln_guest::KERNEL.len() as u64
}

/// The host's system call, or interrupt, or else that a stack of frames (innermost first) is in.
fn way_in(frames: &[(&str, String)]) -> String {
    let mut names = frames
        .iter()
        .rev()
        .filter(|(owner, _)| *owner == "host")
        .filter_map(|(_, name)| name.split('+').next());
    let mut interrupt = None;
    while let Some(name) = names.next() {
        if name == "do_syscall_64" {
            let call = names.next().unwrap_or("entry and exit");
            return call
                .strip_prefix("__x64_sys_")
                .unwrap_or(call.trim_start_matches("_").trim_start_matches("sys_"))
                .into();
        }
        interrupt = interrupt.or(name.strip_prefix("asm_"));
    }
    interrupt.unwrap_or("entry and exit").into()
}

/// Samples, counted.
#[derive(Default)]
struct Profile {
    total: u32,
    /// By who owns the innermost frame.
    owners: BTreeMap<String, u32>,
    /// By the host's system call (or other way in) that the innermost frame is in.
    host: BTreeMap<String, u32>,
    /// By the innermost frame, where that is Kiln's kernel.
    kernel: BTreeMap<String, u32>,
    /// By the whole stack.
    stacks: BTreeMap<String, u32>,
}

impl Profile {
    /// Adds a sample as `perf script` prints it: a line with the thread's name, then a line for each frame, innermost first.
    fn add(&mut self, sample: &str, kernel: &Range<u64>) {
        let mut lines = sample.trim_start_matches('\n').lines();
        let Some(thread) = lines.next().map(str::trim) else {
            return;
        };
        let instance = thread.starts_with("kiln-instance");
        let mut frames: Vec<(&str, String)> = Vec::new();
        for line in lines {
            let Some((address, rest)) = line.trim().split_once(' ') else {
                continue;
            };
            let Ok(address) = u64::from_str_radix(address, 16) else {
                continue;
            };
            let (name, file) = rest.split_once(" (").unwrap_or((rest, ""));
            if address >> 63 == 1 {
                frames.push(("host", name.into()));
            } else if !instance {
                frames.push(("monitor", name.into()));
            } else {
                match Frame::new(address, file, kernel) {
                    Frame::Kernel(name) => frames.push(("kernel", name.into())),
                    Frame::Shim => frames.push(("shim", "shim".into())),
                    Frame::Program => {
                        // Programs have no frame pointers: what follows is guesswork.
                        frames.push(("program", "program".into()));
                        break;
                    }
                }
            }
        }
        let Some((owner, innermost)) = frames.first() else {
            return;
        };
        let owner = match *owner {
            "host" if !instance => "host, for the monitor",
            "host" => "host, for the instance",
            owner => owner,
        };
        self.total += 1;
        *self.owners.entry(owner.into()).or_default() += 1;
        if owner == "kernel" {
            *self.kernel.entry(innermost.clone()).or_default() += 1;
        } else if owner.starts_with("host") {
            *self.host.entry(way_in(&frames)).or_default() += 1;
        }
        let mut stack = if instance { "instance" } else { "monitor" }.to_string();
        for (_, name) in frames.iter().rev() {
            stack.push(';');
            stack.push_str(&name.replace(';', ":"));
        }
        *self.stacks.entry(stack).or_default() += 1;
    }

    fn print(&self, what: &str, folder: &Path) {
        println!("{what}: {} samples", self.total);
        self.list("whose code runs", &self.owners);
        self.list("the host's, by the way in", &self.host);
        self.list("the kernel's functions", &self.kernel);
        let path: PathBuf = folder.join(format!("{what}.folded"));
        let lines: String = self
            .stacks
            .iter()
            .map(|(stack, count)| format!("{stack} {count}\n"))
            .collect();
        fs::write(&path, lines).expect("the profile can be written");
        println!("  stacks: {}\n", path.display());
    }

    fn list(&self, title: &str, counts: &BTreeMap<String, u32>) {
        let mut sorted: Vec<_> = counts.iter().collect();
        sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        println!("  {title}");
        for (name, count) in sorted.into_iter().take(LONGEST) {
            let share = 100.0 * f64::from(*count) / f64::from(self.total.max(1));
            println!("    {share:5.1} %  {name}");
        }
    }
}

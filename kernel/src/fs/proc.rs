//! `/proc`: what programs ask about themselves and the system.
//!
//! The forms are those of `proc(5)`. What has no meaning here is absent, or says honestly that there is nothing.

use alloc::{
    format,
    string::{String, ToString},
    sync::Arc,
    vec,
    vec::Vec,
};
use core::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};

use kiln_abi::host::{PAGE_SIZE, Protection};
use linux_raw_sys::general as linux;

use super::{
    Inode, Kind, device_number, device_parts,
    synthetic::{Names, Origin, TextDirectory, TextFile, TextLink},
    vfs::{Location, OpenInode, Place},
};
use crate::{
    Errno, Kernel, Result,
    file::OpenFile,
    memory::{Area, AreaFlags},
    syscall::process::RELEASE,
    task::{NAME_LENGTH, Process, Thread, UNLIMITED, signal},
    time::SECOND,
    trace,
};

const ORIGIN: Origin = Origin {
    device: device_number(0, 24),
    magic: linux::PROC_SUPER_MAGIC,
};

/// Clock ticks in a second, as `sysconf(_SC_CLK_TCK)` says.
const TICKS: u64 = 100;

type Entries = Vec<(&'static str, Arc<dyn Inode>)>;

/// A file whose text is made from the kernel's state.
fn text(kernel: &Arc<Kernel>, make: fn(&Kernel, &mut String)) -> Arc<dyn Inode> {
    let kernel = Arc::clone(kernel);
    TextFile::inode(ORIGIN, move || {
        let mut text = String::new();
        make(&kernel, &mut text);
        Ok(text.into_bytes())
    })
}

/// A file whose text is made from the process; empty before there is one.
fn of_process(
    kernel: &Arc<Kernel>,
    make: fn(&Process, &mut String) -> Result<()>,
) -> Arc<dyn Inode> {
    let kernel = Arc::clone(kernel);
    TextFile::inode(ORIGIN, move || {
        let mut text = String::new();
        make(process(&kernel)?, &mut text)?;
        Ok(text.into_bytes())
    })
}

fn process(kernel: &Kernel) -> Result<&Arc<Process>> {
    kernel.process.get().ok_or(Errno::ESRCH)
}

fn directory(entries: Entries) -> Arc<dyn Inode> {
    TextDirectory::inode(ORIGIN, entries)
}

fn fixed(text: &'static str) -> Arc<dyn Inode> {
    TextFile::fixed(ORIGIN, text)
}

/// A number that can be read and set, and has no effect beyond that: the program tells itself.
fn setting(value: u64) -> Arc<dyn Inode> {
    let value = Arc::new(AtomicU64::new(value));
    let stored = Arc::clone(&value);
    TextFile::writable(
        ORIGIN,
        move || Ok(format!("{}\n", value.load(Ordering::Relaxed)).into_bytes()),
        move |bytes| {
            let text = core::str::from_utf8(bytes).map_err(|_| Errno::EINVAL)?;
            stored.store(
                text.trim().parse().map_err(|_| Errno::EINVAL)?,
                Ordering::Relaxed,
            );
            Ok(())
        },
    )
}

/// The root directory.
#[must_use]
pub fn root(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    // What the C library asks of each program that starts: /proc/self/exe.
    let first: Entries = vec![
        ("self", TextLink::inode(ORIGIN, || Ok(String::from("1")))),
        ("1", process_directory(kernel)),
    ];
    let kernel = Arc::clone(kernel);
    TextDirectory::later(ORIGIN, first, move || make_root(&kernel))
}

fn make_root(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    let entries: Entries = vec![
        ("cpuinfo", text(kernel, cpuinfo)),
        ("meminfo", text(kernel, meminfo)),
        ("stat", text(kernel, system_stat)),
        ("uptime", text(kernel, uptime)),
        (
            "loadavg",
            text(kernel, |kernel, text| {
                let threads = kernel
                    .process
                    .get()
                    .map_or(0, |process| process.threads.lock().len());
                put(text, format_args!("0.00 0.00 0.00 1/{threads} {threads}\n"));
            }),
        ),
        (
            "version",
            text(kernel, |_, text| {
                put(
                    text,
                    format_args!(
                        "Linux version {RELEASE} (Kiln {})\n",
                        env!("CARGO_PKG_VERSION")
                    ),
                );
            }),
        ),
        ("cmdline", fixed("\n")),
        (
            "filesystems",
            fixed(
                "nodev\tsysfs\nnodev\ttmpfs\nnodev\tproc\nnodev\tdevtmpfs\nnodev\toverlay\n\terofs\nnodev\tfuse\n",
            ),
        ),
        (
            "mounts",
            TextLink::inode(ORIGIN, || Ok(String::from("self/mounts"))),
        ),
        (
            "net",
            TextLink::inode(ORIGIN, || Ok(String::from("self/net"))),
        ),
        (
            "swaps",
            fixed("Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"),
        ),
        (
            "devices",
            fixed("Character devices:\n  1 mem\n  5 /dev/tty\n\nBlock devices:\n"),
        ),
        ("sysrq-trigger", TextFile::trigger(ORIGIN, system_request)),
        ("sys", {
            let kernel = Arc::clone(kernel);
            TextDirectory::later(ORIGIN, Vec::new(), move || settings(&kernel))
        }),
    ];
    TextDirectory::inode(ORIGIN, entries)
}

/// What is written to `/proc/sysrq-trigger`: `c` is a panic of the kernel on purpose, as in Linux.
fn system_request(bytes: &[u8]) -> Result<()> {
    match bytes.first() {
        Some(b'c') => panic!("sysrq triggered crash"),
        Some(_) => {
            trace::warn!("not supported: requests to /proc/sysrq-trigger but c (a crash)");
            Err(Errno::EINVAL)
        }
        None => Ok(()),
    }
}

fn put(text: &mut String, arguments: core::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(arguments);
}

fn settings(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    let random = {
        let (boot, each) = (Arc::clone(kernel), Arc::clone(kernel));
        let identity = Arc::new(spin::Once::new());
        directory(vec![
            (
                "boot_id",
                TextFile::inode(ORIGIN, move || {
                    let text: &Result<String> = identity.call_once(|| uuid(&boot));
                    Ok(text.clone()?.into_bytes())
                }),
            ),
            (
                "uuid",
                TextFile::inode(ORIGIN, move || Ok(uuid(&each)?.into_bytes())),
            ),
            ("entropy_avail", fixed("256\n")),
            ("poolsize", fixed("256\n")),
        ])
    };
    directory(vec![
        (
            "kernel",
            directory(vec![
                (
                    "osrelease",
                    text(kernel, |_, text| put(text, format_args!("{RELEASE}\n"))),
                ),
                ("ostype", fixed("Linux\n")),
                ("version", fixed("#1 Kiln\n")),
                (
                    "hostname",
                    text(kernel, |kernel, text| {
                        put(text, format_args!("{}\n", kernel.hostname()));
                    }),
                ),
                ("domainname", fixed("(none)\n")),
                ("pid_max", fixed("32768\n")),
                ("threads-max", fixed("32768\n")),
                ("ngroups_max", fixed("65536\n")),
                ("cap_last_cap", fixed("40\n")),
                ("randomize_va_space", fixed("2\n")),
                ("core_pattern", fixed("core\n")),
                ("random", random),
                ("sem", fixed("0\t0\t0\t0\n")),
                ("shmmax", fixed("0\n")),
                ("shmall", fixed("0\n")),
                ("shmmni", fixed("0\n")),
            ]),
        ),
        (
            "vm",
            directory(vec![
                ("overcommit_memory", setting(1)),
                ("max_map_count", fixed("1048576\n")),
                ("swappiness", setting(0)),
                ("mmap_min_addr", fixed("65536\n")),
                ("nr_hugepages", fixed("0\n")),
            ]),
        ),
        (
            "fs",
            directory(vec![
                ("file-max", fixed("9223372036854775807\n")),
                ("nr_open", fixed("1048576\n")),
                ("pipe-max-size", fixed("1048576\n")),
                (
                    "file-nr",
                    text(kernel, |kernel, text| {
                        let open = kernel
                            .process
                            .get()
                            .map_or(0, |process| process.files.lock().iter().count());
                        put(text, format_args!("{open}\t0\t9223372036854775807\n"));
                    }),
                ),
                ("aio-max-nr", fixed("0\n")),
            ]),
        ),
        (
            "net",
            directory(vec![
                (
                    "core",
                    directory(vec![
                        ("somaxconn", setting(4096)),
                        ("rmem_max", fixed("212992\n")),
                        ("wmem_max", fixed("212992\n")),
                        ("rmem_default", fixed("212992\n")),
                        ("wmem_default", fixed("212992\n")),
                        ("netdev_max_backlog", setting(1000)),
                    ]),
                ),
                (
                    "ipv4",
                    directory(vec![
                        ("ip_local_port_range", fixed("32768\t60999\n")),
                        ("tcp_max_syn_backlog", setting(4096)),
                        ("tcp_fin_timeout", fixed("60\n")),
                        ("tcp_keepalive_time", fixed("7200\n")),
                        ("tcp_keepalive_intvl", fixed("75\n")),
                        ("tcp_keepalive_probes", fixed("9\n")),
                        ("ip_unprivileged_port_start", fixed("0\n")),
                    ]),
                ),
                (
                    "ipv6",
                    directory(vec![(
                        "conf",
                        directory(vec![
                            ("all", directory(vec![("disable_ipv6", fixed("0\n"))])),
                            ("default", directory(vec![("disable_ipv6", fixed("0\n"))])),
                        ]),
                    )]),
                ),
                ("unix", directory(vec![("max_dgram_qlen", setting(512))])),
            ]),
        ),
    ])
}

/// A random identity, version 4.
fn uuid(kernel: &Kernel) -> Result<String> {
    let mut bytes = [0u8; 16];
    kernel.host.entropy(&mut bytes)?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let mut text = String::new();
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        put(&mut text, format_args!("{byte:02x}"));
    }
    text.push('\n');
    Ok(text)
}

fn cpuinfo(_: &Kernel, text: &mut String) {
    let cpu = core::arch::x86_64::__cpuid(0);
    let mut vendor = Vec::new();
    for register in [cpu.ebx, cpu.edx, cpu.ecx] {
        vendor.extend_from_slice(&register.to_le_bytes());
    }
    let signature = core::arch::x86_64::__cpuid(1);
    let base_family = (signature.eax >> 8) & 0xf;
    let family = if base_family == 0xf {
        base_family + ((signature.eax >> 20) & 0xff)
    } else {
        base_family
    };
    let model = ((signature.eax >> 4) & 0xf) | ((signature.eax >> 12) & 0xf0);
    let mut name = Vec::new();
    if core::arch::x86_64::__cpuid(0x8000_0000).eax >= 0x8000_0004 {
        for leaf in 0x8000_0002..=0x8000_0004u32 {
            let part = core::arch::x86_64::__cpuid(leaf);
            for register in [part.eax, part.ebx, part.ecx, part.edx] {
                name.extend_from_slice(&register.to_le_bytes());
            }
        }
    }
    let vendor = String::from_utf8_lossy(&vendor);
    let name = String::from_utf8_lossy(&name);
    let name = name.trim_matches(['\0', ' ']);
    let mut flags = String::new();
    // Names as Linux gives them, by register of leaf 1 and 7.
    let extended = if cpu.eax >= 7 {
        core::arch::x86_64::__cpuid_count(7, 0)
    } else {
        signature
    };
    let known: [(u32, &[(u32, &str)]); 3] = [
        (
            signature.edx,
            &[
                (0, "fpu"),
                (4, "tsc"),
                (8, "cx8"),
                (15, "cmov"),
                (19, "clflush"),
                (23, "mmx"),
                (24, "fxsr"),
                (25, "sse"),
                (26, "sse2"),
            ],
        ),
        (
            signature.ecx,
            &[
                (0, "pni"),
                (1, "pclmulqdq"),
                (9, "ssse3"),
                (12, "fma"),
                (13, "cx16"),
                (19, "sse4_1"),
                (20, "sse4_2"),
                (22, "movbe"),
                (23, "popcnt"),
                (25, "aes"),
                (26, "xsave"),
                (28, "avx"),
                (29, "f16c"),
                (30, "rdrand"),
            ],
        ),
        (
            if cpu.eax >= 7 { extended.ebx } else { 0 },
            &[
                (0, "fsgsbase"),
                (3, "bmi1"),
                (5, "avx2"),
                (8, "bmi2"),
                (9, "erms"),
                (16, "avx512f"),
                (17, "avx512dq"),
                (18, "rdseed"),
                (19, "adx"),
                (29, "sha_ni"),
                (30, "avx512bw"),
                (31, "avx512vl"),
            ],
        ),
    ];
    for (register, names) in known {
        for (bit, name) in names {
            if register & 1 << bit != 0 {
                flags.push_str(name);
                flags.push(' ');
            }
        }
    }
    put(
        text,
        format_args!(
            "processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        ),
    );
    put(
        text,
        format_args!(
            "model name\t: {name}\nstepping\t: {}\n",
            signature.eax & 0xf
        ),
    );
    text.push_str(
        "physical id\t: 0\nsiblings\t: 1\ncore id\t\t: 0\ncpu cores\t: 1\nfpu\t\t: yes\n",
    );
    put(
        text,
        format_args!(
            "cpuid level\t: {}\nflags\t\t: {}\n",
            cpu.eax,
            flags.trim_end()
        ),
    );
    text.push_str("clflush size\t: 64\ncache_alignment\t: 64\n\n");
}

fn meminfo(kernel: &Kernel, text: &mut String) {
    let total = kernel.memory_limit >> 10;
    let used = kernel.host.memory_used() >> 10;
    let free = total.saturating_sub(used);
    let files = kernel.files.get().map_or(0, |files| {
        u64::from(files.pool().used()) * (PAGE_SIZE as u64 >> 10)
    });
    let mapped = kernel
        .process
        .get()
        .map_or(0, |process| process.memory.lock().mapped() as u64 >> 10);
    for (name, value) in [
        ("MemTotal", total),
        ("MemFree", free),
        ("MemAvailable", free),
        ("Buffers", 0),
        ("Cached", files),
        ("SwapCached", 0),
        ("Active", used),
        ("Inactive", 0),
        ("SwapTotal", 0),
        ("SwapFree", 0),
        ("Dirty", 0),
        ("Writeback", 0),
        ("AnonPages", used.saturating_sub(files)),
        ("Mapped", 0),
        ("Shmem", files),
        ("Slab", 0),
        ("CommitLimit", total),
        ("Committed_AS", mapped),
        ("VmallocTotal", 0),
        ("VmallocUsed", 0),
    ] {
        put(
            text,
            format_args!("{:<16}{value:>8} kB\n", format!("{name}:")),
        );
    }
    text.push_str(
        "HugePages_Total:       0\nHugePages_Free:        0\nHugepagesize:       2048 kB\n",
    );
}

/// Ticks of CPU time of the process.
fn cpu_ticks(process: &Process) -> u64 {
    let living: u64 = process
        .threads
        .lock()
        .values()
        .map(|thread| thread.cpu_time())
        .sum();
    (process.cpu_time.load(Ordering::Relaxed) + living) / (SECOND / TICKS)
}

fn system_stat(kernel: &Kernel, text: &mut String) {
    let busy = kernel.process.get().map_or(0, |process| cpu_ticks(process));
    let up = kernel.clock.uptime() / (SECOND / TICKS);
    let idle = up.saturating_sub(busy);
    put(
        text,
        format_args!("cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 {busy} 0 0 {idle} 0 0 0 0 0 0\n"),
    );
    let start = kernel
        .clock
        .realtime()
        .saturating_sub(kernel.clock.uptime())
        / SECOND;
    let threads = kernel
        .process
        .get()
        .map_or(0, |process| process.threads.lock().len());
    put(
        text,
        format_args!(
            "intr 0\nctxt 0\nbtime {start}\nprocesses {threads}\nprocs_running 1\nprocs_blocked 0\n"
        ),
    );
}

fn uptime(kernel: &Kernel, text: &mut String) {
    let up = kernel.clock.uptime();
    let busy = kernel
        .process
        .get()
        .map_or(0, |process| cpu_ticks(process) * (SECOND / TICKS));
    let seconds = |time: u64| (time / SECOND, time % SECOND / (SECOND / 100));
    let ((up, up_part), (idle, idle_part)) = (seconds(up), seconds(up.saturating_sub(busy)));
    put(
        text,
        format_args!("{up}.{up_part:02} {idle}.{idle_part:02}\n"),
    );
}

fn process_directory(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    let first = vec![("exe", executable(kernel))];
    let kernel = Arc::clone(kernel);
    TextDirectory::later(ORIGIN, first, move || process_files(&kernel))
}

/// All of `/proc/1` but `exe`.
fn process_files(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    let mut entries = thread_files(kernel, None);
    let (for_fd, for_info, for_task) = (Arc::clone(kernel), Arc::clone(kernel), Arc::clone(kernel));
    entries.extend([
        (
            "fd",
            TextDirectory::with_names(ORIGIN, Vec::new(), Descriptors(for_fd, false))
                as Arc<dyn Inode>,
        ),
        (
            "fdinfo",
            TextDirectory::with_names(ORIGIN, Vec::new(), Descriptors(for_info, true)),
        ),
        (
            "task",
            TextDirectory::with_names(ORIGIN, Vec::new(), Tasks(for_task)),
        ),
        ("net", net(kernel)),
    ]);
    directory(entries)
}

/// The link to the program.
fn executable(kernel: &Arc<Kernel>) -> Arc<dyn Inode> {
    let (text, jump) = (Arc::clone(kernel), Arc::clone(kernel));
    TextLink::magic(
        ORIGIN,
        move || Ok(process(&text)?.program.clone()),
        move || {
            let process = process(&jump)?;
            let root = jump.root.get().ok_or(Errno::ENOENT)?;
            let view = super::vfs::View::superuser(root);
            let walk = view.find(root, &process.program, super::vfs::Resolve::FOLLOW)?;
            Ok(walk.location())
        },
    )
}

/// Files that both `/proc/1` and `/proc/1/task/N` have, beside `exe`.
fn thread_files(kernel: &Arc<Kernel>, thread: Option<u32>) -> Entries {
    let (comm_get, comm_set) = (Arc::clone(kernel), Arc::clone(kernel));
    let (for_stat, for_status) = (Arc::clone(kernel), Arc::clone(kernel));
    let id = thread.unwrap_or(1);
    let find = move |kernel: &Kernel| process(kernel)?.thread(id);
    let place = |pick: fn(&Process) -> Location| {
        let (text, jump) = (Arc::clone(kernel), Arc::clone(kernel));
        TextLink::magic(
            ORIGIN,
            move || Ok(pick(process(&text)?).path()),
            move || Ok(pick(process(&jump)?)),
        )
    };
    let bytes = |make: fn(&Process) -> Vec<u8>| {
        let kernel = Arc::clone(kernel);
        TextFile::inode(ORIGIN, move || Ok(make(process(&kernel)?)))
    };
    vec![
        (
            "cwd",
            place(|process| process.file_system.lock().working_directory.clone()),
        ),
        (
            "root",
            place(|process| process.file_system.lock().root.clone()),
        ),
        ("cmdline", bytes(|process| joined(&process.arguments))),
        ("environ", bytes(|process| joined(&process.environment))),
        ("auxv", bytes(|process| process.auxiliary.clone())),
        (
            "comm",
            TextFile::writable(
                ORIGIN,
                move || Ok([find(&comm_get)?.name.lock().as_slice(), b"\n"].concat()),
                move |bytes| {
                    let end = bytes.iter().rposition(|byte| !matches!(byte, b'\n' | 0));
                    let length = end.map_or(0, |last| last + 1).min(NAME_LENGTH);
                    *find(&comm_set)?.name.lock() = bytes[..length].to_vec();
                    Ok(())
                },
            ),
        ),
        (
            "stat",
            TextFile::inode(ORIGIN, move || {
                let mut text = String::new();
                stat(&*find(&for_stat)?, &mut text);
                Ok(text.into_bytes())
            }),
        ),
        (
            "status",
            TextFile::inode(ORIGIN, move || {
                let mut text = String::new();
                status(&*find(&for_status)?, &mut text);
                Ok(text.into_bytes())
            }),
        ),
        (
            "statm",
            of_process(kernel, |process, text| {
                let (all, resident, shared) = pages(process);
                put(
                    text,
                    format_args!("{all} {resident} {shared} 0 0 {resident} 0\n"),
                );
                Ok(())
            }),
        ),
        (
            "maps",
            of_process(kernel, |process, text| {
                for area in process.memory.lock().areas() {
                    map_line(area, text);
                }
                Ok(())
            }),
        ),
        (
            "smaps",
            of_process(kernel, |process, text| {
                for area in process.memory.lock().areas() {
                    map_line(area, text);
                    let size = (area.end - area.start) >> 10;
                    // Which pages have been touched only the machine below knows: all of a range counts.
                    put(
                        text,
                        format_args!(
                            "Size:           {size:>8} kB\nKernelPageSize:        4 kB\nMMUPageSize:           4 kB\n"
                        ),
                    );
                    put(
                        text,
                        format_args!(
                            "Rss:            {size:>8} kB\nPss:            {size:>8} kB\n"
                        ),
                    );
                    put(
                        text,
                        format_args!("Shared_Clean:          0 kB\nShared_Dirty:          0 kB\n"),
                    );
                    put(
                        text,
                        format_args!("Private_Clean:         0 kB\nPrivate_Dirty:  {size:>8} kB\n"),
                    );
                    put(
                        text,
                        format_args!(
                            "Referenced:     {size:>8} kB\nAnonymous:      {size:>8} kB\n"
                        ),
                    );
                    text.push_str(
                        "AnonHugePages:         0 kB\nSwap:                  0 kB\nVmFlags: rd\n",
                    );
                }
                Ok(())
            }),
        ),
        ("limits", of_process(kernel, limits)),
        ("mounts", text(kernel, mounts)),
        ("mountinfo", text(kernel, mountinfo)),
        ("cgroup", fixed("0::/\n")),
        ("oom_score", fixed("0\n")),
        ("oom_score_adj", setting(0)),
        ("oom_adj", setting(0)),
        ("coredump_filter", setting(0x33)),
        (
            "io",
            fixed(
                "rchar: 0\nwchar: 0\nsyscr: 0\nsyscw: 0\nread_bytes: 0\nwrite_bytes: 0\ncancelled_write_bytes: 0\n",
            ),
        ),
        ("wchan", fixed("0")),
        ("personality", fixed("00000000\n")),
        ("uid_map", fixed("         0          0 4294967295\n")),
        ("gid_map", fixed("         0          0 4294967295\n")),
        ("setgroups", fixed("allow\n")),
    ]
}

fn joined(texts: &[String]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in texts {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// Pages mapped, resident, and resident from files.
fn pages(process: &Process) -> (usize, u64, u64) {
    let mapped = process.memory.lock().mapped() / PAGE_SIZE;
    let used = process.kernel.host.memory_used() / PAGE_SIZE as u64;
    let files = process
        .kernel
        .files
        .get()
        .map_or(0, |files| u64::from(files.pool().used()));
    (mapped, used.min(mapped as u64), files)
}

fn map_line(area: &Area, text: &mut String) {
    let flag = |protection: Protection, letter: char| {
        if area.protection.contains(protection) {
            letter
        } else {
            '-'
        }
    };
    let shared = if area.flags.contains(AreaFlags::SHARED) {
        's'
    } else {
        'p'
    };
    let (offset, device, inode) = match &area.file {
        Some(file) => {
            let identity = file
                .inode
                .metadata()
                .map(|metadata| (metadata.device, metadata.inode));
            let (device, inode) = identity.unwrap_or_default();
            (file.offset, device_parts(device), inode)
        }
        None => (0, (0, 0), 0),
    };
    let start = text.len();
    put(
        text,
        format_args!(
            "{:08x}-{:08x} {}{}{}{shared} {offset:08x} {:02x}:{:02x} {inode} ",
            area.start,
            area.end,
            flag(Protection::READ, 'r'),
            flag(Protection::WRITE, 'w'),
            flag(Protection::EXECUTE, 'x'),
            device.0,
            device.1,
        ),
    );
    let name = match &area.file {
        Some(file) => &*file.path,
        None if area.flags.contains(AreaFlags::HEAP) => "[heap]",
        None if area.flags.contains(AreaFlags::STACK) => "[stack]",
        None => "",
    };
    if !name.is_empty() {
        while text.len() - start < 73 {
            text.push(' ');
        }
        text.push_str(name);
    }
    text.push('\n');
}

fn stat(thread: &Thread, text: &mut String) {
    let process = &thread.process;
    let name = thread.name();
    let threads = process.threads.lock().len();
    let ticks = cpu_ticks(process);
    let (mapped, resident, _) = pages(process);
    let bytes = mapped * PAGE_SIZE;
    let nice = process.control.lock().nice;
    // Fields 3 to 52 of proc_pid_stat(5): state, parent, group, session, terminal, its group, flags, faults (four),
    // times (four), priority, nice, threads, an old timer, start, memory, then what only ptrace may see.
    put(
        text,
        format_args!(
            "{} ({name}) R 0 {pid} {pid} 0 -1 0 0 0 0 0 {ticks} 0 0 0 {} {nice} {threads} 0 0 {bytes} {resident} {} ",
            thread.id,
            20 + nice,
            UNLIMITED,
            pid = process.id,
        ),
    );
    put(
        text,
        format_args!(
            "0 0 0 0 0 {} {} 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
            signal::pending(thread).0 & 0x7fff_ffff,
            thread.signals.lock().mask().0 & 0x7fff_ffff,
        ),
    );
}

fn status(thread: &Thread, text: &mut String) {
    let process = &thread.process;
    let name = thread.name();
    let credentials = process.credentials.lock().clone();
    let threads = process.threads.lock().len();
    let umask = process.file_system.lock().umask;
    let (mapped, resident, files) = pages(process);
    let kilobytes = |pages: u64| pages * (PAGE_SIZE as u64 >> 10);
    put(
        text,
        format_args!("Name:\t{name}\nUmask:\t{umask:04o}\nState:\tR (running)\n"),
    );
    put(
        text,
        format_args!(
            "Tgid:\t{pid}\nNgid:\t0\nPid:\t{}\nPPid:\t0\nTracerPid:\t0\n",
            thread.id,
            pid = process.id
        ),
    );
    let ([ruid, euid, suid], [rgid, egid, sgid]) = (credentials.uid, credentials.gid);
    put(
        text,
        format_args!(
            "Uid:\t{ruid}\t{euid}\t{suid}\t{euid}\nGid:\t{rgid}\t{egid}\t{sgid}\t{egid}\n"
        ),
    );
    let slots = process
        .files
        .lock()
        .iter()
        .last()
        .map_or(0, |(number, _)| number + 1)
        .max(64);
    put(
        text,
        format_args!(
            "FDSize:\t{}\nGroups:\t",
            (slots.cast_unsigned()).next_power_of_two()
        ),
    );
    for group in &credentials.groups {
        put(text, format_args!("{group} "));
    }
    text.push('\n');
    let (mapped, resident) = (kilobytes(mapped as u64), kilobytes(resident));
    for (name, value) in [
        ("VmPeak", mapped),
        ("VmSize", mapped),
        ("VmLck", 0),
        ("VmPin", 0),
        ("VmHWM", resident),
        ("VmRSS", resident),
        ("RssAnon", resident),
        ("RssFile", 0),
        ("RssShmem", kilobytes(files)),
        ("VmData", mapped),
        ("VmStk", 0),
        ("VmExe", 0),
        ("VmLib", 0),
        ("VmPTE", 0),
        ("VmSwap", 0),
    ] {
        put(text, format_args!("{name}:\t{value:>8} kB\n"));
    }
    put(text, format_args!("Threads:\t{threads}\n"));
    let pending = signal::pending(thread).0;
    let mask = thread.signals.lock().mask().0;
    put(
        text,
        format_args!(
            "SigQ:\t0/4096\nSigPnd:\t{pending:016x}\nShdPnd:\t{:016x}\nSigBlk:\t{mask:016x}\n",
            0
        ),
    );
    let all = if credentials.is_privileged() {
        0x1ff_ffff_ffffu64
    } else {
        0
    };
    put(
        text,
        format_args!(
            "CapInh:\t{:016x}\nCapPrm:\t{all:016x}\nCapEff:\t{all:016x}\nCapBnd:\t{all:016x}\nCapAmb:\t{:016x}\n",
            0, 0
        ),
    );
    let restricted = u8::from(thread.control.lock().no_new_privileges);
    put(text, format_args!("NoNewPrivs:\t{restricted}\n"));
    text.push_str("Seccomp:\t0\nCpus_allowed:\t1\nCpus_allowed_list:\t0\nMems_allowed:\t1\nMems_allowed_list:\t0\n");
    text.push_str("voluntary_ctxt_switches:\t0\nnonvoluntary_ctxt_switches:\t0\n");
}

fn limits(process: &Process, text: &mut String) -> Result<()> {
    const NAMES: [(&str, &str); 16] = [
        ("Max cpu time", "seconds"),
        ("Max file size", "bytes"),
        ("Max data size", "bytes"),
        ("Max stack size", "bytes"),
        ("Max core file size", "bytes"),
        ("Max resident set", "bytes"),
        ("Max processes", "processes"),
        ("Max open files", "files"),
        ("Max locked memory", "bytes"),
        ("Max address space", "bytes"),
        ("Max file locks", "locks"),
        ("Max pending signals", "signals"),
        ("Max msgqueue size", "bytes"),
        ("Max nice priority", ""),
        ("Max realtime priority", ""),
        ("Max realtime timeout", "us"),
    ];
    put(
        text,
        format_args!(
            "{:<26}{:<21}{:<21}{:<10}\n",
            "Limit", "Soft Limit", "Hard Limit", "Units"
        ),
    );
    let shown = |limit: u64| {
        if limit == UNLIMITED {
            String::from("unlimited")
        } else {
            limit.to_string()
        }
    };
    for ((name, unit), (soft, hard)) in NAMES.iter().zip(process.limits.lock().iter()) {
        put(
            text,
            format_args!(
                "{name:<26}{:<21}{:<21}{unit:<10}\n",
                shown(*soft),
                shown(*hard)
            ),
        );
    }
    Ok(())
}

fn mounts(kernel: &Kernel, text: &mut String) {
    let Some(root) = kernel.root.get() else {
        return;
    };
    root.mount().catch_up(None);
    for mount in root.mount().all() {
        let access = if mount.read_only { "ro" } else { "rw" };
        put(
            text,
            format_args!(
                "{} {} {} {access},noatime 0 0\n",
                mount.source, mount.path, mount.kind
            ),
        );
    }
}

fn mountinfo(kernel: &Kernel, text: &mut String) {
    let Some(root) = kernel.root.get() else {
        return;
    };
    root.mount().catch_up(None);
    let mounts = root.mount().all();
    for mount in &mounts {
        // The mount with the longest path above it.
        let parent = mounts
            .iter()
            .filter(|other| {
                other.identifier != mount.identifier && mount.path.starts_with(other.path.as_str())
            })
            .max_by_key(|other| other.path.len())
            .map_or(0, |other| other.identifier);
        let (major, minor) = mount
            .root_inode()
            .metadata()
            .map_or((0, 0), |metadata| device_parts(metadata.device));
        let access = if mount.read_only { "ro" } else { "rw" };
        put(
            text,
            format_args!(
                "{} {parent} {major}:{minor} / {} {access},noatime - {} {} {access}\n",
                mount.identifier, mount.path, mount.kind, mount.source,
            ),
        );
    }
}

/// Descriptors of the process, as links or as their `fdinfo`.
struct Descriptors(Arc<Kernel>, bool);

impl Descriptors {
    fn file(&self, name: &str) -> Result<(i32, Arc<OpenFile>)> {
        let number: i32 = name.parse().map_err(|_| Errno::ENOENT)?;
        let file = process(&self.0)?.file(number).map_err(|_| Errno::ENOENT)?;
        Ok((number, file))
    }
}

impl Names for Descriptors {
    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        let (number, file) = self.file(name)?;
        let kernel = Arc::clone(&self.0);
        if self.1 {
            return Ok(TextFile::inode(ORIGIN, move || {
                let files = process(&kernel)?.files.lock();
                let descriptor = files.descriptor(number)?;
                let flags = descriptor.file.flags().bits()
                    | if descriptor.close_on_exec {
                        linux::O_CLOEXEC
                    } else {
                        0
                    };
                let position = descriptor.file.position();
                Ok(
                    format!("pos:\t{position}\nflags:\t0{flags:o}\nmnt_id:\t1\nino:\t0\n")
                        .into_bytes(),
                )
            }));
        }
        let target = Arc::clone(&file);
        Ok(TextLink::magic(
            ORIGIN,
            move || Ok(shown(&target)),
            move || jump(&kernel, &file),
        ))
    }

    fn list(&self) -> Vec<(String, Kind)> {
        let Ok(process) = process(&self.0) else {
            return Vec::new();
        };
        let kind = if self.1 {
            Kind::Regular
        } else {
            Kind::SymbolicLink
        };
        process
            .files
            .lock()
            .iter()
            .map(|(number, _)| (number.to_string(), kind))
            .collect()
    }
}

/// What a descriptor's link reads as.
fn shown(file: &OpenFile) -> String {
    match &file.path {
        Some(path) => {
            let gone = file.file.inode().is_some_and(|inode| {
                inode.metadata().is_ok_and(|metadata| metadata.links == 0)
                    && !path.ends_with(" (deleted)")
            });
            if gone {
                format!("{path} (deleted)")
            } else {
                path.clone()
            }
        }
        None => file.file.describe(),
    }
}

/// Where a descriptor's link leads.
fn jump(kernel: &Kernel, file: &Arc<OpenFile>) -> Result<Location> {
    if let Some(place) = file.file.as_any().downcast_ref::<Place>() {
        return Ok(place.location().clone());
    }
    let root = kernel.root.get().ok_or(Errno::ENOENT)?;
    let inode = match file.file.inode() {
        Some(inode) => Arc::clone(inode),
        None => OpenInode::wrap(Arc::clone(&file.file)),
    };
    Ok(Location::detached(inode, root, shown(file)))
}

/// Threads of the process.
struct Tasks(Arc<Kernel>);

impl Names for Tasks {
    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        let id: u32 = name.parse().map_err(|_| Errno::ENOENT)?;
        process(&self.0)?.thread(id).map_err(|_| Errno::ENOENT)?;
        let mut files = thread_files(&self.0, Some(id));
        files.push(("exe", executable(&self.0)));
        Ok(directory(files))
    }

    fn list(&self) -> Vec<(String, Kind)> {
        let Ok(process) = process(&self.0) else {
            return Vec::new();
        };
        process
            .threads
            .lock()
            .keys()
            .map(|id| (id.to_string(), Kind::Directory))
            .collect()
    }
}

/// `/proc/net`: heads of tables. What is connected is not told.
fn net(_: &Arc<Kernel>) -> Arc<dyn Inode> {
    const SOCKETS: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
    directory(vec![
        (
            "dev",
            fixed(concat!(
                "Inter-|   Receive                                                |  Transmit\n",
                " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n",
                "    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n",
            )),
        ),
        (
            "route",
            fixed(
                "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n",
            ),
        ),
        (
            "if_inet6",
            fixed("00000000000000000000000000000001 01 80 10 80       lo\n"),
        ),
        ("tcp", fixed(SOCKETS)),
        ("tcp6", fixed(SOCKETS)),
        ("udp", fixed(SOCKETS)),
        ("udp6", fixed(SOCKETS)),
        (
            "unix",
            fixed("Num       RefCount Protocol Flags    Type St Inode Path\n"),
        ),
    ])
}

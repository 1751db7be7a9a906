//! What the end-to-end tests share: the command under test, its state, free ports, waiting with a deadline.
//!
//! The tests use `kiln` as a user does, through its command line, and real clients (curl, redis-cli, wrk).
//! Each has a state directory of its own, so that they run side by side and leave nothing
//! behind: whatever a test started is ended when its [`Kiln`] is dropped.
//!
//! The command is `target/release/kiln`, or what the environment variable `KILN` names.
//! `KILN_TEST_ENGINES` (such as `process`) limits the engines that are tested.

#![forbid(unsafe_code)]

use std::{
    ffi::OsStr,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket},
    ops::Range,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

pub mod programs;
pub mod summon;

/// How long one run of a program may take. Generous: machines are slow and busy at times, and emulation slower.
pub const RUN_DEADLINE: Duration = Duration::from_secs(120);
/// How long something that comes by itself (a server's first answer) may take.
pub const EVENT_DEADLINE: Duration = Duration::from_secs(30);

/// The root of the checkout.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The command under test.
///
/// # Panics
///
/// When it has not been built.
#[must_use]
pub fn kiln() -> PathBuf {
    if let Some(path) = std::env::var_os("KILN") {
        return path.into();
    }
    // This program lies in the target directory: also in one that is not the checkout's own.
    let own = std::env::current_exe().expect("a program has a path");
    own.ancestors()
        .map(|folder| folder.join("release/kiln"))
        .find(|path| path.exists())
        .expect("target/release/kiln is missing: run `cargo build --release` first")
}

/// The engines to test.
#[must_use]
pub fn engines() -> Vec<String> {
    std::env::var("KILN_TEST_ENGINES")
        .unwrap_or_else(|_| "process,qemu".to_owned())
        .split(',')
        .map(str::to_owned)
        .collect()
}

/// The command with a state of its own.
pub struct Kiln {
    folder: TempDir,
}

impl Default for Kiln {
    fn default() -> Self {
        Self::new()
    }
}

impl Kiln {
    /// A fresh state.
    ///
    /// # Panics
    ///
    /// When there is no place for it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    /// A directory for the test's own files. It goes with the state.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The directory of the command's state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The command, with arguments.
    #[must_use]
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(kiln());
        command
            .args(arguments)
            .env("KILN_STATE", self.state())
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Outcome {
        run(&mut self.command(arguments), RUN_DEADLINE)
    }

    /// Runs the command, which must succeed; gives its standard output.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn succeed<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        let mut command = self.command(arguments);
        let outcome = run(&mut command, RUN_DEADLINE);
        assert_eq!(outcome.code(), 0, "{command:?}\n{outcome}");
        outcome.output
    }

    /// Builds an image of `source` in the test's folder.
    pub fn build(&self, source: &Path) -> PathBuf {
        let name = source.file_name().unwrap_or(OsStr::new("image"));
        let image = self.folder.path().join(name).with_added_extension("kiln");
        self.succeed([
            OsStr::new("build"),
            OsStr::new("-o"),
            image.as_os_str(),
            source.as_os_str(),
        ]);
        image
    }

    /// Starts an instance in the background: `run -d --name NAME` and the arguments.
    pub fn start(&self, name: &str, arguments: &[&str]) {
        self.succeed(["run", "-d", "--name", name].iter().chain(arguments));
    }

    /// Runs the command, which must fail with this code and name each of these words on standard error; and nothing
    /// may be left behind.
    ///
    /// # Panics
    ///
    /// When anything of that is otherwise.
    pub fn fail<A: AsRef<OsStr>>(
        &self,
        code: i32,
        words: &[&str],
        arguments: impl IntoIterator<Item = A>,
    ) {
        let mut command = self.command(arguments);
        let outcome = run(&mut command, RUN_DEADLINE);
        assert_eq!(outcome.code(), code, "{command:?}\n{outcome}");
        for word in words {
            assert!(
                outcome.errors.contains(word),
                "{command:?}: no word of {word}\n{outcome}"
            );
        }
        assert_eq!(
            self.succeed(["ps", "-q"]),
            "",
            "{command:?} has left an instance behind"
        );
    }
}

impl Drop for Kiln {
    fn drop(&mut self) {
        let names = run(&mut self.command(["ps", "-q"]), RUN_DEADLINE).output;
        for name in names.lines() {
            let outcome = run(&mut self.command(["rm", "-f", name]), RUN_DEADLINE);
            if outcome.code() != 0 {
                eprintln!("cannot remove {name}: {outcome}");
            }
        }
    }
}

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Standard output, with what is not UTF-8 replaced.
    pub output: String,
    /// Standard error, the same way.
    pub errors: String,
    /// How it ended; nothing when it had to be killed at its deadline.
    pub status: Option<ExitStatus>,
}

impl Outcome {
    /// The exit code as a shell says it: 128 and the number for a signal. 1000 for a command that had to be killed at
    /// its deadline, which no command can give.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self.status {
            Some(status) => status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            None => 1000,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            Some(status) => writeln!(formatter, "{status}")?,
            None => writeln!(formatter, "killed at its deadline")?,
        }
        write!(
            formatter,
            "-- standard output\n{}-- standard error\n{}",
            self.output, self.errors
        )
    }
}

/// Runs a command until it ends or its deadline is over.
///
/// # Panics
///
/// When it cannot be started.
pub fn run(command: &mut Command, deadline: Duration) -> Outcome {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let output = collect(child.stdout.take());
    let errors = collect(child.stderr.take());
    let status = wait(&mut child, deadline);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Outcome {
        output: output.join().unwrap_or_default(),
        errors: errors.join().unwrap_or_default(),
        status,
    }
}

fn collect(stream: Option<impl std::io::Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // A broken stream ends what there is to see.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for a child to end; nothing when its deadline is over.
pub fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + deadline;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(2)),
            _ => return None,
        }
    }
}

/// Tries again until there is an answer.
///
/// # Panics
///
/// When there is none within [`EVENT_DEADLINE`]; `what` says what was waited for.
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + EVENT_DEADLINE;
    loop {
        if let Some(answer) = attempt() {
            return answer;
        }
        assert!(
            Instant::now() < end,
            "waited {EVENT_DEADLINE:?} in vain for {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// A port that nobody uses: neither TCP nor UDP, on no address. Each call gives another one, from below the ports that the
/// system gives to clients, so that no connection of another test takes it before its server does.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    const PORTS: Range<u16> = 16_384..32_768;
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    // Test programs that run at once begin at different places.
    let start = std::process::id().wrapping_mul(257) as u16;
    PORTS
        .map(|_| {
            let step = start.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
            PORTS.start + step % (PORTS.end - PORTS.start)
        })
        .find(|&port| is_free(port))
        .expect("a free port")
}

/// Whether nobody uses a port, TCP or UDP. Where there is no IPv6, IPv4 alone tells.
fn is_free(port: u16) -> bool {
    let bound = |address: IpAddr| -> io::Result<()> {
        TcpListener::bind((address, port))?;
        UdpSocket::bind((address, port)).map(|_| ())
    };
    match bound(Ipv6Addr::UNSPECIFIED.into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            bound(Ipv4Addr::UNSPECIFIED.into()).is_ok()
        }
        outcome => outcome.is_ok(),
    }
}

/// Sends a signal, named as for kill(1), to a process; whether that could be done. By the tool rather than the call: the
/// workspace's unsafe code is elsewhere.
#[must_use]
pub fn signal(process: u32, name: &str) -> bool {
    Command::new("kill")
        .args(["-s", name, &process.to_string()])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether a tool is installed.
///
/// # Panics
///
/// When it is not: `tests/tools/install` installs all of them.
pub fn need(tool: &str) {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).exists()))
        || Path::new("/usr/sbin").join(tool).exists();
    assert!(found, "{tool} is missing: run tests/tools/install");
}

/// What curl got.
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Content type, or nothing.
    pub kind: String,
    /// The body.
    pub body: Vec<u8>,
}

/// Gets a page of a server on the loopback interface with curl, trying again until something answers.
///
/// # Panics
///
/// When nothing answers.
#[must_use]
pub fn get(port: u16, path: &str) -> Reply {
    need("curl");
    eventually(&format!("an answer from port {port}"), || {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--max-time",
                "30",
                "--write-out",
                "\\n%{http_code} %{content_type}",
            ])
            .arg(format!("http://127.0.0.1:{port}{path}"))
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let end = output.stdout.iter().rposition(|byte| *byte == b'\n')?;
        let (body, trailer) = output.stdout.split_at_checked(end)?;
        let trailer = String::from_utf8_lossy(trailer);
        let (status, kind) = trailer
            .trim()
            .split_once(' ')
            .unwrap_or((trailer.trim(), ""));
        let status = status.parse().ok().filter(|_| output.status.success())?;
        Some(Reply {
            status,
            kind: kind.to_owned(),
            body: body.to_vec(),
        })
    })
}

//! Servers as child processes: native ones and unikernels in the foreground, and when they answer first.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kiln_tests::{Kiln, signal, wait, workspace};

/// How long a server may take to answer first, and to stop.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running server; ended when dropped.
pub struct Server {
    process: Child,
    started: Instant,
    /// Where it answers.
    pub port: u16,
}

impl Server {
    /// Starts a command that will answer on a port. What it prints is thrown away.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn start(command: &mut Command, port: u16) -> Self {
        let started = Instant::now();
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self {
            process,
            started,
            port,
        }
    }

    /// Process number of the command.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends `request` until a first byte comes back; time since the start. Nothing when the server ended or lost patience.
    pub fn first_byte(&mut self, request: &[u8]) -> Option<Duration> {
        while self.started.elapsed() < PATIENCE {
            if let Some(time) = self.attempt(request) {
                return Some(time);
            }
            if !matches!(self.process.try_wait(), Ok(None)) {
                return None;
            }
            // Short against what is measured, long enough to leave the processor to the server.
            thread::sleep(Duration::from_micros(100));
        }
        None
    }

    fn attempt(&self, request: &[u8]) -> Option<Duration> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(request).ok()?;
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        Some(self.started.elapsed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended cannot be told to.
        let _ = signal(self.process.id(), "TERM");
        if wait(&mut self.process, PATIENCE).is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// A request for the site's front page.
pub const FRONT_PAGE: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// The example site's files.
pub fn site() -> PathBuf {
    workspace().join("examples/site/_site")
}

/// The static site server that images contain, as a native program.
pub fn native_site_server(folder: &Path) -> PathBuf {
    let path = folder.join("kiln-site-server");
    fs::write(&path, kiln_guest::SITE_SERVER).expect("the site server can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("and made executable");
    path
}

/// An image of the example site.
pub fn site_image(kiln: &Kiln) -> PathBuf {
    kiln.build(&workspace().join("examples/site"))
}

/// `kiln run` of an image in the foreground, with a port published.
pub fn unikernel(
    kiln: &Kiln,
    engine: &str,
    options: &[&str],
    port: u16,
    guest_port: u16,
    image: &Path,
) -> Command {
    let mut command = kiln.command([
        "run",
        "--engine",
        engine,
        "-p",
        &format!("127.0.0.1:{port}:{guest_port}"),
    ]);
    command.args(options).arg(image);
    command
}

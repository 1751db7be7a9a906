//! Instances in the background: a command starts itself again as the instance's monitor, and is told how that went.
//!
//! The new process finds a Unix stream socket as its standard input. Over it come one line ([`Handover`]) with descriptors (the
//! lock of the instance's folder, then sockets that the instance is to use for its published ports) and from then on it
//! is a session of the control socket that watches ([`crate::control`]). Its standard error is `monitor.log` in the folder.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::arguments::Publish;
use crate::control::{self, Event, Message};
use crate::error::{Error, Refusal};
use crate::state::{Instance, StateDirectory, now_microseconds};
use crate::{choice, console, monitor};

/// The first line on a new monitor's standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// For which published ports, by their place in the configuration, a socket comes along. The lock comes before all.
    pub held: Vec<usize>,
    /// A text in a line of the program's output to look for: [`Event::Line`] tells.
    pub line: Option<String>,
}

/// A socket that is bound (TCP: and listens) for a published port already.
#[derive(Debug)]
pub struct Held<'a> {
    /// Place of the port in the instance's configuration.
    pub port: usize,
    /// The socket; it stays open here too.
    pub socket: BorrowedFd<'a>,
}

/// A monitor that has just been started.
#[derive(Debug)]
pub struct Launched {
    /// Its process. Whoever launches long-lived must wait for its end.
    pub child: Child,
    /// A session with it that watches.
    pub session: UnixStream,
}

/// Name of the hidden command that becomes a monitor: followed by the state directory and the instance's name.
pub const COMMAND: &str = "instance-monitor";

/// Starts the monitor of an instance that was just made. Its lock must be held by `instance`, and goes to the new process.
///
/// # Errors
/// When the process cannot be started or does not take its handover.
pub fn launch(
    state: &StateDirectory,
    instance: &Instance,
    held: &[Held<'_>],
    line: Option<String>,
) -> Result<Launched, Error> {
    let start = || -> io::Result<Launched> {
        let lock = instance.lock_for_child()?;
        let log = monitor_log(instance.directory())?;
        let (session, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg0("kiln")
            .arg(COMMAND)
            .arg(state.path())
            .arg(instance.name())
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()?;
        let handover = Handover {
            held: held.iter().map(|held| held.port).collect(),
            line,
        };
        let mut descriptors = vec![lock.as_fd()];
        descriptors.extend(held.iter().map(|held| held.socket));
        control::send_line(&session, &handover, &descriptors)?;
        Ok(Launched { child, session })
    };
    start().map_err(Error::io("start the monitor"))
}

/// How a start went, as far as the program's first instruction.
#[derive(Debug)]
pub enum Outcome {
    /// The program runs; its published ports with the ports really bound.
    Started(Vec<Publish>),
    /// The instance ended before its program began, and is removed.
    Failed(Refusal),
}

impl Launched {
    /// Waits until the program has begun or cannot.
    ///
    /// # Errors
    /// When the monitor ends without a word; says what it wrote.
    pub fn wait_started(mut self, instance: &Instance) -> Result<Outcome, Error> {
        let mut session = BufReader::new(&self.session);
        loop {
            let mut line = String::new();
            session
                .read_line(&mut line)
                .map_err(Error::io("hear the monitor"))?;
            match serde_json::from_str(&line) {
                Ok(Message::Event { event, .. }) => match event {
                    Event::Started { ports } => return Ok(Outcome::Started(ports)),
                    Event::Failed(refusal) => return Ok(Outcome::Failed(refusal)),
                    _ => {}
                },
                Ok(Message::Answer { .. } | Message::Held { .. }) => {}
                Err(_) => {
                    let status = self
                        .child
                        .wait()
                        .map_or_else(|error| error.to_string(), |status| status.to_string());
                    return Err(died(instance, &status));
                }
            }
        }
    }
}

/// The error for a monitor that ended without a word.
#[must_use]
pub fn died(instance: &Instance, status: &str) -> Error {
    let said = console::tail(&instance.directory().join("monitor.log"), 20);
    Error::environment(
        format!(
            "the monitor of '{}' ended before it could report ({status})\n{said}",
            instance.name()
        ),
        "run it in the foreground to see more",
    )
}

fn monitor_log(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(directory.join("monitor.log"))
}

/// Takes the first line and its descriptors.
fn take_handover(stream: &UnixStream) -> io::Result<(Handover, VecDeque<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = VecDeque::new();
    let mut byte = [0];
    // A byte at a time: what follows the line belongs to the session.
    while line.last() != Some(&b'\n') {
        if control::receive(stream.as_fd(), &mut byte, &mut descriptors)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend(byte);
    }
    Ok((serde_json::from_slice(&line)?, descriptors))
}

/// Becomes the monitor of an instance, as [`launch`] asked for; returns with the program's exit code.
///
/// # Errors
/// As [`monitor::run`]; the one who launched has been told.
pub fn become_monitor(state: PathBuf, name: &str) -> Result<i32, Error> {
    // A session of its own: the terminal's signals and end are not for us.
    let _ = rustix::process::setsid();
    let failed = |error: io::Error| Error::io("take the instance over from the command")(error);
    let stream: OwnedFd =
        rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(|error| failed(error.into()))?;
    if let Ok(null) = File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    let stream = UnixStream::from(stream);
    let (handover, mut descriptors) = take_handover(&stream).map_err(failed)?;
    let lock = descriptors
        .pop_front()
        .ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let last_word = stream.try_clone().map_err(failed)?;
    let setting = monitor::Setting {
        session: Some(stream),
        held: handover.held.into_iter().zip(descriptors).collect(),
        line: handover.line,
        ..monitor::Setting::default()
    };
    let mut instance = StateDirectory::at(state).adopt(name, lock)?;
    let outcome = choice::choose(Some(&instance.configuration.engine))
        .and_then(|choice| monitor::run(&mut instance, &*choice.engine, setting, &mut Silent));
    let started = instance.state.started.is_some();
    let said = console::tail(&instance.console_path(), 20);
    if instance.configuration.remove || !started {
        instance.remove()?;
    }
    let failed = match &outcome {
        _ if started => None,
        Ok(ended) => Some(Refusal {
            message: ended.not_started(&said),
            help: None,
            input: ended.is_input(),
        }),
        Err(error) => Some(Refusal::from(error)),
    };
    if let Some(refusal) = failed {
        let (at, event) = (now_microseconds(), Event::Failed(refusal));
        // Whoever launched may have gone.
        let _ = last_word.set_nonblocking(true);
        let _ = control::send_line(&last_word, &Message::Event { at, event }, &[]);
    }
    outcome.map(|ended| ended.code)
}

/// Nobody looks on.
struct Silent;

impl monitor::Observer for Silent {
    fn started(&mut self, _: &Instance) {}
    fn listening(&mut self, _: &[Publish]) {}
    fn remark(&mut self, _: &str) {}
    fn stopping(&mut self) {}
}

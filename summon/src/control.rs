//! The summoner's control socket: what `kiln summon ps`, `start`, `stop`, `add`, `rm`, `reload`, `trace` and `down` speak.
//!
//! One request, a line of JSON, and one answer, another, per connection. Who may connect is decided by the permissions of
//! the summoner's folder (its owner alone).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kiln_monitor::Refusal;
use serde::{Deserialize, Serialize};

use crate::timeline::Timeline;
use crate::unit::Status;

/// Name of the socket in the summoner's folder.
pub const SOCKET: &str = "control";
/// Longest request or answer in bytes.
pub const MAX_LINE: u64 = 64 << 20;

/// What is asked of a summoner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// All units.
    Ps,
    /// Start units now.
    Start(Vec<String>),
    /// End units now.
    Stop(Vec<String>),
    /// One more unit, kept until it is removed.
    Add {
        /// As `--unit` takes it.
        unit: String,
        /// The directory that paths in it are relative to.
        directory: PathBuf,
    },
    /// Remove units that were added.
    Rm(Vec<String>),
    /// Read the configuration again.
    Reload,
    /// The last summonses of a unit, the latest last.
    Trace(String),
    /// End the summoner. `keep`: its units go on, for a later summoner.
    Down {
        /// Units go on.
        keep: bool,
    },
}

/// What a summoner answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Request::Ps`].
    Units {
        /// The units.
        units: Vec<Status>,
        /// Where the name server listens.
        listen: Vec<SocketAddr>,
    },
    /// To [`Request::Trace`].
    Timelines(Vec<Timeline>),
    /// It cannot be done.
    Refused(Refusal),
}

/// A path to the socket in `directory` that is short enough for `sun_path`, valid while the returned directory is open.
///
/// # Errors
/// Those of `open(2)`.
pub fn short_path(directory: &Path) -> io::Result<(std::fs::File, PathBuf)> {
    let directory = std::fs::File::open(directory)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()));
    Ok((directory, path))
}

/// Asks the summoner whose folder is `directory`. Blocks.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` when none is at work there.
pub fn ask(directory: &Path, request: &Request) -> io::Result<Answer> {
    let (_directory, path) = short_path(directory)?;
    let mut stream = UnixStream::connect(path)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&answer)?)
}

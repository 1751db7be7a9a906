//! The control socket: how later commands speak to a living monitor.
//!
//! A client sends one request as a line of JSON and gets one line back. Its connection then stays open until the monitor has
//! written its last word and goes: the end of the stream is the end of the instance.
//!
//! Who may connect is decided by the permissions of the instance's folder (its owner alone).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::state::Instance;

/// What a command asks of a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Deliver a signal (Linux's number) to the program.
    Signal(u8),
    /// End the instance at once.
    Kill,
    /// Nothing: the answer shows that the monitor is at work.
    Ping,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    error: Option<String>,
}

/// Longest request in bytes.
const MAX_REQUEST: usize = 4096;

/// The monitor's side.
pub struct Server {
    listener: UnixListener,
}

impl Server {
    /// Makes the control socket of an instance.
    ///
    /// # Errors
    /// Those of `bind(2)`.
    pub fn bind(instance: &Instance) -> io::Result<Self> {
        let (_directory, path) = instance.short_control_path()?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener })
    }

    /// The socket, for the event loop.
    #[must_use]
    pub fn socket(&self) -> &UnixListener {
        &self.listener
    }

    /// A client, if one waits.
    ///
    /// # Errors
    /// Those of `accept(2)`.
    pub fn accept(&self) -> io::Result<Option<Session>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(Session {
                    stream,
                    line: Vec::new(),
                }))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// One client of a monitor.
pub struct Session {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a client has sent so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// A request.
    Request(Request),
    /// Not a whole line yet.
    Nothing,
    /// Gone, or nothing that can be understood.
    Gone,
}

impl Session {
    /// The socket, for the event loop.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads what is there.
    pub fn hear(&mut self) -> Said {
        let mut buffer = [0; 512];
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                return match serde_json::from_slice(&line) {
                    Ok(request) => Said::Request(request),
                    Err(error) => {
                        self.answer(Some(format!("not a request: {error}")));
                        Said::Gone
                    }
                };
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Said::Gone,
                Ok(length) if self.line.len() + length <= MAX_REQUEST => {
                    self.line.extend(buffer.iter().take(length));
                }
                Ok(_) => return Said::Gone,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Said::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Said::Gone,
            }
        }
    }

    /// Answers a request. A client that does not read its answer does not get it.
    pub fn answer(&mut self, error: Option<String>) {
        if let Ok(mut line) = serde_json::to_vec(&Answer { error }) {
            line.push(b'\n');
            let _ = self.stream.write(&line);
        }
    }
}

/// A command's side.
pub struct Client {
    stream: BufReader<UnixStream>,
    name: String,
}

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

impl Client {
    /// Connects to the monitor of an instance.
    ///
    /// # Errors
    /// When no monitor lives there.
    pub fn connect(instance: &Instance) -> Result<Self, Error> {
        let name = instance.name().to_owned();
        let connect = || {
            let (_directory, path) = instance.short_control_path()?;
            UnixStream::connect(path)
        };
        let stream = connect().map_err(|source| Error::Io {
            action: format!("reach the monitor of '{name}'"),
            source,
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
            name,
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When the monitor refuses or does not answer. One that ends instead of answering has done what could be done.
    pub fn ask(&mut self, request: Request) -> Result<(), Error> {
        let failed = || Error::io(format!("speak to the monitor of '{}'", self.name));
        let mut line =
            serde_json::to_vec(&request).map_err(|error| Error::Protocol(error.to_string()))?;
        line.push(b'\n');
        match self.stream.get_mut().write_all(&line) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.map_err(failed())?,
        }
        self.stream
            .get_ref()
            .set_read_timeout(Some(PATIENCE))
            .map_err(failed())?;
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(failed()(error)),
        }
        let answer: Answer =
            serde_json::from_str(&line).map_err(|error| Error::Protocol(error.to_string()))?;
        match answer.error {
            None => Ok(()),
            Some(what) => Err(Error::environment(
                what,
                "look at 'kiln ps' and 'kiln logs'",
            )),
        }
    }

    /// Waits for the end of the instance, for at most `limit`. True when it has ended.
    ///
    /// # Errors
    /// Those of `read(2)`.
    pub fn wait_end(&mut self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        let mut buffer = [0; 64];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(true),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{Scratch, configuration};

    #[test]
    fn requests_arrive_and_the_end_is_seen_in_any_depth_of_directories() {
        let scratch = Scratch::new();
        let deep = crate::state::StateDirectory::at(scratch.0.path().join("x".repeat(200)));
        let instance = deep.create(&configuration("a")).unwrap();
        let server = Server::bind(&instance).unwrap();
        let monitor = std::thread::spawn(move || {
            let mut session = loop {
                if let Some(session) = server.accept().unwrap() {
                    break session;
                }
                std::thread::yield_now();
            };
            let mut heard = Vec::new();
            while heard.len() < 2 {
                match session.hear() {
                    Said::Request(request) => {
                        heard.push(request);
                        session.answer((heard.len() == 2).then(|| "no".to_owned()));
                    }
                    Said::Nothing => std::thread::yield_now(),
                    Said::Gone => break,
                }
            }
            heard
        });
        let mut client = Client::connect(&instance).unwrap();
        client.ask(Request::Signal(15)).unwrap();
        assert!(
            client
                .ask(Request::Kill)
                .unwrap_err()
                .to_string()
                .contains("no")
        );
        assert_eq!(
            monitor.join().unwrap(),
            [Request::Signal(15), Request::Kill]
        );
        assert!(client.wait_end(Duration::from_secs(5)).unwrap());
    }

    #[test]
    fn nonsense_is_answered_and_ended() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut session = Session {
            stream: ours,
            line: Vec::new(),
        };
        assert_eq!(session.hear(), Said::Nothing);
        theirs.write_all(b"{\"format\": \"disk\"}\n").unwrap();
        assert_eq!(session.hear(), Said::Gone);
        drop(session);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert!(text.contains("not a request"));
    }
}

//! The control socket: how later commands, and the summoner, speak to a living monitor.
//!
//! Both sides send lines of JSON: [`Request`]s to the monitor, [`Message`]s from it. Each request gets one answer, in order;
//! a client that watches ([`Request::Watch`]) also gets the instance's [`Event`]s, those that have been first. The connection
//! stays open until the monitor has written its last word and goes: the end of the stream is the end of the instance.
//!
//! Who may connect is decided by the permissions of the instance's folder (its owner alone).

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use kiln_abi::manifest::Protocol;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::arguments::Publish;
use crate::error::{Error, Refusal};
use crate::state::Instance;

/// What is asked of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Deliver a signal (Linux's number) to the program.
    Signal(u8),
    /// End the instance at once.
    Kill,
    /// Nothing: the answer shows that the monitor is at work.
    Ping,
    /// Tell of events from now on, after those that have been.
    Watch,
    /// How busy the instance is.
    Activity,
    /// Accept no connections for now: they wait in the host's queues. The answer says how busy the instance then is, and
    /// misses nothing that was accepted. Ends with [`Request::Continue`] or with this connection.
    Pause,
    /// Accept connections again.
    Continue,
    /// Stop all of the instance from using the processor until something comes for it: a connection, data on one that is
    /// open, a signal, or [`Request::Resume`]. The program's memory and connections stay. Refused while data is on its way.
    Suspend,
    /// Go on.
    Resume,
    /// Give duplicates of the sockets that were held for published ports: [`Message::Held`] with descriptors, before the answer.
    Held,
    /// A connection that was accepted elsewhere, for a port of the program. Its descriptor comes with the line's first byte.
    Connection {
        /// The program's TCP port.
        guest: u16,
        /// The client, if it is not the descriptor's own peer.
        peer: Option<SocketAddr>,
    },
}

/// What a monitor says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Message {
    /// The answer to a request.
    Answer {
        /// Why it was refused.
        error: Option<String>,
        /// To [`Request::Activity`] and [`Request::Pause`]: how busy the instance is.
        activity: Option<Activity>,
    },
    /// Sockets that are held for published ports. Their descriptors come with the line's first byte, in this order.
    Held {
        /// The ports' places in the configuration.
        ports: Vec<usize>,
    },
    /// Something has happened.
    Event {
        /// When, in microseconds since 1970.
        at: u64,
        /// What.
        event: Event,
    },
}

/// How busy an instance's network is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activity {
    /// Open connections with the world outside, also those that wait for the program.
    pub connections: u64,
    /// Bytes of payload that ever went in or out.
    pub bytes: u64,
}

/// What happens in an instance's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Event {
    /// The engine has started its process.
    Engine,
    /// The kernel has run its first instructions. Told after the fact, with [`Event::Started`].
    Kernel,
    /// The program is about to run its first instruction.
    Started {
        /// Published ports with the ports really bound.
        ports: Vec<Publish>,
    },
    /// The instance ended before its program began.
    Failed(Refusal),
    /// The program listens on (TCP) or has bound (UDP) a port beyond its own loopback.
    Listening {
        /// The program's port.
        port: u16,
        /// Transport.
        protocol: Protocol,
    },
    /// The program has written the line that was to be looked for.
    Line,
    /// The first byte has gone to a client.
    Answered,
    /// Nothing of it runs until something comes for it.
    Suspended,
    /// It runs again.
    Resumed,
    /// The instance has ended; its state is saved.
    Ended {
        /// The exit code.
        code: i32,
        /// What happened, if it was not the program that ended.
        reason: Option<String>,
    },
}

/// Longest request in bytes.
const MAX_REQUEST: usize = 4096;
/// Most unsent bytes for a client that does not read.
const MAX_UNSENT: usize = 1 << 20;

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
            Ok((stream, _)) => Session::new(stream).map(Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// One client of a monitor.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    line: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    unsent: Vec<u8>,
    /// It is told of events.
    pub watching: bool,
    /// It has asked to accept no connections.
    pub paused: bool,
}

/// What a client has sent so far.
#[derive(Debug)]
pub enum Said {
    /// A request.
    Request(Request),
    /// Not a whole line yet.
    Nothing,
    /// Gone, or nothing that can be understood.
    Gone,
}

impl Session {
    /// A client at the other end of a stream.
    ///
    /// # Errors
    /// Those of `fcntl(2)`.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            line: Vec::new(),
            descriptors: VecDeque::new(),
            unsent: Vec::new(),
            watching: false,
            paused: false,
        })
    }

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
                        self.answer(Some(format!("not a request: {error}")), None);
                        Said::Gone
                    }
                };
            }
            match receive(self.stream.as_fd(), &mut buffer, &mut self.descriptors) {
                Ok(0) => return Said::Gone,
                Ok(length) if self.line.len() + length <= MAX_REQUEST => {
                    self.line.extend(buffer.iter().take(length));
                }
                Ok(_) => return Said::Gone,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Said::Nothing,
                Err(_) => return Said::Gone,
            }
        }
    }

    /// The descriptor that came with the last request.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    /// Answers a request.
    pub fn answer(&mut self, error: Option<String>, activity: Option<Activity>) {
        self.say(&Message::Answer { error, activity });
    }

    /// Says something. A client that does not read for long is left.
    pub fn say(&mut self, message: &Message) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            self.unsent.append(&mut line);
        }
        self.flush();
        if self.unsent.len() > MAX_UNSENT {
            // Seen as its end by the event loop.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            self.unsent.clear();
        }
    }

    /// Says which sockets are held, and sends them. Refused when earlier words are still unsent.
    ///
    /// # Errors
    /// Those of `sendmsg(2)`.
    pub fn say_held(&mut self, ports: Vec<usize>, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.flush() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        send_line(&self.stream, &Message::Held { ports }, sockets)
    }

    /// Sends what can be sent. True when there is more.
    pub fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => self.unsent.clear(),
            }
        }
        false
    }
}

/// Reads bytes, and the descriptors that come with them.
pub(crate) fn receive(
    stream: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(received.bytes)
}

/// Most descriptors with one line (`SCM_MAX_FD` of unix(7)).
pub const MAX_DESCRIPTORS: usize = 253;

/// Sends a line of JSON with descriptors, which travel with its first byte. Blocks until it is sent.
///
/// # Errors
/// Those of `sendmsg(2)`; a line for more than [`MAX_DESCRIPTORS`] descriptors is refused.
pub fn send_line<T: Serialize>(
    stream: &UnixStream,
    value: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = rustix::net::sendmsg(
        stream,
        &[io::IoSlice::new(&line)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    (&mut &*stream).write_all(line.get(sent..).unwrap_or_default())
}

/// A command's side.
pub struct Client {
    stream: BufReader<UnixStream>,
    name: String,
}

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the monitor of an instance.
///
/// # Errors
/// When no monitor lives there.
pub fn connect(instance: &Instance) -> Result<UnixStream, Error> {
    let connect = || {
        let (_directory, path) = instance.short_control_path()?;
        UnixStream::connect(path)
    };
    connect().map_err(|source| Error::Io {
        action: format!("reach the monitor of '{}'", instance.name()),
        source,
    })
}

/// Gets the sockets that a monitor holds for published ports, with the ports' places in the configuration. Nothing else may
/// have been asked on the stream, or wait on it.
///
/// # Errors
/// When the monitor does not answer.
pub fn take_held(stream: &UnixStream) -> Result<Vec<(usize, OwnedFd)>, Error> {
    let failed = |error: io::Error| Error::io("get the held sockets from a monitor")(error);
    send_line(stream, &Request::Held, &[]).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let mut descriptors = VecDeque::new();
    let mut ports = Vec::new();
    loop {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            if receive(stream.as_fd(), &mut byte, &mut descriptors).map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            line.extend(byte);
        }
        match serde_json::from_slice(&line) {
            Ok(Message::Held { ports: told }) => ports = told,
            Ok(Message::Answer { error: None, .. }) => break,
            Ok(Message::Answer {
                error: Some(what), ..
            }) => return Err(Error::environment(what, "look at 'kiln ps'")),
            Ok(Message::Event { .. }) => {}
            Err(error) => return Err(Error::Protocol(error.to_string())),
        }
    }
    stream.set_read_timeout(None).map_err(failed)?;
    Ok(ports.into_iter().zip(descriptors).collect())
}

impl Client {
    /// Connects to the monitor of an instance.
    ///
    /// # Errors
    /// When no monitor lives there.
    pub fn connect(instance: &Instance) -> Result<Self, Error> {
        Ok(Self {
            stream: BufReader::new(connect(instance)?),
            name: instance.name().to_owned(),
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
        match serde_json::from_str(&line) {
            Ok(Message::Answer { error: None, .. }) => Ok(()),
            Ok(Message::Answer {
                error: Some(what), ..
            }) => Err(Error::environment(
                what,
                "look at 'kiln ps' and 'kiln logs'",
            )),
            Ok(Message::Event { .. } | Message::Held { .. }) => {
                Err(Error::Protocol("an event unasked for".to_owned()))
            }
            Err(error) => Err(Error::Protocol(error.to_string())),
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
                        session.answer((heard.len() == 2).then(|| "no".to_owned()), None);
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
        let mut session = Session::new(ours).unwrap();
        assert!(matches!(session.hear(), Said::Nothing));
        theirs.write_all(b"{\"format\": \"disk\"}\n").unwrap();
        assert!(matches!(session.hear(), Said::Gone));
        drop(session);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert!(text.contains("not a request"));
    }
}

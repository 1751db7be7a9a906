//! The host's side: readiness of many descriptors, and the few system calls that the gateway makes.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, sockopt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Who a descriptor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// The stream of frames.
    Frames,
    /// Where the stream of frames is to be accepted.
    FrameListener,
    /// The owner has a command.
    Bell,
    /// A published port, by its place.
    Published(u32),
    /// A spliced connection, by its place and a number that changes when the place is used again.
    Splice(u32, u16),
    /// A flow of datagrams, likewise.
    Flow(u32, u16),
}

impl Token {
    fn encode(self) -> u64 {
        let pack = |kind: u64, index: u32, generation: u16| {
            (kind << 48) | (u64::from(generation) << 32) | u64::from(index)
        };
        match self {
            Token::Frames => 0,
            Token::FrameListener => pack(1, 0, 0),
            Token::Bell => pack(2, 0, 0),
            Token::Published(index) => pack(3, index, 0),
            Token::Splice(index, generation) => pack(4, index, generation),
            Token::Flow(index, generation) => pack(5, index, generation),
        }
    }

    fn decode(value: u64) -> Option<Token> {
        let (index, generation) = (value as u32, (value >> 32) as u16);
        Some(match value >> 48 {
            0 => Token::Frames,
            1 => Token::FrameListener,
            2 => Token::Bell,
            3 => Token::Published(index),
            4 => Token::Splice(index, generation),
            5 => Token::Flow(index, generation),
            _ => return None,
        })
    }
}

/// What has become of a descriptor. Edge-triggered: it is told once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other end has closed, or there is an error: reading tells which.
    pub(crate) hung_up: bool,
    /// There is an error: the connection was reset, or timed out.
    pub(crate) failed: bool,
}

/// An epoll instance.
pub(crate) struct Poller {
    epoll: OwnedFd,
}

/// Room for what one wait tells. Not part of [`Poller`]: it must stay in its thread.
pub(crate) struct Events(Vec<epoll::Event>);

impl Events {
    pub(crate) fn new() -> Events {
        Events(Vec::with_capacity(1024))
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        Ok(Poller {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// Watches a descriptor, for everything, until it is closed.
    pub(crate) fn add(&self, descriptor: &impl AsFd, token: Token) -> io::Result<()> {
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.epoll,
            descriptor,
            epoll::EventData::new_u64(token.encode()),
            flags,
        )?)
    }

    /// Waits for changes, at most `timeout`, and puts them into `changes`.
    pub(crate) fn wait(
        &self,
        timeout: Option<Duration>,
        events: &mut Events,
        changes: &mut Vec<Change>,
    ) -> io::Result<()> {
        changes.clear();
        events.0.clear();
        let timeout = timeout.and_then(|timeout| rustix::event::Timespec::try_from(timeout).ok());
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events.0),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events.0 {
            let flags = event.flags;
            let hung_up = flags.intersects(
                epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR,
            );
            if let Some(token) = Token::decode(event.data.u64()) {
                changes.push(Change {
                    token,
                    readable: hung_up || flags.contains(epoll::EventFlags::IN),
                    writable: hung_up || flags.contains(epoll::EventFlags::OUT),
                    hung_up,
                    failed: flags.contains(epoll::EventFlags::ERR),
                });
            }
        }
        Ok(())
    }
}

/// Whether there is something to accept or read, or an error.
pub(crate) fn is_readable(descriptor: &impl AsFd) -> bool {
    let mut asked = [rustix::event::PollFd::new(
        descriptor,
        rustix::event::PollFlags::IN,
    )];
    // Who cannot be asked may have something.
    rustix::event::poll(&mut asked, Some(&rustix::event::Timespec::default()))
        .map_or(true, |count| count > 0)
}

/// Raises this process's limit on open files as far as it may be (`RLIMIT_NOFILE`, `setrlimit(2)`): each connection takes
/// a descriptor or two, each socket that waits for a client one. When the host refuses, the limit that there is holds: binding
/// says so, and accepting pauses there.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        );
    }
}

fn family(address: &SocketAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

/// Starts to connect; when it is done, the descriptor becomes writable.
pub(crate) fn start_connect(address: &SocketAddr) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        family(address),
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// A UDP socket for one flow.
pub(crate) fn connect_datagrams(address: &SocketAddr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family(address), SocketType::DGRAM, flags, None)?;
    rustix::net::connect(&socket, address)?;
    Ok(socket)
}

/// A "ping socket" (`icmp(7)`) for one flow; refused where `net.ipv4.ping_group_range` does not allow it.
pub(crate) fn connect_echo(address: &SocketAddr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let protocol: Protocol = if address.is_ipv4() {
        ipproto::ICMP
    } else {
        ipproto::ICMPV6
    };
    let socket =
        rustix::net::socket_with(family(address), SocketType::DGRAM, flags, Some(protocol))?;
    rustix::net::connect(&socket, &SocketAddr::new(address.ip(), 0))?;
    Ok(socket)
}

/// Whether the host's stack would keep a packet to the address on its loopback.
pub(crate) fn is_host_loopback(address: std::net::IpAddr) -> bool {
    match address.to_canonical() {
        std::net::IpAddr::V4(address) => address.is_loopback() || address == Ipv4Addr::UNSPECIFIED,
        std::net::IpAddr::V6(address) => address.is_loopback() || address == Ipv6Addr::UNSPECIFIED,
    }
}

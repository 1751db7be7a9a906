//! `--net socket`: the host's TCP/IP, by capability.
//!
//! Only the monitor creates, binds and connects sockets. Each accepted or connected one goes to the kernel as a descriptor
//! and is closed here: from then on no byte passes through the monitor. Published ports are bound before the program
//! begins, so clients wait in the host's backlog and are accepted once the program listens.
//!
//! What always holds: nothing here blocks, and nothing is accepted while the link is full; the host's backlog is the only
//! queue. The program's loopback is its own: connections to the host's are refused.
//!
//! Not here: what the kernel does with the descriptors, and packets (`kiln-network`).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_abi::link::ToKernel;
use kiln_abi::manifest::Protocol;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::arguments::{Publish, protocol_name};
use crate::error::Error;
use crate::link::Sender;

/// Connections that wait in the host's queue for one port: Linux's largest (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Connections accepted for one port before others have their turn.
const BATCH: usize = 256;
/// Most unanswered connects of one instance.
const MAX_CONNECTING: usize = 8192;
/// What a program that listens on IPv4 only is told of a client that came over IPv6: the IPv4 dummy address (RFC 7600).
const DUMMY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// What a wake-up is for, in the monitor's event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// A published TCP port has connections.
    Listener(usize),
    /// A connect has been decided.
    Connecting(u64),
}

/// What the event loop offers.
pub trait Interest {
    /// Wakes when there is something to accept.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)`.
    fn readable(&mut self, descriptor: BorrowedFd<'_>, token: Token) -> io::Result<()>;
    /// Wakes once when there is room to write or an error.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)`.
    fn writable(&mut self, descriptor: BorrowedFd<'_>, token: Token) -> io::Result<()>;
    /// Wakes no longer.
    fn forget(&mut self, descriptor: BorrowedFd<'_>);
}

struct Listener {
    publish: Publish,
    sockets: Vec<OwnedFd>,
    /// Somebody else holds them too and goes on with them later.
    held: bool,
    /// Watched for connections now.
    watched: bool,
}

/// A connection that was accepted elsewhere and waits for the program to listen.
struct Arrival {
    guest: u16,
    peer: SocketAddr,
    connection: OwnedFd,
}

struct Connecting {
    socket: OwnedFd,
    to: SocketAddr,
}

/// The sockets of one instance.
pub struct SocketServer {
    listeners: Vec<Listener>,
    listens: Vec<(SocketAddr, Protocol)>,
    connecting: HashMap<u64, Connecting>,
    arrivals: VecDeque<Arrival>,
    /// An epoll instance with all sockets that were handed to the kernel and are still open there.
    handed: OwnedFd,
}

fn unspecified_v6(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

fn unspecified_v4(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

/// A nonblocking socket.
fn open(address: &SocketAddr, protocol: Protocol) -> Result<OwnedFd, Errno> {
    let (kind, transport) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family(address), kind, flags, Some(transport))
}

/// A bound socket; TCP sockets listen.
fn bind(address: SocketAddr, protocol: Protocol, both_families: bool) -> Result<OwnedFd, Errno> {
    let socket = open(&address, protocol)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, !both_families)?;
    }
    if protocol == Protocol::Tcp {
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Accepted sockets inherit it. The kernel behind the link cannot set options, and small answers must not wait.
        sockopt::set_tcp_nodelay(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if protocol == Protocol::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

fn local_address(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    SocketAddr::try_from(rustix::net::getsockname(socket)?).map_err(|_| Errno::AFNOSUPPORT)
}

/// A socket that is to be held for a published port: bound, and listening if it is TCP.
///
/// # Errors
/// Names the port, and what to do.
pub fn bind_held(address: SocketAddr, protocol: Protocol, guest: u16) -> Result<OwnedFd, Error> {
    bind(address, protocol, false).map_err(|error| {
        let publish = Publish {
            address: Some(address.ip()),
            host: address.port(),
            guest,
            protocol,
        };
        cannot_publish(&publish, error.into())
    })
}

/// Binds one published port, on all addresses if it names none.
fn bind_published(publish: &Publish) -> Result<(Vec<OwnedFd>, u16), Errno> {
    let protocol = publish.protocol;
    let mut sockets = Vec::new();
    match (publish.address, protocol) {
        (Some(address), _) => sockets.push(bind(
            SocketAddr::new(address, publish.host),
            protocol,
            false,
        )?),
        (None, Protocol::Tcp) => match bind(unspecified_v6(publish.host), protocol, true) {
            Ok(socket) => sockets.push(socket),
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                sockets.push(bind(unspecified_v4(publish.host), protocol, false)?);
            }
            Err(error) => return Err(error),
        },
        // Datagram sockets of both families answer with addresses of their own family, as the program expects.
        (None, Protocol::Udp) => {
            let first = bind(unspecified_v4(publish.host), protocol, false)?;
            let port = local_address(&first)?.port();
            sockets.push(first);
            match bind(unspecified_v6(port), protocol, false) {
                Ok(socket) => sockets.push(socket),
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {}
                Err(error) => return Err(error),
            }
        }
    }
    let port = match sockets.first() {
        Some(socket) => local_address(socket)?.port(),
        None => publish.host,
    };
    Ok((sockets, port))
}

/// The error for a port that cannot be published.
#[must_use]
pub fn cannot_publish(publish: &Publish, error: io::Error) -> Error {
    let protocol = protocol_name(publish.protocol);
    let place = match publish.address {
        Some(address) => format!("{}/{protocol}", SocketAddr::new(address, publish.host)),
        None => format!("{}/{protocol} (on all addresses)", publish.host),
    };
    let flag = |port: u16| {
        let address = match publish.address {
            Some(IpAddr::V6(address)) => format!("[{address}]:"),
            Some(IpAddr::V4(address)) => format!("{address}:"),
            None => String::new(),
        };
        let suffix = if publish.protocol == Protocol::Udp {
            "/udp"
        } else {
            ""
        };
        format!("-p {address}{port}:{}{suffix}", publish.guest)
    };
    match Errno::from_io_error(&error) {
        Some(Errno::ADDRINUSE) => Error::environment(
            format!("port {place} is in use by another program"),
            format!(
                "stop that program, or publish another port, such as {}, or any free one with {}",
                flag(publish.host.checked_add(1).unwrap_or(8080)),
                flag(0)
            ),
        ),
        Some(Errno::ACCESS) => Error::environment(
            format!("you may not publish port {place}: ports below 1024 need privileges"),
            format!(
                "publish a higher port, such as {}",
                flag(publish.host.saturating_add(8000))
            ),
        ),
        Some(Errno::ADDRNOTAVAIL) => Error::environment(
            format!("port {place} cannot be published: this machine does not have that address"),
            "use an address that 'ip address' lists, or none for all",
        ),
        _ => Error::Io {
            action: format!("publish port {place}"),
            source: error,
        },
    }
}

impl SocketServer {
    /// Binds all published ports but those whose sockets are held already (`held`: place in `ports`, and socket). Host ports
    /// of 0 are replaced by the chosen ones in `ports`.
    ///
    /// # Errors
    /// Names the first port that cannot be had, and what to do.
    pub fn start(ports: &mut [Publish], held: Vec<(usize, OwnedFd)>) -> Result<Self, Error> {
        let mut held_sockets: HashMap<usize, Vec<OwnedFd>> = HashMap::new();
        for (place, socket) in held {
            held_sockets.entry(place).or_default().push(socket);
        }
        let mut listeners = Vec::with_capacity(ports.len());
        for (place, publish) in ports.iter_mut().enumerate() {
            let failed = |error: Errno| cannot_publish(publish, error.into());
            let held = held_sockets.remove(&place);
            let is_held = held.is_some();
            let (sockets, port) = match held {
                Some(sockets) => (sockets, publish.host),
                None => bind_published(publish).map_err(failed)?,
            };
            publish.host = port;
            listeners.push(Listener {
                publish: *publish,
                sockets,
                held: is_held,
                watched: false,
            });
        }
        Ok(Self {
            listeners,
            listens: Vec::new(),
            connecting: HashMap::new(),
            arrivals: VecDeque::new(),
            handed: epoll::create(epoll::CreateFlags::CLOEXEC)
                .map_err(Error::io("make the event loop"))?,
        })
    }

    /// Becomes readable when something comes for a socket that the program has: data, an end, an error. Ask
    /// [`SocketServer::forget_news`] first for what has been.
    #[must_use]
    pub fn news(&self) -> BorrowedFd<'_> {
        self.handed.as_fd()
    }

    /// Makes [`SocketServer::news`] tell only of what comes from now on.
    pub fn forget_news(&self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            events.clear();
            let filled = epoll::wait(
                &self.handed,
                rustix::buffer::spare_capacity(&mut events),
                Some(&none),
            );
            match filled {
                Ok(_) if events.len() == events.capacity() => {}
                Err(Errno::INTR) => {}
                _ => return,
            }
        }
    }

    /// Hands a socket to the kernel with the message that tells of it.
    fn hand_over(&self, message: &ToKernel, socket: OwnedFd, sender: &Sender) -> io::Result<()> {
        // Stays registered when our descriptor closes, for as long as the instance has its own (epoll(7), questions and
        // answers, 6), so that a suspended instance is woken by what comes for it.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        match epoll::add(&self.handed, &socket, EventData::new_u64(0), flags) {
            // A published datagram socket that the program had before, with the same number here.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        sender.control(message, Some(socket))
    }

    /// Takes a connection that was accepted elsewhere, for a port of the program. It waits until the program listens.
    ///
    /// # Errors
    /// `ConnectionRefused` when too many wait; those of the link.
    pub fn adopt(
        &mut self,
        guest: u16,
        peer: SocketAddr,
        connection: OwnedFd,
        sender: &Sender,
    ) -> io::Result<()> {
        if self.arrivals.len() >= MAX_CONNECTING {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        rustix::io::ioctl_fionbio(&connection, true)?;
        self.arrivals.push_back(Arrival {
            guest,
            peer,
            connection,
        });
        self.deliver_arrivals(sender)
    }

    /// The held sockets with the places of their ports.
    #[must_use]
    pub fn held(&self) -> Vec<(usize, BorrowedFd<'_>)> {
        self.listeners
            .iter()
            .enumerate()
            .filter(|(_, listener)| listener.held)
            .flat_map(|(place, listener)| {
                listener
                    .sockets
                    .iter()
                    .map(move |socket| (place, socket.as_fd()))
            })
            .collect()
    }

    /// How many adopted connections wait.
    #[must_use]
    pub fn arrivals(&self) -> usize {
        self.arrivals.len()
    }

    /// Hands over the adopted connections whose port the program listens on.
    ///
    /// # Errors
    /// Those of the link.
    pub fn deliver_arrivals(&mut self, sender: &Sender) -> io::Result<()> {
        for _ in 0..self.arrivals.len() {
            let Some(arrival) = self.arrivals.pop_front() else {
                break;
            };
            let publish = Publish {
                address: None,
                host: 0,
                guest: arrival.guest,
                protocol: Protocol::Tcp,
            };
            let peer = arrival.peer;
            match target(&self.listens, &publish, peer.ip().to_canonical()) {
                Some(local) => {
                    let peer = seen_by(local, peer);
                    let message = ToKernel::Accepted { local, peer };
                    self.hand_over(&message, arrival.connection, sender)?;
                }
                None => self.arrivals.push_back(arrival),
            }
        }
        Ok(())
    }

    /// The program listens on a TCP port, or has bound a UDP port. Returns the published ports that now lead to it.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)`.
    pub fn listen(
        &mut self,
        address: SocketAddr,
        protocol: Protocol,
        interest: &mut impl Interest,
    ) -> io::Result<Vec<Publish>> {
        self.listens.push((address, protocol));
        self.watch(interest)?;
        Ok(self
            .listeners
            .iter()
            .map(|listener| listener.publish)
            .filter(|publish| {
                publish.guest == address.port()
                    && publish.protocol == protocol
                    && !address.ip().to_canonical().is_loopback()
            })
            .collect())
    }

    /// The program has closed such a socket.
    pub fn unlisten(
        &mut self,
        address: SocketAddr,
        protocol: Protocol,
        interest: &mut impl Interest,
    ) {
        if let Some(position) = self
            .listens
            .iter()
            .position(|known| *known == (address, protocol))
        {
            self.listens.swap_remove(position);
        }
        for listener in &mut self.listeners {
            if listener.watched && target(&self.listens, &listener.publish, address.ip()).is_none()
            {
                listener.watched = false;
                for socket in &listener.sockets {
                    interest.forget(socket.as_fd());
                }
            }
        }
    }

    /// Watches every published TCP port that the program listens on. Called again when the link has room.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)`.
    pub fn watch(&mut self, interest: &mut impl Interest) -> io::Result<()> {
        for (number, listener) in self.listeners.iter_mut().enumerate() {
            let wanted = listener.publish.protocol == Protocol::Tcp
                && target(&self.listens, &listener.publish, IpAddr::V4(DUMMY)).is_some();
            if wanted && !listener.watched {
                for socket in &listener.sockets {
                    interest.readable(socket.as_fd(), Token::Listener(number))?;
                }
                listener.watched = true;
            }
        }
        Ok(())
    }

    /// Stops watching all ports: the link is full.
    pub fn pause(&mut self, interest: &mut impl Interest) {
        for listener in &mut self.listeners {
            if std::mem::take(&mut listener.watched) {
                for socket in &listener.sockets {
                    interest.forget(socket.as_fd());
                }
            }
        }
    }

    /// Accepts what waits on a published port and hands it over. False when it stopped because the link or this process is
    /// full: then pause until the link has room.
    ///
    /// # Errors
    /// Those of the link.
    pub fn accept(&mut self, number: usize, sender: &Sender) -> io::Result<bool> {
        let Some(listener) = self.listeners.get(number) else {
            return Ok(true);
        };
        for socket in &listener.sockets {
            for _ in 0..BATCH {
                if sender.pending() > 0 {
                    return Ok(false);
                }
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let (connection, peer) = match rustix::net::acceptfrom_with(socket, flags) {
                    Ok(accepted) => accepted,
                    Err(Errno::AGAIN) => break,
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        return Ok(false);
                    }
                    // The client is gone already, or accept(2) passes on an error of the new connection's network.
                    Err(_) => continue,
                };
                let peer = match peer.map(SocketAddr::try_from) {
                    Some(Ok(peer)) => peer,
                    _ => continue,
                };
                let Some(local) =
                    target(&self.listens, &listener.publish, peer.ip().to_canonical())
                else {
                    continue;
                };
                let peer = seen_by(local, peer);
                self.hand_over(&ToKernel::Accepted { local, peer }, connection, sender)?;
            }
        }
        Ok(true)
    }

    /// The program connects a stream.
    ///
    /// # Errors
    /// Those of the link and of `epoll_ctl(2)`; a failed connect is answered to the kernel.
    pub fn connect(
        &mut self,
        request: u64,
        to: SocketAddr,
        sender: &Sender,
        interest: &mut impl Interest,
    ) -> io::Result<()> {
        match self.begin(request, to) {
            Ok(()) => {}
            Err(error) => return refuse(request, error, sender),
        }
        if let Some(connecting) = self.connecting.get(&request) {
            interest.writable(connecting.socket.as_fd(), Token::Connecting(request))?;
        }
        Ok(())
    }

    fn begin(&mut self, request: u64, to: SocketAddr) -> Result<(), Errno> {
        allowed(to.ip())?;
        if self.connecting.len() >= MAX_CONNECTING {
            return Err(Errno::AGAIN);
        }
        if self.connecting.contains_key(&request) {
            return Err(Errno::ALREADY);
        }
        let socket = open(&to, Protocol::Tcp)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        self.connecting.insert(request, Connecting { socket, to });
        Ok(())
    }

    /// A connect has been decided: hands the connection over, or says why there is none.
    ///
    /// # Errors
    /// Those of the link.
    pub fn connected(
        &mut self,
        request: u64,
        sender: &Sender,
        interest: &mut impl Interest,
    ) -> io::Result<()> {
        let Some(Connecting { socket, to }) = self.connecting.remove(&request) else {
            return Ok(());
        };
        interest.forget(socket.as_fd());
        let outcome = match sockopt::socket_error(&socket) {
            Ok(Ok(())) => local_address(&socket),
            Ok(Err(error)) | Err(error) => Err(error),
        };
        match outcome {
            Ok(local) => {
                let result = Ok((local, to));
                self.hand_over(&ToKernel::Connected { request, result }, socket, sender)
            }
            Err(error) => refuse(request, error, sender),
        }
    }

    /// The program gave up an unanswered connect.
    pub fn cancel(&mut self, request: u64, interest: &mut impl Interest) {
        if let Some(connecting) = self.connecting.remove(&request) {
            interest.forget(connecting.socket.as_fd());
        }
    }

    /// The program wants a datagram socket bound to `wanted`; `both_families`: an IPv6 one that serves IPv4, too. Returns
    /// whether that is a published port, and it has it now.
    ///
    /// # Errors
    /// Those of the link; a socket that cannot be had is answered to the kernel.
    pub fn datagram(
        &mut self,
        request: u64,
        wanted: SocketAddr,
        both_families: bool,
        sender: &Sender,
    ) -> io::Result<bool> {
        match self.open_datagram(wanted, both_families) {
            Ok((socket, bound)) => {
                let result = Ok(bound);
                self.hand_over(&ToKernel::Datagram { request, result }, socket, sender)?;
                let published = |listener: &Listener| {
                    listener.publish.protocol == Protocol::Udp
                        && listener.publish.guest == wanted.port()
                };
                Ok(!wanted.ip().is_loopback() && self.listeners.iter().any(published))
            }
            Err(error) => {
                let result = Err(error.raw_os_error());
                sender.control(&ToKernel::Datagram { request, result }, None)?;
                Ok(false)
            }
        }
    }

    fn open_datagram(
        &mut self,
        wanted: SocketAddr,
        both_families: bool,
    ) -> Result<(OwnedFd, SocketAddr), Errno> {
        let published = self.listeners.iter_mut().find(|listener| {
            listener.publish.protocol == Protocol::Udp && listener.publish.guest == wanted.port()
        });
        if let (Some(listener), false) = (published, wanted.ip().is_loopback())
            && let Some(socket) = published_datagram(listener, &wanted, both_families)?
        {
            return Ok((socket, wanted));
        }
        // Not published: any port of the host will do, and the program sees the one it asked for.
        let any = match wanted {
            SocketAddr::V4(_) => unspecified_v4(0),
            SocketAddr::V6(_) => unspecified_v6(0),
        };
        let socket = bind(any, Protocol::Udp, true)?;
        let mut bound = wanted;
        if bound.port() == 0 {
            bound.set_port(local_address(&socket)?.port());
        }
        Ok((socket, bound))
    }
}

/// A descriptor for a published UDP port, of the family that the program asked for; none where clients of that family
/// cannot come.
fn published_datagram(
    listener: &mut Listener,
    wanted: &SocketAddr,
    both_families: bool,
) -> Result<Option<OwnedFd>, Errno> {
    if listener.held {
        // The kernel sees to the family that the program expects.
        let socket = listener.sockets.first().ok_or(Errno::ADDRNOTAVAIL)?;
        return rustix::io::fcntl_dupfd_cloexec(socket, 0).map(Some);
    }
    let is_of_family = |socket: &OwnedFd| {
        local_address(socket).is_ok_and(|local| family(&local) == family(wanted))
    };
    // A program with a socket for each family has IPv4's already, so IPv6's must stay its own.
    let replacement = match listener.publish.address {
        _ if !both_families => None,
        // A program's [::] serves both families: one socket takes the place of the two ...
        None if listener.sockets.len() == 2 => Some(unspecified_v6(listener.publish.host)),
        // ... or of the one for an IPv4 address, which such a socket knows by its mapped form.
        Some(IpAddr::V4(address)) if !listener.sockets.iter().any(is_of_family) => Some(
            SocketAddr::new(address.to_ipv6_mapped().into(), listener.publish.host),
        ),
        _ => None,
    };
    if let Some(address) = replacement.filter(|_| wanted.is_ipv6()) {
        listener.sockets.clear();
        let socket = bind(address, Protocol::Udp, true)?;
        listener.sockets.push(socket);
    }
    listener
        .sockets
        .iter()
        .find(|socket| is_of_family(socket))
        .map(|socket| rustix::io::fcntl_dupfd_cloexec(socket, 0))
        .transpose()
}

fn refuse(request: u64, error: Errno, sender: &Sender) -> io::Result<()> {
    let result = Err(error.raw_os_error());
    sender.control(&ToKernel::Connected { request, result }, None)
}

/// Whether programs may connect to an address of the host's network.
fn allowed(address: IpAddr) -> Result<(), Errno> {
    let address = address.to_canonical();
    if address.is_loopback() || address.is_unspecified() {
        // The program's own loopback is inside its kernel; nothing of the host's is meant to be reachable through it.
        return Err(Errno::CONNREFUSED);
    }
    Ok(())
}

/// Which of the program's listening sockets a client from `peer` gets: one of its own family if there is one.
/// Sockets on the program's loopback are not reachable from outside.
fn target(
    listens: &[(SocketAddr, Protocol)],
    publish: &Publish,
    peer: IpAddr,
) -> Option<SocketAddr> {
    let mut candidates = listens
        .iter()
        .filter(|(address, protocol)| {
            address.port() == publish.guest
                && *protocol == publish.protocol
                && !address.ip().to_canonical().is_loopback()
        })
        .map(|(address, _)| *address);
    let first = candidates.next()?;
    if first.is_ipv4() == peer.is_ipv4() {
        return Some(first);
    }
    Some(
        candidates
            .find(|address| address.is_ipv4() == peer.is_ipv4())
            .unwrap_or(first),
    )
}

/// The client's address as a socket of the family of `local` shows it.
fn seen_by(local: SocketAddr, peer: SocketAddr) -> SocketAddr {
    let canonical = peer.ip().to_canonical();
    let address = match (local, canonical) {
        (SocketAddr::V4(_), IpAddr::V4(_)) | (SocketAddr::V6(_), IpAddr::V6(_)) => canonical,
        (SocketAddr::V4(_), IpAddr::V6(_)) => IpAddr::V4(DUMMY),
        (SocketAddr::V6(_), IpAddr::V4(address)) => IpAddr::V6(address.to_ipv6_mapped()),
    };
    SocketAddr::new(address, peer.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::parse_publish;
    use kiln_abi::link::ToMonitor;
    use std::collections::HashSet;
    use std::io::{IoSliceMut, Read, Write};
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    #[derive(Default)]
    struct Watched(HashSet<i32>);

    impl Interest for Watched {
        fn readable(&mut self, descriptor: BorrowedFd<'_>, _: Token) -> io::Result<()> {
            self.0.insert(descriptor.as_raw_fd());
            Ok(())
        }
        fn writable(&mut self, descriptor: BorrowedFd<'_>, _: Token) -> io::Result<()> {
            self.0.insert(descriptor.as_raw_fd());
            Ok(())
        }
        fn forget(&mut self, descriptor: BorrowedFd<'_>) {
            self.0.remove(&descriptor.as_raw_fd());
        }
    }

    fn link() -> (Sender, OwnedFd) {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Sender::new(ours), theirs)
    }

    /// One message with its descriptor.
    fn receive(socket: &OwnedFd) -> Option<(ToKernel, Option<OwnedFd>)> {
        let mut header = [0; kiln_abi::link::HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let flags = rustix::net::RecvFlags::DONTWAIT | rustix::net::RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut ancillary,
            flags,
        )
        .ok()?;
        let descriptor = ancillary
            .drain()
            .filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
                _ => None,
            })
            .next();
        let (_, length) = kiln_abi::link::parse_header(header);
        let mut payload = vec![0; length as usize];
        let (_, got) =
            rustix::net::recv(socket, &mut payload, rustix::net::RecvFlags::WAITALL).unwrap();
        assert_eq!(got, payload.len());
        Some((postcard::from_bytes(&payload).unwrap(), descriptor))
    }

    fn published(text: &str) -> (SocketServer, Publish) {
        let mut ports = parse_publish(text).unwrap();
        let server = SocketServer::start(&mut ports, Vec::new()).unwrap();
        (server, ports[0])
    }

    #[test]
    fn clients_wait_until_the_program_listens_and_then_talk_to_it_directly() {
        let (mut server, port) = published("0:80");
        assert_ne!(port.host, 0);
        let (sender, kernel) = link();
        let mut interest = Watched::default();
        let mut v4 = TcpStream::connect(("127.0.0.1", port.host)).unwrap();
        let v6 = TcpStream::connect(("::1", port.host)).ok();
        assert!(interest.0.is_empty());
        let led = server
            .listen(unspecified_v4(80), Protocol::Tcp, &mut interest)
            .unwrap();
        assert_eq!(led, [port]);
        assert_eq!(interest.0.len(), 1);
        assert!(server.accept(0, &sender).unwrap());
        let (message, descriptor) = receive(&kernel).unwrap();
        let peer = v4.local_addr().unwrap();
        assert_eq!(
            message,
            ToKernel::Accepted {
                local: unspecified_v4(80),
                peer
            }
        );
        if let Some(v6) = &v6 {
            let (message, _) = receive(&kernel).unwrap();
            let peer = (DUMMY, v6.local_addr().unwrap().port()).into();
            assert_eq!(
                message,
                ToKernel::Accepted {
                    local: unspecified_v4(80),
                    peer
                }
            );
        }
        let program = TcpStream::from(descriptor.unwrap());
        program.set_nonblocking(false).unwrap();
        (&program).write_all(b"hello").unwrap();
        drop(program);
        let mut text = String::new();
        v4.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        server.unlisten(unspecified_v4(80), Protocol::Tcp, &mut interest);
        assert!(interest.0.is_empty());
    }

    #[test]
    fn a_listener_on_the_programs_loopback_is_not_reachable() {
        let (mut server, _) = published("0:80");
        let mut interest = Watched::default();
        let led = server
            .listen(
                (Ipv4Addr::LOCALHOST, 80).into(),
                Protocol::Tcp,
                &mut interest,
            )
            .unwrap();
        assert!(led.is_empty() && interest.0.is_empty());
    }

    #[test]
    fn each_family_gets_the_listener_of_its_own() {
        let listens = [
            (unspecified_v4(80), Protocol::Tcp),
            (unspecified_v6(80), Protocol::Tcp),
        ];
        let publish = parse_publish("1:80").unwrap()[0];
        assert_eq!(
            target(&listens, &publish, Ipv6Addr::LOCALHOST.into()),
            Some(unspecified_v6(80))
        );
        assert_eq!(
            target(&listens, &publish, Ipv4Addr::LOCALHOST.into()),
            Some(unspecified_v4(80))
        );
        assert_eq!(
            target(&listens[1..], &publish, DUMMY.into()),
            Some(unspecified_v6(80))
        );
        let mapped = seen_by(unspecified_v6(80), "10.0.0.1:5".parse().unwrap());
        assert_eq!(mapped, "[::ffff:10.0.0.1]:5".parse().unwrap());
        let canonical = seen_by(unspecified_v4(80), mapped);
        assert_eq!(canonical, "10.0.0.1:5".parse().unwrap());
    }

    #[test]
    fn a_port_in_use_is_named_with_a_remedy() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        for text in [format!("127.0.0.1:{port}:80"), format!("{port}:80")] {
            let error = SocketServer::start(&mut parse_publish(&text).unwrap(), Vec::new())
                .err()
                .expect("the port is in use");
            assert!(error.to_string().contains(&port.to_string()), "{error}");
            assert!(error.help().unwrap().contains("-p "));
            assert_eq!(error.kind(), crate::Kind::Environment);
        }
    }

    #[test]
    fn a_full_link_stops_accepting_and_loses_nobody() {
        let (mut server, port) = published("127.0.0.1:0:80");
        let (sender, kernel) = link();
        let mut interest = Watched::default();
        server
            .listen(unspecified_v4(80), Protocol::Tcp, &mut interest)
            .unwrap();
        let clients: Vec<_> = (0..600)
            .map(|_| TcpStream::connect(("127.0.0.1", port.host)).unwrap())
            .collect();
        let mut arrived = HashSet::new();
        let mut stopped = false;
        let end = Instant::now() + Duration::from_secs(20);
        while arrived.len() < clients.len() && Instant::now() < end {
            sender.flush().unwrap();
            stopped |= !server.accept(0, &sender).unwrap();
            if stopped {
                while let Some((ToKernel::Accepted { peer, .. }, Some(_))) = receive(&kernel) {
                    arrived.insert(peer);
                    sender.flush().unwrap();
                }
            }
        }
        assert!(stopped, "the link never filled up");
        assert_eq!(arrived.len(), clients.len());
    }

    #[test]
    fn the_hosts_loopback_is_refused_under_all_its_names() {
        let (mut server, _) = published("0:80");
        let (sender, kernel) = link();
        let mut interest = Watched::default();
        for (request, to) in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
            "0.0.0.0:1",
            "[::]:1",
        ]
        .into_iter()
        .enumerate()
        {
            server
                .connect(request as u64, to.parse().unwrap(), &sender, &mut interest)
                .unwrap();
            let (message, descriptor) = receive(&kernel).unwrap();
            let result = Err(Errno::CONNREFUSED.raw_os_error());
            assert_eq!(
                message,
                ToKernel::Connected {
                    request: request as u64,
                    result
                }
            );
            assert!(descriptor.is_none());
        }
    }

    #[test]
    fn datagrams_of_a_published_port_reach_the_program_in_both_families() {
        for (bind, publish) in [
            (unspecified_v4(53), "0:53/udp"),
            (unspecified_v6(53), "0:53/udp"),
            (unspecified_v4(53), "127.0.0.1:0:53/udp"),
            (unspecified_v6(53), "127.0.0.1:0:53/udp"),
        ] {
            let (mut server, port) = published(publish);
            let (sender, kernel) = link();
            server.datagram(7, bind, bind.is_ipv6(), &sender).unwrap();
            let (message, descriptor) = receive(&kernel).unwrap();
            assert_eq!(
                message,
                ToKernel::Datagram {
                    request: 7,
                    result: Ok(bind)
                }
            );
            let program = UdpSocket::from(descriptor.unwrap());
            program.set_nonblocking(false).unwrap();
            program
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.send_to(b"ping", ("127.0.0.1", port.host)).unwrap();
            let mut buffer = [0; 16];
            let (length, from) = program.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"ping");
            assert_eq!(from.is_ipv6(), bind.is_ipv6());
        }
    }

    #[test]
    fn a_program_with_a_datagram_socket_for_each_family_has_both() {
        for publish in ["0:53/udp", "127.0.0.1:0:53/udp"] {
            let (mut server, port) = published(publish);
            let (first, _) = server.open_datagram(unspecified_v4(53), false).unwrap();
            let (second, bound) = server.open_datagram(unspecified_v6(53), false).unwrap();
            assert_eq!(bound, unspecified_v6(53));
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.send_to(b"ping", ("127.0.0.1", port.host)).unwrap();
            let mut buffer = [0; 16];
            let first = UdpSocket::from(first);
            first.set_nonblocking(false).unwrap();
            first
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            assert_eq!(first.recv(&mut buffer).unwrap(), 4);
            let second = UdpSocket::from(second);
            if port.address.is_none()
                && let Ok(client) = UdpSocket::bind("[::1]:0")
            {
                client.send_to(b"pong!", ("::1", port.host)).unwrap();
                second.set_nonblocking(false).unwrap();
                second
                    .set_read_timeout(Some(Duration::from_secs(5)))
                    .unwrap();
                assert_eq!(second.recv(&mut buffer).unwrap(), 5);
            }
        }
    }

    #[test]
    fn an_unpublished_datagram_socket_takes_no_port_of_the_host() {
        let (mut server, _) = published("0:80");
        let (first, bound) = server.open_datagram(unspecified_v4(5353), false).unwrap();
        assert_eq!(bound, unspecified_v4(5353));
        assert_ne!(local_address(&first).unwrap().port(), 5353);
        let (_second, bound) = server.open_datagram(unspecified_v4(0), false).unwrap();
        assert_ne!(bound.port(), 0);
    }

    #[test]
    fn messages_to_the_monitor_keep_their_encoding() {
        let message = ToMonitor::Connect {
            request: 3,
            from: None,
            to: "10.0.0.1:80".parse().unwrap(),
        };
        let bytes = postcard::to_extend(&message, Vec::new()).unwrap();
        assert_eq!(crate::link::decode(&bytes).unwrap(), message);
    }
}

//! UDP sockets (`udp(7)`).
//!
//! Datagrams to the machine's own addresses go straight into the receiver's queue; others go through the backend's
//! [`Datagrams`], which is opened when the socket is bound to an address that others can reach, or first sends to one.

use alloc::{
    collections::VecDeque,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::net::{IpAddr, SocketAddr};

use linux_raw_sys::net as linux;

use crate::{
    Errno, Result,
    file::{Readiness, Sink, Source},
    sync::Mutex,
};

use super::{
    Shared,
    address::{AF_INET6, Address, loopback_like, unspecified},
    backend::Datagrams,
    local::{PortLease, Scope, Transport},
    option::LEVEL_UDP,
    socket::{Base, Caller, Incoming, Outgoing, Socket},
    tcp::check_family,
};

/// Longest payload of a datagram over IPv4, in bytes.
const MAX_PAYLOAD: usize = 65507;
/// No datagram is longer, over either family.
const MAX_DATAGRAM: usize = 65536;

struct Datagram {
    from: SocketAddr,
    to: IpAddr,
    bytes: Vec<u8>,
}

struct Bound {
    address: SocketAddr,
    scope: Scope,
    lease: PortLease,
}

#[derive(Default)]
struct State {
    bound: Option<Bound>,
    peer: Option<SocketAddr>,
    queue: VecDeque<Datagram>,
    /// Bytes in the queue, each datagram counted with some bookkeeping, as Linux does.
    queued: usize,
    external: Option<Arc<dyn Datagrams>>,
    read_closed: bool,
    write_closed: bool,
}

/// What a datagram takes of the receiver's buffer beside its bytes.
const OVERHEAD: usize = 256;

/// A UDP socket.
pub struct UdpSocket {
    this: Weak<UdpSocket>,
    base: Base,
    state: Mutex<State>,
    error: Mutex<Option<Errno>>,
}

impl UdpSocket {
    /// A new socket of `AF_INET` or `AF_INET6`.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, family: u16) -> Arc<UdpSocket> {
        Arc::new_cyclic(|this| UdpSocket {
            this: this.clone(),
            base: Base::new(shared, family, linux::SOCK_DGRAM, LEVEL_UDP),
            state: Mutex::new(State::default()),
            error: Mutex::new(None),
        })
    }

    /// How well this socket fits a datagram: the more the better; `None` not at all.
    pub fn score(&self, from: SocketAddr, to: SocketAddr) -> Option<u8> {
        let state = self.state.lock();
        let bound = state.bound.as_ref()?;
        let fit = bound.scope.fits(to.ip())?;
        match state.peer {
            Some(peer) if peer == from => Some(fit + 8),
            Some(_) => None,
            None => Some(fit),
        }
    }

    /// What it is bound to.
    pub fn scope(&self) -> Option<Scope> {
        self.state.lock().bound.as_ref().map(|bound| bound.scope)
    }

    fn bind_to(&self, address: SocketAddr) -> Result<SocketAddr> {
        let options = self.base.options.lock();
        let ip = address.ip();
        let dual = self.base.kind.family == AF_INET6
            && ip.is_ipv6()
            && ip.is_unspecified()
            && !options.v6_only;
        let scope = Scope { ip, dual };
        let lease =
            self.base
                .shared
                .tables
                .bind(Transport::Udp, scope, address.port(), &options)?;
        drop(options);
        let mut address = address;
        address.set_port(lease.port());
        self.base
            .shared
            .tables
            .add_datagram(lease.port(), self.this.clone());
        self.state.lock().bound = Some(Bound {
            address,
            scope,
            lease,
        });
        Ok(address)
    }

    fn ensure_bound(&self) -> Result<SocketAddr> {
        if let Some(bound) = &self.state.lock().bound {
            return Ok(bound.address);
        }
        self.bind_to(unspecified(self.base.kind.family))
    }

    /// The backend's socket, opened if need be.
    fn external(&self) -> Result<Arc<dyn Datagrams>> {
        if let Some(external) = &self.state.lock().external {
            return Ok(Arc::clone(external));
        }
        let backend = self
            .base
            .shared
            .backend
            .as_ref()
            .ok_or(Errno::ENETUNREACH)?;
        let address = self.ensure_bound()?;
        if address.ip().is_loopback() {
            return Err(Errno::EINVAL);
        }
        let dual = self
            .state
            .lock()
            .bound
            .as_ref()
            .is_some_and(|bound| bound.scope.dual);
        let external = backend.open_datagram(address, dual, &self.base.watch)?;
        self.state.lock().external = Some(Arc::clone(&external));
        Ok(external)
    }

    fn error_or<T>(&self, otherwise: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.error.lock().take() {
            Some(error) => Err(error),
            None => otherwise(),
        }
    }

    /// Where several sockets have a port, the backend's datagrams reach any of them: gives each to the socket that it is
    /// for, until there is one for this socket or no more.
    fn distribute(&self) {
        let state = self.state.lock();
        let (Some(bound), Some(external)) = (&state.bound, state.external.clone()) else {
            return;
        };
        let (port, scope) = (bound.lease.port(), bound.scope);
        if !state.queue.is_empty() {
            return;
        }
        drop(state);
        if !self.base.shared.tables.is_shared(port, scope) {
            return;
        }
        let mut buffer = alloc::vec![0; MAX_DATAGRAM];
        // An error stays with the socket that it was told to.
        while let Ok(received) = external.receive(&mut Sink::kernel(&mut buffer), false, None) {
            let to = SocketAddr::new(received.to, port);
            let tables = &self.base.shared.tables;
            let Some(socket) = tables.find_datagram(received.from, to) else {
                continue;
            };
            socket.deliver(Datagram {
                from: received.from,
                to: received.to,
                bytes: buffer.get(..received.count).unwrap_or_default().to_vec(),
            });
            if core::ptr::eq(Arc::as_ptr(&socket), self) {
                return;
            }
        }
    }

    /// Puts a datagram into the queue, or drops it if there is no room.
    fn deliver(&self, datagram: Datagram) {
        let limit = self.base.options.lock().receive_buffer as usize;
        let mut state = self.state.lock();
        if state.read_closed
            || state.queued + datagram.bytes.len() + OVERHEAD > limit.max(OVERHEAD * 2)
        {
            return;
        }
        state.queued += datagram.bytes.len() + OVERHEAD;
        state.queue.push_back(datagram);
        drop(state);
        self.base.watch.notify(Readiness::READABLE);
    }

    fn send_to(&self, source: &mut Source<'_>, to: Option<SocketAddr>) -> Result<usize> {
        let length = source.remaining();
        if length > MAX_PAYLOAD {
            return Err(Errno::EMSGSIZE);
        }
        if self.state.lock().write_closed {
            return Err(Errno::EPIPE);
        }
        let connected = self.state.lock().peer;
        let mut to = to.or(connected).ok_or(Errno::EDESTADDRREQ)?;
        if to.port() == 0 {
            return Err(Errno::EINVAL);
        }
        if to.ip().is_unspecified() {
            to.set_ip(loopback_like(to.ip()));
        }
        self.error_or(|| Ok(()))?;
        if !self.base.shared.is_own(to.ip()) {
            if let IpAddr::V4(ip) = to.ip()
                && ip.is_broadcast()
                && !self.base.options.lock().broadcast
            {
                return Err(Errno::EACCES);
            }
            return self.external()?.send(source, to);
        }
        let mut from = self.ensure_bound()?;
        if from.ip().is_unspecified() || from.is_ipv6() != to.is_ipv6() {
            from.set_ip(if to.ip().is_loopback() {
                loopback_like(to.ip())
            } else {
                to.ip()
            });
        }
        let bytes = source.take_vector(length)?;
        if bytes.len() < length {
            return Err(Errno::EFAULT);
        }
        match self.base.shared.tables.find_datagram(from, to) {
            Some(socket) => socket.deliver(Datagram {
                from,
                to: to.ip(),
                bytes,
            }),
            // What "port unreachable" tells, connected sockets alone (udp(7)).
            None if connected.is_some() => {
                *self.error.lock() = Some(Errno::ECONNREFUSED);
                self.base.watch.notify(Readiness::all());
            }
            None => {}
        }
        Ok(length)
    }

    fn end(&self) {
        let mut state = self.state.lock();
        let bound = state.bound.take();
        let external = state.external.take();
        state.queue.clear();
        state.read_closed = true;
        state.write_closed = true;
        drop(state);
        if let Some(bound) = bound {
            self.base
                .shared
                .tables
                .remove_datagram(bound.lease.port(), &self.this);
        }
        if let Some(external) = external {
            external.close();
        }
    }
}

impl Socket for UdpSocket {
    fn base(&self) -> &Base {
        &self.base
    }

    fn ready(&self) -> Readiness {
        let state = self.state.lock();
        let mut readiness = Readiness::WRITABLE;
        if !state.queue.is_empty() || state.read_closed {
            readiness |= Readiness::READABLE;
        }
        if state.read_closed {
            readiness |= Readiness::READ_HANGUP;
        }
        if state.read_closed && state.write_closed {
            readiness |= Readiness::HANGUP;
        }
        if let Some(external) = &state.external {
            let external = external.readiness();
            readiness |= external & (Readiness::READABLE | Readiness::ERROR);
            if !external.contains(Readiness::WRITABLE) {
                readiness -= Readiness::WRITABLE;
            }
        }
        if self.error.lock().is_some() {
            readiness |= Readiness::ERROR;
        }
        readiness
    }

    fn close(&self) {
        self.end();
    }

    fn bind(&self, _: &Caller, address: &Address) -> Result<()> {
        let address = check_family(
            self.base.kind.family,
            self.base.options.lock().v6_only,
            address,
        )?;
        if self.state.lock().bound.is_some() {
            return Err(Errno::EINVAL);
        }
        if !self.base.options.lock().free_bind && !self.base.shared.is_bindable(address.ip()) {
            return Err(Errno::EADDRNOTAVAIL);
        }
        self.bind_to(address)?;
        if !address.ip().is_loopback() && address.port() != 0 && self.base.shared.backend.is_some()
        {
            // Others may send to it from now on. If it cannot be opened, the port is still there for the machine itself,
            // but the program has to know.
            match self.external() {
                Ok(external) => external.announce(address),
                Err(error) => {
                    let bound = self.state.lock().bound.take();
                    if let Some(bound) = bound {
                        self.base
                            .shared
                            .tables
                            .remove_datagram(bound.lease.port(), &self.this);
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn connect(&self, _: &Caller, address: &Address) -> Result<()> {
        if matches!(address, Address::Unspecified) {
            let mut state = self.state.lock();
            state.peer = None;
            let external = state.external.clone();
            drop(state);
            if let Some(external) = external {
                external.connect(None);
            }
            return Ok(());
        }
        let mut to = check_family(
            self.base.kind.family,
            self.base.options.lock().v6_only,
            address,
        )?;
        if to.ip().is_unspecified() {
            to.set_ip(loopback_like(to.ip()));
        }
        let own = self.base.shared.is_own(to.ip());
        if !own {
            let backend = self
                .base
                .shared
                .backend
                .as_ref()
                .ok_or(Errno::ENETUNREACH)?;
            // The address that the program then sees as its own (getsockname(2) after connect(2)).
            let interface = backend.interface().ok_or(Errno::ENETUNREACH)?;
            if !interface
                .addresses
                .iter()
                .any(|(ip, _)| ip.is_ipv6() == to.is_ipv6())
            {
                return Err(Errno::ENETUNREACH);
            }
        }
        self.ensure_bound()?;
        if !own {
            self.external()?.connect(Some(to));
        }
        self.state.lock().peer = Some(to);
        Ok(())
    }

    fn local_address(&self) -> Result<Address> {
        let state = self.state.lock();
        let mut address = state
            .bound
            .as_ref()
            .map_or(unspecified(self.base.kind.family), |bound| bound.address);
        if let Some(peer) = state.peer
            && address.ip().is_unspecified()
            && let Some(ip) = self.base.shared.source_for(peer.ip())
        {
            address.set_ip(ip);
        }
        Ok(Address::Inet(address))
    }

    fn peer_address(&self) -> Result<Address> {
        self.state
            .lock()
            .peer
            .map(Address::Inet)
            .ok_or(Errno::ENOTCONN)
    }

    fn send(&self, _: &Caller, source: &mut Source<'_>, message: &mut Outgoing) -> Result<usize> {
        if !message.files.is_empty() {
            return Err(Errno::EINVAL);
        }
        let to = match &message.to {
            Some(address) => Some(check_family(
                self.base.kind.family,
                self.base.options.lock().v6_only,
                address,
            )?),
            None => None,
        };
        self.send_to(source, to)
    }

    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        self.error_or(|| Ok(()))?;
        self.distribute();
        let mut state = self.state.lock();
        let peer = state.peer;
        let taken;
        let datagram = if peek {
            state.queue.front()
        } else {
            taken = state.queue.pop_front();
            taken.as_ref()
        };
        if let Some(datagram) = datagram {
            let from = Address::Inet(datagram.from);
            let mut incoming = Incoming::message(sink, &datagram.bytes, Some(from))?;
            incoming.to = Some(datagram.to);
            if !peek {
                state.queued = state.queued.saturating_sub(incoming.full_length + OVERHEAD);
            }
            return Ok(incoming);
        }
        let external = state.external.clone();
        let closed = state.read_closed;
        drop(state);
        if let Some(external) = external {
            match external.receive(sink, peek, peer) {
                Ok(received) => return Ok(received.into()),
                Err(Errno::EAGAIN) if closed => {}
                Err(error) => return Err(error),
            }
        }
        if closed {
            Ok(Incoming::default())
        } else {
            Err(Errno::EAGAIN)
        }
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        let mut state = self.state.lock();
        if state.peer.is_none() {
            return Err(Errno::ENOTCONN);
        }
        state.read_closed |= read;
        state.write_closed |= write;
        drop(state);
        self.base.watch.notify(Readiness::all());
        Ok(())
    }

    fn take_error(&self) -> Option<Errno> {
        let own = self.error.lock().take();
        let external = self.state.lock().external.clone();
        own.or_else(|| external.and_then(|external| external.take_error()))
    }

    fn queued(&self) -> (usize, usize) {
        self.distribute();
        let state = self.state.lock();
        let next = state.queue.front().map(|datagram| datagram.bytes.len());
        let external = state.external.clone();
        drop(state);
        let waiting = || external.map_or(0, |external| external.waiting());
        (next.unwrap_or_else(waiting), 0)
    }
}

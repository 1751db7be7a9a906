//! Echo sockets: `SOCK_DGRAM` with `IPPROTO_ICMP` or `IPPROTO_ICMPV6`, which `ping(8)` uses without privileges (`icmp(7)`).
//!
//! A program sends an echo request from its type on and receives replies in the same form; the identifier is the
//! socket's. Requests to the machine's own addresses are answered here, others go through the backend.

use alloc::{collections::VecDeque, sync::Arc, vec::Vec};
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
    option::{PROTOCOL_ICMP, PROTOCOL_ICMPV6},
    socket::{Base, Caller, Incoming, Outgoing, Socket},
    tcp::check_family,
};

/// Longest message that is sent, in bytes.
const MAX_MESSAGE: usize = 65507;
/// Replies from the machine itself that wait at most.
const MAX_WAITING: usize = 256;
/// Bytes of an echo message's header.
const HEADER: usize = 8;

/// Types of requests and replies (RFC 792, RFC 4443).
const REQUEST: u8 = 8;
const REPLY: u8 = 0;
const REQUEST_V6: u8 = 128;
const REPLY_V6: u8 = 129;

#[derive(Default)]
struct State {
    identifier: u16,
    peer: Option<SocketAddr>,
    /// Replies of the machine itself.
    queue: VecDeque<(IpAddr, Vec<u8>)>,
    external: Option<Arc<dyn Datagrams>>,
}

/// An echo socket.
pub struct EchoSocket {
    base: Base,
    state: Mutex<State>,
}

impl EchoSocket {
    /// A new socket of `AF_INET` or `AF_INET6`.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, family: u16) -> Arc<EchoSocket> {
        let protocol = if family == AF_INET6 {
            PROTOCOL_ICMPV6
        } else {
            PROTOCOL_ICMP
        };
        let base = Base::new(shared, family, linux::SOCK_DGRAM, protocol);
        // Any identifier will do that no other socket has.
        let identifier = (base.number as u16).max(1);
        Arc::new(EchoSocket {
            base,
            state: Mutex::new(State {
                identifier,
                ..State::default()
            }),
        })
    }

    /// An address of the socket's own family: ICMP and ICMPv6 are different protocols.
    fn inet(&self, address: &Address) -> Result<SocketAddr> {
        let address = check_family(self.base.kind.family, true, address)?;
        if address.is_ipv6() == (self.base.kind.family == AF_INET6) {
            Ok(address)
        } else {
            Err(Errno::EAFNOSUPPORT)
        }
    }

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
        let external = backend.open_echo(unspecified(self.base.kind.family), &self.base.watch)?;
        self.state.lock().external = Some(Arc::clone(&external));
        Ok(external)
    }

    fn send_to(&self, source: &mut Source<'_>, to: Option<SocketAddr>) -> Result<usize> {
        let to = to.or(self.state.lock().peer).ok_or(Errno::EDESTADDRREQ)?;
        let length = source.remaining();
        if length > MAX_MESSAGE {
            return Err(Errno::EMSGSIZE);
        }
        let mut to = to;
        if to.ip().is_unspecified() {
            to.set_ip(loopback_like(to.ip()));
        }
        if !self.base.shared.is_own(to.ip()) {
            return self.external()?.send(source, to);
        }
        let mut message = source.take_vector(length)?;
        let (request, reply) = if to.is_ipv6() {
            (REQUEST_V6, REPLY_V6)
        } else {
            (REQUEST, REPLY)
        };
        if message.len() < HEADER || message.first() != Some(&request) {
            return Err(Errno::EINVAL);
        }
        let mut state = self.state.lock();
        message[0] = reply;
        message[4..6].copy_from_slice(&state.identifier.to_be_bytes());
        if state.queue.len() < MAX_WAITING {
            state.queue.push_back((to.ip(), message));
        }
        drop(state);
        self.base.watch.notify(Readiness::READABLE);
        Ok(length)
    }
}

impl Socket for EchoSocket {
    fn base(&self) -> &Base {
        &self.base
    }

    fn ready(&self) -> Readiness {
        let state = self.state.lock();
        let mut readiness = state
            .external
            .as_ref()
            .map_or(Readiness::WRITABLE, |external| external.readiness());
        if !state.queue.is_empty() {
            readiness |= Readiness::READABLE;
        }
        readiness
    }

    fn close(&self) {
        let external = self.state.lock().external.take();
        if let Some(external) = external {
            external.close();
        }
    }

    fn bind(&self, _: &Caller, address: &Address) -> Result<()> {
        let address = self.inet(address)?;
        if !self.base.shared.is_bindable(address.ip()) {
            return Err(Errno::EADDRNOTAVAIL);
        }
        if address.port() != 0 {
            self.state.lock().identifier = address.port();
        }
        Ok(())
    }

    fn connect(&self, _: &Caller, address: &Address) -> Result<()> {
        let peer = match address {
            Address::Unspecified => None,
            address => Some(self.inet(address)?),
        };
        self.state.lock().peer = peer;
        Ok(())
    }

    fn local_address(&self) -> Result<Address> {
        let mut address = unspecified(self.base.kind.family);
        let state = self.state.lock();
        address.set_port(state.identifier);
        if let Some(ip) = state
            .peer
            .and_then(|peer| self.base.shared.source_for(peer.ip()))
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
        let to = match &message.to {
            Some(address) => Some(self.inet(address)?),
            None => None,
        };
        self.send_to(source, to)
    }

    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        let mut state = self.state.lock();
        if let Some((from, message)) = state.queue.front() {
            let from = Address::Inet(SocketAddr::new(*from, 0));
            let incoming = Incoming::message(sink, message, Some(from))?;
            if !peek {
                state.queue.pop_front();
            }
            return Ok(incoming);
        }
        let external = state.external.clone().ok_or(Errno::EAGAIN)?;
        drop(state);
        external.receive(sink, peek, None).map(Incoming::from)
    }

    fn shutdown(&self, _: bool, _: bool) -> Result<()> {
        if self.state.lock().peer.is_some() {
            Ok(())
        } else {
            Err(Errno::ENOTCONN)
        }
    }

    fn take_error(&self) -> Option<Errno> {
        let external = self.state.lock().external.clone();
        external.and_then(|external| external.take_error())
    }
}

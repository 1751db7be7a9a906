//! Echo sockets: `SOCK_DGRAM` with `IPPROTO_ICMP` or `IPPROTO_ICMPV6`, which `ping(8)` uses without privileges (`icmp(7)`).
//!
//! A program sends an echo request from its type on and receives replies in the same form; the identifier is the
//! socket's. Requests to the machine's own addresses are answered here, others go through the backend.

use alloc::{collections::VecDeque, format, string::String, sync::Arc, vec::Vec};
use core::{
    any::Any,
    net::{IpAddr, SocketAddr},
};

use linux_raw_sys::net as linux;

use crate::{
    Errno, Result,
    file::{File, OpenFlags, Readiness, Sink, Source, WatchList},
    fs::Metadata,
    sync::Mutex,
    task::Thread,
};

use super::{
    Shared,
    address::{AF_INET6, Address, loopback_like, unspecified},
    backend::Datagrams,
    ioctl,
    option::{Options, PROTOCOL_ICMP, PROTOCOL_ICMPV6, SOL_SOCKET, SocketType},
    socket::{Caller, Incoming, Outgoing, Socket},
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
    shared: Arc<Shared>,
    kind: SocketType,
    number: u64,
    watch: Arc<WatchList>,
    options: Mutex<Options>,
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
        let number = shared.next_number();
        Arc::new(EchoSocket {
            shared: Arc::clone(shared),
            kind: SocketType {
                family,
                kind: linux::SOCK_DGRAM,
                protocol,
            },
            number,
            watch: Arc::new(WatchList::new()),
            options: Mutex::new(Options::default()),
            // Any identifier will do that no other socket has.
            state: Mutex::new(State {
                identifier: (number as u16).max(1),
                ..State::default()
            }),
        })
    }

    /// An address of the socket's own family: ICMP and ICMPv6 are different protocols.
    fn inet(&self, address: &Address) -> Result<SocketAddr> {
        let address = check_family(self.kind.family, true, address)?;
        if address.is_ipv6() == (self.kind.family == AF_INET6) {
            Ok(address)
        } else {
            Err(Errno::EAFNOSUPPORT)
        }
    }

    fn external(&self) -> Result<Arc<dyn Datagrams>> {
        if let Some(external) = &self.state.lock().external {
            return Ok(Arc::clone(external));
        }
        let backend = self.shared.backend.as_ref().ok_or(Errno::ENETUNREACH)?;
        let external = backend.open_echo(unspecified(self.kind.family), &self.watch)?;
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
        if !self.shared.is_own(to.ip()) {
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
        self.watch.notify(Readiness::READABLE);
        Ok(length)
    }
}

impl File for EchoSocket {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_socket(&self) -> Option<&dyn Socket> {
        Some(self)
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        self.receive(sink, false).map(|received| received.count)
    }

    fn write(&self, source: &mut Source<'_>, _: OpenFlags) -> Result<usize> {
        self.send_to(source, None)
    }

    fn readiness(&self) -> Readiness {
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

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.watch)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(super::metadata(self.number))
    }

    fn ioctl(&self, thread: &Thread, request: u32, argument: u64) -> Result<usize> {
        ioctl::ioctl(self, &self.shared, thread, request, argument)
    }

    fn describe(&self) -> String {
        format!("socket:[{}]", self.number)
    }

    fn on_close(&self) {
        let external = self.state.lock().external.take();
        if let Some(external) = external {
            external.close();
        }
    }
}

impl Socket for EchoSocket {
    fn socket_type(&self) -> SocketType {
        self.kind
    }

    fn options(&self) -> &Mutex<Options> {
        &self.options
    }

    fn bind(&self, _: &Caller, address: &Address) -> Result<()> {
        let address = self.inet(address)?;
        if !self.shared.is_bindable(address.ip()) {
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
        let mut address = unspecified(self.kind.family);
        let state = self.state.lock();
        address.set_port(state.identifier);
        if let Some(ip) = state
            .peer
            .and_then(|peer| self.shared.source_for(peer.ip()))
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
            let incoming = Incoming {
                count: sink.put(message)?,
                full_length: message.len(),
                from: Some(Address::Inet(SocketAddr::new(*from, 0))),
                ..Incoming::default()
            };
            if !peek {
                state.queue.pop_front();
            }
            return Ok(incoming);
        }
        let external = state.external.clone().ok_or(Errno::EAGAIN)?;
        drop(state);
        let received = external.receive(sink, peek, None)?;
        Ok(Incoming {
            count: received.count,
            full_length: received.full_length,
            from: Some(Address::Inet(received.from)),
            ..Incoming::default()
        })
    }

    fn shutdown(&self, _: bool, _: bool) -> Result<()> {
        if self.state.lock().peer.is_some() {
            Ok(())
        } else {
            Err(Errno::ENOTCONN)
        }
    }

    fn option(&self, level: i32, name: u32) -> Result<Vec<u8>> {
        match (level, name) {
            (SOL_SOCKET, linux::SO_ERROR) => {
                let external = self.state.lock().external.clone();
                let error = external.and_then(|external| external.take_error());
                Ok(error.map_or(0, Errno::number).to_ne_bytes().to_vec())
            }
            (SOL_SOCKET, linux::SO_ACCEPTCONN) => Ok(0i32.to_ne_bytes().to_vec()),
            _ => self.options.lock().get(self.kind, level, name),
        }
    }
}

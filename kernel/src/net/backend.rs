//! What lies beyond the machine's own addresses: one trait, so that sockets look the same to the program whatever
//! carries their bytes.

use alloc::{
    sync::{Arc, Weak},
    vec::Vec,
};
use core::net::{IpAddr, SocketAddr};

use kiln_abi::link::ToKernel;

use crate::{
    Result,
    file::{Readiness, Sink, Source, WatchList},
    link::HostDescriptor,
};

use super::{local::Scope, option::Options, tcp::TcpSocket};

/// A network interface, as `getifaddrs(3)` and `netdevice(7)` tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Index, from 1.
    pub index: u32,
    /// Name.
    pub name: &'static str,
    /// Ethernet address; `None` for the loopback.
    pub mac: Option<[u8; 6]>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Next hops of default routes.
    pub gateways: Vec<IpAddr>,
}

/// What a datagram's reception gives.
#[derive(Clone, Copy, Debug)]
pub struct DatagramReceived {
    /// Bytes stored.
    pub count: usize,
    /// Bytes of the datagram.
    pub full_length: usize,
    /// Who sent it.
    pub from: SocketAddr,
    /// The own address it was sent to.
    pub to: IpAddr,
}

/// A datagram socket of a backend.
pub trait Datagrams: Send + Sync {
    /// Takes one datagram; those of others than `only` are dropped.
    ///
    /// # Errors
    /// `EAGAIN` when there is none; errors that ICMP told; `EFAULT`.
    fn receive(
        &self,
        sink: &mut Sink<'_>,
        peek: bool,
        only: Option<SocketAddr>,
    ) -> Result<DatagramReceived>;

    /// Sends one datagram: all of `source`.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room; `EMSGSIZE`; `ENETUNREACH`; `EFAULT`.
    fn send(&self, source: &mut Source<'_>, to: SocketAddr) -> Result<usize>;

    /// What can be done now.
    fn readiness(&self) -> Readiness;

    /// Bytes of the next datagram that waits.
    fn waiting(&self) -> usize;

    /// From now on it is connected to this address, or to none. What comes from others may still be received, and is
    /// for the other sockets of the port.
    fn connect(&self, peer: Option<SocketAddr>) {
        let _ = peer;
    }

    /// Takes an error that ICMP told.
    fn take_error(&self) -> Option<crate::Errno> {
        None
    }

    /// The program has bound it to this address itself: others may be waiting to send to it.
    fn announce(&self, address: SocketAddr) {
        let _ = address;
    }

    /// Ends it. Called once, as the last call.
    fn close(&self);
}

/// A way to other machines.
///
/// Connections that come in are pushed to the [`super::local::Listener`] that fits.
pub trait Network: Send + Sync {
    /// Begins to accept connections.
    ///
    /// # Errors
    /// What the carrier says.
    fn listen(&self, scope: Scope, port: u16, backlog: usize) -> Result<()>;

    /// Ends accepting. Called once for each successful [`Network::listen`].
    fn unlisten(&self, scope: Scope, port: u16);

    /// Begins a connection for `socket`, whose `watch` is to hear of the stream's readiness. It ends with
    /// [`TcpSocket::complete`] or [`TcpSocket::fail`]. The result names the attempt for [`Network::cancel`].
    ///
    /// # Errors
    /// `ENETUNREACH` and the like.
    fn connect(
        &self,
        socket: &Weak<TcpSocket>,
        watch: &Arc<WatchList>,
        from: Option<SocketAddr>,
        to: SocketAddr,
        options: &Options,
    ) -> Result<u64>;

    /// Gives an attempt up.
    fn cancel(&self, attempt: u64);

    /// Opens a datagram socket on a local port, whose `watch` is to hear of its readiness.
    ///
    /// # Errors
    /// What the carrier says.
    fn open_datagram(
        &self,
        bind: SocketAddr,
        dual: bool,
        watch: &Arc<WatchList>,
    ) -> Result<Arc<dyn Datagrams>>;

    /// Opens an echo socket ([`super::echo`]) on an address of the wanted family.
    ///
    /// # Errors
    /// `EACCES` where there are none.
    fn open_echo(&self, bind: SocketAddr, watch: &Arc<WatchList>) -> Result<Arc<dyn Datagrams>> {
        let _ = (bind, watch);
        Err(crate::Errno::EACCES)
    }

    /// The interface to other machines, if there is one now.
    fn interface(&self) -> Option<Interface>;

    /// Whether an address is the machine's own.
    fn is_own(&self, ip: IpAddr) -> bool;

    /// Does what is due at `now` (monotonic nanoseconds); gives the next deadline.
    fn poll(&self, now: u64) -> Option<u64> {
        let _ = now;
        None
    }

    /// A message of the monitor.
    fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        let _ = (message, descriptor);
    }

    /// Name servers, if they have become known or have changed since the last call.
    fn changed_name_servers(&self) -> Option<Vec<IpAddr>> {
        None
    }
}

//! What all sockets offer to the system calls.

use alloc::{sync::Arc, vec::Vec};
use core::net::IpAddr;

use crate::{
    Errno, Result,
    file::{File, OpenFile, Sink, Source},
    sync::Mutex,
};

use super::{
    address::Address,
    option::{Options, SocketType},
};

/// Who makes a call, as far as sockets care.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// Process identifier.
    pub process: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// For Unix paths: the socket node that the path names (device and inode number).
    pub node: Option<(u64, u64)>,
    /// Whether the call must not wait: connecting then goes on in the background.
    pub non_blocking: bool,
}

/// What goes with the bytes of a message.
#[derive(Default)]
pub struct Outgoing {
    /// Where to; the connected peer if missing.
    pub to: Option<Address>,
    /// `SCM_RIGHTS`.
    pub files: Vec<Arc<OpenFile>>,
    /// `SCM_CREDENTIALS`: process, user, group.
    pub credentials: Option<(u32, u32, u32)>,
    /// `MSG_MORE`.
    pub more: bool,
    /// Local address from `IP_PKTINFO` or `IPV6_PKTINFO`.
    pub from: Option<IpAddr>,
}

/// What came with the bytes of a message.
#[derive(Default)]
pub struct Incoming {
    /// Bytes stored.
    pub count: usize,
    /// Bytes of the message before it was cut; equal to `count` for streams.
    pub full_length: usize,
    /// Who sent it, if that is told for this kind of socket.
    pub from: Option<Address>,
    /// `SCM_RIGHTS`.
    pub files: Vec<Arc<OpenFile>>,
    /// `SCM_CREDENTIALS`: process, user, group.
    pub credentials: Option<(u32, u32, u32)>,
    /// The local address that a datagram was sent to (`IP_PKTINFO`).
    pub to: Option<IpAddr>,
}

impl Incoming {
    /// Bytes of a stream.
    #[must_use]
    pub fn bytes(count: usize) -> Incoming {
        Incoming {
            count,
            full_length: count,
            ..Incoming::default()
        }
    }
}

/// A socket. No method blocks: what cannot be done now is `EAGAIN`.
pub trait Socket: File {
    /// Family, kind, protocol.
    fn socket_type(&self) -> SocketType;

    /// Its options.
    fn options(&self) -> &Mutex<Options>;

    /// `bind(2)`.
    ///
    /// # Errors
    /// As `bind(2)`.
    fn bind(&self, caller: &Caller, address: &Address) -> Result<()>;

    /// `listen(2)`.
    ///
    /// # Errors
    /// As `listen(2)`.
    fn listen(&self, caller: &Caller, backlog: i32) -> Result<()> {
        let _ = (caller, backlog);
        Err(Errno::EOPNOTSUPP)
    }

    /// `accept(2)`: the new socket and its peer.
    ///
    /// # Errors
    /// As `accept(2)`.
    fn accept(&self) -> Result<(Arc<dyn File>, Address)> {
        Err(Errno::EOPNOTSUPP)
    }

    /// `connect(2)`. `EINPROGRESS`: it goes on in the background; [`Socket::finish_connect`] tells how it ended.
    ///
    /// # Errors
    /// As `connect(2)`.
    fn connect(&self, caller: &Caller, address: &Address) -> Result<()>;

    /// How a connect in the background ended; `EAGAIN` while it has not.
    ///
    /// # Errors
    /// The connection's error, taken from the socket.
    fn finish_connect(&self) -> Result<()> {
        Ok(())
    }

    /// Own address.
    ///
    /// # Errors
    /// As `getsockname(2)`.
    fn local_address(&self) -> Result<Address>;

    /// The peer's address.
    ///
    /// # Errors
    /// `ENOTCONN`.
    fn peer_address(&self) -> Result<Address>;

    /// Sends.
    ///
    /// # Errors
    /// As `sendmsg(2)`.
    fn send(
        &self,
        caller: &Caller,
        source: &mut Source<'_>,
        message: &mut Outgoing,
    ) -> Result<usize>;

    /// Receives; with `peek` what is received stays.
    ///
    /// # Errors
    /// As `recvmsg(2)`.
    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming>;

    /// `shutdown(2)`.
    ///
    /// # Errors
    /// `ENOTCONN`.
    fn shutdown(&self, read: bool, write: bool) -> Result<()>;

    /// `setsockopt(2)`.
    ///
    /// # Errors
    /// As `setsockopt(2)`.
    fn set_option(&self, level: i32, name: u32, value: &[u8]) -> Result<()> {
        self.options()
            .lock()
            .set(self.socket_type(), level, name, value)
    }

    /// `getsockopt(2)`.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    fn option(&self, level: i32, name: u32) -> Result<Vec<u8>> {
        self.options().lock().get(self.socket_type(), level, name)
    }

    /// Whether it is a byte stream: a blocking send then goes on until all bytes are taken.
    fn is_stream(&self) -> bool {
        false
    }

    /// Bytes of buffered input and output (`SIOCINQ`, `SIOCOUTQ`).
    fn queued(&self) -> (usize, usize) {
        (0, 0)
    }
}

/// A connected byte stream, whatever carries it.
pub trait Stream: Send + Sync {
    /// Takes bytes out; 0 is the end.
    ///
    /// # Errors
    /// `EAGAIN` when there is nothing now; the connection's error, once; `EFAULT`.
    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<usize>;

    /// Puts bytes in; with `more` others follow soon.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room now; `EPIPE`; the connection's error, once; `EFAULT`.
    fn send(&self, source: &mut Source<'_>, more: bool) -> Result<usize>;

    /// What can be done now.
    fn readiness(&self) -> crate::file::Readiness;

    /// Shuts directions down.
    ///
    /// # Errors
    /// `ENOTCONN`.
    fn shutdown(&self, read: bool, write: bool) -> Result<()>;

    /// Ends it; with `abort` by a reset where the carrier has them. Called once, as the last call.
    fn close(&self, abort: bool);

    /// Takes the connection's error.
    fn take_error(&self) -> Option<Errno> {
        None
    }

    /// Bytes of buffered input and output, as far as they are known.
    fn queued(&self) -> (usize, usize) {
        (0, 0)
    }

    /// Options may have changed.
    fn configure(&self, options: &Options) {
        let _ = options;
    }
}

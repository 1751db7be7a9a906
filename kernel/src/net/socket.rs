//! What all sockets offer to the system calls.

use alloc::{format, string::String, sync::Arc, vec::Vec};
use core::{any::Any, net::IpAddr};

use linux_raw_sys::net as linux;

use crate::{
    Errno, Result,
    file::{File, OpenFile, OpenFlags, Readiness, Sink, Source, WatchList},
    fs::Metadata,
    sync::Mutex,
    task::Thread,
};

use super::{
    Shared,
    address::Address,
    backend::DatagramReceived,
    ioctl,
    option::{Options, SOL_SOCKET, SocketType},
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
    /// A message stored in `sink` as far as there is room.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn message(sink: &mut Sink<'_>, bytes: &[u8], from: Option<Address>) -> Result<Incoming> {
        Ok(Incoming {
            count: sink.put(bytes)?,
            full_length: bytes.len(),
            from,
            ..Incoming::default()
        })
    }

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

impl From<DatagramReceived> for Incoming {
    fn from(received: DatagramReceived) -> Incoming {
        Incoming {
            count: received.count,
            full_length: received.full_length,
            from: Some(Address::Inet(received.from)),
            to: Some(received.to),
            ..Incoming::default()
        }
    }
}

/// What every socket has.
pub struct Base {
    pub(super) shared: Arc<Shared>,
    /// Family, kind, protocol.
    pub kind: SocketType,
    /// The inode number.
    pub(super) number: u64,
    /// Who hears when something can be done.
    pub(super) watch: Arc<WatchList>,
    /// What `setsockopt(2)` changes.
    pub options: Mutex<Options>,
}

impl Base {
    /// Of a new socket.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, family: u16, kind: u32, protocol: i32) -> Base {
        let watch = Arc::new(WatchList::new());
        Base::with(shared, family, kind, protocol, watch, Options::default())
    }

    /// Of a socket whose watchers and options are there already.
    pub(super) fn with(
        shared: &Arc<Shared>,
        family: u16,
        kind: u32,
        protocol: i32,
        watch: Arc<WatchList>,
        options: Options,
    ) -> Base {
        Base {
            shared: Arc::clone(shared),
            kind: SocketType {
                family,
                kind,
                protocol,
            },
            number: shared.next_number(),
            watch,
            options: Mutex::new(options),
        }
    }
}

/// A socket, which is a file by that alone. No method blocks: what cannot be done now is `EAGAIN`.
pub trait Socket: File {
    /// What every socket has.
    fn base(&self) -> &Base;

    /// What can be done now without blocking ([`File::readiness`]).
    fn ready(&self) -> Readiness;

    /// `read(2)`.
    ///
    /// # Errors
    /// As `recv(2)`.
    fn take(&self, sink: &mut Sink<'_>) -> Result<usize> {
        self.receive(sink, false).map(|incoming| incoming.count)
    }

    /// `write(2)`.
    ///
    /// # Errors
    /// As `send(2)`.
    fn put(&self, source: &mut Source<'_>) -> Result<usize> {
        self.send(&Caller::default(), source, &mut Outgoing::default())
    }

    /// The last descriptor has been closed.
    fn close(&self) {}

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
        let base = self.base();
        base.options.lock().set(base.kind, level, name, value)
    }

    /// An option that only this kind of socket has.
    fn own_option(&self, level: i32, name: u32) -> Option<Vec<u8>> {
        let _ = (level, name);
        None
    }

    /// Takes the pending error (`SO_ERROR`).
    fn take_error(&self) -> Option<Errno> {
        None
    }

    /// Whether it waits for connections.
    fn is_listening(&self) -> bool {
        false
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

impl dyn Socket {
    /// `getsockopt(2)`.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn option(&self, level: i32, name: u32) -> Result<Vec<u8>> {
        let number = match (level, name) {
            (SOL_SOCKET, linux::SO_ERROR) => self.take_error().map_or(0, Errno::number),
            (SOL_SOCKET, linux::SO_ACCEPTCONN) => i32::from(self.is_listening()),
            _ => {
                let base = self.base();
                return match self.own_option(level, name) {
                    Some(value) => Ok(value),
                    None => base.options.lock().get(base.kind, level, name),
                };
            }
        };
        Ok(number.to_ne_bytes().to_vec())
    }
}

impl<T: Socket> File for T {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_socket(&self) -> Option<&dyn Socket> {
        Some(self)
    }

    #[inline]
    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        self.take(sink)
    }

    #[inline]
    fn write(&self, source: &mut Source<'_>, _: OpenFlags) -> Result<usize> {
        self.put(source)
    }

    #[inline]
    fn readiness(&self) -> Readiness {
        self.ready()
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.base().watch)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(super::metadata(self.base().number))
    }

    fn ioctl(&self, _: &Thread, request: u32, argument: u64) -> Result<usize> {
        ioctl::ioctl(self, request, argument)
    }

    fn describe(&self) -> String {
        format!("socket:[{}]", self.base().number)
    }

    fn on_close(&self) {
        self.close();
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

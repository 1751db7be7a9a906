//! Unix sockets (`unix(7)`): streams, datagrams and sequenced packets within the machine, with names in the file tree or
//! in the abstract name space, and with descriptors and credentials as ancillary data.
//!
//! A name in the file tree is known here by its node (device and inode number); making and finding the node is the work
//! of the system-call layer.

use alloc::{
    collections::VecDeque,
    format,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::sync::atomic::{AtomicU32, Ordering};

use linux_raw_sys::net as linux;
use spin::Once;

use crate::{
    Errno, Result,
    file::{File, OpenFile, Readiness, Sink, Source},
    hash::HashMap,
    memory::user::bytes_of,
    sync::Mutex,
};

use super::{
    Shared,
    address::{AF_UNIX, Address, UnixName},
    option::SOL_SOCKET,
    socket::{Base, Caller, Incoming, Outgoing, Socket},
    stream::{Rules, StreamEnd, pair},
    tcp::MAX_BACKLOG,
};

/// What goes along with bytes.
#[derive(Clone, Default)]
pub struct Ancillary {
    /// Sender's process, user and group.
    pub credentials: Option<(u32, u32, u32)>,
    /// Open files handed over.
    pub files: Vec<Arc<OpenFile>>,
}

/// Most descriptors in one message (`SCM_MAX_FD`).
pub const MAX_FILES: usize = 253;

/// Most datagrams that wait for one receiver (`net.unix.max_dgram_qlen` is 10 on old and 512 on new systems).
const MAX_DATAGRAMS: usize = 512;

/// Where a socket can be found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Node(u64, u64),
    Abstract(Vec<u8>),
}

/// All bound Unix sockets.
#[derive(Default)]
pub struct Names {
    sockets: Mutex<HashMap<Key, Weak<UnixSocket>>>,
    next_automatic: AtomicU32,
}

impl Names {
    fn add(&self, key: Key, socket: &Weak<UnixSocket>) -> Result<()> {
        let mut sockets = self.sockets.lock();
        match sockets.get(&key) {
            Some(other) if other.strong_count() > 0 => Err(Errno::EADDRINUSE),
            _ => {
                sockets.insert(key, socket.clone());
                Ok(())
            }
        }
    }

    fn remove(&self, key: &Key, socket: &Weak<UnixSocket>) {
        let mut sockets = self.sockets.lock();
        if sockets
            .get(key)
            .is_some_and(|other| Weak::ptr_eq(other, socket))
        {
            sockets.remove(key);
        }
    }

    fn find(&self, key: &Key) -> Option<Arc<UnixSocket>> {
        self.sockets.lock().get(key).and_then(Weak::upgrade)
    }
}

struct Message {
    bytes: Vec<u8>,
    from: UnixName,
    ancillary: Ancillary,
}

/// Messages that wait for a receiver.
#[derive(Default)]
struct Inbox {
    messages: VecDeque<Message>,
    bytes: usize,
    /// No more will come.
    ended: bool,
    /// The reader has shut down or gone.
    closed: bool,
    /// Sockets that found the inbox full.
    senders: Vec<Weak<UnixSocket>>,
}

enum State {
    Idle,
    Listening,
    Connected,
    Closed,
}

struct Backlog {
    ready: VecDeque<Arc<UnixSocket>>,
    limit: usize,
    /// Sockets that wait for a place.
    connectors: Vec<Weak<UnixSocket>>,
}

struct Bound {
    name: UnixName,
    key: Option<Key>,
}

/// A Unix socket.
pub struct UnixSocket {
    this: Weak<UnixSocket>,
    base: Base,
    state: Mutex<State>,
    bound: Mutex<Bound>,
    /// The stream of a connected `SOCK_STREAM` socket.
    stream: Once<StreamEnd>,
    /// Where datagrams and packets for this socket go.
    inbox: Mutex<Inbox>,
    /// The peer of a connected datagram or packet socket.
    peer: Mutex<Option<Weak<UnixSocket>>>,
    peer_name: Mutex<Option<UnixName>>,
    /// `SO_PEERCRED`.
    peer_credentials: Mutex<Option<(u32, u32, u32)>>,
    /// Who called `listen` or `socketpair`.
    owner: Mutex<(u32, u32, u32)>,
    backlog: Mutex<Backlog>,
    write_closed: Mutex<bool>,
    error: Mutex<Option<Errno>>,
}

fn credentials(caller: &Caller) -> (u32, u32, u32) {
    (caller.process, caller.uid, caller.gid)
}

impl UnixSocket {
    /// A new socket; `kind` is `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, kind: u32) -> Arc<UnixSocket> {
        Arc::new_cyclic(|this| UnixSocket {
            this: this.clone(),
            base: Base::new(shared, AF_UNIX, kind, 0),
            state: Mutex::new(State::Idle),
            bound: Mutex::new(Bound {
                name: UnixName::Unnamed,
                key: None,
            }),
            stream: Once::new(),
            inbox: Mutex::new(Inbox::default()),
            peer: Mutex::new(None),
            peer_name: Mutex::new(None),
            peer_credentials: Mutex::new(None),
            owner: Mutex::new((0, 0, 0)),
            backlog: Mutex::new(Backlog {
                ready: VecDeque::new(),
                limit: 0,
                connectors: Vec::new(),
            }),
            write_closed: Mutex::new(false),
            error: Mutex::new(None),
        })
    }

    /// Two sockets connected to each other (`socketpair(2)`).
    #[must_use]
    pub fn pair(
        shared: &Arc<Shared>,
        kind: u32,
        caller: &Caller,
    ) -> (Arc<UnixSocket>, Arc<UnixSocket>) {
        let (a, b) = (UnixSocket::new(shared, kind), UnixSocket::new(shared, kind));
        UnixSocket::join(&a, &b);
        for socket in [&a, &b] {
            *socket.peer_credentials.lock() = Some(credentials(caller));
        }
        (a, b)
    }

    fn join(a: &Arc<UnixSocket>, b: &Arc<UnixSocket>) {
        let mut ends = (None, None);
        if a.is_byte_stream() {
            let limit = a.base.options.lock().send_buffer as usize;
            let watch = [Arc::clone(&a.base.watch), Arc::clone(&b.base.watch)];
            let (first, second) = pair(Rules::Unix, watch, limit);
            ends = (Some(first), Some(second));
        }
        a.connect_to(b, ends.0);
        b.connect_to(a, ends.1);
    }

    /// One side of [`UnixSocket::join`].
    fn connect_to(&self, other: &Arc<UnixSocket>, end: Option<StreamEnd>) {
        if let Some(end) = end {
            self.stream.call_once(|| end);
        }
        *self.peer.lock() = Some(Arc::downgrade(other));
        *self.peer_name.lock() = Some(other.bound.lock().name.clone());
        *self.state.lock() = State::Connected;
    }

    fn is_byte_stream(&self) -> bool {
        self.base.kind.kind == linux::SOCK_STREAM
    }

    fn is_datagram(&self) -> bool {
        self.base.kind.kind == linux::SOCK_DGRAM
    }

    fn is_connected(&self) -> bool {
        matches!(*self.state.lock(), State::Connected)
    }

    /// The socket that an address names.
    fn find(&self, caller: &Caller, address: &Address) -> Result<Arc<UnixSocket>> {
        let key = match address {
            Address::Unix(UnixName::Abstract(name)) => Key::Abstract(name.clone()),
            Address::Unix(UnixName::Path(_)) => {
                let (device, inode) = caller.node.ok_or(Errno::ENOENT)?;
                Key::Node(device, inode)
            }
            Address::Unix(UnixName::Unnamed) => return Err(Errno::EINVAL),
            _ => return Err(Errno::EINVAL),
        };
        let found = self
            .base
            .shared
            .unix
            .find(&key)
            .ok_or(Errno::ECONNREFUSED)?;
        if found.base.kind.kind != self.base.kind.kind {
            return Err(Errno::EPROTOTYPE);
        }
        Ok(found)
    }

    /// Gives the socket a name of its own in the abstract name space.
    fn bind_automatically(&self) -> Result<()> {
        for _ in 0..=0xf_ffff_u32 {
            let number = self
                .base
                .shared
                .unix
                .next_automatic
                .fetch_add(1, Ordering::Relaxed)
                & 0xf_ffff;
            let name = format!("{number:05x}").into_bytes();
            let key = Key::Abstract(name.clone());
            if self.base.shared.unix.add(key.clone(), &self.this).is_ok() {
                *self.bound.lock() = Bound {
                    name: UnixName::Abstract(name),
                    key: Some(key),
                };
                return Ok(());
            }
        }
        Err(Errno::ENOSPC)
    }

    /// Puts a message into this socket's inbox.
    fn deliver(&self, sender: &Weak<UnixSocket>, message: Message, limit: usize) -> Result<()> {
        let mut inbox = self.inbox.lock();
        if inbox.closed {
            return Err(if self.is_datagram() {
                Errno::ECONNREFUSED
            } else {
                Errno::EPIPE
            });
        }
        let full =
            inbox.bytes + message.bytes.len() > limit || inbox.messages.len() >= MAX_DATAGRAMS;
        if full && !inbox.messages.is_empty() {
            if !inbox
                .senders
                .iter()
                .any(|other| Weak::ptr_eq(other, sender))
            {
                inbox.senders.push(sender.clone());
            }
            return Err(Errno::EAGAIN);
        }
        inbox.bytes += message.bytes.len();
        inbox.messages.push_back(message);
        drop(inbox);
        self.base.watch.notify(Readiness::READABLE);
        Ok(())
    }

    /// Whether a message for `peer` would meet a full inbox.
    fn is_inbox_full(&self) -> bool {
        let inbox = self.inbox.lock();
        inbox.messages.len() >= MAX_DATAGRAMS
            || inbox.bytes >= self.base.options.lock().receive_buffer as usize
    }

    fn send_message(
        &self,
        caller: &Caller,
        source: &mut Source<'_>,
        message: &mut Outgoing,
        ancillary: Ancillary,
    ) -> Result<usize> {
        let limit = self.base.options.lock().send_buffer as usize;
        let length = source.remaining();
        if length > limit {
            return Err(Errno::EMSGSIZE);
        }
        let target = match &message.to {
            Some(address) if self.is_datagram() => self.find(caller, address)?,
            Some(_) | None => {
                let peer = self.peer.lock().clone();
                match peer {
                    Some(peer) => peer.upgrade().ok_or(if self.is_datagram() {
                        Errno::ECONNREFUSED
                    } else {
                        Errno::EPIPE
                    })?,
                    None => return Err(Errno::ENOTCONN),
                }
            }
        };
        // Whether there is room is asked before the bytes are taken, so that a wait can take them again.
        if target.is_inbox_full() {
            let mut inbox = target.inbox.lock();
            if !inbox
                .senders
                .iter()
                .any(|other| Weak::ptr_eq(other, &self.this))
            {
                inbox.senders.push(self.this.clone());
            }
            return Err(Errno::EAGAIN);
        }
        let bytes = source.take_vector(length)?;
        if bytes.len() < length {
            return Err(Errno::EFAULT);
        }
        let from = self.bound.lock().name.clone();
        target.deliver(
            &self.this,
            Message {
                bytes,
                from,
                ancillary,
            },
            usize::MAX,
        )?;
        Ok(length)
    }

    fn receive_message(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        let mut inbox = self.inbox.lock();
        let Some(message) = inbox.messages.front() else {
            let ended = inbox.ended || inbox.closed;
            drop(inbox);
            if let Some(error) = self.error.lock().take() {
                return Err(error);
            }
            if ended {
                return Ok(Incoming::default());
            }
            if !self.is_datagram() && !self.is_connected() {
                return Err(Errno::ENOTCONN);
            }
            return Err(Errno::EAGAIN);
        };
        let from = (message.from != UnixName::Unnamed).then(|| Address::Unix(message.from.clone()));
        let mut incoming = Incoming::message(sink, &message.bytes, from)?;
        if peek {
            incoming.files = message.ancillary.files.clone();
            incoming.credentials = message.ancillary.credentials;
            return Ok(incoming);
        }
        let Some(message) = inbox.messages.pop_front() else {
            return Ok(incoming);
        };
        inbox.bytes -= message.bytes.len();
        incoming.files = message.ancillary.files;
        incoming.credentials = message.ancillary.credentials;
        let senders = core::mem::take(&mut inbox.senders);
        drop(inbox);
        for sender in senders.iter().filter_map(Weak::upgrade) {
            sender.base.watch.notify(Readiness::WRITABLE);
        }
        Ok(incoming)
    }

    fn end(&self) {
        let state = core::mem::replace(&mut *self.state.lock(), State::Closed);
        let bound = core::mem::replace(
            &mut *self.bound.lock(),
            Bound {
                name: UnixName::Unnamed,
                key: None,
            },
        );
        if let Some(key) = bound.key {
            self.base.shared.unix.remove(&key, &self.this);
        }
        if let Some(stream) = self.stream.get() {
            stream.close(false);
        }
        if let State::Listening = state {
            let mut backlog = self.backlog.lock();
            let ready = core::mem::take(&mut backlog.ready);
            let connectors = core::mem::take(&mut backlog.connectors);
            drop(backlog);
            for socket in ready {
                socket.end();
            }
            for connector in connectors.iter().filter_map(Weak::upgrade) {
                connector.base.watch.notify(Readiness::WRITABLE);
            }
        }
        let mut inbox = self.inbox.lock();
        inbox.closed = true;
        let unread = !inbox.messages.is_empty();
        let messages = core::mem::take(&mut inbox.messages);
        let senders = core::mem::take(&mut inbox.senders);
        drop(inbox);
        drop(messages);
        for sender in senders.iter().filter_map(Weak::upgrade) {
            sender.base.watch.notify(Readiness::WRITABLE);
        }
        let peer = self.peer.lock().take().and_then(|peer| peer.upgrade());
        if let Some(peer) = peer
            && !self.is_byte_stream()
        {
            let mutual = peer
                .peer
                .lock()
                .as_ref()
                .is_some_and(|back| Weak::ptr_eq(back, &self.this));
            if mutual && !self.is_datagram() {
                peer.inbox.lock().ended = true;
                if unread {
                    *peer.error.lock() = Some(Errno::ECONNRESET);
                }
                peer.base.watch.notify(Readiness::all());
            } else if mutual {
                peer.base.watch.notify(Readiness::WRITABLE);
            }
        }
        self.base.watch.notify(Readiness::HANGUP);
    }
}

impl Socket for UnixSocket {
    fn base(&self) -> &Base {
        &self.base
    }

    fn put(&self, source: &mut Source<'_>) -> Result<usize> {
        match self.stream.get() {
            Some(stream) => stream.send(source, None),
            None => self.send(&Caller::default(), source, &mut Outgoing::default()),
        }
    }

    fn ready(&self) -> Readiness {
        if let Some(stream) = self.stream.get() {
            return stream.readiness();
        }
        let mut readiness = Readiness::empty();
        match *self.state.lock() {
            State::Listening => {
                if !self.backlog.lock().ready.is_empty() {
                    readiness |= Readiness::READABLE;
                }
                return readiness;
            }
            State::Idle if !self.is_datagram() => return Readiness::WRITABLE | Readiness::HANGUP,
            State::Closed => return Readiness::HANGUP,
            State::Idle | State::Connected => {}
        }
        let inbox = self.inbox.lock();
        if !inbox.messages.is_empty() {
            readiness |= Readiness::READABLE;
        }
        if inbox.ended || inbox.closed {
            readiness |= Readiness::READABLE | Readiness::READ_HANGUP;
            if inbox.ended && !self.is_datagram() {
                readiness |= Readiness::HANGUP;
            }
        }
        drop(inbox);
        let peer = self.peer.lock().as_ref().and_then(Weak::upgrade);
        if !peer.is_some_and(|peer| peer.is_inbox_full()) {
            readiness |= Readiness::WRITABLE;
        }
        if self.error.lock().is_some() {
            readiness |= Readiness::ERROR;
        }
        readiness
    }

    fn close(&self) {
        self.end();
    }

    fn bind(&self, caller: &Caller, address: &Address) -> Result<()> {
        let Address::Unix(name) = address else {
            return Err(Errno::EINVAL);
        };
        if self.bound.lock().key.is_some() {
            return Err(Errno::EINVAL);
        }
        let key = match name {
            UnixName::Unnamed => return self.bind_automatically(),
            UnixName::Abstract(name) => Key::Abstract(name.clone()),
            UnixName::Path(_) => {
                let (device, inode) = caller.node.ok_or(Errno::ENOENT)?;
                Key::Node(device, inode)
            }
        };
        self.base.shared.unix.add(key.clone(), &self.this)?;
        *self.bound.lock() = Bound {
            name: name.clone(),
            key: Some(key),
        };
        Ok(())
    }

    fn listen(&self, caller: &Caller, backlog: i32) -> Result<()> {
        if self.is_datagram() {
            return Err(Errno::EOPNOTSUPP);
        }
        if self.bound.lock().key.is_none() {
            return Err(Errno::EINVAL);
        }
        let mut state = self.state.lock();
        match *state {
            State::Idle | State::Listening => *state = State::Listening,
            _ => return Err(Errno::EINVAL),
        }
        drop(state);
        *self.owner.lock() = credentials(caller);
        self.backlog.lock().limit = usize::try_from(backlog)
            .unwrap_or(MAX_BACKLOG)
            .min(MAX_BACKLOG);
        Ok(())
    }

    fn accept(&self) -> Result<(Arc<dyn File>, Address)> {
        if !matches!(*self.state.lock(), State::Listening) {
            return Err(if self.is_datagram() {
                Errno::EOPNOTSUPP
            } else {
                Errno::EINVAL
            });
        }
        let mut backlog = self.backlog.lock();
        let socket = backlog.ready.pop_front().ok_or(Errno::EAGAIN)?;
        let connectors = core::mem::take(&mut backlog.connectors);
        drop(backlog);
        for connector in connectors.iter().filter_map(Weak::upgrade) {
            connector.base.watch.notify(Readiness::WRITABLE);
        }
        let name = socket.peer_name.lock().clone().unwrap_or_default();
        Ok((socket, Address::Unix(name)))
    }

    fn connect(&self, caller: &Caller, address: &Address) -> Result<()> {
        if self.is_datagram() {
            if matches!(address, Address::Unspecified) {
                *self.peer.lock() = None;
                *self.peer_name.lock() = None;
                *self.state.lock() = State::Idle;
                return Ok(());
            }
            let target = self.find(caller, address)?;
            let name = target.bound.lock().name.clone();
            *self.peer.lock() = Some(Arc::downgrade(&target));
            *self.peer_name.lock() = Some(name);
            *self.state.lock() = State::Connected;
            return Ok(());
        }
        match *self.state.lock() {
            State::Idle => {}
            State::Connected => return Err(Errno::EISCONN),
            _ => return Err(Errno::EINVAL),
        }
        let listener = self.find(caller, address)?;
        if !matches!(*listener.state.lock(), State::Listening) {
            return Err(Errno::ECONNREFUSED);
        }
        {
            let mut backlog = listener.backlog.lock();
            if backlog.ready.len() > backlog.limit {
                if !backlog
                    .connectors
                    .iter()
                    .any(|other| Weak::ptr_eq(other, &self.this))
                {
                    backlog.connectors.push(self.this.clone());
                }
                return Err(Errno::EAGAIN);
            }
        }
        let this = self.this.upgrade().ok_or(Errno::EINVAL)?;
        let accepted = UnixSocket::new(&self.base.shared, self.base.kind.kind);
        *accepted.base.options.lock() = *listener.base.options.lock();
        accepted.bound.lock().name = listener.bound.lock().name.clone();
        UnixSocket::join(&this, &accepted);
        *self.peer_credentials.lock() = Some(*listener.owner.lock());
        *accepted.peer_credentials.lock() = Some(credentials(caller));
        listener.backlog.lock().ready.push_back(accepted);
        listener.base.watch.notify(Readiness::READABLE);
        self.base.watch.notify(Readiness::WRITABLE);
        Ok(())
    }

    fn local_address(&self) -> Result<Address> {
        Ok(Address::Unix(self.bound.lock().name.clone()))
    }

    fn peer_address(&self) -> Result<Address> {
        self.peer_name
            .lock()
            .clone()
            .map(Address::Unix)
            .ok_or(Errno::ENOTCONN)
    }

    fn send(
        &self,
        caller: &Caller,
        source: &mut Source<'_>,
        message: &mut Outgoing,
    ) -> Result<usize> {
        let ancillary = Ancillary {
            credentials: message.credentials.or(Some(credentials(caller))),
            files: message.files.clone(),
        };
        if let Some(error) = self.error.lock().take() {
            return Err(error);
        }
        if self.is_byte_stream() {
            if message.to.is_some() {
                return Err(if self.is_connected() {
                    Errno::EISCONN
                } else {
                    Errno::EOPNOTSUPP
                });
            }
            let stream = self.stream.get().ok_or(Errno::ENOTCONN)?;
            // Credentials that nobody asked for need no attachment: it would cut reads short.
            let wanted = message.credentials.is_some()
                || self.base.options.lock().pass_credentials
                || self
                    .peer
                    .lock()
                    .as_ref()
                    .and_then(Weak::upgrade)
                    .is_some_and(|p| p.base.options.lock().pass_credentials);
            let attach = wanted || !ancillary.files.is_empty();
            return stream.send(source, attach.then_some(ancillary));
        }
        if *self.write_closed.lock() {
            return Err(Errno::EPIPE);
        }
        self.send_message(caller, source, message, ancillary)
    }

    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        if !self.is_byte_stream() {
            return self.receive_message(sink, peek);
        }
        let Some(stream) = self.stream.get() else {
            return Err(match *self.state.lock() {
                State::Listening | State::Idle => Errno::EINVAL,
                _ => Errno::ENOTCONN,
            });
        };
        let received = stream.receive(sink, peek)?;
        let mut incoming = Incoming::bytes(received.count);
        if let Some(ancillary) = received.ancillary {
            incoming.files = ancillary.files;
            incoming.credentials = ancillary.credentials;
        }
        Ok(incoming)
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        if let Some(stream) = self.stream.get() {
            stream.shutdown(read, write);
            return Ok(());
        }
        if !self.is_connected() {
            return Err(Errno::ENOTCONN);
        }
        let peer = self.peer.lock().as_ref().and_then(Weak::upgrade);
        if read {
            self.inbox.lock().closed = true;
        }
        if write {
            *self.write_closed.lock() = true;
            if let Some(peer) = peer
                && !self.is_datagram()
            {
                peer.inbox.lock().ended = true;
                peer.base
                    .watch
                    .notify(Readiness::READABLE | Readiness::READ_HANGUP);
            }
        }
        self.base.watch.notify(Readiness::all());
        Ok(())
    }

    fn take_error(&self) -> Option<Errno> {
        let own = self.error.lock().take();
        own.or_else(|| self.stream.get().and_then(StreamEnd::take_error))
    }

    fn is_listening(&self) -> bool {
        matches!(*self.state.lock(), State::Listening)
    }

    fn own_option(&self, level: i32, name: u32) -> Option<Vec<u8>> {
        match (level, name) {
            (SOL_SOCKET, linux::SO_PEERCRED) => {
                // Without a peer Linux tells process 0 and the overflow values -1.
                let (pid, uid, gid) =
                    self.peer_credentials
                        .lock()
                        .unwrap_or((0, u32::MAX, u32::MAX));
                Some(bytes_of(&linux::ucred { pid, uid, gid }).to_vec())
            }
            _ => None,
        }
    }

    fn set_option(&self, level: i32, name: u32, value: &[u8]) -> Result<()> {
        let mut options = self.base.options.lock();
        options.set(self.base.kind, level, name, value)?;
        if options.buffers_set
            && let Some(stream) = self.stream.get()
        {
            stream.set_buffer(true, options.send_buffer as usize);
        }
        Ok(())
    }

    fn is_stream(&self) -> bool {
        self.is_byte_stream()
    }

    fn queued(&self) -> (usize, usize) {
        match self.stream.get() {
            Some(stream) => (stream.available(), stream.unread()),
            None => (
                self.inbox
                    .lock()
                    .messages
                    .front()
                    .map_or(0, |message| message.bytes.len()),
                0,
            ),
        }
    }
}

//! What sockets of all kinds have in common: names, readiness, events, errors, and the table that holds them.

use alloc::vec::Vec;
use core::fmt;

/// Name of one socket of one stack. Never used twice (but after 2^32 sockets in one place).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId {
    index: u32,
    generation: u32,
}

impl SocketId {
    /// A small number that no other open socket of the stack has: an index into an owner's own table.
    #[must_use]
    pub fn index(self) -> usize {
        self.index as usize
    }
}

bitflags::bitflags! {
    /// What can be done with a socket without waiting, or has happened to it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Readiness: u8 {
        /// Data to receive; on a listener, a connection to accept.
        const READABLE = 1;
        /// Room to send: at least a third of the buffer.
        const WRITABLE = 1 << 1;
        /// The other end will send no more (its FIN came). Data before it may still wait.
        const READ_CLOSED = 1 << 2;
        /// This end can send no more: shut down, reset or never connected.
        const WRITE_CLOSED = 1 << 3;
        /// The connection is established, or was.
        const CONNECTED = 1 << 4;
        /// An error waits to be taken.
        const ERROR = 1 << 5;
    }
}

/// Something that the owner may want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The socket's readiness grew, or more arrived of what was there already (so that edge-triggered waiting works).
    /// The flags that hold now are those of [`crate::Stack::readiness`].
    Ready(SocketId),
    /// With [`crate::Configuration::intercept`]: a connection is asked for with an address that is not the stack's.
    /// It waits for [`crate::Stack::tcp_admit`] or [`crate::Stack::tcp_abort`].
    Intercepted(SocketId),
    /// Addresses, routes or name servers have changed by DHCP or a router advertisement.
    Configured,
}

/// Which directions of a connection are to be shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// No more receiving.
    Read,
    /// No more sending.
    Write,
    /// Neither.
    Both,
}

/// Why a socket call did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It would have to wait (EAGAIN).
    WouldBlock,
    /// The socket's state or kind does not allow it (EINVAL).
    Invalid,
    /// There is no such socket (EBADF).
    NoSuchSocket,
    /// The socket is not connected (ENOTCONN).
    NotConnected,
    /// The socket is connected, or being connected, already (EISCONN).
    AlreadyConnected,
    /// The address or port is taken (EADDRINUSE).
    AddressInUse,
    /// The address is not one of this stack (EADDRNOTAVAIL); also when no port is free.
    AddressNotAvailable,
    /// There is no route to the destination (ENETUNREACH).
    NetworkUnreachable,
    /// The destination does not answer on the link, or a router says so (EHOSTUNREACH).
    HostUnreachable,
    /// The other end refused (ECONNREFUSED).
    ConnectionRefused,
    /// The other end reset the connection (ECONNRESET).
    ConnectionReset,
    /// The other end fell silent (ETIMEDOUT).
    TimedOut,
    /// This end has shut down sending (EPIPE).
    BrokenPipe,
    /// The datagram is longer than can be sent (EMSGSIZE).
    MessageTooLong,
    /// The datagram has no destination (EDESTADDRREQ).
    DestinationRequired,
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Error::WouldBlock => "it would have to wait",
            Error::Invalid => "the socket's state does not allow it",
            Error::NoSuchSocket => "there is no such socket",
            Error::NotConnected => "the socket is not connected",
            Error::AlreadyConnected => "the socket is connected already",
            Error::AddressInUse => "the address is in use",
            Error::AddressNotAvailable => "the address is not available",
            Error::NetworkUnreachable => "no route leads to the network",
            Error::HostUnreachable => "the host does not answer",
            Error::ConnectionRefused => "the other end refused the connection",
            Error::ConnectionReset => "the other end reset the connection",
            Error::TimedOut => "the other end fell silent",
            Error::BrokenPipe => "this end has shut down sending",
            Error::MessageTooLong => "the datagram is too long",
            Error::DestinationRequired => "the datagram has no destination",
        })
    }
}

impl core::error::Error for Error {}

/// Sockets by name.
pub(crate) struct Table<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Table<T> {
    pub(crate) fn insert(&mut self, value: T) -> SocketId {
        if let Some(index) = self.free.pop()
            && let Some(entry) = self.entries.get_mut(index as usize)
        {
            entry.value = Some(value);
            return SocketId {
                index,
                generation: entry.generation,
            };
        }
        let index = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.entries.push(Entry {
            generation: 0,
            value: Some(value),
        });
        SocketId {
            index,
            generation: 0,
        }
    }

    pub(crate) fn get(&self, id: SocketId) -> Option<&T> {
        self.entries
            .get(id.index as usize)
            .filter(|entry| entry.generation == id.generation)?
            .value
            .as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: SocketId) -> Option<&mut T> {
        self.entries
            .get_mut(id.index as usize)
            .filter(|entry| entry.generation == id.generation)?
            .value
            .as_mut()
    }

    pub(crate) fn remove(&mut self, id: SocketId) -> Option<T> {
        let entry = self
            .entries
            .get_mut(id.index as usize)
            .filter(|entry| entry.generation == id.generation)?;
        let value = entry.value.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(id.index);
        Some(value)
    }

    /// All sockets.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().filter_map(|entry| entry.value.as_ref())
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

/// Events that wait to be taken, each socket at most once.
#[derive(Default)]
pub(crate) struct Events {
    queue: alloc::collections::VecDeque<Event>,
}

impl Events {
    pub(crate) fn push(&mut self, event: Event) {
        self.queue.push_back(event);
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        self.queue.pop_front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

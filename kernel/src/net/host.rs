//! `--net socket`: the host's TCP/IP, by capability.
//!
//! The monitor makes and connects sockets and hands them over the link; reading and writing then is one call of the host
//! interface, straight between the program's memory and the host's socket.
//!
//! What is ready is remembered in *hints*, so that `epoll_wait` needs no call of the host:
//!
//! * an edge-triggered event of the host carries what is true when it is collected, and sets the hints;
//! * `EAGAIN` clears a hint; so does a read that gives less than was asked for (what comes later makes a new edge), unless
//!   the end or an error is known;
//! * after a read that gave all it was asked for nothing is known: the next question about readiness looks (one
//!   `MSG_PEEK`).
//!
//! Reading and writing themselves never trust a hint: they ask the host. The one exception is the second attempt in a row
//! to read nothing, which a blocking call makes before it waits: it is answered here.
//!
//! What a program writes with `TCP_CORK` or `MSG_MORE` is held back here, up to [`HELD_LIMIT`], and goes to the host
//! together with what follows: a server's header and file then cost one call of the host. It is held no longer than until
//! the program waits or the kernel looks at events ([`Network::poll`]).

#![allow(unsafe_code)]

use alloc::{
    collections::VecDeque,
    format,
    string::String,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ptr,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering},
};

use kiln_abi::{
    host::{Event, Message, Slice, event_flags},
    link::{ToKernel, ToMonitor},
    manifest::Protocol,
};
use linux_raw_sys::net as linux;

use crate::{
    Errno, Result,
    event::{EventHandler, Events},
    file::{Readiness, Sink, Source, WatchList},
    hash::HashMap,
    host::Host,
    link::{HostDescriptor, Link},
    sync::Mutex,
    trace,
};

use super::{
    address::{AF_INET6, Address},
    backend::{DatagramReceived, Datagrams, Interface, Network},
    local::{Pending, Scope, Tables},
    option::Options,
    socket::Stream,
    tcp::{MAX_BACKLOG, TcpSocket},
};

/// The address that the program sees as its own, as behind any translating gateway.
const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The same for IPv6 (a unique local address, RFC 4193).
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 0x15);

/// The gateway of that network: what clients on the host's loopback are shown as.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The same for IPv6.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 2);

/// There is something to read.
const READABLE: u32 = 1;
/// Whether there is something to read has to be looked up.
const READ_UNKNOWN: u32 = 2;
/// There is room to write.
const WRITABLE: u32 = 4;
/// The peer sends no more.
const READ_END: u32 = 8;
/// Both directions are over.
const HANGUP: u32 = 16;
/// An error waits.
const ERROR: u32 = 32;
/// Events are switched on.
const WATCHED: u32 = 64;
/// This side has shut its sending down.
const WRITE_CLOSED: u32 = 128;
/// `TCP_CORK` is on.
const CORKED: u32 = 256;
/// Bytes are held back.
const HELD: u32 = 512;
/// The program has closed the socket; what is held goes out first.
const CLOSING: u32 = 1024;
/// The program has shut sending down; what is held goes out first.
const SHUT_WAITS: u32 = 2048;

/// The host has just said that there is nothing to read.
const EMPTY: u32 = 4096;
/// The connection came from a client, and nothing was sent on it yet.
const UNANSWERED: u32 = 8192;

/// An address that is never mapped: Linux lets nobody map its first pages (`vm.mmap_min_addr`).
const NOWHERE: usize = 4096;
/// Most bytes that are looked at ahead in a stream that cannot be counted.
const LOOK_AHEAD: usize = 64 << 10;

/// Most bytes that are held back for a connection.
const HELD_LIMIT: usize = 16 << 10;

/// What is known of a descriptor's readiness. One CPU: no update is ever torn, so loads and stores are relaxed.
struct Hints(AtomicU32);

impl Hints {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn has(&self, bits: u32) -> bool {
        self.get() & bits != 0
    }

    fn set(&self, bits: u32) {
        self.0.store(self.get() | bits, Ordering::Relaxed);
    }

    fn clear(&self, bits: u32) {
        self.0.store(self.get() & !bits, Ordering::Relaxed);
    }

    /// A read of `asked` bytes gave `count`.
    fn after_read(&self, asked: usize, count: usize, stream: bool) {
        if count == 0 && asked > 0 && stream {
            self.set(READABLE | READ_END);
            self.clear(READ_UNKNOWN);
        } else if self.has(READ_END | HANGUP | ERROR) {
            self.set(READABLE);
        } else if stream && count < asked {
            self.clear(READABLE | READ_UNKNOWN);
        } else {
            self.clear(READABLE);
            self.set(READ_UNKNOWN);
        }
    }

    /// A read found nothing.
    fn nothing_to_read(&self) {
        self.clear(READABLE | READ_UNKNOWN);
    }

    /// A write of `asked` bytes took `count`.
    fn after_write(&self, asked: usize, count: usize) {
        if count < asked {
            self.clear(WRITABLE);
        }
    }

    /// An event's flags: what became possible.
    fn after_event(&self, flags: u32) -> Readiness {
        let mut bits = 0;
        let mut readiness = Readiness::empty();
        if flags & event_flags::READABLE != 0 {
            bits |= READABLE;
            readiness |= Readiness::READABLE;
        }
        if flags & event_flags::WRITABLE != 0 {
            bits |= WRITABLE;
            readiness |= Readiness::WRITABLE;
        }
        if flags & event_flags::READ_HANGUP != 0 {
            bits |= READ_END | READABLE;
            readiness |= Readiness::READ_HANGUP | Readiness::READABLE;
        }
        if flags & event_flags::HANGUP != 0 {
            bits |= HANGUP | READ_END | READABLE | WRITABLE;
            readiness |= Readiness::all() - Readiness::ERROR;
        }
        if flags & event_flags::ERROR != 0 {
            bits |= ERROR | READABLE | WRITABLE;
            readiness |= Readiness::ERROR | Readiness::READABLE | Readiness::WRITABLE;
        }
        if bits & READABLE != 0 {
            self.clear(READ_UNKNOWN);
        }
        self.set(bits);
        readiness
    }

    fn readiness(&self) -> Readiness {
        let hints = self.get();
        let mut readiness = Readiness::empty();
        for (bit, flag) in [
            (READABLE, Readiness::READABLE),
            (WRITABLE, Readiness::WRITABLE),
            (READ_END, Readiness::READ_HANGUP),
            (HANGUP, Readiness::HANGUP),
            (ERROR, Readiness::ERROR),
        ] {
            if hints & bit != 0 {
                readiness |= flag;
            }
        }
        readiness
    }
}

/// A descriptor of the host with its hints.
struct Descriptor {
    host: Host,
    events: Arc<Events>,
    /// `-1` once closed.
    number: AtomicI32,
    hints: Hints,
    watch: Arc<WatchList>,
    stream: bool,
    /// An error that looking took from the host; the next call tells it.
    error: Mutex<Option<Errno>>,
    /// Bytes held back ([`HELD`] says that there are any).
    held: Mutex<Vec<u8>>,
    shared: Arc<Shared>,
    this: Weak<Descriptor>,
}

/// What all descriptors of the network have in common.
#[derive(Default)]
struct Shared {
    /// Those with held bytes, for the next poll.
    holding: Mutex<Vec<Weak<Descriptor>>>,
    /// Connections that are open.
    connections: AtomicU32,
    /// Bytes that were ever sent and received.
    bytes: AtomicU64,
    /// A client has been sent its first byte, and the monitor has not been told yet.
    answered: AtomicBool,
    /// Loopback clients that datagram sockets heard, the latest first. For all sockets: a program may answer a client
    /// through another socket of the same port.
    clients: Mutex<VecDeque<SocketAddr>>,
}

impl Shared {
    fn count(&self, bytes: usize) {
        let before = self.bytes.load(Ordering::Relaxed);
        self.bytes.store(before + bytes as u64, Ordering::Relaxed);
    }
}

impl Descriptor {
    fn new(
        host: Host,
        events: &Arc<Events>,
        descriptor: HostDescriptor,
        watch: Arc<WatchList>,
        shared: &Arc<Shared>,
        stream: bool,
    ) -> Arc<Descriptor> {
        if stream {
            shared.connections.fetch_add(1, Ordering::Relaxed);
        }
        Arc::new_cyclic(|this| Descriptor {
            host,
            events: Arc::clone(events),
            number: AtomicI32::new(descriptor.into_raw()),
            hints: Hints(AtomicU32::new(READ_UNKNOWN | WRITABLE)),
            watch,
            stream,
            error: Mutex::new(None),
            held: Mutex::new(Vec::new()),
            shared: Arc::clone(shared),
            this: this.clone(),
        })
    }

    fn number(&self) -> Result<i32> {
        match self.number.load(Ordering::Relaxed) {
            number if number >= 0 => Ok(number),
            _ => Err(Errno::EBADF),
        }
    }

    #[inline]
    fn tell_error(&self) -> Result<()> {
        if self.hints.has(ERROR)
            && let Some(error) = self.error.lock().take()
        {
            self.hints.clear(ERROR);
            return Err(error);
        }
        Ok(())
    }

    /// Takes the error that waits, here or on the host.
    fn take_error(&self) -> Option<Errno> {
        if !self.hints.has(ERROR) {
            return None;
        }
        if self.error.lock().is_none() {
            self.look();
        }
        let error = self.error.lock().take();
        self.hints.clear(ERROR);
        error
    }

    /// Switches events on, the first time that somebody may wait.
    fn ensure_watched(&self) {
        if self.hints.has(WATCHED) {
            return;
        }
        let (Ok(number), Some(this)) = (self.number(), self.this.upgrade()) else {
            return;
        };
        self.events.register(number.cast_unsigned(), this);
        match self.host.descriptor_watch(number) {
            Ok(()) => self.hints.set(WATCHED),
            Err(error) => trace::warn!("net: the host cannot watch a connection: {error}"),
        }
    }

    fn receive(
        &self,
        sink: &mut Sink<'_>,
        peek: bool,
        address: Option<&mut [u8]>,
    ) -> Result<(usize, usize)> {
        let number = self.number()?;
        self.tell_error()?;
        if self.hints.has(EMPTY) {
            self.hints.clear(EMPTY);
            if !self.hints.has(READABLE | READ_UNKNOWN | READ_END | ERROR) {
                return Err(Errno::EAGAIN);
            }
        }
        let asked = sink.remaining();
        let mut flags = if peek { linux::MSG_PEEK } else { 0 };
        if !self.stream {
            flags |= linux::MSG_TRUNC;
        }
        let (address, address_length) = match address {
            Some(bytes) => (bytes.as_mut_ptr(), bytes.len() as u32),
            None => (ptr::null_mut(), 0),
        };
        let result = sink.with_segments(|slices| {
            let mut message = Message {
                slices: slices.as_ptr(),
                slice_count: slices.len(),
                address,
                address_length,
                descriptors: ptr::null_mut(),
                descriptor_count: 0,
                flags,
            };
            // SAFETY: the slices lie in program memory or are borrowed by the sink; the address buffer is borrowed for
            // this call with its length.
            unsafe { self.host.descriptor_receive_raw(number, &mut message) }
                .map(|count| (count, message.address_length as usize))
        });
        match result {
            Ok((count, address_length)) => {
                if !peek {
                    self.shared.count(count);
                    self.hints.after_read(asked, count, self.stream);
                }
                Ok((count, address_length))
            }
            Err(error) => {
                if error == Errno::EAGAIN {
                    self.hints.nothing_to_read();
                    if self.hints.has(WATCHED) {
                        self.hints.set(EMPTY);
                    }
                    self.ensure_watched();
                } else {
                    self.hints.clear(ERROR);
                }
                Err(error)
            }
        }
    }

    fn send(&self, source: &mut Source<'_>, flags: u32, address: &[u8]) -> Result<usize> {
        let number = self.number()?;
        self.tell_error()?;
        let asked = source.remaining();
        let result = source.with_segments(|slices| {
            let message = Message {
                slices: slices.as_ptr(),
                slice_count: slices.len(),
                // Only read by the host when sending.
                address: if address.is_empty() {
                    ptr::null_mut()
                } else {
                    address.as_ptr().cast_mut()
                },
                address_length: address.len() as u32,
                descriptors: ptr::null_mut(),
                descriptor_count: 0,
                flags,
            };
            // SAFETY: the slices lie in program memory or are borrowed by the source; the address is borrowed.
            unsafe { self.host.descriptor_send_raw(number, &message) }
        });
        match result {
            Ok(count) => {
                self.sent(count);
                self.hints.after_write(asked, count);
                if count < asked {
                    self.ensure_watched();
                }
                source.advance(count);
                Ok(count)
            }
            Err(Errno::EAGAIN) => {
                self.hints.clear(WRITABLE);
                self.ensure_watched();
                Err(Errno::EAGAIN)
            }
            Err(error) => {
                self.hints.clear(ERROR);
                Err(error)
            }
        }
    }

    /// Counts what the host has taken.
    fn sent(&self, count: usize) {
        self.shared.count(count);
        if self.hints.has(UNANSWERED) {
            self.hints.clear(UNANSWERED);
            self.shared.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Sends bytes of a stream; those that are held first.
    fn send_stream(&self, source: &mut Source<'_>, more: bool) -> Result<usize> {
        if !self.hints.has(HELD | CORKED) && !more {
            return self.send(source, 0, &[]);
        }
        self.send_held(source, more || self.hints.has(CORKED))
    }

    #[cold]
    fn send_held(&self, source: &mut Source<'_>, more: bool) -> Result<usize> {
        if self.hints.has(WRITE_CLOSED) {
            return Err(Errno::EPIPE);
        }
        self.tell_error()?;
        let mut held = self.held.lock();
        let wanted = source.remaining();
        if more && held.len() + wanted <= HELD_LIMIT && self.hints.has(WRITABLE) {
            let before = held.len();
            held.resize(before + wanted, 0);
            let taken = source.take(held.get_mut(before..).unwrap_or_default());
            held.truncate(before + taken.unwrap_or(0));
            taken?;
            if before == 0 {
                self.shared.holding.lock().push(self.this.clone());
            }
            self.hints.set(HELD);
            return Ok(wanted - source.remaining());
        }
        // Everything in one call: what is held, then the program's bytes.
        let mut slices = Vec::from([Slice {
            address: held.as_ptr() as usize,
            length: held.len(),
        }]);
        source.with_segments(|segments| {
            slices.extend_from_slice(segments.get(..1023).unwrap_or(segments))
        });
        let count = self.send_slices(&slices)?;
        let total = held.len() + wanted;
        self.hints.after_write(total, count);
        if count < total {
            self.ensure_watched();
        }
        if count < held.len() {
            held.drain(..count);
            return Err(Errno::EAGAIN);
        }
        let own = count - held.len();
        held.clear();
        self.hints.clear(HELD);
        source.advance(own);
        if own == 0 && wanted > 0 {
            Err(Errno::EAGAIN)
        } else {
            Ok(own)
        }
    }

    /// One send; `EAGAIN` is remembered.
    fn send_slices(&self, slices: &[Slice]) -> Result<usize> {
        let message = Message {
            slices: slices.as_ptr(),
            slice_count: slices.len(),
            address: ptr::null_mut(),
            address_length: 0,
            descriptors: ptr::null_mut(),
            descriptor_count: 0,
            flags: 0,
        };
        // SAFETY: the slices are the caller's: held bytes, and program memory or memory borrowed by a source.
        let result = unsafe { self.host.descriptor_send_raw(self.number()?, &message) };
        match result {
            Err(Errno::EAGAIN) => {
                self.hints.clear(WRITABLE);
                self.ensure_watched();
            }
            Err(_) => self.hints.clear(ERROR),
            Ok(count) => self.sent(count),
        }
        result
    }

    /// Sends what is held. What finds no room goes out with the host's next event.
    fn flush(&self) {
        if !self.hints.has(HELD) {
            return;
        }
        let mut held = self.held.lock();
        let slice = Slice {
            address: held.as_ptr() as usize,
            length: held.len(),
        };
        match self.send_slices(&[slice]) {
            Ok(count) if count < held.len() => {
                held.drain(..count);
                self.hints.clear(WRITABLE);
                self.ensure_watched();
                return;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(_) => {}
            Err(error) => {
                *self.error.lock() = Some(error);
                self.hints.set(ERROR | READABLE | WRITABLE);
            }
        }
        held.clear();
        self.hints.clear(HELD);
        drop(held);
        if self.hints.has(SHUT_WAITS)
            && let Ok(number) = self.number()
        {
            self.hints.clear(SHUT_WAITS);
            // Fails only if the connection is over, which reading tells.
            let _ = self.host.descriptor_shutdown(number, linux::SHUT_WR);
        }
        if self.hints.has(CLOSING) {
            self.close_now();
        }
    }

    /// Looks whether there is something to read, without taking it.
    fn look(&self) {
        let Ok(number) = self.number() else { return };
        let mut byte = 0u8;
        let slice = Slice {
            address: (&raw mut byte) as usize,
            length: 1,
        };
        match self.peek(number, slice, linux::MSG_PEEK) {
            Ok(0) if self.stream => self.hints.set(READABLE | READ_END),
            Ok(_) => self.hints.set(READABLE),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => {
                *self.error.lock() = Some(error);
                self.hints.set(READABLE | WRITABLE | ERROR);
            }
        }
        self.hints.clear(READ_UNKNOWN);
    }

    /// Bytes that can be read (`FIONREAD`): of a stream all, of datagrams those of the next.
    fn waiting(&self) -> usize {
        let Ok(number) = self.number() else { return 0 };
        // TCP counts with MSG_TRUNC what it would have given, and stores nothing (tcp(7)); so do datagrams without room.
        let counted = self.peek(
            number,
            Slice {
                address: NOWHERE,
                length: if self.stream { i32::MAX as usize } else { 0 },
            },
            linux::MSG_PEEK | linux::MSG_TRUNC,
        );
        let result = match counted {
            // A stream of another kind, which has to be looked at.
            Err(Errno::EFAULT) => {
                let mut bytes = alloc::vec![0u8; LOOK_AHEAD];
                let slice = Slice {
                    address: bytes.as_mut_ptr() as usize,
                    length: bytes.len(),
                };
                self.peek(number, slice, linux::MSG_PEEK)
            }
            result => result,
        };
        match result {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(error) => {
                *self.error.lock() = Some(error);
                self.hints.set(READABLE | WRITABLE | ERROR);
                0
            }
        }
    }

    /// Receives into a slice that is memory of this function's callers or [`NOWHERE`].
    fn peek(&self, number: i32, slice: Slice, flags: u32) -> Result<usize> {
        let mut message = Message {
            slices: &slice,
            slice_count: 1,
            address: ptr::null_mut(),
            address_length: 0,
            descriptors: ptr::null_mut(),
            descriptor_count: 0,
            flags,
        };
        // SAFETY: the slice is the callers', who borrow it for this call, or never mapped.
        unsafe { self.host.descriptor_receive_raw(number, &mut message) }
    }

    fn readiness(&self) -> Readiness {
        self.ensure_watched();
        if self.hints.has(READ_UNKNOWN) {
            self.look();
        }
        self.hints.readiness()
    }

    fn close(&self) {
        self.flush();
        if self.hints.has(HELD) {
            // The events' table keeps this alive until the rest has gone or the connection has failed.
            self.hints.set(CLOSING);
            return;
        }
        self.close_now();
    }

    fn close_now(&self) {
        let number = self.number.swap(-1, Ordering::Relaxed);
        if number >= 0 {
            if self.stream {
                self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            }
            if self.hints.has(WATCHED) {
                self.events.unregister(number.cast_unsigned());
            }
            // The number is free in any case (close(2)).
            let _ = self.host.descriptor_close(number);
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        self.close_now();
    }
}

impl EventHandler for Descriptor {
    fn handle(&self, event: Event) {
        let readiness = self.hints.after_event(event.flags);
        self.flush();
        self.watch.notify(readiness);
    }
}

/// A connection that the host carries.
struct HostStream {
    descriptor: Arc<Descriptor>,
}

impl Stream for HostStream {
    #[inline]
    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<usize> {
        let (count, _) = self.descriptor.receive(sink, peek, None)?;
        sink.advance(count);
        Ok(count)
    }

    #[inline]
    fn send(&self, source: &mut Source<'_>, more: bool) -> Result<usize> {
        self.descriptor.send_stream(source, more)
    }

    fn readiness(&self) -> Readiness {
        self.descriptor.readiness()
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        let how = match (read, write) {
            (true, true) => linux::SHUT_RDWR,
            (true, false) => linux::SHUT_RD,
            _ => linux::SHUT_WR,
        };
        let hints = &self.descriptor.hints;
        self.descriptor.flush();
        let result = if write && hints.has(HELD) {
            hints.set(SHUT_WAITS);
            if read {
                self.descriptor
                    .host
                    .descriptor_shutdown(self.descriptor.number()?, linux::SHUT_RD)
            } else {
                Ok(())
            }
        } else {
            self.descriptor
                .host
                .descriptor_shutdown(self.descriptor.number()?, how)
        };
        if write {
            hints.set(WRITE_CLOSED | WRITABLE);
        }
        if read {
            hints.set(READ_END | READABLE);
            hints.clear(READ_UNKNOWN);
        }
        if hints.has(READ_END) && hints.has(WRITE_CLOSED) {
            hints.set(HANGUP);
        }
        self.descriptor.watch.notify(hints.readiness());
        result
    }

    fn close(&self, _: bool) {
        self.descriptor.close();
    }

    fn take_error(&self) -> Option<Errno> {
        self.descriptor.take_error()
    }

    fn queued(&self) -> (usize, usize) {
        (
            self.descriptor.waiting(),
            if self.descriptor.hints.has(HELD) {
                self.descriptor.held.lock().len()
            } else {
                0
            },
        )
    }

    fn configure(&self, options: &Options) {
        let hints = &self.descriptor.hints;
        if options.cork {
            hints.set(CORKED);
        } else if hints.has(CORKED) {
            hints.clear(CORKED);
            self.descriptor.flush();
        }
    }
}

/// A datagram socket of the host.
///
/// A client on the host's own loopback is shown with the gateway's address: its own would mean the program's loopback, and
/// answers to it would stay within the machine. Only such clients, once they have been heard, can be sent to so.
struct HostDatagrams {
    descriptor: Arc<Descriptor>,
}

/// Loopback clients that an instance's datagram sockets remember.
const MAX_CLIENTS: usize = 1024;

impl HostDatagrams {
    /// How a sender is shown to the program.
    fn shown(&self, from: SocketAddr) -> SocketAddr {
        let gateway = match from.ip() {
            IpAddr::V4(ip) if ip.is_loopback() => IpAddr::V4(GATEWAY_V4),
            IpAddr::V6(ip) if ip.is_loopback() => IpAddr::V6(GATEWAY_V6),
            _ => return from,
        };
        let mut clients = self.descriptor.shared.clients.lock();
        if clients.front() != Some(&from) {
            clients.retain(|client| *client != from);
            clients.truncate(MAX_CLIENTS - 1);
            clients.push_front(from);
        }
        SocketAddr::new(gateway, from.port())
    }

    /// Whom the program means.
    fn meant(&self, to: SocketAddr) -> SocketAddr {
        if to.ip() != IpAddr::V4(GATEWAY_V4) && to.ip() != IpAddr::V6(GATEWAY_V6) {
            return to;
        }
        let clients = self.descriptor.shared.clients.lock();
        let fits =
            |client: &&SocketAddr| client.port() == to.port() && client.is_ipv4() == to.is_ipv4();
        clients.iter().find(fits).copied().unwrap_or(to)
    }
}

impl Datagrams for HostDatagrams {
    fn receive(
        &self,
        sink: &mut Sink<'_>,
        peek: bool,
        only: Option<SocketAddr>,
    ) -> Result<DatagramReceived> {
        loop {
            let mut address = [0; super::address::MAX_LENGTH];
            let (full_length, length) = self.descriptor.receive(sink, peek, Some(&mut address))?;
            let from = match Address::decode(address.get(..length).unwrap_or_default()) {
                Ok(Address::Inet(from)) => self.shown(from),
                _ => return Err(Errno::EIO),
            };
            if only.is_some_and(|only| only != from) {
                if peek {
                    self.descriptor
                        .receive(&mut Sink::kernel(&mut []), false, None)?;
                }
                continue;
            }
            let count = full_length.min(sink.remaining());
            sink.advance(count);
            // The machine has one address of each family.
            let to = match from.ip() {
                IpAddr::V4(_) => IpAddr::V4(GUEST_V4),
                IpAddr::V6(_) => IpAddr::V6(GUEST_V6),
            };
            return Ok(DatagramReceived {
                count,
                full_length,
                from,
                to,
            });
        }
    }

    fn send(&self, source: &mut Source<'_>, to: SocketAddr) -> Result<usize> {
        // The family that fits the socket is known to the host alone: try the address's own, then the mapped one.
        let to = self.meant(to);
        let encoded = Address::Inet(to).encode(super::address::AF_INET);
        match self.descriptor.send(source, 0, encoded.as_bytes()) {
            Err(Errno::EAFNOSUPPORT | Errno::EINVAL) if to.is_ipv4() => {
                self.descriptor
                    .send(source, 0, Address::Inet(to).encode(AF_INET6).as_bytes())
            }
            result => result,
        }
    }

    fn readiness(&self) -> Readiness {
        self.descriptor.readiness()
    }

    fn waiting(&self) -> usize {
        self.descriptor.waiting()
    }

    fn take_error(&self) -> Option<Errno> {
        self.descriptor.take_error()
    }

    fn close(&self) {
        self.descriptor.close();
    }
}

/// An attempt that the monitor works on.
struct Attempt {
    socket: Weak<TcpSocket>,
    watch: Arc<WatchList>,
}

/// The host's network.
pub struct HostNetwork {
    host: Host,
    events: Arc<Events>,
    link: Arc<Link>,
    tables: Arc<Tables>,
    attempts: Mutex<HashMap<u64, Attempt>>,
    /// How many sockets listen on an address.
    listening: Mutex<HashMap<SocketAddr, usize>>,
    next_request: AtomicU64,
    shared: Arc<Shared>,
    /// The monitor knows that a client was answered.
    told_answered: AtomicBool,
}

impl HostNetwork {
    /// The network behind a link.
    #[must_use]
    pub fn new(
        host: Host,
        events: &Arc<Events>,
        link: &Arc<Link>,
        tables: &Arc<Tables>,
    ) -> HostNetwork {
        HostNetwork {
            host,
            events: Arc::clone(events),
            link: Arc::clone(link),
            tables: Arc::clone(tables),
            attempts: Mutex::new(HashMap::default()),
            listening: Mutex::new(HashMap::default()),
            next_request: AtomicU64::new(1),
            shared: Arc::default(),
            told_answered: AtomicBool::new(false),
        }
    }

    fn next_request(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection; `hints` beyond the usual ones.
    fn stream(
        &self,
        descriptor: HostDescriptor,
        watch: Arc<WatchList>,
        hints: u32,
    ) -> Arc<dyn Stream> {
        let descriptor = Descriptor::new(
            self.host,
            &self.events,
            descriptor,
            watch,
            &self.shared,
            true,
        );
        descriptor.hints.set(hints);
        Arc::new(HostStream { descriptor })
    }

    /// The guest's own address in place of an unspecified one or one of the host's.
    fn guest_side(local: SocketAddr, peer: SocketAddr) -> SocketAddr {
        let ip = match peer {
            _ if !local.ip().is_unspecified() => local.ip(),
            SocketAddr::V4(_) => IpAddr::V4(GUEST_V4),
            SocketAddr::V6(_) => IpAddr::V6(GUEST_V6),
        };
        SocketAddr::new(ip, local.port())
    }
}

impl Network for HostNetwork {
    fn listen(&self, scope: Scope, port: u16, _: usize) -> Result<()> {
        let address = SocketAddr::new(scope.ip, port);
        let first = {
            let mut listening = self.listening.lock();
            let count = listening.entry(address).or_insert(0);
            *count += 1;
            *count == 1
        };
        if first {
            self.link.send(&ToMonitor::Listen {
                address,
                protocol: Protocol::Tcp,
            });
        }
        Ok(())
    }

    fn unlisten(&self, scope: Scope, port: u16) {
        let address = SocketAddr::new(scope.ip, port);
        let last = {
            let mut listening = self.listening.lock();
            match listening.get_mut(&address) {
                Some(count) if *count > 1 => {
                    *count -= 1;
                    false
                }
                Some(_) => listening.remove(&address).is_some(),
                None => false,
            }
        };
        if last {
            self.link.send(&ToMonitor::Unlisten {
                address,
                protocol: Protocol::Tcp,
            });
        }
    }

    fn connect(
        &self,
        socket: &Weak<TcpSocket>,
        watch: &Arc<WatchList>,
        from: Option<SocketAddr>,
        to: SocketAddr,
        _: &Options,
    ) -> Result<u64> {
        let request = self.next_request();
        let attempt = Attempt {
            socket: socket.clone(),
            watch: Arc::clone(watch),
        };
        self.attempts.lock().insert(request, attempt);
        // The guest's address means nothing to the host; its port does.
        let from = from
            .filter(|from| !self.is_own(from.ip()))
            .filter(|from| !from.ip().is_unspecified());
        self.link.send(&ToMonitor::Connect { request, from, to });
        Ok(request)
    }

    fn cancel(&self, attempt: u64) {
        if self.attempts.lock().remove(&attempt).is_some() {
            self.link
                .send(&ToMonitor::CancelConnect { request: attempt });
        }
    }

    fn open_datagram(
        &self,
        bind: SocketAddr,
        both_families: bool,
        watch: &Arc<WatchList>,
    ) -> Result<Arc<dyn Datagrams>> {
        let request = self.next_request();
        let mut bind = bind;
        if self.is_own(bind.ip()) {
            bind.set_ip(match bind.ip() {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            });
        }
        // bind(2) and connect(2) on datagram sockets never wait for others, so neither may this: the monitor answers at once.
        let (answer, descriptor) = self.link.request(
            &ToMonitor::OpenDatagram {
                request,
                bind,
                both_families,
            },
            |message| matches!(message, ToKernel::Datagram { request: answered, .. } if *answered == request),
        )?;
        let ToKernel::Datagram { result, .. } = answer else {
            return Err(Errno::EIO);
        };
        result.map_err(|number| Errno::from_number(i64::from(number)))?;
        let descriptor = descriptor.ok_or(Errno::EIO)?;
        let watch = Arc::clone(watch);
        let descriptor = Descriptor::new(
            self.host,
            &self.events,
            descriptor,
            watch,
            &self.shared,
            false,
        );
        descriptor.ensure_watched();
        Ok(Arc::new(HostDatagrams { descriptor }))
    }

    fn interface(&self) -> Option<Interface> {
        Some(Interface {
            index: 2,
            name: "eth0",
            mac: Some([2, 0, 0, 0, 2, 15]),
            mtu: 65520,
            addresses: Vec::from([(IpAddr::V4(GUEST_V4), 24), (IpAddr::V6(GUEST_V6), 64)]),
            gateways: Vec::from([IpAddr::V4(GATEWAY_V4), IpAddr::V6(GATEWAY_V6)]),
        })
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        ip == IpAddr::V4(GUEST_V4) || ip == IpAddr::V6(GUEST_V6)
    }

    fn poll(&self, _: u64) -> Option<u64> {
        let shared = &self.shared;
        if !shared.holding.lock().is_empty() {
            let holding = core::mem::take(&mut *shared.holding.lock());
            for descriptor in holding.iter().filter_map(Weak::upgrade) {
                descriptor.flush();
            }
        }
        if shared.answered.load(Ordering::Relaxed)
            && !self.told_answered.swap(true, Ordering::Relaxed)
        {
            self.link.send(&ToMonitor::Answered);
        }
        None
    }

    fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        match (message, descriptor) {
            (ToKernel::Accepted { local, peer }, Some(descriptor)) => {
                let (local, peer) = (canonical(local), canonical(peer));
                let destination = HostNetwork::guest_side(local, peer);
                let listener = self
                    .tables
                    .find_listener(destination)
                    .or_else(|| self.tables.find_listener(local));
                let Some(listener) = listener else {
                    // The program stopped listening meanwhile; closing the descriptor tells the client.
                    return;
                };
                if listener.lengths().0 >= MAX_BACKLOG {
                    // A program that accepts nothing does not get all descriptors of the instance filled.
                    trace::debug!(
                        "net: port {} has {MAX_BACKLOG} connections that wait; one more is closed",
                        local.port()
                    );
                    return;
                }
                let watch = Arc::new(WatchList::new());
                let stream = self.stream(descriptor, Arc::clone(&watch), UNANSWERED);
                let pending = Pending {
                    stream,
                    watch,
                    local: destination,
                    peer,
                    connector: None,
                };
                if let Err(pending) = listener.push(pending) {
                    pending.stream.close(true);
                }
            }
            (ToKernel::Connected { request, result }, descriptor) => {
                let Some(attempt) = self.attempts.lock().remove(&request) else {
                    return;
                };
                let Some(socket) = attempt.socket.upgrade() else {
                    return;
                };
                match (result, descriptor) {
                    (Ok((local, peer)), Some(descriptor)) => {
                        let (local, peer) = (canonical(local), canonical(peer));
                        let stream = self.stream(descriptor, attempt.watch, 0);
                        socket.complete(stream, HostNetwork::outgoing_side(local, peer), peer);
                    }
                    (Ok(_), None) => socket.fail(Errno::EIO),
                    (Err(number), _) => socket.fail(Errno::from_number(i64::from(number))),
                }
            }
            (ToKernel::Activity, _) => self.link.send(&ToMonitor::Activity {
                connections: self.shared.connections.load(Ordering::Relaxed),
                bytes: self.shared.bytes.load(Ordering::Relaxed),
            }),
            (message, _) => trace::warn!(
                "net: the monitor sent something that nobody asked for: {}",
                name(&message)
            ),
        }
    }
}

impl HostNetwork {
    /// What `getsockname(2)` tells of a connection to elsewhere: the host's port at the guest's address.
    fn outgoing_side(local: SocketAddr, peer: SocketAddr) -> SocketAddr {
        let mut unspecified = local;
        unspecified.set_ip(match peer.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        });
        HostNetwork::guest_side(unspecified, peer)
    }
}

/// Without IPv4-mapped IPv6 addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn name(message: &ToKernel) -> String {
    let text = format!("{message:?}");
    text.split([' ', '('])
        .next()
        .map(String::from)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints() -> Hints {
        Hints(AtomicU32::new(WRITABLE))
    }

    #[test]
    fn a_short_read_drains_and_an_event_fills() {
        let hints = hints();
        assert_eq!(
            hints.after_event(event_flags::READABLE),
            Readiness::READABLE
        );
        assert!(hints.readiness().contains(Readiness::READABLE));
        hints.after_read(100, 60, true);
        assert!(!hints.readiness().contains(Readiness::READABLE));
        assert!(!hints.has(READ_UNKNOWN));
    }

    #[test]
    fn after_a_full_read_nothing_is_known() {
        let hints = hints();
        hints.after_event(event_flags::READABLE);
        hints.after_read(100, 100, true);
        assert!(hints.has(READ_UNKNOWN));
        hints.after_event(event_flags::READABLE);
        assert!(!hints.has(READ_UNKNOWN) && hints.has(READABLE));
    }

    #[test]
    fn the_end_stays_readable_whatever_is_read() {
        let hints = hints();
        hints.after_event(event_flags::READABLE | event_flags::READ_HANGUP);
        hints.after_read(100, 60, true);
        assert!(
            hints
                .readiness()
                .contains(Readiness::READABLE | Readiness::READ_HANGUP)
        );
        let unseen = self::hints();
        unseen.after_read(100, 0, true);
        assert!(
            unseen
                .readiness()
                .contains(Readiness::READABLE | Readiness::READ_HANGUP)
        );
    }

    #[test]
    fn a_short_write_waits_for_room() {
        let hints = hints();
        hints.after_write(10, 10);
        assert!(hints.has(WRITABLE));
        hints.after_write(10, 3);
        assert!(!hints.has(WRITABLE));
        hints.after_event(event_flags::WRITABLE);
        assert!(hints.has(WRITABLE));
    }

    #[test]
    fn datagrams_are_never_known_to_be_drained_by_a_short_one() {
        let hints = hints();
        hints.after_event(event_flags::READABLE);
        hints.after_read(100, 10, false);
        assert!(hints.has(READ_UNKNOWN));
        hints.nothing_to_read();
        assert!(!hints.has(READ_UNKNOWN | READABLE));
    }

    /// What the program's host was given by each send, and how many bytes the next sends take.
    static SENT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
    static ROOM: Mutex<usize> = Mutex::new(usize::MAX);

    extern "C" fn record(_: i32, message: &Message) -> isize {
        let mut room = ROOM.lock();
        if *room == 0 {
            return -11;
        }
        let mut bytes = Vec::new();
        for index in 0..message.slice_count {
            // SAFETY: the caller gives that many slices of its own memory.
            let piece = unsafe {
                let slice = *message.slices.add(index);
                core::slice::from_raw_parts(slice.address as *const u8, slice.length)
            };
            bytes.extend_from_slice(piece);
        }
        bytes.truncate(*room);
        *room -= bytes.len();
        let count = bytes.len();
        SENT.lock().push(bytes);
        count as isize
    }

    #[test]
    fn corked_bytes_go_out_together_and_nothing_is_lost_when_there_is_no_room() {
        let table = kiln_abi::host::HostInterface {
            descriptor_send: record,
            ..crate::host::quiet::TABLE
        };
        let host = Host::new(alloc::boxed::Box::leak(alloc::boxed::Box::new(table)));
        let shared = Arc::default();
        let descriptor = Descriptor::new(
            host,
            &Arc::new(Events::new()),
            HostDescriptor::new(host, 40),
            Arc::new(WatchList::new()),
            &shared,
            true,
        );
        let stream = HostStream { descriptor };
        let send = |bytes: &[u8], more| stream.send(&mut Source::kernel(bytes), more);
        let sent = || core::mem::take(&mut *SENT.lock());

        assert_eq!(send(b"header ", true), Ok(7));
        assert!(sent().is_empty());
        assert_eq!(send(b"body", false), Ok(4));
        assert_eq!(sent(), [b"header body".to_vec()]);

        let mut options = Options {
            cork: true,
            ..Options::default()
        };
        stream.configure(&options);
        assert_eq!(send(b"a", false), Ok(1));
        assert_eq!(send(b"b", false), Ok(1));
        assert!(sent().is_empty());
        options.cork = false;
        stream.configure(&options);
        assert_eq!(sent(), [b"ab".to_vec()]);

        // The host takes less than is held: the rest goes with the next event, and closing waits for it.
        *ROOM.lock() = 3;
        assert_eq!(send(b"12345", true), Ok(5));
        assert_eq!(send(b"678", false), Err(Errno::EAGAIN));
        assert_eq!(sent(), [b"123".to_vec()]);
        assert!(!stream.readiness().contains(Readiness::WRITABLE));
        stream.close(false);
        assert!(stream.descriptor.number().is_ok());
        *ROOM.lock() = usize::MAX;
        stream.descriptor.handle(Event {
            source: 40,
            flags: event_flags::WRITABLE,
        });
        assert_eq!(sent(), [b"45".to_vec()]);
        assert!(stream.descriptor.number().is_err());
    }
}

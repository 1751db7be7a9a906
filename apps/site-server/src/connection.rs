//! One client's connection: its socket as hyper reads and writes it, and what hyper makes of it.
//!
//! Nothing here waits. Whoever drives a connection polls it whenever the socket has become ready, so no waker is kept.

use std::{
    cell::Cell,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use hyper::{
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
};
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, Shutdown},
};

use crate::server::Answers;

/// The most that is read at once.
const READ_BYTES: usize = 8 * 1024;

/// A connection and its state.
pub struct Connection {
    socket: Rc<Socket>,
    http: http1::Connection<Stream, Answers>,
}

impl Connection {
    /// For an accepted, non-blocking socket.
    #[must_use]
    pub fn new(socket: OwnedFd, builder: &http1::Builder, answers: Answers) -> Self {
        let socket = Rc::new(Socket {
            descriptor: socket,
            readable: Cell::new(true),
            writable: Cell::new(true),
            hung_up: Cell::new(false),
            watched: Cell::new(EventFlags::empty()),
        });
        let http = builder.serve_connection(Stream(Rc::clone(&socket)), answers);
        Self { socket, http }
    }

    /// Does what can be done without waiting. Ready when the connection has ended, for whatever reason: a client that goes
    /// away or speaks nonsense ends its own connection only.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.http).poll(context).map(|_| ())
    }

    /// Lets the request in flight finish, and none follow.
    pub fn finish(&mut self) {
        Pin::new(&mut self.http).graceful_shutdown();
    }

    /// Takes note of what epoll says about the socket.
    pub fn note(&self, events: EventFlags) {
        let over = EventFlags::HUP | EventFlags::ERR;
        if events.intersects(over | EventFlags::RDHUP) {
            self.socket.hung_up.set(true);
        }
        if events.intersects(over | EventFlags::RDHUP | EventFlags::IN) {
            self.socket.readable.set(true);
        }
        if events.intersects(over | EventFlags::OUT) {
            self.socket.writable.set(true);
        }
    }

    /// What epoll has to watch from now on, and whether it watches the socket already; nothing when it watches all that is needed.
    ///
    /// Edge-triggered, and room for writing only from the first time on that there is none: most connections never need it.
    pub fn to_watch(&self) -> Option<(EventFlags, bool)> {
        let before = self.socket.watched.get();
        let mut wanted = before | EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if !self.socket.writable.get() {
            wanted |= EventFlags::OUT;
        }
        self.socket.watched.set(wanted);
        (wanted != before).then_some((wanted, !before.is_empty()))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.descriptor.as_fd()
    }
}

/// A socket, and what is known of it without asking the system.
struct Socket {
    descriptor: OwnedFd,
    /// Whether there may be something to read.
    readable: Cell<bool>,
    /// Whether there may be room to write.
    writable: Cell<bool>,
    /// Whether the end will be read after what is there: no event announces it any more.
    hung_up: Cell<bool>,
    /// What epoll watches it for.
    watched: Cell<EventFlags>,
}

/// hyper's side of a socket.
struct Stream(Rc<Socket>);

/// What a call came to: whether it has to wait is noted in `ready`.
fn outcome<T>(result: Result<T, Errno>, ready: &Cell<bool>) -> Poll<io::Result<T>> {
    match result {
        Err(Errno::AGAIN) => {
            ready.set(false);
            Poll::Pending
        }
        other => Poll::Ready(other.map_err(io::Error::from)),
    }
}

impl Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
        mut cursor: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let socket = &self.0;
        if !socket.readable.get() {
            return Poll::Pending;
        }
        let mut buffer = [MaybeUninit::uninit(); READ_BYTES];
        let length = READ_BYTES.min(cursor.remaining());
        let received = rustix::net::recv(
            &socket.descriptor,
            &mut buffer[..length],
            RecvFlags::empty(),
        );
        outcome(received, &socket.readable).map_ok(|((bytes, _), _)| {
            // Fewer than asked for means that there are no more, for now.
            if bytes.len() < length && !socket.hung_up.get() {
                socket.readable.set(false);
            }
            cursor.put_slice(bytes);
        })
    }
}

impl Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let socket = &self.0;
        if !socket.writable.get() {
            return Poll::Pending;
        }
        outcome(
            rustix::io::writev(&socket.descriptor, slices),
            &socket.writable,
        )
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = rustix::net::shutdown(&self.0.descriptor, Shutdown::Write);
        Poll::Ready(result.map_err(io::Error::from))
    }
}

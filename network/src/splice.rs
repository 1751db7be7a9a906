//! One TCP connection of the guest joined to one of the host.
//!
//! Bytes go from the host's socket straight into the stack's buffer and back, without a copy between. A full buffer on
//! one side stops the reading of the other.

use std::os::fd::OwnedFd;
use std::time::Duration;

use kiln_tcpip::{Error, Moment, Shutdown, SocketId, Stack};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

/// How far a spliced connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Going out: the host connects, the guest waits.
    Dialing,
    /// Coming in: the client waits, the guest has not been asked yet.
    Waiting,
    /// Coming in: the guest is being asked.
    Knocking,
    /// Both ends are connected.
    Open,
}

/// A spliced connection.
pub(crate) struct Splice {
    pub(crate) host: OwnedFd,
    /// None while the guest has not been asked yet.
    pub(crate) guest: Option<SocketId>,
    pub(crate) stage: Stage,
    /// The guest has sent something.
    pub(crate) answered: bool,
    /// The guest's port that it is for (its place in the gateway's list), if it came in.
    pub(crate) port: Option<u32>,
    pub(crate) since: Moment,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other end of the host's connection has closed: read on until the end shows.
    pub(crate) hung_up: bool,
    /// The host's connection has failed: read on until the error shows.
    pub(crate) failed: bool,
    /// All that the host will send was read, and the guest was told.
    host_ended: bool,
    /// All that the guest will send was passed on, and the host was told.
    guest_ended: bool,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It goes on.
    Open,
    /// Both directions have ended.
    Ended,
    /// The guest has reset it, or is gone.
    GuestReset,
    /// The host's other end has reset it.
    HostReset,
}

impl Splice {
    pub(crate) fn new(host: OwnedFd, stage: Stage, since: Moment) -> Splice {
        Splice {
            host,
            guest: None,
            stage,
            answered: false,
            port: None,
            since,
            readable: true,
            writable: true,
            hung_up: false,
            failed: false,
            host_ended: false,
            guest_ended: false,
        }
    }

    /// Whether all that the host will send was read.
    pub(crate) fn host_ended(&self) -> bool {
        self.host_ended
    }

    /// Moves what can be moved, and adds its bytes to `moved`.
    pub(crate) fn pump(&mut self, stack: &mut Stack, moved: &mut u64) -> Outcome {
        let Some(guest) = self.guest.filter(|_| self.stage == Stage::Open) else {
            return Outcome::Open;
        };
        if let Some(outcome) = self.pump_to_host(stack, guest, moved) {
            return outcome;
        }
        if let Some(outcome) = self.pump_to_guest(stack, guest, moved) {
            return outcome;
        }
        if self.host_ended && self.guest_ended {
            Outcome::Ended
        } else if self.host_ended && self.failed {
            // Nobody will hear what the guest still says.
            Outcome::HostReset
        } else {
            Outcome::Open
        }
    }

    fn pump_to_guest(
        &mut self,
        stack: &mut Stack,
        guest: SocketId,
        moved: &mut u64,
    ) -> Option<Outcome> {
        while self.readable && !self.host_ended {
            let mut result = Ok(0);
            let mut asked = 0;
            let sent = stack.tcp_send_with(guest, &mut |space| {
                asked = space.len();
                result = rustix::net::recv(&self.host, space, RecvFlags::empty())
                    .map(|(count, _)| count);
                result.unwrap_or(0)
            });
            match sent {
                Ok(count) => *moved += count as u64,
                // Full: the guest's next acknowledgement goes on from here.
                Err(Error::WouldBlock) => return None,
                Err(_) => return Some(Outcome::GuestReset),
            }
            match result {
                Ok(0) => {
                    self.host_ended = true;
                    let _ = stack.tcp_shutdown(guest, Shutdown::Write);
                }
                // Less than there was room for: the host has no more (epoll(7), questions and answers, 9). An end that
                // has been told of already would not be told of again.
                Ok(count) if count < asked && !self.hung_up => self.readable = false,
                Ok(_) => {}
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Some(Outcome::HostReset),
            }
        }
        None
    }

    fn pump_to_host(
        &mut self,
        stack: &mut Stack,
        guest: SocketId,
        moved: &mut u64,
    ) -> Option<Outcome> {
        while self.writable && !self.guest_ended {
            let mut result = None;
            let received = stack.tcp_receive_with(guest, &mut |bytes| {
                let sent = rustix::net::send(&self.host, bytes, SendFlags::NOSIGNAL);
                result = Some((sent, bytes.len()));
                sent.unwrap_or(0)
            });
            if let Ok(count @ 1..) = received {
                self.answered = true;
                *moved += count as u64;
            }
            match (received, result) {
                (Ok(_), Some((Ok(sent), offered))) => {
                    if sent < offered {
                        self.writable = false;
                    }
                }
                (Ok(_), Some((Err(Errno::AGAIN), _))) => self.writable = false,
                (Ok(_), Some((Err(Errno::INTR), _))) => {}
                (Ok(_), Some((Err(_), _))) => return Some(Outcome::HostReset),
                // The end of the guest's stream.
                (Ok(_), None) => {
                    self.guest_ended = true;
                    let _ = rustix::net::shutdown(&self.host, rustix::net::Shutdown::Write);
                }
                (Err(Error::WouldBlock), _) => break,
                (Err(_), _) => return Some(Outcome::GuestReset),
            }
        }
        None
    }

    /// Makes the host's other end see a reset when the descriptor is closed.
    pub(crate) fn reset_host(&self) {
        // When it fails the other end sees an ordinary end: nothing more can be done.
        let _ = sockopt::set_socket_linger(&self.host, Some(Duration::ZERO));
    }
}

/// Values in places that are used again, each time with another generation.
pub(crate) struct Slots<T> {
    entries: Vec<(u16, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    pub(crate) fn new() -> Slots<T> {
        Slots {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(crate) fn insert(&mut self, value: T) -> (u32, u16) {
        if let Some(index) = self.free.pop()
            && let Some(entry) = self.entries.get_mut(index as usize)
        {
            entry.1 = Some(value);
            return (index, entry.0);
        }
        self.entries.push((0, Some(value)));
        (self.entries.len() as u32 - 1, 0)
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.entries.get_mut(index as usize)?.1.as_mut()
    }

    /// The value, if the place was not used again since.
    pub(crate) fn get_exact(&mut self, index: u32, generation: u16) -> Option<&mut T> {
        self.entries
            .get_mut(index as usize)
            .filter(|entry| entry.0 == generation)?
            .1
            .as_mut()
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let entry = self.entries.get_mut(index as usize)?;
        let value = entry.1.take()?;
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(index);
        Some(value)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// All places in use.
    pub(crate) fn indices(&self) -> Vec<u32> {
        (0u32..)
            .zip(&self.entries)
            .filter(|(_, entry)| entry.1.is_some())
            .map(|(index, _)| index)
            .collect()
    }
}

//! TCP/IP for both ends of an instance's link: the kernel's `--net direct` stack and the host's gateway.
//!
//! For: one [`Stack`] with one Ethernet link and a loopback; IPv4 and IPv6, neighbours, routes, fragments, ICMP echo,
//! DHCP client, router advertisements, UDP and TCP sockets. The TCP state machine of a single connection is smoltcp's.
//!
//! Not for: blocking, threads, clocks, devices, DNS. The owner hands in frames and the time, and takes out frames and
//! events.
//!
//! What always holds:
//! - No call blocks; nothing happens between calls. [`Stack::next_deadline`] says when the next one is due.
//! - The cost of a packet does not depend on the number of sockets: a packet finds its socket by a hash of its
//!   addresses and ports, and timers lie in a heap. A stack with only idle connections has no deadline at all.
//! - No panic on any received byte, and no memory without a bound grows by what a peer sends.
//! - Addresses are canonical: an IPv4 address is never given or taken as an IPv4-mapped IPv6 address.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod checksum;
mod configuration;
mod datagram;
mod dhcp;
mod fragment;
mod frame;
mod link;
mod packet;
mod router;
mod socket;
mod stack;
mod tcp;
mod timer;
mod tuple;

#[cfg(test)]
mod tests;

pub use configuration::{Checksums, Configuration};
pub use datagram::{Datagram, DatagramKind};
pub use frame::{Frame, FrameDecoder, FrameEncoder, FrameError, FrameSink, MAXIMUM_FRAME};
pub use link::{Address, Route};
pub use router::Advertisement;
pub use socket::{Error, Event, Readiness, Shutdown, SocketId};
pub use stack::Stack;
pub use tcp::{KeepAlive, TcpState};

/// A moment: the time since some fixed moment of the owner's choice, on a clock that never goes back.
pub type Moment = core::time::Duration;

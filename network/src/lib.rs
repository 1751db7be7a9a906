//! The host side of an instance's network: a user-mode gateway that needs no privilege.
//!
//! For: `--net direct`. [`UserNetwork`] runs at the host's end of a stream of Ethernet frames (QEMU's `-netdev stream`
//! protocol, also for engine `process`). To the guest it is a router with a DHCP server, router advertisements and a
//! name server; on the host it is an ordinary program with sockets: connections out are made by `connect(2)`, published
//! ports are ordinary listeners.
//!
//! Not for: `--net socket`, tap devices, names of other instances (their lookup is handed in).
//!
//! What always holds:
//! - The guest's connection is accepted only when the host's has been made, and refused when that was refused.
//! - A published port listens on the host before [`UserNetwork::start`] returns, and a client waits until the guest
//!   listens too. A guest whose kernel tells where it listens ([`NetworkConfiguration::listens_told`]) is asked then, at
//!   once; the client waits in the host's backlog, and a datagram in the host's socket, until then. Any other is asked
//!   again and again, for the first client of a port: after 2 ms at first, at last every 50 ms, for two minutes.
//! - Sockets that were handed over are never shut down, only closed: what was not taken from them waits for whoever is
//!   next.
//! - The network's thread sleeps while there is nothing to do; while the guest is suspended it does nothing at all but see
//!   who wants it.
//! - Data, half closes and resets pass both ways; a slow end slows down the other, and no buffer grows without bound.
//! - The guest does not reach the host's loopback, unless it is allowed to.

#![forbid(unsafe_code)]

mod configuration;
mod datagram;
mod dhcp;
mod dns;
mod error;
mod gateway;
mod host;
mod pcap;
mod publish;
mod splice;

#[cfg(test)]
mod tests;

pub use configuration::{FrameEnd, LOCAL_MTU, Lookup, MACHINE_MTU, NetworkConfiguration, Wake};
pub use dhcp::answer as answer_dhcp;
pub use dns::{Question, Reply, answer as answer_dns, parse_question};
pub use error::NetworkError;
pub use gateway::{Activity, UserNetwork};
pub use host::raise_descriptor_limit;
pub use kiln_tcpip::Checksums;
pub use publish::{Held, Publish};

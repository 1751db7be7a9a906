//! The link: one byte stream between a running kernel and its monitor.
//!
//! On `process` it is a Unix stream socket, on VMs a serial port of a virtio console. It carries frames: a header of
//! eight bytes (channel and payload length, both little-endian `u32`), then the payload.
//!
//! * Channel [`CONTROL`]: [`ToMonitor`] from the kernel, [`ToKernel`] from the monitor, encoded
//!   with postcard, one message a frame.
//! * Channel [`FIRST_VOLUME`]` + n`: FUSE requests (kernel to monitor) and replies for the volume `n`
//!   of the run's configuration, as in Linux's `linux/fuse.h`, one message a frame.
//!
//! Descriptors (`process` only) travel as `SCM_RIGHTS` with the first byte of the frame of the
//! [`ToKernel`] message that tells of them: one descriptor for each such message, in order. The monitor sends such
//! a frame with one `sendmsg`.

use alloc::{string::String, vec::Vec};
use core::net::SocketAddr;
use serde::{Deserialize, Serialize};

use crate::manifest::Protocol;

/// Channel of control messages.
pub const CONTROL: u32 = 0;
/// Channel of the first volume.
pub const FIRST_VOLUME: u32 = 1;
/// Largest payload that either side accepts.
pub const MAX_PAYLOAD: u32 = 0x12_0000;
/// Bytes of a frame's header.
pub const HEADER: usize = 8;

/// The eight bytes before a payload.
#[must_use]
pub fn header(channel: u32, length: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&channel.to_le_bytes());
    bytes[4..].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Channel and payload length from a header.
#[must_use]
pub fn parse_header(bytes: [u8; HEADER]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// From the kernel to the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToMonitor {
    /// The program has been loaded and is about to run its first instruction.
    Started {
        /// Microseconds since the kernel's own first instructions.
        uptime: u32,
    },
    /// The program listens on (TCP) or has bound (UDP) a port. The monitor now lets clients of the
    /// published ports in. (A UDP port on `--net socket` is told by [`ToMonitor::OpenDatagram`] alone.)
    Listen {
        /// Address given to `bind`; unspecified for all.
        address: SocketAddr,
        /// Transport.
        protocol: Protocol,
    },
    /// The program has closed such a socket.
    Unlisten {
        /// As in `Listen`.
        address: SocketAddr,
        /// Transport.
        protocol: Protocol,
    },
    /// `--net socket`: the program connects a stream. Answered by [`ToKernel::Connected`].
    Connect {
        /// Chosen by the kernel, unique among those unanswered.
        request: u64,
        /// Local address if the program has bound one.
        from: Option<SocketAddr>,
        /// Where to.
        to: SocketAddr,
    },
    /// `--net socket`: the program gave up an unanswered request.
    CancelConnect {
        /// As in `Connect`.
        request: u64,
    },
    /// `--net socket`: the program wants a datagram socket. Where `bind` is a published UDP port, the monitor hands
    /// out the published socket, else a new one. Answered by [`ToKernel::Datagram`].
    OpenDatagram {
        /// Chosen by the kernel, unique among those unanswered.
        request: u64,
        /// Local address as bound; port 0 for any.
        bind: SocketAddr,
        /// A socket of the IPv6 address that serves IPv4, too (no `IPV6_V6ONLY`).
        both_families: bool,
    },
    /// Lines for the instance's log that are not the program's output (unsupported system calls and the like).
    Log(String),
    /// The program ended; the instance exits right after.
    Exited {
        /// As for [`crate::host::HostInterface::exit`].
        code: i32,
    },
    /// `--net socket`: the answer to [`ToKernel::Activity`].
    Activity {
        /// Connections of the host's that the program has, whichever side opened them; those that it has not accepted yet
        /// count too.
        connections: u32,
        /// Bytes of payload that were ever sent or received with the host's sockets.
        bytes: u64,
    },
    /// `--net socket`: the program has sent the first byte on a connection that it did not open. Told once.
    Answered,
}

/// From the monitor to the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToKernel {
    /// Deliver a signal to the program (Linux's number).
    Signal {
        /// Signal number.
        signal: u8,
    },
    /// `--net socket`: a published port has a connection. One descriptor comes along.
    Accepted {
        /// The guest's address and port, as in `Listen`.
        local: SocketAddr,
        /// The client.
        peer: SocketAddr,
    },
    /// `--net socket`: the answer to [`ToMonitor::Connect`]. One descriptor comes along if it succeeded.
    Connected {
        /// As in `Connect`.
        request: u64,
        /// Local address and peer of the connection, or a Linux error number.
        result: Result<(SocketAddr, SocketAddr), i32>,
    },
    /// `--net socket`: a datagram socket; one descriptor comes along if it succeeded.
    Datagram {
        /// As in `OpenDatagram`.
        request: u64,
        /// The address bound, or a Linux error number.
        result: Result<SocketAddr, i32>,
    },
    /// Input for the program's standard input; empty is end of file.
    Input(Vec<u8>),
    /// `--net socket`: how busy the network is. Answered by [`ToMonitor::Activity`], which counts everything that was sent
    /// before this message.
    Activity,
}

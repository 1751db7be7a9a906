//! Why a network cannot be started.

use std::fmt;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a network cannot be started. The message names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Another program listens there.
    #[error(
        "port {address}/{protocol} of the host is in use by another program: stop that program, or publish another port"
    )]
    PortInUse {
        /// The address and port.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
    },
    /// Ports below `net.ipv4.ip_unprivileged_port_start` need a privilege.
    #[error(
        "port {address}/{protocol} of the host may be opened only by root: publish a port from 1024 on, or lower \
         the sysctl net.ipv4.ip_unprivileged_port_start"
    )]
    PortNeedsPrivilege {
        /// The address and port.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
    },
    /// The address is not one of the host.
    #[error("{address} cannot be published: the host has no address {}; see `ip address`", address.ip())]
    AddressNotAvailable {
        /// The address and port.
        address: SocketAddr,
    },
    /// Another error while a port was opened.
    #[error("port {address}/{protocol} of the host cannot be opened: {source}")]
    Port {
        /// The address and port.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A socket that was handed over cannot serve.
    #[error(
        "the socket handed over for port {guest} of the guest cannot be used: {reason}; hand over one that is bound"
    )]
    Held {
        /// The guest's port.
        guest: u16,
        /// What is wrong with it.
        reason: String,
    },
    /// The capture file cannot be made.
    #[error("the capture file {} cannot be written: {source}; name a file in a directory that is writable", path.display())]
    Capture {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something that every process may do failed.
    #[error("the user-mode network cannot be started: {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl NetworkError {
    pub(crate) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
        move |source| NetworkError::System { operation, source }
    }
}

/// Says something on standard error, whose other end may be gone: nobody is told then.
pub(crate) fn remark(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "kiln: {text}");
}

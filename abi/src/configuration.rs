//! What one run adds to an image's manifest. Passed in postcard's encoding at boot; the monitor keeps it as JSON.

use alloc::{collections::BTreeMap, string::String, vec::Vec};
use core::net::IpAddr;
use serde::{Deserialize, Serialize};

use crate::manifest::User;

/// Configuration of one run. Every field may be missing: then the manifest, or a default, holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfiguration {
    /// Replaces the manifest's arguments.
    pub arguments: Option<Vec<String>>,
    /// Added to the manifest's environment, replacing what has the same name.
    pub environment: BTreeMap<String, String>,
    /// Replaces the working directory.
    pub working_directory: Option<String>,
    /// Replaces the user.
    pub user: Option<User>,
    /// Host name; default `kiln`.
    pub hostname: Option<String>,
    /// How the program reaches the network.
    pub network: Network,
    /// Directories of the host, in the order of their link channels (see [`crate::link`]).
    pub volumes: Vec<Volume>,
    /// True when a monitor is at the other end of the link (VM: the first virtio console device).
    pub link: bool,
    /// Wall clock at the start in nanoseconds since 1970, for machines without a clock.
    pub realtime: Option<u64>,
    /// What to log, in the kernel's filter syntax (`syscall=trace,net=debug`).
    pub log: Option<String>,
}

impl RunConfiguration {
    /// The bytes that the kernel gets.
    ///
    /// # Errors
    ///
    /// None that is known: postcard's signature has one.
    pub fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(self)
    }

    /// Reads what [`RunConfiguration::to_bytes`] wrote.
    ///
    /// # Errors
    ///
    /// The bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }
}

/// How the program reaches the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Network {
    /// Loopback only.
    None,
    /// The host's sockets, by capability, over the link. Engine `process` only.
    Socket {
        /// Name servers for `/etc/resolv.conf`.
        name_servers: Vec<IpAddr>,
    },
    /// The kernel's own TCP/IP over frames, if there is a network device; addresses by DHCP (IPv4) and router
    /// advertisement (IPv6).
    #[default]
    Dhcp,
    /// The kernel's own TCP/IP with given addresses.
    Static(StaticNetwork),
}

/// Addresses given by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StaticNetwork {
    /// Own addresses with prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, at most one for each family.
    pub gateways: Vec<IpAddr>,
    /// The gateways' MAC address, if it is known beforehand: then nobody has to ask for it.
    pub gateway_mac: Option<[u8; 6]>,
    /// Name servers for `/etc/resolv.conf`.
    pub name_servers: Vec<IpAddr>,
    /// MAC address (process engine, whose frame stream has no device to say it).
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet in bytes (process engine; default 1500).
    pub mtu: Option<u16>,
}

/// A directory of the host in the program's file tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Absolute path in the program's file tree.
    pub path: String,
    /// No changes allowed.
    #[serde(default)]
    pub read_only: bool,
}

//! What a user-mode network is told when it is started.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_abi::configuration::StaticNetwork;
use kiln_tcpip::Checksums;

use crate::{Held, Publish};

/// The best MTU for engine `process`, whose frames never leave the machine: large, so that much data needs few frames,
/// and small enough for two of them in the buffers of a small guest.
pub const LOCAL_MTU: u16 = 32768;

/// The best MTU for a virtual machine's network card: each frame costs the emulation far more than its bytes, and a
/// buffer for one still fits a page.
pub const MACHINE_MTU: u16 = 4000;

/// Finds the addresses of an instance by its name (lower case, without a final dot): None when no instance has it.
pub type Lookup = Arc<dyn Fn(&str) -> Option<Vec<IpAddr>> + Send + Sync>;

/// Called by the gateway's thread when somebody on the host wants a suspended guest. It must not wait, nor call the
/// network: writing to an `eventfd(2)` is what it is for.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The host's end of the stream of frames.
#[derive(Debug)]
pub enum FrameEnd {
    /// Connected already.
    Stream(UnixStream),
    /// The guest's side connects to it, once.
    Listener(UnixListener),
}

/// Configuration of a [`crate::UserNetwork`].
#[derive(Clone)]
pub struct NetworkConfiguration {
    /// The guest's Ethernet address.
    pub guest_mac: [u8; 6],
    /// The gateway's Ethernet address.
    pub gateway_mac: [u8; 6],
    /// Largest IP packet on the link in bytes.
    pub mtu: u16,
    /// Whether checksums count on the link: `Trusted` only if the guest's stack is told so too.
    pub checksums: Checksums,
    /// The guest's IPv4 address, given by DHCP or by hand.
    pub guest_v4: Ipv4Addr,
    /// The gateway's IPv4 address.
    pub gateway_v4: Ipv4Addr,
    /// The name server's IPv4 address; may be the gateway's.
    pub dns_v4: Ipv4Addr,
    /// Length of the IPv4 network's prefix in bits.
    pub prefix_v4: u8,
    /// The guest's IPv6 address when it is given by hand. By router advertisement it makes its own of the network's
    /// first 64 bits.
    pub guest_v6: Ipv6Addr,
    /// The gateway's IPv6 address, in the same network of 64 bits.
    pub gateway_v6: Ipv6Addr,
    /// The guest's name, for DHCP.
    pub hostname: Option<String>,
    /// Published ports that are to be opened.
    pub publish: Vec<Publish>,
    /// Published ports that are open already.
    pub held: Vec<Held>,
    /// The guest tells where its programs listen ([`crate::UserNetwork::guest_listens`]): until then connections wait in
    /// the host's backlog and datagrams in the host's sockets. Otherwise the guest is asked again and again, and datagrams
    /// go to it at once.
    pub listens_told: bool,
    /// The guest gets its IPv4 address by DHCP, so nothing can reach it before. Only with `listens_told`.
    pub dhcp: bool,
    /// What wakes a suspended guest; without it [`crate::UserNetwork::suspend`] refuses.
    pub wake: Option<Wake>,
    /// Called once, when the first byte has gone to a client of a published port.
    pub answered: Option<Wake>,
    /// Lets the guest reach the host's own 127.0.0.1 and ::1 by the gateway's addresses.
    pub allow_host_loopback: bool,
    /// Name servers to forward to; None for those of `/etc/resolv.conf`.
    pub resolvers: Option<Vec<SocketAddr>>,
    /// Names of instances.
    pub lookup: Option<Lookup>,
    /// File to write all frames to, in the pcap format.
    pub capture: Option<PathBuf>,
}

impl NetworkConfiguration {
    /// The usual network: 10.0.2.0/24 and fd6b:696c:6e00::/64, guest .15, gateway .2, name server .3.
    #[must_use]
    pub fn new(guest_mac: [u8; 6]) -> NetworkConfiguration {
        NetworkConfiguration {
            guest_mac,
            gateway_mac: [0x52, 0x55, 10, 0, 2, 2],
            mtu: 1500,
            checksums: Checksums::Software,
            guest_v4: Ipv4Addr::new(10, 0, 2, 15),
            gateway_v4: Ipv4Addr::new(10, 0, 2, 2),
            dns_v4: Ipv4Addr::new(10, 0, 2, 3),
            prefix_v4: 24,
            guest_v6: Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 0x15),
            gateway_v6: Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 2),
            hostname: None,
            publish: Vec::new(),
            held: Vec::new(),
            listens_told: false,
            dhcp: false,
            wake: None,
            answered: None,
            allow_host_loopback: false,
            resolvers: None,
            lookup: None,
            capture: None,
        }
    }

    /// What the guest is configured with when it does not ask by DHCP.
    #[must_use]
    pub fn static_network(&self) -> StaticNetwork {
        StaticNetwork {
            addresses: vec![
                (IpAddr::V4(self.guest_v4), self.prefix_v4),
                (IpAddr::V6(self.guest_v6), 64),
            ],
            gateways: vec![IpAddr::V4(self.gateway_v4), IpAddr::V6(self.gateway_v6)],
            gateway_mac: Some(self.gateway_mac),
            name_servers: vec![IpAddr::V4(self.dns_v4)],
            mac: Some(self.guest_mac),
            mtu: Some(self.mtu),
        }
    }
}

/// The name servers of the host (`resolv.conf(5)`).
pub(crate) fn host_resolvers() -> Vec<SocketAddr> {
    parse_resolvers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn parse_resolvers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with(char::is_whitespace))
        .filter_map(|rest| rest.split_whitespace().next())
        // A link-local server has a scope that only the host knows.
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, 53))
        .take(3)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_as_libc_reads_them() {
        let text = "# nameserver 1.1.1.1\nnameserver 127.0.0.53\nnameservers 2.2.2.2\n nameserver\t::1 # local\n\
                    search example.org\nnameserver fe80::1%eth0\nnameserver 9.9.9.9\nnameserver 8.8.8.8\n";
        let found = parse_resolvers(text);
        assert_eq!(
            found,
            ["127.0.0.53:53", "[::1]:53", "9.9.9.9:53"].map(|text| text.parse().unwrap())
        );
    }
}

//! Which clients may have other servers asked for them, unless it is said: those of the neighbourhood.

use std::net::IpAddr;

/// An address that is never reached from the Internet: loopback, link-local, private (RFC 1918, 3927, 4193, 4291).
pub(super) fn is_near(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_loopback() || address.is_private() || address.is_link_local()
        }
        IpAddr::V6(address) => {
            address.is_loopback() || address.is_unicast_link_local() || address.is_unique_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_world_is_not_near() {
        for near in [
            "127.3.2.1",
            "10.1.1.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.1.1",
            "::1",
            "fe80::1",
            "fd12::1",
        ] {
            assert!(is_near(near.parse().expect("an address")), "{near}");
        }
        for far in [
            "0.0.0.0",
            "8.8.8.8",
            "172.32.0.1",
            "100.64.0.1",
            "224.0.0.1",
            "::",
            "2001:db8::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(!is_near(far.parse().expect("an address")), "{far}");
        }
    }
}

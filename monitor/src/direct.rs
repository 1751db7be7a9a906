//! `--net direct`: the plan of an instance's own network, and its user-mode gateway on the host (`kiln-network`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kiln_network::{FrameEnd, NetworkConfiguration, NetworkError, UserNetwork};

use crate::arguments::Publish;
use crate::error::Error;
use crate::sockets::cannot_publish;
use crate::state::InstanceConfiguration;

/// The network for an instance: the usual one, with the addresses that the user gave by hand.
///
/// # Errors
/// When the addresses cannot be together on one network.
pub fn plan(
    mac: [u8; 6],
    addresses: &[(IpAddr, u8)],
    gateways: &[IpAddr],
    instance: &InstanceConfiguration,
) -> Result<NetworkConfiguration, Error> {
    let mut plan = NetworkConfiguration::new(mac);
    plan.hostname.clone_from(&instance.run.hostname);
    plan.listens_told = true;
    let gateway_v4 = gateways.iter().find_map(|gateway| match gateway {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let gateway_v6 = gateways.iter().find_map(|gateway| match gateway {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    if gateways.len() > usize::from(gateway_v4.is_some()) + usize::from(gateway_v6.is_some()) {
        return Err(Error::input(
            "there are two gateways of one family",
            "give --gateway once for IPv4 and once for IPv6 at most",
        ));
    }
    let (mut own_v4, mut own_v6) = (0, 0);
    for (address, length) in addresses {
        match address {
            IpAddr::V4(address) => {
                own_v4 += 1;
                plan.guest_v4 = *address;
                plan.prefix_v4 = *length;
                plan.gateway_v4 = match gateway_v4 {
                    Some(gateway) => gateway,
                    None => first_other(*address, *length)?,
                };
                plan.dns_v4 = plan.gateway_v4;
                let mask = mask(*length);
                if u32::from(plan.gateway_v4) & mask != u32::from(*address) & mask {
                    return Err(outside(
                        &plan.gateway_v4.to_string(),
                        &address.to_string(),
                        *length,
                    ));
                }
            }
            IpAddr::V6(address) => {
                own_v6 += 1;
                plan.guest_v6 = *address;
                plan.gateway_v6 = gateway_v6.unwrap_or_else(|| first_other_v6(*address));
                if u128::from(plan.gateway_v6) >> 64 != u128::from(*address) >> 64 {
                    return Err(outside(
                        &plan.gateway_v6.to_string(),
                        &address.to_string(),
                        64,
                    ));
                }
            }
        }
    }
    if own_v4 > 1 || own_v6 > 1 {
        return Err(Error::input(
            "there are two own addresses of one family",
            "give --ip once for IPv4 and once for IPv6 at most",
        ));
    }
    if (own_v4 > 0 && plan.gateway_v4 == plan.guest_v4)
        || (own_v6 > 0 && plan.gateway_v6 == plan.guest_v6)
    {
        return Err(Error::input(
            "the gateway has the instance's own address",
            "give --gateway another address of the same network",
        ));
    }
    Ok(plan)
}

fn outside(gateway: &str, address: &str, length: u8) -> Error {
    Error::input(
        format!("the gateway {gateway} is not in the network of {address}/{length}"),
        "give --gateway an address of the same network, or leave it out",
    )
}

fn mask(length: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(length.min(32)))
        .unwrap_or(0)
}

/// The first address of a network that is not the instance's own.
fn first_other(address: Ipv4Addr, length: u8) -> Result<Ipv4Addr, Error> {
    if length > 30 {
        return Err(Error::input(
            format!("the network of {address}/{length} has no room for a gateway"),
            "give a prefix length of 30 at most",
        ));
    }
    let network = u32::from(address) & mask(length);
    let first = Ipv4Addr::from(network | 1);
    Ok(if first == address {
        Ipv4Addr::from(network | 2)
    } else {
        first
    })
}

fn first_other_v6(address: Ipv6Addr) -> Ipv6Addr {
    let network = u128::from(address) >> 64 << 64;
    let first = Ipv6Addr::from(network | 1);
    if first == address {
        Ipv6Addr::from(network | 2)
    } else {
        first
    }
}

/// Starts the gateway. Ports whose sockets are held already (`held`: place in `ports`, and socket) are not opened; host ports
/// of 0 are replaced by the chosen ones in `ports`.
///
/// # Errors
/// Names the port that cannot be had, and what to do.
pub fn start(
    plan: &NetworkConfiguration,
    frames: UnixStream,
    ports: &mut [Publish],
    held: Vec<(usize, OwnedFd)>,
) -> Result<UserNetwork, Error> {
    let mut plan = plan.clone();
    let is_held = |place: usize| held.iter().any(|(held, _)| *held == place);
    plan.publish = ports
        .iter()
        .enumerate()
        .filter(|(place, _)| !is_held(*place))
        .map(|(_, publish)| kiln_network::Publish {
            address: publish.address,
            host: publish.host,
            guest: publish.guest,
            protocol: publish.protocol,
        })
        .collect();
    for (place, socket) in held {
        if let Some(publish) = ports.get(place) {
            plan.held.push(kiln_network::Held {
                socket: Arc::new(socket),
                guest: publish.guest,
                protocol: publish.protocol,
            });
        }
    }
    let network = UserNetwork::start(plan, FrameEnd::Stream(frames))
        .map_err(|error| explain(error, ports))?;
    for (bound, origin) in network
        .published()
        .iter()
        .filter(|(_, origin)| origin.host == 0)
    {
        let chosen = ports.iter_mut().find(|publish| {
            publish.host == 0
                && publish.address == origin.address
                && publish.guest == origin.guest
                && publish.protocol == origin.protocol
        });
        if let Some(publish) = chosen {
            publish.host = bound.port();
        }
    }
    Ok(network)
}

fn explain(error: NetworkError, ports: &[Publish]) -> Error {
    let (address, source) = match &error {
        NetworkError::PortInUse { address, .. } => (*address, rustix::io::Errno::ADDRINUSE),
        NetworkError::PortNeedsPrivilege { address, .. } => (*address, rustix::io::Errno::ACCESS),
        NetworkError::AddressNotAvailable { address } => {
            (*address, rustix::io::Errno::ADDRNOTAVAIL)
        }
        _ => return Error::environment(error.to_string(), "use --net socket if that goes on"),
    };
    let publish = ports.iter().find(|publish| {
        publish.host == address.port() && publish.address.is_none_or(|own| own == address.ip())
    });
    match publish {
        Some(publish) => cannot_publish(publish, source.into()),
        None => Error::environment(error.to_string(), "publish another port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::parse_publish;
    use crate::state::tests::configuration;

    fn planned(addresses: &[(&str, u8)], gateways: &[&str]) -> Result<NetworkConfiguration, Error> {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|(text, length)| (text.parse().unwrap(), *length))
            .collect();
        let gateways: Vec<_> = gateways.iter().map(|text| text.parse().unwrap()).collect();
        plan(
            [2, 0, 0, 0, 0, 1],
            &addresses,
            &gateways,
            &configuration("a"),
        )
    }

    #[test]
    fn gateways_are_found_or_taken() {
        let plan = planned(&[("192.0.2.9", 24)], &[]).unwrap();
        assert_eq!(plan.guest_v4.to_string(), "192.0.2.9");
        assert_eq!(plan.gateway_v4.to_string(), "192.0.2.1");
        let plan = planned(&[("192.0.2.1", 24), ("2001:db8::1", 64)], &[]).unwrap();
        assert_eq!(plan.gateway_v4.to_string(), "192.0.2.2");
        assert_eq!(plan.gateway_v6.to_string(), "2001:db8::2");
        let plan = planned(&[("192.0.2.1", 24)], &["192.0.2.254"]).unwrap();
        assert_eq!(plan.gateway_v4.to_string(), "192.0.2.254");
    }

    #[test]
    fn networks_that_cannot_be_are_refused() {
        for (addresses, gateways) in [
            (vec![("192.0.2.1", 24)], vec!["198.51.100.1"]),
            (vec![("192.0.2.1", 24)], vec!["192.0.2.1"]),
            (vec![("192.0.2.1", 31)], vec![]),
            (vec![("192.0.2.1", 24), ("192.0.2.3", 24)], vec![]),
            (vec![("192.0.2.1", 24)], vec!["192.0.2.2", "192.0.2.3"]),
            (vec![("2001:db8::1", 64)], vec!["2001:db8:1::1"]),
        ] {
            let error = planned(&addresses, &gateways).err().expect("refused");
            assert_eq!(error.kind(), crate::Kind::Input);
        }
    }

    #[test]
    fn published_ports_are_bound_and_named() {
        let plan = planned(&[], &[]).unwrap();
        let mut ports = parse_publish("127.0.0.1:0:80").unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let _network = start(&plan, ours, &mut ports, Vec::new()).unwrap();
        assert_ne!(ports[0].host, 0);
        let (ours, _other) = UnixStream::pair().unwrap();
        let error = start(&plan, ours, &mut ports, Vec::new()).expect_err("in use");
        assert!(
            error.to_string().contains(&ports[0].host.to_string()),
            "{error}"
        );
        assert!(error.help().unwrap().contains("-p 127.0.0.1:"));
    }
}

//! DHCP server for one guest (RFC 2131): whoever asks on the link is the guest, and gets its one address.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use crate::NetworkConfiguration;

/// How long an address is leased, in seconds. The guest renews at half of it.
const LEASE: u32 = 24 * 3600;

/// Whether a client that gets this message has its address.
pub(crate) fn is_acknowledgement(message: &[u8]) -> bool {
    DhcpPacket::new_checked(message)
        .and_then(|packet| Ok(DhcpRepr::parse(&packet)?.message_type == DhcpMessageType::Ack))
        .unwrap_or(false)
}

/// The answer to a client's message; None when there is none, or the message is damaged.
#[must_use]
pub fn answer(configuration: &NetworkConfiguration, message: &[u8]) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let offered = configuration.guest_v4;
    let server = configuration.gateway_v4;
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            // It may ask another server, or for an address of another network that it had before.
            if request
                .server_identifier
                .is_some_and(|chosen| chosen != server)
            {
                return None;
            }
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == offered {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let grants = kind != DhcpMessageType::Nak;
    let mask = u32::MAX
        .checked_shl(32 - u32::from(configuration.prefix_v4.min(32)))
        .unwrap_or(0);
    let mtu = configuration.mtu.to_be_bytes();
    let mut options = Vec::new();
    if grants {
        // Interface MTU and host name (RFC 2132 sections 5.1 and 3.14).
        options.push(DhcpOption {
            kind: 26,
            data: &mtu,
        });
        if let Some(name) = configuration
            .hostname
            .as_deref()
            .filter(|name| !name.is_empty() && name.len() < 64)
        {
            options.push(DhcpOption {
                kind: 12,
                data: name.as_bytes(),
            });
        }
    }
    let mut reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if grants {
            request.client_ip
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        your_ip: match request.message_type {
            DhcpMessageType::Inform => Ipv4Addr::UNSPECIFIED,
            _ if grants => offered,
            _ => Ipv4Addr::UNSPECIFIED,
        },
        server_ip: server,
        router: grants.then_some(server),
        subnet_mask: grants.then_some(Ipv4Addr::from(mask)),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: request.client_identifier,
        server_identifier: Some(server),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: grants.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    if grants {
        reply.dns_servers = Some(std::iter::once(configuration.dns_v4).collect());
    }
    // 300 bytes: shorter ones are dropped by some clients (RFC 1542 section 2.1).
    let mut bytes = vec![0; reply.buffer_len().max(300)];
    reply
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_ignored(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = answer(&NetworkConfiguration::new([2, 0, 0, 0, 0, 1]), &bytes);
        }
    }
}

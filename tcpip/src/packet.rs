//! IP packets as values: read once, at the edge, and written.
//!
//! Sources: RFC 791 (IPv4), RFC 8200 (IPv6 and its extension headers), RFC 1071 (checksum).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::checksum;

pub(crate) const ETHERNET_HEADER: usize = 14;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
pub(crate) const UDP_HEADER: usize = 8;
pub(crate) const TCP_HEADER: usize = 20;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) identification: u32,
    /// Of the first byte of the payload, in bytes.
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// A received IP packet whose lengths are right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpPacket<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// What lies behind all headers.
    pub(crate) payload: &'a [u8],
    /// The packet from its first header on, without padding.
    pub(crate) whole: &'a [u8],
    pub(crate) fragment: Option<Fragment>,
    /// Headers other than the plain one: smoltcp is not to see them.
    pub(crate) extended: bool,
}

impl<'a> IpPacket<'a> {
    /// Reads a packet; None when it is damaged.
    pub(crate) fn parse(bytes: &'a [u8], verify: bool) -> Option<IpPacket<'a>> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes, verify),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    /// The plain header of the same packet.
    pub(crate) fn header(&self) -> IpHeader {
        IpHeader {
            source: self.source,
            destination: self.destination,
            protocol: self.protocol,
            hop_limit: self.hop_limit,
        }
    }

    fn parse_v4(bytes: &'a [u8], verify: bool) -> Option<IpPacket<'a>> {
        let header: &[u8; IPV4_HEADER] = bytes.first_chunk()?;
        let header_length = usize::from(header[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_length < IPV4_HEADER || total < header_length {
            return None;
        }
        let whole = bytes.get(..total)?;
        let (headers, payload) = whole.split_at_checked(header_length)?;
        if verify && checksum::of(headers) != !0 {
            return None;
        }
        let flags = u16::from_be_bytes([header[6], header[7]]);
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let address = |at: usize| {
            Some(IpAddr::V4(Ipv4Addr::from(
                *header.get(at..)?.first_chunk::<4>()?,
            )))
        };
        Some(IpPacket {
            source: address(12)?,
            destination: address(16)?,
            protocol: header[9],
            hop_limit: header[8],
            payload,
            whole,
            fragment: (offset != 0 || more).then_some(Fragment {
                identification: u32::from(u16::from_be_bytes([header[4], header[5]])),
                offset,
                more,
            }),
            extended: false,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<IpPacket<'a>> {
        let header: &[u8; IPV6_HEADER] = bytes.first_chunk()?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let whole = bytes.get(..IPV6_HEADER + length)?;
        let address = |at: usize| {
            Some(IpAddr::V6(Ipv6Addr::from(
                *header.get(at..)?.first_chunk::<16>()?,
            )))
        };
        let mut packet = IpPacket {
            source: address(8)?,
            destination: address(24)?,
            protocol: header[6],
            hop_limit: header[7],
            payload: whole.get(IPV6_HEADER..)?,
            whole,
            fragment: None,
            extended: false,
        };
        loop {
            let payload = packet.payload;
            match packet.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    let length = (usize::from(*payload.get(1)?) + 1) * 8;
                    packet.protocol = *payload.first()?;
                    packet.payload = payload.get(length..)?;
                }
                FRAGMENT => {
                    let header: &[u8; 8] = payload.first_chunk()?;
                    let offset = u16::from_be_bytes([header[2], header[3]]);
                    packet.protocol = header[0];
                    packet.payload = payload.get(8..)?;
                    packet.extended = true;
                    let (offset, more) = (usize::from(offset & !7), offset & 1 != 0);
                    if offset != 0 || more {
                        packet.fragment = Some(Fragment {
                            identification: u32::from_be_bytes([
                                header[4], header[5], header[6], header[7],
                            ]),
                            offset,
                            more,
                        });
                        // What follows belongs to the whole, not to this part.
                        return Some(packet);
                    }
                }
                _ => return Some(packet),
            }
            packet.extended = true;
        }
    }
}

/// What stands in the header of a packet to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpHeader {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
}

impl IpHeader {
    /// Length of the header in bytes.
    pub(crate) fn length(&self) -> usize {
        header_length(&self.destination)
    }

    /// Writes the header of a whole packet with `payload` bytes behind it. `packet` holds at least the header.
    pub(crate) fn write(&self, packet: &mut [u8], payload: usize) {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let Some(header) = packet.first_chunk_mut::<IPV4_HEADER>() else {
                    return;
                };
                let total = u16::try_from(IPV4_HEADER + payload)
                    .unwrap_or(u16::MAX)
                    .to_be_bytes();
                *header = [0; IPV4_HEADER];
                header[0] = 0x45;
                header[2..4].copy_from_slice(&total);
                header[6] = 0x40; // do not fragment; overwritten for fragments
                header[8] = self.hop_limit;
                header[9] = self.protocol;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let sum = !checksum::of(header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let Some(header) = packet.first_chunk_mut::<IPV6_HEADER>() else {
                    return;
                };
                *header = [0; IPV6_HEADER];
                header[0] = 0x60;
                header[4..6]
                    .copy_from_slice(&u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
                header[6] = self.protocol;
                header[7] = self.hop_limit;
                header[8..24].copy_from_slice(&source.octets());
                header[24..40].copy_from_slice(&destination.octets());
            }
            // The callers choose both of one family.
            _ => {}
        }
    }

    /// The checksum of `payload` (a UDP, TCP or ICMPv6 message whose checksum field is zero) with the pseudo header.
    pub(crate) fn checksum(&self, payload: &[u8]) -> u16 {
        !self.sum(payload)
    }

    /// Whether the checksum in `payload` is right.
    pub(crate) fn verify(&self, payload: &[u8]) -> bool {
        self.sum(payload) == !0
    }

    /// The sum of the pseudo header and of `payload`.
    fn sum(&self, payload: &[u8]) -> u16 {
        let mut sum = pseudo_header(self.protocol, payload.len());
        for address in [&self.source, &self.destination] {
            sum = match address {
                IpAddr::V4(address) => checksum::add(sum, &address.octets()),
                IpAddr::V6(address) => checksum::add(sum, &address.octets()),
            };
        }
        checksum::finish(checksum::add(sum, payload))
    }
}

/// What the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) has beside the addresses, as a sum.
fn pseudo_header(protocol: u8, length: usize) -> u64 {
    u64::from((u32::from(protocol) + length as u32).to_be())
}

/// Fills the checksums of a TCP packet in, that of an IPv4 header included. Its header of `header` bytes is a plain one,
/// and both checksums are zero so far.
pub(crate) fn fill_tcp_checksums(packet: &mut [u8], header: usize) {
    // The addresses lie right before the payload.
    let addresses = if header == IPV4_HEADER { 12 } else { 8 };
    let (Some(summed), Some(length)) = (packet.get(addresses..), packet.len().checked_sub(header))
    else {
        return;
    };
    let sum = !checksum::finish(checksum::add(pseudo_header(TCP, length), summed));
    if let Some(field) = packet.get_mut(header + 16..header + 18) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    if let Some(header) = packet.first_chunk_mut::<IPV4_HEADER>()
        && header[0] >> 4 == 4
    {
        let sum = !checksum::of(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Length of the plain IP header of the address's family.
pub(crate) fn header_length(address: &IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => IPV4_HEADER,
        IpAddr::V6(_) => IPV6_HEADER,
    }
}

/// Source and destination port at the start of a UDP or TCP header.
pub(crate) fn ports(payload: &[u8]) -> Option<(u16, u16)> {
    let ports: &[u8; 4] = payload.first_chunk()?;
    Some((
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    ))
}

//! What comes over the link and the network.

use kiln_abi::link::{HEADER, ToKernel, ToMonitor, header, parse_header};
use kiln_network::{NetworkConfiguration, Reply, answer_dhcp, answer_dns, parse_question};
use kiln_tcpip::{Configuration, FrameSink, Moment, Stack};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Messages between kernel and monitor.
pub fn link(bytes: &[u8]) {
    if let Some(start) = bytes.first_chunk::<HEADER>() {
        let (channel, length) = parse_header(*start);
        assert_eq!(header(channel, length), *start);
    }
    if let Ok(message) = postcard::from_bytes::<ToMonitor>(bytes) {
        let again = postcard::to_allocvec(&message).expect("what was read can be written");
        assert_eq!(postcard::from_bytes::<ToMonitor>(&again), Ok(message));
    }
    if let Ok(message) = postcard::from_bytes::<ToKernel>(bytes) {
        let again = postcard::to_allocvec(&message).expect("what was read can be written");
        assert_eq!(postcard::from_bytes::<ToKernel>(&again), Ok(message));
    }
}

/// Some messages.
pub fn link_seeds() -> Vec<Vec<u8>> {
    let to = "[::1]:80".parse().expect("an address");
    [
        postcard::to_allocvec(&ToMonitor::Log("text".into())),
        postcard::to_allocvec(&ToMonitor::Connect {
            request: 7,
            from: None,
            to,
        }),
        postcard::to_allocvec(&ToKernel::Accepted {
            local: to,
            peer: to,
        }),
        postcard::to_allocvec(&ToKernel::Input(vec![1, 2, 3])),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Questions to the name server.
pub fn dns(bytes: &[u8]) {
    if let Some(question) = parse_question(bytes) {
        assert!(question.name.len() <= 4 * 255);
        let answer = answer_dns(bytes, &question, &Reply::Failure);
        assert!(answer.len() >= 12);
    }
}

/// A question for `a.kiln`.
pub fn dns_seeds() -> Vec<Vec<u8>> {
    vec![b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x04kiln\0\0\x01\0\x01".to_vec()]
}

/// Messages to the DHCP server.
pub fn dhcp(bytes: &[u8]) {
    let _ = answer_dhcp(&NetworkConfiguration::new(GUEST), bytes);
}

/// A DISCOVER.
pub fn dhcp_seeds() -> Vec<Vec<u8>> {
    let mut bytes = vec![1, 1, 6, 0, 1, 2, 3, 4];
    bytes.resize(28, 0);
    bytes.extend_from_slice(&GUEST);
    bytes.resize(236, 0);
    bytes.extend_from_slice(&[99, 130, 83, 99, 53, 1, 1, 55, 3, 1, 3, 6, 255]);
    vec![bytes]
}

/// Takes what a stack sends, and forgets it.
#[derive(Default)]
struct Nowhere(Vec<u8>);

impl FrameSink for Nowhere {
    fn has_room(&self) -> bool {
        true
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        self.0.resize(length, 0);
        Some(&mut self.0)
    }

    fn commit(&mut self) {}
}

/// Frames from the wire into a stack that listens, asks for an address and looks for routers. An input is a row of
/// frames, each behind its length (two bytes, big endian).
pub fn frames(bytes: &[u8]) {
    let mut stack = Stack::new(&Configuration {
        mac: GUEST,
        ..Configuration::default()
    });
    stack.add_address([10, 0, 0, 1].into(), 24);
    stack.add_address([0xfd00, 0, 0, 0, 0, 0, 0, 1].into(), 64);
    stack.start_dhcp(Some("kiln"));
    stack.start_router_discovery();
    let listener = stack.tcp_open();
    let _ = stack.tcp_bind(listener, ([0u16; 8], 80).into());
    let _ = stack.tcp_listen(listener, 4);
    let mut sink = Nowhere::default();
    let mut rest = bytes;
    let mut now = Moment::from_secs(1);
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(after.len());
        let (frame, after) = after.split_at(length);
        stack.receive(now, frame);
        stack.poll(now, &mut sink);
        while stack.next_event().is_some() {}
        now += Moment::from_millis(7);
        rest = after;
    }
    for _ in 0..4 {
        let Some(deadline) = stack.next_deadline() else {
            break;
        };
        now = now.max(deadline);
        stack.poll(now, &mut sink);
    }
}

/// An ARP question, an IPv4 echo request, a TCP SYN, a neighbour solicitation: the checksums are wrong here and there,
/// which is just as well.
pub fn frames_seeds() -> Vec<Vec<u8>> {
    let ethernet = |kind: u16, payload: &[u8]| {
        let mut frame = GUEST.to_vec();
        frame.extend_from_slice(&[2, 0, 0, 0, 0, 2]);
        frame.extend_from_slice(&kind.to_be_bytes());
        frame.extend_from_slice(payload);
        let mut row = (frame.len() as u16).to_be_bytes().to_vec();
        row.extend(frame);
        row
    };
    let checksum = |bytes: &[u8]| {
        let mut sum: u32 = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    };
    let ipv4 = |protocol: u8, payload: &[u8]| {
        let mut packet = vec![0x45, 0];
        packet.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
        packet.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
        let sum = checksum(&packet).to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
        packet.extend_from_slice(payload);
        packet
    };
    let arp = [
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1,
    ];
    let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 1, b'x', b'y'];
    let sum = checksum(&echo).to_be_bytes();
    echo[2..4].copy_from_slice(&sum);
    let mut segment = vec![
        0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 180,
    ];
    let mut pseudo = vec![10, 0, 0, 2, 10, 0, 0, 1, 0, 6, 0, segment.len() as u8];
    pseudo.extend_from_slice(&segment);
    let sum = checksum(&pseudo).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    let mut ipv6 = vec![0x60, 0, 0, 0, 0, 24, 58, 255, 0xfd, 0];
    ipv6.resize(23, 0);
    ipv6.extend_from_slice(&[2, 0xfd, 0]);
    ipv6.resize(39, 0);
    ipv6.extend_from_slice(&[1, 135, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0]);
    ipv6.resize(63, 0);
    ipv6.push(1);
    let frames = [
        ethernet(0x0806, &arp),
        ethernet(0x0800, &ipv4(1, &echo)),
        ethernet(0x0800, &ipv4(6, &segment)),
        ethernet(0x86dd, &ipv6),
    ];
    vec![frames.concat(), frames[2].repeat(3)]
}

//! Measures the path of `--net direct` alone: a guest's stack in this process that answers `PING` as redis does.
//!
//! Run `cargo run --release -p kiln-network --example pong -- 6400`, then
//! `redis-benchmark -p 6400 -t ping_mbulk -c 50 -n 200000 -q`, and the same against a redis-server.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kiln_abi::manifest::Protocol;
use kiln_network::{Checksums, FrameEnd, NetworkConfiguration, Publish, UserNetwork};
use kiln_tcpip::{Configuration, Event, FrameDecoder, FrameEncoder, SocketId, Stack};
use rustix::event::{PollFd, PollFlags, Timespec};

/// `*1\r\n$4\r\nPING\r\n`.
const QUESTION: usize = 14;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port = std::env::args()
        .nth(1)
        .and_then(|port| port.parse().ok())
        .unwrap_or(6400);
    let mut configuration = NetworkConfiguration::new([2, 0, 0, 0, 0, 9]);
    configuration.mtu = 65521;
    configuration.checksums = Checksums::Trusted;
    configuration.publish = vec![Publish {
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host: port,
        guest: 6379,
        protocol: Protocol::Tcp,
    }];
    let mut stack = Stack::new(&Configuration {
        mac: configuration.guest_mac,
        mtu: 65521,
        checksums: Checksums::Trusted,
        ..Configuration::default()
    });
    for (address, prefix) in configuration.static_network().addresses {
        stack.add_address(address, prefix);
    }
    let (mut stream, theirs) = UnixStream::pair()?;
    stream.set_nonblocking(true)?;
    let _network = UserNetwork::start(configuration, FrameEnd::Stream(theirs))?;
    let listener = stack.tcp_open();
    stack.tcp_bind(listener, SocketAddr::from(([0; 8], 6379)))?;
    stack.tcp_listen(listener, 511)?;
    let started = Instant::now();
    let (mut encoder, mut decoder) = (FrameEncoder::new(512 << 10), FrameDecoder::new(512 << 10));
    let mut owed: Vec<usize> = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let now = started.elapsed();
        stack.poll(now, &mut encoder);
        while let Some(event) = stack.next_event() {
            if event == Event::Ready(listener) {
                while let Ok(id) = stack.tcp_accept(listener) {
                    stack.tcp_set_no_delay(id, true)?;
                    answer(&mut stack, id, &mut owed, &mut buffer);
                }
            } else if let Event::Ready(id) = event {
                answer(&mut stack, id, &mut owed, &mut buffer);
            }
        }
        stack.poll(now, &mut encoder);
        let mut flags = PollFlags::IN;
        while !encoder.pending().is_empty() {
            match stream.write(encoder.pending()) {
                Ok(count) => encoder.sent(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    flags |= PollFlags::OUT;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let wait = stack
            .next_deadline()
            .map(|deadline| deadline.saturating_sub(started.elapsed()));
        let timeout = Timespec::try_from(wait.unwrap_or(Duration::from_secs(60)))?;
        rustix::event::poll(&mut [PollFd::new(&stream, flags)], Some(&timeout))?;
        match stream.read(decoder.space()) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                decoder.filled(count);
                let now = started.elapsed();
                while let Some(frame) = decoder.next_frame()? {
                    stack.receive(now, frame);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn answer(stack: &mut Stack, id: SocketId, owed: &mut Vec<usize>, buffer: &mut [u8]) {
    if owed.len() <= id.index() {
        owed.resize(id.index() + 1, 0);
    }
    loop {
        match stack.tcp_receive(id, buffer) {
            Ok(0) => {
                owed[id.index()] = 0;
                stack.close(id);
                return;
            }
            Ok(count) => owed[id.index()] += count,
            Err(kiln_tcpip::Error::WouldBlock) => break,
            Err(_) => {
                owed[id.index()] = 0;
                stack.close(id);
                return;
            }
        }
    }
    let answers = owed[id.index()] / QUESTION;
    owed[id.index()] %= QUESTION;
    let _ = stack.tcp_send(id, &b"+PONG\r\n".repeat(answers));
}

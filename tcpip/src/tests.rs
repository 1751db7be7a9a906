//! Two stacks and a wire between them, which may lose, repeat and reorder frames.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::*;
use proptest::prelude::*;

/// One direction of the wire.
#[derive(Default)]
pub(crate) struct Queue {
    frames: VecDeque<Vec<u8>>,
    reserved: Vec<u8>,
    room: Option<usize>,
}

impl FrameSink for Queue {
    fn has_room(&self) -> bool {
        self.room.is_none_or(|room| self.frames.len() < room)
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        self.reserved = vec![0xa5; length];
        Some(&mut self.reserved)
    }

    fn commit(&mut self) {
        self.frames.push_back(std::mem::take(&mut self.reserved));
    }
}

/// What the wire does to frames, in one of `n`; 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) lose: u64,
    pub(crate) repeat: u64,
    pub(crate) reorder: u64,
}

/// Two stacks: 0 is the client 10.0.0.1, 1 the server 10.0.0.2.
pub(crate) struct Pair {
    pub(crate) stacks: [Stack; 2],
    pub(crate) queues: [Queue; 2],
    pub(crate) now: Moment,
    pub(crate) faults: Faults,
    pub(crate) frames: usize,
    random: u64,
}

pub(crate) const CLIENT: [u8; 4] = [10, 0, 0, 1];
pub(crate) const SERVER: [u8; 4] = [10, 0, 0, 2];

impl Pair {
    pub(crate) fn new(configuration: &Configuration) -> Pair {
        let stack = |last: u8| {
            let configuration = Configuration {
                mac: [2, 0, 0, 0, 0, last],
                seed: u64::from(last),
                ..configuration.clone()
            };
            let mut stack = Stack::new(&configuration);
            stack.add_address(IpAddr::from([10, 0, 0, last]), 24);
            stack.add_address(
                IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]),
                64,
            );
            stack
        };
        Pair {
            stacks: [stack(1), stack(2)],
            queues: Default::default(),
            now: Duration::from_secs(1),
            faults: Faults::default(),
            frames: 0,
            random: 1,
        }
    }

    fn chance(&mut self, one_of: u64) -> bool {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        one_of != 0 && (self.random >> 33).is_multiple_of(one_of)
    }

    /// Carries frames until there are none; does not let time pass.
    pub(crate) fn exchange(&mut self) {
        loop {
            let mut any = false;
            for from in 0..2 {
                self.stacks[from].poll(self.now, &mut self.queues[from]);
                let mut frames = std::mem::take(&mut self.queues[from].frames);
                while let Some(frame) = frames.pop_front() {
                    any = true;
                    self.frames += 1;
                    if self.chance(self.faults.lose) {
                        continue;
                    }
                    if self.chance(self.faults.reorder) && !frames.is_empty() {
                        let at = (self.random >> 40) as usize % (frames.len() + 1);
                        frames.insert(at, frame);
                        self.faults.reorder += 1;
                        continue;
                    }
                    let to = 1 - from;
                    self.stacks[to].receive(self.now, &frame);
                    if self.chance(self.faults.repeat) {
                        self.stacks[to].receive(self.now, &frame);
                    }
                }
                let to = 1 - from;
                self.stacks[to].poll(self.now, &mut self.queues[to]);
            }
            if !any {
                break;
            }
        }
    }

    /// Lets time pass until the next deadline, at most `limit`.
    pub(crate) fn sleep(&mut self, limit: Duration) {
        let deadline = self.stacks.iter().filter_map(Stack::next_deadline).min();
        let end = self.now + limit;
        self.now = deadline.map_or(end, |deadline| {
            deadline.clamp(self.now + Duration::from_micros(1), end)
        });
    }

    /// Exchanges and sleeps until `done`, for at most `limit`.
    pub(crate) fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Pair) -> bool) -> bool {
        let end = self.now + limit;
        loop {
            self.exchange();
            if done(self) {
                return true;
            }
            if self.now >= end {
                return false;
            }
            self.sleep(end - self.now);
        }
    }

    pub(crate) fn listen(&mut self, port: u16) -> SocketId {
        let listener = self.stacks[1].tcp_open();
        self.stacks[1]
            .tcp_bind(listener, SocketAddr::from(([0u16; 8], port)))
            .unwrap();
        self.stacks[1].tcp_listen(listener, 128).unwrap();
        listener
    }

    pub(crate) fn connect(&mut self, listener: SocketId, to: SocketAddr) -> (SocketId, SocketId) {
        let client = self.stacks[0].tcp_open();
        self.stacks[0].tcp_connect(client, to).unwrap();
        let mut server = None;
        assert!(self.run(Duration::from_secs(100), |pair| {
            server = server.or(pair.stacks[1].tcp_accept(listener).ok());
            server.is_some()
                && pair.stacks[0]
                    .readiness(client)
                    .contains(Readiness::CONNECTED)
        }));
        (client, server.unwrap())
    }
}

fn server_address(port: u16) -> SocketAddr {
    SocketAddr::from((SERVER, port))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// Sends `data` from the client, echoes nothing, and returns what the server got until the end of the stream.
fn transfer(
    pair: &mut Pair,
    client: SocketId,
    server: SocketId,
    data: &[u8],
    limit: Duration,
) -> Vec<u8> {
    let (mut sent, mut got, mut ended) = (0, Vec::new(), false);
    let mut buffer = vec![0; 10_000];
    pair.run(limit, |pair| {
        while sent < data.len() {
            match pair.stacks[0].tcp_send(client, &data[sent..]) {
                Ok(count) => sent += count,
                Err(Error::WouldBlock) => break,
                Err(error) => panic!("{error}"),
            }
            if sent == data.len() {
                pair.stacks[0]
                    .tcp_shutdown(client, Shutdown::Write)
                    .unwrap();
            }
        }
        loop {
            match pair.stacks[1].tcp_receive(server, &mut buffer) {
                Ok(0) => {
                    ended = true;
                    break;
                }
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(Error::WouldBlock) => break,
                Err(error) => panic!("{error}"),
            }
        }
        ended
    });
    assert!(
        ended,
        "the stream ends; {sent} sent, {} got; states {:?} {:?}; deadlines {:?} {:?} at {:?}; error {:?}",
        got.len(),
        pair.stacks[0].tcp_state(client),
        pair.stacks[1].tcp_state(server),
        pair.stacks[0].next_deadline(),
        pair.stacks[1].next_deadline(),
        pair.now,
        pair.stacks[0].take_error(client),
    );
    got
}

#[test]
fn data_goes_both_ways_over_both_families() {
    for address in [server_address(80), "[fd00::2]:80".parse().unwrap()] {
        let mut pair = Pair::new(&Configuration::default());
        let listener = pair.listen(80);
        let (client, server) = pair.connect(listener, address);
        assert_eq!(pair.stacks[1].tcp_local_address(server), Some(address));
        assert_eq!(
            pair.stacks[1].tcp_remote_address(server),
            pair.stacks[0].tcp_local_address(client)
        );
        let data = pattern(300_000);
        assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(10)) == data);
        // Half closed: the other direction still works.
        assert_eq!(pair.stacks[1].tcp_send(server, b"answer"), Ok(6));
        pair.exchange();
        let mut buffer = [0; 100];
        assert_eq!(pair.stacks[0].tcp_peek(client, &mut buffer), Ok(6));
        assert_eq!(pair.stacks[0].tcp_receive(client, &mut buffer), Ok(6));
        assert_eq!(&buffer[..6], b"answer");
        pair.stacks[1].close(server);
        pair.exchange();
        assert_eq!(pair.stacks[0].tcp_receive(client, &mut buffer), Ok(0));
        pair.stacks[0].close(client);
        pair.run(Duration::from_secs(300), |_| false);
        // Everything is gone, but the listener; TIME-WAIT is over.
        assert_eq!(pair.stacks[0].tcp_held(), (0, 0, 0, 0));
        assert_eq!(pair.stacks[1].tcp_held(), (1, 0, 0, 0));
        assert_eq!(pair.stacks[0].next_deadline(), None);
        assert_eq!(pair.stacks[1].next_deadline(), None);
    }
}

#[test]
fn data_survives_loss_repetition_and_disorder() {
    for faults in [
        Faults {
            lose: 20,
            ..Faults::default()
        },
        Faults {
            repeat: 5,
            ..Faults::default()
        },
        Faults {
            reorder: 4,
            ..Faults::default()
        },
        Faults {
            lose: 30,
            repeat: 10,
            reorder: 10,
        },
    ] {
        let mut pair = Pair::new(&Configuration::default());
        pair.faults = faults;
        let listener = pair.listen(80);
        let (client, server) = pair.connect(listener, server_address(80));
        let data = pattern(200_000);
        assert!(
            transfer(&mut pair, client, server, &data, Duration::from_secs(4000)) == data,
            "{faults:?}"
        );
    }
}

#[test]
fn large_frames_need_few_segments() {
    let configuration = Configuration {
        mtu: 65521,
        checksums: Checksums::Trusted,
        ..Configuration::default()
    };
    let mut pair = Pair::new(&configuration);
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    let before = pair.frames;
    let data = pattern(10 << 20);
    assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(10)) == data);
    assert!(
        pair.frames - before < 800,
        "{} frames for 10 MiB",
        pair.frames - before
    );
}

#[test]
fn a_buffer_smaller_than_a_segment_does_not_stall() {
    let mut pair = Pair::new(&Configuration {
        mtu: 65521,
        buffer_maximum: 64 << 10,
        ..Configuration::default()
    });
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    let (data, start) = (pattern(10 << 20), pair.now);
    assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(100)) == data);
    assert!(
        pair.now - start < Duration::from_millis(50),
        "{:?}",
        pair.now - start
    );
}

#[test]
fn an_answer_carries_the_acknowledgement() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    pair.run(Duration::from_millis(100), |_| false);
    let before = pair.frames;
    for _ in 0..100 {
        pair.stacks[0].tcp_send(client, b"question").unwrap();
        pair.exchange();
        assert_eq!(pair.stacks[1].tcp_receive(server, &mut [0; 100]), Ok(8));
        pair.stacks[1].tcp_send(server, b"answer").unwrap();
        pair.exchange();
        assert_eq!(pair.stacks[0].tcp_receive(client, &mut [0; 100]), Ok(6));
    }
    assert_eq!(pair.frames - before, 200);
    let acknowledged = pair.now;
    assert!(pair.run(
        Duration::from_millis(50),
        |pair| pair.stacks[1].tcp_queues(server).1 == 0
    ));
    assert!(pair.now - acknowledged <= Duration::from_millis(11));
}

#[test]
fn a_closed_port_refuses() {
    let mut pair = Pair::new(&Configuration::default());
    let client = pair.stacks[0].tcp_open();
    pair.stacks[0]
        .tcp_connect(client, server_address(81))
        .unwrap();
    pair.exchange();
    assert!(pair.stacks[0].readiness(client).contains(Readiness::ERROR));
    assert_eq!(
        pair.stacks[0].take_error(client),
        Some(Error::ConnectionRefused)
    );
    pair.stacks[0].close(client);
    assert_eq!(pair.stacks[0].tcp_held(), (0, 0, 0, 0));
}

#[test]
fn an_absent_neighbour_is_unreachable() {
    let mut pair = Pair::new(&Configuration::default());
    for address in ["10.0.0.77:80", "[fd00::77]:80"] {
        let client = pair.stacks[0].tcp_open();
        pair.stacks[0]
            .tcp_connect(client, address.parse().unwrap())
            .unwrap();
        assert!(pair.run(Duration::from_secs(5), |pair| {
            pair.stacks[0].readiness(client).contains(Readiness::ERROR)
        }));
        assert_eq!(
            pair.stacks[0].take_error(client),
            Some(Error::HostUnreachable)
        );
        pair.stacks[0].close(client);
    }
    let client = pair.stacks[0].tcp_open();
    assert_eq!(
        pair.stacks[0].tcp_connect(client, "192.0.2.1:80".parse().unwrap()),
        Err(Error::NetworkUnreachable)
    );
    assert_eq!(pair.stacks[0].tcp_held().1, 0);
}

#[test]
fn an_abort_resets_the_other_end_and_data_before_it_is_kept() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    pair.stacks[0].tcp_send(client, b"last words").unwrap();
    pair.exchange();
    pair.stacks[0].tcp_abort(client).unwrap();
    pair.stacks[0].close(client);
    pair.exchange();
    let mut buffer = [0; 100];
    assert_eq!(pair.stacks[1].tcp_receive(server, &mut buffer), Ok(10));
    assert_eq!(
        pair.stacks[1].tcp_receive(server, &mut buffer),
        Err(Error::ConnectionReset)
    );
    assert_eq!(pair.stacks[1].tcp_receive(server, &mut buffer), Ok(0));
    assert_eq!(
        pair.stacks[1].tcp_send(server, b"x"),
        Err(Error::BrokenPipe)
    );
    pair.stacks[1].close(server);
    assert_eq!(pair.stacks[1].tcp_held(), (1, 0, 0, 0));
    assert_eq!(pair.stacks[0].tcp_held(), (0, 0, 0, 0));
}

#[test]
fn closing_with_unread_data_resets() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    pair.stacks[0].tcp_send(client, b"never read").unwrap();
    pair.exchange();
    pair.stacks[1].close(server);
    pair.exchange();
    assert_eq!(
        pair.stacks[0].take_error(client),
        Some(Error::ConnectionReset)
    );
}

#[test]
fn the_loopback_needs_no_link() {
    let mut pair = Pair::new(&Configuration::default());
    let stack = &mut pair.stacks[0];
    let listener = stack.tcp_open();
    stack
        .tcp_bind(listener, SocketAddr::from(([0u16; 8], 8080)))
        .unwrap();
    stack.tcp_listen(listener, 1).unwrap();
    for address in [
        "127.0.0.1:8080",
        "127.1.2.3:8080",
        "10.0.0.1:8080",
        "[::1]:8080",
        "[fd00::1]:8080",
        "0.0.0.0:8080",
    ] {
        let stack = &mut pair.stacks[0];
        let client = stack.tcp_open();
        stack.tcp_connect(client, address.parse().unwrap()).unwrap();
        stack.poll(pair.now, &mut pair.queues[0]);
        let server = stack.tcp_accept(listener).unwrap();
        assert_eq!(stack.tcp_send(client, &[7; 50_000]), Ok(50_000));
        stack.poll(pair.now, &mut pair.queues[0]);
        assert_eq!(stack.tcp_receive(server, &mut [0; 60_000]), Ok(50_000));
        stack.close(client);
        stack.close(server);
        stack.poll(pair.now, &mut pair.queues[0]);
    }
    assert!(pair.queues[0].frames.is_empty());
}

#[test]
fn addresses_are_taken_by_linux_rules() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    let stack = &mut pair.stacks[1];
    let other = stack.tcp_open();
    assert_eq!(
        stack.tcp_bind(other, SocketAddr::from(([0; 4], 80))),
        Err(Error::AddressInUse)
    );
    stack.tcp_set_reuse_address(other, true).unwrap();
    assert_eq!(
        stack.tcp_bind(other, SocketAddr::from(([0; 4], 80))),
        Err(Error::AddressInUse)
    );
    stack.close(listener);
    // The accepted connection still uses the port.
    let third = stack.tcp_open();
    assert_eq!(
        stack.tcp_bind(third, SocketAddr::from(([0; 4], 80))),
        Err(Error::AddressInUse)
    );
    assert_eq!(
        stack.tcp_bind(other, SocketAddr::from(([0; 4], 80))),
        Ok(())
    );
    assert_eq!(
        stack.tcp_bind(third, "10.0.0.99:1".parse().unwrap()),
        Err(Error::AddressNotAvailable)
    );
    assert_eq!(stack.tcp_bind(third, SocketAddr::from(([0; 4], 0))), Ok(()));
    assert!(stack.tcp_local_address(third).unwrap().port() >= 32768);
    let _ = (client, server);
}

#[test]
fn an_intercepted_connection_waits_for_the_owner() {
    let mut pair = Pair::new(&Configuration {
        intercept: true,
        ..Configuration::default()
    });
    pair.stacks[0].set_gateway(IpAddr::from(SERVER));
    for admit in [true, false] {
        let client = pair.stacks[0].tcp_open();
        pair.stacks[0]
            .tcp_connect(client, "198.51.100.7:443".parse().unwrap())
            .unwrap();
        pair.exchange();
        let mut intercepted = None;
        while let Some(event) = pair.stacks[1].next_event() {
            if let Event::Intercepted(id) = event {
                intercepted = Some(id);
            }
        }
        let server = intercepted.unwrap();
        assert_eq!(
            pair.stacks[1].tcp_local_address(server),
            Some("198.51.100.7:443".parse().unwrap())
        );
        assert!(
            !pair.stacks[0]
                .readiness(client)
                .contains(Readiness::CONNECTED)
        );
        if admit {
            pair.stacks[1].tcp_admit(server).unwrap();
            pair.exchange();
            assert!(
                pair.stacks[0]
                    .readiness(client)
                    .contains(Readiness::CONNECTED)
            );
            let data = pattern(100_000);
            assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(10)) == data);
        } else {
            pair.stacks[1].tcp_abort(server).unwrap();
            pair.stacks[1].close(server);
            pair.exchange();
            assert_eq!(
                pair.stacks[0].take_error(client),
                Some(Error::ConnectionRefused)
            );
        }
    }
    assert_eq!(pair.stacks[1].tcp_held().2, 0);
}

#[test]
fn a_flood_of_half_open_connections_is_bounded() {
    let mut pair = Pair::new(&Configuration {
        half_open_maximum: 50,
        ..Configuration::default()
    });
    let _listener = pair.listen(80);
    // Connect, and drop all that comes back.
    pair.stacks[1].add_neighbour(IpAddr::from(CLIENT), [2, 0, 0, 0, 0, 1]);
    for _ in 0..500 {
        let client = pair.stacks[0].tcp_open();
        pair.stacks[0]
            .tcp_connect(client, server_address(80))
            .unwrap();
    }
    pair.stacks[0].add_neighbour(IpAddr::from(SERVER), [2, 0, 0, 0, 0, 2]);
    pair.stacks[0].poll(pair.now, &mut pair.queues[0]);
    for frame in std::mem::take(&mut pair.queues[0].frames) {
        pair.stacks[1].receive(pair.now, &frame);
    }
    pair.stacks[1].poll(pair.now, &mut pair.queues[1]);
    pair.queues[1].frames.clear();
    assert_eq!(pair.stacks[1].tcp_held().2, 50);
    // After a while without an answer they are gone.
    for _ in 0..2000 {
        let Some(deadline) = pair.stacks[1].next_deadline() else {
            break;
        };
        pair.now = pair.now.max(deadline);
        pair.stacks[1].poll(pair.now, &mut pair.queues[1]);
        pair.queues[1].frames.clear();
    }
    assert_eq!(pair.stacks[1].tcp_held(), (1, 0, 0, 0));
}

#[test]
fn a_full_sink_loses_nothing() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    pair.queues[0].room = Some(2);
    let data = pattern(500_000);
    let start = pair.now;
    assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(10)) == data);
    assert!(
        pair.now - start < Duration::from_millis(500),
        "no retransmission was needed"
    );
}

#[test]
fn edge_triggered_waiting_misses_nothing() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    while pair.stacks[1].next_event().is_some() {}
    for _ in 0..3 {
        pair.stacks[0].tcp_send(client, b"more").unwrap();
        pair.run(Duration::from_millis(50), |_| false);
        assert_eq!(pair.stacks[1].next_event(), Some(Event::Ready(server)));
        assert_eq!(pair.stacks[1].next_event(), None);
    }
    // Fill the pipe, then drain it: the writer hears of it.
    while pair.stacks[0].tcp_send(client, &[0; 100_000]).is_ok() {
        pair.run(Duration::from_millis(50), |_| false);
    }
    while pair.stacks[0].next_event().is_some() {}
    assert!(
        !pair.stacks[0]
            .readiness(client)
            .contains(Readiness::WRITABLE)
    );
    while pair.stacks[1]
        .tcp_receive(server, &mut [0; 100_000])
        .is_ok()
    {
        pair.exchange();
    }
    assert_eq!(pair.stacks[0].next_event(), Some(Event::Ready(client)));
    assert!(
        pair.stacks[0]
            .readiness(client)
            .contains(Readiness::WRITABLE)
    );
}

#[test]
fn unread_data_outlives_time_wait() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, server) = pair.connect(listener, server_address(80));
    pair.stacks[0]
        .tcp_shutdown(client, Shutdown::Write)
        .unwrap();
    pair.stacks[1].tcp_send(server, b"late").unwrap();
    pair.exchange();
    pair.stacks[1].close(server);
    pair.run(Duration::from_secs(300), |_| false);
    let mut buffer = [0; 10];
    assert_eq!(pair.stacks[0].tcp_receive(client, &mut buffer), Ok(4));
    pair.run(Duration::from_secs(300), |_| false);
    assert_eq!(pair.stacks[0].tcp_receive(client, &mut buffer), Ok(0));
    pair.stacks[0].close(client);
    pair.run(Duration::from_secs(300), |_| false);
    assert_eq!(pair.stacks[0].tcp_held(), (0, 0, 0, 0));
}

#[test]
fn keep_alive_finds_a_dead_peer() {
    let mut pair = Pair::new(&Configuration::default());
    let listener = pair.listen(80);
    let (client, _server) = pair.connect(listener, server_address(80));
    let keep = KeepAlive {
        idle: Duration::from_secs(10),
        interval: Duration::from_secs(5),
        count: 3,
    };
    pair.stacks[0]
        .tcp_configure(client, false, Some(keep), None)
        .unwrap();
    pair.run(Duration::from_secs(600), |_| false);
    assert!(
        !pair.stacks[0].readiness(client).contains(Readiness::ERROR),
        "a living peer answers"
    );
    pair.faults.lose = 1;
    assert!(pair.run(Duration::from_secs(60), |pair| {
        pair.stacks[0].readiness(client).contains(Readiness::ERROR)
    }));
    assert_eq!(pair.stacks[0].take_error(client), Some(Error::TimedOut));
}

fn datagram_pair(pair: &mut Pair, address: SocketAddr) -> (SocketId, SocketId) {
    let server = pair.stacks[1].datagram_open(DatagramKind::Udp);
    pair.stacks[1]
        .datagram_bind(server, SocketAddr::from(([0u16; 8], address.port())))
        .unwrap();
    let client = pair.stacks[0].datagram_open(DatagramKind::Udp);
    pair.stacks[0]
        .datagram_connect(client, Some(address))
        .unwrap();
    (client, server)
}

#[test]
fn datagrams_of_all_sizes_go_both_ways() {
    for (address, checksums) in [
        ("10.0.0.2:53", Checksums::Software),
        ("[fd00::2]:53", Checksums::Trusted),
    ] {
        let mut pair = Pair::new(&Configuration {
            checksums,
            ..Configuration::default()
        });
        let (client, server) = datagram_pair(&mut pair, address.parse().unwrap());
        for size in [0, 1, 1000, 1472, 1473, 8192, 65507] {
            let data = pattern(size);
            assert_eq!(pair.stacks[0].datagram_send(client, None, &data), Ok(size));
            pair.faults.reorder = 3;
            pair.exchange();
            assert_eq!(pair.stacks[1].next_event(), Some(Event::Ready(server)));
            let got = pair.stacks[1].datagram_receive(server).unwrap();
            assert!(got.data == data, "{size} bytes to {address}");
            assert_eq!(got.destination, address.parse().unwrap());
            assert_eq!(
                pair.stacks[1].datagram_send(server, Some(got.source), &data),
                Ok(size)
            );
            pair.exchange();
            assert!(pair.stacks[0].datagram_receive(client).unwrap().data == data);
        }
        assert_eq!(
            pair.stacks[0].datagram_send(client, None, &pattern(65508)),
            Err(Error::MessageTooLong)
        );
        assert_eq!(
            pair.stacks[0].datagram_receive(client),
            Err(Error::WouldBlock)
        );
    }
}

#[test]
fn a_closed_port_refuses_datagrams() {
    for address in ["10.0.0.2:54", "[fd00::2]:54", "127.0.0.1:54", "[::1]:54"] {
        let mut pair = Pair::new(&Configuration::default());
        let client = pair.stacks[0].datagram_open(DatagramKind::Udp);
        pair.stacks[0]
            .datagram_connect(client, Some(address.parse().unwrap()))
            .unwrap();
        pair.stacks[0].datagram_send(client, None, b"?").unwrap();
        pair.exchange();
        assert_eq!(pair.stacks[0].next_event(), Some(Event::Ready(client)));
        assert_eq!(
            pair.stacks[0].take_error(client),
            Some(Error::ConnectionRefused),
            "{address}"
        );
    }
}

#[test]
fn queues_of_datagrams_are_bounded() {
    let mut pair = Pair::new(&Configuration::default());
    let (client, server) = datagram_pair(&mut pair, "10.0.0.2:53".parse().unwrap());
    pair.stacks[0].add_neighbour(IpAddr::from(SERVER), [2, 0, 0, 0, 0, 2]);
    let mut sent = 0;
    pair.queues[0].room = Some(0);
    while pair.stacks[0]
        .datagram_send(client, None, &[0; 1000])
        .is_ok()
    {
        sent += 1;
        assert!(sent < 10_000);
    }
    pair.stacks[0].poll(pair.now, &mut pair.queues[0]);
    assert_eq!(
        pair.stacks[0].next_deadline(),
        None,
        "there is nothing to do without room"
    );
    assert!(
        !pair.stacks[0]
            .readiness(client)
            .contains(Readiness::WRITABLE)
    );
    pair.queues[0].room = None;
    pair.exchange();
    assert_eq!(pair.stacks[0].next_event(), Some(Event::Ready(client)));
    let mut got = 0;
    while pair.stacks[1].datagram_receive(server).is_ok() {
        got += 1;
    }
    assert!((100..sent).contains(&got), "{got}");
}

#[test]
fn echo_is_answered_and_heard() {
    for address in ["10.0.0.2", "fd00::2", "127.0.0.1", "::1"] {
        let address: IpAddr = address.parse().unwrap();
        let mut pair = Pair::new(&Configuration::default());
        let client = pair.stacks[0].datagram_open(DatagramKind::Echo);
        let kind = if address.is_ipv4() { 8 } else { 128 };
        let mut request = vec![kind, 0, 0, 0, 0, 0, 0, 9];
        request.extend_from_slice(&pattern(3000));
        pair.stacks[0]
            .datagram_send(client, Some(SocketAddr::new(address, 0)), &request)
            .unwrap();
        pair.exchange();
        let answer = pair.stacks[0].datagram_receive(client).unwrap();
        assert_eq!(answer.source.ip(), address);
        assert_eq!(answer.data[0], if address.is_ipv4() { 0 } else { 129 });
        assert_eq!(answer.data[6..], request[6..]);
    }
}

#[test]
fn a_gateway_takes_and_answers_for_others() {
    let mut pair = Pair::new(&Configuration {
        intercept: true,
        ..Configuration::default()
    });
    pair.stacks[0].set_gateway(IpAddr::from(SERVER));
    let client = pair.stacks[0].datagram_open(DatagramKind::Udp);
    let far: SocketAddr = "198.51.100.7:123".parse().unwrap();
    pair.stacks[0].datagram_connect(client, Some(far)).unwrap();
    pair.stacks[0]
        .datagram_send(client, None, b"time?")
        .unwrap();
    pair.exchange();
    let taken = pair.stacks[1].next_intercepted().unwrap();
    assert_eq!((taken.destination, &taken.data[..]), (far, &b"time?"[..]));
    let answer = Datagram {
        kind: DatagramKind::Udp,
        source: far,
        destination: taken.source,
        data: b"late".to_vec(),
    };
    assert!(pair.stacks[1].send_datagram(&answer));
    pair.exchange();
    assert_eq!(
        pair.stacks[0].datagram_receive(client).unwrap().data,
        b"late"
    );
    pair.stacks[1].refuse_datagram(taken.source, far);
    pair.exchange();
    assert_eq!(
        pair.stacks[0].datagram_receive(client),
        Err(Error::ConnectionRefused)
    );
    // A connection that cannot be made: the client hears why.
    let client = pair.stacks[0].tcp_open();
    pair.stacks[0]
        .tcp_connect(client, "198.51.100.7:443".parse().unwrap())
        .unwrap();
    pair.exchange();
    while let Some(event) = pair.stacks[1].next_event() {
        if let Event::Intercepted(id) = event {
            pair.stacks[1]
                .tcp_refuse(id, Error::HostUnreachable)
                .unwrap();
        }
    }
    pair.exchange();
    assert_eq!(
        pair.stacks[0].take_error(client),
        Some(Error::HostUnreachable)
    );
    assert_eq!(pair.stacks[1].tcp_held(), (0, 0, 0, 0));
}

#[test]
fn a_router_gives_an_address() {
    let mut pair = Pair::new(&Configuration::default());
    let server = "fd77::53".parse().unwrap();
    pair.stacks[1].advertise(Advertisement {
        prefix: "fd77::".parse().unwrap(),
        prefix_length: 64,
        name_servers: vec![server],
        mtu: 1500,
    });
    pair.stacks[0].start_router_discovery();
    pair.exchange();
    assert_eq!(pair.stacks[0].next_event(), Some(Event::Configured));
    assert_eq!(pair.stacks[0].next_event(), None);
    let own: IpAddr = "fd77::ff:fe00:1".parse().unwrap();
    assert!(
        pair.stacks[0].addresses().contains(&Address {
            address: own,
            prefix: 64
        }),
        "{:?}",
        pair.stacks[0].addresses()
    );
    assert_eq!(pair.stacks[0].name_servers(), [IpAddr::V6(server)]);
    // And a way out: the router's link-local address.
    let client = pair.stacks[0].datagram_open(DatagramKind::Udp);
    assert_eq!(
        pair.stacks[0].datagram_connect(client, Some("[2001:db8::1]:1".parse().unwrap())),
        Ok(())
    );
}

/// Opens `count` connections, then measures the time of one request and answer on each of a few of them.
fn time_per_request(count: usize) -> (Duration, usize) {
    let configuration = Configuration {
        checksums: Checksums::Trusted,
        buffer_budget: 64 << 20,
        ..Configuration::default()
    };
    let mut pair = Pair::new(&configuration);
    let listener = pair.listen(80);
    pair.stacks[1].tcp_listen(listener, count).unwrap();
    let mut connections = Vec::new();
    while connections.len() < count {
        connections.push(pair.connect(listener, server_address(80)));
    }
    while pair.stacks[0].next_event().is_some() || pair.stacks[1].next_event().is_some() {}
    pair.run(Duration::from_secs(1), |_| false);
    assert_eq!(
        pair.stacks[0].next_deadline(),
        None,
        "idle connections have no timer"
    );
    let mut best = Duration::MAX;
    for round in 0..20 {
        let started = std::time::Instant::now();
        for step in 0..500 {
            let (client, server) = connections[(step * 7919 + round) % 10 * (count / 10)];
            pair.stacks[0]
                .tcp_send(client, b"GET / HTTP/1.1\r\n\r\n")
                .unwrap();
            pair.exchange();
            assert_eq!(pair.stacks[1].tcp_receive(server, &mut [0; 100]), Ok(18));
            pair.stacks[1]
                .tcp_send(server, b"HTTP/1.1 200 OK\r\n\r\n")
                .unwrap();
            pair.exchange();
            assert_eq!(pair.stacks[0].tcp_receive(client, &mut [0; 100]), Ok(19));
        }
        best = best.min(started.elapsed());
    }
    (best / 500, pair.stacks[1].tcp_held().3)
}

#[test]
fn the_cost_of_a_packet_does_not_grow_with_the_connections() {
    let (few, _) = time_per_request(10);
    let (many, bytes) = time_per_request(10_000);
    let ratio = many.as_secs_f64() / few.as_secs_f64();
    println!(
        "one request and answer: {few:?} with 10 connections, {many:?} with 10,000: {ratio:.2} times"
    );
    println!(
        "buffers of 10,000 connections at one end: {} MiB",
        bytes >> 20
    );
    // A walk over all connections would make it hundreds of times as dear; cold caches, on a busy machine, nearly twice.
    assert!(
        ratio < 4.0,
        "{few:?} with 10 connections, {many:?} with 10,000"
    );
    assert!(bytes < 200 << 20);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_faults_and_sizes_give_the_right_stream(lose in 8u64..60, repeat in 3u64..60, reorder in 3u64..60,
                                                  size in 0usize..60_000, mtu in 1280usize..9000) {
        let mut pair = Pair::new(&Configuration { mtu, ..Configuration::default() });
        pair.faults = Faults { lose, repeat, reorder };
        let listener = pair.listen(80);
        let (client, server) = pair.connect(listener, server_address(80));
        let data = pattern(size);
        prop_assert!(transfer(&mut pair, client, server, &data, Duration::from_secs(20_000)) == data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_frame_makes_the_stack_panic(kind in 0usize..4, body in proptest::collection::vec(any::<u8>(), 0..200), flags: u8) {
        let mut pair = Pair::new(&Configuration { checksums: Checksums::Trusted, intercept: true, ..Configuration::default() });
        let _listener = pair.listen(80);
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        let length = body.len() as u16;
        match kind {
            0 => frame.extend_from_slice(&body),
            1 => {
                frame.extend_from_slice(&[8, 0, 0x45, 0]);
                frame.extend_from_slice(&(length + 20).to_be_bytes());
                frame.extend_from_slice(&[0, 0, flags & 0x3f, 0, 64, [1, 6, 17, 2][usize::from(flags >> 6)], 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
                frame.extend_from_slice(&body);
            }
            2 => {
                frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend_from_slice(&length.to_be_bytes());
                frame.extend_from_slice(&[[58, 6, 17, 44][usize::from(flags >> 6)], 255]);
                frame.extend_from_slice(&"fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
                frame.extend_from_slice(&"fd00::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
                frame.extend_from_slice(&body);
            }
            _ => {
                frame.extend_from_slice(&[8, 6]);
                frame.extend_from_slice(&body);
            }
        }
        pair.stacks[1].receive(pair.now, &frame);
        pair.run(Duration::from_secs(1), |_| false);
    }
}

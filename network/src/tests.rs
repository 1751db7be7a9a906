//! A guest's stack at the other end of the frames, and the host's sockets on this machine's loopback.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kiln_abi::manifest::Protocol;
use kiln_tcpip::{
    Checksums, Configuration, DatagramKind, Error, FrameDecoder, FrameEncoder, Readiness, Shutdown,
    SocketId, Stack,
};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::*;

const LIMIT: Duration = Duration::from_secs(20);

/// The guest's side.
struct Guest {
    stack: Stack,
    stream: UnixStream,
    encoder: FrameEncoder,
    decoder: FrameDecoder,
    started: Instant,
}

impl Guest {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn write(&mut self) -> bool {
        self.stack.poll(self.started.elapsed(), &mut self.encoder);
        while !self.encoder.pending().is_empty() {
            match self.stream.write(self.encoder.pending()) {
                Ok(count) => self.encoder.sent(count),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        false
    }

    /// Moves frames once, waiting for some if there are none.
    fn step(&mut self) {
        let blocked = self.write();
        let mut flags = PollFlags::IN;
        if blocked {
            flags |= PollFlags::OUT;
        }
        let wait = self
            .stack
            .next_deadline()
            .map_or(Duration::from_millis(20), |deadline| {
                deadline
                    .saturating_sub(self.now())
                    .min(Duration::from_millis(20))
            });
        let timeout = Timespec::try_from(wait).unwrap();
        rustix::event::poll(&mut [PollFd::new(&self.stream, flags)], Some(&timeout)).unwrap();
        while let Ok(count) = self.stream.read(self.decoder.space()) {
            if count == 0 {
                break;
            }
            self.decoder.filled(count);
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                self.stack.receive(self.started.elapsed(), frame);
            }
            if count < 4096 {
                break;
            }
        }
        self.write();
    }

    fn until<T>(&mut self, mut done: impl FnMut(&mut Stack) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(value) = done(&mut self.stack) {
                self.write();
                return value;
            }
            assert!(Instant::now() < end, "it takes too long");
            self.step();
        }
    }

    fn connect(&mut self, to: SocketAddr) -> Result<SocketId, Error> {
        let id = self.stack.tcp_open();
        self.stack.tcp_connect(id, to)?;
        self.until(|stack| {
            let ready = stack.readiness(id);
            if ready.contains(Readiness::ERROR) {
                return Some(Err(stack.take_error(id).unwrap()));
            }
            ready.contains(Readiness::CONNECTED).then_some(Ok(id))
        })
    }

    fn listen(&mut self, port: u16) -> SocketId {
        let id = self.stack.tcp_open();
        self.stack
            .tcp_bind(id, SocketAddr::from(([0; 8], port)))
            .unwrap();
        self.stack.tcp_listen(id, 511).unwrap();
        id
    }
}

fn start(mut change: impl FnMut(&mut NetworkConfiguration)) -> (Guest, UserNetwork) {
    let mut configuration = NetworkConfiguration::new([2, 0, 0, 0, 0, 9]);
    configuration.mtu = 65521;
    configuration.checksums = Checksums::Trusted;
    configuration.resolvers = Some(Vec::new());
    change(&mut configuration);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut stack = Stack::new(&Configuration {
        mac: configuration.guest_mac,
        mtu: usize::from(configuration.mtu),
        checksums: configuration.checksums,
        seed: 7,
        ..Configuration::default()
    });
    for (address, prefix) in configuration.static_network().addresses {
        stack.add_address(address, prefix);
    }
    for gateway in configuration.static_network().gateways {
        stack.set_gateway(gateway);
    }
    let network = UserNetwork::start(configuration, FrameEnd::Stream(theirs)).unwrap();
    let guest = Guest {
        stack,
        stream: ours,
        encoder: FrameEncoder::new(512 << 10),
        decoder: FrameDecoder::new(512 << 10),
        started: Instant::now(),
    };
    (guest, network)
}

fn publish(guest: u16, protocol: Protocol) -> Publish {
    Publish {
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host: 0,
        guest,
        protocol,
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// A host's server that sends back all that it gets, then closes.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                let mut copy = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut copy);
            });
        }
    });
    address
}

#[test]
fn the_guest_is_configured_by_dhcp_and_advertisement() {
    let (mut guest, _network) = start(|configuration| {
        configuration.mtu = 1500;
        configuration.checksums = Checksums::Software;
        configuration.hostname = Some("web".into());
    });
    let addresses: Vec<_> = guest.stack.addresses().to_vec();
    for address in addresses {
        guest.stack.remove_address(address.address);
    }
    guest
        .stack
        .add_address("fe80::ff:fe00:9".parse().unwrap(), 64);
    guest.stack.start_dhcp(Some("web"));
    guest.stack.start_router_discovery();
    guest.until(|stack| {
        (stack.addresses().len() == 3 && stack.name_servers().len() == 2).then_some(())
    });
    let has = |address: &str| {
        guest
            .stack
            .addresses()
            .iter()
            .any(|own| own.address == address.parse::<IpAddr>().unwrap())
    };
    assert!(
        has("10.0.2.15") && has("fd6b:696c:6e00::ff:fe00:9"),
        "{:?}",
        guest.stack.addresses()
    );
    assert_eq!(guest.stack.name_servers()[0], IpAddr::from([10, 0, 2, 3]));
    assert_eq!(guest.stack.routes().len(), 2);
}

#[test]
fn connections_out_carry_data_both_ways() {
    let echo = echo_server();
    for checksums in [Checksums::Trusted, Checksums::Software] {
        let (mut guest, _network) = start(|configuration| {
            configuration.allow_host_loopback = true;
            configuration.checksums = checksums;
            configuration.mtu = if checksums == Checksums::Trusted {
                65521
            } else {
                1500
            };
        });
        let id = guest
            .connect(SocketAddr::from(([10, 0, 2, 2], echo.port())))
            .unwrap();
        let data = pattern(5 << 20);
        let (mut sent, mut got) = (0, Vec::new());
        let mut buffer = vec![0; 100_000];
        guest.until(|stack| {
            while let Ok(count) = stack.tcp_send(id, &data[sent..]) {
                sent += count;
                if sent == data.len() {
                    stack.tcp_shutdown(id, Shutdown::Write).unwrap();
                    break;
                }
            }
            loop {
                match stack.tcp_receive(id, &mut buffer) {
                    Ok(0) => return Some(()),
                    Ok(count) => got.extend_from_slice(&buffer[..count]),
                    Err(Error::WouldBlock) => return None,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        assert!(got == data);
    }
}

#[test]
fn a_refused_connection_is_refused_and_a_forbidden_one_too() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (mut guest, _network) = start(|configuration| configuration.allow_host_loopback = true);
    let gateway = SocketAddr::from(([10, 0, 2, 2], closed.port()));
    assert_eq!(guest.connect(gateway), Err(Error::ConnectionRefused));
    // Another host of the guest's network: there is none.
    assert!(guest.connect("10.0.2.77:80".parse().unwrap()).is_err());
    let echo = echo_server();
    let (mut guest, _network) = start(|_| {});
    let gateway = SocketAddr::from(([10, 0, 2, 2], echo.port()));
    assert_eq!(
        guest.connect(gateway),
        Err(Error::ConnectionRefused),
        "the host's loopback is not allowed"
    );
    let gateway = SocketAddr::new("fd6b:696c:6e00::2".parse().unwrap(), echo.port());
    assert_eq!(guest.connect(gateway), Err(Error::ConnectionRefused));
}

#[test]
fn a_client_waits_until_the_guest_listens() {
    let (mut guest, network) =
        start(|configuration| configuration.publish = vec![publish(80, Protocol::Tcp)]);
    let address = network.published()[0].0;
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"question").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    // The guest's stack refuses for a while: its program has not started.
    let end = Instant::now() + Duration::from_millis(200);
    while Instant::now() < end {
        guest.step();
    }
    let listener = guest.listen(80);
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    let mut got = Vec::new();
    guest.until(|stack| {
        let mut buffer = [0; 100];
        match stack.tcp_receive(server, &mut buffer) {
            Ok(0) => Some(()),
            Ok(count) => {
                got.extend_from_slice(&buffer[..count]);
                None
            }
            Err(_) => None,
        }
    });
    assert_eq!(got, b"question");
    guest.stack.tcp_send(server, b"answer").unwrap();
    guest.stack.close(server);
    let end = Instant::now() + LIMIT;
    while !client.is_finished() && Instant::now() < end {
        guest.step();
    }
    assert_eq!(client.join().unwrap(), "answer");
}

#[test]
fn resets_pass_both_ways() {
    let (mut guest, network) =
        start(|configuration| configuration.publish = vec![publish(80, Protocol::Tcp)]);
    let listener = guest.listen(80);
    let mut client = TcpStream::connect(network.published()[0].0).unwrap();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    guest.stack.tcp_abort(server).unwrap();
    guest.stack.close(server);
    let waiter = thread::spawn(move || client.read(&mut [0; 10]).map_err(|error| error.kind()));
    while !waiter.is_finished() {
        guest.step();
    }
    assert_eq!(
        waiter.join().unwrap(),
        Err(std::io::ErrorKind::ConnectionReset)
    );

    let client = TcpStream::connect(network.published()[0].0).unwrap();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    guest.until(|stack| {
        stack
            .readiness(server)
            .contains(Readiness::ERROR)
            .then_some(())
    });
    assert_eq!(guest.stack.take_error(server), Some(Error::ConnectionReset));
}

#[test]
fn what_the_guest_sent_arrives_although_it_has_ended() {
    let (mut guest, network) =
        start(|configuration| configuration.publish = vec![publish(80, Protocol::Tcp)]);
    let listener = guest.listen(80);
    let mut client = TcpStream::connect(network.published()[0].0).unwrap();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    let data = pattern(100_000);
    let mut sent = 0;
    guest.until(|stack| {
        while let Ok(count) = stack.tcp_send(server, &data[sent..]) {
            sent += count;
            if sent == data.len() {
                stack.close(server);
                return Some(());
            }
        }
        None
    });
    // All of it lies in the gateway, or on the way.
    guest.until(|stack| (stack.tcp_queues(server).1 == 0).then_some(()));
    drop(guest);
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got == data);
}

#[test]
fn datagrams_go_out_and_come_in() {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok((count, from)) = echo.recv_from(&mut buffer) {
            echo.send_to(&buffer[..count], from).unwrap();
        }
    });
    let (mut guest, network) = start(|configuration| {
        configuration.allow_host_loopback = true;
        configuration.mtu = 1500;
        configuration.publish = vec![publish(53, Protocol::Udp)];
    });
    let socket = guest.stack.datagram_open(DatagramKind::Udp);
    let far = SocketAddr::from(([10, 0, 2, 2], port));
    for size in [0, 100, 9000, 60_000] {
        let data = pattern(size);
        guest.stack.datagram_send(socket, Some(far), &data).unwrap();
        let answer = guest.until(|stack| stack.datagram_receive(socket).ok());
        assert!(answer.data == data && answer.source == far);
    }
    // A closed port.
    let closed = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let other = guest.stack.datagram_open(DatagramKind::Udp);
    guest
        .stack
        .datagram_connect(other, Some(SocketAddr::from(([10, 0, 2, 2], closed))))
        .unwrap();
    guest.stack.datagram_send(other, None, b"?").unwrap();
    assert_eq!(
        guest.until(|stack| stack.take_error(other)),
        Error::ConnectionRefused
    );
    // Published: two clients are two.
    let server = guest.stack.datagram_open(DatagramKind::Udp);
    guest
        .stack
        .datagram_bind(server, SocketAddr::from(([0; 4], 53)))
        .unwrap();
    let clients = [
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    ];
    for client in &clients {
        client.connect(network.published()[0].0).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.send(b"name?").unwrap();
    }
    let questions = [(); 2].map(|()| guest.until(|stack| stack.datagram_receive(server).ok()));
    assert_ne!(questions[0].source, questions[1].source);
    for question in questions {
        guest
            .stack
            .datagram_send(server, Some(question.source), b"address")
            .unwrap();
    }
    guest.step();
    for client in &clients {
        let mut buffer = [0; 100];
        assert_eq!(client.recv(&mut buffer).unwrap(), 7);
    }
}

fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
    bytes
}

#[test]
fn names_are_answered_or_forwarded() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolvers = vec![silent.local_addr().unwrap(), resolver.local_addr().unwrap()];
    thread::spawn(move || {
        let mut buffer = [0; 600];
        while let Ok((count, from)) = resolver.recv_from(&mut buffer) {
            resolver
                .send_to(&[&buffer[..count], b"forwarded"].concat(), from)
                .unwrap();
        }
    });
    let (mut guest, _network) = start(|configuration| {
        configuration.resolvers = Some(resolvers.clone());
        configuration.lookup = Some(Arc::new(|name| {
            (name == "db").then(|| vec![IpAddr::from([10, 9, 8, 7])])
        }));
    });
    let socket = guest.stack.datagram_open(DatagramKind::Udp);
    guest
        .stack
        .datagram_bind(socket, SocketAddr::from(([0; 8], 0)))
        .unwrap();
    for server in ["10.0.2.3:53", "[fd6b:696c:6e00::2]:53"] {
        let server: SocketAddr = server.parse().unwrap();
        guest
            .stack
            .datagram_send(socket, Some(server), &question("DB"))
            .unwrap();
        let answer = guest.until(|stack| stack.datagram_receive(socket).ok());
        assert_eq!(answer.source, server);
        assert_eq!(answer.data[answer.data.len() - 4..], [10, 9, 8, 7]);
        // The first server says nothing: the question that comes again goes to the second.
        for _ in 0..2 {
            guest
                .stack
                .datagram_send(socket, Some(server), &question("example.org"))
                .unwrap();
            guest.step();
        }
        let answer = guest.until(|stack| stack.datagram_receive(socket).ok());
        assert!(answer.data.ends_with(b"forwarded"));
    }
}

#[test]
fn the_gateway_answers_a_ping() {
    let (mut guest, _network) = start(|_| {});
    for gateway in ["10.0.2.2", "fd6b:696c:6e00::2"] {
        let gateway: IpAddr = gateway.parse().unwrap();
        let socket = guest.stack.datagram_open(DatagramKind::Echo);
        let kind = if gateway.is_ipv4() { 8 } else { 128 };
        let request = [kind, 0, 0, 0, 0, 0, 0, 1, 42];
        guest
            .stack
            .datagram_send(socket, Some(SocketAddr::new(gateway, 0)), &request)
            .unwrap();
        let answer = guest.until(|stack| stack.datagram_receive(socket).ok());
        assert_eq!(answer.data[8], 42);
    }
}

#[test]
fn frames_are_captured() {
    let path = std::env::temp_dir().join(format!("kiln-capture-{}.pcap", std::process::id()));
    let (mut guest, mut network) =
        start(|configuration| configuration.capture = Some(path.clone()));
    assert!(guest.connect("10.0.2.2:1".parse().unwrap()).is_err());
    network.stop();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_3c4du32.to_le_bytes());
    let (mut at, mut frames) = (24, 0);
    while at < bytes.len() {
        at += 16 + u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        frames += 1;
    }
    assert!(at == bytes.len() && frames >= 3, "{frames} frames");
}

#[test]
fn a_capture_file_that_cannot_be_made_is_named() {
    let mut configuration = NetworkConfiguration::new([2, 0, 0, 0, 0, 9]);
    configuration.capture = Some("/nonexistent/file.pcap".into());
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let error = UserNetwork::start(configuration, FrameEnd::Stream(theirs))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/file.pcap"), "{error}");
}

#[test]
fn garbage_on_the_stream_ends_the_network_and_nothing_else() {
    let (mut guest, mut network) = start(|_| {});
    guest.stream.write_all(&[0xff; 1000]).unwrap();
    network.join();
}

/// As a guest's program: reads all, and writes back as much as each question asks for.
fn serve_sizes(guest: &mut Guest, listener: SocketId, clients: usize) {
    let mut open: Vec<(SocketId, usize)> = Vec::new();
    let mut ended = 0;
    let block = pattern(1 << 20);
    let mut buffer = vec![0; 1 << 16];
    let end = Instant::now() + Duration::from_secs(120);
    while ended < clients {
        assert!(Instant::now() < end, "{ended} of {clients} have ended");
        while let Ok(id) = guest.stack.tcp_accept(listener) {
            open.push((id, 0));
        }
        open.retain_mut(|(id, owed)| {
            let mut alive = true;
            match guest.stack.tcp_receive(*id, &mut buffer) {
                Ok(0) => alive = *owed > 0,
                Ok(count) => *owed += buffer[..count].iter().map(|byte| 1 << byte).sum::<usize>(),
                Err(Error::WouldBlock) => {}
                Err(_) => alive = false,
            }
            while *owed > 0 {
                let size = block.len().min(*owed);
                match guest.stack.tcp_send(*id, &block[..size]) {
                    Ok(count) => *owed -= count,
                    Err(_) => break,
                }
            }
            if !alive {
                guest.stack.close(*id);
                ended += 1;
            }
            alive
        });
        guest.step();
    }
    guest.step();
}

#[test]
fn many_bytes_arrive() {
    for (mtu, checksums) in [
        (65521, Checksums::Trusted),
        (32768, Checksums::Trusted),
        (32768, Checksums::Software),
        (1500, Checksums::Software),
    ] {
        println!("MTU {mtu}, checksums {checksums:?}");
        transfer(mtu, checksums);
    }
}

fn transfer(mtu: u16, checksums: Checksums) {
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(80, Protocol::Tcp)];
        configuration.mtu = mtu;
        configuration.checksums = checksums;
    });
    let address = network.published()[0].0;
    let listener = guest.listen(80);
    let power = if cfg!(debug_assertions) { 26 } else { 30 };
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let started = Instant::now();
        stream.write_all(&[power]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut total, mut buffer) = (0usize, vec![0; 1 << 18]);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                count => total += count,
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{} MiB in {seconds:.2} s: {:.0} MiB/s",
            total >> 20,
            (total >> 20) as f64 / seconds
        );
        total
    });
    serve_sizes(&mut guest, listener, 1);
    assert_eq!(client.join().unwrap(), 1 << power);
}

#[test]
fn many_clients_are_served() {
    let count = 4000;
    let (mut guest, network) =
        start(|configuration| configuration.publish = vec![publish(80, Protocol::Tcp)]);
    let address = network.published()[0].0;
    let listener = guest.listen(80);
    let clients = thread::spawn(move || {
        let started = Instant::now();
        let mut streams: Vec<TcpStream> = (0..count)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        for stream in &mut streams {
            stream.write_all(&[10]).unwrap();
        }
        let mut buffer = [0; 1024];
        for stream in &mut streams {
            stream
                .set_read_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            stream.read_exact(&mut buffer).unwrap();
        }
        println!("{count} clients in {:?}", started.elapsed());
    });
    serve_sizes(&mut guest, listener, count);
    clients.join().unwrap();
}

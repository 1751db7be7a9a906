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

/// A wake-up that can be waited for.
fn wake() -> (Wake, std::sync::mpsc::Receiver<()>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let wake: Wake = Arc::new(move || {
        let _ = sender.send(());
    });
    (wake, receiver)
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0; 4], port))
}

/// As a program that answers each piece of data with the same; true while the connection is open.
fn echo_once(stack: &mut Stack, id: SocketId) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match stack.tcp_receive(id, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => assert_eq!(stack.tcp_send(id, &buffer[..count]), Ok(count)),
            Err(Error::WouldBlock) => return true,
            Err(_) => return false,
        }
    }
}

/// Sends a question on a client's stream and has the guest echo it.
fn ask(guest: &mut Guest, server: SocketId, client: &mut (impl Read + Write), text: &[u8]) {
    client.write_all(text).unwrap();
    let mut got = vec![0; text.len()];
    let mut filled = 0;
    guest.until(|stack| {
        echo_once(stack, server);
        match client.read(&mut got[filled..]) {
            Ok(count) => filled += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        (filled == text.len()).then_some(())
    });
    assert_eq!(got, text);
}

fn suspend(guest: &mut Guest, network: &UserNetwork) {
    let end = Instant::now() + LIMIT;
    while !network.suspend() {
        assert!(Instant::now() < end, "something stays under way");
        guest.step();
    }
}

/// How often a thread (`/proc/<pid>/task/<tid>`) has waited.
fn waits(thread: &std::path::Path) -> u64 {
    std::fs::read_to_string(thread.join("status"))
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
        .and_then(|text| text.trim().parse().ok())
        .unwrap()
}

#[test]
fn held_sockets_serve_and_outlive_the_network() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let held = vec![
        Held {
            socket: Arc::new(tcp.try_clone().unwrap().into()),
            guest: 80,
            protocol: Protocol::Tcp,
        },
        Held {
            socket: Arc::new(udp.try_clone().unwrap().into()),
            guest: 53,
            protocol: Protocol::Udp,
        },
    ];
    for _ in 0..2 {
        let (mut guest, mut network) = start(|configuration| configuration.held = held.clone());
        assert_eq!(
            network.published()[0],
            (
                address,
                Publish {
                    address: Some(address.ip()),
                    host: address.port(),
                    guest: 80,
                    protocol: Protocol::Tcp
                }
            )
        );
        let listener = guest.listen(80);
        let server = guest.stack.datagram_open(DatagramKind::Udp);
        guest.stack.datagram_bind(server, any(53)).unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        client.set_nonblocking(true).unwrap();
        let accepted = guest.until(|stack| stack.tcp_accept(listener).ok());
        ask(&mut guest, accepted, &mut client, b"over a held socket");
        let question = UdpSocket::bind("127.0.0.1:0").unwrap();
        question
            .send_to(b"name?", udp.local_addr().unwrap())
            .unwrap();
        let got = guest.until(|stack| stack.datagram_receive(server).ok());
        assert_eq!(got.data, b"name?");
        network.stop();
    }
    // Its owner has it again.
    drop(held);
    let _client = TcpStream::connect(address).unwrap();
    tcp.set_nonblocking(false).unwrap();
    tcp.accept().unwrap();
}

#[test]
fn a_socket_that_cannot_be_held_is_refused() {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let idle = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    for (socket, reason) in [(udp.into(), "not a TCP"), (idle, "does not listen")] {
        let mut configuration = NetworkConfiguration::new([2, 0, 0, 0, 0, 9]);
        configuration.held = vec![Held {
            socket: Arc::new(socket),
            guest: 80,
            protocol: Protocol::Tcp,
        }];
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let error = UserNetwork::start(configuration, FrameEnd::Stream(theirs)).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_paused_network_takes_no_one_and_counts_exactly() {
    let echo = echo_server();
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(80, Protocol::Tcp), publish(53, Protocol::Udp)];
        configuration.allow_host_loopback = true;
    });
    let (tcp, udp) = (network.published()[0].0, network.published()[1].0);
    assert_eq!(network.pause(), Activity::default());
    network.resume();
    // One that waits for a guest that does not listen yet.
    let mut first = TcpStream::connect(tcp).unwrap();
    first.set_nonblocking(true).unwrap();
    let end = Instant::now() + LIMIT;
    while network.activity().connections == 0 {
        assert!(Instant::now() < end);
        guest.step();
    }
    assert_eq!(network.pause().connections, 1);
    let listener = guest.listen(80);
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    // What there is goes on: 5 bytes come in and 5 go out.
    ask(&mut guest, server, &mut first, b"hello");
    assert_eq!(
        network.pause(),
        Activity {
            connections: 1,
            bytes: 10
        }
    );
    // The guest goes out.
    let out = guest
        .connect(SocketAddr::from(([10, 0, 2, 2], echo.port())))
        .unwrap();
    assert_eq!(network.pause().connections, 2);
    guest.stack.close(out);
    let end = Instant::now() + LIMIT;
    while network.pause().connections != 1 {
        assert!(Instant::now() < end);
        guest.step();
    }
    // Nobody new comes in.
    let socket = guest.stack.datagram_open(DatagramKind::Udp);
    guest.stack.datagram_bind(socket, any(53)).unwrap();
    let mut second = TcpStream::connect(tcp).unwrap();
    second.set_nonblocking(true).unwrap();
    let question = UdpSocket::bind("127.0.0.1:0").unwrap();
    question.send_to(b"name?", udp).unwrap();
    for _ in 0..10 {
        guest.step();
        assert_eq!(guest.stack.tcp_accept(listener), Err(Error::WouldBlock));
        assert!(guest.stack.datagram_receive(socket).is_err());
    }
    assert_eq!(network.pause().connections, 1);
    network.resume();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    ask(&mut guest, server, &mut second, b"I have waited");
    let got = guest.until(|stack| stack.datagram_receive(socket).ok());
    assert_eq!(got.data, b"name?");
    assert_eq!(
        network.pause(),
        Activity {
            connections: 2,
            bytes: 10 + 26 + 5
        }
    );
}

#[test]
fn adopted_connections_wait_and_are_served() {
    for told in [false, true] {
        let (mut guest, network) = start(|configuration| configuration.listens_told = told);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        tcp.set_nonblocking(true).unwrap();
        network
            .adopt(listener.accept().unwrap().0.into(), 8080)
            .unwrap();
        let (mut unix, end) = UnixStream::pair().unwrap();
        unix.set_nonblocking(true).unwrap();
        network.adopt(end.into(), 8081).unwrap();
        assert_eq!(network.pause().connections, 2);
        for _ in 0..5 {
            guest.step();
        }
        let listeners = [guest.listen(8080), guest.listen(8081)];
        if told {
            network.guest_listens(any(8080), Protocol::Tcp);
            network.guest_listens(any(8081), Protocol::Tcp);
        }
        let servers =
            listeners.map(|listener| guest.until(|stack| stack.tcp_accept(listener).ok()));
        ask(&mut guest, servers[0], &mut tcp, b"over TCP");
        ask(&mut guest, servers[1], &mut unix, &pattern(3000));
        // The ends pass, in both directions.
        unix.shutdown(std::net::Shutdown::Write).unwrap();
        guest.until(|stack| (!echo_once(stack, servers[1])).then_some(()));
        guest.stack.close(servers[1]);
        let end = Instant::now() + LIMIT;
        while unix.read(&mut [0; 10]).ok() != Some(0) {
            assert!(Instant::now() < end);
            guest.step();
        }
        let end = Instant::now() + LIMIT;
        while network.pause().connections != 1 {
            assert!(Instant::now() < end);
            guest.step();
        }
    }
    let (_guest, network) = start(|_| {});
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(network.adopt(file.into(), 1).is_err());
}

#[test]
fn a_guest_that_tells_is_asked_only_then() {
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(80, Protocol::Tcp)];
        configuration.listens_told = true;
    });
    let mut client = TcpStream::connect(network.published()[0].0).unwrap();
    client.set_nonblocking(true).unwrap();
    let before = guest.started.elapsed();
    while guest.started.elapsed() < before + Duration::from_millis(100) {
        guest.step();
    }
    // It waits where another network would find it.
    assert_eq!(network.pause().connections, 0);
    network.resume();
    let listener = guest.listen(80);
    // Nobody comes to the loopback from outside.
    network.guest_listens("127.0.0.1:80".parse().unwrap(), Protocol::Tcp);
    assert_eq!(network.pause().connections, 0);
    network.resume();
    let told = Instant::now();
    network.guest_listens(any(80), Protocol::Tcp);
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    println!("let in {:?} after it was told", told.elapsed());
    ask(&mut guest, server, &mut client, b"there");
    // A program that listens no longer makes clients wait again.
    network.guest_listens_no_more(any(80), Protocol::Tcp);
    let _second = TcpStream::connect(network.published()[0].0).unwrap();
    assert_eq!(network.pause().connections, 1);
}

#[test]
fn first_datagrams_wait_until_the_port_is_bound() {
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(53, Protocol::Udp)];
        configuration.listens_told = true;
        configuration.dhcp = true;
    });
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(network.published()[0].0).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    for number in 0..64u8 {
        client.send(&[number; 1000]).unwrap();
    }
    for _ in 0..5 {
        guest.step();
    }
    assert_eq!(network.activity().bytes, 0);
    let socket = guest.stack.datagram_open(DatagramKind::Udp);
    guest.stack.datagram_bind(socket, any(53)).unwrap();
    network.guest_listens(any(53), Protocol::Udp);
    for _ in 0..5 {
        guest.step();
    }
    assert_eq!(network.activity().bytes, 0, "the guest has no address yet");
    guest.stack.remove_address("10.0.2.15".parse().unwrap());
    guest.stack.start_dhcp(None);
    for number in 0..64u8 {
        let got = guest.until(|stack| stack.datagram_receive(socket).ok());
        assert_eq!(got.data, [number; 1000]);
        if number == 63 {
            guest
                .stack
                .datagram_send(socket, Some(got.source), b"all")
                .unwrap();
            guest.step();
        }
    }
    assert_eq!(client.recv(&mut [0; 10]).unwrap(), 3);
}

#[test]
fn a_datagram_port_is_bound_until_its_last_socket_is_closed() {
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(53, Protocol::Udp)];
        configuration.listens_told = true;
    });
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(network.published()[0].0).unwrap();
    let socket = guest.stack.datagram_open(DatagramKind::Udp);
    guest.stack.datagram_bind(socket, any(53)).unwrap();
    // A server that makes a socket for each client tells of each.
    network.guest_listens(any(53), Protocol::Udp);
    network.guest_listens(any(53), Protocol::Udp);
    network.guest_listens_no_more(any(53), Protocol::Udp);
    client.send(b"still").unwrap();
    let got = guest.until(|stack| stack.datagram_receive(socket).ok());
    assert_eq!(got.data, b"still");
    network.guest_listens_no_more(any(53), Protocol::Udp);
}

#[test]
fn a_suspended_network_sleeps_until_somebody_comes() {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    let (wake, woken) = wake();
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![
            publish(80, Protocol::Tcp),
            publish(53, Protocol::Udp),
            publish(81, Protocol::Tcp),
        ];
        configuration.allow_host_loopback = true;
        configuration.wake = Some(Arc::clone(&wake));
    });
    let (tcp, udp) = (network.published()[0].0, network.published()[1].0);
    let listener = guest.listen(80);
    let mut client = TcpStream::connect(tcp).unwrap();
    client.set_nonblocking(true).unwrap();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    ask(&mut guest, server, &mut client, b"before");
    let published = guest.stack.datagram_open(DatagramKind::Udp);
    guest.stack.datagram_bind(published, any(53)).unwrap();
    let own = guest.stack.datagram_open(DatagramKind::Udp);
    let far = SocketAddr::from(([10, 0, 2, 2], port));
    guest.stack.datagram_send(own, Some(far), b"hello").unwrap();
    guest.step();
    let (_, from) = {
        echo.set_read_timeout(Some(LIMIT)).unwrap();
        echo.recv_from(&mut [0; 10]).unwrap()
    };
    let quiet = |woken: &std::sync::mpsc::Receiver<()>| {
        assert!(woken.recv_timeout(Duration::from_millis(50)).is_err());
    };
    let wait = |woken: &std::sync::mpsc::Receiver<()>| {
        woken.recv_timeout(LIMIT).expect("it is woken");
    };

    // Data on an open connection.
    suspend(&mut guest, &network);
    quiet(&woken);
    client.write_all(b"more").unwrap();
    wait(&woken);
    client.write_all(b" and more").unwrap();
    quiet(&woken);
    network.resume();
    let mut got = Vec::new();
    guest.until(|stack| {
        let mut buffer = [0; 100];
        if let Ok(count) = stack.tcp_receive(server, &mut buffer) {
            got.extend_from_slice(&buffer[..count]);
        }
        (got.len() == 13).then_some(())
    });
    assert_eq!(got, b"more and more");

    // A new client.
    suspend(&mut guest, &network);
    let mut second = TcpStream::connect(tcp).unwrap();
    second.set_nonblocking(true).unwrap();
    wait(&woken);
    assert_eq!(guest.stack.tcp_accept(listener), Err(Error::WouldBlock));
    network.resume();
    let other = guest.until(|stack| stack.tcp_accept(listener).ok());
    ask(&mut guest, other, &mut second, b"hello");

    // A datagram for a published port, and one for a flow of the guest's.
    suspend(&mut guest, &network);
    let question = UdpSocket::bind("127.0.0.1:0").unwrap();
    question.send_to(b"name?", udp).unwrap();
    wait(&woken);
    network.resume();
    let got = guest.until(|stack| stack.datagram_receive(published).ok());
    assert_eq!(got.data, b"name?");
    suspend(&mut guest, &network);
    echo.send_to(b"late", from).unwrap();
    wait(&woken);
    network.resume();
    let got = guest.until(|stack| stack.datagram_receive(own).ok());
    assert_eq!(got.data, b"late");

    // The end of a connection, and then its reset, which nobody needs to hear at once.
    suspend(&mut guest, &network);
    second.shutdown(std::net::Shutdown::Write).unwrap();
    wait(&woken);
    network.resume();
    guest.until(|stack| (!echo_once(stack, other)).then_some(()));

    // What the guest has said before it was stopped.
    suspend(&mut guest, &network);
    guest.stack.tcp_send(server, b"by the way").unwrap();
    guest.step();
    wait(&woken);
    network.resume();
    let mut got = Vec::new();
    guest.until(|_| {
        let mut buffer = [0; 100];
        if let Ok(count) = client.read(&mut buffer) {
            got.extend_from_slice(&buffer[..count]);
        }
        (got == b"by the way").then_some(())
    });

    // A connection that is handed over.
    suspend(&mut guest, &network);
    let (mut unix, end) = UnixStream::pair().unwrap();
    unix.set_nonblocking(true).unwrap();
    network.adopt(end.into(), 80).unwrap();
    wait(&woken);
    network.resume();
    let adopted = guest.until(|stack| stack.tcp_accept(listener).ok());
    ask(&mut guest, adopted, &mut unix, b"hello");

    // Somebody who waits because of a pause.
    network.pause();
    let _third = TcpStream::connect(tcp).unwrap();
    for _ in 0..10 {
        guest.step();
        assert!(!network.suspend());
    }
    network.resume();
    assert!(guest.until(|stack| stack.tcp_accept(listener).ok()) != server);
    // All is as it was.
    ask(&mut guest, server, &mut client, b"still there");
    // A guest that ends while it is stopped.
    suspend(&mut guest, &network);
    let mut network = network;
    drop(guest);
    network.join();
}

#[test]
fn nothing_is_suspended_while_something_is_under_way() {
    let (mut guest, network) =
        start(|configuration| configuration.publish = vec![publish(80, Protocol::Tcp)]);
    guest.step();
    assert!(!network.suspend(), "there is nobody to wake");

    let (wake, _woken) = wake();
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(80, Protocol::Tcp)];
        configuration.wake = Some(Arc::clone(&wake));
    });
    let address = network.published()[0].0;
    let mut client = TcpStream::connect(address).unwrap();
    // A client that waits for the guest.
    for _ in 0..5 {
        guest.step();
        assert!(!network.suspend());
    }
    let listener = guest.listen(80);
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    suspend(&mut guest, &network);
    network.resume();
    // Data that the guest has not acknowledged: it does not even read frames.
    client.write_all(b"question").unwrap();
    let end = Instant::now() + LIMIT;
    while network.activity().bytes < 8 {
        assert!(Instant::now() < end);
        thread::yield_now();
    }
    assert!(!network.suspend());
    suspend(&mut guest, &network);
    network.resume();
    // Data that the client does not take.
    let data = pattern(20 << 20);
    let mut sent = 0;
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        while let Ok(count) = guest.stack.tcp_send(server, &data[sent..]) {
            sent += count;
        }
        guest.step();
    }
    assert!(!network.suspend());
    let reader = thread::spawn(move || {
        let mut got = vec![0; sent];
        client.read_exact(&mut got).unwrap();
        (client, got)
    });
    while !reader.is_finished() {
        guest.step();
    }
    let (client, got) = reader.join().unwrap();
    assert!(got == data[..sent]);
    // A connection that is half closed may sleep.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.until(|stack| {
        stack
            .readiness(server)
            .contains(Readiness::READ_CLOSED)
            .then_some(())
    });
    suspend(&mut guest, &network);
    network.resume();
    // One whose client is gone altogether ends.
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    guest.until(|stack| {
        stack
            .readiness(server)
            .contains(Readiness::ERROR)
            .then_some(())
    });
}

#[test]
fn a_suspended_network_uses_no_cpu() {
    let (sender, woken) = std::sync::mpsc::channel();
    // The thread that wakes is the one that is to sleep.
    let wake: Wake = Arc::new(move || {
        let thread = std::fs::read_link("/proc/thread-self").unwrap();
        let _ = sender.send(std::path::Path::new("/proc").join(thread));
    });
    let (mut guest, network) = start(|configuration| {
        configuration.publish = vec![publish(80, Protocol::Tcp)];
        configuration.wake = Some(Arc::clone(&wake));
    });
    let listener = guest.listen(80);
    let mut client = TcpStream::connect(network.published()[0].0).unwrap();
    client.set_nonblocking(true).unwrap();
    let server = guest.until(|stack| stack.tcp_accept(listener).ok());
    suspend(&mut guest, &network);
    client.write_all(b"who are you?").unwrap();
    let thread = woken.recv_timeout(LIMIT).unwrap();
    network.resume();
    let mut got = 0;
    guest.until(|stack| {
        echo_once(stack, server);
        got += client.read(&mut [0; 20]).unwrap_or(0);
        (got == 12).then_some(())
    });
    suspend(&mut guest, &network);
    // It has answered and goes to sleep.
    let end = Instant::now() + LIMIT;
    let mut before = waits(&thread);
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(1500) {
        assert!(Instant::now() < end, "it wakes again and again");
        thread::sleep(Duration::from_millis(50));
        let now = waits(&thread);
        if now > before + 1 {
            (before, since) = (now, Instant::now());
        }
    }
    network.resume();
    ask(&mut guest, server, &mut client, b"again");
}

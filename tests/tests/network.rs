//! The network of instances: published ports of both families and transports, much data, many connections, ways out.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use kiln_tests::{EVENT_DEADLINE, Kiln, eventually, free_port, programs};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Echoes TCP on port 7000 and UDP on port 7001; on port 7002 sends as many bytes as the first line asks for, or sums
/// up what comes after the line "sum".
const SERVER: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static int bound(int type, int port) {
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int fd = socket(AF_INET6, type, 0), off = 0, on = 1;
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (void *)&any, sizeof any) || (type == SOCK_STREAM && listen(fd, 4096))) {
        perror("bind"); exit(1);
    }
    return fd;
}

static void *udp(void *unused) {
    static char buffer[65536];
    int fd = bound(SOCK_DGRAM, 7001);
    for (;;) {
        struct sockaddr_storage from; socklen_t size = sizeof from;
        ssize_t n = recvfrom(fd, buffer, sizeof buffer, 0, (void *)&from, &size);
        if (n >= 0) sendto(fd, buffer, n, 0, (void *)&from, size);
    }
    return unused;
}

static void *bulk(void *unused) {
    static unsigned char block[1 << 16];
    int server = bound(SOCK_STREAM, 7002);
    for (;;) {
        int fd = accept(server, NULL, NULL);
        char line[32] = ""; size_t length = 0;
        while (length < 31 && read(fd, line + length, 1) == 1 && line[length] != '\n') length++;
        if (!strncmp(line, "sum", 3)) {
            uint64_t sum = 0, count = 0; ssize_t n;
            while ((n = read(fd, block, sizeof block)) > 0) for (ssize_t i = 0; i < n; i++) sum = sum * 31 + block[i], count++;
            char reply[64]; int size = snprintf(reply, sizeof reply, "%lu %lu", count, sum);
            if (write(fd, reply, size) != size) perror("write");
        } else {
            uint64_t left = strtoull(line, NULL, 10), at = 0;
            while (left) {
                size_t now = left < sizeof block ? left : sizeof block;
                for (size_t i = 0; i < now; i++) block[i] = (unsigned char)((at + i) * 7 + ((at + i) >> 13));
                size_t done = 0;
                while (done < now) { ssize_t n = write(fd, block + done, now - done); if (n <= 0) goto out; done += n; }
                at += now; left -= now;
            }
        }
    out:
        close(fd);
    }
    return unused;
}

int main(int argc, char **argv) {
    struct rlimit limit; getrlimit(RLIMIT_NOFILE, &limit); limit.rlim_cur = limit.rlim_max; setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
    if (argc > 2) {
        /* A client: connects to an address and a port and prints what comes. */
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
        inet_pton(AF_INET, argv[1], &to.sin_addr);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)&to, sizeof to)) { perror("connect"); return 1; }
        char text[100] = "";
        if (write(fd, "out\n", 4) != 4 || read(fd, text, 99) < 0) { perror("talk"); return 1; }
        printf("%s", text);
        return 0;
    }
    pthread_t thread;
    pthread_create(&thread, NULL, udp, NULL);
    pthread_create(&thread, NULL, bulk, NULL);
    int server = bound(SOCK_STREAM, 7000), set = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = server}, events[256];
    epoll_ctl(set, EPOLL_CTL_ADD, server, &event);
    puts("ready"); fflush(stdout);
    for (;;) {
        int count = epoll_wait(set, events, 256, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd == server) {
                event.data.fd = accept4(server, NULL, NULL, SOCK_NONBLOCK);
                if (event.data.fd >= 0) epoll_ctl(set, EPOLL_CTL_ADD, event.data.fd, &event);
                else perror("accept");
                continue;
            }
            char buffer[4096];
            ssize_t n = read(events[i].data.fd, buffer, sizeof buffer);
            if (n <= 0 || write(events[i].data.fd, buffer, n) != n) close(events[i].data.fd);
        }
    }
}
"#;

/// The ways to run: engine and network.
const WAYS: [[&str; 4]; 3] = [
    ["--engine", "process", "--net", "socket"],
    ["--engine", "process", "--net", "direct"],
    ["--engine", "qemu", "--net", "direct"],
];

fn image(kiln: &Kiln) -> PathBuf {
    kiln.build(&programs::compile(kiln.folder(), "netserver", SERVER))
}

/// Starts the server with ports published, and waits until it listens.
fn start(kiln: &Kiln, way: [&str; 4], options: &[&str], image: &Path) {
    let mut words: Vec<&str> = way.to_vec();
    words.extend(options);
    words.push(image.to_str().expect("the path is text"));
    kiln.start("net", &words);
    eventually("the server", || {
        kiln.succeed(["logs", "net"])
            .contains("ready")
            .then_some(())
    });
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = eventually(&format!("a connection to {address}"), || {
        TcpStream::connect(address).ok()
    });
    stream
        .set_read_timeout(Some(EVENT_DEADLINE))
        .expect("a timeout can be set");
    stream
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn echoes(way: [&str; 4], address: SocketAddr) {
    let mut stream = connect(address);
    stream.write_all(b"there and back").expect("it takes bytes");
    let mut answer = [0; 14];
    stream
        .read_exact(&mut answer)
        .unwrap_or_else(|error| panic!("{way:?}: {address}: {error}"));
    assert_eq!(&answer, b"there and back", "{way:?}: {address}");
}

#[test]
fn published_ports_of_both_families_and_transports() {
    for way in WAYS {
        let kiln = Kiln::new();
        let image = image(&kiln);
        let (v4, v6, udp) = (free_port(), free_port(), free_port());
        let (first, second, third) = (
            format!("127.0.0.1:{v4}:7000"),
            format!("[::1]:{v6}:7000"),
            format!("{udp}:7001/udp"),
        );
        start(
            &kiln,
            way,
            &["-p", &first, "-p", &second, "-p", &third],
            &image,
        );
        echoes(way, local(v4));
        echoes(way, format!("[::1]:{v6}").parse().expect("an address"));
        echoes_datagrams(way, udp);
    }
}

/// A dual-stack program and a port that is published on an IPv4 address alone.
#[test]
fn datagrams_of_one_ipv4_address_reach_a_program_of_both_families() {
    for way in WAYS {
        let kiln = Kiln::new();
        let image = image(&kiln);
        let port = free_port();
        start(
            &kiln,
            way,
            &["-p", &format!("127.0.0.1:{port}:7001/udp")],
            &image,
        );
        echoes_datagrams(way, port);
    }
}

fn echoes_datagrams(way: [&str; 4], port: u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .expect("a timeout can be set");
    socket.connect(local(port)).expect("an address");
    let mut answer = [0; 100];
    let length = eventually(&format!("a datagram back, {way:?}"), || {
        // Refused while nobody has bound it yet.
        socket.send(b"datagram").ok()?;
        socket.recv(&mut answer).ok()
    });
    assert_eq!(&answer[..length], b"datagram", "{way:?}");
}

/// A name server's way with datagrams: a socket for each family on port 7003. To "where" it answers with the interface
/// that the datagram came to and its length by FIONREAD. After "own" the client has the socket to itself for one more
/// datagram, which comes back, and the port gets a new one.
const NAME_SERVER: &str = r#"
#define _GNU_SOURCE
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int bound(int family) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(7003)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(7003)};
    int fd = socket(family, SOCK_DGRAM, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (family == AF_INET6) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
        setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
    } else setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof on);
    if (bind(fd, family == AF_INET ? (void *)&v4 : (void *)&v6, family == AF_INET ? sizeof v4 : sizeof v6)) {
        perror("bind"); exit(1);
    }
    return fd;
}

int main(void) {
    int families[2] = {AF_INET, AF_INET6};
    struct pollfd fds[2];
    for (int i = 0; i < 2; i++) fds[i] = (struct pollfd){.fd = bound(families[i]), .events = POLLIN};
    puts("ready"); fflush(stdout);
    for (;;) {
        poll(fds, 2, -1);
        for (int i = 0; i < 2; i++) if (fds[i].revents) {
            char text[100] = "", control[200], answer[200], name[IF_NAMESIZE] = "none";
            struct sockaddr_storage from;
            struct iovec piece = {text, sizeof text - 1};
            struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &piece, .msg_iovlen = 1,
                                     .msg_control = control, .msg_controllen = sizeof control};
            int fd = fds[i].fd, waiting = -1;
            ioctl(fd, FIONREAD, &waiting);
            if (recvmsg(fd, &message, MSG_DONTWAIT) < 0) continue;
            for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
                if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO)
                    if_indextoname(((struct in_pktinfo *)CMSG_DATA(c))->ipi_ifindex, name);
                if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO)
                    if_indextoname(((struct in6_pktinfo *)CMSG_DATA(c))->ipi6_ifindex, name);
            }
            if (strcmp(text, "own")) {
                int length = snprintf(answer, sizeof answer, "%s %d", name, waiting);
                sendto(fd, answer, length, 0, (void *)&from, message.msg_namelen);
                continue;
            }
            connect(fd, (void *)&from, message.msg_namelen);
            close(bound(families[i]));
            int other = bound(families[i]);
            send(fd, "yours", 5, 0);
            ssize_t n = recv(fd, text, sizeof text, 0);
            send(fd, text, n, 0);
            close(fd);
            close(other);
            fds[i].fd = bound(families[i]);
        }
    }
}
"#;

#[test]
fn datagram_servers_know_where_clients_come_and_may_share_their_port() {
    for way in WAYS {
        let kiln = Kiln::new();
        let image = kiln.build(&programs::compile(kiln.folder(), "nameserver", NAME_SERVER));
        let port = free_port();
        start(&kiln, way, &["-p", &format!("{port}:7003/udp")], &image);
        for (from, to) in [
            ("127.0.0.1:0", local(port)),
            ("[::1]:0", SocketAddr::from((Ipv6Addr::LOCALHOST, port))),
        ] {
            let client = UdpSocket::bind(from).expect("a socket");
            client
                .set_read_timeout(Some(Duration::from_millis(500)))
                .expect("a timeout can be set");
            client.connect(to).expect("an address");
            // What comes to a socket that is closed just then is lost, as before the first is bound: asked again. Order
            // is kept, so an answer that is late comes before that to the next question.
            let ask = |question: &str, expected: &str, again: bool| {
                let mut answer = [0; 100];
                let mut sent = false;
                eventually(
                    &format!("{expected:?} for {question:?}, {way:?} {to}"),
                    || {
                        if !sent || again {
                            sent = client.send(question.as_bytes()).is_ok();
                        }
                        loop {
                            let length = client.recv(&mut answer).ok()?;
                            match &answer[..length] {
                                text if text == expected.as_bytes() => return Some(()),
                                b"eth0 5" => {}
                                text => panic!("{way:?} {to} {question}: {text:?}"),
                            }
                        }
                    },
                );
            };
            for _ in 0..3 {
                ask("where", "eth0 5", true);
                ask("own", "yours", false);
                ask("text", "text", false);
            }
        }
    }
}

/// What the server's bulk port sends at a place.
fn pattern(place: u64) -> u8 {
    (place.wrapping_mul(7).wrapping_add(place >> 13)) as u8
}

#[test]
fn much_data_arrives_whole() {
    for way in WAYS {
        let total = if way[1] == "process" {
            1 << 30
        } else {
            1 << 27
        };
        transfers(way, total);
    }
}

#[test]
#[ignore = "slow: minutes in an emulated machine"]
fn a_gibibyte_arrives_whole_in_a_virtual_machine() {
    transfers(WAYS[2], 1 << 30);
}

/// Downloads and uploads `total` bytes, all of which are checked.
fn transfers(way: [&str; 4], total: u64) {
    let kiln = Kiln::new();
    let image = image(&kiln);
    let port = free_port();
    start(
        &kiln,
        way,
        &["-p", &format!("127.0.0.1:{port}:7002")],
        &image,
    );

    let mut stream = connect(local(port));
    stream
        .write_all(format!("{total}\n").as_bytes())
        .expect("it takes bytes");
    let mut buffer = vec![0; 1 << 18];
    let mut place = 0;
    loop {
        let length = stream.read(&mut buffer).expect("it sends");
        if length == 0 {
            break;
        }
        let wrong = buffer[..length]
            .iter()
            .zip(place..)
            .position(|(byte, place)| *byte != pattern(place));
        assert_eq!(wrong, None, "{way:?}: another byte after {place}");
        place += length as u64;
    }
    assert_eq!(place, total, "{way:?}: the download ended early");

    let mut stream = connect(local(port));
    stream.write_all(b"sum\n").expect("it takes bytes");
    let block: Vec<u8> = (0..1 << 18).map(pattern).collect();
    let mut sum = 0_u64;
    for _ in 0..total / block.len() as u64 {
        stream.write_all(&block).expect("it takes bytes");
        sum = block.iter().fold(sum, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
    }
    stream
        .shutdown(Shutdown::Write)
        .expect("it can be half closed");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert_eq!(answer, format!("{total} {sum}"), "{way:?}");
}

#[test]
fn ten_thousand_connections_at_once() {
    const CONNECTIONS: usize = 10_000;
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).expect("the limit can be raised to its maximum");
    assert!(
        limit.maximum.is_none_or(|most| most > 11_000),
        "needs a hard limit of open files above 11000"
    );
    for way in WAYS {
        let kiln = Kiln::new();
        let image = image(&kiln);
        let port = free_port();
        start(
            &kiln,
            way,
            &["-m", "512M", "-p", &format!("127.0.0.1:{port}:7000")],
            &image,
        );
        let mut streams: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(local(port))).collect();
        for round in 0..2_u8 {
            for (number, stream) in streams.iter_mut().enumerate() {
                stream
                    .write_all(&[round, number as u8])
                    .unwrap_or_else(|error| panic!("{way:?}: connection {number}: {error}"));
            }
            for (number, stream) in streams.iter_mut().enumerate() {
                let mut answer = [0; 2];
                stream
                    .read_exact(&mut answer)
                    .unwrap_or_else(|error| panic!("{way:?}: connection {number}: {error}"));
                assert_eq!(answer, [round, number as u8], "{way:?}");
            }
        }
        // And they can all go and come again.
        drop(streams);
        echoes(way, local(port));
    }
}

#[test]
fn connections_out() {
    let kiln = Kiln::new();
    let image = image(&kiln);
    for way in WAYS {
        let server = TcpListener::bind("0.0.0.0:0").expect("a port");
        let port = server.local_addr().expect("an address").port().to_string();
        let answering = thread::spawn(move || {
            let (mut stream, _) = server.accept().expect("a connection");
            let mut line = [0; 4];
            stream.read_exact(&mut line).expect("a line");
            stream.write_all(b"seen\n").expect("it takes bytes");
        });
        // This machine's own address on whatever network it has; the loopback address is the guest's own.
        let probe = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        // No packet is sent by this: it only chooses an address of ours.
        let address = match probe
            .connect("192.0.2.1:9")
            .and_then(|()| probe.local_addr())
        {
            Ok(address) => address.ip().to_string(),
            Err(_) => {
                eprintln!("this machine has no network: not tested");
                return;
            }
        };
        let mut words = vec!["run"];
        words.extend(way);
        words.extend([
            image.to_str().expect("the path is text"),
            "--",
            &address,
            &port,
        ]);
        assert_eq!(kiln.succeed(words), "seen\n", "{way:?}");
        answering.join().expect("it answered");
    }
}

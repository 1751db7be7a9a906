//! Sockets against each other within one machine.

use alloc::{sync::Arc, vec::Vec};
use core::net::SocketAddr;

use super::*;
use crate::{
    Errno, Result,
    file::{File, OpenFile, OpenFlags, Readiness, Sink, Source},
};

use address::{Address, UnixName};
use linux_raw_sys::net as linux;
use option::SOL_SOCKET;

const CALLER: Caller = Caller {
    process: 7,
    uid: 1000,
    gid: 100,
    node: None,
    non_blocking: false,
};

fn machine() -> Net {
    Net {
        shared: Shared::new(Tables::new(1), None),
    }
}

fn socket(net: &Net, family: u16, kind: u32) -> Arc<dyn File> {
    net.socket(i32::from(family), kind, 0).unwrap()
}

fn of(file: &Arc<dyn File>) -> &dyn Socket {
    file.as_socket().unwrap()
}

fn inet(text: &str) -> Address {
    Address::Inet(text.parse().unwrap())
}

fn port(address: &Result<Address>) -> SocketAddr {
    match address {
        Ok(Address::Inet(address)) => *address,
        other => panic!("{other:?}"),
    }
}

fn listener(net: &Net, family: u16, address: &str, backlog: i32) -> (Arc<dyn File>, SocketAddr) {
    let file = socket(net, family, linux::SOCK_STREAM);
    of(&file).bind(&CALLER, &inet(address)).unwrap();
    of(&file).listen(&CALLER, backlog).unwrap();
    let bound = port(&of(&file).local_address());
    (file, bound)
}

fn send(file: &Arc<dyn File>, bytes: &[u8]) -> Result<usize> {
    of(file).send(
        &CALLER,
        &mut Source::kernel(bytes),
        &mut Outgoing::default(),
    )
}

fn receive(file: &Arc<dyn File>) -> Result<Vec<u8>> {
    let mut bytes = alloc::vec![0; 4096];
    let count = of(file)
        .receive(&mut Sink::kernel(&mut bytes), false)?
        .count;
    bytes.truncate(count);
    Ok(bytes)
}

fn pending_error(file: &Arc<dyn File>) -> i32 {
    let bytes = of(file).option(SOL_SOCKET, linux::SO_ERROR).unwrap();
    i32::from_ne_bytes(bytes.try_into().unwrap())
}

#[test]
fn tcp_connects_within_the_machine() {
    let net = machine();
    let (server, address) = listener(&net, address::AF_INET, "127.0.0.1:0", 5);
    assert!(server.readiness().is_empty());
    let client = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    of(&client)
        .connect(&CALLER, &Address::Inet(address))
        .unwrap();
    assert!(server.readiness().contains(Readiness::READABLE));
    let (accepted, peer) = of(&server).accept().unwrap();
    assert_eq!(Ok(peer), of(&client).local_address());
    assert_eq!(of(&accepted).local_address(), Ok(Address::Inet(address)));
    assert_eq!(of(&server).accept().err(), Some(Errno::EAGAIN));

    assert_eq!(send(&client, b"question"), Ok(8));
    assert!(accepted.readiness().contains(Readiness::READABLE));
    assert_eq!(receive(&accepted).unwrap(), b"question");
    assert_eq!(receive(&accepted), Err(Errno::EAGAIN));
    assert_eq!(send(&accepted, b"answer"), Ok(6));
    of(&accepted).shutdown(false, true).unwrap();
    assert_eq!(receive(&client).unwrap(), b"answer");
    assert_eq!(receive(&client).unwrap(), b"");
    assert_eq!(
        of(&client).connect(&CALLER, &Address::Inet(address)),
        Err(Errno::EISCONN)
    );
}

#[test]
fn a_background_connect_is_told_in_steps() {
    let net = machine();
    let (_server, address) = listener(&net, address::AF_INET, "127.0.0.1:0", 5);
    let caller = Caller {
        non_blocking: true,
        ..CALLER
    };
    let client = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    assert_eq!(
        of(&client).connect(&caller, &Address::Inet(address)),
        Err(Errno::EINPROGRESS)
    );
    assert!(client.readiness().contains(Readiness::WRITABLE));
    assert_eq!(pending_error(&client), 0);
    assert_eq!(
        of(&client).connect(&caller, &Address::Inet(address)),
        Ok(())
    );
    assert_eq!(
        of(&client).connect(&caller, &Address::Inet(address)),
        Err(Errno::EISCONN)
    );

    let client = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    let nobody = inet("127.0.0.1:9");
    assert_eq!(
        of(&client).connect(&caller, &nobody),
        Err(Errno::EINPROGRESS)
    );
    assert!(
        client
            .readiness()
            .contains(Readiness::ERROR | Readiness::HANGUP)
    );
    assert_eq!(pending_error(&client), Errno::ECONNREFUSED.number());
    assert_eq!(
        of(&client).connect(&CALLER, &nobody),
        Err(Errno::ECONNREFUSED)
    );
}

#[test]
fn a_full_backlog_makes_connecting_wait() {
    let net = machine();
    let (server, address) = listener(&net, address::AF_INET, "127.0.0.1:0", 1);
    let clients: Vec<_> = (0..4)
        .map(|_| socket(&net, address::AF_INET, linux::SOCK_STREAM))
        .collect();
    let results: Vec<_> = clients
        .iter()
        .map(|c| of(c).connect(&CALLER, &Address::Inet(address)))
        .collect();
    assert_eq!(
        results,
        [
            Ok(()),
            Ok(()),
            Err(Errno::EINPROGRESS),
            Err(Errno::EINPROGRESS)
        ]
    );
    assert_eq!(of(&clients[2]).finish_connect(), Err(Errno::EAGAIN));
    let (first, _) = of(&server).accept().unwrap();
    assert_eq!(of(&clients[2]).finish_connect(), Ok(()));
    assert_eq!(send(&clients[0], b"x"), Ok(1));
    assert_eq!(receive(&first).unwrap(), b"x");
    server.on_close();
    assert_eq!(of(&clients[3]).finish_connect(), Err(Errno::ECONNREFUSED));
    assert_eq!(receive(&clients[1]), Err(Errno::ECONNRESET));
}

#[test]
fn lingering_zero_resets() {
    let net = machine();
    let (server, address) = listener(&net, address::AF_INET, "127.0.0.1:0", 5);
    let client = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    of(&client)
        .connect(&CALLER, &Address::Inet(address))
        .unwrap();
    let (accepted, _) = of(&server).accept().unwrap();
    let linger = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
    of(&client)
        .set_option(SOL_SOCKET, linux::SO_LINGER, &linger)
        .unwrap();
    client.on_close();
    assert!(
        accepted
            .readiness()
            .contains(Readiness::ERROR | Readiness::HANGUP)
    );
    assert_eq!(receive(&accepted), Err(Errno::ECONNRESET));
}

#[test]
fn ports_are_free_again_after_closing() {
    let net = machine();
    let (server, address) = listener(&net, address::AF_INET, "127.0.0.1:0", 5);
    let other = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    assert_eq!(
        of(&other).bind(&CALLER, &Address::Inet(address)),
        Err(Errno::EADDRINUSE)
    );
    server.on_close();
    assert_eq!(of(&other).bind(&CALLER, &Address::Inet(address)), Ok(()));
    assert_eq!(
        of(&other).bind(&CALLER, &inet("127.0.0.1:0")),
        Err(Errno::EINVAL)
    );
    let foreign = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    assert_eq!(
        of(&foreign).bind(&CALLER, &inet("192.0.2.1:80")),
        Err(Errno::EADDRNOTAVAIL)
    );
    assert_eq!(
        of(&foreign).connect(&CALLER, &inet("192.0.2.1:80")),
        Err(Errno::ENETUNREACH)
    );
}

#[test]
fn a_dual_stack_listener_takes_both_families() {
    let net = machine();
    let (server, address) = listener(&net, address::AF_INET6, "[::]:0", 5);
    for (family, to) in [
        (address::AF_INET, "127.0.0.1"),
        (address::AF_INET6, "::1"),
        (address::AF_INET6, "127.0.0.1"),
    ] {
        let client = socket(&net, family, linux::SOCK_STREAM);
        let to = SocketAddr::new(to.parse().unwrap(), address.port());
        of(&client).connect(&CALLER, &Address::Inet(to)).unwrap();
        let (accepted, _) = of(&server).accept().unwrap();
        assert_eq!(port(&of(&accepted).local_address()), to);
    }
    let client = socket(&net, address::AF_INET, linux::SOCK_STREAM);
    assert_eq!(
        of(&client).connect(&CALLER, &inet("[::1]:1")),
        Err(Errno::EAFNOSUPPORT)
    );
}

#[test]
fn udp_keeps_datagrams_apart_and_drops_what_does_not_fit() {
    let net = machine();
    let server = socket(&net, address::AF_INET, linux::SOCK_DGRAM);
    of(&server).bind(&CALLER, &inet("127.0.0.1:5353")).unwrap();
    let client = socket(&net, address::AF_INET, linux::SOCK_DGRAM);
    for text in [&b"one"[..], b"", b"three"] {
        let mut to = Outgoing {
            to: Some(inet("127.0.0.1:5353")),
            ..Outgoing::default()
        };
        assert_eq!(
            of(&client).send(&CALLER, &mut Source::kernel(text), &mut to),
            Ok(text.len())
        );
    }
    let mut small = [0; 2];
    let incoming = of(&server)
        .receive(&mut Sink::kernel(&mut small), true)
        .unwrap();
    assert_eq!((incoming.count, incoming.full_length), (2, 3));
    assert_eq!(receive(&server).unwrap(), b"one");
    assert_eq!(receive(&server).unwrap(), b"");
    assert_eq!(receive(&server).unwrap(), b"three");
    assert_eq!(receive(&server), Err(Errno::EAGAIN));
    let large = alloc::vec![0; 65_508];
    let mut to = Outgoing {
        to: Some(inet("127.0.0.1:5353")),
        ..Outgoing::default()
    };
    assert_eq!(
        of(&client).send(&CALLER, &mut Source::kernel(&large), &mut to),
        Err(Errno::EMSGSIZE)
    );
    // The receiver's buffer is finite.
    for _ in 0..1000 {
        let mut to = Outgoing {
            to: Some(inet("127.0.0.1:5353")),
            ..Outgoing::default()
        };
        of(&client)
            .send(&CALLER, &mut Source::kernel(&[1; 1000]), &mut to)
            .unwrap();
    }
    let mut count = 0;
    while receive(&server).is_ok() {
        count += 1;
    }
    assert!((50..400).contains(&count), "{count}");
}

#[test]
fn a_connected_udp_socket_hears_its_peer_alone_and_learns_of_refusals() {
    let net = machine();
    let server = socket(&net, address::AF_INET, linux::SOCK_DGRAM);
    of(&server).bind(&CALLER, &inet("127.0.0.1:0")).unwrap();
    let address = of(&server).local_address().unwrap();
    let client = socket(&net, address::AF_INET, linux::SOCK_DGRAM);
    of(&client).connect(&CALLER, &address).unwrap();
    let own = of(&client).local_address().unwrap();
    assert_eq!(port(&Ok(own.clone())).ip().to_string(), "127.0.0.1");
    let stranger = socket(&net, address::AF_INET, linux::SOCK_DGRAM);
    let mut to = Outgoing {
        to: Some(own.clone()),
        ..Outgoing::default()
    };
    of(&stranger)
        .send(&CALLER, &mut Source::kernel(b"noise"), &mut to)
        .unwrap();
    assert_eq!(receive(&client), Err(Errno::EAGAIN));
    let mut to = Outgoing {
        to: Some(own),
        ..Outgoing::default()
    };
    of(&server)
        .send(&CALLER, &mut Source::kernel(b"news"), &mut to)
        .unwrap();
    assert_eq!(receive(&client).unwrap(), b"news");
    server.on_close();
    assert_eq!(send(&client, b"hello?"), Ok(6));
    assert!(client.readiness().contains(Readiness::ERROR));
    assert_eq!(receive(&client), Err(Errno::ECONNREFUSED));
}

fn abstract_name(name: &str) -> Address {
    Address::Unix(UnixName::Abstract(name.as_bytes().to_vec()))
}

#[test]
fn unix_streams_connect_by_name_and_know_their_peer() {
    let net = machine();
    let server = socket(&net, address::AF_UNIX, linux::SOCK_STREAM);
    assert_eq!(of(&server).listen(&CALLER, 5), Err(Errno::EINVAL));
    of(&server)
        .bind(&CALLER, &abstract_name("service"))
        .unwrap();
    let other = socket(&net, address::AF_UNIX, linux::SOCK_STREAM);
    assert_eq!(
        of(&other).bind(&CALLER, &abstract_name("service")),
        Err(Errno::EADDRINUSE)
    );
    assert_eq!(
        of(&other).connect(&CALLER, &abstract_name("service")),
        Err(Errno::ECONNREFUSED)
    );
    of(&server).listen(&CALLER, 5).unwrap();
    of(&other)
        .connect(
            &Caller {
                process: 9,
                uid: 5,
                gid: 6,
                ..CALLER
            },
            &abstract_name("service"),
        )
        .unwrap();
    let (accepted, _) = of(&server).accept().unwrap();
    let credentials = of(&accepted)
        .option(SOL_SOCKET, linux::SO_PEERCRED)
        .unwrap();
    assert_eq!(credentials, [9u32, 5, 6].map(u32::to_ne_bytes).concat());
    assert_eq!(of(&other).peer_address(), Ok(abstract_name("service")));
    send(&other, b"hello").unwrap();
    assert_eq!(receive(&accepted).unwrap(), b"hello");
    accepted.on_close();
    assert_eq!(receive(&other).unwrap(), b"");
    assert_eq!(send(&other, b"x"), Err(Errno::EPIPE));
    assert!(other.readiness().contains(Readiness::HANGUP));
    let wrong = socket(&net, address::AF_UNIX, linux::SOCK_DGRAM);
    assert_eq!(
        of(&wrong).connect(&CALLER, &abstract_name("service")),
        Err(Errno::EPROTOTYPE)
    );
    server.on_close();
    of(&wrong).bind(&CALLER, &abstract_name("service")).unwrap();
}

#[test]
fn descriptors_travel_with_their_bytes() {
    let net = machine();
    for kind in [linux::SOCK_STREAM, linux::SOCK_DGRAM, linux::SOCK_SEQPACKET] {
        let (a, b) = net
            .socket_pair(i32::from(address::AF_UNIX), kind, 0, &CALLER)
            .unwrap();
        let carried = OpenFile::new(
            socket(&net, address::AF_INET, linux::SOCK_DGRAM),
            OpenFlags::READ_WRITE,
        );
        let mut message = Outgoing {
            files: Vec::from([Arc::clone(&carried)]),
            ..Outgoing::default()
        };
        of(&a)
            .send(&CALLER, &mut Source::kernel(b"take"), &mut message)
            .unwrap();
        send(&a, b"more").unwrap();
        let mut bytes = [0; 100];
        let incoming = of(&b)
            .receive(&mut Sink::kernel(&mut bytes), false)
            .unwrap();
        assert_eq!((incoming.count, incoming.files.len()), (4, 1));
        assert!(Arc::ptr_eq(&incoming.files[0], &carried));
        assert_eq!(receive(&b).unwrap(), b"more");
    }
}

#[test]
fn packets_keep_their_bounds_and_end() {
    let net = machine();
    let (a, b) = net
        .socket_pair(
            i32::from(address::AF_UNIX),
            linux::SOCK_SEQPACKET,
            0,
            &CALLER,
        )
        .unwrap();
    send(&a, b"first").unwrap();
    send(&a, b"second").unwrap();
    assert_eq!(receive(&b).unwrap(), b"first");
    a.on_close();
    assert_eq!(receive(&b).unwrap(), b"second");
    assert_eq!(receive(&b).unwrap(), b"");
    assert_eq!(send(&b, b"x"), Err(Errno::EPIPE));
}

#[test]
fn a_full_inbox_makes_senders_wait() {
    let net = machine();
    let server = socket(&net, address::AF_UNIX, linux::SOCK_DGRAM);
    of(&server).bind(&CALLER, &abstract_name("inbox")).unwrap();
    let client = socket(&net, address::AF_UNIX, linux::SOCK_DGRAM);
    of(&client)
        .connect(&CALLER, &abstract_name("inbox"))
        .unwrap();
    let mut sent = 0;
    while send(&client, &[0; 1000]).is_ok() {
        sent += 1;
        assert!(sent < 10_000);
    }
    assert!(!client.readiness().contains(Readiness::WRITABLE));
    receive(&server).unwrap();
    assert!(client.readiness().contains(Readiness::WRITABLE));
    assert_eq!(send(&client, b"again"), Ok(5));
}

#[test]
fn an_automatic_name_is_unique() {
    let net = machine();
    let names: Vec<_> = (0..3)
        .map(|_| {
            let file = socket(&net, address::AF_UNIX, linux::SOCK_DGRAM);
            of(&file)
                .bind(&CALLER, &Address::Unix(UnixName::Unnamed))
                .unwrap();
            (of(&file).local_address().unwrap(), file)
        })
        .collect();
    assert!(names[0].0 != names[1].0 && names[1].0 != names[2].0);
}

#[test]
fn families_and_kinds_that_are_not_there_are_refused() {
    let net = machine();
    for (family, kind, protocol, error) in [
        (99, 1, 0, Errno::EAFNOSUPPORT),
        (-1, 1, 0, Errno::EAFNOSUPPORT),
        (2, 1, 17, Errno::EPROTONOSUPPORT),
        (2, 3, 1, Errno::EPERM),
        (2, 5, 0, Errno::ESOCKTNOSUPPORT),
        (16, 3, 15, Errno::EPROTONOSUPPORT),
    ] {
        assert_eq!(
            net.socket(family, kind, protocol).err(),
            Some(error),
            "{family} {kind} {protocol}"
        );
    }
}

#[test]
fn the_machine_answers_its_own_echo_requests() {
    let net = machine();
    for (family, protocol, to, request, reply) in [
        (address::AF_INET, 1, "127.0.0.1:0", 8, 0),
        (address::AF_INET6, 58, "[::1]:0", 128, 129),
    ] {
        let file = net
            .socket(i32::from(family), linux::SOCK_DGRAM, protocol)
            .unwrap();
        assert_eq!(receive(&file), Err(Errno::EAGAIN));
        let message = [request, 0, 0, 0, 9, 9, 0, 1, b'h', b'i'];
        let mut to = Outgoing {
            to: Some(inet(to)),
            ..Outgoing::default()
        };
        assert_eq!(
            of(&file).send(&CALLER, &mut Source::kernel(&message), &mut to),
            Ok(10)
        );
        let answer = receive(&file).unwrap();
        let identifier = port(&of(&file).local_address()).port();
        assert_eq!(answer[0], reply);
        assert_eq!(answer[4..6], identifier.to_be_bytes());
        assert_eq!(answer[6..], [0, 1, b'h', b'i']);
        assert_eq!(
            of(&file).send(&CALLER, &mut Source::kernel(&[0; 8]), &mut to),
            Err(Errno::EINVAL)
        );
    }
}

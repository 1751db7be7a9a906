//! The name server as its clients see it. Answers are read with hickory, which shares no code with what writes them.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name as Parsed, RData, RecordType},
};
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::oneshot,
    time::timeout,
};

use super::*;

/// As long as a test waits for what must happen.
const LONG: Duration = Duration::from_secs(20);
/// As long as it waits for what must not.
const SHORT: Duration = Duration::from_millis(200);

/// A unit that does as it is told.
#[derive(Default)]
struct Puppet {
    asked: AtomicUsize,
    answered: AtomicUsize,
    mode: Mutex<Mode>,
}

#[derive(Default)]
enum Mode {
    #[default]
    Warm,
    Stopped,
    Starting(Vec<oneshot::Sender<Result<(), NotReady>>>),
}

impl Puppet {
    fn starting() -> Arc<Self> {
        let puppet = Self::default();
        puppet.set(Mode::Starting(Vec::new()));
        Arc::new(puppet)
    }

    /// Those who waited.
    fn set(&self, mode: Mode) -> Vec<oneshot::Sender<Result<(), NotReady>>> {
        match std::mem::replace(&mut *self.mode.lock().expect("nobody panicked"), mode) {
            Mode::Starting(all) => all,
            _ => Vec::new(),
        }
    }

    fn ready(&self, what: Result<(), NotReady>) {
        for sender in self.set(Mode::Warm) {
            let _ = sender.send(what.clone());
        }
    }

    fn count(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Unit for Puppet {
    fn asked(&self) -> Asked {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match &mut *self.mode.lock().expect("nobody panicked") {
            Mode::Warm => Asked::Answer,
            Mode::Stopped => Asked::Fail,
            Mode::Starting(all) => {
                let (sender, receiver) = oneshot::channel();
                all.push(sender);
                Asked::Wait(receiver)
            }
        }
    }

    fn answered(&self) {
        self.answered.fetch_add(1, Ordering::SeqCst);
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn named(unit: &Arc<Puppet>, addresses: &[&str]) -> Name {
    Name {
        unit: Arc::clone(unit) as Arc<dyn Unit>,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        ttl: 42,
    }
}

/// `www.example.org` with two addresses, `v4.example.org` with one, `many.example.org` with a hundred, `*.star.test` and
/// `a.b.test` in the zone `test`.
fn zone(unit: &Arc<Puppet>) -> Zone {
    let many: Vec<_> = (0..100).map(|last| format!("127.1.1.{last}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let mut zone = Zone::builder();
    zone.name("www.example.org", named(unit, &["127.1.0.1", "fd00::1"]))
        .and_then(|zone| zone.name("v4.example.org", named(unit, &["127.1.0.2"])))
        .and_then(|zone| zone.name("many.example.org", named(unit, &many)))
        .and_then(|zone| zone.name("*.star.test", named(unit, &["127.1.0.3"])))
        .and_then(|zone| zone.name("a.b.test", named(unit, &["127.1.0.4"])))
        .and_then(|zone| zone.authoritative("test"))
        .and_then(|zone| zone.primary("ns.test", &[ip("127.0.0.1"), ip("::1")]))
        .expect("a zone");
    zone.build()
}

const UDP: Circumstances = Circumstances {
    tcp: false,
    forwarding: false,
    payload: 1232,
};
const TCP: Circumstances = Circumstances { tcp: true, ..UDP };

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let mut name = Parsed::from_ascii(name).expect("a name");
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    message.to_vec().expect("a message can be written")
}

fn parsed(bytes: &[u8]) -> Message {
    Message::from_vec(bytes).expect("an answer can be read")
}

fn ask_bytes(zone: &Zone, query: &[u8], under: Circumstances) -> Message {
    let mut out = Vec::new();
    match respond(zone, query, under, &mut out) {
        Outcome::Send(_) => parsed(&out),
        other => panic!("no answer but {other:?}"),
    }
}

fn ask(zone: &Zone, query: &Message) -> Message {
    ask_bytes(zone, &bytes(query), UDP)
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    message
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .collect()
}

/// The zone of the SOA in authority, its TTL.
fn soa(message: &Message) -> (String, u32) {
    match &message.authorities[..] {
        [record] if record.record_type() == RecordType::SOA => {
            (record.name.to_string(), record.ttl)
        }
        other => panic!("no SOA in {other:?}"),
    }
}

#[test]
fn addresses_are_answered() {
    let unit = Arc::new(Puppet::default());
    let zone = zone(&unit);
    let query = question("wWw.eXample.ORG", RecordType::A);
    let answer = ask(&zone, &query);
    assert_eq!(answer.metadata.id, 0x1234);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.authoritative);
    assert!(answer.metadata.recursion_desired);
    assert!(!answer.metadata.recursion_available);
    assert!(answer.edns.is_none());
    assert_eq!(addresses(&answer), [ip("127.1.0.1")]);
    assert_eq!(answer.answers[0].ttl, 42);
    // As it came, letter by letter.
    assert!(answer.queries[0].name().eq_case(query.queries[0].name()));
    assert_eq!(unit.count(), 1);

    let answer = ask(&zone, &question("www.example.org", RecordType::AAAA));
    assert_eq!(addresses(&answer), [ip("fd00::1")]);
    let answer = ask(&zone, &question("www.example.org", RecordType::ANY));
    assert_eq!(addresses(&answer), [ip("127.1.0.1"), ip("fd00::1")]);
    assert_eq!(unit.count(), 3);

    let mut query = question("www.example.org", RecordType::A);
    query.metadata.recursion_desired = false;
    let under = Circumstances {
        forwarding: true,
        ..UDP
    };
    let answer = ask_bytes(&zone, &bytes(&query), under);
    assert!(!answer.metadata.recursion_desired);
    assert!(answer.metadata.recursion_available);
}

#[test]
fn what_is_not_there_is_said_with_its_zone() {
    let unit = Puppet::starting();
    let zone = zone(&unit);
    // True at once, though the unit is only starting.
    let answer = ask(&zone, &question("v4.example.org", RecordType::AAAA));
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.answers.is_empty());
    assert_eq!(soa(&answer), ("v4.example.org.".into(), 60));
    assert_eq!(unit.count(), 1);
    for kind in [
        RecordType::TXT,
        RecordType::MX,
        RecordType::HTTPS,
        RecordType::DS,
    ] {
        let answer = ask(&zone, &question("www.example.org", kind));
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.metadata.authoritative);
        assert_eq!(soa(&answer).0, "www.example.org.");
    }
    assert_eq!(unit.count(), 1, "only addresses are interest");

    let answer = ask(&zone, &question("no.such.test", RecordType::A));
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(answer.metadata.authoritative);
    assert_eq!(soa(&answer), ("test.".into(), 60));
    // Between the zone and a name in it.
    for name in ["b.test", "star.test"] {
        let answer = ask(&zone, &question(name, RecordType::A));
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::NoError,
            "{name}"
        );
        assert_eq!(soa(&answer).0, "test.");
    }
    for name in ["org", "example.org", "below.www.example.org", "."] {
        let answer = ask(&zone, &question(name, RecordType::A));
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{name}"
        );
        assert!(!answer.metadata.authoritative);
        let under = Circumstances {
            forwarding: true,
            ..UDP
        };
        let query = bytes(&question(name, RecordType::A));
        let outcome = respond(&zone, &query, under, &mut Vec::new());
        assert!(matches!(outcome, Outcome::Forward), "{name}: {outcome:?}");
    }
}

#[test]
fn stars_stand_for_what_is_below_the_nearest_name() {
    let unit = Arc::new(Puppet::default());
    let mut builder = Zone::builder();
    builder
        .name("*.example.org", named(&unit, &["127.1.0.1"]))
        .and_then(|zone| zone.name("own.example.org", named(&unit, &["127.1.0.2"])))
        .expect("a zone");
    let twice = builder.name("*.EXAMPLE.org.", named(&unit, &[])).err();
    assert_eq!(twice, Some(ZoneError::Twice("*.EXAMPLE.org.".into())));
    let zone = builder.build();
    let found = |name| addresses(&ask(&zone, &question(name, RecordType::A)));
    assert_eq!(found("x.example.org"), [ip("127.1.0.1")]);
    assert_eq!(found("x.y.example.org"), [ip("127.1.0.1")]);
    assert_eq!(found("own.example.org"), [ip("127.1.0.2")]);
    assert_eq!(found("below.own.example.org"), [] as [IpAddr; 0]);
    assert_eq!(found("example.org"), [] as [IpAddr; 0]);
    let answer = ask(&zone, &question("x.example.org", RecordType::TXT));
    assert_eq!(soa(&answer).0, "x.example.org.");
    // A unit's wildcard has no one name for its address.
    let answer = ask(&zone, &question("1.0.1.127.in-addr.arpa", RecordType::PTR));
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[test]
fn names_of_addresses() {
    let unit = Arc::new(Puppet::default());
    let zone = zone(&unit);
    for (address, name) in [
        ("127.1.0.1", "www.example.org."),
        ("fd00::1", "www.example.org."),
        ("127.1.0.4", "a.b.test."),
    ] {
        let reverse = Parsed::from(ip(address)).to_string();
        for kind in [RecordType::PTR, RecordType::ANY] {
            let answer = ask(&zone, &question(&reverse, kind));
            assert!(answer.metadata.authoritative);
            match &answer.answers[..] {
                [record] => match &record.data {
                    RData::PTR(to) => assert_eq!(to.to_string(), name),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        }
        let answer = ask(&zone, &question(&reverse, RecordType::A));
        assert_eq!(soa(&answer).0, reverse.to_string());
    }
    assert_eq!(unit.count(), 0);
}

#[test]
fn the_zone_and_its_server() {
    let zone = zone(&Arc::new(Puppet::default()));
    for name in ["www.example.org", "test"] {
        let answer = ask(&zone, &question(name, RecordType::SOA));
        match &answer.answers[..] {
            [record] => match &record.data {
                RData::SOA(soa) => {
                    assert_eq!(soa.mname.to_string(), "ns.test.");
                    assert_eq!(soa.rname.to_string(), "hostmaster.kiln.internal.");
                    assert_eq!((soa.serial, soa.minimum), (1, 60));
                }
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
        let answer = ask(&zone, &question(name, RecordType::NS));
        assert!(
            matches!(&answer.answers[0].data, RData::NS(name) if name.to_string() == "ns.test.")
        );
        let glue: Vec<_> = answer
            .additionals
            .iter()
            .map(|record| (record.name.to_string(), record.data.ip_addr()))
            .collect();
        let expected = |text| ("ns.test.".to_owned(), Some(ip(text)));
        assert_eq!(glue, [expected("127.0.0.1"), expected("::1")]);
    }
    assert_eq!(
        addresses(&ask(&zone, &question("ns.test", RecordType::A))),
        [ip("127.0.0.1")]
    );
    // No zone begins here.
    let answer = ask(&zone, &question("a.b.test", RecordType::NS));
    assert_eq!(soa(&answer).0, "test.");
}

#[test]
fn units_that_are_stopped_fail() {
    let unit = Arc::new(Puppet::default());
    unit.set(Mode::Stopped);
    let zone = zone(&unit);
    let answer = ask(
        &zone,
        &with_edns(question("v4.example.org", RecordType::A), 1232),
    );
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert!(answer.answers.is_empty());
    // Extended error 14, "not ready".
    let code = answer
        .edns
        .as_ref()
        .and_then(|edns| edns.option(15.into()))
        .map(|option| format!("{option:?}"));
    assert!(code.is_some_and(|text| text.contains("14")), "{answer:?}");
}

#[test]
fn a_reason_is_cut_to_what_fits() {
    let unit = Puppet::starting();
    let zone = zone(&unit);
    let query = bytes(&with_edns(question("v4.example.org", RecordType::A), 512));
    let mut out = Vec::new();
    let why = NotReady("ü".repeat(10_000));
    let sent = answer::finish(&zone, &query, UDP, Err(why), &mut out).expect("an answer");
    assert_eq!(sent.code, ResponseCode::ServFail);
    assert!(out.len() < 512);
    parsed(&out);
}

#[test]
fn extensions() {
    let unit = Arc::new(Puppet::default());
    let zone = zone(&unit);
    let answer = ask(
        &zone,
        &with_edns(question("www.example.org", RecordType::A), 4096),
    );
    assert_eq!(answer.edns.as_ref().map(Edns::max_payload), Some(1232));
    assert_eq!(
        answer.edns.as_ref().map(|edns| edns.flags().dnssec_ok),
        Some(false)
    );

    let mut query = with_edns(question("www.example.org", RecordType::A), 4096);
    if let Some(edns) = &mut query.edns {
        edns.set_dnssec_ok(true);
    }
    let answer = ask(&zone, &query);
    assert_eq!(
        answer.edns.as_ref().map(|edns| edns.flags().dnssec_ok),
        Some(true)
    );

    let mut query = with_edns(question("www.example.org", RecordType::A), 4096);
    if let Some(edns) = &mut query.edns {
        edns.set_version(1);
    }
    let answer = ask(&zone, &query);
    // 16, which has two names.
    assert_eq!(u16::from(answer.metadata.response_code), 16);
    assert_eq!(answer.edns.as_ref().map(Edns::version), Some(0));
    assert!(answer.answers.is_empty());

    // Twice is an error; so is one with a name, or in another place.
    let plain = bytes(&question("www.example.org", RecordType::A));
    let opt = b"\0\0\x29\x04\xd0\0\0\0\0\0\0";
    let mut twice = [&plain[..], opt, opt].concat();
    twice[11] = 2;
    let mut named = [&plain[..], b"\x01a", opt].concat();
    named[11] = 1;
    let mut misplaced = [&plain[..], opt].concat();
    misplaced[7] = 1;
    let mut missing = plain.clone();
    missing[11] = 1;
    for wrong in [twice, named, misplaced, missing] {
        let answer = ask_bytes(&zone, &wrong, UDP);
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
        assert_eq!(answer.metadata.id, 0x1234);
    }
}

#[test]
fn what_does_not_fit_is_cut_and_says_so() {
    let zone = zone(&Arc::new(Puppet::default()));
    let query = question("many.example.org", RecordType::A);
    for (query, limit) in [
        (query.clone(), 512),
        (with_edns(query.clone(), 0), 512),
        (with_edns(query.clone(), 700), 700),
        (with_edns(query.clone(), 65_535), 1232),
    ] {
        let mut out = Vec::new();
        let outcome = respond(&zone, &bytes(&query), UDP, &mut out);
        assert!(matches!(
            outcome,
            Outcome::Send(Sent {
                truncated: true,
                ..
            })
        ));
        assert!(out.len() <= limit);
        let answer = parsed(&out);
        assert!(answer.metadata.truncation);
        assert!(answer.answers.is_empty());
        assert_eq!(answer.queries, query.queries);
        let whole = ask_bytes(&zone, &bytes(&query), TCP);
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 100);
    }
    // Twenty-odd fit into 512 bytes.
    let mut builder = Zone::builder();
    let some: Vec<_> = (0..29).map(|last| format!("127.1.1.{last}")).collect();
    let some: Vec<_> = some.iter().map(String::as_str).collect();
    let unit = Arc::new(Puppet::default());
    builder
        .name("many.example.org", named(&unit, &some))
        .expect("a name");
    let answer = ask(&builder.build(), &query);
    assert_eq!(answer.answers.len(), 29);
    assert!(!answer.metadata.truncation);
}

#[test]
fn messages_that_are_no_queries() {
    let zone = zone(&Arc::new(Puppet::default()));
    let good = bytes(&question("www.example.org", RecordType::A));
    let silent = |message: &[u8]| {
        let outcome = respond(&zone, message, UDP, &mut Vec::new());
        assert!(matches!(outcome, Outcome::Silence), "{outcome:?}");
    };
    silent(b"");
    silent(&good[..11]);
    let mut answer = good.clone();
    answer[2] |= 0x80;
    silent(&answer);
    answer.truncate(12);
    silent(&answer);

    let code = |message: &[u8]| {
        let answer = ask_bytes(&zone, message, UDP);
        assert_eq!(answer.metadata.id, 0x1234);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        answer.metadata.response_code
    };
    for cut in 12..good.len() {
        assert_eq!(code(&good[..cut]), ResponseCode::FormErr);
    }
    for (high, low) in [(0, 0), (0, 2), (1, 1), (255, 255)] {
        let mut message = good.clone();
        (message[4], message[5]) = (high, low);
        assert_eq!(code(&message), ResponseCode::FormErr);
    }
    for opcode in 1..16 {
        let mut message = good.clone();
        message[2] = opcode << 3;
        assert_eq!(code(&message), ResponseCode::NotImp);
    }
    let end = good.len();
    for (class, expected) in [(3, ResponseCode::Refused), (255, ResponseCode::Refused)] {
        let mut message = good.clone();
        message[end - 1] = class;
        assert_eq!(code(&message), expected);
    }
    for (kind, expected) in [
        (0, ResponseCode::FormErr),
        (41, ResponseCode::FormErr),
        (251, ResponseCode::Refused),
        (252, ResponseCode::Refused),
        (253, ResponseCode::NotImp),
        (254, ResponseCode::NotImp),
    ] {
        let mut message = good.clone();
        message[end - 3] = kind;
        assert_eq!(code(&message), expected, "type {kind}");
    }
    // Pointers, and labels of kinds that do not exist.
    for label in [0xc0, 0x40, 0x80] {
        let mut message = good.clone();
        message[12] = label;
        assert_eq!(code(&message), ResponseCode::FormErr);
    }
    // 256 bytes of name.
    let mut long = good[..12].to_vec();
    for _ in 0..127 {
        long.extend(b"\x01a");
    }
    let fits = [&long[..], &[0, 0, 1, 0, 1]].concat();
    assert_eq!(code(&fits), ResponseCode::Refused);
    let too_long = [&long[..], &[1, b'a', 0, 0, 1, 0, 1]].concat();
    assert_eq!(code(&too_long), ResponseCode::FormErr);
}

#[test]
fn zones_that_cannot_be() {
    let unit = Arc::new(Puppet::default());
    let mut builder = Zone::builder();
    let none = || named(&unit, &[]);
    assert!(builder.name("www.example.org", none()).is_ok());
    let error = |result: Result<&mut ZoneBuilder, ZoneError>| result.err().expect("an error");
    assert_eq!(
        error(builder.name("WWW.example.org.", none())),
        ZoneError::Twice("WWW.example.org.".into())
    );
    assert_eq!(
        error(builder.name("a..b", none())),
        ZoneError::NotAName("a..b".into())
    );
    assert_eq!(
        error(builder.name("a.*.b", none())),
        ZoneError::Star("a.*.b".into())
    );
    assert_eq!(
        error(builder.name("*.*.b", none())),
        ZoneError::Star("*.*.b".into())
    );
    assert_eq!(
        error(builder.authoritative("*.b")),
        ZoneError::Star("*.b".into())
    );
    assert!(
        error(builder.reverse(ip("::1"), "", 1))
            .to_string()
            .contains("www.example.org")
    );
}

static ANY_ZONE: LazyLock<Zone> = LazyLock::new(|| zone(&Arc::new(Puppet::default())));

/// Whatever comes: no panic, no answer to an answer, and each answer can be read, belongs to its query and fits.
fn check(zone: &Zone, message: &[u8], under: Circumstances) {
    let mut out = Vec::new();
    match respond(zone, message, under, &mut out) {
        Outcome::Send(_) => {
            assert_eq!(message[2] & 0x80, 0);
            assert_eq!(message[..2], out[..2]);
            let limit = if under.tcp {
                65_535
            } else {
                usize::from(under.payload)
            };
            assert!(out.len() <= limit);
            let answer = parsed(&out);
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            if let [query] = &answer.queries[..] {
                assert_eq!(
                    out[12..][..query.name().len()],
                    message[12..][..query.name().len()]
                );
            }
            assert!(matches!(
                respond(zone, &out, under, &mut Vec::new()),
                Outcome::Silence
            ));
        }
        Outcome::Forward => assert!(under.forwarding),
        Outcome::Silence => assert!(message.len() < 12 || message[2] & 0x80 != 0),
        Outcome::Wait(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn any_bytes(message in prop::collection::vec(any::<u8>(), 0..600), tcp: bool, forwarding: bool) {
        check(&ANY_ZONE, &message, Circumstances { tcp, forwarding, ..UDP });
    }

    #[test]
    fn queries_with_mistakes(
        name in prop::sample::select(vec!["www.example.org", "many.example.org", "x.star.test", "nix.test", "de"]),
        kind in any::<u16>(),
        payload in prop::option::of(any::<u16>()),
        mistakes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        tcp: bool,
        forwarding: bool,
    ) {
        let mut query = question(name, RecordType::from(kind % 300));
        if let Some(payload) = payload {
            query = with_edns(query, payload);
        }
        let mut message = bytes(&query);
        for (at, value) in mistakes {
            let at = at.index(message.len());
            message[at] = value;
        }
        check(&ANY_ZONE, &message, Circumstances { tcp, forwarding, ..UDP });
    }
}

// With sockets.

struct Running {
    server: Server,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn start(configuration: Configuration, zone: Zone) -> Self {
        Self::of(Server::bind(configuration, zone).await.expect("a server"))
    }

    fn of(server: Server) -> Self {
        let copy = server.clone();
        let task = tokio::spawn(async move { copy.run().await });
        Self { server, task }
    }

    fn address(&self) -> SocketAddr {
        self.server.local_addresses()[0]
    }

    async fn client(&self) -> UdpSocket {
        let to = self.address();
        let client = UdpSocket::bind((to.ip(), 0)).await.expect("a socket");
        client.connect(to).await.expect("an address");
        client
    }

    async fn stop(self) {
        self.server.shutdown();
        let ended = timeout(LONG, self.task).await.expect("it ends");
        ended.expect("no panic").expect("no error");
    }

    /// Until something holds.
    async fn until(&self, what: impl Fn(&Server) -> bool) {
        timeout(LONG, async {
            while !what(&self.server) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{:?}", self.server.statistics()));
    }
}

fn local() -> Configuration {
    Configuration {
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
        forward: Forward::Refuse,
        ..Configuration::default()
    }
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut room = vec![0; 65_535];
    let length = timeout(LONG, socket.recv(&mut room))
        .await
        .expect("in time")
        .expect("an answer");
    parsed(&room[..length])
}

async fn nothing(socket: &UdpSocket) {
    let mut room = vec![0; 65_535];
    let received = timeout(SHORT, socket.recv(&mut room)).await;
    assert!(received.is_err(), "{received:?}");
}

async fn exchange(socket: &UdpSocket, query: &Message) -> Message {
    socket.send(&bytes(query)).await.expect("sent");
    receive(socket).await
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

async fn receive_tcp(stream: &mut TcpStream) -> Message {
    let read = async {
        let length = stream.read_u16().await?;
        let mut message = vec![0; usize::from(length)];
        stream.read_exact(&mut message).await?;
        std::io::Result::Ok(message)
    };
    parsed(
        &timeout(LONG, read)
            .await
            .expect("in time")
            .expect("an answer"),
    )
}

#[tokio::test]
async fn a_thousand_wait_for_one_name() {
    let unit = Puppet::starting();
    let running = Running::start(local(), zone(&unit)).await;
    let mut clients = Vec::new();
    for client in 0..50u16 {
        let socket = running.client().await;
        for number in 0..20u16 {
            let mut query = question("www.example.org", RecordType::A);
            query.metadata.id = client * 20 + number;
            socket.send(&bytes(&query)).await.expect("sent");
        }
        clients.push(socket);
        // No more at once than a socket's buffer holds.
        running
            .until(|server| server.waiting().0 == usize::from(client + 1) * 20)
            .await;
    }
    assert_eq!(unit.count(), 1000);
    nothing(&clients[0]).await;
    unit.ready(Ok(()));
    for (client, socket) in clients.iter().enumerate() {
        let mut seen = Vec::new();
        for _ in 0..20 {
            let answer = receive(socket).await;
            assert_eq!(addresses(&answer), [ip("127.1.0.1")]);
            seen.push(usize::from(answer.metadata.id));
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(client * 20..client * 20 + 20));
    }
    running.until(|server| server.waiting().0 == 0).await;
    running
        .until(|_| unit.answered.load(Ordering::SeqCst) == 1000)
        .await;
    let statistics = running.server.statistics();
    assert_eq!(
        (statistics.waited, statistics.query_a, statistics.udp),
        (1000, 1000, 1000)
    );
    running.stop().await;
}

#[tokio::test]
async fn who_asks_again_is_answered_once() {
    let unit = Puppet::starting();
    let running = Running::start(local(), zone(&unit)).await;
    let client = running.client().await;
    let query = question("www.example.org", RecordType::A);
    for _ in 0..5 {
        client.send(&bytes(&query)).await.expect("sent");
    }
    running
        .until(|server| server.statistics().repeated == 4)
        .await;
    assert_eq!(unit.count(), 1);
    // Another question with the same id is another.
    let other = exchange(&client, &question("v4.example.org", RecordType::AAAA)).await;
    assert_eq!(soa(&other).0, "v4.example.org.");
    unit.ready(Ok(()));
    assert_eq!(addresses(&receive(&client).await), [ip("127.1.0.1")]);
    nothing(&client).await;
    // And is answered again when it asks again.
    assert_eq!(
        addresses(&exchange(&client, &query).await),
        [ip("127.1.0.1")]
    );
    running.stop().await;
}

#[tokio::test]
async fn who_waits_is_told_of_failure() {
    let unit = Puppet::starting();
    let mut configuration = local();
    configuration.limits.waiting = 2;
    let running = Running::start(configuration, zone(&unit)).await;
    let client = running.client().await;
    let mut query = question("www.example.org", RecordType::A);
    for id in 0..3 {
        query.metadata.id = id;
        client.send(&bytes(&query)).await.expect("sent");
    }
    running
        .until(|server| server.statistics().dropped_busy == 1)
        .await;
    unit.ready(Err(NotReady("it did not listen".into())));
    for _ in 0..2 {
        let answer = receive(&client).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    // A sender that is dropped.
    unit.set(Mode::Starting(Vec::new()));
    client.send(&bytes(&query)).await.expect("sent");
    running.until(|server| server.waiting().0 == 1).await;
    drop(unit.set(Mode::Stopped));
    assert_eq!(
        receive(&client).await.metadata.response_code,
        ResponseCode::ServFail
    );
    // The end: silence, so that clients ask again.
    unit.set(Mode::Starting(Vec::new()));
    client.send(&bytes(&query)).await.expect("sent");
    running.until(|server| server.waiting().0 == 1).await;
    let server = running.server.clone();
    running.stop().await;
    timeout(LONG, async {
        while server.waiting().0 > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("nobody waits");
}

#[tokio::test]
async fn a_reload_holds_for_who_waits() {
    let unit = Puppet::starting();
    let running = Running::start(local(), zone(&unit)).await;
    let client = running.client().await;
    let query = question("www.example.org", RecordType::A);
    client.send(&bytes(&query)).await.expect("sent");
    running.until(|server| server.waiting().0 == 1).await;
    let mut builder = Zone::builder();
    builder
        .name("www.example.org", named(&unit, &["127.5.5.5"]))
        .expect("a name");
    running.server.set_zone(builder.build());
    unit.ready(Ok(()));
    assert_eq!(addresses(&receive(&client).await), [ip("127.5.5.5")]);

    unit.set(Mode::Starting(Vec::new()));
    client.send(&bytes(&query)).await.expect("sent");
    running.until(|server| server.waiting().0 == 1).await;
    running.server.zone().store(Arc::default());
    unit.ready(Ok(()));
    assert_eq!(
        receive(&client).await.metadata.response_code,
        ResponseCode::Refused
    );
    assert_eq!(
        exchange(&client, &query).await.metadata.response_code,
        ResponseCode::Refused
    );
    running.stop().await;
}

#[tokio::test]
async fn connections_carry_many_queries() {
    let unit = Puppet::starting();
    let mut configuration = local();
    configuration.limits.idle = Duration::from_millis(500);
    let running = Running::start(configuration, zone(&unit)).await;
    let mut stream = TcpStream::connect(running.address())
        .await
        .expect("a connection");
    let mut slow = question("www.example.org", RecordType::A);
    slow.metadata.id = 1;
    let mut fast = question("many.example.org", RecordType::TXT);
    fast.metadata.id = 2;
    let both = [framed(&bytes(&slow)), framed(&bytes(&fast))].concat();
    // In pieces, as it may come.
    for piece in both.chunks(7) {
        stream.write_all(piece).await.expect("written");
        tokio::task::yield_now().await;
    }
    // Out of order: who is ready does not wait for others.
    assert_eq!(receive_tcp(&mut stream).await.metadata.id, 2);
    // Who waits for an answer is not idle.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    unit.ready(Ok(()));
    assert_eq!(receive_tcp(&mut stream).await.metadata.id, 1);
    let many = bytes(&question("many.example.org", RecordType::A));
    stream
        .write_all(&framed(&many).repeat(200))
        .await
        .expect("written");
    for _ in 0..200 {
        assert_eq!(receive_tcp(&mut stream).await.answers.len(), 100);
    }
    // Then it is.
    let end = timeout(LONG, stream.read_u16())
        .await
        .expect("closed in time");
    assert!(end.is_err());
    assert_eq!(running.server.statistics().tcp, 202);

    // One that says nothing more is answered all the same.
    let mut stream = TcpStream::connect(running.address())
        .await
        .expect("a connection");
    unit.set(Mode::Starting(Vec::new()));
    stream
        .write_all(&framed(&bytes(&slow)))
        .await
        .expect("written");
    stream.shutdown().await.expect("half closed");
    running.until(|server| server.waiting().0 == 1).await;
    unit.ready(Ok(()));
    assert_eq!(receive_tcp(&mut stream).await.metadata.id, 1);
    running.stop().await;
}

#[tokio::test]
async fn connections_are_limited() {
    let mut configuration = local();
    configuration.limits.connections = 1;
    configuration.limits.queries_per_connection = 1;
    let unit = Arc::new(Puppet::default());
    let running = Running::start(configuration, zone(&unit)).await;
    let mut first = TcpStream::connect(running.address())
        .await
        .expect("a connection");
    let query = framed(&bytes(&question("www.example.org", RecordType::A)));
    first.write_all(&query.repeat(3)).await.expect("written");
    for _ in 0..3 {
        receive_tcp(&mut first).await;
    }
    let mut second = TcpStream::connect(running.address())
        .await
        .expect("a connection");
    let end = timeout(LONG, second.read_u8())
        .await
        .expect("closed in time");
    assert!(end.is_err());
    assert_eq!(running.server.statistics().connections_refused, 1);
    // An answer instead of a query: closed.
    first
        .write_all(&framed(&[0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
        .await
        .expect("written");
    let end = timeout(LONG, first.read_u8())
        .await
        .expect("closed in time");
    assert!(end.is_err());
    running.stop().await;
}

#[tokio::test]
async fn malformed_datagrams_are_dropped_and_counted() {
    let running = Running::start(local(), zone(&Arc::new(Puppet::default()))).await;
    let client = running.client().await;
    for message in [
        &b""[..],
        b"x",
        &[0; 11],
        &[0, 0, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    ] {
        client.send(message).await.expect("sent");
    }
    running
        .until(|server| server.statistics().dropped_malformed == 4)
        .await;
    client.send(&[0; 12]).await.expect("sent");
    assert_eq!(
        receive(&client).await.metadata.response_code,
        ResponseCode::FormErr
    );
    let statistics = running.server.statistics();
    assert_eq!((statistics.udp, statistics.answer_formerr), (5, 1));
    running.stop().await;
}

#[tokio::test]
async fn answers_come_from_the_address_that_was_asked() {
    let mut configuration = local();
    configuration.listen = vec![
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        "[::1]:0".parse().expect("an address"),
    ];
    let running = Running::start(configuration, zone(&Arc::new(Puppet::default()))).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let to = SocketAddr::from(([127, 0, 0, 77], running.address().port()));
    // A connected socket takes answers from there alone.
    client.connect(to).await.expect("an address");
    let query = question("www.example.org", RecordType::A);
    assert_eq!(addresses(&exchange(&client, &query).await).len(), 1);
    let client = UdpSocket::bind("[::1]:0").await.expect("a socket");
    client
        .connect(running.server.local_addresses()[1])
        .await
        .expect("an address");
    assert_eq!(addresses(&exchange(&client, &query).await).len(), 1);

    let taken = Configuration {
        listen: vec![running.server.local_addresses()[1]],
        ..local()
    };
    let error = Server::bind(taken, Zone::default())
        .await
        .err()
        .expect("an error");
    assert!(error.to_string().contains("another name server"), "{error}");
    running.stop().await;
}

/// Another name server, which answers each query with what a function makes of it: messages.
async fn upstream(answer: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + Sync + 'static) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let address = tcp.local_addr().expect("an address");
    let udp = UdpSocket::bind(address).await.expect("the same port");
    let answer = Arc::new(answer);
    let same = Arc::clone(&answer);
    tokio::spawn(async move {
        let mut room = vec![0; 65_535];
        while let Ok((length, from)) = udp.recv_from(&mut room).await {
            for message in answer(&room[..length]) {
                let _ = udp.send_to(&message, from).await;
            }
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let Ok(length) = stream.read_u16().await else {
                continue;
            };
            let mut query = vec![0; usize::from(length)];
            let _ = stream.read_exact(&mut query).await;
            for message in same(&query) {
                let _ = stream.write_all(&framed(&message)).await;
            }
        }
    });
    address
}

/// The query as an answer, with a code.
fn turned(query: &[u8], code: u8) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80 | code;
    answer
}

async fn forwarding(forward: Forward) -> Running {
    let configuration = Configuration { forward, ..local() };
    Running::start(configuration, zone(&Arc::new(Puppet::default()))).await
}

#[tokio::test]
async fn names_of_others_are_asked_of_others() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let copy = Arc::clone(&seen);
    let refuses = upstream(|query| vec![turned(query, 5)]).await;
    let answers = upstream(move |query| {
        copy.lock().expect("nobody panicked").push(query.to_vec());
        let right = turned(query, 0);
        // Forged: another id, another question, no answer at all.
        let mut id = right.clone();
        id[0] ^= 1;
        let mut name = right.clone();
        name[13] ^= 1;
        vec![
            id,
            name,
            query.to_vec(),
            vec![1, 2, 3],
            right.clone(),
            right,
        ]
    })
    .await;
    let running = forwarding(Forward::To(vec![refuses, answers])).await;
    let client = running.client().await;
    let mut query = with_edns(question("Others.example.com", RecordType::MX), 4000);
    query.metadata.checking_disabled = true;
    let mut ids = std::collections::HashSet::new();
    for round in 0..20 {
        query.metadata.id = round;
        let answer = exchange(&client, &query).await;
        assert_eq!(answer.metadata.id, round);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.metadata.recursion_available);
        let asked = std::mem::take(&mut *seen.lock().expect("nobody panicked"));
        // As it came, but for the id.
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0][2..], bytes(&query)[2..]);
        ids.insert(asked[0][..2].to_vec());
    }
    assert!(ids.len() > 10, "ids are random");
    let statistics = running.server.statistics();
    assert_eq!(
        (statistics.forwarded, statistics.forward_mismatched),
        (20, 80)
    );
    assert_eq!(running.server.waiting(), (0, 0));

    // Ours are not asked of others.
    let answer = exchange(&client, &question("www.example.org", RecordType::A)).await;
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert!(seen.lock().expect("nobody panicked").is_empty());
    running.stop().await;
}

#[tokio::test]
async fn others_are_asked_over_tcp_by_who_came_over_tcp() {
    let other = upstream(|query| {
        let mut answer = turned(query, 0);
        answer.resize(20_000, 7);
        vec![answer]
    })
    .await;
    let running = forwarding(Forward::To(vec![other])).await;
    let mut stream = TcpStream::connect(running.address())
        .await
        .expect("a connection");
    let query = bytes(&question("others.example.com", RecordType::A));
    stream.write_all(&framed(&query)).await.expect("written");
    let length = timeout(LONG, stream.read_u16())
        .await
        .expect("in time")
        .expect("an answer");
    assert_eq!(length, 20_000);
    let mut answer = vec![0; 20_000];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(answer[..2], query[..2]);
    running.stop().await;
}

#[tokio::test]
async fn no_answer_of_others_is_a_failure() {
    // Nobody listens there.
    let free = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let nobody = free.local_addr().expect("an address");
    drop(free);
    let running = forwarding(Forward::To(vec![nobody])).await;
    let client = running.client().await;
    let query = question("others.example.com", RecordType::A);
    let answer = exchange(&client, &query).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(running.server.statistics().forward_failed, 1);
    running.stop().await;

    // All refuse: so do we.
    let refuses = upstream(|query| vec![turned(query, 5)]).await;
    let running = forwarding(Forward::To(vec![refuses, refuses])).await;
    let client = running.client().await;
    let answer = exchange(&client, &query).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    running.stop().await;
}

#[tokio::test]
async fn never_itself_and_not_for_everybody() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("resolv.conf");
    std::fs::write(&path, "nameserver 127.0.0.1\n").expect("written");
    let mut configuration = local();
    configuration.forward = Forward::System;
    configuration.resolv_conf = path;
    configuration.forward_for = vec!["10.0.0.0/8".parse().expect("a network")];
    let running = Running::start(configuration, zone(&Arc::new(Puppet::default()))).await;
    let client = running.client().await;
    let answer = exchange(&client, &question("others.example.com", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(!answer.metadata.recursion_available);
    running.stop().await;

    for listen in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        let (running, own) = forwarding_to_itself(listen).await;
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        client.connect(own).await.expect("an address");
        let answer = exchange(&client, &question("others.example.com", RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(running.server.statistics().udp, 1);
        running.stop().await;
    }
}

/// A server that is told to ask itself.
async fn forwarding_to_itself(listen: Ipv4Addr) -> (Running, SocketAddr) {
    loop {
        // Its address is to be known before it listens, so that another may take it meanwhile.
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
        let own = free.local_addr().expect("an address");
        drop(free);
        let configuration = Configuration {
            listen: vec![SocketAddr::from((listen, own.port()))],
            forward: Forward::To(vec![own]),
            ..local()
        };
        if let Ok(server) = Server::bind(configuration, Zone::default()).await {
            return (Running::of(server), own);
        }
    }
}

#[tokio::test]
async fn datagrams_that_the_kernel_joined() {
    let running = Running::start(local(), zone(&Arc::new(Puppet::default()))).await;
    let client = running.client().await;
    let state = quinn_udp::UdpSocketState::new((&client).into()).expect("a socket");
    let number = state.max_gso_segments().min(10);
    let mut query = question("www.example.org", RecordType::A);
    let mut messages = Vec::new();
    for id in 0..number {
        query.metadata.id = id as u16;
        messages.extend(bytes(&query));
    }
    let transmit = quinn_udp::Transmit {
        destination: running.address(),
        ecn: None,
        contents: &messages,
        segment_size: Some(messages.len() / number),
        src_ip: None,
    };
    let send = || state.try_send((&client).into(), &transmit);
    client
        .async_io(tokio::io::Interest::WRITABLE, send)
        .await
        .expect("sent");
    for id in 0..number {
        // The answers go out one by one.
        let answer = receive(&client).await;
        assert_eq!(usize::from(answer.metadata.id), id);
        assert_eq!(addresses(&answer), [ip("127.1.0.1")]);
    }
    running.stop().await;
}

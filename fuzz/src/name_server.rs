//! What comes to the summoner's name server.

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use kiln_summon::dns::{Asked, Circumstances, Name, Outcome, Unit, Zone, respond};

struct Warm;

impl Unit for Warm {
    fn asked(&self) -> Asked {
        Asked::Answer
    }
}

struct Stopped;

impl Unit for Stopped {
    fn asked(&self) -> Asked {
        Asked::Fail
    }
}

static ZONE: LazyLock<Zone> = LazyLock::new(|| {
    let name = |unit: Arc<dyn Unit>, addresses: &[IpAddr]| Name {
        unit,
        addresses: addresses.to_vec(),
        ttl: 60,
    };
    let both = [
        IpAddr::from([127, 0, 0, 2]),
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]),
    ];
    let many: Vec<_> = (0..100)
        .map(|last| IpAddr::from([127, 0, 1, last]))
        .collect();
    let mut zone = Zone::builder();
    zone.name("www.example.org", name(Arc::new(Warm), &both))
        .and_then(|zone| zone.name("many.test", name(Arc::new(Warm), &many)))
        .and_then(|zone| zone.name("*.star.test", name(Arc::new(Warm), &both)))
        .and_then(|zone| zone.name("stopped.test", name(Arc::new(Stopped), &both)))
        .and_then(|zone| zone.authoritative("test"))
        .and_then(|zone| zone.primary("ns.test", &both))
        .expect("a zone");
    zone.build()
});

/// Messages to the name server, behind a byte that says how they came. What is no query is not answered; an answer
/// belongs to its query, fits, and is not answered in turn.
pub fn name_server(bytes: &[u8]) {
    let Some((&how, message)) = bytes.split_first() else {
        return;
    };
    let under = Circumstances {
        tcp: how & 1 != 0,
        forwarding: how & 2 != 0,
        payload: 1232,
    };
    let mut out = Vec::new();
    match respond(&ZONE, message, under, &mut out) {
        Outcome::Send(sent) => {
            assert!(message.len() >= 12 && message[2] & 0x80 == 0);
            assert!(out.len() >= 12 && out[2] & 0x80 != 0);
            assert_eq!(out[..2], message[..2]);
            assert_eq!(sent.truncated, out[2] & 2 != 0);
            assert!(out.len() <= if under.tcp { 65_535 } else { 1232 });
            // The question comes back as it was, or not at all.
            if out[5] != 0 {
                let end = 12
                    + out[12..]
                        .iter()
                        .position(|&byte| byte == 0)
                        .expect("a root");
                assert_eq!(out[12..end + 5], message[12..end + 5]);
            }
            let again = respond(&ZONE, &out, under, &mut Vec::new());
            assert!(matches!(again, Outcome::Silence));
        }
        Outcome::Forward => assert!(under.forwarding && message.len() > 16),
        Outcome::Silence => assert!(message.len() < 12 || message[2] & 0x80 != 0),
        Outcome::Wait(_) => unreachable!("no unit here lets anybody wait"),
    }
}

/// Queries of several types, with and without EDNS.
pub fn name_server_seeds() -> Vec<Vec<u8>> {
    let question = |how: u8, name: &[u8], kind: u8, extension: &[u8]| {
        let mut seed = vec![how, 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0];
        seed.push(u8::from(!extension.is_empty()));
        seed.extend_from_slice(name);
        seed.extend([0, kind, 0, 1]);
        seed.extend_from_slice(extension);
        seed
    };
    let extension = b"\0\0\x29\x10\0\0\0\x80\0\0\x0c\0\x0a\0\x08kilnkiln";
    vec![
        question(0, b"\x03wWw\x07example\x03org\0", 1, b""),
        question(1, b"\x03www\x07example\x03org\0", 28, extension),
        question(0, b"\x04many\x04test\0", 255, b""),
        question(2, b"\x01a\x01b\x04star\x04test\0", 1, extension),
        question(3, b"\x07stopped\x04test\0", 1, extension),
        question(0, b"\x04test\0", 6, b""),
        question(0, b"\x04test\0", 2, extension),
        question(0, b"\x012\x010\x010\x03127\x07in-addr\x04arpa\0", 12, b""),
        question(2, b"\x07example\x03com\0", 16, b""),
    ]
}

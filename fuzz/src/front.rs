//! What comes to the summoner's shared ports.

use kiln_summon::front::{HEAD_BYTES, http, tls};

/// The first bytes of a connection, behind a byte that says what is spoken and in which parts they come. The parts make no
/// difference, and nobody waits for more than the longest head.
pub fn front(bytes: &[u8]) {
    let Some((&how, bytes)) = bytes.split_first() else {
        return;
    };
    let part = 1 + usize::from(how >> 1);
    let ends = (part..bytes.len()).step_by(part).chain([bytes.len()]);
    let coming = ends.filter_map(|end| bytes.get(..end));
    if how & 1 == 0 {
        let whole = http::head(bytes);
        let mut known = 0;
        let mut found = http::Head::Incomplete;
        for part in coming {
            if http::may_end(part, known) {
                found = http::head(part);
                if found != http::Head::Incomplete {
                    break;
                }
            }
            known = part.len();
        }
        // A mistake is seen only when there is a reason to look.
        match (&whole, &found) {
            (http::Head::Refused(_), _) => {}
            _ => assert_eq!(whole, found),
        }
        assert!(found != http::Head::Incomplete || bytes.len() < HEAD_BYTES);
        if let http::Head::Host(name) = found {
            assert!(!name.is_empty() && name.len() < HEAD_BYTES);
            assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()));
        }
    } else {
        let whole = tls::Reader::default().read(bytes);
        let mut reader = tls::Reader::default();
        let mut found = tls::Hello::Incomplete;
        for part in coming {
            found = reader.read(part);
            if found != tls::Hello::Incomplete {
                break;
            }
        }
        match (&whole, &found) {
            (tls::Hello::Refused(_), tls::Hello::Refused(_)) => {}
            _ => assert_eq!(whole, found),
        }
        assert!(found != tls::Hello::Incomplete || bytes.len() < HEAD_BYTES);
    }
}

/// Requests of several forms, and a ClientHello in one record and in two.
pub fn front_seeds() -> Vec<Vec<u8>> {
    let request = |how: u8, text: &str| [&[how], text.as_bytes()].concat();
    // TLS 1.2, one cipher suite, server_name and signature_algorithms.
    let extensions: &[u8] =
        b"\0\0\0\x0b\0\x09\0\0\x06a.test\0\x0d\0\x06\0\x04\x04\x03\x08\x04\0\x0a\0\x04\0\x02\0\x1d";
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    let record = |part: &[u8]| {
        let length = (part.len() as u16).to_be_bytes();
        [&[22, 3, 1], &length[..], part].concat()
    };
    let (first, second) = message.split_at(20);
    vec![
        request(0, "GET / HTTP/1.1\r\nHost: www.example.org:80\r\n\r\n"),
        request(
            14,
            "HEAD http://a.test/x HTTP/1.1\r\nX: y\r\nhost: b\r\n\r\nrest",
        ),
        request(200, "GET / HTTP/1.0\n\n"),
        [&[1], &record(&message)[..]].concat(),
        [&[9], &record(first)[..], &record(second)[..], b"rest"].concat(),
    ]
}

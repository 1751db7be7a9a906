//! Name service: questions for names of instances are answered here, all others are forwarded as they are.
//!
//! Source: RFC 1035 section 4. Not for: caching, DNSSEC, names compressed in questions (no resolver sends them).

use std::net::IpAddr;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_INTERNET: u16 = 1;
/// Seconds that an answer may be kept: instances come and go.
const LIFETIME: u32 = 5;

/// The one question of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name in lower case, without a final dot.
    pub name: String,
    /// Its type (1 for A, 28 for AAAA).
    pub kind: u16,
    /// Its class (1 for the Internet).
    pub class: u16,
    /// Bytes of the header and the question.
    end: usize,
}

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The name's addresses; those of the other family are left out.
    Addresses(Vec<IpAddr>),
    /// The question cannot be answered now (SERVFAIL).
    Failure,
}

/// Reads the question of a query; None when it is none, or not plain.
#[must_use]
pub fn parse_question(message: &[u8]) -> Option<Question> {
    let header: &[u8; 12] = message.first_chunk()?;
    // A query, of kind "standard", with one question.
    if header[2] & 0xf8 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let mut at = 12;
    let mut name = String::new();
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        match length {
            0 => break,
            1..=63 => {
                let label = message.get(at..at + length)?;
                if !name.is_empty() {
                    name.push('.');
                }
                for byte in label {
                    // What is no letter, digit or such is kept apart from those that are.
                    name.push(if byte.is_ascii_graphic() {
                        byte.to_ascii_lowercase() as char
                    } else {
                        '\u{fffd}'
                    });
                }
                at += length;
            }
            _ => return None,
        }
        if at > 12 + 255 {
            return None;
        }
    }
    let fixed = message.get(at..at + 4)?;
    Some(Question {
        name,
        kind: u16::from_be_bytes([fixed[0], fixed[1]]),
        class: u16::from_be_bytes([fixed[2], fixed[3]]),
        end: at + 4,
    })
}

/// Writes the answer to a query whose question has been read.
#[must_use]
pub fn answer(message: &[u8], question: &Question, reply: &Reply) -> Vec<u8> {
    let mut bytes = message.get(..question.end).unwrap_or_default().to_vec();
    let records: Vec<IpAddr> = match reply {
        Reply::Addresses(addresses) if question.class == CLASS_INTERNET => addresses
            .iter()
            .filter(|address| match address {
                IpAddr::V4(_) => question.kind == TYPE_A,
                IpAddr::V6(_) => question.kind == TYPE_AAAA,
            })
            // All fit the 512 bytes that every resolver takes.
            .take(8)
            .copied()
            .collect(),
        _ => Vec::new(),
    };
    if let Some(header) = bytes.first_chunk_mut::<12>() {
        // An answer, with the wish for recursion as it was, and recursion at hand.
        header[2] = 0x80 | (header[2] & 0x01);
        header[3] = 0x80 | if *reply == Reply::Failure { 2 } else { 0 };
        header[6..12].fill(0);
        header[7] = records.len() as u8;
    }
    for address in records {
        let kind = if address.is_ipv4() { TYPE_A } else { TYPE_AAAA };
        // The name is that of the question, at byte 12.
        bytes.extend_from_slice(&[0xc0, 12]);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&CLASS_INTERNET.to_be_bytes());
        bytes.extend_from_slice(&LIFETIME.to_be_bytes());
        match address {
            IpAddr::V4(address) => {
                bytes.extend_from_slice(&[0, 4]);
                bytes.extend_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                bytes.extend_from_slice(&[0, 16]);
                bytes.extend_from_slice(&address.octets());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        // EDNS, which the answer leaves out.
        bytes.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn names_are_read_and_answered() {
        let message = query("Web.KILN", TYPE_A);
        let question = parse_question(&message).unwrap();
        assert_eq!(
            (question.name.as_str(), question.kind),
            ("web.kiln", TYPE_A)
        );
        let addresses = Reply::Addresses(vec![
            "10.1.2.3".parse().unwrap(),
            "fd00::1".parse().unwrap(),
        ]);
        let reply = answer(&message, &question, &addresses);
        assert_eq!(reply[..8], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 1]);
        assert_eq!(reply[reply.len() - 6..], [0, 4, 10, 1, 2, 3]);
        let failure = answer(&message, &question, &Reply::Failure);
        assert_eq!((failure[3] & 15, failure[7]), (2, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(question) = parse_question(&bytes) {
                let _ = answer(&bytes, &question, &Reply::Addresses(vec!["10.0.0.1".parse().unwrap()]));
            }
        }
    }
}

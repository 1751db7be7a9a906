//! Reads queries.
//!
//! Read by hand rather than with hickory's `Message`: an answer repeats the question byte for byte (clients check the
//! case of its letters, "0x20"), all that is looked up is the lower-case name, and nothing else of a query matters but
//! the size and version in its EDNS record; so that one pass without allocation is enough. The tests read what is
//! answered with hickory.
//!
//! Not for: answers of other servers, which `forward` only passes on.

use super::name::LONGEST;

/// The fixed part of a message (RFC 1035, 4.1.1).
pub const HEADER: usize = 12;
/// The record type of EDNS (RFC 6891).
pub const OPT: u16 = 41;

/// The parts of a query's header that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the client.
    pub id: u16,
    /// What is wanted; 0: a query.
    pub opcode: u8,
    /// Recursion is desired.
    pub recursion_desired: bool,
}

/// What a client says with EDNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// The longest answer over UDP that it takes, bytes.
    pub payload: u16,
    /// 0 is all there is.
    pub version: u8,
    /// It wants DNSSEC's records.
    pub dnssec: bool,
}

/// A query that can be answered.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// Its header.
    pub header: Header,
    /// Name, type and class as they came.
    pub question: &'a [u8],
    /// The type of record.
    pub kind: u16,
    /// The class; 1: Internet.
    pub class: u16,
    /// EDNS.
    pub extension: Option<Extension>,
    name: [u8; LONGEST],
    name_length: usize,
}

impl Query<'_> {
    /// The name in lower case.
    pub fn name(&self) -> &[u8] {
        self.name.get(..self.name_length).unwrap_or(&[])
    }
}

/// Why there is no query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// No header, or an answer: nothing may be sent back.
    Silence,
    /// FORMERR.
    Format(Header),
    /// NOTIMP.
    Opcode(Header),
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

/// Reads one. What stands behind the last record is not looked at.
pub fn read(bytes: &[u8]) -> Result<Query<'_>, Unreadable> {
    let start: &[u8; HEADER] = bytes.first_chunk().ok_or(Unreadable::Silence)?;
    let [id_high, id_low, flags, _, counts @ ..] = *start;
    // An answer is never answered: two servers would go on for ever.
    if flags & 0x80 != 0 {
        return Err(Unreadable::Silence);
    }
    let header = Header {
        id: u16::from_be_bytes([id_high, id_low]),
        opcode: flags >> 3 & 0xf,
        recursion_desired: flags & 1 != 0,
    };
    if header.opcode != 0 {
        return Err(Unreadable::Opcode(header));
    }
    if counts[..2] != [0, 1] {
        return Err(Unreadable::Format(header));
    }
    body(bytes, header, counts).ok_or(Unreadable::Format(header))
}

fn body<'a>(bytes: &'a [u8], header: Header, counts: [u8; 8]) -> Option<Query<'a>> {
    let mut name = [0; LONGEST];
    let mut length = 0;
    let mut rest = bytes.get(HEADER..)?;
    loop {
        let (&label, after) = rest.split_first()?;
        // No pointer: there is nothing yet to point to.
        if label > 63 {
            return None;
        }
        let (text, after) = after.split_at_checked(usize::from(label))?;
        let here = name.get_mut(length..)?.get_mut(..=text.len())?;
        let (first, lower) = here.split_first_mut()?;
        *first = label;
        for (to, from) in lower.iter_mut().zip(text) {
            *to = from.to_ascii_lowercase();
        }
        length += 1 + text.len();
        rest = after;
        if label == 0 {
            break;
        }
    }
    let end = HEADER + length + 4;
    let question = bytes.get(HEADER..end)?;
    let kind = number(question, length)?;
    let class = number(question, length + 2)?;

    let count = |at: usize| number(&counts, at).map(usize::from);
    let (before, additional) = (count(2)? + count(4)?, count(6)?);
    let mut extension = None;
    let mut at = end;
    for index in 0..before + additional {
        let root = bytes.get(at) == Some(&0);
        at = skip_name(bytes, at)?;
        let kind = number(bytes, at)?;
        let data = usize::from(number(bytes, at + 8)?);
        if kind == OPT {
            // One, in its place, with the root as its name (RFC 6891, 6.1.1).
            if index < before || extension.is_some() || !root {
                return None;
            }
            let flags = number(bytes, at + 6)?;
            extension = Some(Extension {
                payload: number(bytes, at + 2)?,
                version: *bytes.get(at + 5)?,
                dnssec: flags & 0x8000 != 0,
            });
        }
        at += 10 + data;
        if at > bytes.len() {
            return None;
        }
    }
    Some(Query {
        header,
        question,
        kind,
        class,
        extension,
        name,
        name_length: length,
    })
}

/// Behind the name that stands at a place.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let label = *bytes.get(at)?;
        match label {
            0 => return Some(at + 1),
            1..64 => at += 1 + usize::from(label),
            192.. => return Some(at + 2),
            _ => return None,
        }
    }
}

//! From a message to its answer: what RFC 1034, 1035, 2308, 6891, 7766, 8020 and 8482 say, as a pure function.
//!
//! Not for: sockets and waiting (`server`), other servers (`forward`).
//!
//! Always holds: the answer is a header, the question as it came, and records copied from the zone; their owner is a
//! pointer into the question. No message marked as an answer is ever answered.

use hickory_proto::{op::ResponseCode, rr::RecordType};
use tokio::sync::oneshot;

use super::{
    query::{self, HEADER, Header, OPT, Query, Unreadable},
    zone::{Asked, Found, Node, NotReady, Records, Zone},
};

/// Codes of extended errors (RFC 8914, 5.2).
const NOT_READY: u16 = 14;
const NOT_AUTHORITATIVE: u16 = 20;
const NOT_SUPPORTED: u16 = 21;
pub(super) const NETWORK_ERROR: u16 = 23;

/// How much of a unit's reason goes to clients, bytes: the rest is in the log.
const LONGEST_REASON: usize = 200;

/// Longest answer over TCP, bytes (RFC 1035, 4.2.2).
pub const LONGEST_MESSAGE: usize = 65_535;
/// Longest answer over UDP without EDNS, bytes (RFC 1035, 4.2.1).
const SHORT: usize = 512;

/// The conditions under which a message came.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// Over TCP: answers may be long.
    pub tcp: bool,
    /// Names that are not ours may be asked of others for this client.
    pub forwarding: bool,
    /// Longest answer over UDP that is ever sent, bytes.
    pub payload: u16,
}

/// What to do with a message.
#[derive(Debug)]
pub enum Outcome {
    /// The answer is there.
    Send(Sent),
    /// Call [`finish`] when told.
    Wait(oneshot::Receiver<Result<(), NotReady>>),
    /// Ask others.
    Forward,
    /// Say nothing.
    Silence,
}

/// What the answer says, for the statistics.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Its code.
    pub code: ResponseCode,
    /// It did not fit, and says so.
    pub truncated: bool,
    /// The type that was asked for; `None`: the question could not be read.
    pub kind: Option<RecordType>,
}

/// How far an answer may go.
enum Gate {
    /// Ask the unit.
    Ask,
    /// It is ready.
    Open,
    /// It did not become ready.
    Closed(String),
}

/// Answers a message, or says what is to be done instead. `out` is overwritten.
pub fn respond(zone: &Zone, message: &[u8], under: Circumstances, out: &mut Vec<u8>) -> Outcome {
    match query::read(message) {
        Ok(query) => answer(zone, &query, under, Gate::Ask, out),
        Err(Unreadable::Silence) => Outcome::Silence,
        Err(Unreadable::Format(header)) => bare(header, ResponseCode::FormErr, out),
        Err(Unreadable::Opcode(header)) => bare(header, ResponseCode::NotImp, out),
    }
}

/// Answers a message that had to wait.
pub fn finish(
    zone: &Zone,
    message: &[u8],
    under: Circumstances,
    ready: Result<(), NotReady>,
    out: &mut Vec<u8>,
) -> Option<Sent> {
    let query = query::read(message).ok()?;
    let gate = match ready {
        Ok(()) => Gate::Open,
        Err(NotReady(mut why)) => {
            why.truncate(why.floor_char_boundary(LONGEST_REASON));
            Gate::Closed(why)
        }
    };
    match answer(zone, &query, under, gate, out) {
        Outcome::Send(sent) => Some(sent),
        // The name went away meanwhile.
        _ => fail(message, under, NOT_READY, "the name is no longer ours", out),
    }
}

/// SERVFAIL, with an extended error.
pub fn fail(
    message: &[u8],
    under: Circumstances,
    error: u16,
    text: &str,
    out: &mut Vec<u8>,
) -> Option<Sent> {
    let query = query::read(message).ok()?;
    let mut reply = Reply::new(ResponseCode::ServFail);
    reply.error = Some((error, text));
    Some(reply.write(&query, under, out))
}

/// An answer of which only the header is left.
fn bare(header: Header, code: ResponseCode, out: &mut Vec<u8>) -> Outcome {
    out.clear();
    write_header(header, Flags::default(), code.low(), [0; 4], out);
    Outcome::Send(Sent {
        code,
        truncated: false,
        kind: None,
    })
}

fn answer(
    zone: &Zone,
    query: &Query<'_>,
    under: Circumstances,
    gate: Gate,
    out: &mut Vec<u8>,
) -> Outcome {
    let send = |reply: Reply<'_>, out: &mut Vec<u8>| Outcome::Send(reply.write(query, under, out));
    if query
        .extension
        .is_some_and(|extension| extension.version > 0)
    {
        return send(Reply::new(ResponseCode::BADVERS), out);
    }
    if query.class != 1 {
        return send(Reply::new(ResponseCode::Refused), out);
    }
    let kind = RecordType::from(query.kind);
    match query.kind {
        // OPT is no type to ask for (RFC 6891, 6.1.1); nor is 0 (RFC 6895, 3.1).
        0 | OPT => return send(Reply::new(ResponseCode::FormErr), out),
        // Nobody copies zones from here.
        251 | 252 => {
            let mut reply = Reply::new(ResponseCode::Refused);
            reply.error = Some((NOT_SUPPORTED, "zones are not transferred"));
            return send(reply, out);
        }
        // MAILB and MAILA are obsolete (RFC 1035, 3.2.3).
        253 | 254 => return send(Reply::new(ResponseCode::NotImp), out),
        _ => {}
    }
    let (node, apex) = match zone.find(query.name()) {
        Found::Node(node, apex) => (node, apex),
        Found::Missing(apex) => {
            let mut reply = Reply::new(ResponseCode::NXDomain);
            reply.authoritative = true;
            reply.negative = Some((apex, &zone.negative));
            return send(reply, out);
        }
        Found::Foreign if under.forwarding => return Outcome::Forward,
        Found::Foreign => {
            let mut reply = Reply::new(ResponseCode::Refused);
            reply.error = Some((NOT_AUTHORITATIVE, ""));
            return send(reply, out);
        }
    };

    let mut reply = Reply::new(ResponseCode::NoError);
    reply.authoritative = true;
    fill(&mut reply, zone, node, kind);
    // An answer of the kind "no such record" is true whether the unit runs or not; it counts as interest, no more.
    let empty = reply.is_empty();
    if let Some(unit) = &node.unit
        && matches!(kind, RecordType::A | RecordType::AAAA | RecordType::ANY)
    {
        let failed = match gate {
            Gate::Open => None,
            Gate::Closed(why) => Some(why),
            Gate::Ask => match unit.asked() {
                _ if empty => None,
                Asked::Answer => None,
                Asked::Wait(told) => return Outcome::Wait(told),
                Asked::Fail => Some(String::new()),
            },
        };
        if let Some(why) = failed {
            let mut reply = Reply::new(ResponseCode::ServFail);
            reply.error = Some((NOT_READY, &why));
            return send(reply, out);
        }
    }
    if empty {
        reply.negative = Some((apex, &zone.negative));
    }
    send(reply, out)
}

/// The records that a node has of a type.
fn fill<'a>(reply: &mut Reply<'a>, zone: &'a Zone, node: &'a Node, kind: RecordType) {
    match kind {
        RecordType::A => reply.answers = [Some(&node.v4), None],
        RecordType::AAAA => reply.answers = [Some(&node.v6), None],
        RecordType::PTR => reply.record = node.pointer.as_deref(),
        RecordType::SOA if node.apex => reply.record = Some(&zone.authority),
        RecordType::NS if node.apex => {
            reply.record = Some(&zone.server);
            reply.additional = [Some(&zone.glue[0]), Some(&zone.glue[1])];
        }
        // Whoever asks for everything gets what is useful and no more (RFC 8482, 4.1): the addresses if there are any,
        // else the name of an address, else SOA; so that a small question never draws a long answer to somebody else.
        RecordType::ANY => {
            reply.answers = [Some(&node.v4), Some(&node.v6)];
            if node.v4.count == 0 && node.v6.count == 0 {
                reply.record = match &node.pointer {
                    Some(pointer) => Some(pointer),
                    None if node.apex => Some(&zone.authority),
                    None => None,
                };
            }
        }
        _ => {}
    }
}

#[derive(Clone, Copy, Default)]
struct Flags {
    authoritative: bool,
    truncated: bool,
    recursion_available: bool,
}

fn write_header(header: Header, flags: Flags, low: u8, counts: [u16; 4], out: &mut Vec<u8>) {
    out.extend(header.id.to_be_bytes());
    out.push(
        0x80 | header.opcode << 3
            | u8::from(flags.authoritative) << 2
            | u8::from(flags.truncated) << 1
            | u8::from(header.recursion_desired),
    );
    out.push(u8::from(flags.recursion_available) << 7 | low & 0xf);
    for count in counts {
        out.extend(count.to_be_bytes());
    }
}

/// An answer before it is written.
struct Reply<'a> {
    code: ResponseCode,
    authoritative: bool,
    answers: [Option<&'a Records>; 2],
    /// One more, without owner.
    record: Option<&'a [u8]>,
    /// SOA of the zone whose name begins there in the question.
    negative: Option<(usize, &'a [u8])>,
    additional: [Option<&'a Records>; 2],
    /// An extended error and its text.
    error: Option<(u16, &'a str)>,
}

impl<'a> Reply<'a> {
    fn new(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            answers: [None; 2],
            record: None,
            negative: None,
            additional: [None; 2],
            error: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.record.is_none()
            && self
                .answers
                .iter()
                .flatten()
                .all(|records| records.count == 0)
    }

    fn write(self, query: &Query<'_>, under: Circumstances, out: &mut Vec<u8>) -> Sent {
        let limit = match query.extension {
            _ if under.tcp => LONGEST_MESSAGE,
            Some(extension) => usize::from(extension.payload.min(under.payload)).max(SHORT),
            None => SHORT,
        };
        let extension = if query.extension.is_some() { 11 } else { 0 };
        let question = query.question.len();
        let length = |all: [Option<&Records>; 2]| {
            all.iter()
                .flatten()
                .map(|records| records.bytes.len())
                .sum::<usize>()
        };
        let answers = length(self.answers) + self.record.map_or(0, |record| 2 + record.len());
        let negative = self.negative.map_or(0, |(_, record)| 2 + record.len());
        let mut total = HEADER + question + extension + answers + negative;
        // What the client asked for is all there or not at all; it comes again over TCP.
        let truncated = total > limit;
        if truncated {
            total = HEADER + question + extension;
        }
        // What it did not ask for may be left out (RFC 2181, 9).
        let additional = length(self.additional);
        let additional = if truncated || total + additional > limit {
            [None; 2]
        } else {
            total += additional;
            self.additional
        };
        let error = self
            .error
            .filter(|_| extension > 0)
            .filter(|(_, text)| total + 6 + text.len() <= limit);

        out.clear();
        let mut counts = [1, 0, 0, u16::from(extension > 0)];
        if !truncated {
            counts[1] = self
                .answers
                .iter()
                .flatten()
                .map(|records| records.count)
                .sum::<u16>()
                + u16::from(self.record.is_some());
            counts[2] = u16::from(self.negative.is_some());
            counts[3] += additional
                .iter()
                .flatten()
                .map(|records| records.count)
                .sum::<u16>();
        }
        let flags = Flags {
            authoritative: self.authoritative,
            truncated,
            recursion_available: under.forwarding,
        };
        write_header(query.header, flags, self.code.low(), counts, out);
        out.extend_from_slice(query.question);
        if !truncated {
            for records in self.answers.iter().flatten() {
                out.extend_from_slice(&records.bytes);
            }
            if let Some(record) = self.record {
                write_record(0, record, out);
            }
            if let Some((apex, record)) = self.negative {
                write_record(apex, record, out);
            }
            for records in additional.iter().flatten() {
                out.extend_from_slice(&records.bytes);
            }
        }
        if let Some(asked) = query.extension {
            out.push(0);
            out.extend(OPT.to_be_bytes());
            out.extend(under.payload.to_be_bytes());
            out.extend([self.code.high(), 0, u8::from(asked.dnssec) << 7, 0]);
            match error {
                Some((code, text)) => {
                    let length = 2 + text.len() as u16;
                    out.extend((4 + length).to_be_bytes());
                    out.extend(15u16.to_be_bytes());
                    out.extend(length.to_be_bytes());
                    out.extend(code.to_be_bytes());
                    out.extend_from_slice(text.as_bytes());
                }
                None => out.extend([0, 0]),
            }
        }
        Sent {
            code: self.code,
            truncated,
            kind: Some(RecordType::from(query.kind)),
        }
    }
}

/// A record whose owner begins there in the question's name.
fn write_record(owner: usize, record: &[u8], out: &mut Vec<u8>) {
    let pointer = 0xc000 | (HEADER + owner) as u16;
    out.extend(pointer.to_be_bytes());
    out.extend_from_slice(record);
}

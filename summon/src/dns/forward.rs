//! Names that are not ours: asked of other name servers, and their answers passed on as they are.
//!
//! A query goes on as it came but for its id, which is random, as is the port it is sent from (RFC 5452); an answer is
//! believed when address, port, id and question match. A query that came over TCP is asked over TCP. A truncated answer
//! is passed on as such, and the client comes again over TCP (RFC 5625, 4.4.2): it would not get more over UDP than its
//! own limit, which the other server has been told.
//!
//! Not for: who may ask (`server`); caching, which the other servers do.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    query::{self, HEADER},
    statistics::{Counters, count},
};

/// Who is asked about names that are not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Forward {
    /// The name servers of `/etc/resolv.conf`, which is read again when it changes; never this server itself.
    #[default]
    System,
    /// These, the first that answers.
    To(Vec<SocketAddr>),
    /// Nobody: REFUSED.
    Refuse,
}

/// How long one server may take, over UDP.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same over TCP, for all of it.
const PATIENCE_TCP: Duration = Duration::from_secs(5);
/// How often each server is asked over UDP.
const ROUNDS: usize = 2;
/// Most servers asked for one query.
const MOST_SERVERS: usize = 4;
/// What `/etc/resolv.conf` may be, bytes.
const LONGEST_FILE: usize = 64 * 1024;

/// What a file looked like when it was read: device, inode, size, time of change.
type Stamp = (u64, u64, u64, Option<SystemTime>);

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    servers: Arc<[SocketAddr]>,
}

/// Asks others.
pub(super) struct Forwarder {
    forward: Forward,
    path: PathBuf,
    file: Mutex<File>,
    /// Where this server listens.
    own: Vec<SocketAddr>,
    /// The server that answered last, to be asked first.
    preferred: AtomicUsize,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("there is no name server to ask but this one")]
    NoServer,
    #[error("no name server answered")]
    Silence,
}

impl Forwarder {
    pub fn new(forward: Forward, path: PathBuf, own: Vec<SocketAddr>) -> Self {
        Self {
            forward,
            path,
            file: Mutex::default(),
            own,
            preferred: AtomicUsize::new(0),
        }
    }

    /// Whether anything is asked of anybody.
    pub fn is_on(&self) -> bool {
        self.forward != Forward::Refuse
    }

    /// Whom to ask, without ourselves.
    fn servers(&self) -> Arc<[SocketAddr]> {
        match &self.forward {
            Forward::Refuse => Arc::default(),
            Forward::To(servers) => servers
                .iter()
                .copied()
                .filter(|&to| !self.is_own(to))
                .collect(),
            Forward::System => {
                let stamp = fs::metadata(&self.path).ok().map(|about| {
                    (
                        about.dev(),
                        about.ino(),
                        about.size(),
                        about.modified().ok(),
                    )
                });
                let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
                if stamp.is_none() || file.stamp != stamp {
                    let text = read_file(&self.path).unwrap_or_default();
                    file.servers = name_servers(&text)
                        .into_iter()
                        .filter(|&to| !self.is_own(to))
                        .collect();
                    file.stamp = stamp;
                }
                Arc::clone(&file.servers)
            }
        }
    }

    /// Whether what is sent there would come to this server.
    fn is_own(&self, to: SocketAddr) -> bool {
        self.own.iter().any(|own| {
            own.port() == to.port()
                && (own.ip() == to.ip()
                    || (own.ip().is_unspecified() || to.ip().is_unspecified()) && is_local(to.ip()))
        })
    }

    /// Asks for an answer to a query.
    pub async fn ask(
        &self,
        message: &[u8],
        tcp: bool,
        counters: &Counters,
    ) -> Result<Vec<u8>, ForwardError> {
        let servers = self.servers();
        let number = servers.len().min(MOST_SERVERS);
        if number == 0 {
            return Err(ForwardError::NoServer);
        }
        let mut refusal = None;
        let first = self.preferred.load(Ordering::Relaxed);
        for turn in 0..number * if tcp { 1 } else { ROUNDS } {
            let index = (first + turn) % number;
            let Some(&server) = servers.get(index) else {
                continue;
            };
            let asked = if tcp {
                timeout(PATIENCE_TCP, ask_tcp(server, message)).await
            } else {
                timeout(PATIENCE, ask_udp(server, message, counters)).await
            };
            let Ok(Ok(answer)) = asked else { continue };
            // SERVFAIL, NOTIMP, REFUSED: another may know more (as the C library does it).
            if matches!(answer.get(3).map(|flags| flags & 0xf), Some(2 | 4 | 5)) {
                refusal.get_or_insert(answer);
                if turn + 1 >= number {
                    break;
                }
                continue;
            }
            self.preferred.store(index, Ordering::Relaxed);
            return Ok(answer);
        }
        refusal.ok_or(ForwardError::Silence)
    }
}

/// An address of this machine: one can be bound to it.
fn is_local(address: IpAddr) -> bool {
    address.is_loopback()
        || address.is_unspecified()
        || std::net::UdpSocket::bind((address, 0)).is_ok()
}

fn read_file(path: &std::path::Path) -> io::Result<String> {
    use io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(LONGEST_FILE as u64)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The servers named in a resolv.conf(5), which defaults to this machine.
fn name_servers(text: &str) -> Vec<SocketAddr> {
    let servers: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then_some(())?;
            address(words.next()?)
        })
        .map(|(address, scope)| match address {
            IpAddr::V4(address) => SocketAddr::from((address, 53)),
            IpAddr::V6(address) => SocketAddrV6::new(address, 53, 0, scope).into(),
        })
        .collect();
    if servers.is_empty() {
        return vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 53))];
    }
    servers
}

/// An address, perhaps with the interface on which it is valid.
fn address(text: &str) -> Option<(IpAddr, u32)> {
    let Some((address, interface)) = text.split_once('%') else {
        return Some((text.parse().ok()?, 0));
    };
    let scope = match interface.parse() {
        Ok(number) => number,
        Err(_) => fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))
            .ok()?
            .trim()
            .parse()
            .ok()?,
    };
    Some((address.parse::<Ipv6Addr>().ok()?.into(), scope))
}

fn random_id() -> io::Result<[u8; 2]> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    Ok(id)
}

/// A query with another id.
pub(super) fn with_id(message: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut message = message.to_vec();
    for (to, from) in message.iter_mut().zip(id) {
        *to = from;
    }
    message
}

/// Whether an answer belongs to a query, as it was sent.
fn matches(query: &[u8], answer: &[u8]) -> bool {
    let Some(question) = query::read(query).ok().map(|query| query.question.len()) else {
        return false;
    };
    let end = HEADER + question;
    let same = |from: usize, to: usize| match (query.get(from..to), answer.get(from..to)) {
        // Not every server keeps the case of letters.
        (Some(ours), Some(theirs)) => ours.eq_ignore_ascii_case(theirs),
        _ => false,
    };
    let is_answer = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    // An answer that only says what is wrong may leave the question out.
    let bare = answer.len() == HEADER && answer.get(4..6) == Some(&[0, 0]);
    is_answer && query.get(..2) == answer.get(..2) && (bare || same(4, 6) && same(HEADER, end))
}

async fn ask_udp(server: SocketAddr, message: &[u8], counters: &Counters) -> io::Result<Vec<u8>> {
    // A socket for each query: the kernel chooses a random port.
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let message = with_id(message, random_id()?);
    socket.send(&message).await?;
    let longest = query::read(&message)
        .ok()
        .and_then(|query| query.extension)
        .map_or(0, |extension| usize::from(extension.payload))
        .max(4096);
    let mut answer = vec![0; longest];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answer
            .get(..length)
            .is_some_and(|answer| matches(&message, answer))
        {
            answer.truncate(length);
            return Ok(answer);
        }
        count(&counters.forward_mismatched);
    }
}

async fn ask_tcp(server: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let message = with_id(message, random_id()?);
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream
        .write_all(&[&length.to_be_bytes(), &message[..]].concat())
        .await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    if matches(&message, &answer) {
        Ok(answer)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x04test\0\0\x01\0\x01";

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn only_its_own_answer_matches(
            mistakes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cut in 0..QUERY.len() + 1,
            more in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut answer = QUERY.to_vec();
            answer[2] |= 0x80;
            for (at, value) in mistakes {
                let at = at.index(answer.len());
                answer[at] = value;
            }
            answer.truncate(cut);
            answer.extend(more);
            if matches(QUERY, &answer) {
                prop_assert_eq!(&answer[..2], &QUERY[..2]);
                prop_assert_ne!(answer[2] & 0x80, 0);
                let question = answer.get(HEADER..QUERY.len());
                prop_assert!(
                    answer.len() == HEADER
                        || question.is_some_and(|theirs| theirs.eq_ignore_ascii_case(&QUERY[HEADER..]))
                );
            }
        }

        #[test]
        fn any_file(text: String) {
            prop_assert!(!name_servers(&text).is_empty());
        }
    }

    #[test]
    fn name_servers_of_the_system() {
        let text = "# comment\nnameserver 10.0.0.1 # first\n; nameserver 1.1.1.1\n\tnameserver fd00::53\r\n\
                    nameserver fe80::1%1\nnameserver x\nnameserver\nnameservers 2.2.2.2\nsearch example.org\n";
        let expected = [
            "10.0.0.1:53".parse(),
            "[fd00::53]:53".parse(),
            "[fe80::1%1]:53".parse(),
        ]
        .map(|address| address.expect("an address"));
        assert_eq!(name_servers(text), expected);
        assert_eq!(name_servers(""), [SocketAddr::from(([127, 0, 0, 1], 53))]);
    }

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("resolv.conf");
        let own = vec![SocketAddr::from(([127, 0, 0, 1], 53))];
        let forwarder = Forwarder::new(Forward::System, path.clone(), own);
        // Without a file: this machine, which is ourselves.
        assert!(forwarder.servers().is_empty());
        for (text, expected) in [
            ("nameserver 10.0.0.1\n", "10.0.0.1:53"),
            (
                "nameserver 10.10.0.2\nnameserver 127.0.0.1\n",
                "10.10.0.2:53",
            ),
        ] {
            fs::write(&path, text).expect("written");
            let expected: SocketAddr = expected.parse().expect("an address");
            assert_eq!(*forwarder.servers(), [expected]);
        }
        fs::remove_file(&path).expect("removed");
        assert!(forwarder.servers().is_empty());
    }

    #[test]
    fn ourselves_under_any_address() {
        let own = |own: &str, to: &str| {
            let own = vec![own.parse().expect("an address")];
            Forwarder::new(Forward::Refuse, PathBuf::new(), own)
                .is_own(to.parse().expect("an address"))
        };
        assert!(own("127.0.0.1:53", "127.0.0.1:53"));
        assert!(!own("127.0.0.1:53", "127.0.0.2:53"));
        assert!(!own("127.0.0.1:5353", "127.0.0.1:53"));
        assert!(own("0.0.0.0:53", "127.0.0.53:53"));
        assert!(own("127.0.0.1:53", "0.0.0.0:53"));
        // An address for documentation is no machine's.
        assert!(!own("0.0.0.0:53", "192.0.2.1:53"));
    }
}

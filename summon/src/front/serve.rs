//! Accepting connections, finding out for whom they are, and handing them over.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::http::{self, Head, Refusal};
use super::refuse::{Status, answer, send_away};
use super::routes::{Routes, Target};
use super::tls::{self, Hello};
use super::{HEAD_BYTES, MAX_TERMINATED, MAX_UNDECIDED, PATIENCE, terminate};
use crate::configuration::FrontProtocol;

/// Rest after a connection could not be accepted, as when no descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes that are looked at first; most heads and ClientHellos are shorter.
const FIRST_LOOK: usize = 2048;

/// What a listening socket goes by.
pub struct Rules {
    /// The front's name.
    pub name: String,
    /// How units are told apart.
    pub protocol: FrontProtocol,
    /// The units.
    pub routes: Routes,
}

/// What bounds all fronts together.
pub struct Limits {
    undecided: Mutex<Undecided>,
    /// Room for connections whose TLS ends here.
    pub terminated: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            undecided: Mutex::default(),
            terminated: Arc::new(Semaphore::new(MAX_TERMINATED)),
        }
    }
}

/// Clients that have not yet said for whom they come, the oldest first.
#[derive(Default)]
struct Undecided {
    next: u64,
    clients: BTreeMap<u64, oneshot::Sender<()>>,
}

/// A place among the undecided.
struct Ticket {
    limits: Arc<Limits>,
    number: u64,
}

impl Limits {
    /// A place, and what tells that it is lost. If there are too many, the oldest loses its own: who comes to keep
    /// places taken loses them to those who come for something.
    fn enter(self: &Arc<Self>) -> (Ticket, oneshot::Receiver<()>) {
        let (sender, receiver) = oneshot::channel();
        let mut undecided = self
            .undecided
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let number = undecided.next;
        undecided.next += 1;
        if undecided.clients.len() >= MAX_UNDECIDED {
            undecided.clients.pop_first();
        }
        undecided.clients.insert(number, sender);
        let ticket = Ticket {
            limits: Arc::clone(self),
            number,
        };
        (ticket, receiver)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut undecided = self
            .limits
            .undecided
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        undecided.clients.remove(&self.number);
    }
}

/// Accepts until it is told to stop, and then takes in who waits already.
pub async fn accept(
    listener: TcpListener,
    rules: Arc<ArcSwap<Rules>>,
    limits: Arc<Limits>,
    mut stop: oneshot::Receiver<()>,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                tokio::spawn(serve(stream, peer, Arc::clone(&rules), Arc::clone(&limits)));
            }
            // Only this one client was concerned.
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                tracing::warn!(
                    front = rules.load().name,
                    "cannot accept a connection: {error}"
                );
                tokio::select! {
                    _ = &mut stop => break,
                    () = sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    let Ok(listener) = listener.into_std() else {
        return;
    };
    while let Ok((stream, peer)) = listener.accept() {
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(stream));
        if let Ok(stream) = stream {
            tokio::spawn(serve(stream, peer, Arc::clone(&rules), Arc::clone(&limits)));
        }
    }
}

/// Errors of accept(2) that come from the network.
fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::INTR
                | Errno::PROTO
                | Errno::NETDOWN
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::PERM
        )
    )
}

/// Serves one client: finds its unit and hands it over, or sends it away.
async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    rules: Arc<ArcSwap<Rules>>,
    limits: Arc<Limits>,
) {
    let (ticket, mut lost) = limits.enter();
    let protocol = rules.load().protocol;
    let decided = tokio::select! {
        _ = &mut lost => {
            tracing::debug!(%peer, "too many clients have not said for whom they come: closed the oldest");
            return;
        }
        decided = timeout(PATIENCE, decide(&stream, protocol)) => decided,
    };
    let words = match decided {
        Ok(Ok(Decision::Name(name))) => {
            let current = rules.load_full();
            // After a reload the port may speak something else.
            let target = current
                .routes
                .find(&name)
                .filter(|target| target.tls.is_some() == (protocol == FrontProtocol::Https));
            if let Some(target) = target.cloned() {
                drop(ticket);
                hand_over(stream, peer, target, limits).await;
                return;
            }
            tracing::debug!(front = current.name, %peer, name, "no unit has this name");
            match protocol {
                FrontProtocol::Http => answer(Status::Unknown, is_head(&stream)),
                FrontProtocol::Tls | FrontProtocol::Https => tls::unrecognized_name(),
            }
        }
        Ok(Ok(Decision::Refuse(words))) => {
            tracing::debug!(%peer, "refused: it does not say for whom it comes");
            words
        }
        Ok(Err(error)) => {
            tracing::debug!(%peer, "gone before it said for whom it came: {error}");
            return;
        }
        Err(_) => match protocol {
            FrontProtocol::Http => answer(Status::Late, false),
            FrontProtocol::Tls | FrontProtocol::Https => return,
        },
    };
    tokio::select! {
        _ = lost => {}
        () = send_away(stream, &words) => {}
    }
}

/// Whether a request whose head is there is a HEAD request.
fn is_head(stream: &TcpStream) -> bool {
    let mut method = [0; 5];
    matches!(peek(stream, &mut method), Ok(5)) && &method == b"HEAD "
}

/// What the first bytes of a client say.
enum Decision {
    /// It comes for this name.
    Name(String),
    /// It is to be sent away with these words.
    Refuse(Vec<u8>),
}

/// Looks at a client's first bytes until they say for whom it comes, and takes none.
async fn decide(stream: &TcpStream, protocol: FrontProtocol) -> io::Result<Decision> {
    let mut buffer = Vec::new();
    let mut known = 0;
    let mut hello = tls::Reader::default();
    loop {
        if known == buffer.len() {
            buffer.resize((buffer.len() * 4).clamp(FIRST_LOOK, HEAD_BYTES), 0);
        }
        let length = look(stream, &mut buffer, known).await?;
        let bytes = buffer.get(..length).unwrap_or_default();
        match protocol {
            FrontProtocol::Http => {
                if http::may_end(bytes, known) {
                    match http::head(bytes) {
                        Head::Incomplete => {}
                        Head::Host(name) => return Ok(Decision::Name(name)),
                        Head::Refused(refusal) => {
                            let status = match refusal {
                                Refusal::Bad => Status::Bad,
                                Refusal::Long => Status::Long,
                                Refusal::Version => Status::Version,
                            };
                            let head = bytes.starts_with(b"HEAD ");
                            return Ok(Decision::Refuse(answer(status, head)));
                        }
                    }
                }
            }
            FrontProtocol::Tls | FrontProtocol::Https => match hello.read(bytes) {
                Hello::Incomplete => {}
                Hello::Name(name) => return Ok(Decision::Name(name)),
                Hello::Nameless => return Ok(Decision::Refuse(tls::unrecognized_name())),
                Hello::Refused(alert) => return Ok(Decision::Refuse(alert)),
            },
        }
        known = length;
    }
}

fn peek(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(stream, buffer, RecvFlags::PEEK).map(|(length, _)| length)?)
}

/// Waits until more than the known bytes are there, and says how many are.
async fn look(stream: &TcpStream, buffer: &mut [u8], known: usize) -> io::Result<usize> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let looked = stream.try_io(Interest::READABLE, || match peek(stream, buffer)? {
            length if length > known => Ok(length),
            // Readable all the time, as nothing is taken: what is awaited is the next arrival.
            _ => Err(io::ErrorKind::WouldBlock.into()),
        });
        match looked {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if ready.is_read_closed() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            looked => return looked,
        }
    }
}

/// Gives the client to its unit.
async fn hand_over(stream: TcpStream, peer: SocketAddr, target: Target, limits: Arc<Limits>) {
    let port = stream.local_addr().map_or(0, |address| address.port());
    // The kernel behind the link cannot set options, and small answers must not wait. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    match target.tls.clone() {
        None => match stream.into_std() {
            Ok(stream) => {
                target
                    .unit
                    .deliver(OwnedFd::from(stream), target.guest, Some(peer), port);
            }
            Err(error) => tracing::warn!(%peer, "cannot hand over a connection: {error}"),
        },
        Some(config) => terminate::serve(stream, peer, config, target, port, limits).await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::front::tls::tests::{hello, in_records};

    /// A client's connection, and what was accepted.
    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    async fn name_of(protocol: FrontProtocol, parts: Vec<Vec<u8>>) -> String {
        let (mut client, mut accepted) = connected().await;
        client.set_nodelay(true).unwrap();
        let whole = parts.concat();
        let sending = tokio::spawn(async move {
            for part in parts {
                client.write_all(&part).await.unwrap();
                tokio::task::yield_now().await;
            }
            client
        });
        let name = match decide(&accepted, protocol).await.unwrap() {
            Decision::Name(name) => name,
            Decision::Refuse(words) => panic!("{}", String::from_utf8_lossy(&words)),
        };
        let client = sending.await.unwrap();
        drop(client);
        // Nothing was taken.
        let mut all = Vec::new();
        accepted.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, whole);
        name
    }

    #[tokio::test]
    async fn heads_come_in_any_parts_and_stay() {
        let long = format!(
            "GET / HTTP/1.1\r\nX: {}\r\nHost: A.test:80\r\n\r\nbody",
            "x".repeat(9000)
        );
        for size in [1, 7, 2048, 20_000] {
            let parts = long.as_bytes().chunks(size).map(<[u8]>::to_vec).collect();
            assert_eq!(name_of(FrontProtocol::Http, parts).await, "a.test");
        }
        let hello = in_records(&hello("www.A.test"), 50);
        for size in [1, 13, 20_000] {
            let parts = hello.chunks(size).map(<[u8]>::to_vec).collect();
            assert_eq!(name_of(FrontProtocol::Tls, parts).await, "www.a.test");
        }
    }

    #[tokio::test]
    async fn a_client_that_says_no_more_is_let_go() {
        for (protocol, first) in [
            (FrontProtocol::Http, &b"GET / HTTP/1.1\r\n"[..]),
            (FrontProtocol::Tls, &[22, 3, 1, 2]),
            (FrontProtocol::Http, b""),
        ] {
            let (mut client, accepted) = connected().await;
            client.write_all(first).await.unwrap();
            client.shutdown().await.unwrap();
            assert!(decide(&accepted, protocol).await.is_err());
        }
    }

    #[tokio::test]
    async fn endless_heads_are_refused() {
        for protocol in [FrontProtocol::Http, FrontProtocol::Https] {
            let (mut client, accepted) = connected().await;
            let sending = tokio::spawn(async move {
                let mut bytes = match protocol {
                    FrontProtocol::Http => b"GET / HTTP/1.1\r\nX: ".to_vec(),
                    _ => vec![22, 3, 1, 0x40, 0, 1, 0, 0xff, 0],
                };
                bytes.resize(100_000, b'x');
                let _ = client.write_all(&bytes).await;
                let mut answer = Vec::new();
                let _ = client.read_to_end(&mut answer).await;
                answer
            });
            let Decision::Refuse(words) = decide(&accepted, protocol).await.unwrap() else {
                panic!("found a name");
            };
            send_away(accepted, &words).await;
            assert_eq!(sending.await.unwrap(), words);
        }
    }

    #[test]
    fn the_oldest_undecided_has_to_go() {
        let limits = Arc::new(Limits::default());
        let mut all: Vec<_> = (0..MAX_UNDECIDED).map(|_| limits.enter()).collect();
        assert!(
            all[0]
                .1
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Empty)
        );
        let newest = limits.enter();
        assert!(
            all[0]
                .1
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Closed)
        );
        assert!(
            all[1]
                .1
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Empty)
        );
        drop(newest);
        all.clear();
        assert!(limits.undecided.lock().unwrap().clients.is_empty());
    }
}

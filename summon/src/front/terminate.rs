//! Ends TLS: the unit gets what is inside over a socket pair, and every byte passes through here.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::PATIENCE;
use super::routes::Target;
use super::serve::Limits;

/// How long a client may go on sending after the unit has closed, and how often it is looked whether it has.
const LINGER: Duration = Duration::from_secs(5);
/// When a silent client is asked whether it is still there, how often, and how many times in vain.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_PAUSE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TIMES: u32 = 4;

/// Serves a client until both sides are done.
pub async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
    target: Target,
    port: u16,
    limits: Arc<Limits>,
) {
    let room = timeout(PATIENCE, Arc::clone(&limits.terminated).acquire_owned());
    let Ok(Ok(_room)) = room.await else {
        tracing::warn!(%peer, "too many TLS connections: closed a new one");
        return;
    };
    keep_alive(&stream);
    let inside = match timeout(PATIENCE, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(inside)) => inside,
        Ok(Err(error)) => {
            tracing::debug!(%peer, "no TLS: {error}");
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "the TLS handshake takes too long");
            return;
        }
    };
    let ours = match pair() {
        Ok((ours, theirs)) => {
            target.unit.deliver(theirs, target.guest, Some(peer), port);
            ours
        }
        Err(error) => {
            tracing::warn!(%peer, "cannot hand over a connection: {error}");
            return;
        }
    };
    if let Err(error) = join(inside, ours).await {
        tracing::debug!(%peer, "{error}");
    }
}

/// A client that vanishes without a word must not be kept for ever. What the host refuses is left as it is.
fn keep_alive(stream: &TcpStream) {
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_PAUSE);
    let _ = sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_TIMES);
}

/// Our end, and the unit's.
fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Carries bytes both ways, each as fast as its receiver takes them. The end of one direction is passed on and leaves the
/// other; a client that has nothing to say is not waited for when the unit has closed altogether.
async fn join(client: impl AsyncRead + AsyncWrite, mut unit: UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_unit, mut to_unit) = unit.split();
    let up = async {
        tokio::io::copy(&mut from_client, &mut to_unit).await?;
        // A unit that has closed already needs not be told.
        let _ = to_unit.shutdown().await;
        io::Result::Ok(())
    };
    let down = async move {
        let copied = tokio::io::copy(&mut from_unit, &mut to_client).await;
        // Also after a reset by the unit: what it wrote before was carried over.
        to_client.shutdown().await?;
        copied?;
        io::Result::Ok(from_unit)
    };
    tokio::pin!(up, down);
    let from_unit = tokio::select! {
        done = &mut up => {
            done?;
            down.await?;
            return Ok(());
        }
        done = &mut down => done?,
    };
    let closed = async {
        loop {
            sleep(LINGER).await;
            if is_closed(from_unit.as_ref()) {
                return;
            }
        }
    };
    tokio::select! {
        done = up => done,
        () = closed => Ok(()),
    }
}

/// Whether the other side has closed both directions.
fn is_closed(stream: &UnixStream) -> bool {
    let mut watched = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec::default();
    !matches!(poll(&mut watched, Some(&now)), Ok(0))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    const BIG: usize = 5 << 20;

    /// The client's end, the unit's end, and what joins them.
    fn joined() -> (
        tokio::io::DuplexStream,
        UnixStream,
        tokio::task::JoinHandle<io::Result<()>>,
    ) {
        let (client, outside) = duplex(1000);
        let (unit, inside) = UnixStream::pair().unwrap();
        (client, unit, tokio::spawn(join(outside, inside)))
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (mut client, mut unit, joined) = joined();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        unit.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // A long answer after the end of the question, which waits for its reader.
        let writing = tokio::spawn(async move {
            unit.write_all(&vec![7; BIG]).await.unwrap();
        });
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer.len(), BIG);
        writing.await.unwrap();
        joined.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_unit_that_only_listens_is_still_told() {
        let (mut client, mut unit, joined) = joined();
        unit.write_all(b"hello").await.unwrap();
        unit.shutdown().await.unwrap();
        let mut hello = String::new();
        client.read_to_string(&mut hello).await.unwrap();
        assert_eq!(hello, "hello");
        let writing = tokio::spawn(async move {
            client.write_all(&vec![7; BIG]).await.unwrap();
            client.shutdown().await.unwrap();
        });
        let mut all = Vec::new();
        unit.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), BIG);
        writing.await.unwrap();
        joined.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_left_when_the_unit_has_closed() {
        let (_client, unit, joined) = joined();
        drop(unit);
        joined.await.unwrap().unwrap();
    }
}

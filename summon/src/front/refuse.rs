//! Sending clients away so that they learn why.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a client that is sent away may take to go.
const LEAVE: Duration = Duration::from_secs(2);
/// Most bytes that are read from it and thrown away.
const MAX_THROWN_AWAY: usize = 256 << 10;

/// The status and text of a refusal over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// What came is no request.
    Bad,
    /// No unit has the name.
    Unknown,
    /// It took too long to come.
    Late,
    /// Its head is too long.
    Long,
    /// Another version than HTTP/1.
    Version,
}

/// A complete answer. `head`: without its body, as the answer to a HEAD request has none.
pub fn answer(status: Status, head: bool) -> Vec<u8> {
    let (line, text) = match status {
        Status::Bad => (
            "400 Bad Request",
            "This is not an HTTP/1 request that says by one Host header for whom it is.\n",
        ),
        Status::Unknown => ("404 Not Found", "Nobody here has this name.\n"),
        Status::Late => (
            "408 Request Timeout",
            "The request took too long to come.\n",
        ),
        Status::Long => (
            "431 Request Header Fields Too Large",
            "The head of the request is too long.\n",
        ),
        Status::Version => (
            "505 HTTP Version Not Supported",
            "Only HTTP/1 is spoken here.\n",
        ),
    };
    let body = if head { "" } else { text };
    let length = text.len();
    format!(
        "HTTP/1.1 {line}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Sends the last words and closes. What the client has sent is read first: a socket closed with bytes unread resets the
/// connection, and the client might never see the answer (RFC 9112, section 9.6).
pub async fn send_away(mut stream: TcpStream, words: &[u8]) {
    let leave = async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        let mut buffer = [0; 4096];
        let mut left = MAX_THROWN_AWAY;
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => break,
                length => left = left.saturating_sub(length),
            }
        }
        io::Result::Ok(())
    };
    // Whether it has heard them is its own affair.
    let _ = timeout(LEAVE, leave).await;
}

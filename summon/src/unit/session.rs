//! A session with the monitor of an instance, without blocking.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kiln_monitor::control::{Message, Request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::runner::Input;

/// Longest line of a monitor, in bytes.
const MAX_LINE: usize = 1 << 20;

/// Reads what the monitor says until it is gone.
pub async fn hear(stream: Arc<UnixStream>, generation: u64, inbox: mpsc::UnboundedSender<Input>) {
    let mut buffer = vec![0; 4096];
    let mut line = Vec::new();
    loop {
        let length = match stream
            .readable()
            .await
            .and_then(|()| stream.try_read(&mut buffer))
        {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        };
        for piece in buffer
            .get(..length)
            .unwrap_or_default()
            .split_inclusive(|byte| *byte == b'\n')
        {
            line.extend_from_slice(piece);
            if line.last() != Some(&b'\n') {
                continue;
            }
            match serde_json::from_slice::<Message>(&line) {
                Ok(message) => {
                    if inbox.send(Input::Said(generation, message)).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!("a monitor said something unknown: {error}"),
            }
            line.clear();
        }
        if line.len() > MAX_LINE {
            break;
        }
    }
    let _ = inbox.send(Input::Gone(generation));
}

/// Sends a request, with a descriptor if it has one.
pub async fn ask(
    stream: &UnixStream,
    request: &Request,
    descriptor: Option<&OwnedFd>,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut sent = 0;
    while sent < line.len() {
        stream.writable().await?;
        let result = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
            if let Some(descriptors) = descriptors.as_ref().filter(|_| sent == 0)
                && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
            {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let rest = line.get(sent..).unwrap_or_default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let slices = [IoSlice::new(rest)];
            Ok(rustix::net::sendmsg(
                stream,
                &slices,
                &mut ancillary,
                flags,
            )?)
        });
        match result {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

//! Bodies of responses.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// How much of a large file is read at a time. Also the most that a response holds in memory.
pub const CHUNK: usize = 64 * 1024;

/// What follows a response's head.
pub enum SiteBody {
    /// All there is to send, in memory.
    Memory(Bytes),
    /// A stretch of a file, read as the client takes it.
    File {
        /// The file.
        file: File,
        /// Next byte to send.
        offset: u64,
        /// How many are left.
        remaining: u64,
    },
}

impl SiteBody {
    /// No bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self::Memory(Bytes::new())
    }
}

impl Body for SiteBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match self.get_mut() {
            Self::Memory(bytes) if bytes.is_empty() => None,
            Self::Memory(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Self::File { remaining: 0, .. } => None,
            Self::File {
                file,
                offset,
                remaining,
            } => {
                let length = usize::try_from(*remaining).map_or(CHUNK, |left| left.min(CHUNK));
                match read(file, *offset, length) {
                    Ok(bytes) => {
                        *offset += bytes.len() as u64;
                        *remaining -= bytes.len() as u64;
                        Some(Ok(Frame::data(bytes)))
                    }
                    Err(error) => Some(Err(error)),
                }
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.size_hint().exact() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { remaining, .. } => *remaining,
        })
    }
}

/// Reads `length` bytes at `offset`.
///
/// # Errors
///
/// What the file system says, and [`io::ErrorKind::UnexpectedEof`] for a file that has become
/// shorter: then the promised length cannot be kept and the connection must break.
pub fn read(file: &File, offset: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; length];
    file.read_exact_at(&mut buffer, offset)?;
    Ok(buffer.into())
}

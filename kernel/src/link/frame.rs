//! Cuts the bytes of the link into frames.

use alloc::vec::Vec;

use kiln_abi::link::{HEADER, MAX_PAYLOAD, parse_header};

/// Bytes asked of the stream at a time: at first, and when it has much.
const LEAST_ROOM: usize = 4 << 10;
const MOST_ROOM: usize = 64 << 10;

/// A buffer of received bytes.
#[derive(Default)]
pub(super) struct FrameReader {
    buffer: Vec<u8>,
    /// Bytes asked for next.
    room: usize,
    start: usize,
    end: usize,
}

impl FrameReader {
    /// Room behind what was received: the more, the more came before.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let least = self.room.max(LEAST_ROOM);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            // One large reply does not keep its room for ever.
            if self.buffer.len() > 4 * MOST_ROOM {
                self.buffer = Vec::new();
            }
        }
        // The whole of the frame that is under way fits, so that large ones need few calls.
        let wanted = self
            .announced()
            .map_or(0, |length| length.saturating_sub(self.end - self.start))
            .max(least);
        if self.buffer.len() - self.end < wanted {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.buffer.len() - self.end < wanted {
                self.buffer.resize(self.end + wanted, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// Says that `count` bytes were put at the start of [`FrameReader::space`].
    pub(super) fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
        if self.end == self.buffer.len() {
            self.room = MOST_ROOM;
        }
    }

    /// Length of the first frame with its header, if that has come and is allowed.
    fn announced(&self) -> Option<usize> {
        let header = self
            .buffer
            .get(self.start..self.end)?
            .first_chunk::<HEADER>()?;
        let (_, length) = parse_header(*header);
        (length <= MAX_PAYLOAD).then_some(HEADER + length as usize)
    }

    /// The next whole frame: channel and payload. `None` when more bytes are needed.
    /// An error is the length of a frame that is not allowed; the stream cannot be used any more then.
    pub(super) fn next_frame(&mut self) -> Result<Option<(u32, &[u8])>, u32> {
        let data = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((header, rest)) = data.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let (channel, length) = parse_header(*header);
        if length > MAX_PAYLOAD {
            return Err(length);
        }
        let length = length as usize;
        if rest.len() < length {
            return Ok(None);
        }
        self.start += HEADER + length;
        Ok(self
            .buffer
            .get(self.start - length..self.start)
            .map(|payload| (channel, payload)))
    }
}

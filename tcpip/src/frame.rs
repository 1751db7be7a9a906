//! Ethernet frames in and out of a stack, and their form on a byte stream.
//!
//! The stream form is that of QEMU's `-netdev stream`: each frame preceded by its length, four bytes, big-endian
//! (QEMU's `net/stream.c`). [`FrameDecoder`] and [`FrameEncoder`] hold many frames at a time, so that one read and one
//! write carry a batch.

use alloc::vec::Vec;
use core::fmt;

/// Longest frame that is accepted from a stream, in bytes: the largest IP packet and an Ethernet header, with room to
/// spare for QEMU (`NET_BUFSIZE`, 68 KiB).
pub const MAXIMUM_FRAME: usize = 68 << 10;

/// Length of the length before each frame.
const PREFIX: usize = 4;

/// Where a stack puts its frames.
pub trait FrameSink {
    /// Whether [`reserve`](Self::reserve) will now give room for a frame of the largest size. When false the stack
    /// keeps its TCP data and tries again at the next [`crate::Stack::poll`]; the owner must poll when there is room.
    fn has_room(&self) -> bool;

    /// Room for one frame of `length` bytes, whose content is undefined; None when there is none.
    fn reserve(&mut self, length: usize) -> Option<&mut [u8]>;

    /// Sends the frame that was last reserved.
    fn commit(&mut self);
}

/// One received Ethernet frame, without a check sequence.
pub type Frame<'a> = &'a [u8];

/// A stream that is not a stream of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameError {
    /// The length that was read.
    pub length: usize,
}

impl fmt::Display for FrameError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the network stream announces a frame of {} bytes, more than the {MAXIMUM_FRAME} allowed: its other end \
             does not speak the protocol of QEMU's -netdev stream",
            self.length
        )
    }
}

impl core::error::Error for FrameError {}

/// Cuts a byte stream into frames.
///
/// Read into [`space`](Self::space), tell [`filled`](Self::filled), take frames with
/// [`next_frame`](Self::next_frame) until it gives none.
pub struct FrameDecoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl FrameDecoder {
    /// A decoder that can hold `capacity` bytes, at least one frame of the largest size.
    #[must_use]
    pub fn new(capacity: usize) -> FrameDecoder {
        FrameDecoder {
            buffer: alloc::vec![0; capacity.max(MAXIMUM_FRAME + PREFIX)],
            start: 0,
            end: 0,
        }
    }

    /// Room for the next bytes of the stream; never empty after all frames were taken.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buffer.len() - self.start < MAXIMUM_FRAME + PREFIX {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// Says that `count` bytes were written at the start of [`space`](Self::space).
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// Whether no part of a frame waits for its rest.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// When the stream is not one of frames; it cannot be used any more then.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let data = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, rest)) = data.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > MAXIMUM_FRAME {
            return Err(FrameError { length });
        }
        if rest.len() < length {
            return Ok(None);
        }
        self.start += PREFIX + length;
        Ok(self.buffer.get(self.start - length..self.start))
    }
}

/// Collects frames for a byte stream.
///
/// It is a [`FrameSink`]; write [`pending`](Self::pending) to the stream and tell [`sent`](Self::sent).
pub struct FrameEncoder {
    buffer: Vec<u8>,
    start: usize,
    /// End of the frames that were committed; behind it lies at most one reserved frame.
    end: usize,
    limit: usize,
}

impl FrameEncoder {
    /// An encoder that asks the stack to pause while more than `limit` bytes wait.
    #[must_use]
    pub fn new(limit: usize) -> FrameEncoder {
        FrameEncoder {
            buffer: Vec::new(),
            start: 0,
            end: 0,
            limit,
        }
    }

    /// Bytes that wait to be written.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Takes the first frame that waits, in place of writing it to a stream.
    pub(crate) fn take_frame(&mut self) -> Option<Frame<'_>> {
        let (prefix, _) = self.pending().split_first_chunk::<PREFIX>()?;
        let length = u32::from_be_bytes(*prefix) as usize;
        let from = self.start + PREFIX;
        self.sent(PREFIX + length);
        self.buffer.get(from..from + length)
    }

    /// Says that the first `count` bytes of [`pending`](Self::pending) were written.
    pub fn sent(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }
}

impl FrameSink for FrameEncoder {
    fn has_room(&self) -> bool {
        self.end - self.start <= self.limit
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        // Twice the limit holds what does not ask first (ARP, ICMP, UDP); beyond that datagrams are lost, as on any
        // full link.
        if length > MAXIMUM_FRAME || self.end - self.start > 2 * self.limit {
            return None;
        }
        if self.start > self.limit {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let end = self.end + PREFIX + length;
        if self.buffer.len() < end {
            self.buffer.resize(end.next_power_of_two(), 0);
        }
        let (prefix, frame) = self
            .buffer
            .get_mut(self.end..end)?
            .split_first_chunk_mut::<PREFIX>()?;
        *prefix = u32::try_from(length).ok()?.to_be_bytes();
        Some(frame)
    }

    fn commit(&mut self) {
        let prefix = self
            .buffer
            .get(self.end..)
            .and_then(|rest| rest.first_chunk::<PREFIX>());
        if let Some(prefix) = prefix {
            self.end += PREFIX + u32::from_be_bytes(*prefix) as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_the_stream(frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..40),
                                     chunk in 1usize..5000) {
            let mut encoder = FrameEncoder::new(1 << 20);
            for frame in &frames {
                encoder.reserve(frame.len()).unwrap().copy_from_slice(frame);
                encoder.commit();
            }
            let mut decoder = FrameDecoder::new(0);
            let mut seen = Vec::new();
            while !encoder.pending().is_empty() {
                let count = encoder.pending().len().min(chunk).min(decoder.space().len());
                let bytes = encoder.pending()[..count].to_vec();
                decoder.space()[..count].copy_from_slice(&bytes);
                decoder.filled(count);
                encoder.sent(count);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame.to_vec());
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn any_bytes_are_cut_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let mut decoder = FrameDecoder::new(0);
            decoder.space()[..bytes.len()].copy_from_slice(&bytes);
            decoder.filled(bytes.len());
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }

    #[test]
    fn too_long_a_frame_is_an_error_that_names_its_length() {
        let mut decoder = FrameDecoder::new(0);
        decoder.space()[..4].copy_from_slice(&[0x7f, 0, 0, 0]);
        decoder.filled(4);
        assert!(
            decoder
                .next_frame()
                .unwrap_err()
                .to_string()
                .contains("2130706432")
        );
    }
}

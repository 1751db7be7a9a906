//! Physical frames: which are free, and one number of notes for each that is not.

use crate::physical::{FRAME, Physical};
use crate::ranges::Ranges;

/// The allocator of frames.
///
/// Frames that were never used come from ranges, in rising order, so that memory is first touched in sequence; frames given
/// back form a list through their own first words.
#[derive(Debug)]
pub struct Frames {
    physical: Physical,
    unused: Ranges,
    /// Address of the frame given back last, or 0.
    recycled: u64,
    /// Address of the table of notes, 4 bytes for each frame.
    notes: u64,
    /// Frames that the table has room for.
    capacity: u64,
    left: u64,
}

impl Frames {
    /// Takes all memory in `unused`, less the table of notes. `None` if there is no room for that.
    #[must_use]
    pub fn new(physical: Physical, mut unused: Ranges) -> Option<Self> {
        // Address 0 means "none" in the list.
        unused.remove(0, FRAME);
        unused.remove(physical.end(), u64::MAX);
        let capacity = unused.as_slice().last()?.end / FRAME;
        let notes = unused.take_together(4 * capacity)?;
        let left = unused.total() / FRAME;
        Some(Self {
            physical,
            unused,
            recycled: 0,
            notes,
            capacity,
            left,
        })
    }

    /// The window on memory.
    #[must_use]
    pub const fn physical(&self) -> Physical {
        self.physical
    }

    /// Frames that are free.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.left
    }

    /// A frame with any contents, its note 0.
    pub fn allocate(&mut self) -> Option<u64> {
        let frame = if self.recycled == 0 {
            self.unused.take_frame()?
        } else {
            let frame = self.recycled;
            self.recycled = self.physical.word(frame, 0);
            frame
        };
        self.left -= 1;
        self.set_note(frame, 0);
        Some(frame)
    }

    /// A frame of zeros, its note 0.
    pub fn allocate_zeroed(&mut self) -> Option<u64> {
        let frame = self.allocate()?;
        self.physical.zero(frame);
        Some(frame)
    }

    /// Gives a frame back that `allocate` returned.
    pub fn free(&mut self, frame: u64) {
        self.physical.set_word(frame, 0, self.recycled);
        self.recycled = frame;
        self.left += 1;
    }

    /// `length` bytes together, for devices. Never given back.
    pub fn take_together(&mut self, length: u64) -> Option<u64> {
        let start = self.unused.take_together(length)?;
        self.left -= length.div_ceil(FRAME);
        Some(start)
    }

    /// The note of an allocated frame. What it means is the user's business.
    #[must_use]
    pub fn note(&self, frame: u64) -> u32 {
        self.physical.half(self.note_address(frame))
    }

    /// Replaces the note of an allocated frame.
    pub fn set_note(&mut self, frame: u64, value: u32) {
        self.physical.set_half(self.note_address(frame), value);
    }

    fn note_address(&self, frame: u64) -> u64 {
        let number = frame / FRAME;
        assert!(number < self.capacity, "a frame beyond the memory");
        self.notes + 4 * number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::testing::TestMemory;

    #[test]
    fn every_frame_is_handed_out_once_and_comes_back() {
        let memory = TestMemory::new(16);
        let mut ranges = Ranges::new();
        ranges.add(0, 16 * FRAME);
        let mut frames = Frames::new(memory.physical, ranges).expect("room");
        // Page zero and the notes are not for use.
        assert_eq!(frames.left(), 14);
        let mut seen = Vec::new();
        while let Some(frame) = frames.allocate_zeroed() {
            assert!(
                memory
                    .physical
                    .bytes(frame, FRAME)
                    .expect("in memory")
                    .iter()
                    .all(|&byte| byte == 0)
            );
            assert_eq!(frames.note(frame), 0);
            frames.set_note(frame, frame as u32);
            seen.push(frame);
        }
        assert_eq!(frames.left(), 0);
        for &frame in &seen {
            assert_eq!(frames.note(frame), frame as u32);
            frames.free(frame);
        }
        let mut again: Vec<u64> = core::iter::from_fn(|| frames.allocate()).collect();
        again.sort_unstable();
        assert_eq!(again, seen);
        assert_eq!(seen.len(), 14);
    }

    #[test]
    fn no_memory_is_no_allocator() {
        let memory = TestMemory::new(1);
        let mut ranges = Ranges::new();
        ranges.add(0, FRAME);
        assert!(Frames::new(memory.physical, ranges).is_none());
    }
}

//! A small set of physical address ranges: what memory is there, less what is taken.

use crate::physical::FRAME;

/// How many ranges fit. Boot loaders report about ten; what does not fit stays unused.
const CAPACITY: usize = 48;

/// Addresses from `start` to `end` (exclusive).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

/// Disjoint ranges in rising order, each of whole frames.
#[derive(Clone, Debug)]
pub struct Ranges {
    ranges: [Range; CAPACITY],
    count: usize,
}

impl Default for Ranges {
    fn default() -> Self {
        Self::new()
    }
}

impl Ranges {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ranges: [Range { start: 0, end: 0 }; CAPACITY],
            count: 0,
        }
    }

    /// The ranges.
    #[must_use]
    pub fn as_slice(&self) -> &[Range] {
        self.ranges.get(..self.count).unwrap_or_default()
    }

    /// Bytes in all ranges.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.as_slice()
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    fn insert(&mut self, position: usize, range: Range) {
        if self.count < CAPACITY {
            self.ranges.copy_within(position..self.count, position + 1);
            if let Some(slot) = self.ranges.get_mut(position) {
                *slot = range;
                self.count += 1;
            }
        }
    }

    /// Adds memory: the whole frames within the range, where the set does not have them yet.
    pub fn add(&mut self, start: u64, end: u64) {
        let end = end & !(FRAME - 1);
        let Some(mut start) = start.checked_next_multiple_of(FRAME) else {
            return;
        };
        let mut position = 0;
        while start < end {
            match self.as_slice().get(position).copied() {
                Some(other) if other.end <= start => position += 1,
                Some(other) if other.start <= start => start = other.end,
                Some(other) => {
                    self.insert(
                        position,
                        Range {
                            start,
                            end: end.min(other.start),
                        },
                    );
                    start = end.min(other.start);
                    position += 1;
                }
                None => {
                    self.insert(position, Range { start, end });
                    return;
                }
            }
        }
    }

    /// Takes every frame away that the range touches.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let start = start & !(FRAME - 1);
        let end = end.checked_next_multiple_of(FRAME).unwrap_or(u64::MAX);
        let mut position = 0;
        while let Some(other) = self.as_slice().get(position).copied() {
            if other.end <= start || other.start >= end {
                position += 1;
                continue;
            }
            self.ranges.copy_within(position + 1..self.count, position);
            self.count -= 1;
            if other.start < start {
                self.insert(
                    position,
                    Range {
                        start: other.start,
                        end: start,
                    },
                );
                position += 1;
            }
            if other.end > end {
                self.insert(
                    position,
                    Range {
                        start: end,
                        end: other.end,
                    },
                );
                position += 1;
            }
        }
    }

    /// Takes the lowest frame.
    pub fn take_frame(&mut self) -> Option<u64> {
        let first = self.ranges.first_mut()?;
        if self.count == 0 {
            return None;
        }
        let frame = first.start;
        first.start += FRAME;
        if first.start == first.end {
            self.ranges.copy_within(1..self.count, 0);
            self.count -= 1;
        }
        Some(frame)
    }

    /// Takes `length` bytes, rounded up to frames, that lie together, from the end of the last range that has them.
    pub fn take_together(&mut self, length: u64) -> Option<u64> {
        let length = length.checked_next_multiple_of(FRAME)?;
        let range = self
            .as_slice()
            .iter()
            .rev()
            .find(|range| range.end - range.start >= length)?;
        let start = range.end - length;
        self.remove(start, range.end);
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(ranges: &Ranges) -> Vec<(u64, u64)> {
        ranges
            .as_slice()
            .iter()
            .map(|range| (range.start, range.end))
            .collect()
    }

    #[test]
    fn partial_frames_are_not_memory() {
        let mut ranges = Ranges::new();
        ranges.add(0x10, 0x2fff);
        assert_eq!(pairs(&ranges), [(0x1000, 0x2000)]);
        ranges.add(u64::MAX - 5, u64::MAX);
        assert_eq!(ranges.total(), 0x1000);
    }

    #[test]
    fn removing_splits_and_rounds_outwards() {
        let mut ranges = Ranges::new();
        ranges.add(0x1000, 0x9000);
        ranges.remove(0x3800, 0x4001);
        assert_eq!(pairs(&ranges), [(0x1000, 0x3000), (0x5000, 0x9000)]);
        ranges.remove(0x2000, 0x6000);
        assert_eq!(pairs(&ranges), [(0x1000, 0x2000), (0x6000, 0x9000)]);
        ranges.remove(0, u64::MAX);
        assert_eq!(ranges.total(), 0);
    }

    #[test]
    fn overlapping_reports_count_once() {
        let mut ranges = Ranges::new();
        ranges.add(0x4000, 0x6000);
        ranges.add(0x1000, 0x8000);
        assert_eq!(ranges.total(), 0x7000);
        ranges.add(0x7000, 0x9000);
        assert_eq!(ranges.total(), 0x8000);
    }

    #[test]
    fn frames_come_from_below_and_blocks_from_above() {
        let mut ranges = Ranges::new();
        ranges.add(0x1000, 0x2000);
        ranges.add(0x4000, 0x8000);
        assert_eq!(ranges.take_frame(), Some(0x1000));
        assert_eq!(ranges.take_frame(), Some(0x4000));
        assert_eq!(ranges.take_together(0x1001), Some(0x6000));
        assert_eq!(ranges.take_together(0x2000), None);
        assert_eq!(ranges.take_frame(), Some(0x5000));
        assert_eq!(ranges.take_frame(), None);
    }
}

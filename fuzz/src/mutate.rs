//! Cheap mutations, from a seed that makes them repeatable.

/// Values at which lengths and offsets go wrong.
const INTERESTING: [u64; 16] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// A generator of numbers (SplitMix64), not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`; 0 for a limit of 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.draw() % limit.max(1) as u64) as usize
    }
}

/// Changes an input in one to eight places. `other` lends pieces.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(8) {
        let length = bytes.len();
        // Headers come first, and most decisions with them.
        let reach = if random.below(2) == 0 {
            length.min(512)
        } else {
            length
        };
        let at = random.below(reach);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 | 2 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            3 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.draw() as u8;
                }
            }
            4 | 5 => {
                let value = INTERESTING[random.below(INTERESTING.len())];
                let value = value.wrapping_add(random.below(3) as u64).wrapping_sub(1);
                let width = 1 << random.below(4);
                let aligned = at / width * width;
                let little = value.to_le_bytes();
                let big = value.to_be_bytes();
                let chosen = if random.below(2) == 0 {
                    &little[..width]
                } else {
                    &big[8 - width..]
                };
                if let Some(place) = bytes.get_mut(aligned..aligned + width) {
                    place.copy_from_slice(chosen);
                }
            }
            6 => {
                let from = random.below(other.len());
                let count = random.below(64).min(other.len() - from);
                let piece = other.get(from..from + count).unwrap_or_default().to_vec();
                let end = (at + random.below(64)).min(length);
                bytes.splice(at..end.max(at), piece);
            }
            _ => {
                let count = random.below(32).min(length - at);
                let piece = bytes.get(at..at + count).unwrap_or_default().to_vec();
                let to = random.below(length + 1);
                bytes.splice(to..to, piece);
            }
        }
    }
}

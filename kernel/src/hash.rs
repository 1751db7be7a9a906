//! Hashing for the kernel's maps: one small function for keys of all kinds, because a kernel that starts cold pays for each
//! instruction once.
//!
//! Keys come from outside (addresses of peers, names in volumes), so boot draws what the function is keyed with: who does not
//! know it cannot choose keys that collide. Maps must be made after that.

use core::{
    hash::{BuildHasher, Hasher},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Result, host::Host};

/// A map that hashes its keys with [`Hashing`].
pub type HashMap<K, V> = hashbrown::HashMap<K, V, Hashing>;

/// Where each hash starts, and what it is multiplied with. Until boot draws them they are digits of pi.
static KEYS: [AtomicU64; 2] = [
    AtomicU64::new(0x243f_6a88_85a3_08d3),
    AtomicU64::new(0x1319_8a2e_0370_7345),
];

/// Draws the keys.
///
/// # Errors
/// What the host says.
pub fn start(host: Host) -> Result<()> {
    for key in &KEYS {
        let mut bytes = [0; 8];
        host.entropy(&mut bytes)?;
        // An odd factor loses nothing.
        key.store(u64::from_le_bytes(bytes) | 1, Ordering::Relaxed);
    }
    Ok(())
}

/// Makes hashers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hashing;

impl BuildHasher for Hashing {
    type Hasher = KeyedHasher;

    fn build_hasher(&self) -> KeyedHasher {
        let [start, factor] = &KEYS;
        KeyedHasher {
            state: start.load(Ordering::Relaxed),
            factor: factor.load(Ordering::Relaxed),
        }
    }
}

/// Folds each word into its state by a multiplication whose halves are joined: each bit of the result depends on all.
#[derive(Clone, Debug)]
pub struct KeyedHasher {
    state: u64,
    factor: u64,
}

impl Hasher for KeyedHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.write_u64(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let last = rest
                .iter()
                .fold(rest.len() as u64, |word, &byte| word << 8 | u64::from(byte));
            self.write_u64(last);
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(u64::from(number));
    }

    fn write_u16(&mut self, number: u16) {
        self.write_u64(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.state ^ number) * u128::from(self.factor);
        self.state = product as u64 ^ (product >> 64) as u64;
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, vec::Vec};
    use core::hash::Hash;

    /// How many of 4096 keys share each value of the 12 lowest and the 7 highest bits, at most: what maps look at.
    fn crowding<K: Hash>(keys: impl Iterator<Item = K>) -> (u32, u32) {
        let (mut low, mut high) = (alloc::vec![0; 4096], alloc::vec![0; 128]);
        for key in keys.take(4096) {
            let hash = Hashing.hash_one(key);
            low[(hash & 0xfff) as usize] += 1;
            high[(hash >> 57) as usize] += 1;
        }
        let most = |counts: Vec<u32>| counts.into_iter().max().unwrap_or(0);
        (most(low), most(high))
    }

    #[test]
    fn keys_that_are_alike_spread() {
        let kinds = [
            crowding(0u64..),
            crowding((0u64..).map(|number| number << 12)),
            crowding((0u64..).map(|number| number << 48)),
            crowding(0u16..),
            crowding((0u32..).map(|number| ([10u8, 0, 0, 1], number as u16, 80u16))),
            crowding((0..).map(|number| format!("file-{number}"))),
            crowding((0..).map(|number| format!("a-rather-long-name-{number}.html"))),
        ];
        for (low, high) in kinds {
            // Chance gives about 7 and 50.
            assert!(low < 14 && high < 90, "{kinds:?}");
        }
    }

    #[test]
    fn texts_that_differ_in_zeros_or_length_have_other_hashes() {
        let texts = [
            "",
            "\0",
            "\0\0",
            "\0\0\0\0\0\0\0",
            "\0\0\0\0\0\0\0\0",
            "\x01",
        ];
        let mut hashes: Vec<u64> = texts.iter().map(|text| Hashing.hash_one(text)).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), texts.len());
    }
}

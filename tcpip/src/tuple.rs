//! Connections by their addresses and ports: a hash table whose entries lie in one list, chained from the buckets.
//!
//! Not for: what else has to be found (few sockets are bound, few neighbours known: sorted lists do for them).
//!
//! What always holds: there are at least as many buckets as entries, so a chain has one entry or two, however many
//! connections there are. Which chain an entry is on depends on a number that no peer knows.

use alloc::vec::Vec;
use core::net::{IpAddr, SocketAddr};

use crate::tcp::Trace;
use crate::{Moment, SocketId};

/// Buckets of the first table.
const BUCKETS: usize = 64;
/// The end of a chain.
const END: u32 = u32::MAX;
/// An odd number with bits all over (the golden ratio's): multiplied with, it spreads what differs.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The four things that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

/// What a tuple leads to.
pub(crate) enum Entry {
    /// A connection.
    Connection(SocketId),
    /// The record of one in TIME-WAIT.
    TimeWait { trace: Trace, expires: Moment },
}

struct Slot {
    tuple: Tuple,
    /// None in a free slot.
    entry: Option<Entry>,
    /// The next slot of the chain, or of the free ones.
    next: u32,
}

/// See the module's head.
pub(crate) struct Tuples {
    secret: u64,
    /// Heads of the chains; their number is a power of two.
    buckets: Vec<u32>,
    slots: Vec<Slot>,
    /// Head of the chain of free slots.
    free: u32,
    used: usize,
}

impl Tuples {
    /// None yet. `secret` is what peers cannot know.
    pub(crate) fn new(secret: u64) -> Tuples {
        Tuples {
            secret,
            buckets: Vec::new(),
            slots: Vec::new(),
            free: END,
            used: 0,
        }
    }

    /// What a tuple leads to.
    pub(crate) fn get(&self, tuple: &Tuple) -> Option<&Entry> {
        let mut at = *self.buckets.get(self.bucket(tuple))?;
        loop {
            let slot = self.slots.get(at as usize)?;
            if slot.tuple == *tuple {
                return slot.entry.as_ref();
            }
            at = slot.next;
        }
    }

    /// Adds an entry, or puts it in the place of the one there is.
    pub(crate) fn insert(&mut self, tuple: Tuple, entry: Entry) {
        self.remove(&tuple);
        if self.used >= self.buckets.len() {
            self.grow();
        }
        self.used += 1;
        let bucket = self.bucket(&tuple);
        let Some(head) = self.buckets.get_mut(bucket) else {
            return;
        };
        let new = Slot {
            tuple,
            entry: Some(entry),
            next: *head,
        };
        match self.slots.get_mut(self.free as usize) {
            Some(slot) => {
                *head = core::mem::replace(&mut self.free, slot.next);
                *slot = new;
            }
            None => {
                *head = u32::try_from(self.slots.len()).unwrap_or(END);
                self.slots.push(new);
            }
        }
    }

    /// Takes an entry out, if there is one.
    pub(crate) fn remove(&mut self, tuple: &Tuple) {
        let bucket = self.bucket(tuple);
        let Some(head) = self.buckets.get_mut(bucket) else {
            return;
        };
        let (mut before, mut at) = (END, *head);
        let next = loop {
            let Some(slot) = self.slots.get_mut(at as usize) else {
                return;
            };
            if slot.tuple == *tuple {
                slot.entry = None;
                break core::mem::replace(&mut slot.next, self.free);
            }
            (before, at) = (at, slot.next);
        };
        match self.slots.get_mut(before as usize) {
            Some(slot) => slot.next = next,
            None => *head = next,
        }
        self.free = at;
        self.used -= 1;
    }

    /// All tuples.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tuple> {
        let used = self.slots.iter().filter(|slot| slot.entry.is_some());
        used.map(|slot| &slot.tuple)
    }

    /// Twice as many buckets.
    fn grow(&mut self) {
        self.buckets = alloc::vec![END; (self.buckets.len() * 2).max(BUCKETS)];
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index).filter(|slot| slot.entry.is_some()) else {
                continue;
            };
            let bucket = self.bucket(&slot.tuple);
            if let (Some(head), Some(slot)) =
                (self.buckets.get_mut(bucket), self.slots.get_mut(index))
            {
                slot.next = core::mem::replace(head, u32::try_from(index).unwrap_or(END));
            }
        }
    }

    /// The bucket of a tuple; there may be no buckets yet.
    fn bucket(&self, tuple: &Tuple) -> usize {
        let local = fold(word(&tuple.local) ^ self.secret, SPREAD);
        let hash = fold(word(&tuple.remote) ^ local, SPREAD ^ self.secret);
        hash as usize & self.buckets.len().wrapping_sub(1)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.used
    }
}

/// An address and port in one word: IPv4 without loss.
fn word(address: &SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => u64::from(u32::from(ip)),
        IpAddr::V6(ip) => {
            let bits = u128::from(ip);
            fold(bits as u64 ^ SPREAD, (bits >> 64) as u64 | 1)
        }
    };
    ip ^ u64::from(address.port()) << 32
}

/// Multiplies, and folds the upper half of the product onto the lower one.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn tuple(number: u32) -> Tuple {
        let port = number as u16;
        let remote = if number & 1 == 0 {
            SocketAddr::from(((number >> 4).to_be_bytes(), port))
        } else {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&(number >> 4).to_be_bytes());
            SocketAddr::from((bytes, port))
        };
        Tuple {
            local: SocketAddr::from(([10, 0, 2, 15], 80)),
            remote,
        }
    }

    fn expires(entry: Option<&Entry>) -> Option<Moment> {
        match entry? {
            Entry::TimeWait { expires, .. } => Some(*expires),
            Entry::Connection(_) => None,
        }
    }

    proptest::proptest! {
        #[test]
        fn it_is_a_map(steps in proptest::collection::vec((0u32..300, 0u64..3), 0..2000)) {
            let mut tuples = Tuples::new(7);
            let mut model = BTreeMap::new();
            for (number, (key, what)) in (0..).zip(steps) {
                let tuple = tuple(key.wrapping_mul(0x0101_0107));
                if what == 0 {
                    tuples.remove(&tuple);
                    model.remove(&key);
                } else {
                    let expires = Moment::from_secs(number);
                    tuples.insert(tuple, Entry::TimeWait { trace: Trace::default(), expires });
                    model.insert(key, expires);
                }
                assert_eq!(expires(tuples.get(&tuple)), model.get(&key).copied());
            }
            assert_eq!(tuples.len(), model.len());
            assert_eq!(tuples.iter().count(), model.len());
            for (key, value) in &model {
                let tuple = tuple(key.wrapping_mul(0x0101_0107));
                assert_eq!(expires(tuples.get(&tuple)), Some(*value));
            }
        }
    }

    #[test]
    fn chains_stay_short() {
        let mut tuples = Tuples::new(0x1234_5678_9abc_def0);
        for number in 0..20_000u32 {
            let remote = SocketAddr::from(([10, 0, (number >> 12) as u8, 2], number as u16));
            let tuple = Tuple { remote, ..tuple(0) };
            tuples.insert(
                tuple,
                Entry::TimeWait {
                    trace: Trace::default(),
                    expires: Moment::ZERO,
                },
            );
        }
        let longest = tuples.buckets.iter().map(|head| {
            core::iter::successors(tuples.slots.get(*head as usize), |slot| {
                tuples.slots.get(slot.next as usize)
            })
            .count()
        });
        assert!(longest.max().unwrap_or(0) < 12);
    }
}

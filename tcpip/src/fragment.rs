//! Reassembly of fragmented IP packets (RFC 791 section 3.2, RFC 8200 section 4.5, RFC 5722).
//!
//! What always holds: at most [`PACKETS`] packets of 64 KiB are under way; a new one takes the place of the oldest.
//! A packet whose fragments overlap is dropped whole.

use alloc::vec::Vec;
use core::net::IpAddr;
use core::time::Duration;

use crate::Moment;
use crate::packet::IpPacket;

/// Packets under way at one time.
const PACKETS: usize = 16;
/// How long the parts of a packet may take to arrive.
const LIFETIME: Duration = Duration::from_secs(30);
/// Longest payload of a packet.
const LONGEST: usize = 65535;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

struct Partial {
    key: Key,
    started: Moment,
    data: Vec<u8>,
    /// What has arrived, in order, without overlaps.
    parts: Vec<(usize, usize)>,
    total: Option<usize>,
    broken: bool,
}

/// Packets under way.
#[derive(Default)]
pub(crate) struct Fragments {
    partials: Vec<Partial>,
}

impl Fragments {
    /// Takes a fragment; returns the whole payload when it was the last one missing.
    pub(crate) fn receive(&mut self, now: Moment, packet: &IpPacket<'_>) -> Option<Vec<u8>> {
        let fragment = packet.fragment?;
        let (start, end) = (fragment.offset, fragment.offset + packet.payload.len());
        if end > LONGEST
            || packet.payload.is_empty()
            || (fragment.more && !packet.payload.len().is_multiple_of(8))
        {
            return None;
        }
        let key = Key {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            identification: fragment.identification,
        };
        self.partials
            .retain(|partial| now < partial.started + LIFETIME);
        let index = match self.partials.iter().position(|partial| partial.key == key) {
            Some(index) => index,
            None => {
                if self.partials.len() >= PACKETS {
                    self.partials.remove(0);
                }
                self.partials.push(Partial {
                    key,
                    started: now,
                    data: Vec::new(),
                    parts: Vec::new(),
                    total: None,
                    broken: false,
                });
                self.partials.len() - 1
            }
        };
        let partial = self.partials.get_mut(index)?;
        if partial.broken || partial.parts.contains(&(start, end)) {
            return None;
        }
        let beyond = partial
            .total
            .is_some_and(|total| end > total || !fragment.more);
        let before = !fragment.more && partial.parts.last().is_some_and(|(_, last)| *last > end);
        let at = partial.parts.partition_point(|(other, _)| *other < start);
        let overlaps = partial.parts.get(at).is_some_and(|(next, _)| *next < end)
            || at
                .checked_sub(1)
                .and_then(|at| partial.parts.get(at))
                .is_some_and(|(_, last)| *last > start);
        if beyond || before || overlaps {
            partial.broken = true;
            partial.data = Vec::new();
            return None;
        }
        if partial.data.len() < end {
            partial.data.resize(end, 0);
        }
        partial
            .data
            .get_mut(start..end)?
            .copy_from_slice(packet.payload);
        partial.parts.insert(at, (start, end));
        // Neighbouring parts become one, so that a packet of many small parts stays cheap.
        let mut merged: Vec<(usize, usize)> = Vec::with_capacity(partial.parts.len());
        for (start, end) in partial.parts.drain(..) {
            match merged.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ => merged.push((start, end)),
            }
        }
        partial.parts = merged;
        if !fragment.more {
            partial.total = Some(end);
        }
        if partial
            .total
            .is_some_and(|total| partial.parts == [(0, total)])
        {
            return Some(self.partials.remove(index).data);
        }
        None
    }
}

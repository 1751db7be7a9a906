//! Deadlines of many sockets: a heap whose stale entries are dropped when they come up.
//!
//! What always holds: the owner keeps for each socket the one deadline that counts (`armed`); an entry that does not
//! match it is stale. So moving a deadline later costs nothing, and an entry that comes up too early is put back.

use alloc::collections::BinaryHeap;
use core::cmp::Reverse;

use crate::{Moment, SocketId};

/// The heap of deadlines.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Moment, SocketId)>>,
}

impl Timers {
    /// Adds an entry.
    pub(crate) fn push(&mut self, deadline: Moment, id: SocketId) {
        self.heap.push(Reverse((deadline, id)));
    }

    /// The earliest deadline; it may be stale, and then too early.
    pub(crate) fn earliest(&self) -> Option<Moment> {
        self.heap.peek().map(|Reverse((deadline, _))| *deadline)
    }

    /// Takes the earliest entry, if it is due.
    pub(crate) fn pop_due(&mut self, now: Moment) -> Option<(Moment, SocketId)> {
        if self.earliest()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry)
    }
}

//! Names of a directory of a tmpfs, merged with those of the directory below.
//!
//! Positions in a listing are stable: names of the directory below come first, at that directory's positions; then the
//! names made here, by a number that only grows. A name that is there both times (removed and made again) is listed once.

use alloc::{boxed::Box, collections::BTreeMap, string::String, sync::Arc, vec::Vec};

use super::Node;
use crate::{
    Result,
    fs::{DirectoryEntry, Inode},
};

/// Set in the positions of names that were made here.
const HERE: u64 = 1 << 62;

/// What is known of a name.
enum Slot {
    /// As in the directory below, once somebody has asked for it.
    Below(Arc<Node>),
    /// Made here; its number in the listing.
    Here(Arc<Node>, u64),
    /// It is in the directory below, but was removed.
    Removed,
}

/// What a search gives.
pub enum Found {
    /// The node.
    Node(Arc<Node>),
    /// There is no such name.
    Nothing,
    /// Nothing is known here: the directory below is to be asked.
    AskBelow(Arc<dyn Inode>),
}

/// A directory.
pub struct Directory {
    lower: Option<Arc<dyn Inode>>,
    names: BTreeMap<Box<str>, Slot>,
    /// Names made here, in the order of making.
    order: BTreeMap<u64, Box<str>>,
    next: u64,
}

impl Directory {
    /// A directory over `lower`, or an empty one.
    #[must_use]
    pub fn new(lower: Option<Arc<dyn Inode>>) -> Directory {
        Directory {
            lower,
            names: BTreeMap::new(),
            order: BTreeMap::new(),
            next: 0,
        }
    }

    /// Looks for a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Found {
        match (self.names.get(name), &self.lower) {
            (Some(Slot::Below(node) | Slot::Here(node, _)), _) => Found::Node(Arc::clone(node)),
            (Some(Slot::Removed), _) | (None, None) => Found::Nothing,
            (None, Some(lower)) => Found::AskBelow(Arc::clone(lower)),
        }
    }

    /// Keeps the node for a name of the directory below.
    pub fn remember(&mut self, name: &str, node: &Arc<Node>) {
        self.names
            .insert(Box::from(name), Slot::Below(Arc::clone(node)));
    }

    /// Puts a node at a name, in place of what was there.
    pub fn put(&mut self, name: &str, node: Arc<Node>) {
        let number = match self.names.get(name) {
            Some(Slot::Here(_, number)) => *number,
            _ => {
                let number = self.next;
                self.next += 1;
                self.order.insert(number, Box::from(name));
                number
            }
        };
        self.names.insert(Box::from(name), Slot::Here(node, number));
    }

    /// Removes a name.
    ///
    /// # Errors
    /// What the file system below says when it is asked whether it has the name.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        if let Some(Slot::Here(_, number)) = self.names.get(name) {
            self.order.remove(number);
        }
        if self
            .lower
            .as_ref()
            .is_some_and(|lower| lower.lookup(name).is_ok())
        {
            self.names.insert(Box::from(name), Slot::Removed);
        } else {
            self.names.remove(name);
        }
        Ok(())
    }

    /// Lists up to `limit` names from `position` on.
    pub fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        let mut entries = Vec::new();
        let mut start = HERE;
        if position < HERE {
            start = position;
        }
        if let Some(lower) = &self.lower
            && start < HERE
        {
            let mut at = start;
            while entries.len() < limit {
                let batch = lower.entries(at, limit - entries.len())?;
                let Some(last) = batch.last() else { break };
                at = last.next;
                entries.extend(batch.into_iter().filter(|entry| {
                    !matches!(
                        self.names.get(entry.name.as_str()),
                        Some(Slot::Here(..) | Slot::Removed)
                    )
                }));
            }
            if entries.len() >= limit {
                return Ok(entries);
            }
        }
        let first = position.saturating_sub(HERE);
        for (&number, name) in self.order.range(first..) {
            if entries.len() >= limit {
                break;
            }
            if let Some(Slot::Here(node, _)) = self.names.get(name) {
                entries.push(DirectoryEntry {
                    name: String::from(&**name),
                    inode: node.inode,
                    kind: node.kind,
                    next: HERE + number + 1,
                });
            }
        }
        Ok(entries)
    }
}

//! Locks on ranges of files, and on whole files: `fcntl(2)` and `flock(2)`.
//!
//! Owners of locks are compared, never interpreted: a process for POSIX locks, an open file for OFD locks and `flock`.
//! Within one process POSIX locks never conflict, but they are kept all the same: that is what `F_GETLK` from an OFD
//! lock's point of view, and closing a descriptor, need.

use alloc::vec::Vec;

use crate::{Errno, Result, file::Readiness, file::WatchList, hash::HashMap, sync::Mutex};

/// Who has a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A process, by its number (POSIX locks).
    Process(u32),
    /// An open file, by its address (OFD locks).
    OpenFile(usize),
}

/// A range of bytes; the end is exclusive, `u64::MAX` for the end of the file whatever it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// End.
    pub end: u64,
}

impl Range {
    fn overlaps(self, other: Range) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// A lock on a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Who has it.
    pub owner: Owner,
    /// Where.
    pub range: Range,
    /// Nobody else may have one; else others may share it.
    pub exclusive: bool,
}

/// Names a file: device and inode number.
pub type FileIdentity = (u64, u64);

#[derive(Default)]
struct FileLocks {
    ranges: Vec<Lock>,
    /// `flock(2)`: by open file, and whether exclusive.
    whole: Vec<(usize, bool)>,
}

/// All locks.
#[derive(Default)]
pub struct LockTable {
    files: Mutex<HashMap<FileIdentity, FileLocks>>,
    /// Told whenever some lock is released.
    pub released: WatchList,
}

impl LockTable {
    /// The lock that stands in the way of `wanted`.
    #[must_use]
    pub fn conflict(&self, file: FileIdentity, wanted: Lock) -> Option<Lock> {
        let files = self.files.lock();
        files.get(&file)?.ranges.iter().copied().find(|lock| {
            lock.owner != wanted.owner
                && lock.range.overlaps(wanted.range)
                && (lock.exclusive || wanted.exclusive)
        })
    }

    /// Takes a lock, in place of what the owner has in the range.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else's stands in the way.
    pub fn set(&self, file: FileIdentity, wanted: Lock) -> Result<()> {
        if self.conflict(file, wanted).is_some() {
            return Err(Errno::EAGAIN);
        }
        let mut files = self.files.lock();
        let locks = files.entry(file).or_default();
        cut(&mut locks.ranges, wanted.owner, wanted.range);
        locks.ranges.push(wanted);
        drop(files);
        // A lock that was exclusive may have become a shared one.
        self.released.notify(Readiness::READABLE);
        Ok(())
    }

    /// Gives up what the owner has in a range.
    pub fn release(&self, file: FileIdentity, owner: Owner, range: Range) {
        {
            let mut files = self.files.lock();
            let Some(locks) = files.get_mut(&file) else {
                return;
            };
            cut(&mut locks.ranges, owner, range);
            if locks.ranges.is_empty() && locks.whole.is_empty() {
                files.remove(&file);
            }
        }
        self.released.notify(Readiness::READABLE);
    }

    /// Whether anything at all is locked: the cheap question on every close.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.lock().is_empty()
    }

    /// `flock(2)`: takes or changes a lock on the whole file; `None` gives it up.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else's stands in the way.
    pub fn set_whole(
        &self,
        file: FileIdentity,
        open_file: usize,
        exclusive: Option<bool>,
    ) -> Result<()> {
        {
            let mut files = self.files.lock();
            let locks = files.entry(file).or_default();
            let conflict = |&(owner, other): &(usize, bool)| {
                owner != open_file && exclusive.is_some_and(|exclusive| exclusive || other)
            };
            let blocked = locks.whole.iter().any(conflict);
            // Changing the kind of lock gives the old one up first, as in Linux, even if the new one is not got.
            locks.whole.retain(|&(owner, _)| owner != open_file);
            match exclusive {
                Some(exclusive) if !blocked => locks.whole.push((open_file, exclusive)),
                Some(_) => return Err(Errno::EAGAIN),
                None => {}
            }
            if locks.ranges.is_empty() && locks.whole.is_empty() {
                files.remove(&file);
            }
        }
        self.released.notify(Readiness::READABLE);
        Ok(())
    }

    /// All locks, for `/proc/locks`.
    #[must_use]
    pub fn all(&self) -> Vec<(FileIdentity, Lock)> {
        self.files
            .lock()
            .iter()
            .flat_map(|(file, locks)| locks.ranges.iter().map(|lock| (*file, *lock)))
            .collect()
    }
}

/// Takes a range out of an owner's locks.
fn cut(locks: &mut Vec<Lock>, owner: Owner, range: Range) {
    let mut rests = Vec::new();
    locks.retain(|lock| {
        if lock.owner != owner || !lock.range.overlaps(range) {
            return true;
        }
        if lock.range.start < range.start {
            rests.push(Lock {
                range: Range {
                    start: lock.range.start,
                    end: range.start,
                },
                ..*lock
            });
        }
        if lock.range.end > range.end {
            rests.push(Lock {
                range: Range {
                    start: range.end,
                    end: lock.range.end,
                },
                ..*lock
            });
        }
        false
    });
    locks.extend(rests);
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = (1, 2);

    fn lock(owner: usize, start: u64, end: u64, exclusive: bool) -> Lock {
        Lock {
            owner: Owner::OpenFile(owner),
            range: Range { start, end },
            exclusive,
        }
    }

    #[test]
    fn exclusive_locks_exclude_and_shared_ones_share() {
        let table = LockTable::default();
        table.set(FILE, lock(1, 0, 10, false)).unwrap();
        table.set(FILE, lock(2, 5, 15, false)).unwrap();
        assert_eq!(table.set(FILE, lock(2, 5, 15, true)), Err(Errno::EAGAIN));
        table.set(FILE, lock(2, 10, 15, true)).unwrap();
        assert_eq!(
            table.set(FILE, lock(1, 14, u64::MAX, false)),
            Err(Errno::EAGAIN)
        );
        table.release(
            FILE,
            Owner::OpenFile(2),
            Range {
                start: 12,
                end: u64::MAX,
            },
        );
        table.set(FILE, lock(1, 14, u64::MAX, false)).unwrap();
        assert_eq!(
            table
                .conflict(FILE, lock(3, 11, 12, false))
                .map(|lock| lock.owner),
            Some(Owner::OpenFile(2))
        );
    }

    #[test]
    fn releasing_the_middle_leaves_both_ends() {
        let table = LockTable::default();
        table.set(FILE, lock(1, 0, 30, true)).unwrap();
        table.release(FILE, Owner::OpenFile(1), Range { start: 10, end: 20 });
        assert!(table.conflict(FILE, lock(2, 5, 6, false)).is_some());
        assert!(table.conflict(FILE, lock(2, 10, 20, true)).is_none());
        assert!(table.conflict(FILE, lock(2, 25, 26, false)).is_some());
        table.release(
            FILE,
            Owner::OpenFile(1),
            Range {
                start: 0,
                end: u64::MAX,
            },
        );
        assert!(table.is_empty());
    }

    #[test]
    fn whole_file_locks() {
        let table = LockTable::default();
        table.set_whole(FILE, 1, Some(false)).unwrap();
        table.set_whole(FILE, 2, Some(false)).unwrap();
        assert_eq!(table.set_whole(FILE, 2, Some(true)), Err(Errno::EAGAIN));
        table.set_whole(FILE, 1, None).unwrap();
        table.set_whole(FILE, 2, Some(true)).unwrap();
        table.set_whole(FILE, 2, None).unwrap();
        assert!(table.is_empty());
    }
}

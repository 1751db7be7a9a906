//! Address space of program and kernel: the lower half, four levels of page tables.
//!
//! The tables themselves are the only record of what is mapped. A range that nobody has touched is one entry as high up in the
//! tables as fits, so that reserving a gigabyte costs a word; pages get frames on first touch.
//!
//! Each table's frame has as its note the number of entries in use, so that empty tables are given back.

use kiln_abi::host::{PAGE_SIZE, Protection, Source};

use crate::frames::Frames;
use crate::page::{ADDRESS, Kind, PRESENT, Page, Place, USER, WRITE};
use crate::physical::{FRAME, Physical};

/// Entries in a table.
const ENTRIES: usize = 512;
/// Level of the highest table; the lowest is 0.
const TOP: u32 = 3;
/// End of the lower half.
pub const USER_END: usize = 1 << 47;
/// Pages in the pool at most: three levels of tables.
const POOL_PAGES: u64 = 1 << 27;
/// The note of a frame of the pool: the page's index, and how many entries point to the frame. That count stops at
/// [`POOL_MANY`]; such a frame is never given back.
const POOL_INDEX: u32 = POOL_PAGES as u32 - 1;
const POOL_MAPPING: u32 = 1 << 27;
const POOL_MANY: u32 = 31 << 27;

/// Memory is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

/// Why an access cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// Nothing is mapped there.
    Unmapped,
    /// Something is mapped there, but not for this access.
    Denied,
    /// The page has no frame, and there is none left for it.
    Exhausted,
}

impl From<Exhausted> for AccessError {
    fn from(_: Exhausted) -> Self {
        Self::Exhausted
    }
}

/// The processor's cache of the tables.
pub trait Tlb {
    /// Forgets the page at `address`.
    fn forget(&mut self, address: usize);
    /// Forgets everything of the lower half.
    fn forget_all(&mut self);
}

/// The root file system in physical memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Root {
    /// Physical address.
    pub physical: u64,
    /// Length in pages; the last may be partly beyond the file system.
    pub pages: u64,
}

/// The address space.
#[derive(Debug)]
pub struct Memory<T> {
    frames: Frames,
    tlb: T,
    /// Physical address of the highest table.
    top: u64,
    root: Root,
    /// Physical address of the pool's highest table (three levels; entries are frame addresses), or 0.
    pool: u64,
    /// Frames in private pages and in the pool.
    used: u64,
    /// Present entries changed since the TLB was last brought up to date.
    stale: usize,
    stale_pages: [usize; 16],
}

#[derive(Clone, Copy)]
enum Change {
    /// Maps pages; the index is that of the page at the start of the address range.
    Map {
        kind: Kind,
        protection: Protection,
        index: u64,
        start: usize,
    },
    Unmap,
    Protect(Protection),
    Discard,
}

/// Pages under one entry of a table of `level`.
const fn span(level: u32) -> usize {
    1 << (9 * level)
}

impl<T: Tlb> Memory<T> {
    /// An address space whose highest table is at `top`, its lower half empty.
    pub fn new(frames: Frames, tlb: T, top: u64, root: Root) -> Self {
        Self {
            frames,
            tlb,
            top,
            root,
            pool: 0,
            used: 0,
            stale: 0,
            stale_pages: [0; 16],
        }
    }

    /// The window on physical memory.
    #[must_use]
    pub const fn physical(&self) -> Physical {
        self.frames.physical()
    }

    /// Bytes in private pages and in the pool.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used * FRAME
    }

    /// Bytes that are free.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.frames.left() * FRAME
    }

    /// `length` bytes of memory that lie together, for devices. Never given back.
    pub fn take_together(&mut self, length: u64) -> Option<u64> {
        self.frames.take_together(length)
    }

    /// Maps `length` bytes at `address`, replacing what was there. `offset` is in bytes, a multiple of the page size.
    ///
    /// # Errors
    ///
    /// When there is no frame for a table; then part of the range may be mapped.
    pub fn map(
        &mut self,
        address: usize,
        length: usize,
        protection: Protection,
        source: Source,
        offset: u64,
    ) -> Result<(), Exhausted> {
        let (kind, index) = match source {
            Source::Zero => (Kind::Zero, 0),
            Source::Root => (Kind::Root, offset / FRAME),
            Source::Pool => (Kind::Pool, offset / FRAME),
        };
        let start = address / PAGE_SIZE;
        self.change(
            address,
            length,
            Change::Map {
                kind,
                protection,
                index,
                start,
            },
        )
    }

    /// Whether `length` bytes from `offset` exist in a source.
    #[must_use]
    pub fn source_has(&self, source: Source, offset: u64, length: usize) -> bool {
        let pages = match source {
            Source::Zero => return true,
            Source::Root => self.root.pages,
            Source::Pool => POOL_PAGES,
        };
        offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= pages * FRAME)
    }

    /// Removes mappings.
    ///
    /// # Errors
    ///
    /// When a large reservation must be split and there is no frame for the table.
    pub fn unmap(&mut self, address: usize, length: usize) -> Result<(), Exhausted> {
        self.change(address, length, Change::Unmap)
    }

    /// Changes the access allowed to mapped pages.
    ///
    /// # Errors
    ///
    /// As [`Memory::unmap`].
    pub fn protect(
        &mut self,
        address: usize,
        length: usize,
        protection: Protection,
    ) -> Result<(), Exhausted> {
        self.change(address, length, Change::Protect(protection))
    }

    /// Gives frames back; the pages read as their source again.
    ///
    /// # Errors
    ///
    /// As [`Memory::unmap`].
    pub fn discard(&mut self, address: usize, length: usize) -> Result<(), Exhausted> {
        self.change(address, length, Change::Discard)
    }

    /// Maps `length` bytes from the frame at `physical` on for good; `kind` is [`Kind::Fixed`] or [`Kind::Device`].
    ///
    /// # Errors
    ///
    /// When there is no frame for a table.
    pub fn map_fixed(
        &mut self,
        address: usize,
        length: usize,
        protection: Protection,
        kind: Kind,
        physical: u64,
    ) -> Result<(), Exhausted> {
        self.change(
            address,
            length,
            Change::Map {
                kind,
                protection,
                index: physical / FRAME,
                start: address / PAGE_SIZE,
            },
        )
    }

    /// The frame of the page at `address`, provided now if it has none, for an access.
    ///
    /// # Errors
    ///
    /// When the access is not allowed or memory is exhausted.
    pub fn resolve(&mut self, address: usize, access: Protection) -> Result<u64, AccessError> {
        if address >= USER_END {
            return Err(AccessError::Unmapped);
        }
        let number = address / PAGE_SIZE;
        let (mut table, mut level) = (self.top, TOP);
        loop {
            let index = number / span(level) % ENTRIES;
            let entry = self.physical().word(table, index);
            if level > 0 && entry & PRESENT != 0 {
                table = entry & ADDRESS;
                level -= 1;
                continue;
            }
            let page = Page::decode(entry).ok_or(AccessError::Unmapped)?;
            if !page.allows(access) {
                return Err(AccessError::Denied);
            }
            if level > 0 {
                table = self.split(table, index, level, page)?;
                level -= 1;
                continue;
            }
            let page = self.provide(page, access)?;
            let Place::Frame(frame) = page.place else {
                return Err(AccessError::Exhausted);
            };
            let entry_now = page.encode();
            if entry_now != entry {
                self.set(table, index, entry_now);
                if entry & PRESENT != 0 {
                    self.tlb.forget(address);
                }
            }
            return Ok(frame);
        }
    }

    /// Copies `bytes` to the program's or kernel's memory.
    ///
    /// # Errors
    ///
    /// As [`Memory::resolve`]; then part may have been copied.
    pub fn write(&mut self, address: usize, bytes: &[u8]) -> Result<(), AccessError> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let at = address.checked_add(done).ok_or(AccessError::Unmapped)?;
            let frame = self.resolve(at, Protection::WRITE)?;
            let room = PAGE_SIZE - at % PAGE_SIZE;
            let piece = rest.get(..room).unwrap_or(rest);
            self.physical()
                .write(frame + (at % PAGE_SIZE) as u64, piece);
            done += piece.len();
        }
        Ok(())
    }

    /// Fills `bytes` from the program's or kernel's memory.
    ///
    /// # Errors
    ///
    /// As [`Memory::resolve`]; then part may have been filled.
    pub fn read(&mut self, address: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        let (mut done, length) = (0, bytes.len());
        while done < length {
            let at = address.checked_add(done).ok_or(AccessError::Unmapped)?;
            let frame = self.resolve(at, Protection::READ)?;
            let end = length.min(done + PAGE_SIZE - at % PAGE_SIZE);
            if let Some(piece) = bytes.get_mut(done..end) {
                self.physical().read(frame + (at % PAGE_SIZE) as u64, piece);
            }
            done = end;
        }
        Ok(())
    }

    /// The eight bytes at `address`.
    ///
    /// # Errors
    ///
    /// As [`Memory::read`].
    pub fn read_word(&mut self, address: usize) -> Result<u64, AccessError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Gives a page the frame that an access needs.
    fn provide(&mut self, page: Page, access: Protection) -> Result<Page, Exhausted> {
        let frame = match (page.kind, page.place) {
            (Kind::Root, Place::Frame(from)) if access.contains(Protection::WRITE) => {
                let frame = self.frames.allocate().ok_or(Exhausted)?;
                self.physical().copy(from, frame, FRAME);
                self.frames
                    .set_note(frame, ((from - self.root.physical) / FRAME) as u32);
                self.used += 1;
                return Ok(Page {
                    kind: Kind::RootCopy,
                    place: Place::Frame(frame),
                    ..page
                });
            }
            (_, Place::Frame(_)) => return Ok(page),
            (Kind::Zero, Place::Index(_)) => {
                let frame = self.frames.allocate_zeroed().ok_or(Exhausted)?;
                self.used += 1;
                frame
            }
            (Kind::Pool, Place::Index(index)) => {
                let frame = self.pool_frame(index)?;
                let note = self.frames.note(frame);
                if note < POOL_MANY {
                    self.frames.set_note(frame, note + POOL_MAPPING);
                }
                frame
            }
            (kind, Place::Index(index)) => self.frame_in_place(kind, index),
        };
        Ok(Page {
            place: Place::Frame(frame),
            ..page
        })
    }

    /// A page just mapped: those that are in memory already have their frames.
    fn fresh(&self, kind: Kind, protection: Protection, index: u64) -> Page {
        let place = match kind {
            Kind::Zero | Kind::Pool => Place::Index(index),
            _ => Place::Frame(self.frame_in_place(kind, index)),
        };
        Page {
            kind,
            protection,
            place,
        }
    }

    /// The frame of a page of the root, or of one that is said by its frame.
    fn frame_in_place(&self, kind: Kind, index: u64) -> u64 {
        match kind {
            Kind::Fixed | Kind::Device => index * FRAME,
            _ => self.root.physical + index * FRAME,
        }
    }

    fn new_table(&mut self, parent: u64, index: usize) -> Result<u64, Exhausted> {
        let table = self.frames.allocate_zeroed().ok_or(Exhausted)?;
        self.set(parent, index, table | PRESENT | WRITE | USER);
        Ok(table)
    }

    /// Replaces the reservation `page` in a table of `level` by a table of reservations.
    fn split(
        &mut self,
        parent: u64,
        index: usize,
        level: u32,
        page: Page,
    ) -> Result<u64, Exhausted> {
        let table = self.frames.allocate().ok_or(Exhausted)?;
        let Place::Index(first) = page.place else {
            return Err(Exhausted);
        };
        let step = if page.kind == Kind::Zero {
            0
        } else {
            span(level - 1) as u64
        };
        for number in 0..ENTRIES {
            let below = first + number as u64 * step;
            let page = if level == 1 {
                self.fresh(page.kind, page.protection, below)
            } else {
                Page {
                    place: Place::Index(below),
                    ..page
                }
            };
            self.physical().set_word(table, number, page.encode());
        }
        self.frames.set_note(table, ENTRIES as u32);
        self.set(parent, index, table | PRESENT | WRITE | USER);
        Ok(table)
    }

    /// Replaces an entry and keeps the table's count.
    fn set(&mut self, table: u64, index: usize, entry: u64) {
        let before = self.physical().word(table, index);
        self.physical().set_word(table, index, entry);
        if table != self.top && (before == 0) != (entry == 0) {
            let count = self.frames.note(table);
            self.frames
                .set_note(table, if entry == 0 { count - 1 } else { count + 1 });
        }
    }

    fn change(&mut self, address: usize, length: usize, change: Change) -> Result<(), Exhausted> {
        let start = address / PAGE_SIZE;
        let result = self.change_table(self.top, TOP, 0, start, start + length / PAGE_SIZE, change);
        match self.stale_pages.get(..self.stale) {
            Some(pages) => pages.iter().for_each(|&address| self.tlb.forget(address)),
            None => self.tlb.forget_all(),
        }
        self.stale = 0;
        result
    }

    /// Changes pages `start` to `end` (numbers) in a table of `level` whose first page is number `base`.
    fn change_table(
        &mut self,
        table: u64,
        level: u32,
        base: usize,
        start: usize,
        end: usize,
        change: Change,
    ) -> Result<(), Exhausted> {
        let size = span(level);
        for index in start.saturating_sub(base) / size..ENTRIES {
            let first = base + index * size;
            if first >= end {
                break;
            }
            let entry = self.physical().word(table, index);
            if level == 0 {
                let changed = self.changed_page(entry, first, change)?;
                if changed != entry {
                    self.set(table, index, changed);
                    if entry & PRESENT != 0 {
                        self.mark_stale(first);
                    }
                }
                continue;
            }
            let whole = start <= first && end >= first + size && level < TOP;
            let mut below = (entry & PRESENT != 0).then_some(entry & ADDRESS);
            if let (Some(lower), true, Change::Map { .. } | Change::Unmap) = (below, whole, change)
            {
                self.release_table(lower, level - 1, first);
                self.set(table, index, 0);
                below = None;
            }
            let reserved = if below.is_none() {
                Page::decode(self.physical().word(table, index))
            } else {
                None
            };
            if below.is_none() && whole {
                let page = match (change, reserved) {
                    (
                        Change::Map {
                            kind,
                            protection,
                            index,
                            start,
                        },
                        _,
                    ) => {
                        let place = Place::Index(if kind == Kind::Zero {
                            0
                        } else {
                            index + (first - start) as u64
                        });
                        Some(Page {
                            kind,
                            protection,
                            place,
                        })
                    }
                    (Change::Unmap, _) => None,
                    (Change::Protect(protection), page) => {
                        page.map(|page| Page { protection, ..page })
                    }
                    (Change::Discard, page) => {
                        if let Some(Page {
                            kind: Kind::Pool,
                            place: Place::Index(from),
                            ..
                        }) = page
                        {
                            (from..from + size as u64).for_each(|index| self.discard_pool(index));
                        }
                        page
                    }
                };
                self.set(table, index, page.map_or(0, Page::encode));
                continue;
            }
            let lower = match (below, reserved, change) {
                (Some(lower), ..) => lower,
                (None, Some(page), _) => self.split(table, index, level, page)?,
                (None, None, Change::Map { .. }) => self.new_table(table, index)?,
                (None, None, _) => continue,
            };
            self.change_table(
                lower,
                level - 1,
                first,
                start.max(first),
                end.min(first + size),
                change,
            )?;
            if self.frames.note(lower) == 0 {
                self.set(table, index, 0);
                self.frames.free(lower);
                // Forgetting any page forgets cached upper levels, which must not lead to the table any more.
                self.mark_stale(first);
            }
        }
        Ok(())
    }

    /// Notes that the TLB may still know page number `number` as it was.
    fn mark_stale(&mut self, number: usize) {
        if let Some(slot) = self.stale_pages.get_mut(self.stale) {
            *slot = number * PAGE_SIZE;
        }
        self.stale += 1;
    }

    /// What becomes of the entry of page number `number`.
    fn changed_page(
        &mut self,
        entry: u64,
        number: usize,
        change: Change,
    ) -> Result<u64, Exhausted> {
        let Some(page) = Page::decode(entry) else {
            return Ok(match change {
                Change::Map {
                    kind,
                    protection,
                    index,
                    start,
                } => self
                    .fresh(kind, protection, index + (number - start) as u64)
                    .encode(),
                _ => 0,
            });
        };
        Ok(match change {
            Change::Map { .. } | Change::Unmap => {
                self.release(page);
                return self.changed_page(0, number, change);
            }
            Change::Protect(protection) => Page { protection, ..page }.encode(),
            Change::Discard => match (page.kind, page.place) {
                (Kind::Zero, Place::Frame(_)) => {
                    self.release(page);
                    Page {
                        place: Place::Index(0),
                        ..page
                    }
                    .encode()
                }
                (Kind::RootCopy, Place::Frame(frame)) => {
                    let index = u64::from(self.frames.note(frame));
                    self.release(page);
                    self.fresh(Kind::Root, page.protection, index).encode()
                }
                (Kind::Pool, Place::Frame(frame)) => {
                    let index = u64::from(self.frames.note(frame) & POOL_INDEX);
                    self.release(page);
                    self.discard_pool(index);
                    Page {
                        place: Place::Index(index),
                        ..page
                    }
                    .encode()
                }
                (Kind::Pool, Place::Index(index)) => {
                    self.discard_pool(index);
                    entry
                }
                _ => entry,
            },
        })
    }

    /// Gives up what a page's entry holds.
    fn release(&mut self, page: Page) {
        let Place::Frame(frame) = page.place else {
            return;
        };
        match page.kind {
            Kind::Zero | Kind::RootCopy => {
                self.frames.free(frame);
                self.used -= 1;
            }
            Kind::Pool => {
                let note = self.frames.note(frame);
                if note < POOL_MANY {
                    self.frames.set_note(frame, note - POOL_MAPPING);
                }
            }
            Kind::Root | Kind::Fixed | Kind::Device => {}
        }
    }

    /// The pool's frame for a page, provided now if it has none.
    fn pool_frame(&mut self, index: u64) -> Result<u64, Exhausted> {
        if self.pool == 0 {
            self.pool = self.frames.allocate_zeroed().ok_or(Exhausted)?;
        }
        let mut table = self.pool;
        for level in (0..TOP).rev() {
            let slot = index as usize / span(level) % ENTRIES;
            let mut next = self.physical().word(table, slot);
            if next == 0 {
                next = self.frames.allocate_zeroed().ok_or(Exhausted)?;
                self.physical().set_word(table, slot, next);
                if level == 0 {
                    self.frames.set_note(next, index as u32);
                    self.used += 1;
                }
            }
            table = next;
        }
        Ok(table)
    }

    /// Makes a page of the pool zeros; gives its frame back if no entry points to it.
    fn discard_pool(&mut self, index: u64) {
        let mut table = self.pool;
        for level in (0..TOP).rev() {
            if table == 0 {
                return;
            }
            let slot = index as usize / span(level) % ENTRIES;
            let next = self.physical().word(table, slot);
            if level == 0 && next != 0 {
                if self.frames.note(next) < POOL_MAPPING {
                    self.physical().set_word(table, slot, 0);
                    self.frames.free(next);
                    self.used -= 1;
                } else {
                    self.physical().zero(next);
                }
            }
            table = next;
        }
    }

    /// Gives up a table of `level` and all below it; its first page is number `base`.
    fn release_table(&mut self, table: u64, level: u32, base: usize) {
        for index in 0..ENTRIES {
            let entry = self.physical().word(table, index);
            if level > 0 {
                if entry & PRESENT != 0 {
                    self.release_table(entry & ADDRESS, level - 1, base + index * span(level));
                }
            } else if let Some(page) = Page::decode(entry) {
                self.release(page);
                if entry & PRESENT != 0 {
                    self.mark_stale(base + index);
                }
            }
        }
        self.frames.free(table);
        self.mark_stale(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::testing::TestMemory;
    use crate::ranges::Ranges;

    const READ: Protection = Protection::READ;
    const WRITE: Protection = Protection::WRITE;
    const BOTH: Protection = Protection::READ.union(Protection::WRITE);
    const HUGE: usize = 1 << 30;

    #[derive(Default)]
    struct NoTlb {
        forgotten: Vec<usize>,
        flushes: usize,
    }

    impl Tlb for NoTlb {
        fn forget(&mut self, address: usize) {
            self.forgotten.push(address);
        }
        fn forget_all(&mut self) {
            self.flushes += 1;
        }
    }

    /// 600 frames; the first 4 are taken by the top table and three root pages.
    fn memory() -> (TestMemory, Memory<NoTlb>) {
        let host = TestMemory::new(600);
        host.physical.zero(0x1000);
        let mut ranges = Ranges::new();
        ranges.add(0x5000, 600 * FRAME);
        let frames = Frames::new(host.physical, ranges).expect("room");
        for page in 0..3u8 {
            host.physical
                .write(0x2000 + FRAME * u64::from(page), &[b'a' + page; 4096]);
        }
        let root = Root {
            physical: 0x2000,
            pages: 3,
        };
        (host, Memory::new(frames, NoTlb::default(), 0x1000, root))
    }

    fn byte(memory: &mut Memory<NoTlb>, address: usize) -> Result<u8, AccessError> {
        let mut bytes = [0xee];
        memory.read(address, &mut bytes)?;
        Ok(bytes[0])
    }

    #[test]
    fn reserving_a_gigabyte_costs_tables_only() {
        let (_host, mut memory) = memory();
        let before = memory.left();
        memory
            .map(64 * HUGE, 300 * HUGE, BOTH, Source::Zero, 0)
            .expect("room");
        assert_eq!(before - memory.left(), FRAME);
        assert_eq!(memory.used(), 0);
        assert_eq!(byte(&mut memory, 100 * HUGE + 12345), Ok(0));
        assert_eq!(memory.used(), FRAME);
        // One frame for the page, two for the tables that now reach it.
        assert_eq!(before - memory.left(), 4 * FRAME);
        memory.protect(64 * HUGE + 4096, 4096, READ).expect("room");
        assert_eq!(
            memory.write(64 * HUGE + 4096, b"x"),
            Err(AccessError::Denied)
        );
        assert_eq!(memory.write(64 * HUGE + 8192, b"x"), Ok(()));
        memory.unmap(64 * HUGE, 300 * HUGE).expect("room");
        assert_eq!(memory.left(), before);
        assert_eq!(memory.used(), 0);
        assert_eq!(byte(&mut memory, 64 * HUGE), Err(AccessError::Unmapped));
    }

    #[test]
    fn pages_are_zero_on_first_touch_and_after_discard() {
        let (_host, mut memory) = memory();
        memory
            .map(0x10000, 0x4000, BOTH, Source::Zero, 0)
            .expect("room");
        memory.write(0x10ffe, b"abcd").expect("mapped");
        let mut bytes = [0; 6];
        memory.read(0x10ffd, &mut bytes).expect("mapped");
        assert_eq!(&bytes, b"\0abcd\0");
        memory.discard(0x11000, 0x1000).expect("room");
        assert_eq!(memory.tlb.forgotten, [0x11000]);
        memory.read(0x10ffd, &mut bytes).expect("mapped");
        assert_eq!(&bytes, b"\0ab\0\0\0");
        assert_eq!(memory.used(), 2 * FRAME);
    }

    #[test]
    fn contents_survive_a_time_without_access() {
        let (_host, mut memory) = memory();
        memory
            .map(0x10000, 0x1000, BOTH, Source::Zero, 0)
            .expect("room");
        memory.write(0x10000, b"kept").expect("mapped");
        memory
            .protect(0x10000, 0x1000, Protection::empty())
            .expect("room");
        assert_eq!(byte(&mut memory, 0x10000), Err(AccessError::Denied));
        memory.protect(0x10000, 0x1000, READ).expect("room");
        assert_eq!(byte(&mut memory, 0x10000), Ok(b'k'));
        assert_eq!(memory.write(0x10000, b"x"), Err(AccessError::Denied));
    }

    #[test]
    fn stores_to_the_root_go_to_a_private_copy() {
        let (host, mut memory) = memory();
        memory
            .map(0x20000, 0x2000, BOTH, Source::Root, 0x1000)
            .expect("room");
        memory
            .map(0x30000, 0x2000, READ, Source::Root, 0x1000)
            .expect("room");
        assert_eq!(memory.resolve(0x20000, READ), Ok(0x3000));
        memory.write(0x21000, b"X").expect("mapped");
        assert_eq!(byte(&mut memory, 0x21000), Ok(b'X'));
        assert_eq!(byte(&mut memory, 0x21001), Ok(b'c'));
        assert_eq!(byte(&mut memory, 0x31000), Ok(b'c'));
        assert_eq!(host.physical.array(0x4000), Some([b'c']));
        assert_eq!(memory.used(), FRAME);
        memory.discard(0x20000, 0x2000).expect("room");
        assert_eq!(byte(&mut memory, 0x21000), Ok(b'c'));
        assert_eq!(memory.used(), 0);
        assert!(memory.source_has(Source::Root, 0x2000, 0x1000));
        assert!(!memory.source_has(Source::Root, 0x2000, 0x2000));
        assert!(!memory.source_has(Source::Root, u64::MAX, 0x1000));
    }

    #[test]
    fn pool_pages_are_seen_through_every_mapping() {
        let (_host, mut memory) = memory();
        let start = memory.left();
        memory
            .map(0x40000, 0x3000, BOTH, Source::Pool, 0x5000)
            .expect("room");
        memory
            .map(0x200000, 0x200000, BOTH, Source::Pool, 0x6000)
            .expect("room");
        memory.write(0x41000, b"shared").expect("mapped");
        assert_eq!(byte(&mut memory, 0x200000), Ok(b's'));
        memory.write(0x200000, b"S").expect("mapped");
        assert_eq!(byte(&mut memory, 0x41000), Ok(b'S'));
        assert_eq!(memory.used(), FRAME);
        // Discarded while another mapping looks: zeros there too, the frame stays.
        memory.discard(0x41000, 0x1000).expect("room");
        assert_eq!(byte(&mut memory, 0x200000), Ok(0));
        assert_eq!(memory.used(), FRAME);
        memory.write(0x200000, b"T").expect("mapped");
        assert_eq!(byte(&mut memory, 0x41000), Ok(b'T'));
        // Contents outlive the mappings.
        memory.unmap(0x40000, 0x3000).expect("room");
        memory.unmap(0x200000, 0x200000).expect("room");
        assert_eq!(memory.used(), FRAME);
        memory
            .map(0x50000, 0x1000, BOTH, Source::Pool, 0x6000)
            .expect("room");
        assert_eq!(byte(&mut memory, 0x50000), Ok(b'T'));
        memory.discard(0x50000, 0x1000).expect("room");
        assert_eq!(memory.used(), 0);
        assert_eq!(byte(&mut memory, 0x50000), Ok(0));
        // A discarded range that was never touched through its mapping loses its pages too.
        memory.write(0x50000, b"U").expect("mapped");
        memory.unmap(0x50000, 0x1000).expect("room");
        memory
            .map(0x400000, 0x200000, BOTH, Source::Pool, 0x6000)
            .expect("room");
        memory.discard(0x400000, 0x200000).expect("room");
        assert_eq!(memory.used(), 0);
        memory.unmap(0x400000, 0x200000).expect("room");
        // What remains are the pool's own three tables.
        assert_eq!(start - memory.left(), 3 * FRAME);
    }

    #[test]
    fn exhausted_memory_is_said_and_recovered_from() {
        let (_host, mut memory) = memory();
        let start = memory.left();
        memory
            .map(0x400000, 0x800000, BOTH, Source::Zero, 0)
            .expect("room");
        let mut address = 0x400000;
        while memory.write(address, b"x").is_ok() {
            address += 0x1000;
        }
        assert_eq!(memory.write(address, b"x"), Err(AccessError::Exhausted));
        assert_eq!(memory.left(), 0);
        assert_eq!(
            memory.map(1 << 40, 0x1000, BOTH, Source::Zero, 0),
            Err(Exhausted)
        );
        memory
            .unmap(0x400000, 0x800000)
            .expect("no table is needed");
        assert_eq!(memory.left(), start);
        assert!(memory.tlb.flushes > 0);
    }

    #[test]
    fn mapping_over_a_mapping_replaces_it() {
        let (_host, mut memory) = memory();
        memory
            .map(0x10000, 0x4000, BOTH, Source::Zero, 0)
            .expect("room");
        memory.write(0x11000, b"old").expect("mapped");
        memory
            .map(0x11000, 0x1000, READ, Source::Root, 0)
            .expect("room");
        assert_eq!(memory.used(), 0);
        assert_eq!(byte(&mut memory, 0x11000), Ok(b'a'));
        memory
            .map(0, 2 * HUGE, BOTH, Source::Zero, 0)
            .expect("room");
        assert_eq!(byte(&mut memory, 0x11000), Ok(0));
        assert_eq!(memory.resolve(USER_END, READ), Err(AccessError::Unmapped));
        assert_eq!(
            memory.resolve(usize::MAX, WRITE),
            Err(AccessError::Unmapped)
        );
    }
}

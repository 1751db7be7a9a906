//! The program's address space: which ranges are mapped, from what, with which access.
//!
//! The host interface provides the pages; this module keeps the ranges ([`AddressSpace`]) and chooses addresses. It
//! never looks at page contents except to copy file bytes that cannot be mapped in place.

#[cfg(test)]
mod tests;
pub mod user;

use alloc::{
    string::{String, ToString},
    sync::Arc,
    vec::Vec,
};

use bitflags::bitflags;
use kiln_abi::host::{PAGE_SIZE, PROGRAM_END, PROGRAM_START, Protection, Source};

use crate::{
    Errno, Result,
    file::Sink,
    fs::{Inode, Kind, MapSource, device_number},
    host::Host,
};

/// The image's root file system in memory.
#[derive(Clone, Copy, Debug)]
pub struct RootImage {
    /// Its bytes.
    pub bytes: &'static [u8],
}

/// Lowest address given out for mappings without a wish.
const MAP_START: usize = 0x1_0000_0000;

/// `length` rounded up to whole pages; `None` when that overflows.
#[must_use]
pub fn page_round_up(length: usize) -> Option<usize> {
    length
        .checked_add(PAGE_SIZE - 1)
        .map(|sum| sum & !(PAGE_SIZE - 1))
}

bitflags! {
    /// Properties of a range beyond its access.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AreaFlags: u32 {
        /// `MAP_SHARED`.
        const SHARED = 1;
        /// The heap that `brk(2)` moves.
        const HEAP = 2;
        /// The first thread's stack.
        const STACK = 4;
        /// A shared mapping of a file that was opened for reading only: it never becomes writable.
        const READ_ONLY_FILE = 8;
        /// Kept free of mappings; to the program nothing is there.
        const GUARD = 16;
    }
}

/// The file behind a range.
#[derive(Clone)]
pub struct AreaFile {
    /// Keeps it alive.
    pub inode: Arc<dyn Inode>,
    /// Absolute path it was opened by.
    pub path: Arc<str>,
    /// Offset in the file of the range's first byte.
    pub offset: u64,
}

/// A mapped range.
#[derive(Clone)]
pub struct Area {
    /// First address.
    pub start: usize,
    /// End (exclusive).
    pub end: usize,
    /// End of what has pages: less than `end` where a mapping is longer than its file. The rest is mapped without access.
    backed: usize,
    /// Access.
    pub protection: Protection,
    /// Properties.
    pub flags: AreaFlags,
    /// File, if any.
    pub file: Option<AreaFile>,
}

impl Area {
    fn slice(&self, start: usize, end: usize) -> Area {
        let mut part = self.clone();
        if let Some(file) = &mut part.file {
            file.offset += (start - self.start) as u64;
        }
        part.start = start;
        part.end = end;
        part.backed = self.backed.clamp(start, end);
        part
    }

    fn continues(&self, next: &Area) -> bool {
        self.end == next.start
            && self.backed == self.end
            && self.protection == next.protection
            && self.flags == next.flags
            && match (&self.file, &next.file) {
                (None, None) => true,
                (Some(a), Some(b)) => {
                    Arc::ptr_eq(&a.inode, &b.inode)
                        && a.offset + (self.end - self.start) as u64 == b.offset
                }
                _ => false,
            }
    }
}

/// What an access that failed was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is mapped there.
    Missing,
    /// The mapping does not allow it.
    Denied,
    /// It is beyond the end of the mapped file.
    BeyondFile,
    /// The file has grown: there are pages now, and the access can be made again.
    Mended,
}

/// Where a new mapping goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Anywhere; near the address if it is free.
    Anywhere(usize),
    /// Exactly there, replacing what is mapped.
    Fixed(usize),
    /// Exactly there, or `EEXIST`.
    FixedIfFree(usize),
}

/// The ranges of a program's memory.
pub struct AddressSpace {
    host: Host,
    /// Lowest first, none overlapping another.
    areas: Vec<Area>,
    /// Mappings without a wish are placed below this, growing down.
    map_top: usize,
    /// Start and current end of the heap.
    heap: (usize, usize),
    /// Bytes mapped in all.
    mapped: usize,
}

impl AddressSpace {
    /// An empty address space that places mappings below `map_top`.
    #[must_use]
    pub fn new(host: Host, map_top: usize) -> AddressSpace {
        AddressSpace {
            host,
            areas: Vec::new(),
            map_top: map_top.clamp(MAP_START + PAGE_SIZE, PROGRAM_END),
            heap: (0, 0),
            mapped: 0,
        }
    }

    /// Bytes mapped in all.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.mapped
    }

    /// All ranges that the program is told of, lowest first.
    pub fn areas(&self) -> impl Iterator<Item = &Area> {
        self.areas
            .iter()
            .filter(|area| !area.flags.contains(AreaFlags::GUARD))
    }

    /// The place in the books of the first range that ends after an address.
    fn place(&self, address: usize) -> usize {
        self.areas.partition_point(|area| area.end <= address)
    }

    /// The range that an address lies in.
    #[must_use]
    pub fn area_at(&self, address: usize) -> Option<&Area> {
        self.areas
            .get(self.place(address))
            .filter(|area| area.start <= address)
    }

    /// Whether a whole range is mapped.
    #[must_use]
    pub fn is_range_mapped(&self, start: usize, end: usize) -> bool {
        let mut position = start;
        while position < end {
            match self.area_at(position) {
                Some(area) => position = area.end,
                None => return false,
            }
        }
        true
    }

    /// Path and offset of the file that an address is mapped from.
    #[must_use]
    pub fn file_at(&self, address: usize) -> Option<(String, u64)> {
        let area = self.area_at(address)?;
        let file = area.file.as_ref()?;
        Some((
            file.path.to_string(),
            file.offset + (address - area.start) as u64,
        ))
    }

    fn overlaps(&self, start: usize, end: usize) -> bool {
        self.areas
            .get(self.place(start))
            .is_some_and(|area| area.start < end)
    }

    /// A free range of `length` bytes below `top`, highest first.
    fn find_free(&self, length: usize, top: usize) -> Option<usize> {
        let mut end = top;
        for area in self.areas.iter().rev() {
            if end.saturating_sub(area.end) >= length {
                break;
            }
            end = end.min(area.start);
        }
        end.checked_sub(length).filter(|&start| start >= MAP_START)
    }

    fn choose(&self, placement: Placement, length: usize) -> Result<usize> {
        let fits = |address: usize| {
            address >= PROGRAM_START
                && address
                    .checked_add(length)
                    .is_some_and(|end| end <= PROGRAM_END)
        };
        match placement {
            Placement::Anywhere(wish) => {
                let wish = wish & !(PAGE_SIZE - 1);
                if wish != 0 && fits(wish) && !self.overlaps(wish, wish + length) {
                    return Ok(wish);
                }
                self.find_free(length, self.map_top).ok_or(Errno::ENOMEM)
            }
            Placement::Fixed(address) | Placement::FixedIfFree(address) => {
                if !address.is_multiple_of(PAGE_SIZE) {
                    Err(Errno::EINVAL)
                } else if address < PROGRAM_START {
                    Err(Errno::EPERM)
                } else if !fits(address) {
                    Err(Errno::ENOMEM)
                } else if matches!(placement, Placement::FixedIfFree(_))
                    && self.overlaps(address, address + length)
                {
                    Err(Errno::EEXIST)
                } else {
                    Ok(address)
                }
            }
        }
    }

    /// Maps zero bytes. `length` is a multiple of the page size.
    ///
    /// # Errors
    /// `ENOMEM`, `EEXIST`, `EINVAL`; `EACCES` for write with execute.
    pub fn map_zero(
        &mut self,
        placement: Placement,
        length: usize,
        protection: Protection,
        flags: AreaFlags,
    ) -> Result<usize> {
        check_access(protection)?;
        let start = self.choose(placement, length)?;
        self.forget(start, start + length);
        self.host.map(start, length, protection, Source::Zero, 0)?;
        self.remember(Area {
            start,
            end: start + length,
            backed: start + length,
            protection,
            flags,
            file: None,
        });
        Ok(start)
    }

    /// Maps a file. Pages that the file system can show in place are mapped; others are copied, for private mappings and
    /// for shared ones that cannot be written. What lies beyond the end in the file's last page reads as zeros; pages beyond
    /// that are there without access, until the file has grown ([`AddressSpace::fault`]).
    ///
    /// # Errors
    /// As [`AddressSpace::map_zero`]; `ENODEV` for a shared writable mapping of a file whose pages cannot be shared, and for
    /// what is no regular file (but `/dev/zero`, which is the same as no file).
    pub fn map_file(
        &mut self,
        placement: Placement,
        length: usize,
        protection: Protection,
        flags: AreaFlags,
        file: AreaFile,
    ) -> Result<usize> {
        check_access(protection)?;
        let shared = flags.contains(AreaFlags::SHARED);
        let metadata = file.inode.metadata()?;
        match metadata.kind {
            Kind::Regular => {}
            // zero(4): the same as a mapping without a file.
            Kind::CharacterDevice if metadata.special_device == device_number(1, 5) => {
                return self.map_zero(placement, length, protection, flags);
            }
            _ => return Err(Errno::ENODEV),
        }
        let size = metadata.size;
        let backed = usize::try_from(size.saturating_sub(file.offset))
            .ok()
            .and_then(page_round_up)
            .map_or(length, |pages| pages.min(length));
        let start = self.choose(placement, length)?;
        // Find out first what is possible, so that a refusal leaves everything as it was.
        let mut pieces: Vec<(usize, Option<MapSource>)> = Vec::new();
        let mut done = 0;
        while done < backed {
            let position = file.offset + done as u64;
            let in_file = size.saturating_sub(position);
            let rest = (backed - done) as u64;
            let (bytes, source) = match file.inode.map_source(position)? {
                Some((source, available)) => (available, Some(source)),
                None => (in_file, None),
            };
            // Bytes that are not whole pages of the root are copied, up to the end of their page.
            let whole = bytes.min(in_file) & !(PAGE_SIZE as u64 - 1);
            let (bytes, source) = match source {
                Some(MapSource::Root(_)) if whole == 0 => (1, None),
                Some(MapSource::Root(_)) => (whole, source),
                _ => (bytes, source),
            };
            let refused = !matches!(source, Some(MapSource::Pool(_)));
            if refused && shared && protection.contains(Protection::WRITE) {
                return Err(Errno::ENODEV);
            }
            let piece = (bytes.clamp(1, rest) as usize).next_multiple_of(PAGE_SIZE);
            pieces.push((piece, source));
            done += piece;
        }
        self.forget(start, start + length);
        if backed < length {
            let (address, rest) = (start + backed, length - backed);
            self.host
                .map(address, rest, Protection::empty(), Source::Zero, 0)?;
        }
        let mut done = 0;
        for (piece, source) in pieces {
            let address = start + done;
            let source = match source {
                Some(MapSource::Root(at)) => Some((Source::Root, at)),
                Some(MapSource::Pool(at)) if shared => Some((Source::Pool, at)),
                _ => None,
            };
            match source {
                Some((source, at)) => self.host.map(address, piece, protection, source, at)?,
                None => {
                    let position = file.offset + done as u64;
                    self.map_copied(address, piece, protection, &file, position, size)?;
                }
            }
            done += piece;
        }
        self.remember(Area {
            start,
            end: start + length,
            backed: start + backed,
            protection,
            flags,
            file: Some(file),
        });
        Ok(start)
    }

    /// Maps zero pages and reads a file's bytes into them.
    fn map_copied(
        &self,
        address: usize,
        length: usize,
        protection: Protection,
        file: &AreaFile,
        position: u64,
        size: u64,
    ) -> Result<()> {
        let bytes = usize::try_from(size.saturating_sub(position))
            .unwrap_or(usize::MAX)
            .min(length);
        if bytes == 0 {
            return self.host.map(address, length, protection, Source::Zero, 0);
        }
        let writable = Protection::READ | Protection::WRITE;
        self.host.map(address, length, writable, Source::Zero, 0)?;
        let mut done = 0;
        while done < bytes {
            let range = user::UserRange {
                address: address + done,
                length: bytes - done,
            };
            match file
                .inode
                .read_at(position + done as u64, &mut Sink::user(range))?
            {
                0 => break,
                count => done += count,
            }
        }
        if protection != writable {
            self.host.protect(address, length, protection)?;
        }
        Ok(())
    }

    /// Unmaps a range.
    ///
    /// # Errors
    /// `EINVAL` for an empty or misaligned range.
    pub fn unmap(&mut self, start: usize, length: usize) -> Result<()> {
        let end = check_range(start, length)?;
        self.forget(start, end);
        self.host.unmap(start, end - start)
    }

    /// Changes the access allowed to a range.
    ///
    /// # Errors
    /// `ENOMEM` when part of it is not mapped, `EACCES` for write with execute or for writing a shared read-only file.
    pub fn protect(&mut self, start: usize, length: usize, protection: Protection) -> Result<()> {
        if length == 0 {
            return if start.is_multiple_of(PAGE_SIZE) {
                Ok(())
            } else {
                Err(Errno::EINVAL)
            };
        }
        let end = check_range(start, length).map_err(|error| match error {
            Errno::EINVAL if start.is_multiple_of(PAGE_SIZE) => Errno::ENOMEM,
            error => error,
        })?;
        check_access(protection)?;
        if !self.is_range_mapped(start, end) {
            return Err(Errno::ENOMEM);
        }
        let (first, after) = (self.split(start), self.split(end));
        let areas = self.areas.get_mut(first..after).unwrap_or_default();
        let refused = areas.iter().any(|area| {
            area.flags.contains(AreaFlags::SHARED)
                && protection.contains(Protection::WRITE)
                && !area.protection.contains(Protection::WRITE)
                && (area.flags.contains(AreaFlags::READ_ONLY_FILE)
                    || area.file.as_ref().is_some_and(|file| {
                        !matches!(
                            file.inode.map_source(file.offset),
                            Ok(Some((MapSource::Pool(_), _)))
                        )
                    }))
        });
        let mut result = if refused {
            Err(Errno::EACCES)
        } else {
            self.host.protect(start, end - start, protection)
        };
        if result.is_ok() {
            for area in areas {
                area.protection = protection;
                if area.backed < area.end {
                    let (rest, length) = (area.backed, area.end - area.backed);
                    result = self.host.protect(rest, length, Protection::empty());
                }
            }
        }
        for place in (first.saturating_sub(1)..after).rev() {
            self.join(place);
        }
        result
    }

    /// Finds out why an access failed, and gives pages of a file that has grown since it was mapped.
    ///
    /// # Errors
    /// Those of mapping the pages.
    pub fn fault(&mut self, address: usize) -> Result<Fault> {
        let Some(area) = self.area_at(address) else {
            return Ok(Fault::Missing);
        };
        if area.flags.contains(AreaFlags::GUARD) {
            return Ok(Fault::Missing);
        }
        if address < area.backed {
            return Ok(Fault::Denied);
        }
        let rest = area.slice(area.backed, area.end);
        let Some(file) = &rest.file else {
            return Ok(Fault::Denied);
        };
        let position = file.offset + ((address & !(PAGE_SIZE - 1)) - rest.start) as u64;
        if position >= file.inode.metadata()?.size {
            return Ok(Fault::BeyondFile);
        }
        if rest.flags.contains(AreaFlags::SHARED) && !rest.flags.contains(AreaFlags::READ_ONLY_FILE)
        {
            let length = (rest.end - rest.start) as u64;
            file.inode.prepare_shared(file.offset, length)?;
        }
        self.map_like(&rest, rest.start, rest.end)?;
        Ok(Fault::Mended)
    }

    /// Gives the memory of private ranges back (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// `ENOMEM` when part of the range is not mapped.
    pub fn discard(&mut self, start: usize, length: usize) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let end = check_range(start, length)?;
        if !self.is_range_mapped(start, end) {
            return Err(Errno::ENOMEM);
        }
        let mut position = start;
        while position < end {
            let Some(area) = self.area_at(position) else {
                break;
            };
            let stop = area.end.min(end);
            let area = area.clone();
            // Shared file pages stay: dropping them from this mapping changes nothing that can be seen.
            if !(area.flags.contains(AreaFlags::SHARED) && area.file.is_some()) {
                let part = area.slice(position, stop);
                match &part.file {
                    None => self.host.discard(position, stop - position)?,
                    Some(file) => {
                        let (placement, protection) = (Placement::Fixed(position), part.protection);
                        self.map_file(
                            placement,
                            stop - position,
                            protection,
                            part.flags,
                            file.clone(),
                        )?;
                    }
                }
            }
            position = stop;
        }
        Ok(())
    }

    /// Resizes a mapping (`mremap(2)`). `target`: where it must go, if the caller says.
    ///
    /// # Errors
    /// `EFAULT` when the old range is not one mapping, `ENOMEM`, `EINVAL`.
    pub fn remap(
        &mut self,
        start: usize,
        old_length: usize,
        new_length: usize,
        may_move: bool,
        target: Option<usize>,
    ) -> Result<usize> {
        let old_end = check_range(start, old_length)?;
        let new_length = page_round_up(new_length)
            .filter(|&length| length > 0)
            .ok_or(Errno::EINVAL)?;
        let area = self.area_at(start).ok_or(Errno::EFAULT)?.clone();
        if area.end < old_end {
            return Err(Errno::EFAULT);
        }
        let old_length = old_end - start;
        if target.is_none() && new_length <= old_length {
            if new_length < old_length {
                self.unmap(start + new_length, old_length - new_length)?;
            }
            return Ok(start);
        }
        let grown = start
            .checked_add(new_length)
            .filter(|&end| end <= PROGRAM_END)
            .ok_or(Errno::ENOMEM)?;
        if target.is_none() && area.end == old_end && !self.overlaps(old_end, grown) {
            self.map_like(&area, old_end, grown)?;
            return Ok(start);
        }
        if !may_move {
            return Err(Errno::ENOMEM);
        }
        if area.flags.contains(AreaFlags::SHARED) && area.file.is_none() {
            return Err(Errno::EINVAL);
        }
        let placement = match target {
            Some(address) => {
                let end = address.checked_add(new_length).ok_or(Errno::EINVAL)?;
                if address < old_end && end > start {
                    return Err(Errno::EINVAL);
                }
                Placement::Fixed(address)
            }
            None => Placement::Anywhere(0),
        };
        let destination = self.choose(placement, new_length)?;
        let part = area.slice(start, old_end);
        let moved = Area {
            start: destination,
            end: destination + new_length,
            ..part.clone()
        };
        self.map_like(&moved, moved.start, moved.end)?;
        let copy = new_length.min(part.backed - start);
        if copy > 0 && !part.flags.contains(AreaFlags::SHARED) {
            let access = Protection::READ | Protection::WRITE;
            self.host.protect(destination, copy, access)?;
            if !part.protection.contains(Protection::READ) {
                self.host.protect(start, copy, Protection::READ)?;
            }
            user::copy_within(destination, start, copy)?;
            if part.protection != access {
                self.host.protect(destination, copy, part.protection)?;
            }
        }
        self.unmap(start, old_length)?;
        Ok(destination)
    }

    /// Extends an area by `[from, to)`.
    fn map_like(&mut self, area: &Area, from: usize, to: usize) -> Result<()> {
        let placement = Placement::Fixed(from);
        match &area.file {
            None => self.map_zero(placement, to - from, area.protection, area.flags)?,
            Some(file) => {
                let offset = file.offset + (from - area.start) as u64;
                let file = AreaFile {
                    offset,
                    ..file.clone()
                };
                self.map_file(placement, to - from, area.protection, area.flags, file)?
            }
        };
        Ok(())
    }

    /// Sets where the heap starts (after the program's data).
    pub fn set_heap(&mut self, start: usize) {
        self.heap = (start, start);
    }

    /// Moves the end of the heap (`brk(2)`); returns the end afterwards, the old one if it cannot be moved.
    pub fn move_heap(&mut self, wish: usize) -> usize {
        let (start, current) = self.heap;
        if wish < start || wish > PROGRAM_END {
            return current;
        }
        let (Some(old), Some(new)) = (page_round_up(current), page_round_up(wish)) else {
            return current;
        };
        if new > old {
            let access = Protection::READ | Protection::WRITE;
            if self.overlaps(old, new)
                || self
                    .map_zero(Placement::Fixed(old), new - old, access, AreaFlags::HEAP)
                    .is_err()
            {
                return current;
            }
        } else if new < old && self.unmap(new, old - new).is_err() {
            return current;
        }
        self.heap.1 = wish;
        wish
    }

    /// Start and end of the heap.
    #[must_use]
    pub fn heap(&self) -> (usize, usize) {
        self.heap
    }

    /// Makes an address the end of what is before it. Returns the place in the books of what is after it.
    fn split(&mut self, address: usize) -> usize {
        let place = self.place(address);
        let Some(area) = self
            .areas
            .get_mut(place)
            .filter(|area| area.start < address)
        else {
            return place;
        };
        let before = area.slice(area.start, address);
        *area = area.slice(address, area.end);
        self.areas.insert(place, before);
        place + 1
    }

    /// Joins the area at a place in the books with the next, if that continues it.
    fn join(&mut self, place: usize) {
        if let Some([area, next]) = self.areas.get_mut(place..place + 2)
            && area.continues(next)
        {
            (area.end, area.backed) = (next.end, next.backed);
            self.areas.remove(place + 1);
        }
    }

    /// Takes a range out of the books.
    fn forget(&mut self, start: usize, end: usize) {
        let (first, after) = (self.split(start), self.split(end));
        for area in self.areas.drain(first..after) {
            self.mapped -= area.end - area.start;
        }
    }

    /// Puts an area into the books, joined with neighbours that it continues.
    fn remember(&mut self, area: Area) {
        self.mapped += area.end - area.start;
        let place = self.place(area.start);
        self.areas.insert(place, area);
        self.join(place);
        if let Some(before) = place.checked_sub(1) {
            self.join(before);
        }
    }
}

fn check_access(protection: Protection) -> Result<()> {
    if protection.contains(Protection::WRITE | Protection::EXECUTE) {
        Err(Errno::EACCES)
    } else {
        Ok(())
    }
}

/// The end of a page-aligned range, its length rounded up.
fn check_range(start: usize, length: usize) -> Result<usize> {
    let length = page_round_up(length).ok_or(Errno::EINVAL)?;
    let end = start.checked_add(length).ok_or(Errno::EINVAL)?;
    if !start.is_multiple_of(PAGE_SIZE) || length == 0 || start < PROGRAM_START || end > PROGRAM_END
    {
        return Err(Errno::EINVAL);
    }
    Ok(end)
}

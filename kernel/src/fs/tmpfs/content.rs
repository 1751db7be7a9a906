//! Contents of a regular file of a tmpfs: pages of the pool, holes, and what still is as in the file below.
//!
//! A page is copied from the file below when it is first written, so changing one byte of a large file of the image costs
//! one page.
//!
//! What always holds: bytes of a kept page beyond the file's end that the kernel put there are zeros. Once a page was
//! mapped into the program, pages stay with this file until it is gone, so that a mapping never shows another file's data.

use alloc::{collections::BTreeMap, sync::Arc, vec::Vec};

use kiln_abi::host::PAGE_SIZE;

use crate::{
    Errno, Result,
    file::{Sink, Source},
    fs::{
        Inode, MapSource,
        pool::{PageNumber, Pool},
    },
};

const PAGE: u64 = PAGE_SIZE as u64;

/// The file below.
struct Lower {
    inode: Arc<dyn Inode>,
    /// Bytes of it that are still seen.
    limit: u64,
}

/// What a file holds.
pub struct Content {
    pool: Arc<Pool>,
    pages: BTreeMap<u64, PageNumber>,
    size: u64,
    lower: Option<Lower>,
    /// Some page was or is mapped into the program.
    mapped: bool,
    /// `F_SEAL_*` of a memory file; `None` for other files, which cannot be sealed.
    pub seals: Option<u32>,
}

impl Content {
    /// An empty file.
    #[must_use]
    pub fn new(pool: &Arc<Pool>) -> Content {
        Content {
            pool: Arc::clone(pool),
            pages: BTreeMap::new(),
            size: 0,
            lower: None,
            mapped: false,
            seals: None,
        }
    }

    /// A file that is as `inode`, of `size` bytes, until it is changed. `inode` must be readable in place.
    #[must_use]
    pub fn over(pool: &Arc<Pool>, inode: Arc<dyn Inode>, size: u64) -> Content {
        let mut content = Content::new(pool);
        content.size = size;
        content.lower = Some(Lower { inode, limit: size });
        content
    }

    /// Length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Space used, in units of 512 bytes.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        let lower = self
            .lower
            .as_ref()
            .map_or(0, |lower| lower.limit.div_ceil(PAGE));
        (self.pages.len() as u64).max(lower) * (PAGE / 512)
    }

    /// Bytes from `position` that are as in the file below and can be read in place.
    pub fn in_place(&self, position: u64) -> Option<&'static [u8]> {
        let lower = self.lower.as_ref()?;
        if position >= lower.limit.min(self.size) || self.pages.contains_key(&(position / PAGE)) {
            return None;
        }
        let mut end = lower.limit.min(self.size);
        if let Some((&page, _)) = self.pages.range(position / PAGE..).next() {
            end = end.min(page * PAGE);
        }
        let bytes = lower.inode.in_place(position)?;
        bytes.get(..bytes.len().min(usize::try_from(end - position).ok()?))
    }

    /// Reads from `position`; 0 at the end.
    pub fn read(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let mut done = 0;
        while sink.remaining() > 0 {
            let at = position.saturating_add(done as u64);
            if at >= self.size {
                break;
            }
            let result = self.read_piece(at, sink);
            match result {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn read_piece(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let left = usize::try_from(self.size - position).unwrap_or(usize::MAX);
        let offset = (position % PAGE) as usize;
        if let Some(&page) = self.pages.get(&(position / PAGE)) {
            return self
                .pool
                .read(page, offset, left.min(PAGE_SIZE - offset), sink);
        }
        if let Some(bytes) = self.in_place(position) {
            return sink.put(bytes);
        }
        if self
            .lower
            .as_ref()
            .is_some_and(|lower| position < lower.limit)
        {
            // The file below can be read, but not here: damage.
            return Err(Errno::EIO);
        }
        // A hole: up to the next page that there is.
        let next = self
            .pages
            .range(position / PAGE..)
            .next()
            .map_or(u64::MAX, |(&page, _)| page * PAGE);
        let hole = usize::try_from(next - position).unwrap_or(usize::MAX);
        sink.put_zeros(left.min(hole))
    }

    /// The page at an index, made (as it reads now) if there is none.
    fn own_page(&mut self, index: u64) -> Result<PageNumber> {
        if let Some(&page) = self.pages.get(&index) {
            return Ok(page);
        }
        let wanted = index
            .checked_sub(1)
            .and_then(|before| self.pages.get(&before))
            .map(|page| page.next());
        let page = self.pool.allocate(wanted)?;
        if let Err(error) = self.copy_from_lower(index, page) {
            self.pool.free(core::iter::once(page));
            return Err(error);
        }
        self.pages.insert(index, page);
        Ok(page)
    }

    fn copy_from_lower(&self, index: u64, page: PageNumber) -> Result<()> {
        let Some(lower) = &self.lower else {
            return Ok(());
        };
        let end = lower.limit.min(self.size).min((index + 1) * PAGE);
        let mut position = index * PAGE;
        while position < end {
            let bytes = lower.inode.in_place(position).ok_or(Errno::EIO)?;
            let length = bytes.len().min((end - position) as usize);
            let offset = (position % PAGE) as usize;
            self.pool
                .write(page, offset, length, &mut Source::kernel(&bytes[..length]))?;
            position += length as u64;
        }
        Ok(())
    }

    /// Writes at `position`. A short count when space runs out in the middle.
    pub fn write(&mut self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        let end = position
            .checked_add(source.remaining() as u64)
            .filter(|&end| end <= i64::MAX as u64);
        let end = end.ok_or(Errno::EFBIG)?;
        let mut at = position;
        let mut result = Ok(());
        while at < end {
            let offset = (at % PAGE) as usize;
            let length = (PAGE_SIZE - offset).min((end - at) as usize);
            let step = self
                .own_page(at / PAGE)
                .and_then(|page| self.pool.write(page, offset, length, source));
            match step {
                Ok(0) => break,
                Ok(count) => at += count as u64,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if at > self.size {
            self.size = at;
        }
        if at == position {
            result.map(|()| 0)
        } else {
            Ok((at - position) as usize)
        }
    }

    /// Cuts, or extends by zeros.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        if size > i64::MAX as u64 {
            return Err(Errno::EFBIG);
        }
        if size < self.size {
            self.forget(size, u64::MAX);
            if let Some(lower) = &mut self.lower {
                lower.limit = lower.limit.min(size);
                if lower.limit == 0 {
                    self.lower = None;
                }
            }
        }
        self.size = size;
        Ok(())
    }

    /// Makes the kept pages of a range of bytes zero, or gives them back where they are wholly in the range.
    fn forget(&mut self, start: u64, end: u64) {
        let first = start.div_ceil(PAGE);
        // Exclusive; a range to the end of everything has no last page to keep.
        let last = if end == u64::MAX {
            u64::MAX
        } else {
            end / PAGE
        };
        if !start.is_multiple_of(PAGE)
            && let Some(&page) = self.pages.get(&(start / PAGE))
        {
            let length = (end - start).min(PAGE) as usize;
            self.pool.clear(page, (start % PAGE) as usize, length);
        }
        if end != u64::MAX
            && !end.is_multiple_of(PAGE)
            && (end / PAGE != start / PAGE || start.is_multiple_of(PAGE))
            && let Some(&page) = self.pages.get(&(end / PAGE))
        {
            self.pool.clear(page, 0, (end % PAGE) as usize);
        }
        if first >= last {
            return;
        }
        if self.mapped {
            for &page in self.pages.range(first..last).map(|(_, page)| page) {
                self.pool.clear(page, 0, PAGE_SIZE);
            }
            return;
        }
        let mut removed = self.pages.split_off(&first);
        if last != u64::MAX {
            self.pages.append(&mut removed.split_off(&last));
        }
        self.pool.free(removed.into_values());
    }

    /// Makes a range read as zeros, without changing the length.
    pub fn punch(&mut self, position: u64, length: u64) -> Result<()> {
        let end = position
            .checked_add(length)
            .ok_or(Errno::EFBIG)?
            .min(self.size.next_multiple_of(PAGE));
        if position >= end {
            return Ok(());
        }
        // Pages that still are as below must become pages of their own to be zero.
        if let Some(limit) = self.lower.as_ref().map(|lower| lower.limit) {
            for index in position / PAGE..end.min(limit).div_ceil(PAGE) {
                self.own_page(index)?;
            }
            for (&index, &page) in self.pages.range(position / PAGE..end.div_ceil(PAGE)) {
                let from = position.max(index * PAGE);
                let to = end.min((index + 1) * PAGE);
                self.pool
                    .clear(page, (from % PAGE) as usize, (to - from) as usize);
            }
            return Ok(());
        }
        self.forget(position, end);
        Ok(())
    }

    /// Makes sure that writes to a range find space.
    pub fn reserve(&mut self, position: u64, length: u64) -> Result<()> {
        let end = position
            .checked_add(length)
            .filter(|&end| end <= i64::MAX as u64)
            .ok_or(Errno::EFBIG)?;
        if (end.div_ceil(PAGE) - position / PAGE).saturating_sub(self.pages.len() as u64)
            > u64::from(self.pool.limit())
        {
            return Err(Errno::ENOSPC);
        }
        for index in position / PAGE..end.div_ceil(PAGE) {
            self.own_page(index)?;
        }
        Ok(())
    }

    /// Where pages from `position` on can be mapped in place.
    pub fn map_source(&mut self, position: u64) -> Result<Option<(MapSource, u64)>> {
        let index = position / PAGE;
        if let Some(&first) = self.pages.get(&index) {
            let mut run = 1;
            let mut expected = first.next();
            while self.pages.get(&(index + run)) == Some(&expected) {
                expected = expected.next();
                run += 1;
            }
            self.mapped = true;
            return Ok(Some((MapSource::Pool(first.offset()), run * PAGE)));
        }
        let Some(lower) = &self.lower else {
            return Ok(None);
        };
        // A page below that the file's end or a shorter limit cuts must not show what follows.
        let whole = lower.inode.metadata()?.size;
        let limit = if lower.limit == whole {
            lower.limit.next_multiple_of(PAGE)
        } else {
            lower.limit & !(PAGE - 1)
        };
        let next = self
            .pages
            .range(index..)
            .next()
            .map_or(u64::MAX, |(&page, _)| page * PAGE);
        let end = limit.min(next);
        if position >= end {
            return Ok(None);
        }
        Ok(lower
            .inode
            .map_source(position)?
            .map(|(source, length)| (source, length.min(end - position))))
    }

    /// Makes pages of a range ones of the pool.
    pub fn prepare_shared(&mut self, position: u64, length: u64) -> Result<()> {
        // Pages beyond the end stay away: a program that touches them gets SIGBUS on Linux.
        let end = position
            .saturating_add(length)
            .min(self.size.next_multiple_of(PAGE));
        if end > position {
            self.reserve(position, end - position)?;
        }
        self.mapped = true;
        Ok(())
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        let pages: Vec<PageNumber> = core::mem::take(&mut self.pages).into_values().collect();
        self.pool.free(pages.into_iter());
    }
}

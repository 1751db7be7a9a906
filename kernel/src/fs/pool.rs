//! Pages of the host's shared pool, in which tmpfs keeps the data of files.
//!
//! A pool page can be mapped into the program and read and written by the kernel at the same time: that is how shared
//! mappings of files work. The kernel sees the pool through one window of its address range, page `n` at
//! `n * PAGE_SIZE` in it, mapped as far as pages have ever been used.
//!
//! What always holds: a page that is free reads as zeros; the number of pages in use never exceeds the limit.

#![allow(unsafe_code)]

use alloc::{boxed::Box, collections::BTreeMap, sync::Arc};

use kiln_abi::host::{PAGE_SIZE, Protection, Source as HostSource};

use crate::{
    Errno, Result,
    file::{Sink, Source},
    host::Host,
    sync::Mutex,
};

/// Start of the window in the kernel's address range.
const WINDOW: usize = 0x6800_0000_0000;
/// Pages that are mapped at once.
const CHUNK: u32 = 256;
/// From this many pages on, freeing gives memory back to the host; fewer are cleared by hand.
const DISCARD: u32 = 8;

/// Number of a page in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageNumber(u32);

impl PageNumber {
    /// Offset of the page in the pool, in bytes.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.0) * PAGE_SIZE as u64
    }

    /// The page after this.
    #[must_use]
    pub fn next(self) -> PageNumber {
        PageNumber(self.0.saturating_add(1))
    }
}

/// Memory in which the pool's pages appear.
trait Memory: Send + Sync {
    /// Address of page 0.
    fn base(&self) -> usize;
    /// Makes pages appear.
    fn extend(&self, first: u32, count: u32) -> Result<()>;
    /// Makes pages zero and gives their memory back.
    fn discard(&self, first: u32, count: u32) -> Result<()>;
    /// Whether so many more pages may be used.
    fn has_room(&self, count: u32) -> bool;
}

/// The window of a real machine.
struct HostWindow {
    host: Host,
    memory_limit: u64,
}

impl Memory for HostWindow {
    fn base(&self) -> usize {
        WINDOW
    }

    fn extend(&self, first: u32, count: u32) -> Result<()> {
        let offset = first as usize * PAGE_SIZE;
        // SAFETY: the window is used by nothing but this pool, and the pages were not mapped before.
        unsafe {
            self.host.map_kernel(
                WINDOW + offset,
                count as usize * PAGE_SIZE,
                Protection::READ | Protection::WRITE,
                HostSource::Pool,
                offset as u64,
            )
        }
    }

    fn discard(&self, first: u32, count: u32) -> Result<()> {
        // SAFETY: the pages are free, so nobody holds a reference to their bytes.
        unsafe {
            self.host.discard_kernel(
                WINDOW + first as usize * PAGE_SIZE,
                count as usize * PAGE_SIZE,
            )
        }
    }

    fn has_room(&self, count: u32) -> bool {
        self.host.memory_used() + u64::from(count) * PAGE_SIZE as u64 <= self.memory_limit
    }
}

struct State {
    /// Pages from here on were never used.
    fresh: u32,
    /// Pages before this are mapped in the window.
    mapped: u32,
    /// Free runs of pages before `fresh`: first page, length.
    free: BTreeMap<u32, u32>,
    used: u32,
    /// How many more pages may be taken before the host is asked whether there is room.
    allowance: u32,
}

/// The pool.
pub struct Pool {
    memory: Box<dyn Memory>,
    limit: u32,
    state: Mutex<State>,
}

impl Pool {
    /// The pool of a machine, of which files may use half the memory (as Linux lets a tmpfs).
    #[must_use]
    pub fn new(host: Host, memory_limit: u64) -> Arc<Pool> {
        let limit = u32::try_from(memory_limit / 2 / PAGE_SIZE as u64).unwrap_or(u32::MAX / 2);
        Pool::with_memory(Box::new(HostWindow { host, memory_limit }), limit)
    }

    fn with_memory(memory: Box<dyn Memory>, limit: u32) -> Arc<Pool> {
        let state = State {
            fresh: 0,
            mapped: 0,
            free: BTreeMap::new(),
            used: 0,
            allowance: 0,
        };
        Arc::new(Pool {
            memory,
            limit,
            state: Mutex::new(state),
        })
    }

    /// Pages in use.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.state.lock().used
    }

    /// Pages that can be in use at once.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Takes a page (of zeros), the `wanted` one if it is free.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn allocate(&self, wanted: Option<PageNumber>) -> Result<PageNumber> {
        let mut state = self.state.lock();
        if state.used >= self.limit {
            return Err(Errno::ENOSPC);
        }
        if state.allowance == 0 {
            if !self.memory.has_room(CHUNK / 4) {
                return Err(Errno::ENOSPC);
            }
            state.allowance = CHUNK / 4;
        }
        let from_run = wanted
            .map(|page| page.0)
            .filter(|page| state.free.contains_key(page))
            .or_else(|| state.free.first_key_value().map(|(&first, _)| first));
        let page = match (from_run, wanted) {
            (Some(first), wanted) if wanted != Some(PageNumber(state.fresh)) => {
                if let Some(length) = state.free.remove(&first)
                    && length > 1
                {
                    state.free.insert(first + 1, length - 1);
                }
                first
            }
            _ => {
                let page = state.fresh;
                if page >= state.mapped {
                    self.memory
                        .extend(state.mapped, CHUNK)
                        .map_err(|_| Errno::ENOSPC)?;
                    state.mapped += CHUNK;
                }
                state.fresh += 1;
                page
            }
        };
        state.used += 1;
        state.allowance -= 1;
        Ok(PageNumber(page))
    }

    /// Gives pages back, in any order.
    pub fn free(&self, pages: impl Iterator<Item = PageNumber>) {
        let mut run: Option<(u32, u32)> = None;
        for PageNumber(page) in pages {
            run = match run {
                Some((first, length)) if first + length == page => Some((first, length + 1)),
                Some((first, length)) => {
                    self.free_run(first, length);
                    Some((page, 1))
                }
                None => Some((page, 1)),
            };
        }
        if let Some((first, length)) = run {
            self.free_run(first, length);
        }
    }

    fn free_run(&self, first: u32, length: u32) {
        if length < DISCARD || self.memory.discard(first, length).is_err() {
            for page in first..first + length {
                self.clear(PageNumber(page), 0, PAGE_SIZE);
            }
        }
        let mut state = self.state.lock();
        state.used -= length;
        let (mut first, mut length) = (first, length);
        if let Some(after) = state.free.remove(&(first + length)) {
            length += after;
        }
        let before = state
            .free
            .range(..first)
            .next_back()
            .map(|(&start, &length)| (start, length));
        if let Some((start, before)) = before
            && start + before == first
        {
            first = start;
            length += before;
        }
        state.free.insert(first, length);
    }

    fn address(&self, page: PageNumber) -> *mut u8 {
        (self.memory.base() + page.0 as usize * PAGE_SIZE) as *mut u8
    }

    /// Bytes of a page, for copying out of it.
    fn bytes(&self, page: PageNumber, offset: usize, length: usize) -> &[u8] {
        let offset = offset.min(PAGE_SIZE);
        let length = length.min(PAGE_SIZE - offset);
        // SAFETY: a page number comes from `allocate` only, so its page is mapped; the range lies within it. The
        // program may have the page mapped too, but it does not run while the kernel does.
        unsafe { core::slice::from_raw_parts(self.address(page).add(offset), length) }
    }

    /// Copies bytes of a page out; returns how many.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn read(
        &self,
        page: PageNumber,
        offset: usize,
        length: usize,
        sink: &mut Sink<'_>,
    ) -> Result<usize> {
        sink.put(self.bytes(page, offset, length))
    }

    /// Copies bytes into a page; returns how many.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn write(
        &self,
        page: PageNumber,
        offset: usize,
        length: usize,
        source: &mut Source<'_>,
    ) -> Result<usize> {
        let offset = offset.min(PAGE_SIZE);
        let length = length.min(PAGE_SIZE - offset);
        // SAFETY: as in `bytes`; the caller (a file) is the page's only owner in the kernel.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(self.address(page).add(offset), length) };
        source.take(bytes)
    }

    /// Makes bytes of a page zero.
    pub fn clear(&self, page: PageNumber, offset: usize, length: usize) {
        let offset = offset.min(PAGE_SIZE);
        let length = length.min(PAGE_SIZE - offset);
        // SAFETY: as in `write`.
        unsafe { self.address(page).add(offset).write_bytes(0, length) };
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Memory of a test.
    struct TestMemory(usize);

    impl Memory for TestMemory {
        fn base(&self) -> usize {
            self.0
        }

        fn extend(&self, _: u32, _: u32) -> Result<()> {
            Ok(())
        }

        fn discard(&self, first: u32, count: u32) -> Result<()> {
            // SAFETY: the pages lie in the memory of this test.
            unsafe {
                ((self.0 + first as usize * PAGE_SIZE) as *mut u8)
                    .write_bytes(0, count as usize * PAGE_SIZE)
            };
            Ok(())
        }

        fn has_room(&self, _: u32) -> bool {
            true
        }
    }

    /// A pool of `limit` pages for tests.
    pub fn pool(limit: u32) -> Arc<Pool> {
        let memory = Box::leak(alloc::vec![0u8; limit as usize * PAGE_SIZE].into_boxed_slice());
        Pool::with_memory(Box::new(TestMemory(memory.as_mut_ptr() as usize)), limit)
    }

    #[test]
    fn pages_come_in_order_and_come_back_zero() {
        let pool = pool(16);
        let first = pool.allocate(None).unwrap();
        let second = pool.allocate(Some(first.next())).unwrap();
        assert_eq!(second, first.next());
        assert_eq!(
            pool.write(first, 10, 100, &mut Source::kernel(b"hello")),
            Ok(5)
        );
        pool.free([first].into_iter());
        let again = pool.allocate(None).unwrap();
        assert_eq!(again, first);
        let mut bytes = [1; 20];
        pool.read(again, 0, 20, &mut Sink::kernel(&mut bytes))
            .unwrap();
        assert_eq!(bytes, [0; 20]);
    }

    #[test]
    fn limit_holds_and_runs_join() {
        let pool = pool(16);
        let pages: alloc::vec::Vec<PageNumber> =
            (0..16).map(|_| pool.allocate(None).unwrap()).collect();
        assert_eq!(pool.allocate(None), Err(Errno::ENOSPC));
        for page in pages
            .iter()
            .step_by(2)
            .chain(pages.iter().skip(1).step_by(2))
        {
            pool.free([*page].into_iter());
        }
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.state.lock().free.len(), 1);
    }
}

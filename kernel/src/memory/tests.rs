//! The address space against a model that keeps every page by itself.

use alloc::{collections::BTreeMap, vec::Vec};
use core::{
    any::Any,
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::{
    file::{File, OpenFlags},
    fs::{FileSystemStatistics, Kind, Metadata},
    host::quiet,
};

const READ: Protection = Protection::READ;

fn read_write() -> Protection {
    Protection::READ | Protection::WRITE
}

/// A generator of test cases: xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

impl AddressSpace {
    /// Whether an address lies in a mapped range.
    fn is_mapped(&self, address: usize) -> bool {
        self.area_at(address).is_some()
    }
}

fn quiet_host() -> Host {
    Host::new(&quiet::TABLE)
}

fn pages(space: &AddressSpace) -> BTreeMap<usize, Protection> {
    let mut pages = BTreeMap::new();
    let mut end = 0;
    for area in space.areas() {
        assert!(area.start >= end, "areas overlap");
        assert!(area.start < area.end);
        end = area.end;
        for page in (area.start..area.end).step_by(PAGE_SIZE) {
            pages.insert(page, area.protection);
        }
    }
    pages
}

#[test]
fn areas_agree_with_single_pages() {
    const BASE: usize = 0x1000_0000;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    let mut model: BTreeMap<usize, Protection> = BTreeMap::new();
    for _ in 0..3000 {
        let start = BASE + random.below(64) as usize * PAGE_SIZE;
        let length = (1 + random.below(12)) as usize * PAGE_SIZE;
        let range: Vec<usize> = (start..start + length).step_by(PAGE_SIZE).collect();
        let protection = if random.below(2) == 0 {
            READ
        } else {
            read_write()
        };
        match random.below(4) {
            0 => {
                space
                    .map_zero(
                        Placement::Fixed(start),
                        length,
                        protection,
                        AreaFlags::empty(),
                    )
                    .unwrap();
                model.extend(range.iter().map(|&page| (page, protection)));
            }
            1 => {
                space.unmap(start, length).unwrap();
                model.retain(|page, _| !range.contains(page));
            }
            2 => {
                let whole = range.iter().all(|page| model.contains_key(page));
                let result = space.protect(start, length, protection);
                assert_eq!(result.is_ok(), whole);
                if whole {
                    model.extend(range.iter().map(|&page| (page, protection)));
                }
            }
            _ => {
                let free = range.iter().all(|page| !model.contains_key(page));
                let placement = Placement::FixedIfFree(start);
                let result = space.map_zero(placement, length, protection, AreaFlags::empty());
                assert_eq!(result, if free { Ok(start) } else { Err(Errno::EEXIST) });
                if free {
                    model.extend(range.iter().map(|&page| (page, protection)));
                }
            }
        }
        assert_eq!(pages(&space), model);
        assert_eq!(space.mapped(), model.len() * PAGE_SIZE);
    }
}

#[test]
fn neighbours_of_a_kind_become_one_area() {
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    for page in [0, 2, 1] {
        let placement = Placement::Fixed(0x1000_0000 + page * PAGE_SIZE);
        space
            .map_zero(placement, PAGE_SIZE, READ, AreaFlags::empty())
            .unwrap();
    }
    assert_eq!(space.areas().count(), 1);
    space
        .protect(0x1000_0000 + PAGE_SIZE, PAGE_SIZE, read_write())
        .unwrap();
    assert_eq!(space.areas().count(), 3);
}

#[test]
fn what_is_anywhere_overlaps_nothing_and_stays_below_the_top() {
    let top = 0x4000_0000_0000;
    let mut space = AddressSpace::new(quiet_host(), top);
    let mut random = Random(42);
    let mut taken: Vec<(usize, usize)> = Vec::new();
    for _ in 0..200 {
        let length = (1 + random.below(9)) as usize * PAGE_SIZE;
        let start = space
            .map_zero(Placement::Anywhere(0), length, READ, AreaFlags::empty())
            .unwrap();
        // Alternating properties keep neighbours from joining; here only addresses matter.
        assert!(start + length <= top);
        assert!(
            taken
                .iter()
                .all(|&(low, high)| start + length <= low || start >= high)
        );
        taken.push((start, start + length));
        if random.below(3) == 0 {
            let (low, high) = taken.swap_remove(random.below(taken.len() as u64) as usize);
            space.unmap(low, high - low).unwrap();
        }
    }
}

#[test]
fn page_zero_and_writable_text_are_refused() {
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    let zero = space.map_zero(Placement::Fixed(0), PAGE_SIZE, READ, AreaFlags::empty());
    assert_eq!(zero, Err(Errno::EPERM));
    let both = Protection::WRITE | Protection::EXECUTE | READ;
    let text = space.map_zero(Placement::Anywhere(0), PAGE_SIZE, both, AreaFlags::empty());
    assert_eq!(text, Err(Errno::EACCES));
    let start = space
        .map_zero(Placement::Anywhere(0), PAGE_SIZE, READ, AreaFlags::empty())
        .unwrap();
    assert_eq!(space.protect(start, PAGE_SIZE, both), Err(Errno::EACCES));
}

#[test]
fn the_heap_moves_up_and_down_and_stops_at_neighbours() {
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    let start = 0x2000_0000;
    space.set_heap(start);
    assert_eq!(space.move_heap(0), start);
    assert_eq!(space.move_heap(start + 5000), start + 5000);
    assert!(space.is_range_mapped(start, start + 2 * PAGE_SIZE));
    assert_eq!(space.move_heap(start + 100), start + 100);
    assert!(!space.is_mapped(start + PAGE_SIZE));
    space
        .map_zero(
            Placement::Fixed(start + 8 * PAGE_SIZE),
            PAGE_SIZE,
            READ,
            AreaFlags::empty(),
        )
        .unwrap();
    assert_eq!(
        space.move_heap(start + 9 * PAGE_SIZE),
        start + 100,
        "the end stays where it was"
    );
}

#[test]
fn mappings_grow_in_place_or_shrink() {
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    let start = 0x3000_0000;
    space
        .map_zero(
            Placement::Fixed(start),
            4 * PAGE_SIZE,
            read_write(),
            AreaFlags::empty(),
        )
        .unwrap();
    assert_eq!(
        space.remap(start, 4 * PAGE_SIZE, 2 * PAGE_SIZE, false, None),
        Ok(start)
    );
    assert!(!space.is_mapped(start + 2 * PAGE_SIZE));
    assert_eq!(
        space.remap(start, 2 * PAGE_SIZE, 6 * PAGE_SIZE, false, None),
        Ok(start)
    );
    assert!(space.is_range_mapped(start, start + 6 * PAGE_SIZE));
    space
        .map_zero(
            Placement::Fixed(start + 6 * PAGE_SIZE),
            PAGE_SIZE,
            READ,
            AreaFlags::empty(),
        )
        .unwrap();
    let blocked = space.remap(start, 6 * PAGE_SIZE, 7 * PAGE_SIZE, false, None);
    assert_eq!(blocked, Err(Errno::ENOMEM));
    assert_eq!(
        space.remap(start, 7 * PAGE_SIZE + 1, PAGE_SIZE, false, None),
        Err(Errno::EFAULT)
    );
}

/// A file of the pool, of a size that changes.
struct Growing(AtomicU64);

impl Inode for Growing {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(Metadata {
            device: 0,
            inode: 1,
            kind: Kind::Regular,
            permissions: 0o600,
            links: 1,
            uid: 0,
            gid: 0,
            special_device: 0,
            size: self.0.load(Ordering::Relaxed),
            block_size: 4096,
            blocks: 0,
            accessed: 0,
            modified: 0,
            changed: 0,
        })
    }

    fn open(self: Arc<Self>, _flags: OpenFlags) -> Result<Arc<dyn File>> {
        Err(Errno::ENODEV)
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(FileSystemStatistics::default())
    }

    fn map_source(&self, position: u64) -> Result<Option<(MapSource, u64)>> {
        let rest = self.0.load(Ordering::Relaxed) - position;
        Ok(Some((MapSource::Pool(position), rest)))
    }

    fn prepare_shared(&self, _position: u64, _length: u64) -> Result<()> {
        Ok(())
    }
}

#[test]
fn pages_beyond_the_end_of_a_file_come_when_it_has_grown() {
    let mut space = AddressSpace::new(quiet_host(), 0x4000_0000_0000);
    let inode = Arc::new(Growing(AtomicU64::new(1)));
    let file = AreaFile {
        inode: Arc::clone(&inode) as Arc<dyn Inode>,
        path: Arc::from("/file"),
        offset: 0,
    };
    let (length, shared) = (4 * PAGE_SIZE, AreaFlags::SHARED);
    let start = space
        .map_file(Placement::Anywhere(0), length, read_write(), shared, file)
        .expect("mapped");
    let page = |index: usize| start + index * PAGE_SIZE;
    assert_eq!(space.fault(start - 1), Ok(Fault::Missing));
    assert_eq!(space.fault(page(0)), Ok(Fault::Denied));
    assert_eq!(space.fault(page(1)), Ok(Fault::BeyondFile));
    assert_eq!(space.fault(page(3)), Ok(Fault::BeyondFile));

    inode.0.store(2 * PAGE_SIZE as u64 + 1, Ordering::Relaxed);
    assert_eq!(space.fault(page(3)), Ok(Fault::BeyondFile));
    assert_eq!(space.fault(page(1)), Ok(Fault::Mended));
    assert_eq!(space.fault(page(2)), Ok(Fault::Denied));
    assert_eq!(space.fault(page(3)), Ok(Fault::BeyondFile));
    assert_eq!(space.areas().count(), 1);

    // Cut in two, the second part knows where its pages end.
    space
        .protect(page(1), 2 * PAGE_SIZE, READ)
        .expect("protected");
    assert_eq!(space.fault(page(3)), Ok(Fault::BeyondFile));
    space.protect(page(0), length, read_write()).expect("again");
    assert_eq!(space.areas().count(), 1);
    assert_eq!(space.fault(page(2)), Ok(Fault::Denied));
    assert_eq!(space.fault(page(3)), Ok(Fault::BeyondFile));
}

//! `epoll(7)`.
//!
//! An instance keeps an [`Item`] for each file it watches, and a list of those that may be ready. A file that becomes
//! ready puts its items on that list and wakes who waits; collecting events looks at the list alone. So the cost of a
//! wait grows with what is ready, never with what is watched.
//!
//! What always holds: no lock of an instance is held while a file is asked for its readiness, because that may make the
//! file notify its watchers.

use alloc::{
    collections::VecDeque,
    string::String,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::{
    any::Any,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use bitflags::bitflags;
use linux_raw_sys::general as linux;

use super::{File, OpenFile, Readiness, WatchList, Watcher, anonymous_metadata, watch::WatchKey};
use crate::{
    Errno, Result,
    fs::{Kind, Metadata},
    sync::Mutex,
};

/// Deepest chain of epoll instances that watch each other.
const NESTING_LIMIT: u32 = 5;

bitflags! {
    /// How an item reports, beside the readiness it is for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Mode: u32 {
        const EDGE = linux::EPOLLET;
        const ONCE = linux::EPOLLONESHOT;
        /// Wakes at least one of several instances; here all of them are woken, which the man page allows.
        const EXCLUSIVE = linux::EPOLLEXCLUSIVE;
        /// About system suspend, which there is none of.
        const WAKE_UP = linux::EPOLLWAKEUP;
    }
}

/// What `EPOLLEXCLUSIVE` can be combined with.
const EXCLUSIVE_OK: u32 = linux::EPOLLIN
    | linux::EPOLLOUT
    | linux::EPOLLERR
    | linux::EPOLLHUP
    | linux::EPOLLWAKEUP
    | linux::EPOLLET
    | linux::EPOLLEXCLUSIVE;

/// A file being watched.
struct Item {
    instance: Weak<Shared>,
    file: Weak<OpenFile>,
    /// What the program wants back with an event.
    data: u64,
    /// `EPOLL*` as the program gave them.
    events: AtomicU32,
    /// A one-shot item that has reported.
    spent: AtomicBool,
    exclusive: bool,
    /// On the ready list.
    queued: AtomicBool,
    key: Mutex<Option<WatchKey>>,
}

impl Item {
    fn interest(&self) -> Readiness {
        Readiness::from_bits_truncate(self.events.load(Ordering::Relaxed)) | Readiness::ALWAYS
    }

    fn mode(&self) -> Mode {
        Mode::from_bits_truncate(self.events.load(Ordering::Relaxed))
    }

    /// One-shot, and has reported.
    fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }

    fn unwatch(&self) {
        let key = self.key.lock().take();
        if let (Some(key), Some(file)) = (key, self.file.upgrade())
            && let Some(list) = file.file.watch_list()
        {
            list.remove(key);
        }
    }
}

impl Watcher for ItemWatcher {
    fn notify(&self, readiness: Readiness) {
        let Some(item) = self.0.upgrade() else { return };
        if item.is_spent() || !item.interest().intersects(readiness) {
            return;
        }
        let Some(instance) = item.instance.upgrade() else {
            return;
        };
        if !item.queued.swap(true, Ordering::Relaxed) {
            instance.ready.lock().push_back(item);
        }
        instance.watchers.notify(Readiness::READABLE);
    }
}

/// What lies on a file's list: the item may be gone before its file is.
struct ItemWatcher(Weak<Item>);

/// Items of one descriptor number: nearly always one.
type Slot = Vec<Arc<Item>>;

struct Shared {
    /// By descriptor number, which is small as in the table of descriptors.
    items: Mutex<Vec<Slot>>,
    ready: Mutex<VecDeque<Arc<Item>>>,
    watchers: WatchList,
}

impl Shared {
    fn put(&self, descriptor: i32, item: Arc<Item>) {
        let index = descriptor as usize;
        let mut items = self.items.lock();
        if index >= items.len() {
            items.resize_with(index + 1, Slot::new);
        }
        if let Some(slot) = items.get_mut(index) {
            slot.push(item);
        }
    }
}

/// An epoll instance.
pub struct Epoll {
    shared: Arc<Shared>,
}

/// An event, as the program gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollEvent {
    /// `EPOLL*`.
    pub events: u32,
    /// As given to `epoll_ctl`.
    pub data: u64,
}

impl Epoll {
    /// An instance that watches nothing.
    #[must_use]
    pub fn new() -> Arc<Epoll> {
        Arc::new(Epoll {
            shared: Arc::new(Shared {
                items: Mutex::new(Vec::new()),
                ready: Mutex::new(VecDeque::new()),
                watchers: WatchList::new(),
            }),
        })
    }

    fn find(&self, descriptor: i32, file: &Arc<OpenFile>) -> Option<Arc<Item>> {
        let mut items = self.shared.items.lock();
        let slot = items.get_mut(descriptor as usize)?;
        // Items of files that are closed are only cleared away here.
        slot.retain(|item| item.file.strong_count() > 0);
        slot.iter()
            .find(|item| core::ptr::eq(item.file.as_ptr(), Arc::as_ptr(file)))
            .cloned()
    }

    /// Starts watching a file (`EPOLL_CTL_ADD`).
    ///
    /// # Errors
    /// `EEXIST` when it is watched under this descriptor already, `EPERM` when it is always ready, `EINVAL` for this
    /// very instance or bad flags, `ELOOP` for instances that watch each other.
    pub fn add(&self, descriptor: i32, file: &Arc<OpenFile>, event: EpollEvent) -> Result<()> {
        let exclusive = event.events & linux::EPOLLEXCLUSIVE != 0;
        if exclusive && event.events & !EXCLUSIVE_OK != 0 {
            return Err(Errno::EINVAL);
        }
        let list = file.file.watch_list().ok_or(Errno::EPERM)?;
        if let Some(other) = file.file.as_any().downcast_ref::<Epoll>() {
            if Arc::ptr_eq(&other.shared, &self.shared) || exclusive {
                return Err(Errno::EINVAL);
            }
            if other.depth_or_loop(&self.shared, 1)? > NESTING_LIMIT {
                return Err(Errno::ELOOP);
            }
        }
        if self.find(descriptor, file).is_some() {
            return Err(Errno::EEXIST);
        }
        let item = Arc::new(Item {
            instance: Arc::downgrade(&self.shared),
            file: Arc::downgrade(file),
            data: event.data,
            events: AtomicU32::new(event.events),
            spent: AtomicBool::new(false),
            exclusive,
            queued: AtomicBool::new(false),
            key: Mutex::new(None),
        });
        self.shared.put(descriptor, Arc::clone(&item));
        // The list hears of everything: what the item is for may change.
        let key = list.add(
            Readiness::all(),
            Arc::new(ItemWatcher(Arc::downgrade(&item))),
        );
        *item.key.lock() = Some(key);
        self.queue_if_ready(&item, file);
        Ok(())
    }

    /// Changes what is watched for (`EPOLL_CTL_MOD`).
    ///
    /// # Errors
    /// `ENOENT` when the file is not watched, `EINVAL` with `EPOLLEXCLUSIVE`.
    pub fn modify(&self, descriptor: i32, file: &Arc<OpenFile>, event: EpollEvent) -> Result<()> {
        if event.events & linux::EPOLLEXCLUSIVE != 0 {
            return Err(Errno::EINVAL);
        }
        let item = self.find(descriptor, file).ok_or(Errno::ENOENT)?;
        if item.exclusive {
            return Err(Errno::EINVAL);
        }
        if item.data == event.data {
            item.events.store(event.events, Ordering::Relaxed);
            item.spent.store(false, Ordering::Relaxed);
            self.queue_if_ready(&item, file);
            return Ok(());
        }
        // Data is fixed in an item, so that reporting needs no lock: a new item takes its place.
        self.remove(descriptor, file)?;
        self.add(descriptor, file, event)
    }

    /// Stops watching (`EPOLL_CTL_DEL`).
    ///
    /// # Errors
    /// `ENOENT` when the file is not watched.
    pub fn remove(&self, descriptor: i32, file: &Arc<OpenFile>) -> Result<()> {
        let item = self.find(descriptor, file).ok_or(Errno::ENOENT)?;
        {
            let mut items = self.shared.items.lock();
            if let Some(slot) = items.get_mut(descriptor as usize) {
                slot.retain(|other| !Arc::ptr_eq(other, &item));
            }
        }
        item.unwatch();
        // It may lie on the ready list; without interest it is dropped there.
        if item.queued.load(Ordering::Relaxed) {
            self.shared
                .ready
                .lock()
                .retain(|other| !Arc::ptr_eq(other, &item));
        }
        Ok(())
    }

    fn queue_if_ready(&self, item: &Arc<Item>, file: &Arc<OpenFile>) {
        if item.is_spent() || !file.file.readiness().intersects(item.interest()) {
            return;
        }
        if !item.queued.swap(true, Ordering::Relaxed) {
            self.shared.ready.lock().push_back(Arc::clone(item));
        }
        self.shared.watchers.notify(Readiness::READABLE);
    }

    /// How deep the instances watched by this one reach; `ELOOP` when `target` is among them.
    fn depth_or_loop(&self, target: &Arc<Shared>, depth: u32) -> Result<u32> {
        if Arc::ptr_eq(&self.shared, target) || depth > NESTING_LIMIT {
            return Err(Errno::ELOOP);
        }
        let files: Vec<Arc<OpenFile>> = {
            let items = self.shared.items.lock();
            items
                .iter()
                .flatten()
                .filter_map(|item| item.file.upgrade())
                .collect()
        };
        let mut deepest = depth;
        for file in files {
            if let Some(epoll) = file.file.as_any().downcast_ref::<Epoll>() {
                deepest = deepest.max(epoll.depth_or_loop(target, depth + 1)?);
            }
        }
        Ok(deepest)
    }

    /// Collects up to `limit` events into `events`.
    pub fn collect(&self, events: &mut Vec<linux::epoll_event>, limit: usize) {
        let mut turn = self.shared.ready.lock().len();
        while events.len() < limit && turn > 0 {
            turn -= 1;
            let Some(item) = self.shared.ready.lock().pop_front() else {
                break;
            };
            // From here on a notification puts it on the list again.
            item.queued.store(false, Ordering::Relaxed);
            let Some(file) = item.file.upgrade() else {
                continue;
            };
            if item.is_spent() {
                continue;
            }
            let readiness = file.file.readiness() & item.interest();
            if readiness.is_empty() {
                continue;
            }
            events.push(linux::epoll_event {
                events: readiness.bits(),
                data: item.data,
            });
            let mode = item.mode();
            if mode.contains(Mode::ONCE) {
                item.spent.store(true, Ordering::Relaxed);
            } else if !mode.contains(Mode::EDGE) && !item.queued.swap(true, Ordering::Relaxed) {
                // Level-triggered: looked at again next time.
                self.shared.ready.lock().push_back(item);
            }
        }
    }
}

impl File for Epoll {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn readiness(&self) -> Readiness {
        let items: Vec<Arc<Item>> = self.shared.ready.lock().iter().cloned().collect();
        for item in items {
            if let Some(file) = item.file.upgrade()
                && !item.is_spent()
                && file.file.readiness().intersects(item.interest())
            {
                return Readiness::READABLE;
            }
        }
        Readiness::empty()
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.shared.watchers)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::Regular, 0o600, 2))
    }

    fn describe(&self) -> String {
        String::from("anon_inode:[eventpoll]")
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        let items = core::mem::take(&mut *self.shared.items.lock());
        for item in items.into_iter().flatten() {
            item.unwatch();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{OpenFlags, Sink, Source, eventfd::EventCounter, pipe};

    fn open(file: Arc<dyn File>) -> Arc<OpenFile> {
        OpenFile::new(file, OpenFlags::READ_WRITE)
    }

    fn event(events: u32, data: u64) -> EpollEvent {
        EpollEvent { events, data }
    }

    fn collect(epoll: &Epoll) -> Vec<(u32, u64)> {
        let mut events = Vec::new();
        epoll.collect(&mut events, 100);
        events
            .iter()
            .map(|event| (event.events, event.data))
            .collect()
    }

    fn write(file: &OpenFile, value: u64) {
        file.write(&mut Source::kernel(&value.to_ne_bytes()))
            .unwrap();
    }

    fn read(file: &OpenFile) {
        file.read(&mut Sink::kernel(&mut [0; 8])).unwrap();
    }

    #[test]
    fn level_triggered_reports_as_long_as_ready() {
        let epoll = Epoll::new();
        let file = open(EventCounter::new(0, false));
        epoll.add(3, &file, event(linux::EPOLLIN, 7)).unwrap();
        assert_eq!(collect(&epoll), []);
        write(&file, 1);
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 7)]);
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 7)]);
        read(&file);
        assert_eq!(collect(&epoll), []);
        assert!(epoll.shared.ready.lock().is_empty());
    }

    #[test]
    fn edge_triggered_reports_each_change_once() {
        let epoll = Epoll::new();
        let file = open(EventCounter::new(1, false));
        epoll
            .add(3, &file, event(linux::EPOLLIN | linux::EPOLLET, 7))
            .unwrap();
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 7)]);
        assert_eq!(collect(&epoll), []);
        write(&file, 1);
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 7)]);
        assert_eq!(collect(&epoll), []);
    }

    #[test]
    fn one_shot_waits_for_modify() {
        let epoll = Epoll::new();
        let file = open(EventCounter::new(1, false));
        epoll
            .add(3, &file, event(linux::EPOLLIN | linux::EPOLLONESHOT, 7))
            .unwrap();
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 7)]);
        write(&file, 1);
        assert_eq!(collect(&epoll), []);
        epoll
            .modify(3, &file, event(linux::EPOLLIN | linux::EPOLLONESHOT, 8))
            .unwrap();
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 8)]);
    }

    #[test]
    fn control_errors_are_linux_ones() {
        let epoll = Epoll::new();
        let file = open(EventCounter::new(1, false));
        assert_eq!(epoll.modify(3, &file, event(1, 0)), Err(Errno::ENOENT));
        assert_eq!(epoll.remove(3, &file), Err(Errno::ENOENT));
        epoll.add(3, &file, event(1, 0)).unwrap();
        assert_eq!(epoll.add(3, &file, event(1, 0)), Err(Errno::EEXIST));
        // The same file under another number is another item.
        epoll.add(4, &file, event(1, 1)).unwrap();
        assert_eq!(collect(&epoll).len(), 2);
        epoll.remove(3, &file).unwrap();
        assert_eq!(collect(&epoll), [(1, 1)]);
    }

    #[test]
    fn instances_nest_but_not_in_circles() {
        let inner = Epoll::new();
        let outer = Epoll::new();
        let inner_file = open(inner.clone());
        let outer_file = open(outer.clone());
        let file = open(EventCounter::new(0, false));
        inner.add(3, &file, event(linux::EPOLLIN, 1)).unwrap();
        outer.add(4, &inner_file, event(linux::EPOLLIN, 2)).unwrap();
        assert_eq!(
            inner.add(5, &outer_file, event(linux::EPOLLIN, 3)),
            Err(Errno::ELOOP)
        );
        assert_eq!(
            inner.add(6, &inner_file, event(linux::EPOLLIN, 3)),
            Err(Errno::EINVAL)
        );
        assert_eq!(collect(&outer), []);
        write(&file, 1);
        assert_eq!(collect(&outer), [(linux::EPOLLIN, 2)]);
        read(&file);
        assert_eq!(collect(&outer), []);
    }

    #[test]
    fn closed_files_are_forgotten() {
        let epoll = Epoll::new();
        let file = open(EventCounter::new(1, false));
        epoll.add(3, &file, event(linux::EPOLLIN, 1)).unwrap();
        drop(file);
        assert_eq!(collect(&epoll), []);
        let file = open(EventCounter::new(1, false));
        epoll.add(3, &file, event(linux::EPOLLIN, 2)).unwrap();
        assert_eq!(collect(&epoll), [(linux::EPOLLIN, 2)]);
        assert_eq!(epoll.shared.items.lock()[3].len(), 1);
    }

    #[test]
    fn hangup_comes_unasked() {
        let epoll = Epoll::new();
        let (reader, writer) = pipe::pipe();
        let reader = open(reader);
        let writer = open(writer);
        epoll.add(3, &reader, event(0, 1)).unwrap();
        drop(writer);
        assert_eq!(collect(&epoll), [(linux::EPOLLHUP, 1)]);
    }

    #[test]
    fn many_ready_files_take_turns() {
        let epoll = Epoll::new();
        let files: Vec<_> = (0..10).map(|_| open(EventCounter::new(1, false))).collect();
        for (index, file) in files.iter().enumerate() {
            epoll
                .add(index as i32, file, event(linux::EPOLLIN, index as u64))
                .unwrap();
        }
        let mut seen = Vec::new();
        for _ in 0..5 {
            let mut events = Vec::new();
            epoll.collect(&mut events, 2);
            seen.extend(events.iter().map(|event| event.data));
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}

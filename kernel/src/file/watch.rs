//! Waiting for files.
//!
//! A file that can become ready has a [`WatchList`]. Whoever wants to hear of it adds a [`Watcher`]: an epoll item, or
//! the waker of a thread that blocks. [`retry`] is the one way in which system calls block on files.

use alloc::{sync::Arc, vec::Vec};
use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bitflags::bitflags;
use linux_raw_sys::general as linux;

use super::File;
use crate::{Errno, Result, sync::Mutex};

bitflags! {
    /// What can be done with a file now; values as of `EPOLL*` and `POLL*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Readiness: u32 {
        /// There is something to read, or a connection to accept, or the end.
        const READABLE = linux::EPOLLIN;
        /// There is urgent data.
        const PRIORITY = linux::EPOLLPRI;
        /// There is room to write.
        const WRITABLE = linux::EPOLLOUT;
        /// There is an error. Always reported.
        const ERROR = linux::EPOLLERR;
        /// Both directions are closed. Always reported.
        const HANGUP = linux::EPOLLHUP;
        /// The peer has closed its sending direction.
        const READ_HANGUP = linux::EPOLLRDHUP;
    }
}

impl Readiness {
    /// What is reported whether asked for or not.
    pub const ALWAYS: Readiness = Readiness::ERROR.union(Readiness::HANGUP);
}

/// Somebody who wants to hear of readiness.
pub trait Watcher: Send + Sync {
    /// Some of the readiness that was asked for may have come. Must not call back into the list that it is on.
    fn notify(&self, readiness: Readiness);
}

/// Names an entry of a [`WatchList`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchKey(u64);

#[derive(Default)]
struct Entries {
    next_key: u64,
    entries: Vec<(WatchKey, Readiness, Arc<dyn Watcher>)>,
}

/// Who wants to hear of a file's readiness.
#[derive(Default)]
pub struct WatchList(Mutex<Entries>);

impl WatchList {
    /// An empty list.
    #[must_use]
    pub fn new() -> WatchList {
        WatchList::default()
    }

    /// Adds a watcher for `interest` (and [`Readiness::ALWAYS`]).
    pub fn add(&self, interest: Readiness, watcher: Arc<dyn Watcher>) -> WatchKey {
        let mut entries = self.0.lock();
        let key = WatchKey(entries.next_key);
        entries.next_key += 1;
        entries
            .entries
            .push((key, interest | Readiness::ALWAYS, watcher));
        key
    }

    /// Removes a watcher; unknown keys are passed over.
    pub fn remove(&self, key: WatchKey) {
        let mut entries = self.0.lock();
        if let Some(index) = entries.entries.iter().position(|entry| entry.0 == key) {
            let removed = entries.entries.swap_remove(index);
            drop(entries);
            drop(removed);
        }
    }

    /// Tells the watchers that wait for any of `readiness`.
    pub fn notify(&self, readiness: Readiness) {
        let entries = self.0.lock();
        for (_, interest, watcher) in &entries.entries {
            if interest.intersects(readiness) {
                watcher.notify(readiness);
            }
        }
    }

    /// Whether nobody watches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().entries.is_empty()
    }
}

/// A watcher that wakes a task.
#[derive(Default)]
pub struct WakeWatcher(Mutex<Option<Waker>>);

impl WakeWatcher {
    /// Remembers whom to wake.
    pub fn set(&self, waker: &Waker) {
        let mut slot = self.0.lock();
        match &mut *slot {
            Some(current) => current.clone_from(waker),
            empty => *empty = Some(waker.clone()),
        }
    }
}

impl Watcher for WakeWatcher {
    fn notify(&self, _: Readiness) {
        let waker = self.0.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A registration on one file's list, removed when dropped.
pub struct Watch {
    file: Arc<dyn File>,
    key: WatchKey,
}

impl Watch {
    /// Puts `watcher` on the list of `file`; `None` if the file has no list (it is always ready).
    pub fn new(
        file: &Arc<dyn File>,
        interest: Readiness,
        watcher: Arc<dyn Watcher>,
    ) -> Option<Watch> {
        let key = file.watch_list()?.add(interest, watcher);
        Some(Watch {
            file: Arc::clone(file),
            key,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(list) = self.file.watch_list() {
            list.remove(self.key);
        }
    }
}

/// Tries something on a file again and again, each time that the file may have become ready for `interest`, until it
/// gives something other than `EAGAIN`. A file without a list is tried once.
pub fn retry<T, A>(file: Arc<dyn File>, interest: Readiness, attempt: A) -> Retry<A>
where
    A: FnMut() -> Result<T> + Unpin,
{
    let watcher = Arc::new(WakeWatcher::default());
    let watch = Watch::new(&file, interest, Arc::clone(&watcher) as Arc<dyn Watcher>);
    Retry {
        watcher,
        watch,
        attempt,
    }
}

/// Future of [`retry`].
pub struct Retry<A> {
    watcher: Arc<WakeWatcher>,
    watch: Option<Watch>,
    attempt: A,
}

impl<T, A> Future for Retry<A>
where
    A: FnMut() -> Result<T> + Unpin,
{
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        self.watcher.set(context.waker());
        match (self.attempt)() {
            Err(Errno::EAGAIN) if self.watch.is_some() => Poll::Pending,
            result => Poll::Ready(result),
        }
    }
}

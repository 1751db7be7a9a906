//! Signals as a file: `signalfd(2)`.

use alloc::{string::String, sync::Arc, sync::Weak};
use core::any::Any;

use super::{File, OpenFlags, Readiness, Sink, WatchList, anonymous_metadata};
use crate::{
    Errno, Result,
    fs::{Kind, Metadata},
    sync::Mutex,
    task::{
        SignalInfo, SignalSet, Thread,
        signal::{pending, take_from, watchers},
    },
};

/// Size of `struct signalfd_siginfo`.
const INFO: usize = 128;

/// Gives the signals of a set as records.
///
/// Signals sent to one thread are seen by the files that this thread made; signals sent to the process by all.
pub struct SignalFile {
    set: Mutex<SignalSet>,
    thread: Weak<Thread>,
    watchers: Arc<WatchList>,
}

impl SignalFile {
    /// A file for the signals of a set.
    #[must_use]
    pub fn new(thread: &Arc<Thread>, set: SignalSet) -> Arc<SignalFile> {
        Arc::new(SignalFile {
            set: Mutex::new(set),
            thread: Arc::downgrade(thread),
            watchers: watchers(&thread.process),
        })
    }

    /// Replaces the set.
    pub fn set(&self, set: SignalSet) {
        *self.set.lock() = set;
        self.watchers.notify(Readiness::READABLE);
    }

    fn record(info: &SignalInfo) -> [u8; INFO] {
        let mut record = [0; INFO];
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &u32::from(info.signal.number()).to_ne_bytes());
        put(4, &info.errno.to_ne_bytes());
        put(8, &info.code.to_ne_bytes());
        let [first, second] = info.fields;
        // Sender's process and user; then the value that came along.
        put(12, &(first as u32).to_ne_bytes());
        put(16, &((first >> 32) as u32).to_ne_bytes());
        put(44, &(second as u32).to_ne_bytes());
        put(48, &second.to_ne_bytes());
        record
    }
}

impl File for SignalFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        if sink.remaining() < INFO {
            return Err(Errno::EINVAL);
        }
        let thread = self.thread.upgrade().ok_or(Errno::EAGAIN)?;
        let set = *self.set.lock();
        let mut done = 0;
        while sink.remaining() >= INFO {
            let Some(info) = take_from(&thread, set) else {
                break;
            };
            sink.put(&SignalFile::record(&info))?;
            done += INFO;
        }
        if done == 0 {
            Err(Errno::EAGAIN)
        } else {
            Ok(done)
        }
    }

    fn readiness(&self) -> Readiness {
        let set = self.set.lock().0;
        match self.thread.upgrade() {
            Some(thread) if pending(&thread).0 & set != 0 => Readiness::READABLE,
            _ => Readiness::empty(),
        }
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.watchers)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::Regular, 0o600, 7))
    }

    fn describe(&self) -> String {
        String::from("anon_inode:[signalfd]")
    }
}

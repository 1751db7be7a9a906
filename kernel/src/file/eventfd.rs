//! Event counters: `eventfd(2)`.

use alloc::{string::String, sync::Arc};
use core::any::Any;

use super::{File, OpenFlags, Readiness, Sink, Source, WatchList, anonymous_metadata};
use crate::{
    Errno, Result,
    fs::{Kind, Metadata},
    sync::Mutex,
};

/// Largest value of a counter.
const MAX: u64 = u64::MAX - 1;

/// A counter that is readable when it is not zero.
pub struct EventCounter {
    value: Mutex<u64>,
    /// Reading takes one off instead of all (`EFD_SEMAPHORE`).
    semaphore: bool,
    watchers: WatchList,
}

impl EventCounter {
    /// A counter with a first value.
    #[must_use]
    pub fn new(value: u64, semaphore: bool) -> Arc<EventCounter> {
        Arc::new(EventCounter {
            value: Mutex::new(value),
            semaphore,
            watchers: WatchList::new(),
        })
    }
}

impl File for EventCounter {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        if sink.remaining() < 8 {
            return Err(Errno::EINVAL);
        }
        let mut value = self.value.lock();
        if *value == 0 {
            return Err(Errno::EAGAIN);
        }
        let taken = if self.semaphore { 1 } else { *value };
        sink.put(&taken.to_ne_bytes())?;
        *value -= taken;
        drop(value);
        self.watchers.notify(Readiness::WRITABLE);
        Ok(8)
    }

    fn write(&self, source: &mut Source<'_>, _: OpenFlags) -> Result<usize> {
        if source.remaining() < 8 {
            return Err(Errno::EINVAL);
        }
        let mut value = self.value.lock();
        // Looked at before anything is taken, so that a call that must wait can be made again.
        if *value == MAX {
            return Err(Errno::EAGAIN);
        }
        let mut bytes = [0; 8];
        source.take(&mut bytes)?;
        let added = u64::from_ne_bytes(bytes);
        if added == u64::MAX {
            return Err(Errno::EINVAL);
        }
        let sum = value.checked_add(added).filter(|&sum| sum <= MAX);
        let Some(sum) = sum else {
            return Err(Errno::EAGAIN);
        };
        *value = sum;
        drop(value);
        self.watchers.notify(Readiness::READABLE);
        Ok(8)
    }

    fn readiness(&self) -> Readiness {
        let value = *self.value.lock();
        let mut readiness = Readiness::empty();
        if value > 0 {
            readiness |= Readiness::READABLE;
        }
        if value < MAX {
            readiness |= Readiness::WRITABLE;
        }
        readiness
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.watchers)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::Regular, 0o600, 1))
    }

    fn describe(&self) -> String {
        String::from("anon_inode:[eventfd]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(counter: &EventCounter) -> Result<u64> {
        let mut bytes = [0; 8];
        counter.read(&mut Sink::kernel(&mut bytes), OpenFlags::empty())?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn write(counter: &EventCounter, value: u64) -> Result<usize> {
        counter.write(
            &mut Source::kernel(&value.to_ne_bytes()),
            OpenFlags::empty(),
        )
    }

    #[test]
    fn counts() {
        let counter = EventCounter::new(0, false);
        assert_eq!(read(&counter), Err(Errno::EAGAIN));
        assert_eq!(write(&counter, 3), Ok(8));
        assert_eq!(write(&counter, 4), Ok(8));
        assert_eq!(read(&counter), Ok(7));
        assert_eq!(write(&counter, u64::MAX), Err(Errno::EINVAL));
        assert_eq!(write(&counter, MAX), Ok(8));
        assert_eq!(counter.readiness(), Readiness::READABLE);
        assert_eq!(write(&counter, 1), Err(Errno::EAGAIN));
    }

    #[test]
    fn semaphore_gives_ones() {
        let counter = EventCounter::new(2, true);
        assert_eq!(read(&counter), Ok(1));
        assert_eq!(read(&counter), Ok(1));
        assert_eq!(read(&counter), Err(Errno::EAGAIN));
    }
}

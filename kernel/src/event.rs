//! Who hears of which event of the host.
//!
//! The kernel's main loop waits in [`Events::wait`]; each event goes to the one [`EventHandler`] that is registered for
//! its source: a descriptor number on engine `process`, an interrupt line on a virtual machine. Finding it costs the
//! same with one source as with ten thousand.
//!
//! Not for program-visible waiting: that is [`crate::file::watch`].
//!
//! What always holds: a handler runs with no lock of this module held, so it may register and unregister sources. Events
//! that are collected in the middle of a synchronous operation (a request to the monitor) are kept with
//! [`Events::defer`] and are delivered by the main loop, never from inside that operation.

use alloc::{sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU32, Ordering};

use kiln_abi::host::Event;

use spin::Once;

use crate::{host::Host, sync::Mutex};

/// Something that wants to hear of events.
pub trait EventHandler: Send + Sync {
    /// An event came from the source that this handler is registered for.
    fn handle(&self, event: Event);
}

/// Highest source number that can be registered; far above any limit on descriptors or interrupt lines.
const MAX_SOURCE: usize = 1 << 20;

/// Events that one call of the host collects.
const BATCH: usize = 128;

/// Handlers by source.
#[derive(Default)]
pub struct Events {
    handlers: Mutex<Vec<Option<Arc<dyn EventHandler>>>>,
    deferred: Mutex<Vec<Event>>,
    /// The flag by which the shim tells of events while the kernel runs (`CpuArea::pending`).
    pending: Once<&'static AtomicU32>,
}

impl Events {
    /// Nothing registered.
    #[must_use]
    pub fn new() -> Events {
        Events::default()
    }

    /// Says where the shim tells of events while the kernel runs.
    pub fn set_pending_flag(&self, flag: &'static AtomicU32) {
        self.pending.call_once(|| flag);
    }

    /// Waits without delivering anything, in the middle of a synchronous operation. A tick that comes meanwhile is noted in
    /// `ticked`, for [`Events::resume`]: the host does not wait while it is pending.
    pub fn wait_inside(&self, host: &Host, events: &mut [Event], ticked: &mut bool) -> usize {
        let count = host.wait(events, u64::MAX);
        if let Some(pending) = self.pending.get() {
            *ticked |= pending.swap(0, Ordering::Relaxed) != 0;
        }
        count
    }

    /// Ends a synchronous operation that waited: what came meanwhile is seen to before the program goes on.
    pub fn resume(&self, ticked: bool) {
        if ticked && let Some(pending) = self.pending.get() {
            pending.store(1, Ordering::Relaxed);
        }
    }

    /// Sends the events of `source` to `handler`, in place of an earlier one.
    pub fn register(&self, source: u32, handler: Arc<dyn EventHandler>) {
        let index = source as usize;
        if index >= MAX_SOURCE {
            return;
        }
        let mut handlers = self.handlers.lock();
        if index >= handlers.len() {
            handlers.resize_with(index + 1, || None);
        }
        let earlier = handlers[index].replace(handler);
        drop(handlers);
        drop(earlier);
    }

    /// Drops the events of `source` from now on.
    pub fn unregister(&self, source: u32) {
        let earlier = self
            .handlers
            .lock()
            .get_mut(source as usize)
            .and_then(Option::take);
        drop(earlier);
    }

    /// Gives one event to its handler; an event that nobody wants is dropped.
    pub fn dispatch(&self, event: Event) {
        let handler = self
            .handlers
            .lock()
            .get(event.source as usize)
            .and_then(Clone::clone);
        if let Some(handler) = handler {
            handler.handle(event);
        }
    }

    /// Keeps an event for the next [`Events::wait`] or [`Events::dispatch_deferred`].
    pub fn defer(&self, event: Event) {
        let mut deferred = self.deferred.lock();
        match deferred.last_mut() {
            // Edges of one source add up.
            Some(last) if last.source == event.source => last.flags |= event.flags,
            _ => deferred.push(event),
        }
    }

    /// Whether [`Events::defer`] left something to do.
    #[must_use]
    pub fn has_deferred(&self) -> bool {
        !self.deferred.lock().is_empty()
    }

    /// Delivers what was deferred. The result says how many events that were.
    pub fn dispatch_deferred(&self) -> usize {
        let mut delivered = 0;
        loop {
            let events = core::mem::take(&mut *self.deferred.lock());
            if events.is_empty() {
                return delivered;
            }
            for event in &events {
                self.dispatch(*event);
            }
            delivered += events.len();
        }
    }

    /// Waits for events until `deadline` (monotonic nanoseconds; 0: does not wait; `u64::MAX`: no limit) and delivers
    /// them, after the deferred ones. Returns after one batch, or at once if there were deferred events.
    /// The result says how many events were delivered.
    pub fn wait(&self, host: &Host, deadline: u64) -> usize {
        let delivered = self.dispatch_deferred();
        let mut events = [Event::default(); BATCH];
        let count = host.wait(&mut events, if delivered > 0 { 0 } else { deadline });
        for event in events.iter().take(count) {
            self.dispatch(*event);
        }
        delivered + count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<Event>>);

    impl EventHandler for Log {
        fn handle(&self, event: Event) {
            self.0.lock().push(event);
        }
    }

    #[test]
    fn events_reach_their_handler_alone() {
        let events = Events::new();
        let log = Arc::new(Log::default());
        events.register(70, log.clone());
        events.dispatch(Event {
            source: 70,
            flags: 1,
        });
        events.dispatch(Event {
            source: 71,
            flags: 1,
        });
        events.dispatch(Event {
            source: u32::MAX,
            flags: 1,
        });
        events.unregister(70);
        events.dispatch(Event {
            source: 70,
            flags: 4,
        });
        assert_eq!(
            *log.0.lock(),
            [Event {
                source: 70,
                flags: 1
            }]
        );
    }

    #[test]
    fn deferred_events_add_up_and_come_once() {
        let events = Events::new();
        let log = Arc::new(Log::default());
        events.register(5, log.clone());
        events.defer(Event {
            source: 5,
            flags: 1,
        });
        events.defer(Event {
            source: 5,
            flags: 4,
        });
        assert!(events.has_deferred());
        events.dispatch_deferred();
        events.dispatch_deferred();
        assert_eq!(
            *log.0.lock(),
            [Event {
                source: 5,
                flags: 5
            }]
        );
    }
}

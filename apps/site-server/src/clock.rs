//! When time limits of connections run out, told to the loop that waits for their sockets.
//!
//! Not a timer for everything: nobody is told which limit has run out. All connections look at theirs again, at most
//! once a second, and an idle server with no connection is never woken.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};

/// Nobody waits for the time.
const NEVER: u64 = u64::MAX;

/// A clock that knows the earliest of the times that somebody waits for. Its copies know the same.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    start: Instant,
    /// The earliest time to look at the limits again, in whole seconds after `start`: however many there are, they cost
    /// one look a second.
    next: AtomicU64,
}

impl Clock {
    /// A clock that nobody waits for.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            start: Instant::now(),
            next: AtomicU64::new(NEVER),
        }))
    }

    /// When the limits should be looked at again; nothing while there are none.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        match self.0.next.load(Relaxed) {
            NEVER => None,
            seconds => Some(self.0.start + Duration::from_secs(seconds)),
        }
    }

    /// Forgets what was waited for. Whoever still waits says so again when it is polled.
    pub fn reset(&self) {
        self.0.next.store(NEVER, Relaxed);
    }
}

impl Timer for Clock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Limit {
            clock: self.clone(),
            deadline,
        })
    }
}

/// Waits until a time has come.
struct Limit {
    clock: Clock,
    deadline: Instant,
}

impl Future for Limit {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<()> {
        if self.deadline <= Instant::now() {
            return Poll::Ready(());
        }
        let shared = &self.clock.0;
        let seconds = self.deadline.duration_since(shared.start).as_secs() + 1;
        shared.next.fetch_min(seconds, Relaxed);
        Poll::Pending
    }
}

impl Sleep for Limit {}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn the_earliest_limit_counts() {
        let clock = Clock::new();
        assert_eq!(clock.next(), None);
        let mut context = Context::from_waker(Waker::noop());
        for (seconds, next) in [(30, 31), (20, 21), (40, 21)] {
            let mut limit = clock.sleep_until(clock.0.start + Duration::from_secs(seconds));
            assert!(limit.as_mut().poll(&mut context).is_pending());
            let next = clock.0.start + Duration::from_secs(next);
            assert_eq!(clock.next(), Some(next));
        }
        clock.reset();
        assert_eq!(clock.next(), None);
        let mut past = clock.sleep(Duration::ZERO);
        assert!(past.as_mut().poll(&mut context).is_ready());
        assert_eq!(clock.next(), None);
    }
}

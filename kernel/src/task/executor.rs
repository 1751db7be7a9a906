//! The executor: every thread of the program, and every activity of the kernel's own, is a future here.
//!
//! Tasks run in the order in which they become ready. The executor does not wait; [`crate::Kernel::run`] does, when
//! nothing is ready.

use alloc::{boxed::Box, collections::VecDeque, sync::Arc, task::Wake};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Waker},
};

use crate::sync::Mutex;

type BoxedFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A future with its place in the queue.
pub struct Task {
    future: Mutex<Option<BoxedFuture>>,
    queued: AtomicBool,
    queue: Arc<Queue>,
}

type Queue = Mutex<VecDeque<Arc<Task>>>;

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            let queue = Arc::clone(&self.queue);
            queue.lock().push_back(self);
        }
    }
}

/// Ready tasks.
#[derive(Default)]
pub struct Executor {
    queue: Arc<Queue>,
}

impl Executor {
    /// Adds a task, ready to run.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let task = Arc::new(Task {
            future: Mutex::new(Some(Box::pin(future))),
            queued: AtomicBool::new(false),
            queue: Arc::clone(&self.queue),
        });
        task.wake();
    }

    /// Whether a task is ready.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.queue.lock().is_empty()
    }

    /// How many tasks are ready.
    #[must_use]
    pub fn ready_count(&self) -> usize {
        self.queue.lock().len()
    }

    /// Polls the task that has been ready longest. False when none is.
    pub fn run_one(&self) -> bool {
        let Some(task) = self.queue.lock().pop_front() else {
            return false;
        };
        task.queued.store(false, Ordering::Relaxed);
        // Taken out while it runs, so that its own wake-ups and its end need no lock.
        let Some(mut future) = task.future.lock().take() else {
            return true;
        };
        let waker = Waker::from(Arc::clone(&task));
        if future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
        {
            *task.future.lock() = Some(future);
        }
        true
    }
}

/// Lets other tasks run, then goes on.
pub async fn yield_now() {
    let mut yielded = false;
    core::future::poll_fn(|context| {
        if yielded {
            return core::task::Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        core::task::Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn tasks_take_turns() {
        let executor = Executor::default();
        let order = Arc::new(Mutex::new(alloc::vec::Vec::new()));
        let running = Arc::new(AtomicUsize::new(2));
        for name in ["a", "b"] {
            let (order, running) = (Arc::clone(&order), Arc::clone(&running));
            executor.spawn(async move {
                for _ in 0..2 {
                    order.lock().push(name);
                    yield_now().await;
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while executor.run_one() {}
        assert_eq!(*order.lock(), ["a", "b", "a", "b"]);
        assert_eq!(running.load(Ordering::Relaxed), 0);
    }
}

//! Futexes: threads that wait on words of memory (`futex(2)`).
//!
//! One address space, one CPU: a word is named by its address, and looking at it and then queueing cannot be
//! interrupted.

use alloc::{collections::VecDeque, sync::Arc};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll, Waker},
};

use crate::{Errno, Result, hash::HashMap, memory::user, sync::Mutex};

/// Matches every waiter (`FUTEX_BITSET_MATCH_ANY`).
pub const ANY: u32 = u32::MAX;

struct Waiter {
    bits: u32,
    woken: AtomicBool,
    /// Where it waits now: a requeue moves it.
    address: Mutex<u64>,
    waker: Mutex<Option<Waker>>,
}

/// Waiters by the address of their word.
#[derive(Default)]
pub struct FutexTable(Arc<Mutex<HashMap<u64, VecDeque<Arc<Waiter>>>>>);

impl FutexTable {
    /// Queues on `address` if its word still is `expected`.
    ///
    /// # Errors
    /// `EAGAIN` when the word is another, `EFAULT`, `EINVAL` for a misaligned address or no bits.
    pub fn wait(&self, address: u64, expected: u32, bits: u32) -> Result<FutexWait> {
        if !address.is_multiple_of(4) || bits == 0 {
            return Err(Errno::EINVAL);
        }
        if user::read::<u32>(address)? != expected {
            return Err(Errno::EAGAIN);
        }
        let waiter = Arc::new(Waiter {
            bits,
            woken: AtomicBool::new(false),
            address: Mutex::new(address),
            waker: Mutex::new(None),
        });
        self.0
            .lock()
            .entry(address)
            .or_default()
            .push_back(Arc::clone(&waiter));
        Ok(FutexWait {
            table: Arc::clone(&self.0),
            waiter,
        })
    }

    /// Wakes up to `count` waiters with any of `bits`; returns how many.
    pub fn wake(&self, address: u64, count: usize, bits: u32) -> usize {
        let mut woken = 0;
        while woken < count {
            let waiter = {
                let mut table = self.0.lock();
                let Some(queue) = table.get_mut(&address) else {
                    break;
                };
                let Some(index) = queue.iter().position(|waiter| waiter.bits & bits != 0) else {
                    break;
                };
                let waiter = queue.remove(index);
                if queue.is_empty() {
                    table.remove(&address);
                }
                waiter
            };
            let Some(waiter) = waiter else { break };
            waiter.woken.store(true, Ordering::Relaxed);
            let waker = waiter.waker.lock().take();
            if let Some(waker) = waker {
                waker.wake();
            }
            woken += 1;
        }
        woken
    }

    /// Wakes up to `wake` waiters and moves up to `move_count` others to another word. Returns woken plus moved.
    pub fn requeue(&self, address: u64, wake: usize, target: u64, move_count: usize) -> usize {
        let woken = self.wake(address, wake, ANY);
        if address == target {
            return woken;
        }
        let mut table = self.0.lock();
        let mut moved = VecDeque::new();
        if let Some(queue) = table.get_mut(&address) {
            let count = queue.len().min(move_count);
            moved = queue.drain(..count).collect();
            if queue.is_empty() {
                table.remove(&address);
            }
        }
        let count = moved.len();
        for waiter in &moved {
            *waiter.address.lock() = target;
        }
        if count > 0 {
            table.entry(target).or_default().extend(moved);
        }
        woken + count
    }
}

/// Future of [`FutexTable::wait`]: ready when woken.
pub struct FutexWait {
    table: Arc<Mutex<HashMap<u64, VecDeque<Arc<Waiter>>>>>,
    waiter: Arc<Waiter>,
}

impl Future for FutexWait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.waiter.woken.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        *self.waiter.waker.lock() = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for FutexWait {
    fn drop(&mut self) {
        if self.waiter.woken.load(Ordering::Relaxed) {
            return;
        }
        let address = *self.waiter.address.lock();
        let mut table = self.table.lock();
        if let Some(queue) = table.get_mut(&address) {
            queue.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
            if queue.is_empty() {
                table.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::task::Wake;

    struct Nothing;
    impl Wake for Nothing {
        fn wake(self: Arc<Self>) {}
    }

    fn is_ready(wait: &mut FutexWait) -> bool {
        let waker = Waker::from(Arc::new(Nothing));
        Pin::new(wait)
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
    }

    #[test]
    fn wakes_in_order_and_by_bits() {
        let table = FutexTable::default();
        let word = 5u32;
        let address = &raw const word as u64;
        assert_eq!(table.wait(address, 4, ANY).err(), Some(Errno::EAGAIN));
        let mut first = table.wait(address, 5, 1).unwrap();
        let mut second = table.wait(address, 5, 2).unwrap();
        assert!(!is_ready(&mut first));
        assert_eq!(table.wake(address, 10, 2), 1);
        assert!(is_ready(&mut second));
        assert!(!is_ready(&mut first));
        drop(first);
        assert_eq!(table.wake(address, 10, ANY), 0);
    }

    #[test]
    fn a_moved_waiter_is_woken_at_its_new_word() {
        let table = FutexTable::default();
        let words = [1u32, 1u32];
        let (from, to) = (&raw const words[0] as u64, &raw const words[1] as u64);
        let mut wait = table.wait(from, 1, ANY).unwrap();
        assert_eq!(table.requeue(from, 0, to, 1), 1);
        assert_eq!(table.wake(from, 1, ANY), 0);
        assert_eq!(table.wake(to, 1, ANY), 1);
        assert!(is_ready(&mut wait));
    }
}

//! The kernel's lock.
//!
//! With one CPU and no preemption a lock is never contended: finding it taken is a mistake (the holder calls itself),
//! which a spinning lock would hide as a hang. So [`Mutex::lock`] panics then, naming the place; and taking a lock is an ordinary
//! load and store. Tests, which run on several threads of the host, exchange the flag.

#![allow(unsafe_code)]

use core::{
    cell::UnsafeCell,
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    panic::Location,
    sync::atomic::{AtomicBool, Ordering},
};

/// Mutual exclusion around a value.
#[derive(Default)]
pub struct Mutex<T: ?Sized> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: only one guard exists at a time, so the value is used by one thread at a time. As a freestanding
// program the kernel has but one thread, and no interrupt handler runs in it.
unsafe impl<T: ?Sized + Send> Sync for Mutex<T> {}

/// Access to a locked value; unlocks when dropped.
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    value: PhantomData<&'a mut T>,
}

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// The value, without the lock.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Takes the lock.
    ///
    /// # Panics
    /// When it is taken already: a kernel bug.
    #[track_caller]
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        match self.try_lock() {
            Some(guard) => guard,
            None => self.busy(Location::caller()),
        }
    }

    /// Takes the lock unless it is taken.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let guard = || MutexGuard {
            mutex: self,
            value: PhantomData,
        };
        (!self.take()).then(guard)
    }

    /// Marks the lock as taken; the answer is whether it was.
    #[cfg(feature = "freestanding")]
    #[inline]
    fn take(&self) -> bool {
        let taken = self.taken.load(Ordering::Relaxed);
        self.taken.store(true, Ordering::Relaxed);
        taken
    }

    #[cfg(not(feature = "freestanding"))]
    fn take(&self) -> bool {
        self.taken.swap(true, Ordering::Acquire)
    }

    #[cfg(not(test))]
    #[cold]
    fn busy(&self, place: &Location<'_>) -> ! {
        panic!("lock taken twice, at {place}")
    }

    #[cfg(test)]
    #[cold]
    fn busy(&self, _: &Location<'_>) -> MutexGuard<'_, T> {
        loop {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            std::thread::yield_now();
        }
    }

    /// Access through a unique reference, without locking.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard is the only one.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and it is borrowed mutably.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.mutex.taken.store(false, Ordering::Release);
    }
}

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Mutex").finish_non_exhaustive()
    }
}

//! The kernel's lock.
//!
//! With one CPU and no preemption a lock is never contended: finding it taken is a mistake (the holder calls itself),
//! which a spinning lock would hide as a hang. So [`Mutex::lock`] panics then, naming the place.

use core::panic::Location;

/// Mutual exclusion around a value.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(spin::Mutex<T>);

/// Access to a locked value; unlocks when dropped.
pub type MutexGuard<'a, T> = spin::MutexGuard<'a, T>;

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(spin::Mutex::new(value))
    }

    /// The value, without the lock.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
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
        match self.0.try_lock() {
            Some(guard) => guard,
            None => self.busy(Location::caller()),
        }
    }

    /// Takes the lock unless it is taken.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock()
    }

    #[cfg(not(test))]
    #[cold]
    fn busy(&self, place: &Location<'_>) -> ! {
        panic!("lock taken twice, at {place}")
    }

    /// Tests run on several threads of the host.
    #[cfg(test)]
    #[cold]
    fn busy(&self, _: &Location<'_>) -> MutexGuard<'_, T> {
        self.0.lock()
    }

    /// Access through a unique reference, without locking.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

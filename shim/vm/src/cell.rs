//! Data of the one processor, reachable from everywhere.

use core::cell::UnsafeCell;

/// A global that is used by one processor with interrupts off.
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: there is one processor, and `get` makes its caller promise that no two references live at once.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    /// With a first value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value.
    ///
    /// # Safety
    ///
    /// No other reference to it is in use while this one is. Host calls and traps from ring 3 never nest; a trap from ring 0 (the
    /// halt in `wait`) must not call this.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that the reference is the only one"
    )]
    pub unsafe fn get(&self) -> &mut T {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.0.get() }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! A sleeping lock for many readers or one writer, around the data that it protects.
//!
//! C header: `include/linux/rwsem.h`. The `kernel` crate has no wrapper of it yet.

use super::c;
use core::{
    cell::UnsafeCell,
    ops::{
        Deref,
        DerefMut, //
    }, //
};
use kernel::{
    bindings,
    prelude::*,
    sync::LockClassKey,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// Data that many may read and one may write.
#[pin_data]
pub(crate) struct RwSem<T> {
    #[pin]
    sem: Opaque<bindings::rw_semaphore>,
    data: UnsafeCell<T>,
}

// SAFETY: The data moves with the lock, which is not bound to a thread.
unsafe impl<T: Send> Send for RwSem<T> {}
// SAFETY: Readers share `&T`, so it must be `Sync`; a writer gets `&mut T`, so it must be `Send`.
unsafe impl<T: Send + Sync> Sync for RwSem<T> {}

impl<T> RwSem<T> {
    /// Makes a lock around `data`.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid memory for the semaphore; name and key are static.
            sem <- Opaque::ffi_init(|slot| unsafe {
                c::kdp_init_rwsem(slot, name.as_char_ptr(), key.as_ptr())
            }),
            data: UnsafeCell::new(data),
        })
    }

    /// Locks for reading; sleeps while a writer has it.
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: `sem` was initialised by `new()` and is pinned.
        unsafe { bindings::down_read(self.sem.get()) };
        ReadGuard {
            lock: self,
            _not_send: NotThreadSafe,
        }
    }

    /// Locks for writing; sleeps while anybody has it.
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: `sem` was initialised by `new()` and is pinned.
        unsafe { bindings::down_write(self.sem.get()) };
        WriteGuard {
            lock: self,
            _not_send: NotThreadSafe,
        }
    }
}

/// The data, for reading.
///
/// # Invariants
///
/// The current thread holds the lock for reading.
pub(crate) struct ReadGuard<'a, T> {
    lock: &'a RwSem<T>,
    _not_send: NotThreadSafe,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The lock is held for reading (type invariant), so nobody has a `&mut T`.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: The lock is held for reading, by this thread (type invariant).
        unsafe { bindings::up_read(self.lock.sem.get()) };
    }
}

/// The data, for writing.
///
/// # Invariants
///
/// The current thread holds the lock for writing.
pub(crate) struct WriteGuard<'a, T> {
    lock: &'a RwSem<T>,
    _not_send: NotThreadSafe,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The lock is held for writing (type invariant), so nobody else has a reference.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: The lock is held for writing (type invariant), so nobody else has a reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: The lock is held for writing, by this thread (type invariant).
        unsafe { bindings::up_write(self.lock.sem.get()) };
    }
}

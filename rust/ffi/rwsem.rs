// SPDX-License-Identifier: GPL-2.0

//! A sleeping lock for many readers or one writer, around the data that it protects.
//!
//! A reader takes the stripe of the CPU that it is on: readers on other CPUs write other cache lines. A
//! writer takes all stripes, after a lock that keeps other writers away, so reading is cheap on any number of
//! CPUs, and writing costs two atomic operations for each of up to 64 stripes. `percpu_rw_semaphore` would
//! make a writer wait for an RCU grace period: ours come with ordinary calls.
//!
//! # Locks
//!
//! First the writers' lock, then the stripes in rising order; lockdep knows the former as a subclass of the
//! latter, which it guards. A reader has one stripe and takes no other, so nobody waits in a circle.
//!
//! C header: `include/linux/rwsem.h`. The `kernel` crate has no wrapper of it yet.

use super::c;
use crate::rules::stripe::Stripes;
use core::{
    cell::UnsafeCell,
    ops::{
        Deref,
        DerefMut, //
    }, //
};
use kernel::{
    bindings,
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    prelude::*,
    sync::LockClassKey,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// A semaphore in a cache line of its own.
///
/// # Invariants
///
/// It is initialised, and stays where it is.
#[repr(align(64))]
struct Stripe(Opaque<bindings::rw_semaphore>);

// SAFETY: A semaphore is not bound to a thread.
unsafe impl Send for Stripe {}
// SAFETY: A semaphore is there to be shared.
unsafe impl Sync for Stripe {}

/// Data that many may read and one may write.
///
/// # Invariants
///
/// `stripes` has as many stripes as `division` says, and after them the writers' lock. It never grows, so
/// they stay where they are.
pub(crate) struct RwSem<T> {
    stripes: KVec<Stripe>,
    division: Stripes,
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
    ) -> Result<Self> {
        let division = Stripes::for_cpus(nr_cpu_ids());
        let count = division.count() + 1;
        let mut stripes = KVec::<Stripe>::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for place in &mut stripes.spare_capacity_mut()[..count] {
            // A stripe is nothing but the semaphore.
            let sem = place.as_mut_ptr().cast();
            // SAFETY: `sem` is valid memory for the semaphore; name and key are static.
            unsafe { c::kdp_init_rwsem(sem, name.as_char_ptr(), key.as_ptr()) };
        }
        // SAFETY: So many were just initialised.
        unsafe { stripes.inc_len(count) };
        // INVARIANT: By the count.
        Ok(Self {
            stripes,
            division,
            data: UnsafeCell::new(data),
        })
    }

    /// Locks for reading; sleeps while a writer has it.
    #[inline]
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // Should the thread move on to another CPU, it still has this one's.
        let stripe = &self.stripes[self.division.of_cpu(CpuId::current().as_u32())];
        // SAFETY: It is initialised and stays where it is (type invariant).
        unsafe { bindings::down_read(stripe.0.get()) };
        // INVARIANT: Just locked.
        ReadGuard {
            stripe,
            data: &self.data,
            _not_send: NotThreadSafe,
        }
    }

    /// Locks for writing; sleeps while anybody has it.
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        let writers = self.writers();
        // SAFETY: They are initialised and stay where they are (type invariant), in this and the next two.
        unsafe { c::kdp_down_write_first(writers) };
        for stripe in &self.stripes[..self.division.count()] {
            // SAFETY: As above.
            unsafe { c::kdp_down_write_nest(stripe.0.get(), writers) };
        }
        // INVARIANT: Just locked.
        WriteGuard {
            lock: self,
            _not_send: NotThreadSafe,
        }
    }

    fn writers(&self) -> *mut bindings::rw_semaphore {
        self.stripes[self.division.count()].0.get()
    }
}

/// The data, for reading.
///
/// # Invariants
///
/// The current thread holds `stripe`, one of the lock around `data`, for reading.
pub(crate) struct ReadGuard<'a, T> {
    stripe: &'a Stripe,
    data: &'a UnsafeCell<T>,
    _not_send: NotThreadSafe,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: A stripe is held for reading (type invariant), and a writer has all: nobody has a `&mut T`.
        unsafe { &*self.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: The stripe is held for reading, by this thread (type invariant).
        unsafe { bindings::up_read(self.stripe.0.get()) };
    }
}

/// The data, for writing.
///
/// # Invariants
///
/// The current thread holds the writers' lock and all stripes for writing.
pub(crate) struct WriteGuard<'a, T> {
    lock: &'a RwSem<T>,
    _not_send: NotThreadSafe,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: All is held for writing (type invariant), so nobody else has a reference.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: All is held for writing (type invariant), so nobody else has a reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // The writers' lock is the last, and goes last.
        for stripe in &self.lock.stripes {
            // SAFETY: It is held for writing, by this thread (type invariant).
            unsafe { bindings::up_write(stripe.0.get()) };
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Memory errors that the kernel has found: the page is poisoned in every memslot that has it, and their readers are told.
//!
//! An error is a page frame. The kernel knows which page of which file it is, as long as it is in the file's page cache,
//! where the kernel keeps bad pages of memfds (`shmem_error_remove_folio()`, `hugetlbfs_error_remove_folio()`). From the
//! file an index of all memslots leads to those that have that page. Nothing is walked through.
//!
//! # Locks
//!
//! The index's is innermost: nothing else is taken under it. It is taken to enter and leave memslots, with no lock held,
//! and by the work that an error starts, which may sleep.

use crate::{
    ffi::memory_failure::{
        BadFrame,
        Listener, //
    },
    memslot::Memslot,
    moving::Move, //
};
use kernel::{
    prelude::*,
    rbtree::RBTree,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// A file's identity, and a number that no other memslot has or had.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    file: usize,
    number: u64,
}

/// All memslots, and the huge page that is being moved (replace.rs).
pub(crate) struct Index {
    memslots: Option<RBTree<Key, Arc<Memslot>>>,
    moving: Option<Arc<Move>>,
}

kernel::sync::global_lock! {
    // SAFETY: `init()` is called once, when the module is loaded.
    pub(crate) unsafe(uninit) static INDEX: Mutex<Index> = Index {
        memslots: None,
        moving: None,
    };
}

impl Index {
    /// The first memslot of a file from a number on, and its number.
    fn next(&self, file: usize, number: u64) -> Option<(u64, Arc<Memslot>)> {
        let memslots = self.memslots.as_ref()?;
        let cursor = memslots.cursor_lower_bound(&Key { file, number })?;
        let (key, memslot) = cursor.current();
        (key.file == file).then(|| (key.number, memslot.clone()))
    }
}

/// A huge page that is being moved. There is one at a time. Meanwhile its file gets no more memslots, and an error in its
/// frames is an error in its pages.
pub(crate) struct Registered(());

impl Registered {
    /// The caller has replace.rs's `TURN`, so there is no other.
    pub(crate) fn new(between: &Arc<Move>) -> Self {
        INDEX.lock().moving = Some(between.clone());
        Self(())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Dropped after the lock: it may hold the last pins.
        let between = INDEX.lock().moving.take();
        drop(between);
    }
}

/// Numbers memslots; only uniqueness counts: relaxed.
static NEXT: Atomic<u64> = Atomic::new(0);

/// A memslot that is in the index. It is held by it.
pub(crate) struct Listed(Key);

impl Listed {
    /// Enters a memslot.
    pub(crate) fn new(memslot: &Arc<Memslot>) -> Result<Self> {
        let key = Key {
            file: memslot.backing.memfd().identity(),
            number: NEXT.fetch_add(1, Relaxed),
        };
        let mut index = INDEX.lock();
        let moving = index.moving.as_ref();
        if moving.is_some_and(|moving| moving.file == key.file) {
            return Err(EBUSY);
        }
        index
            .memslots
            .get_or_insert_with(RBTree::new)
            .try_create_and_insert(key, memslot.clone(), GFP_KERNEL_ACCOUNT)?;
        Ok(Self(key))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // Dropped after the lock: it may be the last of the memslot.
        let memslot = INDEX
            .lock()
            .memslots
            .as_mut()
            .and_then(|index| index.remove(&self.0));
        drop(memslot);
    }
}

/// Which page of which file a frame is.
fn place(frame: &BadFrame) -> Option<(usize, u64)> {
    let moving = INDEX.lock().moving.clone();
    moving
        .and_then(|moving| moving.place(frame))
        .or_else(|| frame.place())
}

/// The next memslot of a file, and its number.
pub(crate) fn next(file: usize, from: u64) -> Option<(u64, Arc<Memslot>)> {
    INDEX.lock().next(file, from)
}

/// Who listens for errors.
pub(crate) struct Memslots;

impl Listener for Memslots {
    fn on_error(frame: BadFrame) {
        let Some((file, index)) = place(&frame) else {
            return;
        };
        let mut from = 0;
        while let Some((number, memslot)) = next(file, from) {
            from = number + 1;
            let Some(page) = memslot.backing.page_at(index, memslot.place.nr_pages) else {
                continue;
            };
            match memslot.memory_failed(page, &frame) {
                Ok(_) => (),
                // It is unmapped; a touch may bring it back, and find the error anew.
                Err(e) => pr_err!(
                    "memslot {}: page {page} has a memory error and cannot be poisoned: {e:?}\n",
                    memslot.place.id
                ),
            }
        }
    }
}

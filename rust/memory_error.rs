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
    memslot::Memslot, //
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

kernel::sync::global_lock! {
    // SAFETY: `init()` is called once, when the module is loaded.
    pub(crate) unsafe(uninit) static INDEX: Mutex<Option<RBTree<Key, Arc<Memslot>>>> = None;
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
        INDEX
            .lock()
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
            .as_mut()
            .and_then(|index| index.remove(&self.0));
        drop(memslot);
    }
}

/// The first memslot of a file from a number on.
fn next(file: usize, number: u64) -> Option<(Key, Arc<Memslot>)> {
    let index = INDEX.lock();
    let cursor = index.as_ref()?.cursor_lower_bound(&Key { file, number })?;
    let (key, memslot) = cursor.current();
    (key.file == file).then(|| (*key, memslot.clone()))
}

/// Who listens for errors.
pub(crate) struct Memslots;

impl Listener for Memslots {
    fn on_error(frame: BadFrame) {
        let Some((file, index)) = frame.place() else {
            return;
        };
        let mut from = 0;
        while let Some((key, memslot)) = next(file, from) {
            from = key.number + 1;
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

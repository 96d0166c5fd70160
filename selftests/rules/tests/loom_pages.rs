// SPDX-License-Identifier: GPL-2.0

//! The `pages` lock of a memslot (rust/memslot.rs, fault.rs, backing.rs): a fault maps under the lock
//! for reading; what makes pages absent, unmaps and unpins has it for writing. So nothing is mapped
//! when a mark as absent returns, and no frame is unpinned while it is mapped.

use crate::loomed::{part, Chunk, BIT, WORD};
use kdp_rules::rules::bits;
use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::sync::{RwLock, RwLockWriteGuard};
use loom::thread;
use std::sync::Arc;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A fault looks at the bits before it has the lock.
    LookOutside,
    /// A fault gives up the lock before it maps.
    MapOutside,
    /// Bits are cleared after the lock was given up.
    ClearLate,
    /// Absent pages are unpinned without unmapping them once more.
    UnmapOnce,
    /// Folios are unpinned before they are unmapped.
    UnpinFirst,
}

/// Two pages in one folio, present at first. The orderings are relaxed so that only the lock orders.
struct Slot {
    broken: Broken,
    pages: RwLock<()>,
    chunk: Chunk,
    pinned: AtomicBool,
    mapped: AtomicBool,
}

impl Slot {
    fn new(broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            broken,
            pages: RwLock::new(()),
            chunk: Chunk::new(0b11, 0),
            pinned: AtomicBool::new(true),
            mapped: AtomicBool::new(false),
        })
    }

    /// Maps `count` pages if all are present.
    fn fault(&self, count: u64) {
        let present = || bits::all(&self.chunk.present, part(0, count), true);
        let saw = (self.broken == Broken::LookOutside).then(present);
        let pages = self.pages.read().unwrap();
        if !saw.unwrap_or_else(present) {
            return;
        }
        let pages = (self.broken != Broken::MapOutside).then_some(pages);
        self.pinned.store(true, Relaxed);
        thread::yield_now();
        self.mapped.store(true, Relaxed);
        assert!(self.pinned.load(Relaxed), "mapped and not pinned");
        drop(pages);
    }

    fn unmap(&self) {
        self.mapped.store(false, Relaxed);
    }

    fn clear(&self) {
        // Page 0 alone: a block that holds it must go, too.
        self.chunk.mark_absent(part(0, 1));
    }

    fn unpin(&self) {
        assert!(!self.mapped.load(Relaxed), "unpinned while mapped");
        self.pinned.store(false, Relaxed);
    }

    fn write(&self) -> RwLockWriteGuard<'_, ()> {
        self.pages.write().unwrap()
    }

    fn mark_absent(&self) {
        let pages = self.write();
        if self.broken != Broken::ClearLate {
            self.clear();
        }
        if self.broken == Broken::UnpinFirst {
            self.unpin();
        }
        self.unmap();
        drop(pages);
        if self.broken == Broken::ClearLate {
            self.clear();
        }
    }

    /// The rest of the call, when the folio's other page is absent already.
    fn unpin_absent(&self) {
        let _pages = self.write();
        if !bits::all(&self.chunk.present, part(0, 1), false) {
            return;
        }
        if self.broken != Broken::UnmapOnce {
            self.unmap();
        }
        self.unpin();
    }

    fn is_mapped(&self) -> bool {
        let _pages = self.write();
        self.mapped.load(Relaxed)
    }
}

/// Marks absent while another thread faults.
fn absent_and_fault(broken: Broken, count: u64) {
    loom::model(move || {
        let slot = Slot::new(broken);
        let other = Arc::clone(&slot);
        let other = thread::spawn(move || other.fault(count));
        slot.mark_absent();
        assert!(!slot.is_mapped(), "mapped after the mark returned");
        other.join().unwrap();
        assert!(!slot.is_mapped(), "mapped after the mark returned");
    });
}

#[test]
fn an_absent_page_is_not_mapped() {
    absent_and_fault(Broken::Nothing, 1);
}

#[test]
fn a_block_with_an_absent_page_is_not_mapped() {
    absent_and_fault(Broken::Nothing, 2);
}

#[test]
#[should_panic(expected = "mapped after the mark returned")]
fn broken_look_outside_the_lock_is_found() {
    absent_and_fault(Broken::LookOutside, 1);
}

#[test]
#[should_panic(expected = "mapped after the mark returned")]
fn broken_map_outside_the_lock_is_found() {
    absent_and_fault(Broken::MapOutside, 1);
}

#[test]
#[should_panic(expected = "mapped after the mark returned")]
fn broken_clear_outside_the_lock_is_found() {
    absent_and_fault(Broken::ClearLate, 1);
}

#[test]
#[should_panic(expected = "unpinned while mapped")]
fn broken_unpin_before_unmap_is_found() {
    absent_and_fault(Broken::UnpinFirst, 1);
}

/// Marks absent and unpins, while a process sets the bit, touches the page, and clears the bit by
/// hand, which it must not: no harm may come to others from that.
fn unpin_and_misuse(broken: Broken) {
    loom::model(move || {
        let slot = Slot::new(broken);
        let user = Arc::clone(&slot);
        let user = thread::spawn(move || {
            user.chunk.present[WORD].user_set(BIT);
            user.fault(1);
            user.chunk.present[WORD].user_clear(BIT);
        });
        slot.mark_absent();
        slot.unpin_absent();
        user.join().unwrap();
        let _pages = slot.write();
        let (mapped, pinned) = (slot.mapped.load(Relaxed), slot.pinned.load(Relaxed));
        assert!(pinned || !mapped, "mapped and not pinned");
    });
}

#[test]
fn what_is_mapped_is_pinned() {
    unpin_and_misuse(Broken::Nothing);
}

#[test]
#[should_panic(expected = "unpinned while mapped")]
fn broken_unmap_once_is_found() {
    unpin_and_misuse(Broken::UnmapOnce);
}

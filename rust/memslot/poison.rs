// SPDX-License-Identifier: GPL-2.0

//! Pages of a memslot that are lost, and those that are healed. The locks are those of memslot.rs.

use super::{
    Memslot,
    Progress, //
};
use crate::{
    ffi::{
        memory_failure::BadFrame,
        task::is_being_killed,
        work, //
    },
    lost,
    pages::{
        Mode,
        Pages, //
    },
    rules::{
        collapse::BLOCK_PAGES,
        poison::{
            Cause,
            Run, //
        },
        range::PageRange, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Arc, //
    }, //
};

/// A range that is being poisoned, where vCPUs are to learn of it by a signal. To KVM it is lost from here on.
struct Closing<'a> {
    memslot: &'a Memslot,
    _turn: Guard<'a, (), MutexBackend>,
}

impl<'a> Closing<'a> {
    fn new(memslot: &'a Arc<Memslot>, range: PageRange) -> Self {
        let turn = memslot.closing.lock();
        if memslot.shows_lost() {
            memslot.pages.write().close(Some(range));
            lost::show_more(memslot.clone());
            work::flush(&memslot.showing);
        }
        Self {
            memslot,
            _turn: turn,
        }
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        if self.memslot.shows_lost() {
            self.memslot.pages.write().close(None);
        }
    }
}

impl Memslot {
    /// Whether what is lost becomes areas of another kind (lost.rs). In native memory KVM hears of it
    /// without them.
    pub(crate) fn shows_lost(&self) -> bool {
        self.poison_signals && !self.backing.is_native()
    }

    /// Poisons a range: it is unmapped from everybody, and who waits for it learns that its bytes are lost.
    pub(crate) fn poison(
        self: &Arc<Self>,
        range: PageRange,
        cause: Cause,
        progress: &mut Progress,
    ) -> Result {
        let _closing = Closing::new(self, range);
        let _changes = self.changes.lock();
        let mut first = range.first();
        for part in range.chunks() {
            if is_being_killed() {
                return Err(EINTR);
            }
            let last = first + (part.count - 1);
            let mut pages = self.pages.write();
            if pages.mode() == Mode::Removed {
                return Err(ENOENT);
            }
            let added: Result = (first..=last).try_for_each(|page| {
                progress.changed += u64::from(pages.poison.add(page, cause)?);
                Ok(())
            });
            // Also those that were added before one failed.
            self.unmap(first, part.count);
            if let Some(range) = self.range(first, part.count) {
                self.void_claims(&pages, range);
            }
            drop(pages);
            self.wake(first, last);
            added?;
            first = last + 1;
        }
        progress.done += 1;
        Ok(())
    }

    /// Takes the poison from a range whose frames are good: its pages are what they are besides.
    pub(crate) fn heal(&self, range: PageRange, progress: &mut Progress) -> Result {
        let _changes = self.changes.lock();
        let pages = self.pages.read();
        if pages.mode() == Mode::Removed {
            return Err(ENOENT);
        }
        pages.poison.check_heal(range)?;
        drop(pages);
        loop {
            if is_being_killed() {
                return Err(EINTR);
            }
            let mut pages = self.pages.write();
            let Some(first) = pages.poison.first(range) else {
                break;
            };
            let end = (first / BLOCK_PAGES + 1) * BLOCK_PAGES;
            let part = self
                .range(first, end.min(range.last() + 1) - first)
                .ok_or(EINVAL)?;
            while pages.poison.take(part).is_some() {
                progress.changed += 1;
            }
            drop(pages);
            self.unmap_whole_blocks(first, part.count());
        }
        progress.done += 1;
        Ok(())
    }

    /// The runs of poisoned pages from page `from` on, as many as there is room for in `found`.
    pub(crate) fn poisoned(&self, from: u64, found: &mut KVVec<Run>) -> Result {
        let pages = self.pages.read();
        let room = found.capacity() - found.len();
        for run in pages.poison.runs(from).take(room) {
            found.push(run, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(())
    }

    /// The kernel has found a memory error in a frame of the memslot's file: whether that is the frame of this page, whose
    /// bytes are lost then. Also those that are still to come would be in a bad frame.
    pub(crate) fn memory_failed(self: &Arc<Self>, page: u64, frame: &BadFrame) -> Result<bool> {
        self.lose(page, |pages| self.backing.has_frame(pages, page, frame))
    }

    /// The folio of a page had errors before it came to be pinned: its bad pages are poisoned.
    pub(crate) fn examine(self: &Arc<Self>, page: u64) -> Result {
        let folio = self.range(page, 1).ok_or(EINVAL)?;
        let (first, end) = self.backing.round_out(folio);
        let mut found = false;
        for page in first..end {
            if is_being_killed() {
                return Err(EINTR);
            }
            if !self.backing.can_read(page) {
                found |= self.lose(page, |_| true)?;
            }
            work::yield_now();
        }
        // It is bad, and nobody knows where. A page of native memory may be another one by now.
        if !found && !self.backing.is_native() {
            self.lose(page, |_| true)?;
        }
        Ok(())
    }

    /// A page's frame is bad, if `is_so` says so: poisons it, and tells readers. Says whether it did.
    pub(super) fn lose(
        self: &Arc<Self>,
        page: u64,
        is_so: impl FnOnce(&Pages) -> bool,
    ) -> Result<bool> {
        // If it is not so it makes no difference: the next touch brings the page back.
        let range = self.range(page, 1).ok_or(EINVAL)?;
        let _closing = Closing::new(self, range);
        let _changes = self.changes.lock();
        let mut pages = self.pages.write();
        // Nobody has it mapped where it is not pinned. What has been punched out of the file is no longer found by its
        // place there.
        if pages.mode() == Mode::Removed || !is_so(&pages) {
            return Ok(false);
        }
        let added = pages.poison.add(page, Cause::Hardware);
        self.unmap(page, 1);
        self.void_claims(&pages, range);
        drop(pages);
        self.wake(page, page);
        added?;
        self.vm.events.poisoned(&self.place, page);
        Ok(true)
    }
}

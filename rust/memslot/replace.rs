// SPDX-License-Identifier: GPL-2.0

//! A memslot's part in the move of a huge page (replace.rs). The locks are those of memslot.rs.

use super::Memslot;
use crate::{
    moving::{
        Move,
        Moving, //
    },
    pages::Mode,
    rules::{
        range::PageRange,
        replace::Cursor, //
    }, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

impl Memslot {
    /// Sees to it that the bad pages of a huge page that has some are poisoned: those that the memslot has never pinned may
    /// not be.
    pub(crate) fn know_errors(self: &Arc<Self>, range: PageRange) -> Result {
        if self
            .pages
            .read()
            .poison
            .any_bad(range.first(), range.count())
        {
            return Ok(());
        }
        self.examine(range.first())
    }

    /// From now on the pages of a huge page are where the move says. Says whether they are of that huge page at all: it may
    /// have been punched out of the file while the memslot had it.
    pub(crate) fn join(&self, range: PageRange, between: &Arc<Move>) -> Result<bool> {
        let place = KBox::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let pin = between.fresh.again()?;
        let mut pages = self.pages.write();
        if pages.mode() == Mode::Removed {
            drop(pages);
            return Ok(false);
        }
        let before = self.backing.take_pin(&mut pages, range.first())?;
        match before {
            Some(before) if !before.is_of(&between.bad) => {
                self.backing.put_pin(&pages, range.first(), before, true);
                drop(pages);
                return Ok(false);
            }
            _ => (),
        }
        // Who has claimed a page writes to where it was.
        self.void_claims(&pages, range);
        let moving = Moving {
            range,
            cursor: Cursor::new(range.count()),
            between: between.clone(),
            pin,
            before,
        };
        pages.set_moving(Some(KBox::write(place, moving)));
        Ok(true)
    }

    /// Whether the memslot had the huge page pinned when it joined the move.
    pub(crate) fn had_pin(&self) -> bool {
        let pages = self.pages.read();
        pages.any_moving().is_some_and(|m| m.before.is_some())
    }

    /// The next part of at most `most` pages is on its way: nobody has it. Returns which it is, in the huge page, and
    /// which of its pages are known to be in bad frames.
    pub(crate) fn hold(&self, most: u64) -> Option<(u64, u64, u64)> {
        let mut pages = self.pages.write();
        let moving = pages.any_moving_mut()?;
        let start = moving.range.first();
        let (first, count) = moving.cursor.hold(most)?;
        let is_bad = |&into: &u64| pages.poison.is_bad(start + first + into);
        let bad = (0..count)
            .filter(is_bad)
            .fold(0, |bits, into| bits | (1 << into));
        self.inode.unmap(start + first, count);
        Some((first, count, bad))
    }

    /// A page on its way cannot be copied: its bytes are lost, if it has any.
    pub(crate) fn lose_on_the_way(self: &Arc<Self>, page: u64) -> Result {
        let pages = self.pages.read();
        let is_news = !pages.poison.is_bad(page) && pages.is_present_beneath(page);
        drop(pages);
        if is_news {
            self.lose(page, |_| true)?;
        }
        Ok(())
    }

    /// The part has arrived. Of its pages those that are poisoned for their frames are lost still, or were not there
    /// yet: says how many of each.
    pub(crate) fn release(&self) -> (u64, u64) {
        let mut pages = self.pages.write();
        let (mut lost, mut healed) = (0, 0);
        let Some(moving) = pages.any_moving_mut() else {
            return (lost, healed);
        };
        let start = moving.range.first();
        let part = moving.cursor.release();
        for page in part.map(|into| start + into) {
            let was_present = pages.is_present_beneath(page);
            match pages.poison.settle(page, was_present) {
                Some(true) => lost += 1,
                Some(false) => healed += 1,
                None => (),
            }
        }
        (lost, healed)
    }

    /// The move is over, or was not begun.
    pub(crate) fn leave(&self) {
        let mut pages = self.pages.write();
        let is_removed = pages.mode() == Mode::Removed;
        let Some(moving) = pages.set_moving(None) else {
            return;
        };
        let Moving {
            range,
            cursor,
            between,
            pin,
            before,
        } = KBox::into_inner(moving);
        let had_pin = before.is_some();
        // What is put back; the rest is dropped without the lock.
        let (back, rest) = if cursor.is_done() {
            (Some(pin), before)
        } else {
            (before, Some(pin))
        };
        // As after KDP_MARK, huge pages with nothing but absent pages are not pinned.
        let is_needed = !is_removed && !pages.all_present(range, false);
        let back = if is_needed {
            match back {
                Some(back) => self.backing.put_pin(&pages, range.first(), back, had_pin),
                // What has been mapped since it joined has no pin.
                None => self.inode.unmap(range.first(), range.count()),
            }
            None
        } else {
            self.inode.unmap(range.first(), range.count());
            if had_pin {
                self.backing.dropped_pin();
            }
            back
        };
        drop(pages);
        drop((between, back, rest));
        // Blocks that have become whole meanwhile may be huge now.
        if is_needed {
            self.collapse_read(range);
        }
    }

    /// Waits until the pages have arrived that are on their way, if any are.
    pub(crate) fn wait_for_move(&self) {
        let pages = self.pages.read();
        let awaited = pages.any_moving().and_then(|moving| {
            let count = moving.cursor.awaited()?;
            Some((moving.between.clone(), count))
        });
        drop(pages);
        if let Some((between, count)) = awaited {
            between.wait(count);
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Replacing a huge page that has memory errors by a fresh one, with the guest running.
//!
//! The fresh huge page comes from a memfd that the caller names. The two change places in their files, at once: the fresh
//! one is a page of the memslots' own memfd then, at the same index, so that every memslot, every mapping of the memfd
//! and whoever is handed it later finds it there; and the bad one is a page of the caller's, from where it is given back.
//! Punching it out and allocating anew would do the same, but for a moment in which the memfd holds zeros, and for the
//! huge page that might not be had then. Letting memslots have pages of another memfd would leave all others on the bad
//! one.
//!
//! The bytes follow part by part. While a part is on its way nobody has its pages, in any memslot; before, all have them
//! in the bad huge page, after that in the fresh one. So all see the same bytes at any time, no write is lost, and who
//! needs a page waits for one part. To the memfd itself the fresh page is locked until it is complete; the kernel lets
//! nobody map the bad one there since the error.
//!
//! A page whose bytes cannot be copied stays poisoned, in a good frame now; one whose content was still to come is not
//! lost.
//!
//! # Locks
//!
//! `TURN` first: one huge page is moved at a time. Then, for each part, the move's `turn`, under which those of each
//! memslot are taken, one memslot at a time (memslot.rs). A fault waits for the move's `turn` with no lock at all.
//!
//! `pages` is never taken for writing by somebody who has the bad page's folio lock, nor the other way round: looking a
//! frame's place up takes it, under `pages` (`Backing::has_frame()`), but not of a huge page that is being moved.

use crate::{
    ffi::{
        exchange::{
            Exchanged,
            Huge,
            Spot, //
        },
        memfd::{
            Memfd,
            Pinned, //
        },
        work, //
    },
    memory_error::{
        self,
        Registered, //
    },
    memslot::Memslot,
    moving::Move,
    rules::range::{
        PageRange,
        WORD_PAGES, //
    }, //
};
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::Arc, //
};

kernel::sync::global_lock! {
    // SAFETY: `init()` is called once, when the module is loaded.
    pub(crate) unsafe(uninit) static TURN: Mutex<()> = ();
}

/// Pages that are on their way at once: what a vCPU may have to wait for.
const PART: u64 = WORD_PAGES;

/// What came of it, in pages of the memslot that was named.
#[derive(Default)]
pub(crate) struct Replaced {
    pub(crate) copied: u64,
    /// Whose bytes are lost.
    pub(crate) lost: u64,
    /// Whose frame was bad, and whose content is still to come.
    pub(crate) healed: u64,
    /// That turned out to be bad when they were copied.
    pub(crate) errors: u64,
}

/// A memslot that has the huge page, and where.
struct Member {
    memslot: Arc<Memslot>,
    range: PageRange,
}

/// Memslots that take part in the move; whatever happens they leave it.
struct Members {
    between: Arc<Move>,
    joined: KVec<Member>,
}

impl Members {
    /// All memslots that have the huge page.
    fn join(between: &Arc<Move>) -> Result<Self> {
        let mut this = Self {
            between: between.clone(),
            joined: KVec::new(),
        };
        let mut from = 0;
        while let Some((number, memslot)) = memory_error::next(between.files[0], from) {
            from = number + 1;
            let nr_pages = memslot.place.nr_pages;
            let range = memslot
                .backing
                .page_at(between.index, nr_pages)
                .and_then(|first| memslot.range(first, between.pages));
            let Some(range) = range else { continue };
            this.joined.reserve(1, GFP_KERNEL_ACCOUNT)?;
            memslot.know_errors(range)?;
            if memslot.join(range, between)? {
                this.joined
                    .push(Member { memslot, range }, GFP_KERNEL_ACCOUNT)?;
            }
        }
        Ok(this)
    }

    /// The bad huge page, which the move pins, and who had it mapped.
    fn bad(&self) -> Huge<'_> {
        let had_pin = |member: &&Member| member.memslot.had_pin();
        Huge {
            pinned: &self.between.bad,
            pins: 1 + self.joined.iter().filter(had_pin).count(),
        }
    }

    /// The fresh one, which the move pins, and every member.
    fn fresh(&self) -> Huge<'_> {
        Huge {
            pinned: &self.between.fresh,
            pins: 1 + self.joined.len(),
        }
    }

    /// Moves the next part; says whether there was one. `named` is the memslot that the caller named.
    fn move_part(&self, named: &Arc<Memslot>, total: &mut Replaced) -> bool {
        let _turn = self.between.turn.lock();
        let (mut part, mut bad) = (None, 0);
        for member in &self.joined {
            // All of them are equally far.
            if let Some((first, count, known)) = member.memslot.hold(PART) {
                part = Some((first, count));
                bad |= known;
            }
        }
        let Some((first, count)) = part else {
            return false;
        };
        for into in first..first + count {
            let is_bad = bad & (1 << (into - first)) != 0;
            if !is_bad && self.copy(into) {
                total.copied += 1;
                continue;
            }
            total.errors += u64::from(!is_bad);
            self.lose(into);
        }
        for member in &self.joined {
            let (lost, healed) = member.memslot.release();
            if Arc::ptr_eq(&member.memslot, named) {
                total.lost += lost;
                total.healed += healed;
            }
        }
        true
    }

    fn copy(&self, into: u64) -> bool {
        let from = self.between.bad.frame().add(into);
        self.between.fresh.frame().add(into).copy_mc(from)
    }

    /// A page on its way cannot be had: all learn of it who did not know.
    fn lose(&self, into: u64) {
        for member in &self.joined {
            let page = member.range.first() + into;
            // It takes a little memory. Nobody has the page meanwhile.
            while member.memslot.lose_on_the_way(page).is_err() {
                work::yield_now();
            }
        }
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        for member in &self.joined {
            member.memslot.leave();
        }
    }
}

/// What is in the caller's memfd: the fresh huge page, and after the exchange the bad one.
struct Spare<'a> {
    spot: Spot<'a>,
    /// It is to be taken out in the end: it was allocated for this, or it is the bad one.
    goes: bool,
}

impl<'a> Spare<'a> {
    /// Pins it, allocating it if it is a hole.
    fn new(spot: Spot<'a>) -> Result<(Self, Pinned)> {
        let order = spot.memfd.order();
        let goes = !spot.memfd.has_block(spot.index, order);
        let pinned = spot.memfd.pin(spot.index);
        // Where that failed it may be there all the same.
        let this = Self { spot, goes };
        match pinned {
            // One with an error is found out by the exchange.
            Ok((pinned, _)) => Ok((this, pinned)),
            // So says hugetlb if it has no free page.
            Err(e) if e == ENOSPC => Err(ENOMEM),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Spare<'_> {
    fn drop(&mut self) {
        if self.goes {
            self.spot.memfd.punch_huge(self.spot.index);
        }
    }
}

/// Replaces the huge page of a memslot that begins with page `first` by the one at `offset` bytes of `memfd`.
pub(crate) fn replace(
    memslot: &Arc<Memslot>,
    first: u64,
    memfd: &Memfd,
    offset: u64,
) -> Result<Replaced> {
    let backing = &memslot.backing;
    let (own, order) = (backing.memfd(), backing.order());
    let files = [own.identity(), memfd.identity()];
    let bytes = 1u64 << (order + PAGE_SHIFT as u32);
    let range = memslot.range(first, 1 << order).ok_or(EINVAL)?;
    let is_whole = backing.round_out(range) == (first, first + (1 << order));
    let end = offset.checked_add(bytes).ok_or(EINVAL)?;
    if order == 0
        || memfd.order() != order
        || files[0] == files[1]
        || !is_whole
        || offset % bytes != 0
        || end > memfd.size()
    {
        return Err(EINVAL);
    }
    let _turn = TURN.lock();
    let at = Spot {
        memfd: own,
        index: backing.offset() + first,
    };
    // A hole has no error.
    if !own.has_block(at.index, order) {
        return Err(ENXIO);
    }
    let (bad, has_error) = own.pin(at.index)?;
    if !has_error {
        return Err(ENXIO);
    }
    if memory_error::next(files[1], 0).is_some() {
        return Err(EBUSY);
    }
    let (mut spare, fresh) = Spare::new(Spot {
        memfd,
        index: offset >> PAGE_SHIFT,
    })?;
    let between = Move::new(files, at.index, 1 << order, bad, fresh)?;
    let _registered = Registered::new(&between)?;
    let members = Members::join(&between)?;
    let exchanged = Exchanged::new(members.bad(), at, members.fresh(), spare.spot)?;
    spare.goes = true;
    let mut total = Replaced::default();
    while members.move_part(memslot, &mut total) {
        work::yield_now();
    }
    // From here on others may use the fresh one. It must not be locked when a pin of it is dropped.
    drop(exchanged);
    drop(members);
    memslot.stats.replaced().add(1);
    Ok(total)
}

// SPDX-License-Identifier: GPL-2.0

//! Replacing a huge page that has memory errors by a fresh one, with the guest running.
//!
//! The fresh huge page comes from a memfd that the caller names, and is taken out of it: nobody else has it then. The bytes
//! follow part by part. While a part is on its way nobody has its pages, in any memslot; before, all have them in the bad
//! huge page, after that in the fresh one. So all see the same bytes at any time, no write is lost, and who needs a page
//! waits for one part. In the end the fresh huge page is put where the bad one is in the memslots' memfd: every mapping
//! of the memfd that is made from then on, and whoever is handed it, has it. Until then the memfd has the bad one, which
//! the kernel lets nobody map since the error; pread(2) sees there what was before.
//!
//! Punching the bad one out of the memfd and allocating anew would show zeros there for a moment, and leave a hole if no
//! huge page is to be had then. Letting memslots have pages of another memfd would leave all others on the bad one.
//!
//! A page whose bytes cannot be copied stays poisoned, in a good frame now; one whose content was still to come is not
//! lost.
//!
//! # Locks
//!
//! `TURN` first: one huge page is moved at a time. Under it those of each memslot are taken, one memslot at a time
//! (memslot.rs). A fault waits for a part with no lock at all.
//! Inode and folio locks are taken in hugetlb.c, where nothing else of ours is held but `TURN`: who allocates a huge page
//! waits for them under `pages`.

use crate::{
    ffi::{
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
        while let Some((number, memslot)) = memory_error::next(between.file, from) {
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

    /// How often they, and the move, pin the bad huge page.
    fn pins(&self) -> usize {
        let had_pin = |member: &&Member| member.memslot.had_pin();
        1 + self.joined.iter().filter(had_pin).count()
    }

    /// Moves the next part; says whether there was one. `named` is the memslot that the caller named.
    fn move_part(&self, named: &Arc<Memslot>, total: &mut Replaced) -> bool {
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
            // Nobody is to find there what the caller's huge page held before.
            self.between.fresh.frame().add(into).zero();
            self.lose(into);
        }
        for member in &self.joined {
            let (lost, healed) = member.memslot.release();
            if Arc::ptr_eq(&member.memslot, named) {
                total.lost += lost;
                total.healed += healed;
            }
        }
        self.between.arrived(first + count);
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

/// Allocates a huge page in a memfd, unless it is there, and takes it out.
fn take_fresh(memfd: &Memfd, index: u64) -> Result<Pinned> {
    let (fresh, _) = memfd.pin(index).map_err(|e| {
        // So says hugetlb if it has no free page.
        if e == ENOSPC {
            ENOMEM
        } else {
            e
        }
    })?;
    memfd.take_out(index, &fresh)?;
    Ok(fresh)
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
    let index = backing.offset() + first;
    // A hole has no error.
    if !own.has_block(index, order) {
        return Err(ENXIO);
    }
    let (bad, has_error) = own.pin(index)?;
    if !has_error {
        return Err(ENXIO);
    }
    if memory_error::next(files[1], 0).is_some() {
        return Err(EBUSY);
    }
    let fresh = take_fresh(memfd, offset >> PAGE_SHIFT)?;
    let between = Move::new(files[0], index, 1 << order, bad, fresh)?;
    let _registered = Registered::new(&between);
    let members = Members::join(&between)?;
    own.check_bad(index, &between.bad, members.pins())?;
    let mut total = Replaced::default();
    while members.move_part(memslot, &mut total) {
        work::yield_now();
    }
    own.put_in_place(index, &between.bad, &between.fresh);
    memslot.stats.replaced().add(1);
    Ok(total)
}

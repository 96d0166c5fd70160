// SPDX-License-Identifier: GPL-2.0

//! Claimants: who fills pages of a memslot past the module, by a mapping of the memfd or a device, and is to be the only one.
//! The locks are those of memslot.rs.
//!
//! A claimant is a file. When its last descriptor is closed, whatever the reason, all that it has claimed and not committed
//! is as before.

use super::Memslot;
use crate::{
    claims::Held,
    ffi::{
        file::{
            FileOps,
            RawFile, //
        },
        trace,
        vma::NewMapping,
        work, //
    },
    ioctl,
    pages::{
        Mode,
        Pages, //
    },
    rules::{
        claim::{
            runs,
            Act,
            Seen, //
        },
        queue::Owner,
        range::{
            ChunkPart,
            PageRange,
            CHUNK_PAGES,
            WORD_PAGES, //
        }, //
    },
};
use kernel::{
    bindings::POLLERR,
    fs::File,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{
        poll::PollTable,
        Arc,
        ArcBorrow, //
    },
    uaccess::{
        UserPtr,
        UserSliceWriter, //
    },
};

/// Who claims pages of a memslot.
pub(crate) struct Claimant {
    pub(crate) memslot: Arc<Memslot>,
    held: Arc<Held>,
}

impl Claimant {
    /// A file of a new one.
    pub(crate) fn file(memslot: Arc<Memslot>) -> Result<RawFile> {
        RawFile::with_data(|| {
            let held = Held::new()?;
            let this = Arc::new(Self { memslot, held }, GFP_KERNEL_ACCOUNT)?;
            let mut pages = this.memslot.pages.write();
            if pages.mode() == Mode::Removed {
                return Err(ENOENT);
            }
            pages.claims.enlist(&this.held)?;
            drop(pages);
            Ok(this)
        })
    }

    /// Does what a call is for with pages whose bits are in one word; says what they were.
    pub(crate) fn act(&self, act: Act, part: PageRange) -> Result<Seen> {
        self.memslot.act(&self.held, act, part)
    }
}

impl Memslot {
    fn act(&self, held: &Held, act: Act, part: PageRange) -> Result<Seen> {
        let at = part.first() % WORD_PAGES;
        let wanted = (u64::MAX >> (WORD_PAGES - part.count())) << at;
        let changes = self.changes.lock();
        let (seen, may_be_whole) = self.settled(|pages| {
            match (act, pages.mode()) {
                (Act::Claim, Mode::Removed) => return Err(ENOENT),
                (Act::Claim, Mode::Off) => return Err(ENXIO),
                // Whose memslot is gone, or not paged any more, has no claims any more.
                _ => (),
            }
            let seen = pages.seen(part.first(), held);
            match act {
                Act::Claim => {
                    let claimed = seen.done(act, wanted);
                    pages.claims.add(held, part.first(), claimed)?;
                    Ok((seen, false))
                }
                Act::Commit => self.commit(pages, &seen, part.first(), wanted),
                Act::Abandon => {
                    self.end(pages, part.first(), seen.over(wanted));
                    Ok((seen, false))
                }
            }
        })?;
        if may_be_whole {
            self.unmap_whole_blocks(part.first(), part.count());
        }
        drop(changes);
        Ok(seen)
    }

    /// Makes present what a claimant has filled; says whether a block may be whole by it.
    fn commit(&self, pages: &Pages, seen: &Seen, first: u64, wanted: u64) -> Result<(Seen, bool)> {
        let done = seen.done(Act::Commit, wanted);
        // Data, then bit; and the bit before the claim goes, so that nobody takes the page for what it was.
        for (at, count) in runs(done) {
            let part = part_of_word(first, at, count);
            let changed = pages.mark_present(part)?;
            self.stats.resolved().add(changed);
            let page = part.chunk * CHUNK_PAGES + part.first;
            trace::resolve(self.place.id, page, count, changed, 0);
        }
        self.end(pages, first, seen.over(wanted));
        Ok((*seen, done != 0 && pages.look(first).1 == u64::MAX))
    }

    /// The claims on pages, bits of the word of page `first`, are over; who waits for one goes on, to what it is now.
    fn end(&self, pages: &Pages, first: u64, over: u64) {
        for (at, count) in runs(over) {
            self.end_part(pages, part_of_word(first, at, count));
        }
    }

    fn end_part(&self, pages: &Pages, part: ChunkPart) {
        pages.claims.end(part);
        let first = part.chunk * CHUNK_PAGES + part.first;
        // Who enters the queue after this finds the claim gone, under the queue's lock.
        self.wake(first, first + (part.count - 1));
    }

    /// The claims on pages of a range are void. An event for such a page may have been read by somebody who left it to the
    /// claimant: who waits comes again, and makes another one. The caller has `changes`.
    pub(super) fn void_claims(&self, pages: &Pages, range: PageRange) {
        if pages.claims.is_empty() {
            return;
        }
        for part in range.chunks() {
            for claimed in pages.claims.claimed(part) {
                self.end_part(pages, claimed);
            }
        }
    }

    /// Gives up all that a claimant has, and the claimant.
    fn forget(&self, held: &Arc<Held>) {
        let mut from = 0;
        loop {
            let changes = self.changes.lock();
            let pages = self.pages.read();
            let Some((runs, next)) = held.next(from) else {
                break;
            };
            for part in runs {
                self.end_part(&pages, part);
            }
            from = next;
            drop(pages);
            drop(changes);
            work::yield_now();
        }
        self.pages.write().claims.delist(held);
    }
}

/// Pages of the word of page `first`, by their bits.
fn part_of_word(first: u64, at: u64, count: u64) -> ChunkPart {
    let in_chunk = first % CHUNK_PAGES;
    ChunkPart {
        chunk: first / CHUNK_PAGES,
        first: in_chunk - in_chunk % WORD_PAGES + at,
        count,
    }
}

impl FileOps for Claimant {
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: UserPtr) -> Result<isize> {
        ioctl::dispatch_claimant(this, cmd, arg)
    }

    fn read(_this: ArcBorrow<'_, Self>, _out: UserSliceWriter, _nonblock: bool) -> Result<usize> {
        Err(EINVAL)
    }

    fn poll(_this: ArcBorrow<'_, Self>, _file: &File, _table: &PollTable<'_>) -> u32 {
        POLLERR
    }

    fn mmap(_this: ArcBorrow<'_, Self>, _mapping: NewMapping<'_, Self>) -> Result {
        Err(ENODEV)
    }

    fn size(_this: ArcBorrow<'_, Self>) -> u64 {
        0
    }

    fn left_by(_this: ArcBorrow<'_, Self>, _reader: Owner) {}

    fn release(this: Arc<Self>) {
        this.memslot.forget(&this.held);
    }

    fn fdinfo(this: ArcBorrow<'_, Self>, m: &SeqFile) {
        let (mut claimed, mut from) = (0, 0);
        let pages = this.memslot.pages.read();
        while let Some((runs, next)) = this.held.next(from) {
            claimed += runs.map(|part| part.count).sum::<u64>();
            from = next;
        }
        drop(pages);
        seq_print!(m, "kdp-claims-of-slot:\t{}\n", this.memslot.place.id);
        seq_print!(m, "kdp-claimed-pages:\t{}\n", claimed);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The pages of one memslot: the state of each, and the folios that are pinned for them.
//!
//! All of it is under the memslot's `pages` lock (see memslot.rs). A fault reads the state and maps
//! the page under the lock for reading, so whoever has it for writing may change states, unmap, and
//! unpin what was unmapped: no fault is in between.
//!
//! Present bits are words shared with userspace, which sets bits at any time without a lock; only
//! *clearing* them is bound to the lock. They and the zero bits come in chunks of a page, allocated
//! when first needed, so an untouched memslot costs the same whatever its size.

use crate::{
    claims::{
        Claims,
        Held, //
    },
    ffi::{
        memfd::Pins,
        shared_page::{
            SharedPage,
            SharedWord, //
        },
        tree::Tree, //
    },
    moving::Moving,
    poison::Poison,
    rules::{
        bits::{
            self,
            Word, //
        },
        claim::Seen,
        range::{
            self,
            ChunkPart,
            PageRange,
            CHUNK_PAGES, //
        },
        touch::State, //
    },
    source::Source, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// What the pages are when no bit says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Demand paging is off: every page is present, and there are no bits.
    Off,
    /// Demand paging is on; a chunk that was never needed reads as `default` bits.
    On {
        /// Whether that means present.
        default: bool,
    },
    /// The memslot was removed.
    Removed,
}

/// The pages.
///
/// # Invariants
///
/// `present` and `zero` have chunks only while paging is on.
pub(crate) struct Pages {
    mode: Mode,
    present: Tree<SharedPage>,
    /// "Known to hold nothing". The present bit, if set, counts for more.
    zero: Tree<SharedPage>,
    /// Pinned folios by granule: the number of an allocation of the memfd, divided by [`PINS`].
    ///
    /// [`PINS`]: crate::ffi::memfd::PINS
    pub(crate) pins: Tree<Pins>,
    supply: Option<Supply>,
    /// Counts for more than all else.
    pub(crate) poison: Poison,
    /// To all but their claimants these are absent, unless they are present or poisoned.
    pub(crate) claims: Claims,
    /// What is going to be poisoned (lost.rs).
    closing: Option<PageRange>,
    /// A huge page that is being moved.
    moving: Option<KBox<Moving>>,
}

/// A source, and which absent pages it has the bytes of.
pub(crate) struct Supply {
    source: Arc<Source>,
    /// What a chunk that was never needed reads as.
    default: bool,
    has: Tree<SharedPage>,
}

impl Supply {
    /// Has all pages, or none yet.
    pub(crate) fn new(source: Arc<Source>, all: bool) -> Result<Self> {
        Ok(Self {
            source,
            default: all,
            has: Tree::new()?,
        })
    }

    /// Has these, too.
    pub(crate) fn add(&self, range: PageRange) -> Result {
        for part in range.chunks() {
            let has = Pages::chunk(&self.has, part.chunk, self.default)?;
            bits::set(has.words(), part);
        }
        Ok(())
    }

    fn remove(&self, part: ChunkPart) -> Result {
        if self.default || self.has.get(part.chunk as usize).is_some() {
            let has = Pages::chunk(&self.has, part.chunk, self.default)?;
            bits::clear_both(Some(has.words()), None, part);
        }
        Ok(())
    }
}

impl Pages {
    pub(crate) fn new(mode: Mode) -> Result<Self> {
        Ok(Self {
            mode,
            present: Tree::new()?,
            zero: Tree::new()?,
            pins: Tree::new()?,
            supply: None,
            poison: Poison::new()?,
            claims: Claims::new()?,
            closing: None,
            moving: None,
        })
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Starts over in another mode, with no bits, no claims and no source. The caller unmaps the bitmap. What is poisoned stays so
    /// as long as there is a memslot.
    pub(crate) fn restart(&mut self, mode: Mode) {
        if mode == Mode::Removed {
            self.poison.clear();
        }
        self.claims.end_all();
        self.mode = mode;
        self.present.clear();
        self.zero.clear();
        self.supply = None;
    }

    /// Where absent pages may be read from.
    #[inline]
    pub(crate) fn source(&self) -> Option<&Arc<Source>> {
        self.supply.as_ref().map(|supply| &supply.source)
    }

    /// What the source has.
    pub(crate) fn supply(&self) -> Option<&Supply> {
        self.supply.as_ref()
    }

    /// Replaces it; returns what was there, to be dropped without the lock.
    pub(crate) fn set_supply(&mut self, supply: Option<Supply>) -> Option<Supply> {
        core::mem::replace(&mut self.supply, supply)
    }

    fn words(tree: &Tree<SharedPage>, chunk: u64) -> Option<&[SharedWord]> {
        tree.get(chunk as usize).map(|page| &page.words()[..])
    }

    fn chunk(tree: &Tree<SharedPage>, chunk: u64, default: bool) -> Result<&SharedPage> {
        if tree.get(chunk as usize).is_none() {
            let page = KBox::new(SharedPage::new(default)?, GFP_KERNEL_ACCOUNT)?;
            // Another thread may have been faster: then its page counts.
            tree.insert(chunk as usize, page)?;
        }
        tree.get(chunk as usize).ok_or(ENOMEM)
    }

    /// The state of a page.
    #[inline]
    pub(crate) fn state(&self, page: u64) -> State {
        self.look(page).0
    }

    /// The state of a page, and the present bits of those in the same word.
    #[inline]
    pub(crate) fn look(&self, page: u64) -> (State, u64) {
        if self.poison.is_empty() {
            self.look_healthy(page)
        } else {
            self.look_poisoned(page)
        }
    }

    /// What is going to be poisoned.
    pub(crate) fn closing(&self) -> Option<PageRange> {
        self.closing
    }

    /// This is, or nothing any more.
    pub(crate) fn close(&mut self, range: Option<PageRange>) {
        self.closing = range;
    }

    /// The huge page that is being moved, if a page is of it.
    pub(crate) fn moving(&self, page: u64) -> Option<&Moving> {
        self.moving.as_deref().filter(|moving| moving.covers(page))
    }

    /// The huge page that is being moved.
    pub(crate) fn any_moving(&self) -> Option<&Moving> {
        self.moving.as_deref()
    }

    /// The same, to move on.
    pub(crate) fn any_moving_mut(&mut self) -> Option<&mut Moving> {
        self.moving.as_deref_mut()
    }

    /// This one is being moved from now on, or none; returns what was before.
    pub(crate) fn set_moving(&mut self, moving: Option<KBox<Moving>>) -> Option<KBox<Moving>> {
        core::mem::replace(&mut self.moving, moving)
    }

    /// Whether a page is poisoned, or going to be.
    pub(crate) fn is_lost(&self, page: u64) -> bool {
        let is_closing = |range: PageRange| (range.first()..=range.last()).contains(&page);
        self.closing.is_some_and(is_closing) || self.state(page) == State::Poisoned
    }

    /// Whether a page is present, also one that is poisoned besides.
    pub(crate) fn is_present_beneath(&self, page: u64) -> bool {
        self.look_healthy(page).0 == State::Present
    }

    /// Whether a page is to be filled with zeros before it can be present: also one that is poisoned, and may be healed.
    pub(crate) fn is_zero(&self, page: u64) -> bool {
        self.look_healthy(page).0 == State::Zero && !self.poison.is_bad(page)
    }

    /// The same, where there are poisoned pages: they are not present.
    #[cold]
    #[inline(never)]
    fn look_poisoned(&self, page: u64) -> (State, u64) {
        let (state, seen) = self.look_healthy(page);
        let state = if self.poison.has(page) {
            State::Poisoned
        } else {
            state
        };
        (state, self.healthy(page, seen))
    }

    /// The same, as if no page were poisoned.
    #[inline(always)]
    fn look_healthy(&self, page: u64) -> (State, u64) {
        let (chunk, word, bit) = range::locate(page);
        // Where there are bits, paging is on (type invariant).
        if let Some(words) = Self::words(&self.present, chunk) {
            let seen = words[word].load_acquire();
            if seen & bit != 0 {
                return (State::Present, seen);
            }
            if self.zero.is_empty() && self.supply.is_none() {
                return (State::Absent, seen);
            }
        }
        self.look_further(page)
    }

    /// The same, of a page that did not look present at the first look.
    #[inline(never)]
    fn look_further(&self, page: u64) -> (State, u64) {
        let Mode::On { default } = self.mode else {
            return if self.mode == Mode::Off {
                (State::Present, u64::MAX)
            } else {
                (State::Removed, 0)
            };
        };
        let all = if default { u64::MAX } else { 0 };
        let (chunk, word, bit) = range::locate(page);
        let present = || Self::words(&self.present, chunk);
        let seen = || present().map_or(all, |words| words[word].load_acquire());
        let first = seen();
        if first & bit != 0 {
            return (State::Present, first);
        }
        if !self.claims.is_empty() && self.claims.has(page) {
            return (State::Absent, first);
        }
        if Self::words(&self.zero, chunk).is_some_and(|w| bits::is_set(w, word, bit)) {
            return (State::Zero, first);
        }
        // It may have been zero, or claimed, and become present between the two looks: who sees that bit cleared sees
        // the present bit, which is set first, perhaps in a chunk that is new.
        let seen = seen();
        let is_sourced = |supply: &Supply| {
            Self::words(&supply.has, chunk)
                .map_or(supply.default, |words| bits::is_set(words, word, bit))
        };
        if seen & bit != 0 {
            (State::Present, seen)
        } else if self.supply.as_ref().is_some_and(is_sourced) {
            (State::Sourced, seen)
        } else {
            (State::Absent, seen)
        }
    }

    /// Those of the pages whose bits are in one word with a page's that are in the state "sourced", as such bits.
    pub(crate) fn sourced(&self, page: u64) -> u64 {
        let (Mode::On { default }, Some(supply)) = (self.mode, &self.supply) else {
            return 0;
        };
        let (chunk, word, _) = range::locate(page);
        let bits = |tree: &Tree<SharedPage>, default| match Self::words(tree, chunk) {
            Some(words) => words[word].load_acquire(),
            None if default => u64::MAX,
            None => 0,
        };
        let mut sourced = bits(&supply.has, supply.default) & !bits(&self.zero, false);
        if !self.claims.is_empty() {
            sourced &= !self.claims.word(page);
        }
        // After the zero bits and the claims, as in `look_further()`.
        sourced &= !bits(&self.present, default);
        if !self.poison.is_empty() {
            sourced &= !self.poison.word(page);
        }
        sourced
    }

    /// What the pages are whose bits are in one word with a page's, for a claimant.
    pub(crate) fn seen(&self, page: u64, held: &Held) -> Seen {
        let (chunk, word, _) = range::locate(page);
        let present = match (self.mode, Self::words(&self.present, chunk)) {
            (Mode::On { .. }, Some(words)) => words[word].load_acquire(),
            (Mode::On { default: false }, None) | (Mode::Removed, _) => 0,
            (Mode::On { default: true }, None) | (Mode::Off, _) => u64::MAX,
        };
        Seen {
            present,
            poisoned: self.poison.word(page),
            claimed: self.claims.word(page),
            mine: held.word(page),
        }
    }

    /// Whether every page of a range can be mapped.
    pub(crate) fn all_mappable(&self, range: PageRange) -> bool {
        self.all_present(range, true) && self.poison.first(range).is_none()
    }

    /// Whether the present bit of every page of a range is `value`.
    pub(crate) fn all_present(&self, range: PageRange, value: bool) -> bool {
        match self.mode {
            Mode::Off => value,
            Mode::Removed => false,
            Mode::On { default } => {
                range
                    .chunks()
                    .all(|part| match Self::words(&self.present, part.chunk) {
                        Some(words) => bits::all(words, part, value),
                        None => default == value,
                    })
            }
        }
    }

    /// The first page of a range that is poisoned, or whose present bit is clear.
    pub(crate) fn first_missing(&self, range: PageRange) -> Option<u64> {
        let missing = [self.poison.first(range), self.first_clear(range)];
        missing.into_iter().flatten().min()
    }

    fn first_clear(&self, range: PageRange) -> Option<u64> {
        let mut first = range.first();
        for part in range.chunks() {
            let found = match (self.mode, Self::words(&self.present, part.chunk)) {
                (Mode::On { .. }, Some(words)) => bits::first_clear(words, part),
                (Mode::On { default: false }, None) | (Mode::Removed, _) => Some(part.first),
                (Mode::On { default: true }, None) | (Mode::Off, _) => None,
            };
            if let Some(found) = found {
                return Some(first + (found - part.first));
            }
            first += part.count;
        }
        None
    }

    /// The page of the present bitmap that holds a chunk's bits, to map it; none when paging is off.
    pub(crate) fn bitmap_page(&self, chunk: u64) -> Result<Option<&SharedPage>> {
        match self.mode {
            Mode::On { default } => Self::chunk(&self.present, chunk, default).map(Some),
            Mode::Off | Mode::Removed => Ok(None),
        }
    }

    /// Makes pages present; returns how many were not. Data, then bit: whoever sees the bit sees what
    /// was written to the pages before.
    pub(crate) fn mark_present(&self, part: ChunkPart) -> Result<u64> {
        let Mode::On { default } = self.mode else {
            return Ok(0);
        };
        if default && self.present.get(part.chunk as usize).is_none() {
            return Ok(0);
        }
        let words = Self::chunk(&self.present, part.chunk, default)?.words();
        let changed = bits::set(words, part);
        if let Some(zero) = Self::words(&self.zero, part.chunk) {
            bits::clear_both(Some(zero), None, part);
        }
        Ok(changed)
    }

    /// Makes absent pages zero; returns how many were absent.
    pub(crate) fn mark_zero(&self, part: ChunkPart) -> Result<u64> {
        let Mode::On { default } = self.mode else {
            return Ok(0);
        };
        let present = Self::words(&self.present, part.chunk);
        if present.is_none() && default {
            return Ok(0);
        }
        let zero = Self::chunk(&self.zero, part.chunk, false)?.words();
        Ok(bits::set_unless(zero, present, part))
    }

    /// Makes pages absent; returns how many were not. The caller unmaps them before it gives up the
    /// lock, which is why this takes it for writing.
    pub(crate) fn mark_absent(&mut self, part: ChunkPart) -> Result<u64> {
        let Mode::On { default } = self.mode else {
            return Ok(0);
        };
        if default {
            Self::chunk(&self.present, part.chunk, default)?;
        }
        // From now on their bytes are where the caller put them.
        if let Some(supply) = &self.supply {
            supply.remove(part)?;
        }
        let present = Self::words(&self.present, part.chunk);
        let zero = Self::words(&self.zero, part.chunk);
        Ok(bits::clear_both(present, zero, part))
    }

    /// The first page from `from` on that is in the state zero.
    pub(crate) fn next_zero(&self, from: u64) -> Option<u64> {
        let mut page = from;
        loop {
            let chunk = self.zero.next((page / CHUNK_PAGES) as usize, usize::MAX)? as u64;
            let start = chunk * CHUNK_PAGES;
            let zero = Self::words(&self.zero, chunk)?;
            // Without a chunk of present bits none is set: else nothing could have become zero.
            let present = Self::words(&self.present, chunk);
            let from = page.saturating_sub(start);
            if let Some(found) = bits::first_set_unless(zero, present, from) {
                return Some(start + found);
            }
            page = start + CHUNK_PAGES;
        }
    }

    /// The present bit of a page that is going to be filled, where paging is on.
    #[inline]
    pub(crate) fn present_bit(&self, page: u64) -> Result<PresentBit<'_>> {
        let Mode::On { default } = self.mode else {
            return Err(ENXIO);
        };
        let (chunk, word, bit) = range::locate(page);
        let words = match self.present.get(chunk as usize) {
            Some(words) => words,
            None => Self::chunk(&self.present, chunk, default)?,
        };
        Ok(PresentBit {
            word: &words.words()[word],
            bit,
        })
    }

    /// Of the present bits of the word of a page those that are not poisoned.
    #[inline]
    pub(crate) fn healthy(&self, page: u64, present: u64) -> u64 {
        if self.poison.is_empty() {
            present
        } else {
            present & !self.poison.word(page)
        }
    }

    /// A page that was zero has been filled: it is present now.
    pub(crate) fn filled(&self, page: u64) -> Result {
        let (chunk, word, bit) = range::locate(page);
        if !matches!(self.mode, Mode::On { .. }) {
            return Ok(());
        }
        self.present_bit(page)?.set();
        if let Some(zero) = Self::words(&self.zero, chunk) {
            zero[word].clear(bit);
        }
        Ok(())
    }
}

/// The present bit of a page.
pub(crate) struct PresentBit<'a> {
    word: &'a SharedWord,
    bit: u64,
}

impl PresentBit<'_> {
    /// The bit of a page in the same word.
    pub(crate) fn beside(&self, page: u64) -> Self {
        Self {
            word: self.word,
            bit: range::locate(page).2,
        }
    }

    /// Whether it is set.
    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        self.word.load_acquire() & self.bit != 0
    }

    /// Sets it, after the page's bytes were written; returns the bits around it.
    #[inline]
    pub(crate) fn set(&self) -> u64 {
        self.word.set_release(self.bit) | self.bit
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Pages that somebody has claimed, to fill them past the module.
//!
//! A claim is beside a page's other state: to all but its claimant the page is absent, and what it was before counts
//! again when the claim is over. A page has one claimant at most, and is neither present nor poisoned when it is claimed;
//! to poison it ends the claim.

use super::{
    bits::{
        ones,
        Word, //
    },
    range::{
        ChunkPart,
        WORD_PAGES, //
    },
};

/// What a call for claimed pages made of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// What the call was for.
    Done,
    /// It was present.
    Present,
    /// It is poisoned.
    Lost,
    /// Somebody has claimed it already.
    Claimed,
    /// The caller has no claim on it, or no longer.
    Void,
}

/// What pages are, as bits of one word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Their present bits.
    pub present: u64,
    /// They are poisoned.
    pub poisoned: u64,
    /// Somebody has claimed them.
    pub claimed: u64,
    /// The caller has.
    pub mine: u64,
}

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// To claim.
    Claim,
    /// To make present what the caller has filled.
    Commit,
    /// To give claims up.
    Abandon,
}

impl Seen {
    /// What becomes of the page of a bit.
    pub fn fate(&self, act: Act, bit: u64) -> Fate {
        let is = |word: u64| word & bit != 0;
        match act {
            _ if is(self.poisoned) => Fate::Lost,
            Act::Claim if is(self.present) => Fate::Present,
            Act::Claim if is(self.claimed) => Fate::Claimed,
            Act::Claim => Fate::Done,
            _ if !is(self.mine) => Fate::Void,
            // Userspace may have set the bit by hand.
            Act::Commit if is(self.present) => Fate::Present,
            Act::Commit | Act::Abandon => Fate::Done,
        }
    }

    /// For which of the pages that are wanted the call does what it is for.
    pub fn done(&self, act: Act, wanted: u64) -> u64 {
        ones(wanted)
            .filter(|&at| self.fate(act, 1 << at) == Fate::Done)
            .fold(0, |bits, at| bits | (1 << at))
    }

    /// Whose claims are over by a call that ends claims, whatever became of them.
    pub fn over(&self, wanted: u64) -> u64 {
        self.mine & wanted
    }
}

/// Takes the lowest run of bits that are set out of a word: its first bit and its length.
fn take_run(word: &mut u64) -> Option<(u64, u64)> {
    if *word == 0 {
        return None;
    }
    let first = word.trailing_zeros();
    let count = (*word >> first).trailing_ones();
    *word &= !((u64::MAX >> (u64::BITS - count)) << first);
    Some((u64::from(first), u64::from(count)))
}

/// The runs of bits that are set, each by its first bit and its length.
pub fn runs(word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut left = word;
    core::iter::from_fn(move || take_run(&mut left))
}

/// The runs of pages of a part whose bit has a value, in order. A run may go on in the next one.
///
/// A type of its own, as a chain of adapters has a symbol name that is too long for objtool.
pub struct PartRuns<'a, W> {
    words: &'a [W],
    /// What is left of the part.
    part: ChunkPart,
    set: bool,
    /// The bits of `word` that are left.
    found: u64,
    word: u64,
}

impl<'a, W: Word> PartRuns<'a, W> {
    fn new(words: &'a [W], part: ChunkPart, set: bool) -> Self {
        Self {
            words,
            part,
            set,
            found: 0,
            word: 0,
        }
    }
}

impl<W: Word> Iterator for PartRuns<'_, W> {
    type Item = ChunkPart;

    fn next(&mut self) -> Option<ChunkPart> {
        loop {
            if let Some((at, count)) = take_run(&mut self.found) {
                return Some(ChunkPart {
                    chunk: self.part.chunk,
                    first: self.word * WORD_PAGES + at,
                    count,
                });
            }
            let (i, mask) = self.part.take_word()?;
            let word = self.words[i].load_acquire();
            self.found = mask & if self.set { word } else { !word };
            self.word = i as u64;
        }
    }
}

/// The pages of a part whose bits are set.
pub fn claimed<W: Word>(
    claimed: Option<&[W]>,
    part: ChunkPart,
) -> impl Iterator<Item = ChunkPart> + '_ {
    let empty = ChunkPart { count: 0, ..part };
    match claimed {
        Some(words) => PartRuns::new(words, part, true),
        None => PartRuns::new(&[], empty, true),
    }
}

/// The pages of a part whose bits are clear: all of it where there are no bits.
pub fn free<W: Word>(
    claimed: Option<&[W]>,
    part: ChunkPart,
) -> impl Iterator<Item = ChunkPart> + '_ {
    let (all, rest) = match claimed {
        Some(words) => (None, Some(PartRuns::new(words, part, false))),
        None => (Some(part), None),
    };
    all.into_iter().chain(rest.into_iter().flatten())
}

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

/// The runs of bits that are set, each by its first and its length.
pub fn runs(word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut left = word;
    core::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros();
        let count = (left >> first).trailing_ones();
        left &= !((u64::MAX >> (u64::BITS - count)) << first);
        Some((u64::from(first), u64::from(count)))
    })
}

/// The runs of pages of a part whose bit is `value`, in order. A run may go on in the next.
fn runs_of<W: Word>(
    words: &[W],
    part: ChunkPart,
    value: bool,
) -> impl Iterator<Item = ChunkPart> + '_ {
    part.words().flat_map(move |(i, mask)| {
        let word = words[i].load_acquire();
        let found = mask & if value { word } else { !word };
        runs(found).map(move |(at, count)| ChunkPart {
            chunk: part.chunk,
            first: i as u64 * WORD_PAGES + at,
            count,
        })
    })
}

/// The pages of a part whose bits are set.
pub fn claimed<W: Word>(
    claimed: Option<&[W]>,
    part: ChunkPart,
) -> impl Iterator<Item = ChunkPart> + '_ {
    claimed
        .into_iter()
        .flat_map(move |words| runs_of(words, part, true))
}

/// The pages of a part whose bits are clear: all of it where there are no bits.
pub fn free<W: Word>(
    claimed: Option<&[W]>,
    part: ChunkPart,
) -> impl Iterator<Item = ChunkPart> + '_ {
    let all = claimed.is_none().then_some(part);
    let rest = claimed
        .into_iter()
        .flat_map(move |words| runs_of(words, part, false));
    all.into_iter().chain(rest)
}

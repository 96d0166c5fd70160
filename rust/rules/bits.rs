// SPDX-License-Identifier: GPL-2.0

//! One state bit per page, in words that userspace may change at the same time.
//!
//! Orderings. A bit that becomes 1 says "the page's bytes are there": whoever sets it does so with
//! release ordering after writing the bytes, whoever maps the page has read the bit with acquire
//! ordering ("data, then bit"). A bit that becomes 0 carries no data; the lock under which the page
//! is unmapped afterwards orders it against the faults.

use super::range::{
    ChunkPart,
    CHUNK_PAGES,
    WORD_PAGES, //
};

/// A word of bits that several parties change.
pub trait Word {
    /// Reads the word with acquire ordering.
    fn load_acquire(&self) -> u64;
    /// Sets the bits of `mask` with release ordering and returns the word as it was.
    fn set_release(&self, mask: u64) -> u64;
    /// Clears the bits of `mask` and returns the word as it was.
    fn clear(&self, mask: u64) -> u64;
}

/// The places of the bits of a word that are set.
pub fn ones(word: u64) -> impl Iterator<Item = u64> {
    let mut left = word;
    core::iter::from_fn(move || {
        let at = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
        left &= left - 1;
        Some(at)
    })
}

/// Whether a bit is set.
pub fn is_set<W: Word>(words: &[W], word: usize, bit: u64) -> bool {
    words[word].load_acquire() & bit != 0
}

/// Sets the bits of a part; returns how many this call changed.
pub fn set<W: Word>(words: &[W], part: ChunkPart) -> u64 {
    part.words()
        .map(|(i, mask)| u64::from((mask & !words[i].set_release(mask)).count_ones()))
        .sum()
}

/// The first page of a chunk, from `from` on, whose bit is set in `words` and, if there is such a bitmap,
/// clear in `unless`.
pub fn first_set_unless<W: Word>(words: &[W], unless: Option<&[W]>, from: u64) -> Option<u64> {
    let part = ChunkPart {
        chunk: 0,
        first: from,
        count: CHUNK_PAGES.checked_sub(from)?,
    };
    part.words().find_map(|(i, mask)| {
        let word = mask & words[i].load_acquire() & !unless.map_or(0, |u| u[i].load_acquire());
        (word != 0).then(|| i as u64 * WORD_PAGES + u64::from(word.trailing_zeros()))
    })
}

/// The first page of a part, counted from the chunk's, whose bit is clear.
pub fn first_clear<W: Word>(words: &[W], part: ChunkPart) -> Option<u64> {
    part.words().find_map(|(i, mask)| {
        let clear = mask & !words[i].load_acquire();
        (clear != 0).then(|| i as u64 * WORD_PAGES + u64::from(clear.trailing_zeros()))
    })
}

/// Clears the bits of a part in two bitmaps; returns of how many pages this call changed either.
pub fn clear_both<W: Word>(a: Option<&[W]>, b: Option<&[W]>, part: ChunkPart) -> u64 {
    let clear = |words: Option<&[W]>, i: usize, mask| words.map_or(0, |w| w[i].clear(mask));
    part.words()
        .map(|(i, mask)| {
            let was = clear(a, i, mask) | clear(b, i, mask);
            u64::from((mask & was).count_ones())
        })
        .sum()
}

/// Whether every bit of a part is `value`.
pub fn all<W: Word>(words: &[W], part: ChunkPart, value: bool) -> bool {
    let wanted = |mask| if value { mask } else { 0 };
    part.words()
        .all(|(i, mask)| words[i].load_acquire() & mask == wanted(mask))
}

/// Sets in `words` the bits of a part that are clear in `unless`, if there is such a bitmap; returns
/// how many this call changed.
pub fn set_unless<W: Word>(words: &[W], unless: Option<&[W]>, part: ChunkPart) -> u64 {
    part.words()
        .map(|(i, mask)| {
            let mask = mask & !unless.map_or(0, |u| u[i].load_acquire());
            u64::from((mask & !words[i].set_release(mask)).count_ones())
        })
        .sum()
}

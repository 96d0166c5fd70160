// SPDX-License-Identifier: GPL-2.0

//! Ranges of pages, and how they fall into the chunks that hold their state bits.

/// Pages whose bits one 4 KiB chunk of a bitmap holds.
pub const CHUNK_PAGES: u64 = 4096 * 8;

/// Pages whose bits one word holds.
pub const WORD_PAGES: u64 = 64;

/// Words of one chunk.
pub const CHUNK_WORDS: usize = (CHUNK_PAGES / WORD_PAGES) as usize;

/// A range of pages of a memslot.
///
/// # Invariants
///
/// It is not empty, and `first + count` does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    first: u64,
    count: u64,
}

impl PageRange {
    /// Checks a range that a caller named against a memslot of `limit` pages.
    pub fn new(first: u64, count: u64, limit: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        if count == 0 || end > limit {
            return None;
        }
        // INVARIANT: Both were just checked.
        Some(Self { first, count })
    }

    /// The first page.
    pub fn first(self) -> u64 {
        self.first
    }

    /// How many pages.
    pub fn count(self) -> u64 {
        self.count
    }

    /// The last page.
    pub fn last(self) -> u64 {
        self.first + (self.count - 1)
    }

    /// The parts of the range, one for every chunk that it touches, in order.
    pub fn chunks(self) -> impl Iterator<Item = ChunkPart> {
        let mut next = self.first;
        let end = self.first + self.count;
        core::iter::from_fn(move || {
            if next == end {
                return None;
            }
            let chunk = next / CHUNK_PAGES;
            let stop = end.min((chunk + 1) * CHUNK_PAGES);
            let part = ChunkPart {
                chunk,
                first: next % CHUNK_PAGES,
                count: stop - next,
            };
            next = stop;
            Some(part)
        })
    }

    /// The largest range of whole granules, of `1 << order` pages, inside this one, once `offset`
    /// pages are added: as granule numbers, first and one past the last. May be empty.
    pub fn whole_granules(self, offset: u64, order: u32) -> (u64, u64) {
        let first = (offset + self.first).div_ceil(1 << order);
        let end = (offset + self.first + self.count) >> order;
        (first, end.max(first))
    }
}

/// The part of a [`PageRange`] that falls into one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPart {
    /// The chunk's number.
    pub chunk: u64,
    /// The first page, counted from the chunk's.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl ChunkPart {
    /// The words that the part touches, each with the mask of its bits.
    pub fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let mut left = self;
        core::iter::from_fn(move || left.take_word())
    }

    /// Takes the pages of one word from the beginning of the part: the word, and the mask of their
    /// bits.
    pub fn take_word(&mut self) -> Option<(usize, u64)> {
        if self.count == 0 {
            return None;
        }
        let word = self.first / WORD_PAGES;
        let at = self.first % WORD_PAGES;
        let ones = self.count.min(WORD_PAGES - at);
        self.first += ones;
        self.count -= ones;
        Some((word as usize, (u64::MAX >> (WORD_PAGES - ones)) << at))
    }
}

/// The chunk, the word in it and the bit in that of a page.
pub fn locate(page: u64) -> (u64, usize, u64) {
    let in_chunk = page % CHUNK_PAGES;
    (
        page / CHUNK_PAGES,
        (in_chunk / WORD_PAGES) as usize,
        1 << (in_chunk % WORD_PAGES),
    )
}

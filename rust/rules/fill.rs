// SPDX-License-Identifier: GPL-2.0

//! Which neighbours of a page a fault fills together with it, where a file has their bytes.
//!
//! The pages of the same word that are present already say how many: who has touched a neighbourhood often is
//! going to touch more of it. A fault fills no more than half as many pages as are present there then, so
//! - up to three touches of the 64 pages of a word fill nothing else;
//! - of what is filled in a word there are never more than five pages that nobody has touched for one that
//!   somebody has, and twelve touches may do for all of it;
//! - one fault fills at most [`MOST`] pages.

use super::range::WORD_PAGES;

/// The pages that one fault fills at most, itself among them: who touches a page waits for the others.
pub const MOST: u64 = 16;

/// The pages to be present after a fault of `page`, as bits of the word that holds its own: the aligned group
/// around it. `present` are those that are, `page` among them; at most `limit` pages, a power of two, are wanted.
/// 0 if the page shall stay alone.
pub fn group(present: u64, page: u64, limit: u64) -> u64 {
    let most = (u64::from(present.count_ones()) / 2).min(MOST).min(limit);
    if most < 2 {
        return 0;
    }
    let size = 1 << most.ilog2();
    let first = (page % WORD_PAGES) & !(size - 1);
    ((1 << size) - 1) << first
}

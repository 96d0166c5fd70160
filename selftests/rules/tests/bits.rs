// SPDX-License-Identifier: GPL-2.0

//! rust/rules/bits.rs, against two plain lists of booleans.

use crate::host::HostWord;
use crate::ranges::part;
use kdp_rules::rules::bits::{all, clear_both, first_set_unless, is_set, ones, set, set_unless};
use kdp_rules::rules::range::{locate, ChunkPart, CHUNK_PAGES, CHUNK_WORDS};
use proptest::prelude::*;

/// One of the two bitmaps of a chunk.
#[derive(Clone, Copy, Debug)]
enum Map {
    A,
    B,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Set(Map),
    /// In A and in B, where that is true.
    Clear(bool, bool),
    /// In A, where B is clear, or everywhere.
    SetUnless(bool),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Set(Map::A)),
        Just(Change::Set(Map::B)),
        (any::<bool>(), any::<bool>()).prop_map(|(a, b)| Change::Clear(a, b)),
        any::<bool>().prop_map(Change::SetUnless),
    ]
}

struct Both {
    words: [Vec<HostWord>; 2],
    model: [Vec<bool>; 2],
}

impl Both {
    fn new() -> Self {
        Self {
            words: [(); 2].map(|()| (0..CHUNK_WORDS).map(|_| HostWord::new(0)).collect()),
            model: [(); 2].map(|()| vec![false; CHUNK_PAGES as usize]),
        }
    }

    /// Does a change to both; returns what the rules counted, and what the model did.
    fn apply(&mut self, change: Change, part: ChunkPart) -> (u64, u64) {
        let [words_a, words_b] = &self.words;
        let [a, b] = &mut self.model;
        let pages = part.first as usize..(part.first + part.count) as usize;
        let mut expected = 0;
        let counted = match change {
            Change::Set(map) => {
                let (words, model) = match map {
                    Map::A => (words_a, a),
                    Map::B => (words_b, b),
                };
                for page in pages {
                    expected += u64::from(!model[page]);
                    model[page] = true;
                }
                set(words, part)
            }
            Change::Clear(in_a, in_b) => {
                for page in pages {
                    expected += u64::from(in_a && a[page] || in_b && b[page]);
                    a[page] &= !in_a;
                    b[page] &= !in_b;
                }
                let a = in_a.then_some(&words_a[..]);
                let b = in_b.then_some(&words_b[..]);
                clear_both(a, b, part)
            }
            Change::SetUnless(heed_b) => {
                for page in pages {
                    let sets = !(heed_b && b[page]);
                    expected += u64::from(sets && !a[page]);
                    a[page] |= sets;
                }
                set_unless(words_a, heed_b.then_some(&words_b[..]), part)
            }
        };
        (counted, expected)
    }

    /// The first page that is set in A and, if B counts, clear there: by the rules, and by the model.
    fn first(&self, heed_b: bool, from: u64) -> (Option<u64>, Option<u64>) {
        let [words_a, words_b] = &self.words;
        let [a, b] = &self.model;
        let found = first_set_unless(words_a, heed_b.then_some(&words_b[..]), from);
        let sought = |&page: &u64| a[page as usize] && !(heed_b && b[page as usize]);
        (found, (from..CHUNK_PAGES).find(sought))
    }

    fn bit(&self, map: usize, page: u64) -> bool {
        let (chunk, word, bit) = locate(page);
        assert_eq!(chunk, 0);
        is_set(&self.words[map], word, bit)
    }
}

/// A part, and it with a page more or less at either end: where an answer is most easily wrong.
fn around(part: ChunkPart) -> impl Iterator<Item = ChunkPart> {
    let (first, end) = (part.first, part.first + part.count);
    let ends = [end - 1, end, end + 1];
    [first.wrapping_sub(1), first, first + 1]
        .into_iter()
        .flat_map(move |first| ends.map(|end| (first, end)))
        .filter(|(first, end)| first < end && *end <= CHUNK_PAGES)
        .map(|(first, end)| ChunkPart {
            chunk: 0,
            first,
            count: end - first,
        })
}

proptest! {
    #[test]
    fn ones_are_the_places_of_set_bits(word in any::<u64>()) {
        let expected: Vec<u64> = (0..64).filter(|at| (word >> at) & 1 != 0).collect();
        prop_assert_eq!(ones(word).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn changes_and_counts_are_exact(
        changes in prop::collection::vec((change(), part()), 1..16)
    ) {
        let mut both = Both::new();
        for (change, part) in changes {
            let (counted, expected) = both.apply(change, part);
            prop_assert_eq!(counted, expected, "the count of {:?} {:?}", change, part);
            for map in 0..2 {
                let wrong = (0..CHUNK_PAGES)
                    .find(|&page| both.bit(map, page) != both.model[map][page as usize]);
                prop_assert_eq!(wrong, None, "after {:?} {:?}", change, part);
                let end = part.first + part.count;
                for from in [0, part.first, part.first + 1, end - 1, end, end + 1] {
                    let (found, expected) = both.first(map == 1, from);
                    prop_assert_eq!(found, expected, "from {} after {:?}", from, change);
                }
                for part in around(part) {
                    let pages = part.first as usize..(part.first + part.count) as usize;
                    for value in [false, true] {
                        prop_assert_eq!(
                            all(&both.words[map], part, value),
                            both.model[map][pages.clone()].iter().all(|&bit| bit == value),
                            "all {} of {:?}", value, part
                        );
                    }
                }
            }
        }
    }

    /// Invariant 2: a second place changes nothing and says so.
    #[test]
    fn a_second_place_changes_nothing_and_says_so(part in part()) {
        let both = Both::new();
        prop_assert_eq!(set(&both.words[0], part), part.count);
        prop_assert_eq!(set(&both.words[0], part), 0);
        prop_assert_eq!(clear_both(Some(&both.words[0][..]), None, part), part.count);
        prop_assert_eq!(set(&both.words[0], part), part.count);
    }
}

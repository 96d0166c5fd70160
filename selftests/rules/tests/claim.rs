// SPDX-License-Identifier: GPL-2.0

//! rust/rules/claim.rs

use crate::host::HostWord;
use crate::ranges::part;
use kdp_rules::rules::claim::{claimed, free, runs, Act, Fate, Seen};
use kdp_rules::rules::range::{ChunkPart, CHUNK_WORDS};
use proptest::prelude::*;

/// One page, as a plain machine has it: what must be true of it at any time is asserted after each step.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    present: bool,
    poisoned: bool,
    /// Of two claimants.
    owner: Option<usize>,
}

#[derive(Clone, Debug)]
enum Step {
    Act(usize, Act, u64),
    SetByHand(u64),
    Absent(u64),
    Poison(u64),
    Heal(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![Just(Act::Claim), Just(Act::Commit), Just(Act::Abandon)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..2_usize, act(), any::<u64>()).prop_map(|(who, act, wanted)| Step::Act(who, act, wanted)),
        1 => (0..64_u64).prop_map(|at| Step::SetByHand(1 << at)),
        1 => any::<u64>().prop_map(Step::Absent),
        1 => (0..64_u64).prop_map(|at| Step::Poison(1 << at)),
        1 => any::<u64>().prop_map(Step::Heal),
    ]
}

/// The bits as the module keeps them: a common word, and one of each claimant.
#[derive(Default)]
struct Word {
    present: u64,
    poisoned: u64,
    claimed: u64,
    own: [u64; 2],
}

impl Word {
    fn seen(&self, who: usize) -> Seen {
        Seen {
            present: self.present,
            poisoned: self.poisoned,
            claimed: self.claimed,
            mine: self.own[who],
        }
    }

    /// rust/claims.rs: Claims::end.
    fn end(&mut self, bits: u64) {
        self.claimed &= !bits;
        self.own.iter_mut().for_each(|own| *own &= !bits);
    }
}

fn expected(page: &Page, who: usize, act: Act) -> Fate {
    match act {
        _ if page.poisoned => Fate::Lost,
        Act::Claim if page.present => Fate::Present,
        Act::Claim if page.owner.is_some() => Fate::Claimed,
        Act::Claim => Fate::Done,
        _ if page.owner != Some(who) => Fate::Void,
        Act::Commit if page.present => Fate::Present,
        _ => Fate::Done,
    }
}

proptest! {
    /// Whatever two claimants do, and others beside them: a page has one at most, who is told of each page what became of
    /// it, and no page becomes present by a claim that is void.
    #[test]
    fn a_page_has_one_claimant(steps in prop::collection::vec(step(), 1..60)) {
        let mut word = Word::default();
        let mut pages = [Page::default(); 64];
        for step in steps {
            let on = |bits: u64, pages: &mut [Page; 64], f: fn(&mut Page)| {
                (0..64).filter(|at| (bits >> at) & 1 != 0).for_each(|at| f(&mut pages[at]));
            };
            match step {
                Step::Act(who, act, wanted) => {
                    let seen = word.seen(who);
                    for (at, page) in pages.iter_mut().enumerate() {
                        let fate = seen.fate(act, 1 << at);
                        prop_assert_eq!(fate, expected(page, who, act), "page {} {:?}", at, page);
                        let is_done = (seen.done(act, wanted) >> at) & 1 != 0;
                        prop_assert_eq!(is_done, (wanted >> at) & 1 != 0 && fate == Fate::Done);
                        if (wanted >> at) & 1 == 0 {
                            continue;
                        }
                        match act {
                            Act::Claim if is_done => page.owner = Some(who),
                            Act::Commit if is_done => *page = Page { present: true, ..Page::default() },
                            Act::Commit | Act::Abandon if page.owner == Some(who) => page.owner = None,
                            _ => (),
                        }
                    }
                    let done = seen.done(act, wanted);
                    match act {
                        Act::Claim => {
                            word.claimed |= done;
                            word.own[who] |= done;
                        }
                        Act::Commit => {
                            word.present |= done;
                            word.end(seen.over(wanted));
                        }
                        Act::Abandon => word.end(seen.over(wanted)),
                    }
                }
                Step::SetByHand(bit) => {
                    word.present |= bit;
                    on(bit, &mut pages, |page| page.present = true);
                }
                Step::Absent(bits) => {
                    word.present &= !bits;
                    word.end(bits);
                    on(bits, &mut pages, |page| (page.present, page.owner) = (false, None));
                }
                Step::Poison(bits) => {
                    word.poisoned |= bits;
                    word.end(bits);
                    on(bits, &mut pages, |page| (page.poisoned, page.owner) = (true, None));
                }
                Step::Heal(bits) => {
                    word.poisoned &= !bits;
                    on(bits, &mut pages, |page| page.poisoned = false);
                }
            }
            prop_assert_eq!(word.own[0] & word.own[1], 0, "two have claimed a page");
            prop_assert_eq!(word.own[0] | word.own[1], word.claimed);
            prop_assert_eq!(word.claimed & word.poisoned, 0, "a poisoned page is claimed");
        }
    }

    /// Runs are the bits that are set, in order, and none touches the next.
    #[test]
    fn runs_are_the_bits(word in any::<u64>(), mask in any::<u64>()) {
        let word = word & mask;
        let mut seen = 0_u64;
        let mut end = None;
        for (first, count) in runs(word) {
            prop_assert!(count > 0 && first + count <= 64);
            prop_assert!(end.is_none_or(|end| first > end));
            (first..first + count).for_each(|at| seen |= 1 << at);
            end = Some(first + count);
        }
        prop_assert_eq!(seen, word);
    }

    /// Claimed pages and free ones are all pages of a part, once each, in order.
    #[test]
    fn claimed_and_free_are_all(part in part(), set in prop::collection::vec((0..CHUNK_WORDS, any::<u64>()), 0..20)) {
        let mut bits = vec![0; CHUNK_WORDS];
        set.into_iter().for_each(|(at, word)| bits[at] |= word);
        let words: Vec<HostWord> = bits.iter().copied().map(HostWord::new).collect();
        let pages = |parts: &mut dyn Iterator<Item = ChunkPart>| -> Vec<u64> {
            parts.flat_map(|part| part.first..part.first + part.count).collect()
        };
        let all = part.first..part.first + part.count;
        let is_set = |page: &u64| (bits[(page / 64) as usize] >> (page % 64)) & 1 != 0;
        prop_assert_eq!(
            pages(&mut claimed(Some(&words[..]), part)),
            all.clone().filter(is_set).collect::<Vec<_>>()
        );
        prop_assert_eq!(
            pages(&mut free(Some(&words[..]), part)),
            all.clone().filter(|page| !is_set(page)).collect::<Vec<_>>()
        );
        prop_assert_eq!(pages(&mut free::<HostWord>(None, part)), all.collect::<Vec<_>>());
        prop_assert_eq!(claimed::<HostWord>(None, part).count(), 0);
    }
}

#[test]
fn runs_of_all_and_nothing() {
    assert_eq!(runs(0).count(), 0);
    assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
    assert_eq!(
        runs((1 << 63) | 0b1101).collect::<Vec<_>>(),
        [(0, 1), (2, 2), (63, 1)]
    );
}

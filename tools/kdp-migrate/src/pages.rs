//! A set of pages: a bitmap in the layout of KVM's dirty log, which is also what goes over the wire.

use kvm_demand_paging::PageRange;

const BITS: u64 = u64::BITS as u64;

/// A set of the pages below a limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageSet {
    words: Vec<u64>,
    len: u64,
    count: u64,
}

impl PageSet {
    /// No page of `len`.
    pub fn new(len: u64) -> Self {
        Self {
            words: vec![0; len.div_ceil(BITS) as usize],
            len,
            count: 0,
        }
    }

    /// Every page of `len`.
    pub fn full(len: u64) -> Self {
        let mut set = Self::new(len);
        set.insert_range(PageRange::new(0, len));
        set
    }

    /// The pages that may be in it are those below this.
    pub fn limit(&self) -> u64 {
        self.len
    }

    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether no page is in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether this page is in it. A page beyond the limit is not.
    pub fn contains(&self, page: u64) -> bool {
        page < self.len && self.words[(page / BITS) as usize] & (1 << (page % BITS)) != 0
    }

    /// Put a page in; whether it was not there. A page beyond the limit is not put in.
    pub fn insert(&mut self, page: u64) -> bool {
        self.insert_range(PageRange::page(page)) == 1
    }

    /// Take a page out; whether it was there.
    pub fn remove(&mut self, page: u64) -> bool {
        self.remove_range(PageRange::page(page)) == 1
    }

    /// Put pages in; how many were not there.
    pub fn insert_range(&mut self, range: PageRange) -> u64 {
        let before = self.count;
        self.each_word(range, |word, mask| *word |= mask);
        self.count - before
    }

    /// Take pages out; how many were there.
    pub fn remove_range(&mut self, range: PageRange) -> u64 {
        let before = self.count;
        self.each_word(range, |word, mask| *word &= !mask);
        before - self.count
    }

    /// Put in the pages of another set. Pages beyond the limit are left out.
    pub fn union(&mut self, other: &Self) {
        for (index, bits) in other.words.iter().enumerate() {
            self.merge_word(index as u64, *bits);
        }
    }

    /// Take out the pages of another set.
    pub fn subtract(&mut self, other: &Self) {
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word &= !bits;
        }
        self.recount();
    }

    /// Leave only pages of another set in.
    pub fn intersect(&mut self, other: &Self) {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        for (word, bits) in self.words.iter_mut().zip(others) {
            *word &= bits;
        }
        self.recount();
    }

    /// Take all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// Put in the pages whose bits are set: bit n of word `index` is page `index * 64 + n`. This is how KVM's dirty log
    /// is merged. Bits beyond the limit are left out.
    pub fn merge_word(&mut self, index: u64, bits: u64) {
        let Some(first) = index.checked_mul(BITS).filter(|first| *first < self.len) else {
            return;
        };
        let bits = bits & mask(0, (self.len - first).min(BITS));
        let word = &mut self.words[index as usize];
        self.count += u64::from((bits & !*word).count_ones());
        *word |= bits;
    }

    /// The bitmap, in words as [`Self::merge_word`] takes them.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The first run of pages from `from` on, of at most `max` pages.
    pub fn next_run(&self, from: u64, max: u64) -> Option<PageRange> {
        let first = self.find(from, true)?;
        let end = self.find(first, false).unwrap_or(self.len);
        (max > 0).then(|| PageRange::new(first, (end - first).min(max)))
    }

    /// Its pages, in runs.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(at, u64::MAX)?;
            at = run.end();
            Some(run)
        })
    }

    fn find(&self, from: u64, wanted: bool) -> Option<u64> {
        let mut before = mask(0, from % BITS);
        for index in from / BITS..self.words.len() as u64 {
            let word = self.words[index as usize];
            let hits = if wanted { word } else { !word } & !before;
            if hits != 0 {
                let page = index * BITS + u64::from(hits.trailing_zeros());
                return (page < self.len).then_some(page);
            }
            before = 0;
        }
        None
    }

    fn each_word(&mut self, range: PageRange, change: impl Fn(&mut u64, u64)) {
        let end = range.end().min(self.len);
        let mut at = range.first;
        while at < end {
            let first = at / BITS * BITS;
            let stop = end.min(first + BITS);
            let word = &mut self.words[(at / BITS) as usize];
            let before = word.count_ones();
            change(word, mask(at - first, stop - first));
            self.count = self.count - u64::from(before) + u64::from(word.count_ones());
            at = stop;
        }
    }

    fn recount(&mut self) {
        self.count = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
    }
}

/// Bits `from` up to, and without, `to`; both at most 64.
fn mask(from: u64, to: u64) -> u64 {
    let below = |bit: u64| match bit {
        BITS.. => u64::MAX,
        bit => (1 << bit) - 1,
    };
    below(to) & !below(from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u64),
        Remove(u64, u64),
        Word(u64, u64),
        Union(Vec<u64>),
        Subtract(Vec<u64>),
        Intersect(Vec<u64>),
    }

    fn op() -> impl Strategy<Value = Op> {
        let pages = || prop::collection::vec(0u64..250, 0..40);
        prop_oneof![
            (0u64..250, 0u64..100).prop_map(|(first, count)| Op::Insert(first, count)),
            (0u64..250, 0u64..100).prop_map(|(first, count)| Op::Remove(first, count)),
            (0u64..5, any::<u64>()).prop_map(|(index, bits)| Op::Word(index, bits)),
            pages().prop_map(Op::Union),
            pages().prop_map(Op::Subtract),
            pages().prop_map(Op::Intersect),
        ]
    }

    fn set_of(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(250);
        pages.iter().for_each(|page| {
            set.insert(*page);
        });
        set
    }

    proptest! {
        #[test]
        fn it_is_a_set(len in 0u64..200, ops in prop::collection::vec(op(), 0..30), from in 0u64..220, max in 0u64..100) {
            let (mut set, mut model) = (PageSet::new(len), BTreeSet::new());
            for op in ops {
                match op {
                    Op::Insert(first, count) => {
                        let new = (first..(first + count).min(len)).filter(|page| model.insert(*page)).count();
                        prop_assert_eq!(set.insert_range(PageRange::new(first, count)), new as u64);
                    }
                    Op::Remove(first, count) => {
                        let gone = (first..first + count).filter(|page| model.remove(page)).count();
                        prop_assert_eq!(set.remove_range(PageRange::new(first, count)), gone as u64);
                    }
                    Op::Word(index, bits) => {
                        set.merge_word(index, bits);
                        model.extend((0..64).filter(|bit| bits & (1 << bit) != 0).map(|bit| index * 64 + bit).filter(|page| *page < len));
                    }
                    Op::Union(pages) => {
                        set.union(&set_of(&pages));
                        model.extend(pages.into_iter().filter(|page| *page < len));
                    }
                    Op::Subtract(pages) => {
                        set.subtract(&set_of(&pages));
                        model.retain(|page| !pages.contains(page));
                    }
                    Op::Intersect(pages) => {
                        set.intersect(&set_of(&pages));
                        model.retain(|page| pages.contains(page));
                    }
                }
                prop_assert_eq!(set.count(), model.len() as u64);
            }
            let found: Vec<u64> = set.runs().flat_map(|run| run.iter()).collect();
            prop_assert_eq!(&found, &model.iter().copied().collect::<Vec<_>>());
            let run = set.next_run(from, max);
            let first = model.range(from..).next().copied();
            prop_assert_eq!(run.map(|run| run.first), first.filter(|_| max > 0));
            if let Some(run) = run {
                prop_assert!(run.count <= max && run.iter().all(|page| model.contains(&page)));
                prop_assert!(run.count == max || !model.contains(&run.end()));
            }
        }
    }
}

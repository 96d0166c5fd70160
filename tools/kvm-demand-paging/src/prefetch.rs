//! Which pages to fetch when one is missing.

use crate::PageRange;

/// How many runs through memory are told apart.
const RUNS: usize = 4;

/// The last pages that no run led to: each may be the first of one. Four runs that begin at the same time leave
/// room for what is touched besides.
const LAST: usize = 8;

/// Pages of the block that one huge mapping covers.
const BLOCK: u64 = 512;

/// No page has this number.
const NONE: u64 = u64::MAX;

/// Windows that grow while a vCPU goes through its memory in order, and stay at one page where it does not.
///
/// Each vCPU has its own. It knows several runs at a time, upwards and downwards, by the page behind the last
/// window of each. A run that has gone on twice gets windows of 2, 4, 8 pages and so on. They end at multiples of
/// 512 pages, so that windows of 512 are whole blocks, which one huge entry maps. Pages are numbered by whoever
/// asks, from a page that is aligned like the memory: guest frame numbers, or pages of the memslot.
///
/// The page that is waited for comes first; the rest of the window is fetched with it, and mapped with it by
/// [`pre_fault`](crate::pre_fault): a guest that reads on in order exits once a window. What the vCPU has asked for
/// is there at once, but if its thread fetches the rest before it enters the guest again, that takes as long as
/// one window takes at most: that is what the maximum bounds. With 512 pages it is 2 MiB.
///
/// ```
/// use kvm_demand_paging::{PageRange, PrefetchWindow};
///
/// let mut window = PrefetchWindow::new(64);
/// assert_eq!(window.fault(100), PageRange::page(100));
/// assert_eq!(window.fault(101), PageRange::page(101));   // it may be chance
/// assert_eq!(window.fault(102), PageRange::new(102, 2)); // a run: twice as many
/// assert_eq!(window.fault(7), PageRange::page(7));       // somewhere else
/// assert_eq!(window.fault(104), PageRange::new(104, 4)); // the run goes on
/// ```
#[derive(Clone, Debug)]
pub struct PrefetchWindow {
    runs: [Run; RUNS],
    last: [u64; LAST],
    /// Which of `last` is replaced next.
    oldest: usize,
    /// Faults of runs.
    hits: u64,
    max: u64,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    /// The page at which it goes on.
    next: u64,
    upwards: bool,
    /// Of its last window, had no block ended.
    pages: u64,
    /// When it went on last, in `hits`.
    used: u64,
}

impl PrefetchWindow {
    /// Windows of at most `max` pages; with 1 nothing is fetched that was not asked for.
    pub fn new(max: u64) -> Self {
        let none = Run {
            next: NONE,
            upwards: true,
            pages: 1,
            used: 0,
        };
        Self {
            runs: [none; RUNS],
            last: [NONE; LAST],
            oldest: 0,
            hits: 0,
            max: max.max(1),
        }
    }

    /// A vCPU needs this page: which pages to fetch. The page itself is the first or the last of them. Whoever asks
    /// cuts it at the memslot's ends.
    #[inline]
    pub fn fault(&mut self, page: u64) -> PageRange {
        // A guest without order comes here for every page: it pays for a look at twelve numbers.
        if self.max > 1 && page != NONE {
            if let Some(run) = self.runs.iter().position(|run| run.next == page) {
                return self.go_on(run, page);
            }
            let is_beside = |last: &u64| last.abs_diff(page) == 1;
            match self.last.iter().position(is_beside) {
                Some(first) => self.begin(first, page),
                None => {
                    self.last[self.oldest] = page;
                    self.oldest = (self.oldest + 1) % LAST;
                }
            }
        }
        PageRange::page(page)
    }

    /// Two faults beside each other, which may be chance.
    #[cold]
    fn begin(&mut self, first: usize, page: u64) {
        self.hits += 1;
        let upwards = self.last[first] < page;
        self.last[first] = NONE;
        let new = Run {
            next: match upwards {
                true => page + 1,
                false => page.wrapping_sub(1),
            },
            upwards,
            pages: 1,
            used: self.hits,
        };
        if let Some(run) = self.runs.iter_mut().min_by_key(|run| run.used) {
            *run = new;
        }
    }

    fn go_on(&mut self, run: usize, page: u64) -> PageRange {
        self.hits += 1;
        let run = &mut self.runs[run];
        run.used = self.hits;
        run.pages = run.pages.saturating_mul(2).min(self.max);
        if run.upwards {
            let end = page.saturating_add(run.pages);
            let end = match end & !(BLOCK - 1) {
                boundary if boundary > page => boundary,
                _ => end,
            };
            run.next = end;
            PageRange::from(page..end)
        } else {
            let first = page.saturating_sub(run.pages - 1);
            let first = match first.next_multiple_of(BLOCK) {
                boundary if boundary <= page => boundary,
                _ => first,
            };
            run.next = first.wrapping_sub(1);
            PageRange::from(first..page + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_sequential_guest_takes_a_small_fraction_of_the_exits() {
        let mut window = PrefetchWindow::new(64);
        let (mut page, mut exits) = (0, 0);
        while page < 65_536 {
            page = window.fault(page).end();
            exits += 1;
        }
        assert!(exits < 65_536 / 60, "{exits} exits");
    }

    #[test]
    fn a_run_comes_to_whole_blocks_upwards() {
        let mut window = PrefetchWindow::new(BLOCK);
        let (mut page, mut small) = (100, 0);
        while window.fault(page) != PageRange::new(page, BLOCK) {
            small += 1;
            page = match window.runs.iter().map(|run| run.next).min() {
                Some(next) if next != NONE => next,
                _ => page + 1,
            };
            assert!(small < 20, "no whole block up to page {page}");
        }
        assert_eq!(page % BLOCK, 0);
        for block in 1..100 {
            let page = page + block * BLOCK;
            assert_eq!(window.fault(page), PageRange::new(page, BLOCK));
        }
    }

    #[test]
    fn a_run_comes_to_whole_blocks_downwards_and_stops_at_page_0() {
        let mut window = PrefetchWindow::new(BLOCK);
        let (mut page, mut exits, mut last) = (9999, 0, PageRange::page(0));
        loop {
            last = match window.fault(page) {
                range if range.contains(page) && range.end() == page + 1 => range,
                other => panic!("page {page}: {other:?} after {last:?}"),
            };
            exits += 1;
            match last.first.checked_sub(1) {
                Some(next) => page = next,
                None => break,
            }
        }
        assert_eq!(last, PageRange::new(0, BLOCK));
        assert!(exits < 32, "{exits} exits");
    }

    #[test]
    fn the_last_page_of_all_is_a_page() {
        for max in [1, 64] {
            let mut window = PrefetchWindow::new(max);
            for page in [u64::MAX - 2, u64::MAX - 1, u64::MAX, u64::MAX] {
                assert_eq!(window.fault(page), PageRange::page(page));
            }
        }
    }

    #[test]
    fn four_interleaved_runs_are_each_recognised_among_other_faults() {
        const PAGES: u64 = 8192;
        let mut window = PrefetchWindow::new(BLOCK);
        // Two upwards, two downwards, far from each other.
        let mut at = [0, 1 << 20, (2 << 20) + PAGES - 1, (3 << 20) + PAGES - 1];
        let ends = [PAGES, (1 << 20) + PAGES, (2 << 20) - 1, (3 << 20) - 1];
        let (mut exits, mut noise) = (0, 5 << 20);
        while at != ends {
            for run in 0..4 {
                if at[run] == ends[run] {
                    continue;
                }
                let range = window.fault(at[run]);
                at[run] = if run < 2 {
                    range.end()
                } else {
                    range.first - 1
                };
                exits += 1;
                noise += 1000;
                assert_eq!(window.fault(noise), PageRange::page(noise));
            }
        }
        assert!(exits < 4 * 40, "{exits} exits for 4 runs of {PAGES} pages");
    }

    #[test]
    fn runs_that_have_ended_make_room() {
        let mut window = PrefetchWindow::new(BLOCK);
        for run in 0..3 * RUNS as u64 {
            for page in 0..4 {
                window.fault((run << 20) + page);
            }
        }
        let mut at: [u64; RUNS] = std::array::from_fn(|run| (run as u64 + 1) << 40);
        let begin = at;
        for _ in 0..20 {
            at = at.map(|page| window.fault(page).end());
        }
        for (at, begin) in at.into_iter().zip(begin) {
            assert!(at - begin > BLOCK, "{} pages of a run", at - begin);
        }
    }

    proptest! {
        /// A random guest loses nothing: what it did not ask for is fetched only where three of its faults were for
        /// pages that follow each other.
        #[test]
        fn other_patterns_fetch_one_page(pages in prop::collection::vec(0..10_000u64, 1..200)) {
            let mut window = PrefetchWindow::new(BLOCK);
            let mut before: Vec<PageRange> = Vec::new();
            for page in pages {
                let range = window.fault(page);
                let follows = |at: u64| before.iter().any(|b| b.contains(at));
                let chain = |step: fn(u64, u64) -> Option<u64>| {
                    step(page, 1).is_some_and(follows) && step(page, 2).is_some_and(follows)
                };
                prop_assert!(
                    range.count == 1 || chain(u64::checked_sub) || chain(u64::checked_add),
                    "{range:?} for page {page}"
                );
                before.push(range);
            }
        }

        /// The page is in the window, at the end where the run comes from; windows are bounded and cross no block's
        /// end.
        #[test]
        fn windows_are_what_they_should_be(
            max in 0..=BLOCK,
            start in 5000..20_000u64,
            up in any::<bool>(),
            steps in 1..60usize,
        ) {
            let mut window = PrefetchWindow::new(max);
            let mut page = start;
            for _ in 0..steps {
                let range = window.fault(page);
                prop_assert!((1..=max.max(1)).contains(&range.count));
                prop_assert_eq!(if up { range.first } else { range.end() - 1 }, page);
                prop_assert_eq!(range.first / BLOCK, (range.end() - 1) / BLOCK);
                let next = if up { Some(range.end()) } else { range.first.checked_sub(1) };
                let Some(next) = next else { break };
                page = next;
            }
        }
    }
}

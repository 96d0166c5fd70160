//! Pages that somebody waits for at the destination.

use crate::{lock, PageSet};
use hdrhistogram::Histogram;
use kvm_demand_paging::{coalesce, PageRange};
use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

/// The longest latency that is told from longer ones: 10 minutes.
const LONGEST_US: u64 = 600_000_000;

/// Where vCPUs and waiters tell of pages that they miss. A clone is the same one.
#[derive(Clone)]
pub struct Misses(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    // Pages that are here: asked for too late.
    have: PageSet,
    wanted: HashMap<u64, Want>,
    // Of those, pages that are to be asked for.
    fresh: Vec<u64>,
    closed: bool,
    faults: u64,
    latency: Option<Histogram<u64>>,
}

struct Want {
    since: Instant,
    // When it was asked for last, over the connection that there is.
    asked: Option<Instant>,
    // Somebody touched it.
    fault: bool,
}

impl State {
    fn fault_took(&mut self, time: Duration) {
        if let Some(latency) = &mut self.latency {
            latency.saturating_record((time.as_micros() as u64).max(1));
        }
    }
}

impl Misses {
    /// For a guest of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                have: PageSet::new(pages),
                wanted: HashMap::new(),
                fresh: Vec::new(),
                closed: false,
                faults: 0,
                latency: Histogram::new_with_bounds(1, LONGEST_US, 3).ok(),
            }),
            changed: Condvar::new(),
        }))
    }

    /// Somebody touched this page, and it is absent. It does not wait. To tell of a page again, or of one that has come
    /// meanwhile, does nothing.
    pub fn miss(&self, page: u64) {
        let mut state = lock(&self.0.state);
        if page >= state.have.limit() || state.have.contains(page) || state.closed {
            return;
        }
        if state.wanted.contains_key(&page) {
            return;
        }
        let since = Instant::now();
        let fault = true;
        state.wanted.insert(
            page,
            Want {
                since,
                asked: None,
                fault,
            },
        );
        state.faults += 1;
        state.fresh.push(page);
        self.0.changed.notify_all();
    }

    /// Ask for these pages, which are needed but were not touched: they are no faults.
    pub fn want(&self, pages: PageRange) {
        let mut state = lock(&self.0.state);
        if state.closed {
            return;
        }
        let since = Instant::now();
        for page in pages.first..pages.end().min(state.have.limit()) {
            if state.have.contains(page) || state.wanted.contains_key(&page) {
                continue;
            }
            let fault = false;
            state.wanted.insert(
                page,
                Want {
                    since,
                    asked: None,
                    fault,
                },
            );
            state.fresh.push(page);
        }
        self.0.changed.notify_all();
    }

    /// Ask for pages that are not here, `max` at most, if nothing else is asked for.
    pub(crate) fn want_rest(&self, max: u64) {
        {
            let state = lock(&self.0.state);
            if !state.wanted.is_empty() || state.have.count() == state.have.limit() {
                return;
            }
        }
        let mut left = max;
        for run in self.absent(max as usize) {
            let count = run.count.min(left);
            self.want(PageRange::new(run.first, count));
            left -= count;
        }
    }

    /// Somebody has waited for so long for what [`Self::want`] had asked for: a fault.
    pub fn waited(&self, time: Duration) {
        let mut state = lock(&self.0.state);
        state.faults += 1;
        state.fault_took(time);
    }

    /// Whether something is to be asked for; it waits for that, at most for so long.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let mut state = lock(&self.0.state);
        if state.fresh.is_empty() && !state.closed {
            state = match self.0.changed.wait_timeout(state, patience) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        !state.fresh.is_empty()
    }

    /// Pages that are to be asked for, at most `max` ranges.
    pub(crate) fn take(&self, max: usize) -> Vec<PageRange> {
        let mut state = lock(&self.0.state);
        let count = state.fresh.len().min(max);
        let mut pages: Vec<u64> = state.fresh.drain(..count).collect();
        let now = Instant::now();
        pages.retain(|page| match state.wanted.get_mut(page) {
            Some(want) => want.asked.replace(now).is_none(),
            None => false,
        });
        // A few pages at a time, all of which somebody waits for: their order does not matter.
        coalesce(&mut pages)
    }

    /// What was asked for is to be asked for again.
    pub(crate) fn again(&self) {
        let mut state = lock(&self.0.state);
        state.fresh = state.wanted.keys().copied().collect();
        state.wanted.values_mut().for_each(|want| want.asked = None);
        self.0.changed.notify_all();
    }

    /// These pages are here from the beginning. Who told of one of them was late.
    pub(crate) fn begin_with(&self, here: &PageSet) {
        let mut state = lock(&self.0.state);
        state.have.union(here);
        state.wanted.retain(|page, _| !here.contains(*page));
    }

    /// Pages that are here.
    pub(crate) fn have(&self) -> PageSet {
        lock(&self.0.state).have.clone()
    }

    /// Which of these pages are not here.
    pub(crate) fn arriving(&self, pages: PageRange) -> Vec<PageRange> {
        let state = lock(&self.0.state);
        let mut absent: Vec<u64> = pages
            .iter()
            .filter(|page| !state.have.contains(*page))
            .collect();
        coalesce(&mut absent)
    }

    /// These pages are placed: who waits for them goes on.
    pub(crate) fn came(&self, pages: PageRange) {
        let mut state = lock(&self.0.state);
        state.have.insert_range(pages);
        for page in pages.iter() {
            let Some(want) = state.wanted.remove(&page) else {
                continue;
            };
            if want.fault {
                state.fault_took(want.since.elapsed());
            }
        }
    }

    /// These are absent again.
    pub(crate) fn gone(&self, pages: PageRange) {
        lock(&self.0.state).have.remove_range(pages);
    }

    /// How many pages are here.
    pub(crate) fn count(&self) -> u64 {
        lock(&self.0.state).have.count()
    }

    pub(crate) fn has(&self, pages: PageRange) -> Vec<PageRange> {
        let state = lock(&self.0.state);
        let mut here: Vec<u64> = pages
            .iter()
            .filter(|page| state.have.contains(*page))
            .collect();
        coalesce(&mut here)
    }

    /// Runs of pages that are not here, at most `max`.
    pub(crate) fn absent(&self, max: usize) -> Vec<PageRange> {
        let state = lock(&self.0.state);
        let mut absent = PageSet::full(state.have.limit());
        absent.subtract(&state.have);
        let runs = absent.runs().take(max).collect();
        runs
    }

    /// For how long the page that was asked for first has not come; and the page that has been wanted longest.
    pub(crate) fn unanswered(&self) -> (Option<Duration>, Option<(u64, Duration)>) {
        let state = lock(&self.0.state);
        let asked = state.wanted.values().filter_map(|want| want.asked).min();
        let oldest = state.wanted.iter().min_by_key(|(_, want)| want.since);
        (
            asked.map(|asked| asked.elapsed()),
            oldest.map(|(page, want)| (*page, want.since.elapsed())),
        )
    }

    /// Nobody asks for anything any more.
    pub(crate) fn close(&self) {
        lock(&self.0.state).closed = true;
        self.0.changed.notify_all();
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.0.state).closed
    }

    /// How many pages were missed, and how long they took: p50, p99, the longest.
    pub(crate) fn latency(&self) -> (u64, [u64; 3]) {
        let state = lock(&self.0.state);
        let of = |latency: &Histogram<u64>| {
            [
                latency.value_at_quantile(0.5),
                latency.value_at_quantile(0.99),
                latency.max(),
            ]
        };
        (state.faults, state.latency.as_ref().map_or([0; 3], of))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_asked_for_once_until_it_is_to_be_asked_again() {
        let misses = Misses::new(10);
        for page in [3, 4, 3, 99] {
            misses.miss(page);
        }
        assert_eq!(misses.take(9), [PageRange::new(3, 2)]);
        misses.miss(3);
        assert!(misses.take(9).is_empty());
        misses.came(PageRange::page(3));
        misses.again();
        assert_eq!(misses.take(9), [PageRange::page(4)]);
        misses.miss(3);
        assert!(misses.take(9).is_empty(), "it is here");
        assert_eq!(misses.unanswered().1.map(|(page, _)| page), Some(4));
        misses.came(PageRange::page(4));
        assert_eq!(misses.unanswered(), (None, None));
        assert_eq!(
            misses.absent(9),
            [PageRange::new(0, 3), PageRange::new(5, 5)]
        );
        assert_eq!(
            misses.arriving(PageRange::new(2, 4)),
            [PageRange::page(2), PageRange::page(5)]
        );
        assert_eq!(misses.has(PageRange::new(2, 4)), [PageRange::new(3, 2)]);
        let (faults, [p50, _, max]) = misses.latency();
        assert!(faults == 2 && p50 >= 1 && max >= p50);
    }

    #[test]
    fn the_rest_is_asked_for_some_at_a_time_and_again() {
        let misses = Misses::new(10);
        misses.came(PageRange::new(1, 3));
        misses.want_rest(4);
        let first = [PageRange::page(0), PageRange::new(4, 3)];
        assert_eq!(misses.take(9), first);
        misses.came(PageRange::page(0));
        misses.want_rest(4);
        assert!(misses.take(9).is_empty(), "some have not come yet");
        misses.again();
        assert_eq!(misses.take(9), first[1..]);
        misses.came(PageRange::new(4, 3));
        misses.want_rest(4);
        assert_eq!(misses.take(9), [PageRange::new(7, 3)]);
        assert_eq!(misses.latency().0, 0, "nobody has waited");
    }

    #[test]
    fn what_is_here_from_the_beginning_is_not_asked_for() {
        let misses = Misses::new(10);
        let mut here = PageSet::new(10);
        here.insert_range(PageRange::new(2, 3));
        [1, 2, 5].into_iter().for_each(|page| misses.miss(page));
        misses.begin_with(&here);
        misses.miss(3);
        assert_eq!(misses.take(9), [PageRange::page(1), PageRange::page(5)]);
        assert_eq!(misses.have(), here);
        misses.again();
        assert_eq!(misses.take(9), [PageRange::page(1), PageRange::page(5)]);
    }
}

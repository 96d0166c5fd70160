//! What a handler has done.

use crate::Who;
use hdrhistogram::Histogram;
use std::{
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex, MutexGuard, PoisonError,
    },
    time::{Duration, Instant},
};

/// The longest latency that is told from longer ones.
const LONGEST_US: u64 = 600_000_000;

/// Pages by who touched them first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Touched {
    /// KVM, to map them for a guest.
    pub guest: u64,
    /// A copy in the kernel: KVM's own access, vhost, a system call.
    pub kernel: u64,
    /// A process, from user mode.
    pub user: u64,
    /// vCPU threads with fault exits, through [`Handler::fetch`](super::Handler::fetch).
    pub exit: u64,
    /// Somebody that this version does not know.
    pub unknown: u64,
}

/// What a handler has done. Counts are of pages of 4096 bytes unless they say something else.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Report {
    /// Pages of all memslots that are served.
    pub pages: u64,
    /// Pages of those that are present now, whoever made them so.
    pub pages_present: u64,
    /// Pages that were fetched and placed, zero pages among them.
    pub pages_fetched: u64,
    /// Of those, pages because somebody touched them.
    pub pages_on_demand: u64,
    /// Of those, pages in the background: nobody waited for them when they came. How many of them are never
    /// touched is not known, so this is the most that can have been fetched in vain.
    pub pages_in_background: u64,
    /// Of all fetched pages, those of zeros.
    pub pages_zero: u64,
    /// Pages that came when they were present already, and were left as they are.
    pub pages_too_late: u64,
    /// Times that the source could not read a page.
    pub pages_failed: u64,
    /// Touched pages by who touched them.
    pub touched: Touched,
    /// Events that were read.
    pub events: u64,
    /// Of those, events that an earlier reader had begun on.
    pub events_redelivered: u64,
    /// Of those, events whose page was present already.
    pub events_already_present: u64,
    /// Bytes that came from the source, with what the protocol adds.
    pub bytes_received: u64,
    /// Bytes that were placed.
    pub bytes_placed: u64,
    /// Times that a connection to the source was made again.
    pub reconnects: u64,
    /// From a touch's event to the end of its wait: the median, in microseconds.
    pub fetch_p50_us: u64,
    /// The same, the 99th percentile.
    pub fetch_p99_us: u64,
    /// The same, the longest.
    pub fetch_max_us: u64,
    /// Time from the handler's start to the first touch, in milliseconds.
    pub first_fault_ms: Option<f64>,
    /// Time since the handler's start, in milliseconds.
    pub elapsed_ms: f64,
    /// Whether the background has nothing left to fetch.
    pub complete: bool,
}

/// The counters behind a [`Report`].
pub(super) struct Stats {
    start: Instant,
    first_fault: Mutex<Option<Duration>>,
    latency: Mutex<Histogram<u64>>,
    pub(super) on_demand: AtomicU64,
    pub(super) in_background: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) too_late: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) events: AtomicU64,
    pub(super) redelivered: AtomicU64,
    pub(super) already_present: AtomicU64,
    guest: AtomicU64,
    kernel: AtomicU64,
    user: AtomicU64,
    exit: AtomicU64,
    unknown: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Statistics are worth reading after a panic elsewhere, too.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Stats {
    pub(super) fn new() -> Result<Self, String> {
        let latency =
            Histogram::new_with_bounds(1, LONGEST_US, 3).map_err(|error| error.to_string())?;
        Ok(Self {
            start: Instant::now(),
            first_fault: Mutex::new(None),
            latency: Mutex::new(latency),
            on_demand: AtomicU64::new(0),
            in_background: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            too_late: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            events: AtomicU64::new(0),
            redelivered: AtomicU64::new(0),
            already_present: AtomicU64::new(0),
            guest: AtomicU64::new(0),
            kernel: AtomicU64::new(0),
            user: AtomicU64::new(0),
            exit: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }

    /// Somebody touched an absent page; `None` is a vCPU's exit.
    pub(super) fn touched(&self, who: Option<Who>) {
        lock(&self.first_fault).get_or_insert_with(|| self.start.elapsed());
        let counter = match who {
            Some(Who::Guest) => &self.guest,
            Some(Who::Kernel) => &self.kernel,
            Some(Who::User) => &self.user,
            Some(Who::Unknown) => &self.unknown,
            None => &self.exit,
        };
        add(counter, 1);
    }

    /// Waits that began at these moments have ended.
    pub(super) fn waited(&self, since: impl Iterator<Item = Instant>) {
        let mut latency = lock(&self.latency);
        for since in since {
            latency.saturating_record((since.elapsed().as_micros() as u64).max(1));
        }
    }

    /// What the counters say; what they do not know is left at zero.
    pub(super) fn report(&self) -> Report {
        let latency = lock(&self.latency);
        let millis = |time: Duration| time.as_micros() as f64 / 1000.0;
        let fetched = get(&self.on_demand) + get(&self.in_background);
        Report {
            pages_fetched: fetched,
            pages_on_demand: get(&self.on_demand),
            pages_in_background: get(&self.in_background),
            pages_zero: get(&self.zero),
            pages_too_late: get(&self.too_late),
            pages_failed: get(&self.failed),
            touched: Touched {
                guest: get(&self.guest),
                kernel: get(&self.kernel),
                user: get(&self.user),
                exit: get(&self.exit),
                unknown: get(&self.unknown),
            },
            events: get(&self.events),
            events_redelivered: get(&self.redelivered),
            events_already_present: get(&self.already_present),
            bytes_placed: fetched * crate::PAGE_SIZE as u64,
            fetch_p50_us: latency.value_at_quantile(0.5),
            fetch_p99_us: latency.value_at_quantile(0.99),
            fetch_max_us: latency.max(),
            first_fault_ms: lock(&self.first_fault).map(millis),
            elapsed_ms: millis(self.start.elapsed()),
            ..Report::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_percentiles() {
        let stats = Stats::new().unwrap();
        assert_eq!(stats.report().first_fault_ms, None);
        stats.touched(Some(Who::Guest));
        stats.touched(None);
        add(&stats.on_demand, 2);
        add(&stats.in_background, 3);
        let now = Instant::now();
        let ago = |ms| now.checked_sub(Duration::from_millis(ms)).unwrap();
        stats.waited((1..=100).map(ago));
        let report = stats.report();
        assert_eq!((report.touched.guest, report.touched.exit), (1, 1));
        assert_eq!((report.pages_fetched, report.bytes_placed), (5, 5 * 4096));
        assert!(
            (45_000..60_000).contains(&report.fetch_p50_us),
            "{}",
            report.fetch_p50_us
        );
        assert!(
            (95_000..120_000).contains(&report.fetch_p99_us),
            "{}",
            report.fetch_p99_us
        );
        assert!(report.first_fault_ms.is_some());
    }
}

//! How many pages to fetch when one is missing.

/// A window that grows while a vCPU goes through its memory in order, and closes when it does not.
///
/// Each vCPU has its own. The page that is waited for comes first; the rest of the window is fetched with it, and
/// mapped with it by [`pre_fault`](crate::pre_fault): a guest that reads on in order exits once a window.
///
/// ```
/// use kvm_demand_paging::PrefetchWindow;
///
/// let mut window = PrefetchWindow::new(64);
/// assert_eq!(window.fault(100), 1);
/// assert_eq!(window.fault(101), 2);   // the page behind the last window: twice as many
/// assert_eq!(window.fault(103), 4);
/// assert_eq!(window.fault(7), 1);     // somewhere else
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PrefetchWindow {
    // The page behind the last window.
    next: Option<u64>,
    pages: u64,
    max: u64,
}

impl PrefetchWindow {
    /// A window of at most `max` pages; with 1 nothing is fetched that was not asked for.
    pub fn new(max: u64) -> Self {
        Self {
            next: None,
            pages: 0,
            max: max.max(1),
        }
    }

    /// A vCPU needs this page: how many to fetch, from it on. Whoever asks cuts it at the memslot's end.
    pub fn fault(&mut self, page: u64) -> u64 {
        self.pages = if self.next == Some(page) {
            self.pages.saturating_mul(2).min(self.max)
        } else {
            1
        };
        self.next = page.checked_add(self.pages);
        self.pages
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
            page += window.fault(page);
            exits += 1;
        }
        assert!(exits < 65_536 / 60, "{exits} exits");
    }

    proptest! {
        /// A random guest loses nothing: what it did not ask for is fetched only behind a page that follows the last
        /// window.
        #[test]
        fn other_patterns_fetch_one_page(pages in prop::collection::vec(any::<u64>(), 1..50)) {
            let mut window = PrefetchWindow::new(512);
            let mut next = None;
            for page in pages {
                let count = window.fault(page);
                prop_assert!(count == 1 || next == Some(page));
                next = page.checked_add(count);
            }
        }

        #[test]
        fn never_more_than_the_maximum(max in 0..1000u64, steps in 1..40usize) {
            let mut window = PrefetchWindow::new(max);
            let mut page = 0;
            for _ in 0..steps {
                let count = window.fault(page);
                prop_assert!((1..=max.max(1)).contains(&count));
                page += count;
            }
        }
    }
}

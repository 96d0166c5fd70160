//! Who of several threads fills a page: the first one, and nobody after it.

use std::sync::atomic::{AtomicU64, Ordering};

/// One bit for each page: has somebody taken it on?
#[derive(Debug)]
pub(super) struct Claims {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl Claims {
    pub(super) fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        Self {
            words: std::iter::repeat_with(AtomicU64::default)
                .take(words)
                .collect(),
            pages,
        }
    }

    /// Is the page the caller's to fill? [`None`] if there is no such page.
    pub(super) fn claim(&self, page: u64) -> Option<bool> {
        if page >= self.pages {
            return None;
        }
        let bit = 1 << (page % 64);
        // What is ordered by a claim is only who fills the page; the present bit orders its bytes.
        let before = self.words[(page / 64) as usize].fetch_or(bit, Ordering::Relaxed);
        Some(before & bit == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_gets_each_page() {
        let claims = Claims::new(1000);
        let mine = || {
            (0..1000)
                .filter(|&page| claims.claim(page) == Some(true))
                .count()
        };
        let total: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(mine)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(total, 1000);
        assert_eq!(claims.claim(1000), None);
    }
}

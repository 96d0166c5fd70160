//! The order in which pages are visited, computed alike by the guest and by the host.

/// A deterministic permutation of `0..count`.
///
/// The guest steps a linear congruential generator of full period over the next power of two, folds the
/// upper half of its bits over the lower, and skips what is not below `count`. For sequential order the
/// same code runs with other constants, so that both orders cost the guest the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    count: u64,
    start: u64,
    factor: u64,
    increment: u64,
    mask: u64,
    shift: u32,
}

impl Order {
    /// 0, 1, 2 and so on.
    pub fn sequential(count: u64) -> Self {
        Self {
            count,
            start: 0,
            factor: 1,
            increment: 1,
            mask: u64::MAX,
            shift: 63,
        }
    }

    /// Shuffled; every seed gives the same order each time.
    pub fn random(count: u64, seed: u64) -> Self {
        let mask = count.max(1).next_power_of_two() - 1;
        let bits = mask.count_ones();
        Self {
            count,
            start: seed & mask,
            // Full period modulo a power of two: factor = 1 modulo 4, increment odd.
            factor: 0x5851_f42d_4c95_7f2d,
            increment: seed.rotate_left(32) | 1,
            mask,
            shift: (bits / 2).max(1),
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The same order, as the guest walks it.
    pub fn iter(self) -> impl Iterator<Item = u64> {
        let mut x = self.start;
        let steps = std::iter::repeat_with(move || {
            let y = x ^ (x >> self.shift);
            x = x.wrapping_mul(self.factor).wrapping_add(self.increment) & self.mask;
            y
        });
        steps
            .filter(move |&y| y < self.count)
            .take(usize::try_from(self.count).unwrap_or(usize::MAX))
    }

    /// The words that guest code takes: start, factor, increment, mask, shift, count.
    pub(crate) fn words(&self) -> [u64; 6] {
        [
            self.start,
            self.factor,
            self.increment,
            self.mask,
            self.shift.into(),
            self.count,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_visits_each_page_once() {
        for count in [0, 1, 2, 3, 5, 64, 100, 1000, 4096, 5000] {
            for seed in [0, 1, 42, u64::MAX] {
                let mut seen: Vec<u64> = Order::random(count, seed).iter().collect();
                seen.sort_unstable();
                assert_eq!(
                    seen,
                    (0..count).collect::<Vec<_>>(),
                    "{count} pages, seed {seed}"
                );
            }
            let sequential: Vec<u64> = Order::sequential(count).iter().collect();
            assert_eq!(sequential, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn random_order_rarely_takes_neighbours_one_after_the_other() {
        let order: Vec<u64> = Order::random(65536, 7).iter().collect();
        let neighbours = order
            .windows(2)
            .filter(|w| w[0].abs_diff(w[1]) == 1)
            .count();
        assert!(
            neighbours < 655,
            "{neighbours} of 65,535 steps go to a neighbour"
        );
    }
}

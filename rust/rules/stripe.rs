// SPDX-License-Identifier: GPL-2.0

//! Which part of a thing that is divided, so that CPUs do not get into each other's way, is whose.
//!
//! There are as many stripes as CPUs, rounded up to a power of two, and at most [`MAX`]. A stripe belongs
//! to neighbouring CPUs, which share a cache more often than not; or to pages, 64 side by side (those whose
//! bits are in the same word) and others far away.

use super::range::WORD_PAGES;

/// The most stripes there are: one bit each in a word.
pub const MAX: u32 = 64;

/// How something is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripes {
    /// Their number, which is a power of two, less one.
    mask: u32,
    /// log2 of the CPUs that share one.
    shift: u32,
}

impl Stripes {
    /// For CPUs whose numbers are below `cpus`.
    pub fn for_cpus(cpus: u32) -> Self {
        let cpus = cpus.clamp(1, 1 << 31).next_power_of_two().trailing_zeros();
        let order = cpus.min(MAX.trailing_zeros());
        Self {
            mask: (1 << order) - 1,
            shift: cpus - order,
        }
    }

    /// How many there are.
    pub fn count(self) -> usize {
        self.mask as usize + 1
    }

    /// That of a CPU.
    #[inline]
    pub fn of_cpu(self, cpu: u32) -> usize {
        // Were a number ever out of bounds, it would have a stripe all the same.
        (cpu.wrapping_shr(self.shift) & self.mask) as usize
    }

    /// All, from the one whose `turn` it is on: who takes the next turn each time finds each soon.
    pub fn by_turns(self, turn: u32) -> impl Iterator<Item = usize> {
        (0..=self.mask).map(move |i| (turn.wrapping_add(i) & self.mask) as usize)
    }

    /// That of a page of a memslot.
    pub fn of_page(self, slot: u32, page: u64) -> usize {
        self.of_group(slot, page / WORD_PAGES)
    }

    fn of_group(self, slot: u32, group: u64) -> usize {
        // Multiplicative hashing: the upper bits of the product (Knuth, volume 3, 6.4).
        let mixed = (group ^ u64::from(slot).rotate_left(48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Shifted twice: by 64 in all if there is one stripe.
        (mixed >> 1 >> (63 - self.mask.count_ones())) as usize
    }

    /// Those of pages `first` to `last` of a memslot, in rising order.
    pub fn of_range(self, slot: u32, first: u64, last: u64) -> impl Iterator<Item = usize> {
        let (group, end) = (first / WORD_PAGES, last / WORD_PAGES);
        let mut left = if end - group >= self.count() as u64 {
            u64::MAX >> (u64::from(MAX) - self.count() as u64)
        } else {
            (group..=end).fold(0, |mask, group| mask | (1 << self.of_group(slot, group)))
        };
        core::iter::from_fn(move || {
            let next = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(next)
        })
    }
}

//! An array of atomic bits, in the present bitmap's layout: little-endian 64-bit words.

use crate::PageRange;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// Words that are needed for this many bits.
pub(crate) const fn words_for(bits: u64) -> u64 {
    bits.div_ceil(BITS)
}

/// A view of `len` bits.
#[derive(Clone, Copy)]
pub(crate) struct Bits<'a> {
    words: &'a [AtomicU64],
    len: u64,
}

impl<'a> Bits<'a> {
    /// `words` must hold `len` bits; bits after those are ignored.
    pub(crate) fn new(words: &'a [AtomicU64], len: u64) -> Self {
        debug_assert!(words.len() as u64 >= words_for(len));
        Self { words, len }
    }

    fn at(&self, bit: u64) -> (&'a AtomicU64, u64) {
        assert!(
            bit < self.len,
            "page {bit} of a bitmap of {} pages",
            self.len
        );
        (
            &self.words[(bit / BITS) as usize],
            (1u64 << (bit % BITS)).to_le(),
        )
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        let (word, mask) = self.at(bit);
        word.load(Ordering::Acquire) & mask != 0
    }

    /// Whether this call set the bit.
    pub(crate) fn set(&self, bit: u64) -> bool {
        let (word, mask) = self.at(bit);
        // Release publishes the page's bytes; acquire, so that who finds it set sees them.
        word.fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    /// Set a run of bits, as [`Self::set`] does, word by word; how many of them this call set.
    pub(crate) fn set_range(&self, range: PageRange) -> u64 {
        let (mut at, mut set) = (range.first, 0);
        while at < range.end() {
            let (word, _) = self.at(at);
            let stop = range.end().min((at / BITS + 1) * BITS);
            assert!(stop <= self.len, "{range:?} of {} pages", self.len);
            let mask = (u64::MAX >> (BITS - (stop - at)) << (at % BITS)).to_le();
            set += u64::from((mask & !word.fetch_or(mask, Ordering::AcqRel)).count_ones());
            at = stop;
        }
        set
    }

    /// Whether this call cleared the bit.
    pub(crate) fn clear(&self, bit: u64) -> bool {
        let (word, mask) = self.at(bit);
        word.fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// The word's bits as a number whose bit n is bit n, without those after the end.
    fn load(&self, index: u64) -> u64 {
        let word = u64::from_le(self.words[index as usize].load(Ordering::Acquire));
        match self.len - index * BITS {
            rest if rest < BITS => word & ((1 << rest) - 1),
            _ => word,
        }
    }

    pub(crate) fn count(&self) -> u64 {
        (0..words_for(self.len))
            .map(|index| u64::from(self.load(index).count_ones()))
            .sum()
    }

    /// The first bit from `from` that is `wanted`.
    pub(crate) fn find(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let mut before = (1u64 << (from % BITS)) - 1;
        for index in from / BITS..words_for(self.len) {
            let word = self.load(index);
            let hits = if wanted { word } else { !word } & !before;
            if hits != 0 {
                let bit = index * BITS + u64::from(hits.trailing_zeros());
                return (bit < self.len).then_some(bit);
            }
            before = 0;
        }
        None
    }

    /// The first run of bits that are `wanted`, inside `within`, of at most `max`.
    pub(crate) fn find_run(&self, within: PageRange, wanted: bool, max: u64) -> Option<PageRange> {
        let stop = within.end().min(self.len);
        let first = self
            .find(within.first, wanted)
            .filter(|first| *first < stop)?;
        let limit = stop.min(first.saturating_add(max));
        let end = self.find(first, !wanted).unwrap_or(limit).min(limit);
        Some(PageRange::from(first..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(bits: &[bool]) -> Vec<AtomicU64> {
        // Byte by byte, as the header has it: bit n is bit n % 8 of byte n / 8.
        let mut bytes = vec![0u8; words_for(bits.len() as u64) as usize * 8];
        for (bit, set) in bits.iter().enumerate() {
            bytes[bit / 8] |= u8::from(*set) << (bit % 8);
        }
        bytes
            .chunks_exact(8)
            .map(|chunk| AtomicU64::new(u64::from_ne_bytes(chunk.try_into().unwrap())))
            .collect()
    }

    proptest! {
        /// Against setting them one by one.
        #[test]
        fn a_run_is_set_as_its_bits_are(
            before in prop::collection::vec(any::<bool>(), 1..300),
            (from, to) in (0..300u64, 0..300u64),
        ) {
            let len = before.len() as u64;
            let (from, to) = (from.min(to).min(len), from.max(to).min(len));
            let (a, b) = (words(&before), words(&before));
            let (a, b) = (Bits::new(&a, len), Bits::new(&b, len));
            let one_by_one = (from..to).filter(|&bit| a.set(bit)).count() as u64;
            prop_assert_eq!(b.set_range(PageRange::from(from..to)), one_by_one);
            for bit in 0..len {
                prop_assert_eq!(a.get(bit), b.get(bit), "bit {}", bit);
            }
        }

        #[test]
        fn agrees_with_a_vector_of_bools(
            model in prop::collection::vec(any::<bool>(), 1..300),
            from in 0usize..320,
            max in 1u64..100,
            garbage: u64,
        ) {
            let len = model.len();
            let words = words(&model);
            if len % 64 != 0 {
                // What stands after the end must not count.
                let mask = !((1u64 << (len % 64)) - 1);
                words[len / 64].fetch_or((garbage & mask).to_le(), Ordering::Relaxed);
            }
            let bits = Bits::new(&words, len as u64);
            prop_assert_eq!(bits.count(), model.iter().filter(|set| **set).count() as u64);
            for wanted in [false, true] {
                let expected = (from..len).find(|bit| model[*bit] == wanted);
                prop_assert_eq!(bits.find(from as u64, wanted), expected.map(|bit| bit as u64));
                let within = PageRange::new(from as u64, 70);
                let run = bits.find_run(within, wanted, max);
                match expected.filter(|first| *first < from + 70) {
                    None => prop_assert_eq!(run, None),
                    Some(first) => {
                        let stop = len.min(from + 70).min(first + max as usize);
                        let end = (first..stop).find(|bit| model[*bit] != wanted).unwrap_or(stop);
                        prop_assert_eq!(run, Some(PageRange::from(first as u64..end as u64)));
                    }
                }
            }
        }

        #[test]
        fn set_and_clear_tell_who_changed(len in 1u64..200, ops in prop::collection::vec((any::<bool>(), any::<u64>()), 0..100)) {
            let words: Vec<AtomicU64> = (0..words_for(len)).map(|_| AtomicU64::new(0)).collect();
            let bits = Bits::new(&words, len);
            let mut model = vec![false; len as usize];
            for (set, bit) in ops {
                let bit = bit % len;
                let changed = model[bit as usize] != set;
                model[bit as usize] = set;
                prop_assert_eq!(if set { bits.set(bit) } else { bits.clear(bit) }, changed);
                prop_assert_eq!(bits.get(bit), set);
            }
        }
    }

    #[test]
    #[should_panic(expected = "page 64 of a bitmap of 64 pages")]
    fn past_the_end() {
        Bits::new(&[AtomicU64::new(0)], 64).get(64);
    }

    #[test]
    fn one_setter_wins_among_threads() {
        let words: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
        let wins: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..1024)
                            .filter(|bit| Bits::new(&words, 1024).set(*bit))
                            .count() as u64
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(wins, 1024);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Invariant 1, "data, then bit", and exact counts, on the real rust/rules/bits.rs.

use crate::loomed::{check_most, part, LoomWord, BIT, WORD};
use kdp_rules::rules::bits::{all, clear_both, is_set, set, Word};
use loom::sync::atomic::{
    AtomicU64,
    Ordering::{self, Acquire, Relaxed, Release},
};
use loom::thread;
use std::sync::Arc;

/// The bytes of two pages, and their bits.
struct Memory {
    data: [AtomicU64; 2],
    words: [LoomWord; 1],
}

fn memory(load: Ordering, update: Ordering) -> Arc<Memory> {
    Arc::new(Memory {
        data: [AtomicU64::new(0), AtomicU64::new(0)],
        words: [LoomWord::with_orderings(0, load, update)],
    })
}

impl Memory {
    fn write(&self, page: usize) {
        self.data[page].store(1, Relaxed);
    }

    /// A fault that finds the page present maps it, and then its bytes are read.
    fn fault(&self, page: usize) {
        if is_set(&self.words, WORD, BIT << page) {
            self.read(page);
        }
    }

    fn read(&self, page: usize) {
        assert_eq!(
            self.data[page].load(Relaxed),
            1,
            "present without its bytes"
        );
    }
}

fn one_writer(load: Ordering, update: Ordering, bit_first: bool) {
    loom::model(move || {
        let memory = memory(load, update);
        let writer = Arc::clone(&memory);
        let writer = thread::spawn(move || {
            if bit_first {
                set(&writer.words, part(0, 1));
            }
            writer.write(0);
            set(&writer.words, part(0, 1));
        });
        memory.fault(0);
        writer.join().unwrap();
        assert!(is_set(&memory.words, WORD, BIT));
    });
}

#[test]
fn who_sees_the_bit_sees_the_bytes() {
    one_writer(Acquire, Release, false);
}

#[test]
#[should_panic(expected = "present without its bytes")]
fn broken_relaxed_set_is_found() {
    one_writer(Acquire, Relaxed, false);
}

#[test]
#[should_panic(expected = "present without its bytes")]
fn broken_relaxed_read_is_found() {
    one_writer(Relaxed, Release, false);
}

#[test]
#[should_panic(expected = "present without its bytes")]
fn broken_bit_before_data_is_found() {
    one_writer(Acquire, Release, true);
}

/// The kernel and a process resolve neighbours: the later one's change of the word must not hide the
/// earlier one's bytes.
fn two_writers(update: Ordering) {
    check_most(4, move || {
        let memory = memory(Acquire, update);
        let (kernel, user) = (Arc::clone(&memory), Arc::clone(&memory));
        let kernel = thread::spawn(move || {
            kernel.write(0);
            set(&kernel.words, part(0, 1));
        });
        let user = thread::spawn(move || {
            user.write(1);
            user.words[WORD].user_set(BIT << 1);
        });
        memory.fault(0);
        memory.fault(1);
        kernel.join().unwrap();
        user.join().unwrap();
        assert!(all(&memory.words, part(0, 2), true), "a bit was lost");
    });
}

#[test]
fn neighbours_in_a_word_do_not_hide_bytes() {
    two_writers(Release);
}

#[test]
#[should_panic(expected = "present without its bytes")]
fn broken_neighbour_is_found() {
    two_writers(Relaxed);
}

/// A block is mapped whole when all its bits are seen.
#[test]
fn who_sees_a_whole_block_sees_all_its_bytes() {
    loom::model(|| {
        let memory = memory(Acquire, Release);
        let writer = Arc::clone(&memory);
        let writer = thread::spawn(move || {
            writer.write(0);
            set(&writer.words, part(0, 1));
            writer.write(1);
            set(&writer.words, part(1, 1));
        });
        if all(&memory.words, part(0, 2), true) {
            memory.read(0);
            memory.read(1);
        }
        writer.join().unwrap();
    });
}

/// Reads and writes apart, as a word must not be changed.
struct TornWord(AtomicU64);

impl Word for TornWord {
    fn load_acquire(&self) -> u64 {
        self.0.load(Acquire)
    }

    fn set_release(&self, mask: u64) -> u64 {
        let old = self.0.load(Acquire);
        self.0.store(old | mask, Release);
        old
    }

    fn clear(&self, mask: u64) -> u64 {
        let old = self.0.load(Acquire);
        self.0.store(old & !mask, Release);
        old
    }
}

/// Invariant 2: of two who place a page at the same time, one is told that it did.
fn two_places<W: Word + Send + Sync + 'static>(word: fn() -> W) {
    loom::model(move || {
        let words = Arc::new([word()]);
        let other = Arc::clone(&words);
        let other = thread::spawn(move || set(&*other, part(0, 2)));
        let here = set(&*words, part(1, 2));
        let there = other.join().unwrap();
        assert_eq!(here + there, 3, "placed pages are counted once");
        assert!(all(&*words, part(0, 3), true), "a bit was lost");
    });
}

#[test]
fn a_page_placed_twice_is_counted_once() {
    two_places(|| LoomWord::new(0));
}

#[test]
#[should_panic(expected = "placed pages are counted once")]
fn broken_torn_set_is_found() {
    two_places(|| TornWord(AtomicU64::new(0)));
}

/// The kernel clears a bit while a process sets its neighbour.
fn clear_beside_set<W: Word + Send + Sync + 'static>(word: fn() -> W) {
    loom::model(move || {
        let words = Arc::new([word()]);
        let other = Arc::clone(&words);
        let other = thread::spawn(move || set(&*other, part(1, 1)));
        assert_eq!(clear_both(Some(&words[..]), None, part(0, 1)), 1);
        assert_eq!(other.join().unwrap(), 1);
        assert!(all(&*words, part(0, 1), false), "a bit came back");
        assert!(all(&*words, part(1, 1), true), "a bit was lost");
    });
}

#[test]
fn clearing_a_bit_leaves_its_neighbour() {
    clear_beside_set(|| LoomWord::new(1));
}

#[test]
#[should_panic(expected = "a bit ")]
fn broken_torn_clear_is_found() {
    clear_beside_set(|| TornWord(AtomicU64::new(1)));
}

// SPDX-License-Identifier: GPL-2.0

//! The state zero: a page is filled once (rust/memslot.rs: fill_zero, under `changes`), and nobody
//! takes it for absent meanwhile (rust/pages.rs: state).

use crate::loomed::{check_most, part, Chunk};
use kdp_rules::rules::touch::State;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::{Mutex, RwLock};
use loom::thread;
use std::sync::Arc;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// `fill_zero` without the mutex.
    NoMutex,
    /// `fill_zero` without a look at the state under the mutex.
    NoSecondLook,
}

/// Page 0 of a memslot, which begins as zero, with leftovers in its memory.
struct Slot {
    broken: Broken,
    changes: Mutex<()>,
    pages: RwLock<Chunk>,
    /// Two words of the page.
    data: [AtomicU64; 2],
    fills: AtomicU64,
}

const LEFTOVER: u64 = 99;

impl Slot {
    fn new(broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            broken,
            changes: Mutex::new(()),
            pages: RwLock::new(Chunk::new(0, 1)),
            data: [AtomicU64::new(LEFTOVER), AtomicU64::new(LEFTOVER)],
            fills: AtomicU64::new(0),
        })
    }

    fn fill_zero(&self) {
        let _changes = (self.broken != Broken::NoMutex).then(|| self.changes.lock().unwrap());
        let pages = self.pages.read().unwrap();
        if self.broken != Broken::NoSecondLook && pages.state() != State::Zero {
            return;
        }
        for word in &self.data {
            word.store(0, Relaxed);
        }
        pages.zero_filled();
        self.fills.fetch_add(1, Relaxed);
    }

    /// A fault: true when the page is mapped, false when it is absent.
    fn fault(&self) -> bool {
        loop {
            let pages = self.pages.read().unwrap();
            let state = pages.state();
            drop(pages);
            match state {
                State::Present => return true,
                State::Zero => self.fill_zero(),
                State::Absent | State::Sourced | State::Poisoned | State::Removed => return false,
            }
        }
    }

    fn state(&self) -> State {
        self.pages.read().unwrap().state()
    }

    fn fills(&self) -> u64 {
        self.fills.load(Relaxed)
    }
}

/// Two guests' threads touch the page; each writes a word of it as soon as it has it.
fn two_touch_it(broken: Broken) {
    check_most(4, move || {
        let slot = Slot::new(broken);
        let other = Arc::clone(&slot);
        let other = thread::spawn(move || {
            assert!(other.fault(), "a zero page seemed absent");
            other.data[0].store(1, Relaxed);
        });
        assert!(slot.fault(), "a zero page seemed absent");
        slot.data[1].store(2, Relaxed);
        other.join().unwrap();
        let data = [0, 1].map(|i| slot.data[i].load(Relaxed));
        let kept = data == [1, 2] && slot.fills() == 1;
        assert!(kept, "zeros came after what a guest wrote");
    });
}

#[test]
fn a_page_is_filled_once() {
    two_touch_it(Broken::Nothing);
}

#[test]
#[should_panic(expected = "zeros came after what a guest wrote")]
fn broken_without_the_mutex_is_found() {
    two_touch_it(Broken::NoMutex);
}

#[test]
#[should_panic(expected = "zeros came after what a guest wrote")]
fn broken_without_a_second_look_is_found() {
    two_touch_it(Broken::NoSecondLook);
}

/// A touch fills the page while a handler marks it present: one of the two makes it present.
fn present_meanwhile(broken: Broken) {
    loom::model(move || {
        let slot = Slot::new(broken);
        let marker = Arc::clone(&slot);
        let marker = thread::spawn(move || {
            let _changes = marker.changes.lock().unwrap();
            let pages = marker.pages.read().unwrap();
            pages.mark_present(part(0, 1))
        });
        assert!(slot.fault(), "a zero page seemed absent");
        let marked = marker.join().unwrap();
        assert_eq!(marked + slot.fills(), 1, "made present once");
        assert_eq!(slot.state(), State::Present);
    });
}

#[test]
fn a_page_becomes_present_once() {
    present_meanwhile(Broken::Nothing);
}

#[test]
#[should_panic(expected = "made present once")]
fn broken_marking_without_the_mutex_is_found() {
    present_meanwhile(Broken::NoMutex);
}

/// A touch fills the page while it is made absent, and zero again: absent pages are not filled.
#[test]
fn absent_meanwhile_is_absent_after() {
    loom::model(|| {
        let slot = Slot::new(Broken::Nothing);
        let marker = Arc::clone(&slot);
        let marker = thread::spawn(move || {
            let _changes = marker.changes.lock().unwrap();
            marker.pages.write().unwrap().mark_absent(part(0, 1))
        });
        slot.fault();
        assert_eq!(marker.join().unwrap(), 1);
        assert_eq!(slot.state(), State::Absent);
        assert!(slot.fills() <= 1);
    });
}

/// Filling sets the present bit, then clears the zero bit; a fault looks without the mutex.
fn look_while_filled(look: fn(&Chunk) -> State) {
    loom::model(move || {
        let slot = Slot::new(Broken::Nothing);
        let filler = Arc::clone(&slot);
        let filler = thread::spawn(move || filler.fill_zero());
        let state = look(&slot.pages.read().unwrap());
        assert_ne!(state, State::Absent, "a zero page seemed absent");
        filler.join().unwrap();
        assert_eq!(slot.state(), State::Present);
    });
}

#[test]
fn a_zero_page_never_seems_absent() {
    look_while_filled(Chunk::state);
}

#[test]
#[should_panic(expected = "a zero page seemed absent")]
fn broken_one_look_at_each_bit_is_found() {
    look_while_filled(Chunk::state_by_one_look);
}

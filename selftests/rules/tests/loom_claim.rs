// SPDX-License-Identifier: GPL-2.0

//! A page in the state zero that somebody claims, fills and commits, or gives up, while others touch it (rust/pages.rs:
//! look_further, rust/memslot/claim.rs): a touch never fills what is claimed, and nobody waits for ever.

use crate::loomed::{check_most, part, Chunk, Gate, LoomWord, BIT, WORD};
use kdp_rules::rules::bits::{self, Word};
use kdp_rules::rules::touch::State;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::{Mutex, RwLock};
use loom::thread;
use std::sync::Arc;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The claim goes, and who waits is woken, before the page is present.
    ClaimGoesFirst,
    /// Who fills a zero page does not look at claims again.
    NoSecondLook,
    /// Who gives a claim up wakes nobody.
    NoWake,
    /// Who is woken has not seen the claim go: it is woken first.
    WakeFirst,
}

struct Bits {
    chunk: Chunk,
    claimed: [LoomWord; 1],
}

impl Bits {
    fn is_claimed(&self) -> bool {
        bits::is_set(&self.claimed, WORD, BIT)
    }

    /// rust/pages.rs: look_further.
    fn state(&self) -> State {
        let is_present = || bits::is_set(&self.chunk.present, WORD, BIT);
        if is_present() {
            State::Present
        } else if self.is_claimed() {
            State::Absent
        } else if bits::is_set(&self.chunk.zero, WORD, BIT) {
            State::Zero
        } else if is_present() {
            State::Present
        } else {
            State::Absent
        }
    }
}

/// Page 0, zero or absent in the beginning, with leftovers in its memory; and the event queue's entry for it.
struct Slot {
    broken: Broken,
    changes: Mutex<()>,
    pages: RwLock<Bits>,
    data: AtomicU64,
    fills: AtomicU64,
    queue: Mutex<Option<Arc<Gate>>>,
}

const LEFTOVER: u64 = 99;
const FILLED: u64 = 7;

impl Slot {
    fn new(broken: Broken, zero: u64) -> Arc<Self> {
        Arc::new(Self {
            broken,
            changes: Mutex::new(()),
            pages: RwLock::new(Bits {
                chunk: Chunk::new(0, zero),
                claimed: [LoomWord::new(0)],
            }),
            data: AtomicU64::new(LEFTOVER),
            fills: AtomicU64::new(0),
            queue: Mutex::new(None),
        })
    }

    fn claim(&self) -> bool {
        let _changes = self.changes.lock().unwrap();
        let pages = self.pages.read().unwrap();
        let is_free = !bits::is_set(&pages.chunk.present, WORD, BIT);
        if is_free {
            pages.claimed[WORD].set_release(BIT);
        }
        is_free
    }

    fn wake(&self) {
        if let Some(gate) = self.queue.lock().unwrap().take() {
            gate.open();
        }
    }

    fn end(&self, pages: &Bits) {
        match self.broken {
            Broken::NoWake => {
                pages.claimed[WORD].clear(BIT);
            }
            Broken::WakeFirst => {
                self.wake();
                pages.claimed[WORD].clear(BIT);
            }
            _ => {
                pages.claimed[WORD].clear(BIT);
                self.wake();
            }
        }
    }

    fn commit(&self) {
        let _changes = self.changes.lock().unwrap();
        let pages = self.pages.read().unwrap();
        if self.broken == Broken::ClaimGoesFirst {
            self.end(&pages);
            pages.chunk.mark_present(part(0, 1));
        } else {
            pages.chunk.mark_present(part(0, 1));
            self.end(&pages);
        }
    }

    fn abandon(&self) {
        let _changes = self.changes.lock().unwrap();
        self.end(&self.pages.read().unwrap());
    }

    fn fill_zero(&self) {
        let _changes = self.changes.lock().unwrap();
        let pages = self.pages.read().unwrap();
        let is_zero = match self.broken {
            Broken::NoSecondLook => pages.chunk.state() == State::Zero,
            _ => pages.state() == State::Zero,
        };
        if is_zero {
            self.data.store(0, Relaxed);
            pages.chunk.zero_filled();
            self.fills.fetch_add(1, Relaxed);
        }
    }

    /// A touch; what it reads.
    fn touch(&self) -> u64 {
        loop {
            let state = self.pages.read().unwrap().state();
            match state {
                State::Present => return self.data.load(Relaxed),
                State::Zero => self.fill_zero(),
                _ => {
                    let mut queue = self.queue.lock().unwrap();
                    if self.pages.read().unwrap().state() != State::Absent {
                        continue;
                    }
                    let gate = Arc::clone(queue.get_or_insert_default());
                    drop(queue);
                    gate.wait();
                }
            }
        }
    }
}

fn committed(broken: Broken, zero: u64) {
    check_most(3, move || {
        let slot = Slot::new(broken, zero);
        let other = Arc::clone(&slot);
        let other = thread::spawn(move || {
            let claimed = other.claim();
            if claimed {
                other.data.store(FILLED, Relaxed);
                other.commit();
            }
            claimed
        });
        let read = slot.touch();
        let claimed = other.join().unwrap();
        let expected = if claimed { FILLED } else { 0 };
        assert_eq!(read, expected, "not what was committed");
        assert_eq!(
            slot.data.load(Relaxed),
            expected,
            "filled over what was committed"
        );
        assert_eq!(slot.fills.load(Relaxed), u64::from(!claimed), "fills");
    });
}

fn abandoned(broken: Broken) {
    check_most(3, move || {
        let slot = Slot::new(broken, BIT);
        let other = Arc::clone(&slot);
        let other = thread::spawn(move || {
            if other.claim() {
                other.data.store(FILLED, Relaxed);
                other.abandon();
            }
        });
        assert_eq!(slot.touch(), 0, "not what the page was before");
        other.join().unwrap();
        assert_eq!(slot.fills.load(Relaxed), 1, "fills");
    });
}

#[test]
fn what_is_committed_is_read() {
    committed(Broken::Nothing, BIT);
    committed(Broken::Nothing, 0);
}

#[test]
fn what_is_given_up_is_zero_again() {
    abandoned(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_claim_goes_first_is_found() {
    committed(Broken::ClaimGoesFirst, 0);
}

#[test]
#[should_panic(expected = "fills")]
fn broken_without_a_second_look_is_found() {
    committed(Broken::NoSecondLook, BIT);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_without_a_wake_is_found() {
    abandoned(Broken::NoWake);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_wake_first_is_found() {
    abandoned(Broken::WakeFirst);
}

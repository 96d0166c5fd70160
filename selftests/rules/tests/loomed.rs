// SPDX-License-Identifier: GPL-2.0

//! The module's parts, as loom sees them.
//!
//! loom runs a model once for every way in which its threads can be interleaved and in which a weak
//! memory may answer a read. A model of the module says which file it follows. Beside each stands
//! the same with one thing broken: there loom must find the failure.
//!
//! Threads share by std's `Arc`, not loom's: when a deadlock is found, a drop of the latter panics
//! again, and that ends the test.

use kdp_rules::rules::bits::{self, Word};
use kdp_rules::rules::range::ChunkPart;
use kdp_rules::rules::touch::State;
use loom::sync::atomic::{
    AtomicU64,
    Ordering::{self, Acquire, Relaxed, Release},
};
use loom::sync::Mutex;
use loom::thread::{self, Thread};

/// As `loom::model`, for a model with too many interleavings: those with so many preemptions at most.
/// LOOM_MAX_PREEMPTIONS in the environment counts for more.
pub fn check_most(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(run);
}

/// The word of page 0, and its bit there.
pub const WORD: usize = 0;
pub const BIT: u64 = 1;

/// Pages `first` and up of chunk 0.
pub fn part(first: u64, count: u64) -> ChunkPart {
    ChunkPart {
        chunk: 0,
        first,
        count,
    }
}

/// rust/ffi/shared_page.rs: SharedWord.
pub struct LoomWord {
    word: AtomicU64,
    /// loom orders an access against the last one only. So a thread's own read hides another one's
    /// from the write that follows, and loom misses interleavings. Every access begins with a change
    /// of this, which it does not miss; it is relaxed and orders nothing for the model.
    accesses: AtomicU64,
    load: Ordering,
    update: Ordering,
}

impl LoomWord {
    pub fn new(bits: u64) -> Self {
        Self::with_orderings(bits, Acquire, Release)
    }

    pub fn with_orderings(bits: u64, load: Ordering, update: Ordering) -> Self {
        Self {
            word: AtomicU64::new(bits),
            accesses: AtomicU64::new(0),
            load,
            update,
        }
    }

    /// What userspace does to a word of the bitmap that it has mapped.
    pub fn user_set(&self, mask: u64) -> u64 {
        self.word().fetch_or(mask, Release)
    }

    /// What userspace must not do, and may.
    pub fn user_clear(&self, mask: u64) {
        self.word().fetch_and(!mask, Release);
    }

    fn word(&self) -> &AtomicU64 {
        self.accesses.fetch_add(1, Relaxed);
        &self.word
    }
}

impl Word for LoomWord {
    fn load_acquire(&self) -> u64 {
        self.word().load(self.load)
    }

    fn set_release(&self, mask: u64) -> u64 {
        self.word().fetch_or(mask, self.update)
    }

    fn clear(&self, mask: u64) -> u64 {
        self.word().fetch_and(!mask, self.update)
    }
}

/// Threads that sleep until they are told. They hold no lock of the model meanwhile, as they would at
/// loom's `Condvar`: its release panics again when a deadlock is found.
#[derive(Default)]
pub struct Sleepers(Vec<Thread>);

impl Sleepers {
    /// The current thread will sleep: it releases the lock around this, and parks.
    pub fn add(&mut self) {
        self.0.push(thread::current());
    }

    pub fn tell_one(&mut self) {
        if !self.0.is_empty() {
            self.0.remove(0).unpark();
        }
    }

    pub fn tell_all(&mut self) {
        for sleeper in self.0.drain(..) {
            sleeper.unpark();
        }
    }
}

/// rust/ffi/wait.rs: a gate that opens once.
#[derive(Default)]
pub struct Gate(Mutex<(bool, Sleepers)>);

impl Gate {
    pub fn open(&self) {
        let mut gate = self.0.lock().unwrap();
        gate.0 = true;
        gate.1.tell_all();
    }

    pub fn wait(&self) {
        let mut gate = self.0.lock().unwrap();
        if !gate.0 {
            gate.1.add();
            drop(gate);
            thread::park();
        }
    }
}

/// rust/pages.rs: the bits of chunk 0.
pub struct Chunk {
    pub present: [LoomWord; 1],
    pub zero: [LoomWord; 1],
}

impl Chunk {
    pub fn new(present: u64, zero: u64) -> Self {
        Self {
            present: [LoomWord::new(present)],
            zero: [LoomWord::new(zero)],
        }
    }

    fn is_present(&self) -> bool {
        bits::is_set(&self.present, WORD, BIT)
    }

    fn is_zero(&self) -> bool {
        bits::is_set(&self.zero, WORD, BIT)
    }

    /// The state of page 0.
    pub fn state(&self) -> State {
        if self.is_present() {
            State::Present
        } else if self.is_zero() {
            State::Zero
        } else if self.is_present() {
            // Zero pages were filled between the first look and the second.
            State::Present
        } else {
            State::Absent
        }
    }

    /// The same, looking at each bit once.
    pub fn state_by_one_look(&self) -> State {
        if self.is_present() {
            State::Present
        } else if self.is_zero() {
            State::Zero
        } else {
            State::Absent
        }
    }

    pub fn mark_present(&self, part: ChunkPart) -> u64 {
        let changed = bits::set(&self.present, part);
        bits::clear_both(Some(&self.zero[..]), None, part);
        changed
    }

    pub fn mark_zero(&self, part: ChunkPart) -> u64 {
        bits::set_unless(&self.zero, Some(&self.present), part)
    }

    pub fn mark_absent(&self, part: ChunkPart) -> u64 {
        bits::clear_both(Some(&self.present[..]), Some(&self.zero[..]), part)
    }

    pub fn zero_filled(&self) {
        self.present[WORD].set_release(BIT);
        self.zero[WORD].clear(BIT);
    }
}

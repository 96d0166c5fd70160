//! Fetches what nobody has touched yet.

use super::{
    engine::{Engine, Marks},
    receive_once,
    slot::Slot,
    Error,
};
use crate::{
    source::{Counters, PageSource},
    PAGE_SIZE,
};
use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::{Duration, Instant},
};

/// Pages of one request.
const RUN: u64 = 64;

/// Pages that are under way at most: 1 MiB, so that a touched page finds the network's queues short.
const WINDOW: u64 = 256;

/// How long to wait for pages, and before pages that could not be read are tried again.
const TICK: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Background {
    source: Box<dyn PageSource>,
    bandwidth: Option<u64>,
    complete: AtomicBool,
}

impl Background {
    pub(super) fn new(source: Box<dyn PageSource>, bandwidth: Option<u64>) -> Self {
        Self {
            source,
            bandwidth,
            complete: AtomicBool::new(false),
        }
    }

    pub(super) fn stop(&self) {
        self.source.stop();
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    pub(super) fn counters(&self) -> Counters {
        self.source.counters()
    }

    /// Fetch all, and then what memslots are added, until the source is stopped.
    pub(super) fn run<M: Marks>(&self, engine: &Engine<M>) -> Result<(), Error> {
        loop {
            let generation = engine.slots.generation();
            self.fetch_all(engine)?;
            self.complete.store(generation > 0, Ordering::Relaxed);
            while engine.slots.generation() == generation {
                receive_once(engine, self.source.as_ref(), TICK)?;
            }
            self.complete.store(false, Ordering::Relaxed);
        }
    }

    /// Walk over all memslots until nothing is missing in any of them.
    pub(super) fn fetch_all<M: Marks>(&self, engine: &Engine<M>) -> Result<(), Error> {
        let mut pace = Pace::new(self.bandwidth);
        loop {
            let mut missing = 0;
            for slot in engine.slots.all() {
                missing += self.walk(engine, &slot, &mut pace)?;
            }
            if missing == 0 {
                return Ok(());
            }
            // Only pages that could not be read are still missing after a walk.
            let is_missing = |slot: &Arc<Slot>| slot.next_missing(0, 1).is_some();
            let until = Instant::now() + RETRY;
            while Instant::now() < until && engine.slots.all().iter().any(is_missing) {
                receive_once(engine, self.source.as_ref(), TICK)?;
            }
        }
    }

    /// Fetch what is missing in a memslot; how many pages that were.
    fn walk<M: Marks>(
        &self,
        engine: &Engine<M>,
        slot: &Arc<Slot>,
        pace: &mut Pace,
    ) -> Result<u64, Error> {
        let (mut asked, mut came, mut from) = (0, 0, 0);
        loop {
            let next = slot.next_missing(from, RUN);
            match next {
                Some(run) if asked - came < WINDOW && pace.may_ask() => {
                    self.source.request(&[slot.to_source(run)])?;
                    pace.asked(run.count);
                    asked += run.count;
                    from = run.end();
                    continue;
                }
                None if came >= asked => return Ok(asked),
                _ => {}
            }
            came += receive_once(engine, self.source.as_ref(), pace.wait())?;
        }
    }
}

/// Keeps to a number of bytes a second.
struct Pace {
    bandwidth: Option<u64>,
    free_at: Instant,
}

impl Pace {
    fn new(bandwidth: Option<u64>) -> Self {
        Self {
            bandwidth,
            free_at: Instant::now(),
        }
    }

    fn may_ask(&self) -> bool {
        self.bandwidth.is_none() || Instant::now() >= self.free_at
    }

    fn asked(&mut self, pages: u64) {
        if let Some(bandwidth) = self.bandwidth {
            let time = Duration::from_secs_f64(
                (pages * PAGE_SIZE as u64) as f64 / bandwidth.max(1) as f64,
            );
            // Time that was not used is not saved up.
            self.free_at = self.free_at.max(Instant::now()) + time;
        }
    }

    /// How long to wait for pages before it may be asked again.
    fn wait(&self) -> Duration {
        let until = self.free_at.saturating_duration_since(Instant::now());
        match until.is_zero() {
            true => TICK,
            false => until.min(TICK),
        }
    }
}

//! The rule of free-page hints (src/hints.rs), in every order in which things can happen.
//!
//! The model: a guest with one page (pages do not meet each other, but for the epoch, which is one for all), KVM's dirty
//! log, the queue of hints, and the source's side, which is the crate's own [`Gate`] and [`SendMap`]. The guest frees
//! the page, finds it free for a hint, queues that hint at any later time, also when the page is in use again, and
//! writes. The source harvests in the steps that a harvest has, processes hints, sends. A migration may be given up
//! and begun anew, with hints still in the queue. In the end the guest stops, the log is harvested for the last time
//! and what is to be sent is sent. Then: **a page that is in use is at the destination as it was written last.**
//!
//! `stateright` walks every interleaving. For each part of the rule there is a model without it, in which it must find
//! a lost write.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use kdp_migrate::{hints::Gate, schedule::SendMap, Epoch, Hint, PageSet};
use kvm_demand_paging::PageRange;
use stateright::{Checker, Model, Property};
use std::hash::{Hash, Hasher};

const PAGE: PageRange = PageRange::page(0);

/// Which part of the rule is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// Part 4: a hint counts, of whatever epoch it is.
    Epochs,
    /// Part 2: the epoch is published before the harvest.
    HarvestFirst,
    /// Part 2: it is withdrawn after the harvest.
    Withdrawal,
    /// Part 5: the next round, or the next migration, uses the same epoch.
    FreshEpochs,
    /// Part 1: writes are logged from after the first epoch on.
    Log,
    /// Part 3: the hint names the epoch at which it is queued.
    EpochOfTheMoment,
    /// Part 6: the guest stops, and the log is not looked at again.
    LastHarvest,
}

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// The log is not on yet.
    New,
    Round,
    /// A harvest has begun; its bits are fetched and not merged yet if there are any.
    Harvest(Option<bool>),
    /// They are merged.
    Merged,
    /// The guest is stopped, and the last harvest was made.
    Stopped,
}

#[derive(Clone, Debug)]
struct World {
    // The guest.
    version: u8,
    in_use: bool,
    seen: Option<Epoch>,
    // A hint that it has made up its mind to give.
    found: Option<Epoch>,
    writes: u8,
    // The kernel.
    logging: bool,
    log: bool,
    // Between the two.
    shown: Option<Epoch>,
    queue: Vec<Epoch>,
    hints: u8,
    // The source, and what is at the destination.
    source: Source,
    gate: Gate,
    map: SendMap,
    next_epoch: u32,
    rounds: u8,
    migrations: u8,
    there: Option<u8>,
}

impl World {
    /// All that the future depends on.
    fn key(&self) -> impl Hash + Eq + '_ {
        let to_send = self.map.remaining() == 1;
        let free = self.map.free().count() == 1;
        let guest = (
            self.version,
            self.in_use,
            self.seen,
            self.found,
            self.writes,
        );
        let kernel = (self.logging, self.log, self.shown, &self.queue, self.hints);
        let source = (self.source, &self.gate, to_send, free, self.next_epoch);
        (
            guest,
            kernel,
            source,
            self.rounds,
            self.migrations,
            self.there,
        )
    }

    fn epoch(&mut self, without: Without) -> Epoch {
        if without != Without::FreshEpochs {
            self.next_epoch += 1;
        }
        Epoch(self.next_epoch)
    }

    fn publish(&mut self, without: Without) {
        let epoch = self.epoch(without);
        if without == Without::FreshEpochs {
            // The gate would refuse it.
            self.gate = Gate::new();
        }
        self.gate.publish(epoch).unwrap();
        self.shown = Some(epoch);
    }

    fn withdraw(&mut self) {
        self.gate.withdraw();
        self.shown = None;
    }

    fn merge(&mut self, bit: bool) {
        let mut written = PageSet::new(1);
        if bit {
            written.insert(0);
        }
        self.map.written(&written);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for World {}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    GuestFrees,
    GuestUsesAndWrites,
    GuestSeesEpoch,
    GuestFindsItFree,
    HintQueued,
    HintProcessed,
    LogOn,
    HarvestBegins,
    LogFetched,
    LogMerged,
    HarvestEnds,
    PageSent,
    GivenUpAndBegunAnew,
    GuestStops,
}

struct Migration {
    without: Without,
    /// How often it is begun anew at most.
    again: u8,
}

impl Model for Migration {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            version: 0,
            in_use: true,
            seen: None,
            found: None,
            writes: 3,
            logging: false,
            log: false,
            shown: None,
            queue: Vec::new(),
            hints: 2,
            source: Source::New,
            gate: Gate::new(),
            map: SendMap::new(1),
            next_epoch: 1,
            rounds: 2,
            migrations: self.again,
            there: None,
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let running = world.source != Source::Stopped;
        let mut may = |step, when: bool| {
            if when {
                steps.push(step);
            }
        };
        may(Step::GuestFrees, running && world.in_use);
        may(Step::GuestUsesAndWrites, running && world.writes > 0);
        may(Step::GuestSeesEpoch, running && world.shown != world.seen);
        let finds = !world.in_use && world.seen.is_some() && world.found.is_none();
        may(Step::GuestFindsItFree, running && finds && world.hints > 0);
        may(Step::HintQueued, running && world.found.is_some());
        may(Step::HintProcessed, !world.queue.is_empty());
        may(Step::LogOn, world.source == Source::New);
        let round = world.source == Source::Round;
        may(Step::HarvestBegins, round && world.rounds > 0);
        may(Step::LogFetched, world.source == Source::Harvest(None));
        may(
            Step::LogMerged,
            matches!(world.source, Source::Harvest(Some(_))),
        );
        may(Step::HarvestEnds, world.source == Source::Merged);
        let sends = round || world.source == Source::Stopped;
        may(Step::PageSent, sends && world.map.remaining() > 0);
        may(Step::GivenUpAndBegunAnew, round && world.migrations > 0);
        may(Step::GuestStops, round);
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let mut world = before.clone();
        let without = self.without;
        match step {
            Step::GuestFrees => world.in_use = false,
            Step::GuestUsesAndWrites => {
                world.writes -= 1;
                world.in_use = true;
                world.version += 1;
                world.log |= world.logging;
            }
            Step::GuestSeesEpoch => world.seen = world.shown,
            Step::GuestFindsItFree => {
                world.hints -= 1;
                world.found = world.seen;
            }
            Step::HintQueued => {
                let found = world.found.take()?;
                let named = match without {
                    Without::EpochOfTheMoment => world.seen.unwrap_or(found),
                    _ => found,
                };
                world.queue.push(named);
            }
            Step::HintProcessed => {
                let hint = Hint {
                    epoch: world.queue.remove(0),
                    pages: PAGE,
                };
                if without == Without::Epochs || world.gate.counts(&hint) {
                    world.map.hinted(PAGE);
                }
            }
            Step::LogOn => {
                world.source = Source::Round;
                if without != Without::Log {
                    world.logging = true;
                }
                world.publish(without);
            }
            Step::HarvestBegins => {
                world.rounds -= 1;
                world.source = Source::Harvest(None);
                if without != Without::Withdrawal {
                    world.withdraw();
                }
                if without == Without::HarvestFirst {
                    world.publish(without);
                }
            }
            Step::LogFetched => {
                world.source = Source::Harvest(Some(world.log));
                world.log = false;
                world.logging = true;
            }
            Step::LogMerged => {
                let Source::Harvest(Some(bit)) = world.source else {
                    return None;
                };
                world.merge(bit);
                world.source = Source::Merged;
            }
            Step::HarvestEnds => {
                world.source = Source::Round;
                if without == Without::Withdrawal {
                    world.withdraw();
                }
                if without != Without::HarvestFirst {
                    world.publish(without);
                }
            }
            Step::PageSent => {
                world.map.taken(PAGE);
                world.there = Some(world.version);
                world.map.sent(PAGE, 1);
                world.map.ack(world.map.acked() + 1).ok()?;
            }
            Step::GivenUpAndBegunAnew => {
                world.migrations -= 1;
                world.withdraw();
                // Hints stay in the queue; the rest begins as it did.
                world.map = SendMap::new(1);
                world.there = None;
                world.source = Source::New;
                world.logging = false;
                world.log = false;
                world.gate = Gate::new();
            }
            Step::GuestStops => {
                world.withdraw();
                world.source = Source::Stopped;
                if without != Without::LastHarvest {
                    world.merge(world.log);
                    world.log = false;
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no write is lost", |_, world: &World| {
                !over(world) || !world.in_use || world.there == Some(world.version)
            }),
            // The model does what it is to do: hints save pages, and pages are reused after hints that counted.
            Property::sometimes("a page never travels", |_, world: &World| {
                over(world) && world.there.is_none()
            }),
            Property::sometimes("a page travels in spite of a hint", |_, world: &World| {
                over(world) && world.hints == 0 && world.in_use && world.queue.is_empty()
            }),
        ]
    }
}

/// All is sent that is to be sent.
fn over(world: &World) -> bool {
    world.source == Source::Stopped && world.map.remaining() == 0
}

fn check(without: Without, again: u8) -> impl Checker<Migration> {
    Migration { without, again }
        .checker()
        .threads(2)
        .spawn_bfs()
        .join()
}

#[test]
fn no_interleaving_loses_a_write() {
    let checker = check(Without::Nothing, 1);
    checker.assert_properties();
    println!("{} states", checker.unique_state_count());
    assert!(checker.unique_state_count() > 10_000);
}

fn is_found(without: Without) {
    // Found without a second migration; so the path that is printed has none.
    let checker = check(without, 0);
    let path = checker
        .discovery("no write is lost")
        .unwrap_or_else(|| panic!("without {without:?} nothing is lost: the model is too small"));
    println!("{without:?}: {:?}", path.into_actions());
}

/// A hint that is processed after the page was written and the log harvested.
#[test]
fn broken_the_race_of_2019_is_found() {
    is_found(Without::Epochs);
}

#[test]
fn broken_an_epoch_before_the_harvest_is_found() {
    is_found(Without::HarvestFirst);
}

#[test]
fn broken_an_epoch_that_outlives_the_harvest_is_found() {
    is_found(Without::Withdrawal);
}

#[test]
fn broken_an_epoch_used_twice_is_found() {
    is_found(Without::FreshEpochs);
}

#[test]
fn broken_a_log_that_begins_late_is_found() {
    is_found(Without::Log);
}

#[test]
fn broken_a_hint_of_the_moment_it_is_queued_is_found() {
    is_found(Without::EpochOfTheMoment);
}

#[test]
fn broken_no_last_harvest_is_found() {
    is_found(Without::LastHarvest);
}

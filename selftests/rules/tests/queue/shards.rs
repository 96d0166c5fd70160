// SPDX-License-Identifier: GPL-2.0

//! The queue in shards, as rust/events.rs has it, against the same model: one list for all pages.

use super::model::Model;
use crate::host::PlainMap;
use kdp_rules::rules::queue::{Delivery, Entry, Event, Key, Owner, Queue, Ticket};
use kdp_rules::rules::stripe::Stripes;
use proptest::prelude::*;

const THREADS: usize = 16;
const OWNERS: usize = 3;
const EVERYBODY: Owner = Owner(OWNERS);

#[derive(Clone, Copy, Debug)]
enum Op {
    Enter { thread: usize, key: Key },
    Leave { thread: usize },
    Read { owner: Owner },
    UnreadAgain { back: usize },
    Requeue { owner: Owner },
    Resolve { slot: u32, first: u64, last: u64 },
    Close,
}

/// Pages of many shards, and some of one.
fn key() -> impl Strategy<Value = Key> {
    let page = prop_oneof![4 => (0..24u64).prop_map(|group| group * 64), 1 => 0..4u64];
    (0..2u32, page).prop_map(|(slot, page)| Key { slot, page })
}

fn op() -> impl Strategy<Value = Op> {
    let (thread, owner) = (0..THREADS, (0..OWNERS).prop_map(Owner));
    prop_oneof![
        24 => (thread.clone(), key()).prop_map(|(thread, key)| Op::Enter { thread, key }),
        6 => thread.prop_map(|thread| Op::Leave { thread }),
        12 => owner.clone().prop_map(|owner| Op::Read { owner }),
        3 => (0..4usize).prop_map(|back| Op::UnreadAgain { back }),
        3 => owner.prop_map(|owner| Op::Requeue { owner }),
        6 => (key(), 0..600u64).prop_map(|(key, more)| Op::Resolve {
            slot: key.slot,
            first: key.page,
            last: key.page + more,
        }),
        1 => Just(Op::Close),
    ]
}

fn history() -> impl Strategy<Value = (u32, Vec<Op>)> {
    (1..70u32, prop::collection::vec(op(), 0..120))
}

type Shard = Queue<PlainMap<Key, Entry<u32>>, PlainMap<u64, Key>>;

struct Sim {
    division: Stripes,
    shards: Vec<Shard>,
    model: Model,
    turn: u32,
    payloads: u32,
    waiting: [Option<(Key, Ticket)>; THREADS],
    delivered: Vec<(usize, Delivery, Event<u32>)>,
}

impl Sim {
    fn new(cpus: u32) -> Self {
        let division = Stripes::for_cpus(cpus);
        let shard = |_| Queue::new(PlainMap::new(), PlainMap::new());
        Self {
            division,
            shards: (0..division.count()).map(shard).collect(),
            model: Model::default(),
            turn: 0,
            payloads: 0,
            waiting: [None; THREADS],
            delivered: vec![],
        }
    }

    fn shard_of(&self, key: Key) -> usize {
        self.division.of_page(key.slot, key.page)
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Enter { thread, key } => {
                if self.waiting[thread].is_some() {
                    return;
                }
                self.payloads += 1;
                let payload = self.payloads;
                let shard = self.shard_of(key);
                let entered = self.shards[shard].enter(key, || Ok(payload));
                let expected = self.model.enter(thread, key, payload, true);
                let ours = entered.as_ref().map(|(_, payload, new)| (*payload, *new));
                assert_eq!(ours, expected.as_ref().copied(), "one event for each page");
                self.waiting[thread] = entered.ok().map(|(ticket, ..)| (key, ticket));
            }
            Op::Leave { thread } => {
                if let Some((key, ticket)) = self.waiting[thread].take() {
                    let shard = self.shard_of(key);
                    self.shards[shard].leave(ticket);
                    self.model.leave(thread);
                }
            }
            Op::Read { owner } => {
                self.read(owner);
            }
            Op::UnreadAgain { back } => {
                if let Some(at) = self.delivered.len().checked_sub(1 + back) {
                    let (shard, delivery, event) = &self.delivered[at];
                    self.shards[*shard].unread_again(*delivery);
                    self.model.unread_again(event);
                }
            }
            Op::Requeue { owner } => {
                let found: u32 = self.shards.iter_mut().map(|s| s.requeue(owner)).sum();
                assert_eq!(found, self.model.requeue(owner));
            }
            Op::Resolve { slot, first, last } => {
                let mut woken = vec![];
                for shard in self.division.of_range(slot, first, last) {
                    self.shards[shard].resolve(slot, first, last, |w| woken.push(w));
                }
                woken.sort_unstable();
                assert_eq!(woken, self.model.resolve(slot, first, last));
            }
            Op::Close => {
                let mut woken = vec![];
                for shard in &mut self.shards {
                    shard.close(|w| woken.push(w));
                }
                woken.sort_unstable();
                assert_eq!(woken, self.model.close());
            }
        }
        let sum = |count: fn(&Shard) -> u32| self.shards.iter().map(count).sum::<u32>();
        assert_eq!(sum(Shard::pending), self.model.pending(), "pending");
        assert_eq!(sum(Shard::unread), self.model.unread(), "unread");
    }

    /// Events::look in rust/events.rs.
    fn read(&mut self, owner: Owner) -> Option<Key> {
        let turn = self.turn;
        self.turn += 1;
        let shards = &mut self.shards;
        let found = self
            .division
            .by_turns(turn)
            .find_map(|i| shards[i].read(owner).map(|(d, e)| (i, d, e)));
        let Some((shard, delivery, event)) = found else {
            assert_eq!(self.model.read(owner), None, "an event was not found");
            return None;
        };
        let division = self.division;
        let in_shard = |key: Key| division.of_page(key.slot, key.page) == shard;
        let oldest = self.model.read_of(owner, in_shard);
        assert_eq!(Some(&event), oldest.as_ref(), "the oldest of its shard");
        let key = event.key;
        self.delivered.push((shard, delivery, event));
        Some(key)
    }
}

proptest! {
    /// Every answer and every count, whatever the number of shards.
    #[test]
    fn do_together_what_one_queue_does((cpus, history) in history()) {
        let mut sim = Sim::new(cpus);
        for op in history {
            sim.apply(op);
        }
        while sim.read(EVERYBODY).is_some() {}
        prop_assert_eq!(sim.model.unread(), 0);
    }

    /// Invariant 4, in all shards.
    #[test]
    fn deliver_again_what_readers_leave((cpus, history) in history()) {
        let mut sim = Sim::new(cpus);
        for op in history {
            sim.apply(op);
        }
        for owner in 0..OWNERS {
            sim.apply(Op::Requeue { owner: Owner(owner) });
        }
        let mut waited_for = sim.model.keys();
        let mut read: Vec<Key> = std::iter::from_fn(|| sim.read(EVERYBODY)).collect();
        waited_for.sort();
        read.sort();
        prop_assert_eq!(read, waited_for);
    }

    /// However many events come meanwhile, the oldest of a shard is read after as many reads as there are
    /// shards: none is forgotten for the others.
    #[test]
    fn let_no_event_starve((cpus, history) in history(), key in key()) {
        let mut sim = Sim::new(cpus);
        for op in history {
            if !matches!(op, Op::Close) {
                sim.apply(op);
            }
        }
        while sim.read(EVERYBODY).is_some() {}
        sim.apply(Op::Resolve { slot: key.slot, first: key.page, last: key.page });
        let count = sim.shards.len() as u64;
        sim.shards[sim.division.of_page(key.slot, key.page)]
            .enter(key, || Ok(u32::MAX))
            .unwrap();
        let _ = sim.model.enter(THREADS, key, u32::MAX, true);
        let mut next_page = 1 << 20;
        for _ in 0..count {
            // Two more in other places for each that is read.
            for _ in 0..2 {
                let other = Key { slot: 9, page: next_page };
                next_page += 64;
                let shard = sim.shard_of(other);
                if shard == sim.shard_of(key) {
                    continue;
                }
                sim.payloads += 1;
                let payload = sim.payloads;
                sim.shards[shard].enter(other, || Ok(payload)).unwrap();
                sim.model.enter(THREADS + 1, other, payload, true).unwrap();
            }
            if sim.read(EVERYBODY) == Some(key) {
                return Ok(());
            }
        }
        prop_assert!(false, "not read within {} reads", count);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Does the same to the queue and to the model, and compares.

use super::model::Model;
use crate::host::{HostMap, Memory, View};
use kdp_rules::rules::queue::{
    Delivery, EnterError, Entry, Event, Key, NoMemory, Owner, Queue, Ticket,
};
use std::collections::BTreeSet;

/// Threads that may wait.
pub const THREADS: usize = 8;
/// Processes that may read.
pub const OWNERS: usize = 3;

/// Where memory runs out when a thread enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfMemory {
    /// For the payload.
    First,
    /// For the entry's place in the order.
    Order,
    /// For the entry.
    Pages,
}

#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Unless the thread waits already.
    Enter {
        thread: usize,
        key: Key,
        memory: Option<OutOfMemory>,
    },
    /// If the thread waits, or did and was woken.
    Leave {
        thread: usize,
    },
    Read {
        owner: Owner,
    },
    /// Of a delivery, so many before the last one.
    UnreadAgain {
        back: usize,
    },
    Requeue {
        owner: Owner,
    },
    Resolve {
        slot: u32,
        first: u64,
        last: u64,
    },
    Close,
}

type Pages = HostMap<Key, Entry<u32>, ()>;
type Order = HostMap<u64, Key, Key>;

pub struct Sim {
    pub queue: Queue<Pages, Order>,
    pub model: Model,
    pub memory: Memory,
    pages: View<Key, ()>,
    order: View<u64, Key>,
    /// What a thread holds while it waits, and the payload that it waits with.
    waiting: [Option<(Ticket, u32)>; THREADS],
    payloads: u32,
    woken: BTreeSet<u32>,
    /// All that was ever read.
    delivered: Vec<(Delivery, Event<u32>)>,
}

impl Sim {
    pub fn new() -> Self {
        let memory = Memory::default();
        let (pages, pages_view) = HostMap::new(memory.clone(), |_: &Entry<u32>| ());
        let (order, order_view) = HostMap::new(memory.clone(), |key: &Key| *key);
        Self {
            queue: Queue::new(pages, order),
            model: Model::default(),
            memory,
            pages: pages_view,
            order: order_view,
            waiting: [None; THREADS],
            payloads: 0,
            woken: BTreeSet::new(),
            delivered: vec![],
        }
    }

    pub fn apply(&mut self, op: Op) {
        let mut enough = true;
        if let Op::Enter {
            memory: Some(out), ..
        } = op
        {
            enough = false;
            self.memory.set(match out {
                OutOfMemory::First => None,
                OutOfMemory::Order => Some(0),
                OutOfMemory::Pages => Some(1),
            });
        }
        self.step(op, enough);
        self.memory.set(None);
    }

    /// As [`Sim::apply`], with no more memory than `self.memory` has.
    pub fn apply_with_little_memory(&mut self, mut op: Op) {
        if let Op::Enter { memory, .. } = &mut op {
            *memory = None;
        }
        // A new entry takes two insertions.
        self.step(op, self.memory.left().is_none_or(|left| left >= 2));
    }

    fn step(&mut self, op: Op, enough: bool) {
        match op {
            Op::Enter {
                thread,
                key,
                memory,
            } => self.enter(thread, key, memory, enough),
            Op::Leave { thread } => {
                if let Some((ticket, _)) = self.waiting[thread].take() {
                    self.queue.leave(ticket);
                    self.model.leave(thread);
                }
            }
            Op::Read { owner } => {
                self.read(owner);
            }
            Op::UnreadAgain { back } => {
                // Most of what was delivered long ago has been resolved, or delivered again, since.
                if let Some(at) = self.delivered.len().checked_sub(1 + back) {
                    let (delivery, event) = &self.delivered[at];
                    self.queue.unread_again(*delivery);
                    self.model.unread_again(event);
                }
            }
            Op::Requeue { owner } => {
                assert_eq!(self.queue.requeue(owner), self.model.requeue(owner));
            }
            Op::Resolve { slot, first, last } => {
                let mut woken = vec![];
                let count = self.queue.resolve(slot, first, last, |w| woken.push(w));
                assert_eq!(count, woken.len() as u64);
                self.wake(woken, |model| model.resolve(slot, first, last));
            }
            Op::Close => {
                let mut woken = vec![];
                self.queue.close(|w| woken.push(w));
                self.wake(woken, Model::close);
            }
        }
        self.check();
    }

    pub fn read(&mut self, owner: Owner) -> Option<Event<u32>> {
        let read = self.queue.read(owner);
        let expected = self.model.read(owner);
        assert_eq!(read.as_ref().map(|(_, event)| event), expected.as_ref());
        self.delivered.extend(read);
        expected
    }

    fn enter(&mut self, thread: usize, key: Key, memory: Option<OutOfMemory>, enough: bool) {
        if self.waiting[thread].is_some() {
            return;
        }
        self.payloads += 1;
        let payload = self.payloads;
        let mut asked = 0;
        let entered = self.queue.enter(key, || {
            asked += 1;
            match memory {
                Some(OutOfMemory::First) => Err(NoMemory),
                _ => Ok(payload),
            }
        });
        let is_new = !self.model.has(key);
        let expected = self.model.enter(thread, key, payload, enough);
        let closed = expected == Err(EnterError::Closed);
        assert_eq!(asked, u32::from(is_new && !closed), "calls of `first`");
        match (entered, expected) {
            (Ok((ticket, payload, is_new)), expected) => {
                assert_eq!(Ok((payload, is_new)), expected);
                self.waiting[thread] = Some((ticket, payload));
            }
            (Err(error), expected) => assert_eq!(Err(error), expected),
        }
    }

    fn wake(&mut self, mut woken: Vec<u32>, expected: impl FnOnce(&mut Model) -> Vec<u32>) {
        woken.sort_unstable();
        assert_eq!(woken, expected(&mut self.model));
        for payload in woken {
            assert!(self.woken.insert(payload), "{payload} was woken twice");
        }
    }

    /// What can be seen of the type's invariants: the maps belong together, and the counts to them.
    fn check(&self) {
        let order: Vec<Key> = self.order.borrow().values().copied().collect();
        assert_eq!(order, self.model.keys(), "the order of the events");
        let pages: BTreeSet<Key> = self.pages.borrow().keys().copied().collect();
        assert_eq!(pages, order.into_iter().collect(), "the two maps");
        assert_eq!(self.queue.pending(), self.model.pending(), "pending");
        assert_eq!(self.queue.unread(), self.model.unread(), "unread");
    }

    /// Reads all there is.
    pub fn drain(&mut self, owner: Owner) -> Vec<Event<u32>> {
        let mut events = vec![];
        loop {
            let event = self.read(owner);
            self.check();
            match event {
                Some(event) => events.push(event),
                None => return events,
            }
        }
    }

    /// Whether every thread that has not left of itself was woken.
    pub fn all_woken(&self) -> bool {
        let mut waiting = self.waiting.iter().flatten();
        waiting.all(|(_, payload)| self.woken.contains(payload))
    }
}

// SPDX-License-Identifier: GPL-2.0

//! rust/rules/queue.rs: random histories against a model that does everything the slow way.

mod model;
mod shards;
mod sim;

use kdp_rules::rules::queue::{EnterError, Event, Key, Owner};
use proptest::prelude::*;
use sim::{Op, OutOfMemory, Sim, OWNERS, THREADS};

/// Few pages, so that threads meet; and the first and the last there can be.
fn key() -> impl Strategy<Value = Key> {
    let slot = prop_oneof![Just(0u32), Just(1), Just(u32::MAX)];
    let page = prop_oneof![3 => 0..4u64, 1 => Just(u64::MAX)];
    (slot, page).prop_map(|(slot, page)| Key { slot, page })
}

fn memory() -> impl Strategy<Value = Option<OutOfMemory>> {
    prop_oneof![
        12 => Just(None),
        1 => Just(Some(OutOfMemory::First)),
        1 => Just(Some(OutOfMemory::Order)),
        1 => Just(Some(OutOfMemory::Pages)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let (thread, owner) = (0..THREADS, (0..OWNERS).prop_map(Owner));
    let last = prop_oneof![Just(u64::MAX), 0..4u64];
    prop_oneof![
        24 => (thread.clone(), key(), memory())
            .prop_map(|(thread, key, memory)| Op::Enter { thread, key, memory }),
        8 => thread.prop_map(|thread| Op::Leave { thread }),
        12 => owner.clone().prop_map(|owner| Op::Read { owner }),
        4 => (0..4usize).prop_map(|back| Op::UnreadAgain { back }),
        4 => owner.prop_map(|owner| Op::Requeue { owner }),
        6 => (key(), last).prop_map(|(key, last)| Op::Resolve {
            slot: key.slot,
            first: key.page,
            last,
        }),
        1 => Just(Op::Close),
    ]
}

fn history() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 0..60)
}

fn key_of(page: u64) -> Key {
    Key { slot: 1, page }
}

fn enter(sim: &mut Sim, thread: usize, page: u64) {
    sim.apply(Op::Enter {
        thread,
        key: key_of(page),
        memory: None,
    });
}

fn keys(events: &[Event<u32>]) -> Vec<Key> {
    events.iter().map(|event| event.key).collect()
}

proptest! {
    /// Every answer, every count, and what the maps hold, after every step. Whatever the history,
    /// the unread events come in the order of arrival: this is where the cursor shows.
    #[test]
    fn does_what_the_model_does(history in history()) {
        for steps in 0..=history.len() {
            let mut sim = Sim::new();
            for &op in &history[..steps] {
                sim.apply(op);
            }
            sim.drain(Owner(OWNERS));
            prop_assert_eq!(sim.queue.unread(), 0);
        }
    }

    /// Invariant 4: an event is not lost with its reader.
    #[test]
    fn what_readers_leave_is_all_delivered_again(history in history()) {
        let mut sim = Sim::new();
        for op in history {
            sim.apply(op);
        }
        for owner in 0..OWNERS {
            sim.apply(Op::Requeue { owner: Owner(owner) });
        }
        let waited_for = sim.model.keys();
        prop_assert_eq!(keys(&sim.drain(Owner(OWNERS))), waited_for);
    }

    /// A resolve of everything leaves nobody waiting, and each page's gate is opened once.
    #[test]
    fn everybody_is_woken_in_the_end(history in history()) {
        let mut sim = Sim::new();
        for op in history {
            sim.apply(op);
        }
        for slot in [0, 1, u32::MAX] {
            sim.apply(Op::Resolve { slot, first: 0, last: u64::MAX });
        }
        prop_assert_eq!((sim.queue.pending(), sim.queue.unread()), (0, 0));
        prop_assert!(sim.all_woken());
    }

    /// Out of memory at the n-th insertion of a history, whichever that is.
    #[test]
    fn no_memory_changes_nothing(history in history(), nth in 0..40u32) {
        let mut sim = Sim::new();
        sim.memory.set(Some(nth));
        for op in history {
            sim.apply_with_little_memory(op);
        }
        sim.drain(Owner(OWNERS));
    }
}

#[test]
fn many_who_wait_for_a_page_make_one_event() {
    let mut sim = Sim::new();
    for thread in 0..THREADS {
        enter(&mut sim, thread, 7);
    }
    let events = sim.drain(Owner(0));
    assert_eq!(keys(&events), [key_of(7)]);
    assert_eq!(events[0].waiters, THREADS as u32);
    assert_eq!(events[0].deliveries, 1);
}

#[test]
fn events_come_in_the_order_of_arrival_not_of_pages() {
    let mut sim = Sim::new();
    for (thread, page) in [9, 2, 5, 0].into_iter().enumerate() {
        enter(&mut sim, thread, page);
    }
    assert_eq!(keys(&sim.drain(Owner(0))), [9, 2, 5, 0].map(key_of));
}

#[test]
fn redelivery_keeps_the_order_and_counts_deliveries() {
    let mut sim = Sim::new();
    for (thread, page) in [9, 2, 5].into_iter().enumerate() {
        enter(&mut sim, thread, page);
    }
    sim.apply(Op::Read { owner: Owner(0) });
    sim.apply(Op::Read { owner: Owner(1) });
    enter(&mut sim, 3, 1);
    sim.apply(Op::Requeue { owner: Owner(0) });
    let events = sim.drain(Owner(2));
    assert_eq!(keys(&events), [9, 5, 1].map(key_of), "2 is with its reader");
    assert_eq!(
        events.iter().map(|e| e.deliveries).collect::<Vec<_>>(),
        [2, 1, 1]
    );
}

#[test]
fn an_undelivered_event_does_not_count_as_delivered() {
    let mut sim = Sim::new();
    enter(&mut sim, 0, 3);
    sim.apply(Op::Read { owner: Owner(0) });
    sim.apply(Op::UnreadAgain { back: 0 });
    assert_eq!(sim.drain(Owner(1))[0].deliveries, 1);
}

/// Its reader went away, another one has it, and only then the first delivery turns out to have failed.
#[test]
fn an_undelivered_event_is_not_taken_from_the_next_reader() {
    let mut sim = Sim::new();
    enter(&mut sim, 0, 3);
    sim.apply(Op::Read { owner: Owner(0) });
    sim.apply(Op::Requeue { owner: Owner(0) });
    sim.apply(Op::Read { owner: Owner(1) });
    sim.apply(Op::UnreadAgain { back: 1 });
    assert_eq!(sim.drain(Owner(2)), []);
}

/// The entry it waited at is gone and another one is there: that one's waiter must stay.
#[test]
fn who_leaves_late_does_not_take_the_next_entry_along() {
    let mut sim = Sim::new();
    enter(&mut sim, 0, 3);
    sim.apply(Op::Resolve {
        slot: 1,
        first: 3,
        last: 3,
    });
    enter(&mut sim, 1, 3);
    sim.apply(Op::Leave { thread: 0 });
    assert_eq!(keys(&sim.drain(Owner(0))), [key_of(3)]);
}

#[test]
fn an_event_goes_with_its_last_waiter() {
    let mut sim = Sim::new();
    enter(&mut sim, 0, 3);
    enter(&mut sim, 1, 3);
    sim.apply(Op::Leave { thread: 0 });
    assert_eq!(sim.queue.unread(), 1);
    sim.apply(Op::Leave { thread: 1 });
    assert_eq!(sim.drain(Owner(0)), []);
}

#[test]
fn a_resolve_stays_in_its_range_and_memslot() {
    let mut sim = Sim::new();
    for page in 0..5 {
        enter(&mut sim, page as usize, page);
    }
    sim.apply(Op::Enter {
        thread: 5,
        key: Key { slot: 2, page: 2 },
        memory: None,
    });
    sim.apply(Op::Resolve {
        slot: 1,
        first: 1,
        last: 3,
    });
    let left = [key_of(0), key_of(4), Key { slot: 2, page: 2 }];
    assert_eq!(keys(&sim.drain(Owner(0))), left);
}

#[test]
fn nobody_enters_a_closed_queue() {
    let mut sim = Sim::new();
    enter(&mut sim, 0, 3);
    sim.apply(Op::Close);
    assert!(sim.all_woken());
    let late = sim.queue.enter(key_of(4), || Ok(0));
    assert_eq!(late.err(), Some(EnterError::Closed));
    assert_eq!(sim.drain(Owner(0)), []);
}

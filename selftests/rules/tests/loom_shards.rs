// SPDX-License-Identifier: GPL-2.0

//! Invariants 3 and 4 where the queue is in shards and readers sleep without a lock in common with who
//! makes an event (rust/events.rs, `Sleepers` in rust/ffi/wait.rs), on the real rust/rules/queue.rs and
//! stripe.rs. A thread that is never woken is a deadlock, and that loom finds.

use crate::host::PlainMap;
use crate::loomed::{check_most, Gate};
use kdp_rules::rules::queue::{EnterError, Entry, Key, Owner, Queue};
use kdp_rules::rules::stripe::Stripes;
use loom::sync::atomic::{
    fence, AtomicBool, AtomicU32,
    Ordering::{Relaxed, SeqCst},
};
use loom::sync::{Mutex, Notify};
use loom::thread;
use std::sync::Arc;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// Who makes an event looks for sleepers without a barrier.
    TellUnordered,
    /// A reader looks for events, then goes among the sleepers.
    LookFirst,
    /// A reader looks for events without a barrier after it went among the sleepers.
    LookUnordered,
    /// A reader looks at one shard before it sleeps.
    LookAtOne,
    /// A reader that need not sleep stays among the sleepers.
    StayAsleep,
    /// A reader that was told of an event and found another one keeps it to itself.
    KeepToItself,
    /// Readers are told before the event is there to be seen.
    TellFirst,
    /// A resolve of a range goes to its first page's shard.
    ResolveOne,
    /// A reader's end puts back what it read of one shard.
    RequeueOne,
    /// Nobody may enter one shard any more.
    CloseOne,
}

type EventQueue = Queue<PlainMap<Key, Entry<Arc<Gate>>>, PlainMap<u64, Key>>;

struct Shard {
    queue: Mutex<EventQueue>,
    unread: AtomicU32,
}

/// The entries of a wait queue. Not loomed::Sleepers: loom lets a thread that is told go on at once also where
/// it waits for a lock by then.
#[derive(Default)]
struct WaitQueue(Vec<Arc<Notify>>);

impl WaitQueue {
    fn add(&mut self, entry: &Arc<Notify>) {
        self.remove(entry);
        self.0.push(Arc::clone(entry));
    }

    fn remove(&mut self, entry: &Arc<Notify>) {
        self.0.retain(|other| !Arc::ptr_eq(other, entry));
    }

    fn tell_one(&mut self) {
        if !self.0.is_empty() {
            self.0.remove(0).notify();
        }
    }

    fn tell_all(&mut self) {
        for entry in self.0.drain(..) {
            entry.notify();
        }
    }
}

/// A VM with two shards.
struct Vm {
    broken: Broken,
    division: Stripes,
    shards: [Shard; 2],
    /// The wait queue, and what `waitqueue_active()` sees of it without its lock.
    sleepers: Mutex<WaitQueue>,
    active: AtomicBool,
}

/// A page of each shard.
fn keys() -> [Key; 2] {
    let division = Stripes::for_cpus(2);
    [0, 1].map(|shard| {
        let page = (0..).find(|&page| division.of_page(1, page) == shard);
        Key {
            slot: 1,
            page: page.unwrap(),
        }
    })
}

impl Vm {
    fn new(broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            broken,
            division: Stripes::for_cpus(2),
            shards: [0, 1].map(|_| Shard {
                queue: Mutex::new(Queue::new(PlainMap::new(), PlainMap::new())),
                unread: AtomicU32::new(0),
            }),
            sleepers: Mutex::default(),
            active: AtomicBool::new(false),
        })
    }

    fn with<R>(&self, shard: usize, change: impl FnOnce(&mut EventQueue) -> R) -> R {
        let shard = &self.shards[shard];
        let mut queue = shard.queue.lock().unwrap();
        let result = change(&mut queue);
        shard.unread.store(queue.unread(), Relaxed);
        result
    }

    fn shards(&self, only_one: Broken) -> impl Iterator<Item = usize> {
        0..if self.broken == only_one { 1 } else { 2 }
    }

    fn tell(&self, how: fn(&mut WaitQueue)) {
        if self.broken != Broken::TellUnordered {
            fence(SeqCst);
        }
        if self.active.load(Relaxed) {
            let mut sleepers = self.sleepers.lock().unwrap();
            how(&mut sleepers);
            self.active.store(!sleepers.0.is_empty(), Relaxed);
        }
    }

    fn enter(&self, key: Key) -> Result<Arc<Gate>, EnterError> {
        if self.broken == Broken::TellFirst {
            self.tell(WaitQueue::tell_one);
        }
        let shard = self.division.of_page(key.slot, key.page);
        let (_, gate, is_new) = self.with(shard, |queue| {
            queue.enter(key, || Ok(Arc::new(Gate::default())))
        })?;
        if is_new && self.broken != Broken::TellFirst {
            self.tell(WaitQueue::tell_one);
        }
        Ok(gate)
    }

    /// A thread that waits for a page. Whether it was resolved.
    fn wait(&self, key: Key) -> bool {
        match self.enter(key) {
            Ok(gate) => gate.wait(),
            Err(_) => return false,
        }
        true
    }

    fn resolve(&self, first: u64, last: u64) {
        let shards = self.division.of_range(1, first, last);
        let most = if self.broken == Broken::ResolveOne {
            1
        } else {
            2
        };
        for shard in shards.take(most) {
            self.with(shard, |queue| {
                queue.resolve(1, first, last, |gate: Arc<Gate>| gate.open())
            });
        }
    }

    fn has_unread(&self) -> bool {
        self.shards(Broken::LookAtOne)
            .any(|shard| self.shards[shard].unread.load(Relaxed) > 0)
    }

    fn look(&self, owner: Owner, turn: u32) -> Option<Key> {
        self.division.by_turns(turn).find_map(|shard| {
            if self.shards[shard].unread.load(Relaxed) == 0 {
                return None;
            }
            let (_, event) = self.with(shard, |queue| queue.read(owner))?;
            Some(event.key)
        })
    }

    /// wait_event_interruptible_exclusive(), include/linux/wait.h.
    fn sleep(&self) {
        let entry = Arc::new(Notify::new());
        loop {
            if self.broken == Broken::LookFirst && self.has_unread() {
                return;
            }
            let mut sleepers = self.sleepers.lock().unwrap();
            sleepers.add(&entry);
            self.active.store(true, Relaxed);
            drop(sleepers);
            if self.broken != Broken::LookUnordered {
                fence(SeqCst);
            }
            if self.broken != Broken::LookFirst && self.has_unread() {
                if self.broken != Broken::StayAsleep {
                    let mut sleepers = self.sleepers.lock().unwrap();
                    sleepers.remove(&entry);
                    self.active.store(!sleepers.0.is_empty(), Relaxed);
                }
                return;
            }
            entry.wait();
        }
    }

    /// A blocking read(2) of one event.
    fn next(&self, owner: Owner, turn: u32) -> Key {
        self.next_of(owner, turn, false)
    }

    /// The same, where the reader has looked in vain before.
    fn next_asleep(&self, owner: Owner, turn: u32) -> Key {
        self.sleep();
        self.next_of(owner, turn, true)
    }

    fn next_of(&self, owner: Owner, turn: u32, mut told: bool) -> Key {
        loop {
            if let Some(key) = self.look(owner, turn) {
                if told && self.broken != Broken::KeepToItself && self.has_unread() {
                    self.tell(WaitQueue::tell_one);
                }
                return key;
            }
            self.sleep();
            told = true;
        }
    }

    /// Reads one event and answers it.
    fn serve(&self, owner: Owner, turn: u32) {
        let key = self.next(owner, turn);
        self.resolve(key.page, key.page);
    }

    fn left_by(&self, owner: Owner) {
        let mut found = 0;
        for shard in self.shards(Broken::RequeueOne) {
            found += self.with(shard, |queue| queue.requeue(owner));
        }
        if found > 0 {
            self.tell(WaitQueue::tell_all);
        }
    }

    fn close(&self) {
        for shard in [0, 1] {
            self.with(shard, |queue| {
                if shard == 1 && self.broken == Broken::CloseOne {
                    queue.resolve(1, 0, u64::MAX, |gate: Arc<Gate>| gate.open());
                } else {
                    queue.close(|gate: Arc<Gate>| gate.open());
                }
            });
        }
    }

    fn assert_nobody_waits(&self) {
        for shard in [0, 1] {
            let left = self.with(shard, |queue| (queue.pending(), queue.unread()));
            assert_eq!(left, (0, 0), "an entry stayed in shard {shard}");
        }
    }
}

fn spawn<T: 'static>(vm: &Arc<Vm>, run: impl FnOnce(&Vm) -> T + 'static) -> thread::JoinHandle<T> {
    let vm = Arc::clone(vm);
    thread::spawn(move || run(&vm))
}

/// A waiter in the shard at which the reader looks last, or first, and a reader that may sleep.
fn one_of_each(broken: Broken) {
    for key in keys() {
        loom::model(move || {
            let vm = Vm::new(broken);
            let waiter = spawn(&vm, move |vm| vm.wait(key));
            vm.serve(Owner(1), 0);
            assert!(waiter.join().unwrap());
            vm.assert_nobody_waits();
        });
    }
}

#[test]
fn an_event_of_any_shard_wakes_the_reader() {
    one_of_each(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_tell_without_a_barrier_is_found() {
    one_of_each(Broken::TellUnordered);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_look_before_sleep_is_found() {
    one_of_each(Broken::LookFirst);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_look_without_a_barrier_is_found() {
    one_of_each(Broken::LookUnordered);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_look_at_one_shard_is_found() {
    one_of_each(Broken::LookAtOne);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_tell_before_the_event_is_found() {
    one_of_each(Broken::TellFirst);
}

/// Two events, in two shards, and two readers, each of which takes one and is busy then: each event calls a
/// reader. A reader looks at one shard after the other, so it can miss an event that comes behind its back
/// while the call goes to another one, which is about to take the first event.
fn two_of_each(broken: Broken) {
    // All that there are with two preemptions take minutes. What is broken below shows among the first 5,000.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.max_permutations = Some(50_000);
    model.check(move || {
        let vm = Vm::new(broken);
        let reader = spawn(&vm, |vm| vm.next_asleep(Owner(1), 1));
        let touchers = keys().map(|key| spawn(&vm, move |vm| vm.enter(key).is_ok()));
        let mut read = [vm.next_asleep(Owner(2), 0), reader.join().unwrap()];
        read.sort();
        assert_eq!(read, keys());
        for toucher in touchers {
            assert!(toucher.join().unwrap());
        }
    });
}

#[test]
fn each_event_wakes_a_reader() {
    two_of_each(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_stay_among_the_sleepers_is_found() {
    two_of_each(Broken::StayAsleep);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_keep_the_call_to_itself_is_found() {
    two_of_each(Broken::KeepToItself);
}

/// One call for all pages.
fn resolve_all(broken: Broken) {
    check_most(3, move || {
        let vm = Vm::new(broken);
        let gates = keys().map(|key| vm.enter(key).unwrap());
        let waiters = gates.map(|gate| spawn(&vm, move |_| gate.wait()));
        let [a, b] = keys();
        vm.resolve(a.page.min(b.page), a.page.max(b.page));
        for waiter in waiters {
            waiter.join().unwrap();
        }
        vm.assert_nobody_waits();
    });
}

#[test]
fn a_resolve_of_a_range_wakes_in_all_shards() {
    resolve_all(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_resolve_of_one_shard_is_found() {
    resolve_all(Broken::ResolveOne);
}

/// A handler has read events of both shards and dies while the next one sleeps in read(2).
fn die_with_events(broken: Broken) {
    check_most(3, move || {
        let vm = Vm::new(broken);
        let keys = keys();
        for key in keys {
            vm.enter(key).unwrap();
        }
        let dying = spawn(&vm, |vm| {
            for turn in [0, 1] {
                vm.look(Owner(1), turn);
            }
            vm.left_by(Owner(1));
        });
        let mut read = [vm.next(Owner(2), 0), vm.next(Owner(2), 1)];
        read.sort();
        assert_eq!(read, keys);
        dying.join().unwrap();
        vm.resolve(0, u64::MAX);
        vm.assert_nobody_waits();
    });
}

#[test]
fn a_dead_readers_events_wake_the_next_reader() {
    die_with_events(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_requeue_of_one_shard_is_found() {
    die_with_events(Broken::RequeueOne);
}

fn wait_and_close(broken: Broken) {
    check_most(3, move || {
        let vm = Vm::new(broken);
        let waiters = keys().map(|key| spawn(&vm, move |vm| vm.wait(key)));
        vm.close();
        for waiter in waiters {
            waiter.join().unwrap();
        }
        vm.assert_nobody_waits();
    });
}

#[test]
fn closing_wakes_and_nobody_waits_after_in_any_shard() {
    wait_and_close(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_close_of_one_shard_is_found() {
    wait_and_close(Broken::CloseOne);
}

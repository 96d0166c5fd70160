// SPDX-License-Identifier: GPL-2.0

//! Invariant 3, "no lost wake-up": rust/fault.rs waits, rust/memslot.rs resolves, handlers read
//! (rust/events.rs), on the real rust/rules/queue.rs and bits.rs. A thread that is never woken is a
//! deadlock, and that loom finds.

use crate::host::PlainMap;
use crate::loomed::{check_most, part, Chunk, Gate, Sleepers, BIT, WORD};
use kdp_rules::rules::queue::{EnterError, Entry, Key, Owner, Queue, Ticket};
use kdp_rules::rules::touch::State;
use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::sync::{Mutex, RwLock};
use loom::thread;
use std::sync::Arc;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A waiter looks at the state before it enters, and not under the queue's lock.
    NoSecondLook,
    /// A resolve wakes before it changes the state.
    WakeFirst,
    /// A waiter tells the readers before it enters.
    TellFirst,
    /// Closing wakes, but lets others enter.
    CloseOnlyWakes,
    /// A reader's end puts its events back, and tells nobody.
    LeaveSilently,
    /// The state is read by one look at each bit.
    OneLook,
}

type EventQueue = Queue<PlainMap<Key, Entry<Arc<Gate>>>, PlainMap<u64, Key>>;

const KEY: Key = Key { slot: 1, page: 0 };

/// A VM with a memslot of one page.
struct Vm {
    broken: Broken,
    queue: Mutex<EventQueue>,
    readable: Mutex<Sleepers>,
    closed: AtomicBool,
    changes: Mutex<()>,
    pages: RwLock<Chunk>,
}

#[derive(Debug, PartialEq, Eq)]
enum Touched {
    Mapped,
    Failed,
}

impl Vm {
    fn new(broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            broken,
            queue: Mutex::new(Queue::new(PlainMap::new(), PlainMap::new())),
            readable: Mutex::default(),
            closed: AtomicBool::new(false),
            changes: Mutex::new(()),
            pages: RwLock::new(Chunk::new(0, 0)),
        })
    }

    fn look(&self, pages: &Chunk) -> State {
        if self.broken == Broken::OneLook {
            pages.state_by_one_look()
        } else {
            pages.state()
        }
    }

    fn state(&self) -> State {
        self.look(&self.pages.read().unwrap())
    }

    /// rust/events.rs: enter, unless the page is no longer absent.
    fn enter(&self) -> Result<Option<(Ticket, Arc<Gate>)>, EnterError> {
        if self.broken == Broken::TellFirst {
            self.readable.lock().unwrap().tell_one();
        }
        let pages = self.pages.read().unwrap();
        let mut queue = self.queue.lock().unwrap();
        if self.broken != Broken::NoSecondLook && self.look(&pages) != State::Absent {
            return Ok(None);
        }
        let entered = queue.enter(KEY, || Ok(Arc::new(Gate::default())));
        drop((queue, pages));
        let (ticket, gate, is_new) = entered?;
        if is_new && self.broken != Broken::TellFirst {
            self.readable.lock().unwrap().tell_one();
        }
        Ok(Some((ticket, gate)))
    }

    fn leave(&self, ticket: Ticket) {
        self.queue.lock().unwrap().leave(ticket);
    }

    fn wake(&self) {
        let mut queue = self.queue.lock().unwrap();
        queue.resolve(KEY.slot, 0, 0, |gate: Arc<Gate>| gate.open());
    }

    /// rust/fault.rs: fault and wait, retried as the kernel does.
    fn touch(&self) -> Touched {
        loop {
            match self.state() {
                State::Present => return Touched::Mapped,
                State::Zero => {
                    self.fill_zero();
                    continue;
                }
                State::Absent | State::Sourced | State::Removed => (),
                State::Poisoned => return Touched::Failed,
            }
            if self.closed.load(Relaxed) {
                return Touched::Failed;
            }
            match self.enter() {
                // Whoever opens the gate takes the ticket away.
                Ok(Some((_, gate))) => gate.wait(),
                Ok(None) => (),
                Err(_) => return Touched::Failed,
            }
        }
    }

    fn fill_zero(&self) {
        let _changes = self.changes.lock().unwrap();
        let pages = self.pages.read().unwrap();
        if pages.state() == State::Zero {
            pages.zero_filled();
        }
    }

    /// KDP_MARK.
    fn mark(&self, to: State) {
        let _changes = self.changes.lock().unwrap();
        if self.broken == Broken::WakeFirst {
            self.wake();
        }
        let pages = self.pages.read().unwrap();
        match to {
            State::Zero => pages.mark_zero(part(0, 1)),
            _ => pages.mark_present(part(0, 1)),
        };
        drop(pages);
        if self.broken != Broken::WakeFirst {
            self.wake();
        }
    }

    /// A blocking read(2) of one event.
    fn next(&self, owner: Owner) -> Key {
        loop {
            let mut queue = self.queue.lock().unwrap();
            if let Some((_, event)) = queue.read(owner) {
                return event.key;
            }
            self.readable.lock().unwrap().add();
            drop(queue);
            thread::park();
        }
    }

    /// A reader's end.
    fn left_by(&self, owner: Owner) {
        let found = self.queue.lock().unwrap().requeue(owner);
        if found > 0 && self.broken != Broken::LeaveSilently {
            self.readable.lock().unwrap().tell_all();
        }
    }

    /// The end of the last of the VM's descriptors.
    fn close(&self) {
        if self.broken == Broken::CloseOnlyWakes {
            return self.wake();
        }
        self.closed.store(true, Relaxed);
        let mut queue = self.queue.lock().unwrap();
        queue.close(|gate: Arc<Gate>| gate.open());
    }

    fn assert_nobody_waits(&self) {
        let queue = self.queue.lock().unwrap();
        assert_eq!((queue.pending(), queue.unread()), (0, 0), "an entry stayed");
    }
}

fn spawn<T: 'static>(vm: &Arc<Vm>, run: fn(&Vm) -> T) -> thread::JoinHandle<T> {
    let vm = Arc::clone(vm);
    thread::spawn(move || run(&vm))
}

fn wait_and_mark(broken: Broken) {
    loom::model(move || {
        let vm = Vm::new(broken);
        let waiter = spawn(&vm, Vm::touch);
        vm.mark(State::Present);
        assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        vm.assert_nobody_waits();
    });
}

#[test]
fn a_mark_wakes_the_waiter() {
    wait_and_mark(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_look_before_enter_is_found() {
    wait_and_mark(Broken::NoSecondLook);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_wake_before_change_is_found() {
    wait_and_mark(Broken::WakeFirst);
}

/// A process sets the bit without a system call, then wakes with KDP_MARK, which changes nothing.
#[test]
fn a_mark_after_a_bit_set_by_hand_wakes() {
    check_most(4, || {
        let vm = Vm::new(Broken::Nothing);
        let waiter = spawn(&vm, Vm::touch);
        vm.pages.read().unwrap().present[WORD].user_set(BIT);
        vm.mark(State::Present);
        assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        vm.assert_nobody_waits();
    });
}

#[test]
fn two_waiters_are_both_woken() {
    check_most(3, || {
        let vm = Vm::new(Broken::Nothing);
        let waiters = [spawn(&vm, Vm::touch), spawn(&vm, Vm::touch)];
        vm.mark(State::Present);
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        }
        vm.assert_nobody_waits();
    });
}

/// A killed thread leaves while another one waits for the same page.
#[test]
fn who_is_killed_takes_nobody_elses_wake_up() {
    check_most(3, || {
        let vm = Vm::new(Broken::Nothing);
        let waiter = spawn(&vm, Vm::touch);
        let killed = spawn(&vm, |vm| {
            if let Some((ticket, _gate)) = vm.enter().unwrap() {
                vm.leave(ticket);
            }
        });
        vm.mark(State::Present);
        assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        killed.join().unwrap();
        vm.assert_nobody_waits();
    });
}

/// A handler sleeps in read(2) until there is an event, and answers it.
fn wait_and_handle(broken: Broken) {
    loom::model(move || {
        let vm = Vm::new(broken);
        let waiter = spawn(&vm, Vm::touch);
        assert_eq!(vm.next(Owner(1)), KEY);
        vm.mark(State::Present);
        assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        vm.assert_nobody_waits();
    });
}

#[test]
fn an_event_wakes_its_reader() {
    wait_and_handle(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_tell_before_enter_is_found() {
    wait_and_handle(Broken::TellFirst);
}

/// Invariant 4: a handler reads the event and dies while the next one sleeps in read(2).
fn die_with_the_event(broken: Broken) {
    loom::model(move || {
        let vm = Vm::new(broken);
        assert!(vm.enter().unwrap().is_some());
        let dying = spawn(&vm, |vm| {
            vm.queue.lock().unwrap().read(Owner(1));
            vm.left_by(Owner(1));
        });
        assert_eq!(vm.next(Owner(2)), KEY);
        dying.join().unwrap();
        vm.wake();
        vm.assert_nobody_waits();
    });
}

#[test]
fn a_dead_readers_event_wakes_the_next_reader() {
    die_with_the_event(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_silent_requeue_is_found() {
    die_with_the_event(Broken::LeaveSilently);
}

fn wait_and_close(broken: Broken) {
    loom::model(move || {
        let vm = Vm::new(broken);
        let waiter = spawn(&vm, Vm::touch);
        vm.close();
        assert_eq!(waiter.join().unwrap(), Touched::Failed);
        vm.assert_nobody_waits();
    });
}

#[test]
fn closing_wakes_and_nobody_waits_after() {
    wait_and_close(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_close_that_only_wakes_is_found() {
    wait_and_close(Broken::CloseOnlyWakes);
}

/// A page is marked zero and filled by another touch, which wakes nobody, while a thread goes to
/// wait.
fn wait_and_zero(broken: Broken) {
    check_most(4, move || {
        let vm = Vm::new(broken);
        let waiter = spawn(&vm, Vm::touch);
        vm.mark(State::Zero);
        vm.fill_zero();
        assert_eq!(waiter.join().unwrap(), Touched::Mapped);
        vm.assert_nobody_waits();
    });
}

#[test]
fn a_page_filled_by_another_touch_wakes() {
    wait_and_zero(Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_one_look_at_each_bit_is_found() {
    wait_and_zero(Broken::OneLook);
}

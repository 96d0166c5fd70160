// SPDX-License-Identifier: GPL-2.0

//! The VM's event queue: who waits for which page, and who has been told.
//!
//! The rules are in rules/queue.rs; here they meet the kernel's lock, trees, wait queues and threads.
//! The queue's mutex is innermost: nothing else is taken under it, and userspace is not touched. It
//! is taken under a fault's mmap or VMA lock; threads sleep on a page's [`Gate`], outside of both.

use crate::{
    ffi::{
        task::{
            current_reader,
            Pid, //
        },
        uapi::*,
        wait::{
            now_ns,
            Gate,
            Until, //
        }, //
    },
    max_poll_ns,
    notices::{
        Notice,
        Notices, //
    },
    rules::{
        poll,
        queue::{
            Delivery,
            EnterError,
            Entry,
            Event,
            Key,
            NoMemory,
            OrderedMap,
            Owner,
            Queue,
            Ticket, //
        },
    },
};
use kernel::{
    fs::File,
    new_mutex,
    new_poll_condvar,
    prelude::*,
    rbtree::RBTree,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        poll::{
            PollCondVar,
            PollTable, //
        },
        Arc,
        Mutex, //
    },
    uaccess::UserSliceWriter, //
};

/// The kernel's tree, as the rules want it.
struct Map<K, V>(RBTree<K, V>);

impl<K: Ord + Copy, V> OrderedMap<K, V> for Map<K, V> {
    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key)
    }

    fn insert(&mut self, key: K, value: V) -> Result<(), NoMemory> {
        self.0
            .try_create_and_insert(key, value, GFP_KERNEL_ACCOUNT)
            .map(|_| ())
            .map_err(|_| NoMemory)
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        self.0.remove(key)
    }

    fn lower_bound(&self, key: &K) -> Option<K> {
        self.0.cursor_lower_bound(key).map(|c| *c.current().0)
    }
}

/// The access that came first, and the gate that it and all after it wait at.
#[pin_data]
pub(crate) struct Waited {
    access: Access,
    thread: Pid,
    #[pin]
    gate: Gate,
}

/// A touch, as an event reports it.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    /// The caller's name of the memslot.
    pub(crate) slot_id: u32,
    /// The page's frame number in the guest.
    pub(crate) gfn: u64,
    /// KDP_ACCESS_*.
    pub(crate) flags: u32,
}

/// What a reader gets next.
enum Next {
    Event(Delivery, Event<Arc<Waited>>),
    Notice(Notice),
    Nothing,
}

type EventQueue = Queue<Map<Key, Entry<Arc<Waited>>>, Map<u64, Key>>;

/// The event queue.
#[pin_data]
pub(crate) struct Events {
    #[pin]
    queue: Mutex<EventQueue>,
    #[pin]
    notices: Notices,
    #[pin]
    readable: PollCondVar,
    /// A copy of the queue's "closed" for a fault that does not wait. Relaxed: who goes on to wait
    /// learns it again under the mutex, and who exits may be a moment late.
    closed: Atomic<bool>,
    /// How long a waiter looks out for its page before it sleeps, in nanoseconds. A guess: relaxed.
    poll_ns: Atomic<u64>,
}

impl Events {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            queue <- new_mutex!(
                Queue::new(Map(RBTree::new()), Map(RBTree::new())),
                "kdp_events"
            ),
            notices <- Notices::new(),
            readable <- new_poll_condvar!("kdp_readable"),
            closed: Atomic::new(false),
            poll_ns: Atomic::new(0),
        })
    }

    /// The current thread begins to wait for a page, unless `is_absent` says that it need not.
    ///
    /// That is asked under the queue's lock. Who resolves changes the state before it takes this lock:
    /// either the change is seen here, or the entry is found there. So no wake-up is lost, and there is
    /// never an event for a page that is present: a handler would fill it over what was written since.
    pub(crate) fn enter(
        &self,
        key: Key,
        access: Access,
        is_absent: impl FnOnce() -> bool,
    ) -> Result<Option<(Ticket, Arc<Waited>)>, EnterError> {
        let first = || {
            let thread = Pid::current().ok_or(NoMemory)?;
            let waited = pin_init!(Waited {
                access,
                thread,
                gate <- Gate::new(),
            });
            Arc::pin_init(waited, GFP_KERNEL_ACCOUNT).map_err(|_| NoMemory)
        };
        let mut queue = self.queue.lock();
        if !is_absent() {
            return Ok(None);
        }
        let (ticket, first, is_new) = queue.enter(key, first)?;
        drop(queue);
        if is_new {
            self.readable.notify_one();
        }
        Ok(Some((ticket, first)))
    }

    /// The current thread waits until its page is resolved, or for a signal.
    pub(crate) fn wait(&self, ticket: Ticket, waited: &Waited, until: Until) {
        let poll = self.poll_ns.load(Relaxed);
        let start = now_ns();
        // Whoever opens the gate has taken the ticket away.
        if !waited.gate.poll(poll) && !waited.gate.wait(until) {
            self.leave(ticket);
            return;
        }
        let next = poll::next(poll, now_ns().saturating_sub(start), max_poll_ns());
        if next != poll {
            self.poll_ns.store(next, Relaxed);
        }
    }

    /// The current thread's touch of a page failed: readers are told, nobody waits.
    pub(crate) fn notice(&self, access: Access, page: u64, error: Error) {
        let Some(thread) = Pid::current() else { return };
        let notice = Notice {
            access,
            page,
            thread,
            error,
        };
        if self.notices.push(notice) {
            // A reader has either seen it, or sleeps by the time the lock is free.
            drop(self.queue.lock());
            self.readable.notify_one();
        }
    }

    /// The current thread no longer waits.
    fn leave(&self, ticket: Ticket) {
        self.queue.lock().leave(ticket);
    }

    /// Lets go on who waits for pages `first` to `last` of a memslot; returns how many pages that
    /// are.
    pub(crate) fn resolve(&self, slot: u32, first: u64, last: u64) -> u64 {
        self.queue
            .lock()
            .resolve(slot, first, last, |w: Arc<Waited>| w.gate.open())
    }

    /// A process no longer has the VM: what it has read and not resolved is for the next.
    pub(crate) fn left_by(&self, owner: Owner) {
        if self.queue.lock().requeue(owner) > 0 {
            self.readable.notify_all();
        }
    }

    /// Nobody can resolve events any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        self.queue.lock().close(|w: Arc<Waited>| w.gate.open());
    }

    /// Whether somebody can.
    pub(crate) fn is_served(&self) -> bool {
        !self.closed.load(Relaxed)
    }

    /// Pages that are waited for, and those of them that no reader has.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let queue = self.queue.lock();
        (queue.pending(), queue.unread())
    }

    /// Whether an event can be read; if not, `table` is told when.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> bool {
        // First the registration, then the look: an event that comes in between wakes.
        table.register_wait(file, &self.readable);
        self.queue.lock().unread() > 0 || !self.notices.is_empty()
    }

    /// Delivers events; returns how many bytes.
    pub(crate) fn read(&self, mut out: UserSliceWriter, nonblock: bool) -> Result<usize> {
        const SIZE: usize = size_of::<kdp_event>();
        if out.len() < SIZE {
            return Err(EINVAL);
        }
        let owner = current_reader();
        let mut done = 0;
        while out.len() >= SIZE {
            let next = self.next(owner, nonblock || done > 0)?;
            let raw = match &next {
                Next::Nothing => break,
                Next::Event(_, event) => describe(event),
                Next::Notice(notice) => describe_notice(notice),
            };
            if let Err(e) = out.write_slice(raw.bytes()) {
                match next {
                    Next::Event(delivery, _) => self.queue.lock().unread_again(delivery),
                    Next::Notice(notice) => self.notices.put_back(notice),
                    Next::Nothing => (),
                }
                self.readable.notify_one();
                return if done > 0 { Ok(done) } else { Err(e) };
            }
            done += SIZE;
        }
        if done == 0 {
            return Err(EAGAIN);
        }
        Ok(done)
    }

    /// The next event; waits for one, unless `at_once`.
    fn next(&self, owner: Owner, at_once: bool) -> Result<Next> {
        let mut queue = self.queue.lock();
        loop {
            if let Some((delivery, event)) = queue.read(owner) {
                return Ok(Next::Event(delivery, event));
            }
            if let Some(notice) = self.notices.pop() {
                return Ok(Next::Notice(notice));
            }
            if at_once {
                return Ok(Next::Nothing);
            }
            if self.readable.wait_interruptible(&mut queue) {
                // The wake-up that was perhaps meant for this thread is for another one.
                self.readable.notify_one();
                return Err(ERESTARTSYS);
            }
        }
    }
}

fn describe(event: &Event<Arc<Waited>>) -> kdp_event {
    let Event {
        key,
        waiters,
        deliveries,
        payload: waited,
    } = event;
    let access = waited.access;
    kdp_event {
        type_: KDP_EVENT_ABSENT,
        slot_id: access.slot_id,
        page: key.page,
        gfn: access.gfn,
        access: access.flags,
        tid: waited.thread.number_here(),
        waiters: *waiters,
        deliveries: *deliveries,
        ..Default::default()
    }
}

fn describe_notice(notice: &Notice) -> kdp_event {
    kdp_event {
        type_: KDP_EVENT_SOURCE_ERROR,
        slot_id: notice.access.slot_id,
        page: notice.page,
        gfn: notice.access.gfn,
        access: notice.access.flags,
        tid: notice.thread.number_here(),
        deliveries: 1,
        error: -notice.error.to_errno(),
        ..Default::default()
    }
}

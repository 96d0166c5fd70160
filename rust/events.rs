// SPDX-License-Identifier: GPL-2.0

//! The VM's event queue: who waits for which page, and who has been told.
//!
//! The rules are in rules/queue.rs; here they meet the kernel's locks, trees, wait queues and threads.
//!
//! The queue is in shards (rules/stripe.rs says which page is where), each with a mutex of its own, so that
//! threads that wait for different pages have nothing in common to write to. Events of a shard are
//! delivered in the order of their arrival, and readers go from shard to shard.
//!
//! A shard's mutex is innermost: nothing else is taken under it, and userspace is not touched. It is
//! taken under a fault's mmap or VMA lock; threads sleep on a page's [`Gate`], outside of both. Nobody takes
//! two.

use crate::{
    compat::ehwpoison,
    ffi::{
        task::{
            current_reader,
            Pid, //
        },
        uapi::*,
        wait::{
            look_out,
            now_ns,
            Gate,
            Sleepers,
            Until, //
        }, //
    },
    max_poll_ns,
    memslot::Place,
    notices::{
        Notice,
        Notices,
        What, //
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
        stripe::Stripes, //
    },
};
use kernel::{
    cpu::nr_cpu_ids,
    fs::File,
    new_mutex,
    prelude::*,
    rbtree::RBTree,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        poll::PollTable,
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
struct Waited {
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

type EventQueue = Queue<Map<Key, Entry<Arc<Waited>>>, Map<u64, Key>>;

/// How long who waits looks out before sleeping, as those before have found it to pay (rules/poll.rs). In
/// nanoseconds, and a guess: relaxed.
struct Patience(Atomic<u64>);

impl Patience {
    /// None.
    fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Looks out by `look_out`, for so long, then sleeps by `sleep`: each says whether what was waited for came.
    fn wait(&self, look_out: impl FnOnce(u64) -> bool, sleep: impl FnOnce() -> bool) -> bool {
        let now = self.0.load(Relaxed);
        let start = now_ns();
        if !look_out(now) && !sleep() {
            return false;
        }
        let next = poll::next(now, now_ns().saturating_sub(start), max_poll_ns());
        if next != now {
            self.0.store(next, Relaxed);
        }
        true
    }
}

/// A part of the queue, in cache lines of its own.
#[pin_data]
#[repr(align(64))]
struct Shard {
    #[pin]
    queue: Mutex<EventQueue>,
    /// A copy of the queue's, for readers that look for a shard that has some. Changed under the mutex.
    /// Relaxed: a reader that is going to sleep has a full barrier before it looks, and who made an event
    /// one after this, before it looks for sleepers ([`Sleepers`]).
    unread: Atomic<u32>,
    /// What waiters have learned.
    patience: Patience,
}

impl Shard {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                queue <- new_mutex!(
                    Queue::new(Map(RBTree::new()), Map(RBTree::new())),
                    "kdp_events"
                ),
                unread: Atomic::new(0),
                patience: Patience::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Does something to the queue.
    fn with<R>(&self, change: impl FnOnce(&mut EventQueue) -> R) -> R {
        let mut queue = self.queue.lock();
        let result = change(&mut queue);
        self.unread.store(queue.unread(), Relaxed);
        result
    }

    fn has_unread(&self) -> bool {
        self.unread.load(Relaxed) > 0
    }
}

/// A thread that waits. It holds the shard: the VM may go while the thread sleeps.
pub(crate) struct Waiter {
    shard: Arc<Shard>,
    ticket: Ticket,
    waited: Arc<Waited>,
}

impl Waiter {
    /// The current thread waits until its page is resolved, or for a signal.
    pub(crate) fn wait(self, until: Until) {
        let Self {
            shard,
            ticket,
            waited,
        } = self;
        let came = shard
            .patience
            .wait(|ns| waited.gate.look_out(ns), || waited.gate.wait(until));
        // Whoever opens the gate has taken the ticket away.
        if !came {
            shard.with(|queue| queue.leave(ticket));
        }
    }
}

/// The event queue.
#[pin_data]
pub(crate) struct Events {
    shards: KVec<Arc<Shard>>,
    division: Stripes,
    /// A copy of the shards' "closed" for a fault that does not wait. Relaxed: who goes on to wait
    /// learns it again under the shard's mutex, and who exits may be a moment late.
    closed: Atomic<bool>,
    #[pin]
    notices: Notices,
    #[pin]
    readers: Readers,
}

/// What readers alone write to, and faults that find a reader asleep.
#[pin_data]
#[repr(align(64))]
struct Readers {
    #[pin]
    asleep: Sleepers,
    /// What those who wait for an event have learned.
    patience: Patience,
    /// Where the next one begins to look. Any number will do: relaxed.
    turn: Atomic<u32>,
}

impl Events {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        let division = Stripes::for_cpus(nr_cpu_ids());
        try_pin_init!(Self {
            shards: {
                let mut shards = KVec::with_capacity(division.count(), GFP_KERNEL_ACCOUNT)?;
                for _ in 0..division.count() {
                    shards.push(Shard::new()?, GFP_KERNEL_ACCOUNT)?;
                }
                shards
            },
            division,
            closed: Atomic::new(false),
            notices <- Notices::new(),
            readers <- pin_init!(Readers {
                asleep <- Sleepers::new(),
                patience: Patience::new(),
                turn: Atomic::new(0),
            }),
        }? Error)
    }

    /// The current thread begins to wait for a page, unless `is_absent` says that it need not.
    ///
    /// That is asked under the shard's lock. Who resolves changes the state before it takes this lock:
    /// either the change is seen here, or the entry is found there. So no wake-up is lost, and there is
    /// never an event for a page that is present: a handler would fill it over what was written since.
    pub(crate) fn enter(
        &self,
        key: Key,
        access: Access,
        is_absent: impl FnOnce() -> bool,
    ) -> Result<Option<Waiter>, EnterError> {
        let first = || {
            let thread = Pid::current().ok_or(NoMemory)?;
            let waited = pin_init!(Waited {
                access,
                thread,
                gate <- Gate::new(),
            });
            Arc::pin_init(waited, GFP_KERNEL_ACCOUNT).map_err(|_| NoMemory)
        };
        let shard = &self.shards[self.division.of_page(key.slot, key.page)];
        let entered =
            shard.with(|queue| is_absent().then(|| queue.enter(key, first)).transpose())?;
        let Some((ticket, waited, is_new)) = entered else {
            return Ok(None);
        };
        if is_new {
            self.readers.asleep.tell_one();
        }
        Ok(Some(Waiter {
            shard: shard.clone(),
            ticket,
            waited,
        }))
    }

    /// The current thread's touch of a page failed: readers are told, nobody waits.
    pub(crate) fn notice(&self, access: Access, page: u64, error: Error) {
        let Some(thread) = Pid::current() else { return };
        self.push(Notice {
            access,
            page,
            what: What::SourceError { thread, error },
        });
    }

    /// A page's frame has a memory error: readers are told.
    pub(crate) fn poisoned(&self, place: &Place, page: u64) {
        let access = Access {
            slot_id: place.id,
            gfn: place.base_gfn + page,
            flags: 0,
        };
        self.push(Notice {
            access,
            page,
            what: What::MemoryError,
        });
    }

    /// Where there is no room for one more it is counted elsewhere, or listed.
    fn push(&self, notice: Notice) {
        if self.notices.push(notice).is_none() {
            self.readers.asleep.tell_one();
        }
    }

    /// Lets go on who waits for pages `first` to `last` of a memslot; returns how many pages that
    /// are.
    pub(crate) fn resolve(&self, slot: u32, first: u64, last: u64) -> u64 {
        let resolve = |shard: usize| {
            self.shards[shard]
                .with(|queue| queue.resolve(slot, first, last, |w: Arc<Waited>| w.gate.open()))
        };
        self.division.of_range(slot, first, last).map(resolve).sum()
    }

    /// A process no longer has the VM: what it has read and not resolved is for the next.
    pub(crate) fn left_by(&self, owner: Owner) {
        let mut found = 0;
        for shard in &self.shards {
            found += shard.with(|queue| queue.requeue(owner));
        }
        if found > 0 {
            self.readers.asleep.tell_all();
        }
    }

    /// Nobody can resolve events any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        for shard in &self.shards {
            shard.with(|queue| queue.close(|w: Arc<Waited>| w.gate.open()));
        }
    }

    /// Whether somebody can.
    #[inline]
    pub(crate) fn is_served(&self) -> bool {
        !self.closed.load(Relaxed)
    }

    /// Pages that are waited for, and those of them that no reader has.
    pub(crate) fn counts(&self) -> (u32, u32) {
        self.shards.iter().fold((0, 0), |(pending, unread), shard| {
            let queue = shard.queue.lock();
            (pending + queue.pending(), unread + queue.unread())
        })
    }

    fn has_unread(&self) -> bool {
        self.shards.iter().any(|shard| shard.has_unread()) || !self.notices.is_empty()
    }

    /// Whether an event can be read; if not, `table` is told when.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> bool {
        // First the registration, then the look: an event that comes in between wakes.
        self.readers.asleep.register(file, table);
        self.has_unread()
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
                None => break,
                Some(Found::Event(_, _, event)) => describe(event),
                Some(Found::Notice(notice)) => describe_notice(notice),
            };
            if let Err(e) = out.write_slice(raw.bytes()) {
                match next {
                    Some(Found::Event(shard, delivery, _)) => {
                        shard.with(|queue| queue.unread_again(delivery));
                    }
                    Some(Found::Notice(notice)) => drop(self.notices.put_back(notice)),
                    None => (),
                }
                self.readers.asleep.tell_one();
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
    fn next(&self, owner: Owner, at_once: bool) -> Result<Option<Found<'_>>> {
        let mut told = false;
        loop {
            let found = self.look(owner);
            if found.is_some() && told && self.has_unread() {
                // Perhaps this thread was told of that one, and found another one first. Who looks meanwhile
                // does so shard by shard, and may have missed it.
                self.readers.asleep.tell_one();
            }
            if found.is_some() || at_once {
                return Ok(found);
            }
            // Who looks out is not among the sleepers: nobody calls it, and nobody pays for that.
            let mut slept = Ok(());
            self.readers.patience.wait(
                |ns| look_out(ns, || self.has_unread()),
                || {
                    told = true;
                    slept = self.readers.asleep.wait(|| self.has_unread());
                    slept.is_ok()
                },
            );
            slept?;
        }
    }

    /// The oldest event of the next shard that has one.
    fn look(&self, owner: Owner) -> Option<Found<'_>> {
        let turn = self.readers.turn.load(Relaxed);
        for i in self.division.by_turns(turn) {
            let shard = &self.shards[i];
            if !shard.has_unread() {
                continue;
            }
            if let Some((delivery, event)) = shard.with(|queue| queue.read(owner)) {
                self.readers.turn.store(turn.wrapping_add(1), Relaxed);
                return Some(Found::Event(shard, delivery, event));
            }
        }
        self.notices.pop().map(Found::Notice)
    }
}

/// An event that is being delivered.
enum Found<'a> {
    Event(&'a Shard, Delivery, Event<Arc<Waited>>),
    /// Or what nobody waits for.
    Notice(Notice),
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
    let (type_, tid, error) = match &notice.what {
        What::SourceError { thread, error } => {
            (KDP_EVENT_SOURCE_ERROR, thread.number_here(), *error)
        }
        What::MemoryError => (KDP_EVENT_POISONED, 0, ehwpoison()),
    };
    kdp_event {
        type_,
        slot_id: notice.access.slot_id,
        page: notice.page,
        gfn: notice.access.gfn,
        access: notice.access.flags,
        tid,
        deliveries: 1,
        error: -error.to_errno(),
        ..Default::default()
    }
}

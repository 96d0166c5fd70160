// SPDX-License-Identifier: GPL-2.0

//! The queue of absent pages that somebody waits for.
//!
//! There is one entry per page, however many wait for it. An entry is *unread*, then *read* by an
//! owner (a process that serves faults), and gone when the page is resolved. When its owner goes away it
//! is unread again: an event is not lost with its reader.
//!
//! An entry that was never read is gone, too, when its last waiter leaves. One that was read stays: a
//! waiter that a signal interrupts comes back, and a second event for a page that a handler is filling
//! just now would have it filled twice, the second time over what was written since.
//!
//! The caller holds one lock around all of it, and a waiter looks at the page's state under that lock
//! before it enters. Whoever resolves changes the state first and takes the lock then: either the waiter
//! sees the change, or its entry is found. So no wake-up is lost, and no event tells of a page that is
//! present.

/// No memory for an entry.
#[derive(Debug, PartialEq, Eq)]
pub struct NoMemory;

/// Why nobody may wait.
#[derive(Debug, PartialEq, Eq)]
pub enum EnterError {
    /// Nobody can resolve events any more.
    Closed,
    /// No memory for the entry.
    NoMemory,
}

/// A map with ordered keys: the kernel's red-black tree, or the host's.
pub trait OrderedMap<K: Ord + Copy, V> {
    /// The value of a key.
    fn get_mut(&mut self, key: &K) -> Option<&mut V>;
    /// Puts a value in; the key must not be there.
    fn insert(&mut self, key: K, value: V) -> Result<(), NoMemory>;
    /// Takes a value out.
    fn remove(&mut self, key: &K) -> Option<V>;
    /// The lowest key that is not below `key`.
    fn lower_bound(&self, key: &K) -> Option<K>;
}

/// The page that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Its memslot.
    pub slot: u32,
    /// Its index there.
    pub page: u64,
}

/// Names a reader, for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(pub usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Unread,
    Read(Owner),
}

/// A page that somebody waits for. `W` is what the caller keeps with it: who came first, and what to
/// wake.
pub struct Entry<W> {
    /// Its place in the order of events, kept when it is delivered again; also its identity.
    seq: u64,
    phase: Phase,
    waiters: u32,
    deliveries: u32,
    payload: W,
}

impl<W> Entry<W> {
    /// Nobody waits for it, and nobody has begun on it.
    fn is_idle(&self) -> bool {
        self.waiters == 0 && self.deliveries == 0
    }
}

/// What a waiter holds while it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    key: Key,
    seq: u64,
}

/// Names one delivery of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    ticket: Ticket,
    number: u32,
}

/// An event, as it is delivered.
#[derive(Debug, PartialEq, Eq)]
pub struct Event<W> {
    /// The page.
    pub key: Key,
    /// Threads that wait for it.
    pub waiters: u32,
    /// How often it has been delivered, this time included.
    pub deliveries: u32,
    /// What the first waiter left.
    pub payload: W,
}

/// The queue.
///
/// # Invariants
///
/// `order` holds the sequence number of every entry of `pages`, and no other. No unread entry's
/// number is below `cursor`, so delivering again what was read moves the cursor back and needs no
/// memory. Every entry that was never read has a waiter. When `closed`, both maps are empty.
pub struct Queue<P, O> {
    pages: P,
    order: O,
    cursor: u64,
    next_seq: u64,
    pending: u32,
    unread: u32,
    closed: bool,
}

impl<P, O> Queue<P, O> {
    /// An empty queue on two empty maps.
    pub fn new(pages: P, order: O) -> Self {
        // INVARIANT: Both maps are empty.
        Self {
            pages,
            order,
            cursor: 0,
            next_seq: 0,
            pending: 0,
            unread: 0,
            closed: false,
        }
    }

    /// Pages that are waited for.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Those of them that no reader has.
    pub fn unread(&self) -> u32 {
        self.unread
    }
}

impl<P, O> Queue<P, O> {
    /// A thread begins to wait. Returns its ticket, the entry's payload, and whether the entry is
    /// new, so that readers must be told. `first` makes the payload if it is.
    pub fn enter<W: Clone>(
        &mut self,
        key: Key,
        first: impl FnOnce() -> Result<W, NoMemory>,
    ) -> Result<(Ticket, W, bool), EnterError>
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        if self.closed {
            return Err(EnterError::Closed);
        }
        if let Some(entry) = self.pages.get_mut(&key) {
            entry.waiters = entry.waiters.saturating_add(1);
            let ticket = Ticket {
                key,
                seq: entry.seq,
            };
            return Ok((ticket, entry.payload.clone(), false));
        }

        let seq = self.next_seq;
        let payload = first().map_err(|NoMemory| EnterError::NoMemory)?;
        let entry = Entry {
            seq,
            phase: Phase::Unread,
            waiters: 1,
            deliveries: 0,
            payload: payload.clone(),
        };
        self.order
            .insert(seq, key)
            .map_err(|NoMemory| EnterError::NoMemory)?;
        if self.pages.insert(key, entry).is_err() {
            self.order.remove(&seq);
            return Err(EnterError::NoMemory);
        }
        self.next_seq += 1;
        self.pending += 1;
        self.unread += 1;
        Ok((Ticket { key, seq }, payload, true))
    }

    /// A thread no longer waits. An event that nobody has read nor waits for is gone.
    pub fn leave<W>(&mut self, ticket: Ticket)
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        // The entry may be gone, and another one may be there for the same page.
        let Some(entry) = self.pages.get_mut(&ticket.key) else {
            return;
        };
        if entry.seq != ticket.seq {
            return;
        }
        entry.waiters -= 1;
        if entry.is_idle() {
            self.forget(&ticket.key);
        }
    }

    fn forget<W>(&mut self, key: &Key) -> Option<W>
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        let entry = self.pages.remove(key)?;
        self.order.remove(&entry.seq);
        self.pending -= 1;
        if entry.phase == Phase::Unread {
            self.unread -= 1;
        }
        Some(entry.payload)
    }

    /// Delivers the oldest unread event to `owner`.
    pub fn read<W: Clone>(&mut self, owner: Owner) -> Option<(Delivery, Event<W>)>
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        while let Some(seq) = self.order.lower_bound(&self.cursor) {
            self.cursor = seq + 1;
            let key = *self.order.get_mut(&seq)?;
            let entry = self.pages.get_mut(&key)?;
            if entry.phase != Phase::Unread {
                continue;
            }
            entry.phase = Phase::Read(owner);
            entry.deliveries = entry.deliveries.saturating_add(1);
            self.unread -= 1;
            let delivery = Delivery {
                ticket: Ticket { key, seq },
                number: entry.deliveries,
            };
            let event = Event {
                key,
                waiters: entry.waiters,
                deliveries: entry.deliveries,
                payload: entry.payload.clone(),
            };
            return Some((delivery, event));
        }
        None
    }

    /// Takes a delivery back: it did not reach its reader. Nothing is taken back if the page was resolved
    /// meanwhile, or its event was delivered once more.
    pub fn unread_again<W>(&mut self, delivery: Delivery)
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        let Ticket { key, seq } = delivery.ticket;
        let Some(entry) = self.pages.get_mut(&key) else {
            return;
        };
        if entry.seq == seq && entry.deliveries == delivery.number && entry.phase != Phase::Unread {
            entry.phase = Phase::Unread;
            entry.deliveries -= 1;
            let idle = entry.is_idle();
            self.cursor = self.cursor.min(seq);
            self.unread += 1;
            if idle {
                self.forget(&key);
            }
        }
    }

    /// Delivers anew all that `owner` has read and not resolved; returns how many events that are.
    pub fn requeue<W>(&mut self, owner: Owner) -> u32
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        let mut found = 0;
        let mut from = 0;
        while let Some(seq) = self.order.lower_bound(&from) {
            from = seq + 1;
            let Some(&mut key) = self.order.get_mut(&seq) else {
                break;
            };
            let Some(entry) = self.pages.get_mut(&key) else {
                break;
            };
            if entry.phase == Phase::Read(owner) {
                entry.phase = Phase::Unread;
                self.cursor = self.cursor.min(seq);
                self.unread += 1;
                found += 1;
            }
        }
        found
    }

    /// Pages `first` to `last` of a memslot are resolved: their entries go, `wake` is called for
    /// each. Returns how many.
    pub fn resolve<W>(&mut self, slot: u32, first: u64, last: u64, mut wake: impl FnMut(W)) -> u64
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        let mut found = 0;
        let from = Key { slot, page: first };
        while let Some(key) = self.pages.lower_bound(&from) {
            if key.slot != slot || key.page > last {
                break;
            }
            if let Some(payload) = self.forget(&key) {
                wake(payload);
                found += 1;
            }
        }
        found
    }

    /// Nobody can resolve events any more: all waiters are woken, and nobody may wait again.
    pub fn close<W>(&mut self, mut wake: impl FnMut(W))
    where
        P: OrderedMap<Key, Entry<W>>,
        O: OrderedMap<u64, Key>,
    {
        self.closed = true;
        while let Some(key) = self.pages.lower_bound(&Key { slot: 0, page: 0 }) {
            if let Some(payload) = self.forget(&key) {
                wake(payload);
            }
        }
    }
}

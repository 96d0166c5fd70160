// SPDX-License-Identifier: GPL-2.0

//! The queue as one would write it without a thought for cost: a list in the order of arrival.

use kdp_rules::rules::queue::{EnterError, Event, Key, Owner};

pub struct Page {
    key: Key,
    /// Who came first made this; it is unique.
    payload: u32,
    waiters: Vec<usize>,
    reader: Option<Owner>,
    deliveries: u32,
}

#[derive(Default)]
pub struct Model {
    pages: Vec<Page>,
    closed: bool,
}

impl Model {
    pub fn keys(&self) -> Vec<Key> {
        self.pages.iter().map(|page| page.key).collect()
    }

    pub fn pending(&self) -> u32 {
        self.pages.len() as u32
    }

    pub fn unread(&self) -> u32 {
        let unread = self.pages.iter().filter(|page| page.reader.is_none());
        unread.count() as u32
    }

    pub fn has(&self, key: Key) -> bool {
        self.pages.iter().any(|page| page.key == key)
    }

    /// The payload of the page's entry, and whether it is new; `memory` says whether there is some.
    pub fn enter(
        &mut self,
        thread: usize,
        key: Key,
        payload: u32,
        memory: bool,
    ) -> Result<(u32, bool), EnterError> {
        if self.closed {
            return Err(EnterError::Closed);
        }
        if let Some(page) = self.pages.iter_mut().find(|page| page.key == key) {
            page.waiters.push(thread);
            return Ok((page.payload, false));
        }
        if !memory {
            return Err(EnterError::NoMemory);
        }
        self.pages.push(Page {
            key,
            payload,
            waiters: vec![thread],
            reader: None,
            deliveries: 0,
        });
        Ok((payload, true))
    }

    /// A thread waits at one entry at most, so it leaves the one that has it, if any has.
    pub fn leave(&mut self, thread: usize) {
        for page in &mut self.pages {
            page.waiters.retain(|&waiter| waiter != thread);
        }
        self.forget_idle();
    }

    /// What nobody waits for and nobody has ever read is gone.
    fn forget_idle(&mut self) {
        self.pages
            .retain(|page| !page.waiters.is_empty() || page.deliveries > 0);
    }

    pub fn read(&mut self, owner: Owner) -> Option<Event<u32>> {
        self.read_of(owner, |_| true)
    }

    /// The oldest unread event of those pages.
    pub fn read_of(&mut self, owner: Owner, which: impl Fn(Key) -> bool) -> Option<Event<u32>> {
        let mut pages = self.pages.iter_mut();
        let page = pages.find(|page| page.reader.is_none() && which(page.key))?;
        page.reader = Some(owner);
        page.deliveries += 1;
        Some(Event {
            key: page.key,
            waiters: page.waiters.len() as u32,
            deliveries: page.deliveries,
            payload: page.payload,
        })
    }

    /// An event names its entry by the payload, and its delivery by the number of them.
    pub fn unread_again(&mut self, event: &Event<u32>) {
        for page in &mut self.pages {
            if page.payload == event.payload
                && page.deliveries == event.deliveries
                && page.reader.take().is_some()
            {
                page.deliveries -= 1;
            }
        }
        self.forget_idle();
    }

    pub fn requeue(&mut self, owner: Owner) -> u32 {
        let mut found = 0;
        for page in &mut self.pages {
            if page.reader == Some(owner) {
                page.reader = None;
                found += 1;
            }
        }
        found
    }

    /// The payloads of the pages that are gone.
    pub fn resolve(&mut self, slot: u32, first: u64, last: u64) -> Vec<u32> {
        self.take(|key| key.slot == slot && first <= key.page && key.page <= last)
    }

    pub fn close(&mut self) -> Vec<u32> {
        self.closed = true;
        self.take(|_| true)
    }

    fn take(&mut self, which: impl Fn(Key) -> bool) -> Vec<u32> {
        let gone = self.pages.iter().filter(|page| which(page.key));
        let mut payloads: Vec<_> = gone.map(|page| page.payload).collect();
        payloads.sort_unstable();
        self.pages.retain(|page| !which(page.key));
        payloads
    }
}

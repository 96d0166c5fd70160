//! The memslots that are served, by id and by where their pages are in the source.

use super::{slot::Slot, Error};
use crate::PageRange;
use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

#[derive(Default)]
struct Maps {
    by_id: BTreeMap<u32, Arc<Slot>>,
    by_source: BTreeMap<u64, Arc<Slot>>,
    // How many there have ever been.
    generation: u64,
}

/// The memslots that are served.
#[derive(Default)]
pub(super) struct Slots(RwLock<Maps>);

impl Slots {
    /// Serve one more memslot. No page of the source may belong to two of them.
    pub(super) fn insert(&self, slot: Slot) -> Result<(), Error> {
        let slot = Arc::new(slot);
        let range = slot.in_source();
        let mut maps = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = overlapping(&maps, range).next() {
            return Err(Error::Layout(format!(
                "the memslots {} and {} would both hold pages {} to {} of the source: give one of them \
                 another place there",
                other.info().slot_id,
                slot.info().slot_id,
                range.first.max(other.in_source().first),
                range.end().min(other.in_source().end())
            )));
        }
        maps.generation += 1;
        maps.by_source.insert(range.first, Arc::clone(&slot));
        maps.by_id.insert(slot.info().slot_id, slot);
        Ok(())
    }

    /// Serve a memslot no more.
    pub(super) fn remove(&self, slot_id: u32) {
        let mut maps = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = maps.by_id.remove(&slot_id) {
            maps.by_source.remove(&slot.in_source().first);
        }
    }

    pub(super) fn get(&self, slot_id: u32) -> Option<Arc<Slot>> {
        let maps = self.0.read().unwrap_or_else(PoisonError::into_inner);
        maps.by_id.get(&slot_id).cloned()
    }

    /// The memslots that pages of the source belong to.
    pub(super) fn of_source(&self, range: PageRange) -> Vec<Arc<Slot>> {
        let maps = self.0.read().unwrap_or_else(PoisonError::into_inner);
        overlapping(&maps, range).cloned().collect()
    }

    /// Changes when a memslot is added.
    pub(super) fn generation(&self) -> u64 {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .generation
    }

    pub(super) fn all(&self) -> Vec<Arc<Slot>> {
        let maps = self.0.read().unwrap_or_else(PoisonError::into_inner);
        maps.by_id.values().cloned().collect()
    }
}

// They do not overlap each other, so walking back from the range's end meets them all before one that ends
// too early.
fn overlapping(maps: &Maps, range: PageRange) -> impl Iterator<Item = &Arc<Slot>> {
    maps.by_source
        .range(..range.end())
        .rev()
        .map(|(_, slot)| slot)
        .take_while(move |slot| slot.in_source().end() > range.first)
}

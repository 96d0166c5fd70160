// SPDX-License-Identifier: GPL-2.0

//! What the rules are given on the host in place of the kernel's words and trees.

use kdp_rules::rules::bits::Word;
use kdp_rules::rules::queue::{NoMemory, OrderedMap};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

/// A word of bits.
pub struct HostWord(AtomicU64);

impl HostWord {
    pub fn new(bits: u64) -> Self {
        Self(AtomicU64::new(bits))
    }
}

impl Word for HostWord {
    fn load_acquire(&self) -> u64 {
        self.0.load(Acquire)
    }

    fn set_release(&self, mask: u64) -> u64 {
        self.0.fetch_or(mask, Release)
    }

    fn clear(&self, mask: u64) -> u64 {
        self.0.fetch_and(!mask, AcqRel)
    }
}

/// How many more insertions there is memory for, in all maps that share it.
#[derive(Clone, Default)]
pub struct Memory(Rc<Cell<Option<u32>>>);

impl Memory {
    /// `None`: without end.
    pub fn set(&self, insertions: Option<u32>) {
        self.0.set(insertions);
    }

    pub fn left(&self) -> Option<u32> {
        self.0.get()
    }

    fn take(&self) -> Result<(), NoMemory> {
        let left = match self.0.get() {
            Some(left) => Some(left.checked_sub(1).ok_or(NoMemory)?),
            None => None,
        };
        self.0.set(left);
        Ok(())
    }
}

/// What a map holds, visible from outside: each key, and what `show` makes of its value.
pub type View<K, S> = Rc<RefCell<BTreeMap<K, S>>>;

/// A map.
pub struct PlainMap<K, V>(BTreeMap<K, V>);

impl<K, V> PlainMap<K, V> {
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Copy, V> OrderedMap<K, V> for PlainMap<K, V> {
    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key)
    }

    fn insert(&mut self, key: K, value: V) -> Result<(), NoMemory> {
        let before = self.0.insert(key, value);
        assert!(before.is_none(), "the key was there already");
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        self.0.remove(key)
    }

    fn lower_bound(&self, key: &K) -> Option<K> {
        self.0.range(*key..).next().map(|(key, _)| *key)
    }
}

/// A map that can run out of memory, and be looked into.
pub struct HostMap<K, V, S> {
    map: PlainMap<K, V>,
    memory: Memory,
    show: fn(&V) -> S,
    view: View<K, S>,
}

impl<K, V, S> HostMap<K, V, S> {
    pub fn new(memory: Memory, show: fn(&V) -> S) -> (Self, View<K, S>) {
        let view = View::default();
        let map = Self {
            map: PlainMap::new(),
            memory,
            show,
            view: Rc::clone(&view),
        };
        (map, view)
    }
}

impl<K: Ord + Copy, V, S> OrderedMap<K, V> for HostMap<K, V, S> {
    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.map.get_mut(key)
    }

    fn insert(&mut self, key: K, value: V) -> Result<(), NoMemory> {
        self.memory.take()?;
        self.view.borrow_mut().insert(key, (self.show)(&value));
        self.map.insert(key, value)
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        self.view.borrow_mut().remove(key);
        self.map.remove(key)
    }

    fn lower_bound(&self, key: &K) -> Option<K> {
        self.map.lower_bound(key)
    }
}

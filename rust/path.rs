// SPDX-License-Identifier: GPL-2.0

//! Memslots under /dev/kdp, for programs that only take paths.

use crate::{
    ffi::{
        file::{
            Device,
            Inode,
            Node, //
        },
        uapi::KDP_NAME_LEN, //
    },
    memslot::Memslot,
    rules::name, //
};
use core::str;
use kernel::{
    fmt,
    prelude::*,
    str::CString,
    sync::Arc, //
};

/// A memslot's name: valid, or empty for "none".
///
/// # Invariants
///
/// The first `len` bytes are ASCII.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    bytes: [u8; KDP_NAME_LEN as usize],
    len: usize,
}

impl Name {
    /// Checks the field of a caller.
    pub(crate) fn parse(bytes: [u8; KDP_NAME_LEN as usize]) -> Result<Self> {
        // INVARIANT: Only ASCII passes.
        let len = name::parse(&bytes).ok_or(EINVAL)?;
        Ok(Self { bytes, len })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The field, NUL-terminated and zero-padded.
    pub(crate) fn field(&self) -> [u8; KDP_NAME_LEN as usize] {
        self.bytes
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(&self.bytes[..self.len]).unwrap_or(""))
    }
}

kernel::sync::global_lock! {
    // SAFETY: `init()` is called once, when the module is loaded.
    pub(crate) unsafe(uninit) static NAMES: Mutex<KVec<Name>> = KVec::new();
}

/// A name that nobody else has, on all VMs.
struct Reserved(Name);

impl Reserved {
    fn new(name: Name) -> Result<Self> {
        let mut names = NAMES.lock();
        if names.contains(&name) {
            return Err(EEXIST);
        }
        names.push(name, GFP_KERNEL)?;
        Ok(Self(name))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut names = NAMES.lock();
        names.retain(|name| *name != self.0);
        if names.is_empty() {
            // A static is never dropped: its memory would be left behind by an unloaded module.
            *names = KVec::new();
        }
    }
}

/// Opens a memslot.
struct Opener(Arc<Memslot>);

impl Device for Opener {
    type Opened = Memslot;

    fn open(&self) -> Result<Arc<Memslot>> {
        // The VM's table has a file of it until after the path is gone.
        self.0.opened();
        Ok(self.0.clone())
    }

    fn inode(&self) -> Option<&Inode> {
        Some(self.0.inode())
    }
}

/// A memslot's path, until it is dropped. The node goes before the name is free.
pub(crate) struct Path {
    _node: Pin<KBox<Node<Opener>>>,
    _name: Reserved,
}

impl Path {
    /// Makes the path, if the memslot has a name.
    pub(crate) fn new(memslot: &Arc<Memslot>) -> Result<Option<Self>> {
        let name = memslot.place.name;
        if name.is_empty() {
            return Ok(None);
        }
        let reserved = Reserved::new(name)?;
        // devtmpfs makes "!" a "/".
        let device_name = CString::try_from_fmt(fmt!("kdp!{name}"))?;
        let node = Node::new(device_name, Opener(memslot.clone()));
        Ok(Some(Self {
            _node: KBox::pin_init(node, GFP_KERNEL)?,
            _name: reserved,
        }))
    }
}

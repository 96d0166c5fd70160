// SPDX-License-Identifier: GPL-2.0

//! /dev/kvm-demand-paging: every open of it is a VM.

use crate::{
    ffi::file::{
        Device,
        Inode,
        Node, //
    },
    vm::Vm, //
};
use kernel::{
    debugfs,
    prelude::*,
    str::CString,
    sync::Arc, //
};

/// What stands behind the node.
pub(crate) struct Control {
    /// Holds a file for every VM.
    debugfs: debugfs::Dir,
}

impl Control {
    pub(crate) fn node() -> impl PinInit<Node<Self>, Error> {
        let name = CString::try_from_fmt(kernel::prelude::fmt!("kvm-demand-paging"));
        let init = |name| {
            Node::new(
                name,
                Self {
                    debugfs: debugfs::Dir::new(c"kvm-demand-paging"),
                },
            )
        };
        pin_init::pin_init_scope(move || Ok(init(name?)))
    }
}

impl Device for Control {
    type Opened = Vm;

    fn open(&self) -> Result<Arc<Vm>> {
        Vm::new(&self.debugfs)
    }

    fn inode(&self) -> Option<&Inode> {
        None
    }
}

// SPDX-License-Identifier: GPL-2.0

//! What a memslot has pinned, and who pays for it.
//!
//! A user's `locked_vm` is one number for all CPUs. Under a limit each page changes it: a limit that must
//! not be exceeded by a page cannot be checked otherwise. Without one a CPU charges for many pages at once
//! and keeps those that it has not used: `locked_vm` may be too high by that, and is never too low.

use crate::ffi::{
    percpu::PerCpu,
    task::{
        MemlockLimit,
        User, //
    }, //
};
use kernel::prelude::*;

/// Pages that a CPU charges at once.
const BATCH: usize = 64;

/// Folios that are pinned.
const PINNED: usize = 0;
/// Pages that are charged and not used.
const STOCK: usize = 1;

/// The account of a memslot.
pub(crate) struct Account {
    /// Pays for each folio, which is a page then.
    payer: Option<User>,
    limit: MemlockLimit,
    counters: PerCpu<2>,
}

impl Account {
    /// An account that the current thread's limit counts for.
    pub(crate) fn new(payer: Option<User>) -> Result<Self> {
        Ok(Self {
            payer,
            limit: MemlockLimit::current(),
            counters: PerCpu::new()?,
        })
    }

    /// Folios that are pinned, or just about to be.
    pub(crate) fn pinned(&self) -> u64 {
        self.counters.sum(PINNED)
    }

    /// Pins up to `count` folios by `pin`, which says how many it did; none if the limit is reached.
    pub(crate) fn pin_many(&self, count: usize, pin: impl FnOnce() -> usize) {
        if let Some(payer) = &self.payer {
            if !payer.charge(count, self.limit) {
                return;
            }
        }
        let added = pin();
        self.counters.add(PINNED, added as u64);
        if let Some(payer) = &self.payer {
            payer.uncharge(count - added);
        }
    }

    /// A folio that nobody pays for was pinned.
    pub(crate) fn add(&self) {
        self.counters.add(PINNED, 1);
    }

    /// Whether somebody pays.
    pub(crate) fn is_charged(&self) -> bool {
        self.payer.is_some()
    }

    /// A folio is going to be pinned. ENOMEM if the limit is reached.
    #[inline(always)]
    pub(crate) fn charge(&self) -> Result {
        match &self.payer {
            Some(_) if self.limit.is_none() && self.counters.transfer(STOCK, PINNED) => {
                return Ok(());
            }
            Some(payer) if self.limit.is_none() => self.stock_up(payer),
            Some(payer) if !payer.charge(1, self.limit) => return Err(ENOMEM),
            _ => (),
        }
        self.counters.add(PINNED, 1);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn stock_up(&self, payer: &User) {
        payer.charge(BATCH, self.limit);
        self.counters.add(STOCK, BATCH as u64 - 1);
    }

    /// It was not, or another thread was faster.
    #[cold]
    #[inline(never)]
    pub(crate) fn give_back(&self) {
        self.counters.add(PINNED, 1_u64.wrapping_neg());
        match &self.payer {
            Some(_) if self.limit.is_none() => self.counters.add(STOCK, 1),
            Some(payer) => payer.uncharge(1),
            None => (),
        }
    }

    /// So many folios are pinned no longer.
    pub(crate) fn unpinned(&self, folios: usize) {
        self.counters.add(PINNED, (folios as u64).wrapping_neg());
        if let Some(payer) = &self.payer {
            payer.uncharge(folios);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some(payer) = &self.payer {
            payer.uncharge((self.pinned() + self.counters.sum(STOCK)) as usize);
        }
    }
}

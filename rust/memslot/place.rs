// SPDX-License-Identifier: GPL-2.0

//! Bytes that a caller has for absent pages. The locks are those of memslot.rs.

use super::Memslot;
use crate::{
    compat::ehwpoison,
    moving::on_its_way,
    pages::Mode,
    rules::touch::State, //
};
use kernel::{
    page::Page,
    prelude::*,
    sync::Arc, //
};

/// What became of a page that was to be placed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// It has these bytes, and is present.
    Now,
    /// It was present.
    Present,
    /// It is poisoned.
    Lost,
    /// Somebody has claimed it.
    Claimed,
}

impl Memslot {
    /// Gives an absent page its bytes, and lets its waiters go on; a page that is present, poisoned, or claimed is
    /// left alone.
    pub(crate) fn place(self: &Arc<Self>, page: u64, bytes: &Page) -> Result<Placed> {
        loop {
            match self.try_place(page, bytes) {
                Err(e) if e == on_its_way() => self.wait_for_move(),
                Err(e) if e == ehwpoison() => self.examine(page)?,
                other => return other,
            }
        }
    }

    fn try_place(&self, page: u64, bytes: &Page) -> Result<Placed> {
        let _changes = self.changes.lock();
        let (placed, may_be_whole) = self.settled(|pages| {
            match pages.mode() {
                Mode::Removed => return Err(ENOENT),
                Mode::Off => return Err(ENXIO),
                Mode::On { .. } => (),
            }
            match pages.state(page) {
                State::Poisoned => return Ok((Placed::Lost, false)),
                State::Present => return Ok((Placed::Present, false)),
                _ if pages.claims.has(page) => return Ok((Placed::Claimed, false)),
                _ => (),
            }
            // Nobody has the page mapped, and others who fill it take `changes`, too.
            let frame = self.backing.hold(pages, page)?;
            frame.pfn().fill(bytes);
            frame.written();
            drop(frame);
            pages.filled(page)?;
            Ok((Placed::Now, pages.look(page).1 == u64::MAX))
        })?;
        if placed == Placed::Now {
            self.wake(page, page);
            self.stats.placed().add(1);
        }
        if may_be_whole {
            self.unmap_whole_blocks(page, 1);
        }
        Ok(placed)
    }
}

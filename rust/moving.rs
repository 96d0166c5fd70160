// SPDX-License-Identifier: GPL-2.0

//! What a memslot knows of a huge page of its own that is being moved (replace.rs): which frame a page has just now.
//!
//! It is under the memslot's `pages` lock, as the pins are whose place it takes: while a huge page is being moved the
//! memslot has no pin for it among its [`Pins`](crate::ffi::memfd::Pins). So faults of other pages do not pay for it.

use crate::{
    compat::estale,
    ffi::{
        memfd::{
            Pfn,
            Pinned, //
        },
        memory_failure::BadFrame, //
    },
    rules::{
        range::PageRange,
        replace::{
            Cursor,
            Home, //
        }, //
    }, //
};
use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        CondVar,
        Mutex, //
    }, //
};

/// What [`Moving::frame`] says of a page that is on its way.
pub(crate) fn on_its_way() -> Error {
    estale()
}

/// A huge page that is being moved, for all memslots that have it.
#[pin_data]
pub(crate) struct Move {
    /// The file that it is of, by its identity.
    pub(crate) file: usize,
    /// Its first page in the file.
    pub(crate) index: u64,
    pub(crate) pages: u64,
    pub(crate) bad: Pinned,
    pub(crate) fresh: Pinned,
    /// How many of its pages have arrived, in all memslots. Innermost: nothing else is taken under it.
    #[pin]
    arrived: Mutex<u64>,
    #[pin]
    part_arrived: CondVar,
}

impl Move {
    pub(crate) fn new(
        file: usize,
        index: u64,
        pages: u64,
        bad: Pinned,
        fresh: Pinned,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                file,
                index,
                pages,
                bad,
                fresh,
                arrived <- new_mutex!(0, "kdp_arrived"),
                part_arrived <- new_condvar!("kdp_part_arrived"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Which page of the file a frame is, or is going to be.
    pub(crate) fn place(&self, frame: &BadFrame) -> Option<(usize, u64)> {
        let mut into = [&self.bad, &self.fresh]
            .into_iter()
            .filter_map(|pinned| frame.since(pinned.frame()));
        let into = into.find(|&into| into < self.pages)?;
        Some((self.file, self.index + into))
    }

    /// So many pages have arrived.
    pub(crate) fn arrived(&self, count: u64) {
        *self.arrived.lock() = count;
        self.part_arrived.notify_all();
    }

    /// Waits until so many have.
    pub(crate) fn wait(&self, count: u64) {
        let mut arrived = self.arrived.lock();
        while *arrived < count {
            self.part_arrived.wait(&mut arrived);
        }
    }
}

/// A memslot's part in it.
pub(crate) struct Moving {
    pub(crate) range: PageRange,
    pub(crate) cursor: Cursor,
    pub(crate) between: Arc<Move>,
    /// On the fresh huge page: the memslot's own from the end of the move on.
    pub(crate) pin: Pinned,
    /// What the memslot had.
    pub(crate) before: Option<Pinned>,
}

impl Moving {
    /// Whether a page is of it.
    pub(crate) fn covers(&self, page: u64) -> bool {
        (self.range.first()..=self.range.last()).contains(&page)
    }

    /// The frame of a page of it, or [`on_its_way()`].
    pub(crate) fn frame(&self, page: u64) -> Result<Pfn<'_>> {
        let into = page - self.range.first();
        match self.cursor.home(into) {
            Home::Old => Ok(self.between.bad.frame().add(into)),
            Home::Fresh => Ok(self.between.fresh.frame().add(into)),
            Home::Neither => Err(on_its_way()),
        }
    }

    /// Whether that is the frame that a page's bytes are in; of a page on its way, the one that they come from.
    pub(crate) fn has_frame(&self, page: u64, frame: &BadFrame) -> bool {
        let into = page - self.range.first();
        match self.cursor.home(into) {
            Home::Old | Home::Neither => self.between.bad.frame().add(into).is(frame),
            Home::Fresh => self.between.fresh.frame().add(into).is(frame),
        }
    }
}

//! A machine that moves: what the engines of [`kdp_migrate`] need of it, on both sides.
//!
//! Page numbers of the engines are guest frame numbers: there is one memslot, from 0 on.

mod incoming;
mod outgoing;

pub use incoming::Incoming;
pub use outgoing::Outgoing;

use kdp_migrate::{Layout, Slot};

use super::ram::Ram;

fn layout(ram: &Ram) -> Layout {
    Layout(vec![Slot {
        id: ram.slot_id(),
        gfn: 0,
        pages: ram.pages(),
        backing_shift: ram.memfd().page_size().trailing_zeros(),
    }])
}

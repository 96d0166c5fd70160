//! A machine that moves: what the engines of [`kdp_migrate`] need of it, on both sides.
//!
//! Page numbers of the engines are guest frame numbers: there is one memslot, from 0 on.

mod device;
mod incoming;
mod outgoing;
mod pages;
mod userfaultfd;

use std::sync::Arc;

use clap::ValueEnum;
use kdp_migrate::{Layout, MachineError, Slot};
use kvm_demand_paging::PageRange;

pub use incoming::Incoming;
pub use outgoing::Outgoing;
pub use pages::Pages;

use super::machine::Ending;
use super::ram::Ram;
use super::PageRequester;

/// What pages in the memory of a machine that comes from elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum IncomingPager {
    /// The device
    #[default]
    Device,
    /// userfaultfd, for comparison: nothing of the device is needed; of hugetlb a touch waits for the whole huge page
    Userfaultfd,
}

/// How pages come into memory whose guest may wait for them. As [`DestinationMachine`](kdp_migrate::DestinationMachine)
/// has it: a page that is not absent is left alone, and none is made absent again once the machine is being made.
trait Placer: Send + Sync {
    /// Give absent pages their bytes, and say of each page what became of it.
    fn place(
        &self,
        first: u64,
        bytes: &[u8],
        results: &mut [kdp_migrate::Placed],
    ) -> Result<(), MachineError>;

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError>;

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError>;

    fn discard(&self, pages: PageRange) -> Result<(), MachineError>;

    /// The machine is about to be made: from here on pages are touched.
    fn begin(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Whom vCPUs ask for pages, if they do.
    fn requester(self: Arc<Self>) -> Option<Arc<dyn PageRequester>> {
        None
    }

    /// The machine is made.
    fn made(&self, machine: Ending) {
        drop(machine);
    }

    /// No more pages will come. No absent page may be read as anything.
    fn fail(&self, why: &str);
}

fn layout(ram: &Ram) -> Layout {
    layout_of(ram.slot_id(), ram.pages(), ram.memfd().page_size())
}

/// One memslot, from guest frame number 0 on.
fn layout_of(id: u32, pages: u64, page_size: u64) -> Layout {
    Layout(vec![Slot {
        id,
        gfn: 0,
        pages,
        backing_shift: page_size.trailing_zeros(),
    }])
}

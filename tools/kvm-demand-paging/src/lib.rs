//! Demand paging for KVM guests, 4 KiB at a time, on any backing: the userspace side of
//! `/dev/kvm-demand-paging`.
//!
//! There is one type per file descriptor:
//!
//! - [`Vm`]: one open of the device. It holds memslots, it is where the states of pages are changed, and
//!   it is read for [`Event`]s.
//! - [`Memslot`]: a piece of guest memory. It is mapped to get guest memory ([`GuestMap`]) and the
//!   [`PresentBitmap`].
//! - [`Memfd`]: the memory itself. Whoever fetches pages maps it directly ([`AliasMap`]): filling a page
//!   there never faults on the device and never shows in the guest before the page is made present.
//! - [`Claimant`]: who fills pages there and is to be the only one who does.
//!
//! On these build [`source`] (pages over TCP, a Unix socket or from a file), [`handler`] (serves the
//! faults of a VM from a source) and [`keeper`] (keeps a VM's fd over the death of its handler).
//!
//! A page is 4096 bytes everywhere, whatever the backing, and is named by its index in its memslot.
//!
//! ```no_run
//! use kvm_demand_paging::{Backing, Memfd, PageRange, Vm};
//!
//! # fn main() -> Result<(), kvm_demand_paging::Error> {
//! let vm = Vm::open()?;
//! let memfd = Memfd::create("guest", Backing::Huge2M, 64 << 20)?;
//! let memslot = vm.create_memslot(0, &memfd).paging(true).create()?;
//! let guest = memslot.map()?; // give guest.as_ptr() to KVM_SET_USER_MEMORY_REGION
//! let alias = memfd.map_all()?;
//! let present = memslot.bitmap()?;
//!
//! // Data, then bit.
//! alias.write(7, &[0x5a; 4096])?;
//! present.set(7);
//!
//! // Somebody else, not a vCPU with exits on, touches an absent page: an event, resolved by a mark.
//! for event in vm.events() {
//!     let event = event?;
//!     alias.write(event.page, &[0x5a; 4096])?;
//!     vm.mark_present(event.slot_id, &[PageRange::page(event.page)])?;
//! }
//! # drop(guest);
//! # Ok(())
//! # }
//! ```

#![deny(missing_docs)]

mod bitmap;
mod bits;
mod claim;
mod error;
mod event;
mod exit;
pub mod handler;
pub mod keeper;
mod map;
mod memfd;
mod memslot;
mod pass;
mod place;
mod poison;
mod prefault;
mod prefetch;
mod range;
mod replace;
pub mod source;
mod sys;
mod vm;
mod waiter;

/// The ABI as the module's header defines it, generated from it.
///
/// The types of this crate's root are made of these; use them where you need the bare ioctl.
pub mod abi {
    #![expect(missing_docs, reason = "the header documents them")]
    #![expect(non_camel_case_types, reason = "the header's names")]
    #![expect(clippy::allow_attributes, reason = "bindgen writes them")]

    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}

pub use bitmap::PresentBitmap;
pub use claim::{Claimant, Claimed};
pub use error::Error;
pub use event::{Access, Event, EventKind, Events, Who};
pub use exit::{FaultExit, Reason};
pub use map::{AliasMap, GuestMap};
pub use memfd::{Backing, Memfd, Seals};
pub use memslot::{Memslot, MemslotBuilder, MemslotInfo, Memslots};
pub use pass::{receive_vm, send_vm};
pub use place::Placed;
pub use poison::{Cause, Poisoned};
pub use prefault::pre_fault;
pub use prefetch::PrefetchWindow;
pub use range::{coalesce, PageRange};
pub use replace::Replaced;
pub use vm::{Collapsed, Features, Info, Marked, Paging, State, Vm};
pub use waiter::{Ready, Waiter};

/// The size of a page in bytes, on any backing.
pub const PAGE_SIZE: usize = 1 << abi::KDP_PAGE_SHIFT;

/// What most of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

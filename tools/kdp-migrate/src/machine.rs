//! What the engines need of a VMM.
//!
//! Pages are numbered through all memslots ([`Layout`]); a range never reaches from one memslot into the next.

use crate::{Epoch, Error, Hint, Layout, MachineError, MigrationId, PageSet};
use kvm_demand_paging::{PageRange, PAGE_SIZE};

/// What a page of the source holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Bytes,
    /// Zeros. A machine need not look for them: the engine does.
    Zero,
    /// Its bytes are lost by a memory error. The loss travels: it is lost at the destination, too.
    Lost,
}

/// What became of a page at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It has its bytes now.
    Now,
    /// It was present, and was left alone.
    Present,
    /// It is lost here, and was left alone.
    Lost,
}

/// A VMM whose guest is to leave.
///
/// All methods are called by the thread that runs [`Source::run`](crate::Source::run).
pub trait SourceMachine {
    /// The guest's memory.
    fn layout(&self) -> Layout;

    /// Read a page, while the guest runs. A page that was never touched should be told as zero without touching it.
    fn read_page(&self, page: u64, bytes: &mut [u8; PAGE_SIZE]) -> Result<Content, MachineError>;

    /// Log writes from now on: those of vCPUs, and those of devices.
    fn start_log(&self) -> Result<(), MachineError>;

    /// Log no more. Called once after [`Self::start_log`], whatever happens.
    fn stop_log(&self);

    /// Put the pages into `written` that were written since the last harvest. When it returns, every page that was put
    /// in is tracked again (with KVM's manual protection: after KVM_CLEAR_DIRTY_LOG, not after KVM_GET_DIRTY_LOG).
    fn harvest(&self, written: &mut PageSet) -> Result<(), MachineError>;

    /// Ask the guest for hints under an epoch that this VM has *never* used before, in this migration or another.
    /// `None`: it gives none. Pages that a hint frees read as zeros at the destination: do not ask a guest that relies
    /// on other bytes in free memory (virtio-balloon's page poisoning with another value than 0).
    fn begin_hints(&self) -> Option<Epoch>;

    /// Ask for hints no more. What was asked for before may still come.
    fn end_hints(&self);

    /// Hand over the hints that have come, oldest first. A hint's epoch is the one that the guest *answered*, not the
    /// one that is current.
    fn drain_hints(&self, hint: &mut dyn FnMut(Hint));

    /// Stop all vCPUs and devices; the state of both. After it nothing writes guest memory, and what was written to
    /// make the state is in the next harvest.
    fn stop(&self) -> Result<Vec<u8>, MachineError>;

    /// The migration failed before the guest was handed over: it runs on, after [`Self::stop`], also if that failed.
    fn resume(&self) -> Result<(), MachineError>;
}

/// A VMM that waits for a guest.
///
/// Pages are placed once: a page that is not absent is left alone by [`Self::place`], [`Self::mark_zero`] and
/// [`Self::mark_lost`]. Only [`Self::discard`] makes a page absent again, and it is called only before the state is
/// loaded. Who touches an absent page tells [`Misses`](crate::Misses), and waits.
///
/// An engine that takes the place of another ([`Destination::replace`](crate::Destination::replace)) finds the guest's
/// state loaded, and mostly the guest running: it places pages, calls [`Self::start`] if that is still to be done, and
/// [`Self::fail`] if it must.
pub trait DestinationMachine: Sync {
    /// The guest's memory. Size of backing aside it must be the source's.
    fn layout(&self) -> Layout;

    /// A source has come, with this migration. Who may have to replace the engine notes the id ([`Known`](crate::Known)).
    fn begins(&self, id: MigrationId) {
        let _ = id;
    }

    /// Give absent pages from `first` on their bytes; `results` is as long as the pages are many.
    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError>;

    /// Absent pages of these are zero.
    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError>;

    /// Absent pages of these are lost: who touches them is told of a memory error.
    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError>;

    /// These are absent, whatever they were.
    fn discard(&self, pages: PageRange) -> Result<(), MachineError>;

    /// Load the state of vCPUs and devices. Called on a thread of its own: it may touch guest memory, and wait for it.
    fn load(&self, state: &[u8]) -> Result<(), MachineError>;

    /// The guest runs. Called once by an engine, on the same thread as [`Self::load`]; when the engine has died in it, its
    /// successor may call it again: then it does nothing.
    fn start(&self) -> Result<(), MachineError>;

    /// The guest runs and will never have all its pages: vCPUs stop with this error, and who waits for a page fails.
    /// No absent page may be read as anything.
    fn fail(&self, error: &Error);
}

//! What is read from a VM's fd: somebody waits for an absent page.

use crate::{abi, Error, Result, Vm};
use rustix::io::Errno;
use std::mem;
use vm_memory::ByteValued;

/// The size of one event on the wire.
pub(crate) const EVENT_SIZE: usize = mem::size_of::<abi::kdp_event>();

// SAFETY: all fields are integers, so any bytes are a value; the header has no implicit padding.
unsafe impl ByteValued for abi::kdp_event {}

/// Who touched a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Who {
    /// KVM, to map the page for a guest.
    Guest,
    /// A copy in the kernel: KVM's own access, vhost, a system call.
    Kernel,
    /// A process, from user mode.
    User,
    /// None of these: a newer module's.
    Unknown,
}

/// The access that an event was queued for: the first one, if several wait for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Who touched the page.
    pub who: Who,
    /// Whether it was a write.
    pub write: bool,
    /// Whether it was the fetch of an instruction.
    pub exec: bool,
}

impl Access {
    fn decode(bits: u32) -> Self {
        let who =
            match bits & (abi::KDP_ACCESS_GUEST | abi::KDP_ACCESS_KERNEL | abi::KDP_ACCESS_USER) {
                abi::KDP_ACCESS_GUEST => Who::Guest,
                abi::KDP_ACCESS_KERNEL => Who::Kernel,
                abi::KDP_ACCESS_USER => Who::User,
                _ => Who::Unknown,
            };
        Self {
            who,
            write: bits & abi::KDP_ACCESS_WRITE != 0,
            exec: bits & abi::KDP_ACCESS_EXEC != 0,
        }
    }
}

/// What an event tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// Somebody waits for an absent page. Make it present (or zero) by [`Vm::mark`] to let them go on.
    Absent,
    /// A page could not be read from its source ([`Vm::set_source`]), for this errno, and who touched it was told
    /// so. Nobody waits.
    SourceError(i32),
    /// The kernel has found a memory error in the page's frame: its bytes are lost, and whoever touches it is told so
    /// ([`Vm::poisoned`] lists all such pages).
    Poisoned,
}

/// A touch of a page that userspace is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it tells.
    pub kind: EventKind,
    /// The memslot.
    pub slot_id: u32,
    /// The page, by its index in the memslot.
    pub page: u64,
    /// The page, by its guest frame number.
    pub gfn: u64,
    /// The access that came first.
    pub access: Access,
    /// Its thread, in the reader's pid namespace; `None` if it is not visible there.
    pub tid: Option<u32>,
    /// Threads that wait for the page now.
    pub waiters: u32,
    /// How often this event has been read, this time included: above 1, an earlier reader may have begun
    /// on it.
    pub deliveries: u32,
}

impl Event {
    /// Reads one event from its bytes. `None` if it is of a type that this crate does not know.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut event = abi::kdp_event::default();
        event.as_mut_slice().copy_from_slice(bytes);
        let kind = match event.type_ {
            abi::KDP_EVENT_ABSENT => EventKind::Absent,
            abi::KDP_EVENT_SOURCE_ERROR => EventKind::SourceError(event.error),
            abi::KDP_EVENT_POISONED => EventKind::Poisoned,
            _ => return None,
        };
        Some(Self {
            kind,
            slot_id: event.slot_id,
            page: event.page,
            gfn: event.gfn,
            access: Access::decode(event.access),
            tid: u32::try_from(event.tid).ok().filter(|tid| *tid != 0),
            waiters: event.waiters,
            deliveries: event.deliveries,
        })
    }
}

/// The events of a VM, one by one: see [`Vm::events`].
///
/// It reads no event before it is asked for one, so dropping it loses none.
#[derive(Debug)]
pub struct Events<'a> {
    vm: &'a Vm,
}

impl<'a> Events<'a> {
    pub(crate) fn new(vm: &'a Vm) -> Self {
        Self { vm }
    }
}

impl Iterator for Events<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut events = Vec::with_capacity(1);
        loop {
            match self.vm.read_events(&mut events, 1) {
                // An event of an unknown type was skipped.
                Ok(0) => {}
                Ok(_) => return events.pop().map(Ok),
                Err(error) if error.errno() == Some(Errno::INTR.raw_os_error()) => {}
                Err(error) if error.errno() == Some(Errno::AGAIN.raw_os_error()) => return None,
                Err(error) => return Some(Err::<Event, Error>(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(access: u32, tid: i32) -> abi::kdp_event {
        abi::kdp_event {
            type_: abi::KDP_EVENT_ABSENT,
            slot_id: 3,
            page: 5,
            gfn: 0x105,
            access,
            tid,
            waiters: 2,
            deliveries: 1,
            ..Default::default()
        }
    }

    #[test]
    fn decodes_every_field() {
        let event =
            Event::decode(raw(abi::KDP_ACCESS_KERNEL | abi::KDP_ACCESS_WRITE, 77).as_slice());
        assert_eq!(
            event,
            Some(Event {
                kind: EventKind::Absent,
                slot_id: 3,
                page: 5,
                gfn: 0x105,
                access: Access {
                    who: Who::Kernel,
                    write: true,
                    exec: false
                },
                tid: Some(77),
                waiters: 2,
                deliveries: 1,
            })
        );
    }

    #[test]
    fn invisible_threads_and_unknown_types() {
        let event =
            Event::decode(raw(abi::KDP_ACCESS_GUEST | abi::KDP_ACCESS_EXEC, 0).as_slice()).unwrap();
        assert_eq!(
            (event.tid, event.access.who, event.access.exec),
            (None, Who::Guest, true)
        );
        let unknown = abi::kdp_event {
            type_: 99,
            ..raw(0, 0)
        };
        assert_eq!(Event::decode(unknown.as_slice()), None);
        let failed = abi::kdp_event {
            type_: abi::KDP_EVENT_SOURCE_ERROR,
            error: 5,
            ..raw(0, 0)
        };
        let kind = Event::decode(failed.as_slice()).map(|event| event.kind);
        assert_eq!(kind, Some(EventKind::SourceError(5)));
    }
}

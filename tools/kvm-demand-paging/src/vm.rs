//! A VM: one open of the device.

use crate::{
    abi,
    event::{Event, Events, EVENT_SIZE},
    memslot::Memslots,
    sys::{self, Command},
    waiter::timespec,
    Error, Memfd, Memslot, MemslotBuilder, MemslotInfo, PageRange, Result,
};
use rustix::{
    event::{poll, PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{fcntl_getfl, fcntl_setfl, open, Mode, OFlags},
    io::{read, Errno},
};
use std::{mem::MaybeUninit, os::fd::AsRawFd, time::Duration};

/// The most events that one read returns.
const EVENTS_PER_READ: usize = 64;

/// What the module can do, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// KVM is loaded and its tracepoints are there: fault exits work.
    pub fn exits(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_EXITS) != 0
    }

    /// Memslots may have a name, and so a path.
    pub fn paths(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_PATHS) != 0
    }

    /// Whole blocks are mapped by huge page table entries.
    pub fn huge(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_HUGE) != 0
    }

    /// Pages may be made [`State::Zero`].
    pub fn zero(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_ZERO) != 0
    }

    /// [`Vm::set_source`] works.
    pub fn source(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_SOURCE) != 0
    }

    /// [`Vm::place`] works.
    pub fn place(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_PLACE) != 0
    }

    /// [`Vm::claimant`] works.
    pub fn claim(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_CLAIM) != 0
    }

    /// [`Memfd::create_huge_shmem`](crate::Memfd::create_huge_shmem) works.
    pub fn huge_shmem(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_MEMFD) != 0
    }

    /// [`Vm::replace`] works.
    pub fn replace(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_REPLACE) != 0
    }

    /// [`Vm::collapse`] works.
    pub fn collapse(self) -> bool {
        self.0 & u64::from(abi::KDP_FEATURE_COLLAPSE) != 0
    }
}

/// What the module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// The version of its ABI.
    pub api_version: u32,
    /// What it can do.
    pub features: Features,
    /// Pages that one memslot may have.
    pub max_pages: u64,
    /// Memslots that one VM may have.
    pub max_memslots: u32,
    /// Threads that one VM may have exits on for.
    pub max_vcpu_threads: u32,
    /// Ranges that one call of [`Vm::mark`] may name.
    pub max_ranges: u32,
}

/// How demand paging of a memslot is switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Every page becomes present, and the bitmap is given back.
    Off,
    /// Every page becomes absent.
    On,
    /// Every page becomes present, and can be made absent.
    OnPresent,
}

/// What a page can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its bytes are elsewhere: who touches it waits, or exits.
    Absent,
    /// Its bytes are in the memfd.
    Present,
    /// It holds nothing: who touches it gets zeros.
    Zero,
}

/// How far [`Vm::mark`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// Ranges that were done.
    pub done: u32,
    /// Pages whose state was changed.
    pub changed: u64,
}

/// What came of [`Vm::collapse`], in pages of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collapsed {
    /// In blocks that are whole: each process maps them by one entry at its next touch.
    pub collapsed: u64,
    /// In blocks that lack a page.
    pub incomplete: u64,
    /// Whose memory is no huge page, or of whose block the range holds a part only.
    pub small: u64,
    /// The first page that a block lacks.
    pub missing: Option<u64>,
}

/// A VM: its memslots, the states of their pages, and its events.
///
/// All of it can be used from several threads, and by several processes that share the fd.
#[derive(Debug)]
pub struct Vm {
    fd: OwnedFd,
}

impl Vm {
    /// Make a VM: open the device.
    pub fn open() -> Result<Self> {
        let path = abi::KDP_DEVICE_PATH
            .strip_suffix(b"\0")
            .unwrap_or(abi::KDP_DEVICE_PATH);
        let fd = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            let hint = match errno {
                Errno::NOENT | Errno::NXIO | Errno::NODEV => Some(
                    "the module is not loaded: modprobe kvm_demand_paging; 'kdp doctor' says more",
                ),
                Errno::ACCESS | Errno::PERM => Some("become root, or ask for access to the device"),
                _ => None,
            };
            Error::sys("open", String::from_utf8_lossy(path), errno).advise(hint.map(str::to_owned))
        })?;
        Self::from_fd(fd)
    }

    /// Take over a VM's fd, say one that was inherited or came over a socket. Fails if it is no VM's.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let vm = Self { fd };
        let module = vm.info()?.api_version;
        let program = abi::KDP_API_VERSION;
        if module != program {
            return Err(Error::Version { module, program });
        }
        Ok(vm)
    }

    /// Another fd of the same VM.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|error| Error::sys("dup", "the VM's fd", error))?;
        Ok(Self { fd })
    }

    /// What this module can do.
    pub fn info(&self) -> Result<Info> {
        let mut info = abi::kdp_info::sized();
        sys::call(self, &mut info).map_err(|errno| {
            let hint =
                (errno == Errno::NOTTY).then(|| "this file descriptor is not a VM's".to_owned());
            Error::sys(abi::kdp_info::NAME, "", errno).advise(hint)
        })?;
        Ok(Info {
            api_version: info.api_version,
            features: Features(info.features),
            max_pages: info.max_pages,
            max_memslots: info.max_memslots,
            max_vcpu_threads: info.max_vcpu_threads,
            max_ranges: info.max_ranges,
        })
    }

    /// Describe a memslot of all of `memfd`, to be created by [`MemslotBuilder::create`].
    pub fn create_memslot<'a>(&'a self, slot_id: u32, memfd: &'a Memfd) -> MemslotBuilder<'a> {
        MemslotBuilder::new(self, slot_id, memfd)
    }

    /// Remove a memslot: it is unmapped from every process, and whoever touches it gets SIGBUS.
    pub fn remove_memslot(&self, slot_id: u32) -> Result<()> {
        let mut argument = abi::kdp_memslot_remove {
            slot_id,
            ..Command::sized()
        };
        self.slot_call(slot_id, &mut argument)
    }

    /// The memslots, by ascending id.
    pub fn memslots(&self) -> Memslots<'_> {
        Memslots::new(self)
    }

    /// What a memslot is.
    pub fn memslot_info(&self, slot_id: u32) -> Result<MemslotInfo> {
        self.get(slot_id, 0).map(|get| MemslotInfo::decode(&get))
    }

    /// A memslot, by a new fd of it.
    pub fn memslot(&self, slot_id: u32) -> Result<Memslot> {
        let get = self.get(slot_id, abi::KDP_GET_FD)?;
        Memslot::returned(get.fd, get.nr_pages)
    }

    /// The memfd of a memslot, by a new fd of it.
    pub fn memslot_memfd(&self, slot_id: u32) -> Result<Memfd> {
        let get = self.get(slot_id, abi::KDP_GET_MEMFD)?;
        let fd = sys::returned_fd(get.memfd)
            .ok_or_else(|| Error::Peer("the module returned no fd for a memfd".to_owned()))?;
        Memfd::from_fd(fd)
    }

    pub(crate) fn get(&self, slot_id: u32, flags: u32) -> Result<abi::kdp_memslot_get> {
        let mut argument = abi::kdp_memslot_get {
            flags,
            slot_id,
            fd: -1,
            memfd: -1,
            ..Command::sized()
        };
        self.slot_call(slot_id, &mut argument)?;
        Ok(argument)
    }

    /// Switch demand paging of a memslot, while its guest runs. [`PresentBitmap`]s of it must be dropped
    /// before it is switched off.
    ///
    /// [`PresentBitmap`]: crate::PresentBitmap
    pub fn set_paging(&self, slot_id: u32, paging: Paging) -> Result<()> {
        let mode = match paging {
            Paging::Off => abi::KDP_PAGING_OFF,
            Paging::On => abi::KDP_PAGING_ON,
            Paging::OnPresent => abi::KDP_PAGING_ON_PRESENT,
        };
        let mut argument = abi::kdp_paging {
            slot_id,
            mode,
            ..Command::sized()
        };
        self.slot_call(slot_id, &mut argument)
    }

    fn slot_call<T: Command>(&self, slot_id: u32, argument: &mut T) -> Result<()> {
        sys::call(self, argument).map_err(|errno| {
            let hint = (errno == Errno::NOENT).then(|| "the VM has no such memslot".to_owned());
            Error::sys(T::NAME, format!("memslot {slot_id}"), errno).advise(hint)
        })
    }

    /// Change the state of pages. All ranges are checked before anything changes; they may overlap and are
    /// done in their order.
    ///
    /// After a failure half-way, [`Error::Mark`] tells how far it got.
    pub fn mark(&self, slot_id: u32, state: State, ranges: &[PageRange]) -> Result<Marked> {
        let mut argument = abi::kdp_mark {
            slot_id,
            state: match state {
                State::Absent => abi::KDP_STATE_ABSENT,
                State::Present => abi::KDP_STATE_PRESENT,
                State::Zero => abi::KDP_STATE_ZERO,
            },
            ranges: ranges.as_ptr() as u64,
            nr_ranges: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            ..Command::sized()
        };
        // `PageRange` has the layout of `struct kdp_range`, and the call only reads the ranges.
        sys::call(self, &mut argument)
            .map_err(|errno| mark_error(errno, &argument, state, ranges))?;
        Ok(Marked {
            done: argument.done,
            changed: argument.changed,
        })
    }

    /// Make pages present, and wake whoever waits for them. Their bytes must be in the memfd.
    pub fn mark_present(&self, slot_id: u32, ranges: &[PageRange]) -> Result<Marked> {
        self.mark(slot_id, State::Present, ranges)
    }

    /// Make pages absent: they are unmapped from everybody before this returns.
    pub fn mark_absent(&self, slot_id: u32, ranges: &[PageRange]) -> Result<Marked> {
        self.mark(slot_id, State::Absent, ranges)
    }

    /// Make absent pages zero: who touches them gets zeros, with no event.
    pub fn mark_zero(&self, slot_id: u32, ranges: &[PageRange]) -> Result<Marked> {
        self.mark(slot_id, State::Zero, ranges)
    }

    /// Have whole blocks of a range mapped by one entry each, in every process.
    ///
    /// That happens by itself to a block that is touched, or completed by [`mark`](Self::mark): this is for those
    /// that became whole by bits, and of which only pages are touched that were mapped before.
    pub fn collapse(&self, slot_id: u32, range: PageRange) -> Result<Collapsed> {
        let mut argument = abi::kdp_collapse {
            slot_id,
            first: range.first,
            count: range.count,
            ..Command::sized()
        };
        sys::call(self, &mut argument).map_err(|errno| {
            let hint = match errno {
                Errno::NOENT => Some("the VM has no such memslot"),
                Errno::INVAL => Some("the range is empty or passes the memslot's end"),
                Errno::NOTTY => Some("the module is older than this program: insert a newer one"),
                _ => None,
            };
            let argument = format!(
                "memslot {slot_id}, {} pages from {}",
                range.count, range.first
            );
            Error::sys("KDP_COLLAPSE", argument, errno).advise(hint.map(str::to_owned))
        })?;
        Ok(Collapsed {
            collapsed: argument.collapsed,
            incomplete: argument.incomplete,
            small: argument.small,
            missing: (argument.missing != u64::MAX).then_some(argument.missing),
        })
    }

    /// Name a file that has the bytes of absent pages, from `offset` (a multiple of 4096 bytes) on: all of them, or
    /// those in `ranges`. Who touches one has it read by the kernel, with neither an exit nor an event.
    ///
    /// The file must not change. A page that is made absent afterwards is not read from it; to fill one by hand, make
    /// it absent first. What was the source before no longer is.
    pub fn set_source(
        &self,
        slot_id: u32,
        file: impl AsFd,
        offset: u64,
        ranges: Option<&[PageRange]>,
    ) -> Result<()> {
        let max = self.info()?.max_ranges.max(1) as usize;
        let (first, rest) = match ranges {
            None => (&[][..], &[][..]),
            // A source that has no page is none.
            Some([]) => return self.clear_source(slot_id),
            Some(ranges) => ranges.split_at(ranges.len().min(max)),
        };
        self.source(slot_id, file.as_fd().as_raw_fd(), offset, 0, first)?;
        self.add_source_ranges(slot_id, rest)
    }

    /// The source has these pages, too.
    pub fn add_source_ranges(&self, slot_id: u32, ranges: &[PageRange]) -> Result<()> {
        let max = self.info()?.max_ranges.max(1) as usize;
        ranges
            .chunks(max)
            .try_for_each(|part| self.source(slot_id, -1, 0, abi::KDP_SOURCE_ADD, part))
    }

    /// Absent pages are no longer read from a file.
    pub fn clear_source(&self, slot_id: u32) -> Result<()> {
        self.source(slot_id, -1, 0, 0, &[])
    }

    fn source(
        &self,
        slot_id: u32,
        fd: i32,
        offset: u64,
        flags: u32,
        ranges: &[PageRange],
    ) -> Result<()> {
        let mut argument = abi::kdp_source {
            flags,
            slot_id,
            fd,
            offset,
            ranges: ranges.as_ptr() as u64,
            nr_ranges: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            ..Command::sized()
        };
        // `PageRange` has the layout of `struct kdp_range`, and the call only reads the ranges.
        sys::call(self, &mut argument).map_err(|errno| {
            let hint = match errno {
                Errno::NOENT => Some("the VM has no such memslot"),
                Errno::ACCESS => Some("open the file for reading"),
                Errno::NXIO if flags != 0 => Some("the memslot has no source to add to"),
                Errno::NXIO => Some("demand paging of this memslot is off: switch it on first"),
                Errno::INVAL => Some(
                    "the file must be a regular file or a block device, the offset a multiple of 4096, and no range \
                     empty or past the memslot's end",
                ),
                Errno::NOTTY => Some("the module is older than this program: insert a newer one"),
                _ => None,
            };
            let argument = format!("memslot {slot_id}, offset {offset}, {} ranges", ranges.len());
            Error::sys("KDP_SOURCE", argument, errno).advise(hint.map(str::to_owned))
        })
    }

    /// Ask for fault exits, for the vCPUs that the calling thread runs, or for no more of them.
    ///
    /// Decode what KVM_RUN returns with [`FaultExit::decode`](crate::FaultExit::decode).
    pub fn set_vcpu_exits(&self, on: bool) -> Result<()> {
        let mut argument = abi::kdp_vcpu_exits {
            mode: if on {
                abi::KDP_EXITS_ON
            } else {
                abi::KDP_EXITS_OFF
            },
            ..Command::sized()
        };
        sys::call(self, &mut argument).map_err(|errno| {
            let hint = match errno {
                Errno::OPNOTSUPP => {
                    Some("KVM is not loaded, or this kernel's KVM lacks the tracepoint")
                }
                Errno::BUSY => {
                    Some("this thread has exits on for another VM: switch them off there")
                }
                Errno::NOSPC => Some("the VM has as many threads with exits on as it can have"),
                _ => None,
            };
            let argument = if on { "on" } else { "off" };
            Error::sys("KDP_VCPU_EXITS", argument, errno).advise(hint.map(str::to_owned))
        })
    }

    /// The events, one by one.
    ///
    /// It waits for the next one, or ends when there is none, as [`Vm::set_nonblocking`] says.
    pub fn events(&self) -> Events<'_> {
        Events::new(self)
    }

    /// Append to `events` what there is now, but at most `max` (and some module-defined batch); how many
    /// those were. Waits if there is none, or fails with EAGAIN, as [`Vm::set_nonblocking`] says.
    ///
    /// An event that was read and not resolved is delivered again only after this process has closed the
    /// VM's fd: do not drop one.
    pub fn read_events(&self, events: &mut Vec<Event>, max: usize) -> Result<usize> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); EVENT_SIZE * EVENTS_PER_READ];
        let room = EVENT_SIZE * max.clamp(1, EVENTS_PER_READ);
        let (raw, _) = read(&self.fd, &mut buffer[..room])
            .map_err(|errno| Error::sys("read", "the VM's fd", errno))?;
        let before = events.len();
        events.extend(raw.chunks_exact(EVENT_SIZE).filter_map(Event::decode));
        Ok(events.len() - before)
    }

    /// Wait until there is an event, or `timeout` is over; whether there is one.
    pub fn wait_event(&self, timeout: Option<Duration>) -> Result<bool> {
        let timeout = timeout.map(timespec);
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut fds, timeout.as_ref())
            .map_err(|errno| Error::sys("poll", "the VM's fd", errno))?;
        Ok(fds[0].revents().contains(PollFlags::IN))
    }

    /// Whether reading events waits for one. The setting is shared with every process that got this VM's
    /// fd from this one, and with whom this one got it from.
    pub fn set_nonblocking(&self, on: bool) -> Result<()> {
        let error = |errno| Error::sys("fcntl", "the VM's fd, O_NONBLOCK", errno);
        let mut flags = fcntl_getfl(&self.fd).map_err(error)?;
        flags.set(OFlags::NONBLOCK, on);
        fcntl_setfl(&self.fd, flags).map_err(error)
    }
}

fn mark_error(errno: Errno, argument: &abi::kdp_mark, state: State, ranges: &[PageRange]) -> Error {
    let hint = match errno {
        Errno::NOENT => Some("the VM has no such memslot"),
        Errno::NXIO => Some("demand paging of this memslot is off: switch it on first"),
        Errno::INVAL => Some(
            "there must be 1 to max_ranges ranges, none of them empty or past the memslot's end",
        ),
        _ => None,
    };
    let which = match ranges {
        [] => "no ranges".to_owned(),
        [one] => format!("pages {} to {}", one.first, one.end()),
        [first, .., last] => format!(
            "{} ranges, from page {} to page {}",
            ranges.len(),
            first.first,
            last.end()
        ),
    };
    Error::Mark {
        argument: format!("memslot {}, {state:?}, {which}", argument.slot_id),
        done: argument.done,
        changed: argument.changed,
        source: errno.into(),
        hint: hint.map(str::to_owned),
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Vm> for OwnedFd {
    fn from(vm: Vm) -> Self {
        vm.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_is_no_vm() {
        let error = Vm::from_fd(tempfile::tempfile().unwrap().into()).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOTTY.raw_os_error()));
        assert!(
            error
                .to_string()
                .ends_with("this file descriptor is not a VM's"),
            "{error}"
        );
    }

    #[test]
    fn a_mark_that_fails_says_how_far_it_got() {
        let argument = abi::kdp_mark {
            slot_id: 2,
            done: 1,
            changed: 9,
            ..Command::sized()
        };
        let ranges = [PageRange::new(0, 9), PageRange::page(77)];
        let error = mark_error(Errno::INTR, &argument, State::Absent, &ranges);
        assert_eq!(
            error.to_string(),
            "KDP_MARK(memslot 2, Absent, 2 ranges, from page 0 to page 78): \
             Interrupted system call (os error 4), after 1 ranges with 9 pages changed"
        );
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The ioctls of a VM: each one a function from a typed argument to a result.
//!
//! An argument is copied in whole before anything is done. One that has fields for answers is copied
//! back whatever the result, so that a failure can say how far it got. Nothing that can fail comes
//! after a descriptor is installed.

use crate::{
    backing::Backing,
    compat::eopnotsupp,
    ffi::{
        bounce::Bounce,
        file::RawFile,
        memfd::Memfd,
        memory_failure,
        shmem,
        source_file::SourceFile,
        task::is_being_killed,
        tracepoint,
        uapi::*,
        work, //
    },
    memslot::{
        claim::Claimant,
        place::Placed,
        Collapsed,
        Memslot,
        Place,
        Progress, //
    },
    pages::Mode,
    path::{
        Name,
        Path, //
    },
    replace,
    rules::{
        claim::{
            Act,
            Fate, //
        },
        poison::Cause,
        range::{
            locate,
            PageRange,
            WORD_PAGES, //
        },
        touch::State, //
    },
    source::Source,
    vm::{
        Slot,
        Vm, //
    }, //
};
use core::slice;
use kernel::{
    bindings::O_CLOEXEC,
    fs::file::FileDescriptorReservation,
    page::PAGE_SHIFT,
    prelude::*,
    sync::ArcBorrow,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The physical address space that x86-64 has, in pages: 52 bits.
const MAX_GFN: u64 = 1 << (52 - PAGE_SHIFT);

/// Finds the function.
pub(crate) fn dispatch(vm: ArcBorrow<'_, Vm>, cmd: u32, arg: UserPtr) -> Result<isize> {
    match cmd {
        KDP_CMD_INFO => with_answer(arg, info),
        KDP_CMD_MEMSLOT_CREATE => {
            with_fds(arg, |a| memslot_create(vm, a), |a| vm.remove(a.slot_id))
        }
        KDP_CMD_MEMSLOT_REMOVE => simple(arg, |a| memslot_remove(vm, a)),
        KDP_CMD_MEMSLOT_GET => with_fds(arg, |a| memslot_get(vm, a), |_| Ok(())),
        KDP_CMD_PAGING => simple(arg, |a| paging(vm, a)),
        KDP_CMD_MARK => with_answer(arg, |a| mark(vm, a)),
        KDP_CMD_VCPU_EXITS => simple(arg, |a| vcpu_exits(vm, a)),
        KDP_CMD_COLLAPSE => with_answer(arg, |a| collapse(vm, a)),
        KDP_CMD_SOURCE => simple(arg, |a| source(vm, a)),
        KDP_CMD_POISON => with_answer(arg, |a| poison(vm, a)),
        KDP_CMD_POISON_LIST => with_answer(arg, |a| poison_list(vm, a)),
        KDP_CMD_REPLACE => with_answer(arg, |a| replace_huge(vm, a)),
        KDP_CMD_PLACE => with_answer(arg, |a| place(vm, a)),
        KDP_CMD_CLAIMANT => with_fds(arg, |a| claimant(vm, a), |_| Ok(())),
        KDP_CMD_MEMFD => with_fds(arg, memfd, |_| Ok(())),
        _ => Err(ENOTTY),
    }
}

/// The same for a claimant's file.
pub(crate) fn dispatch_claimant(
    claimant: ArcBorrow<'_, Claimant>,
    cmd: u32,
    arg: UserPtr,
) -> Result<isize> {
    match cmd {
        KDP_CMD_CLAIM => with_answer(arg, |a| claim(&claimant, a)),
        KDP_CMD_COMMIT => with_answer(arg, |a| commit(&claimant, a)),
        _ => Err(ENOTTY),
    }
}

fn simple<T: Argument>(arg: UserPtr, f: impl FnOnce(&T) -> Result) -> Result<isize> {
    f(&copy_in(arg)?).map(|()| 0)
}

fn with_answer<T: Argument>(arg: UserPtr, f: impl FnOnce(&mut T) -> Result) -> Result<isize> {
    let mut value = copy_in(arg)?;
    let result = f(&mut value);
    copy_out(arg, &value)?;
    result.map(|()| 0)
}

/// Descriptors to be installed when nothing can fail any more.
type Fds = [Option<(FileDescriptorReservation, RawFile)>; 2];

fn with_fds<T: Argument>(
    arg: UserPtr,
    f: impl FnOnce(&mut T) -> Result<Fds>,
    undo: impl FnOnce(&T) -> Result,
) -> Result<isize> {
    let mut value = copy_in(arg)?;
    let fds = f(&mut value)?;
    if let Err(e) = copy_out(arg, &value) {
        undo(&value)?;
        return Err(e);
    }
    for (fd, file) in fds.into_iter().flatten() {
        file.install(fd);
    }
    Ok(0)
}

fn reserve(file: RawFile) -> Result<(FileDescriptorReservation, RawFile)> {
    Ok((
        FileDescriptorReservation::get_unused_fd_flags(O_CLOEXEC)?,
        file,
    ))
}

/// Refuses flags that are not among `known`, and reserved fields that are not zero.
fn check_unknown(flags: u32, known: u32, reserved: u32) -> Result {
    if flags & !known != 0 || reserved != 0 {
        return Err(eopnotsupp());
    }
    Ok(())
}

fn info(arg: &mut kdp_info) -> Result {
    check_unknown(arg.flags, 0, 0)?;
    let mut features = u64::from(
        KDP_FEATURE_PATHS
            | KDP_FEATURE_HUGE
            | KDP_FEATURE_ZERO
            | KDP_FEATURE_COLLAPSE
            | KDP_FEATURE_SOURCE
            | KDP_FEATURE_POISON
            | KDP_FEATURE_REPLACE
            | KDP_FEATURE_PLACE
            | KDP_FEATURE_CLAIM,
    );
    if tracepoint::available() {
        features |= u64::from(KDP_FEATURE_EXITS);
    }
    if shmem::has_huge() {
        features |= u64::from(KDP_FEATURE_MEMFD);
    }
    if memory_failure::available() {
        features |= u64::from(KDP_FEATURE_MEMORY_FAILURE);
    }
    *arg = kdp_info {
        size: arg.size,
        flags: 0,
        api_version: KDP_API_VERSION,
        page_shift: KDP_PAGE_SHIFT,
        features,
        bitmap_offset: KDP_BITMAP_OFFSET,
        max_pages: KDP_MAX_PAGES,
        max_memslots: KDP_MAX_MEMSLOTS,
        max_vcpu_threads: KDP_MAX_VCPU_THREADS,
        max_ranges: KDP_MAX_RANGES,
        event_size: size_of::<kdp_event>() as u32,
    };
    Ok(())
}

fn memslot_create(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_memslot_create) -> Result<Fds> {
    let known = KDP_MEMSLOT_PAGING | KDP_MEMSLOT_POISON_SIGNAL;
    check_unknown(arg.flags, known, arg.__reserved)?;
    let end_gfn = arg.base_gfn.checked_add(arg.nr_pages).ok_or(EINVAL)?;
    if arg.nr_pages == 0 || arg.nr_pages > KDP_MAX_PAGES || end_gfn > MAX_GFN {
        return Err(EINVAL);
    }
    let name = Name::parse(arg.name)?;
    let memfd = Memfd::from_fd(arg.memfd)?;
    let backing = Backing::new(memfd, arg.memfd_offset, arg.nr_pages)?;
    let mode = if arg.flags & KDP_MEMSLOT_PAGING != 0 {
        Mode::On { default: false }
    } else {
        Mode::Off
    };
    let place = Place {
        id: arg.slot_id,
        serial: vm.next_slot_serial()?,
        base_gfn: arg.base_gfn,
        nr_pages: arg.nr_pages,
        name,
    };

    let mut made = None;
    let file = RawFile::with_inode(|inode| {
        let signals = arg.flags & KDP_MEMSLOT_POISON_SIGNAL != 0;
        let memslot = Memslot::new(vm.into(), place, backing, inode, mode, signals)?;
        made = Some(memslot.clone());
        Ok(memslot)
    })?;
    let memslot = made.ok_or(ENOMEM)?;
    let (fd, file) = reserve(file)?;
    arg.fd = fd.reserved_fd() as i32;
    memslot.list()?;
    vm.insert(Slot {
        path: Path::new(&memslot)?,
        memslot,
        file: file.clone(),
    })?;
    Ok([Some((fd, file)), None])
}

fn memslot_remove(vm: ArcBorrow<'_, Vm>, arg: &kdp_memslot_remove) -> Result {
    check_unknown(arg.flags, 0, arg.__reserved)?;
    vm.remove(arg.slot_id)
}

fn memslot_get(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_memslot_get) -> Result<Fds> {
    check_unknown(arg.flags, KDP_GET_NEXT | KDP_GET_FD | KDP_GET_MEMFD, 0)?;
    let (memslot, file) = vm.slot_file(arg.slot_id, arg.flags & KDP_GET_NEXT != 0)?;
    let backing = &memslot.backing;
    let wanted = |flag: u32, file: &RawFile| -> Result<_> {
        (arg.flags & flag != 0)
            .then(|| reserve(file.clone()))
            .transpose()
    };
    let fds = [
        wanted(KDP_GET_FD, &file)?,
        wanted(KDP_GET_MEMFD, backing.memfd().file())?,
    ];
    let number = |fd: &Option<(FileDescriptorReservation, _)>| {
        fd.as_ref().map_or(-1, |(fd, _)| fd.reserved_fd() as i32)
    };
    let paging = match memslot.pages.read().mode() {
        Mode::On { .. } => KDP_PAGING_ON,
        Mode::Off | Mode::Removed => KDP_PAGING_OFF,
    };
    let place = &memslot.place;
    *arg = kdp_memslot_get {
        size: arg.size,
        flags: arg.flags,
        slot_id: place.id,
        paging,
        base_gfn: place.base_gfn,
        nr_pages: place.nr_pages,
        memfd_offset: backing.offset() << PAGE_SHIFT,
        backing_page_size: 1 << (backing.order() + PAGE_SHIFT as u32),
        fd: number(&fds[0]),
        memfd: number(&fds[1]),
        name: place.name.field(),
    };
    Ok(fds)
}

fn paging(vm: ArcBorrow<'_, Vm>, arg: &kdp_paging) -> Result {
    check_unknown(arg.flags, 0, 0)?;
    let mode = match arg.mode {
        KDP_PAGING_OFF => Mode::Off,
        KDP_PAGING_ON => Mode::On { default: false },
        KDP_PAGING_ON_PRESENT => Mode::On { default: true },
        _ => return Err(eopnotsupp()),
    };
    vm.slot(arg.slot_id)?.set_paging(mode)
}

fn mark(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_mark) -> Result {
    arg.done = 0;
    arg.changed = 0;
    check_unknown(arg.flags, 0, 0)?;
    let state = match arg.state {
        KDP_STATE_ABSENT => State::Absent,
        KDP_STATE_PRESENT => State::Present,
        KDP_STATE_ZERO => State::Zero,
        _ => return Err(eopnotsupp()),
    };
    let memslot = vm.slot(arg.slot_id)?;
    let mut progress = Progress::default();
    let result = for_ranges(&memslot, arg.ranges, arg.nr_ranges, |range| match state {
        State::Absent => memslot.mark_absent(range, &mut progress),
        to => memslot.resolve(range, to, &mut progress),
    });
    arg.done = progress.done;
    arg.changed = progress.changed;
    result
}

/// Does something to the ranges of a call, of which there is at least one, until it fails.
fn for_ranges(
    memslot: &Memslot,
    address: u64,
    count: u32,
    f: impl FnMut(PageRange) -> Result,
) -> Result {
    if count == 0 {
        return Err(EINVAL);
    }
    let ranges = read_ranges(memslot, address, count)?;
    ranges.as_slice().iter().copied().try_for_each(f)
}

/// The ranges of one call. A handler that answers faults names one at a time: that needs no memory.
enum Ranges {
    None,
    One(PageRange),
    Many(KVVec<PageRange>),
}

impl Ranges {
    fn as_slice(&self) -> &[PageRange] {
        match self {
            Ranges::None => &[],
            Ranges::One(range) => slice::from_ref(range),
            Ranges::Many(ranges) => ranges,
        }
    }
}

/// Reads and checks all ranges before the first of them is done.
fn read_ranges(memslot: &Memslot, address: u64, count: u32) -> Result<Ranges> {
    if count > KDP_MAX_RANGES {
        return Err(EINVAL);
    }
    let count = count as usize;
    let address = UserPtr::from_addr(usize::try_from(address).map_err(|_| EFAULT)?);
    let mut reader = UserSlice::new(address, count * size_of::<kdp_range>()).reader();
    let mut next = || -> Result<PageRange> {
        let mut range = kdp_range::default();
        reader.read_slice(range.bytes_mut())?;
        memslot.range(range.first, range.count).ok_or(EINVAL)
    };
    match count {
        0 => return Ok(Ranges::None),
        1 => return next().map(Ranges::One),
        _ => (),
    }
    let mut ranges = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
    for _ in 0..count {
        ranges.push(next()?, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(Ranges::Many(ranges))
}

fn collapse(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_collapse) -> Result {
    check_unknown(arg.flags, 0, arg.__reserved)?;
    let memslot = vm.slot(arg.slot_id)?;
    let range = memslot.range(arg.first, arg.count).ok_or(EINVAL)?;
    let mut report = Collapsed::default();
    let result = memslot.collapse(range, &mut report);
    arg.collapsed = report.whole;
    arg.incomplete = report.incomplete;
    arg.small = report.small;
    arg.missing = report.missing.unwrap_or(u64::MAX);
    result
}

fn source(vm: ArcBorrow<'_, Vm>, arg: &kdp_source) -> Result {
    check_unknown(arg.flags, KDP_SOURCE_ADD, arg.__reserved)?;
    let memslot = vm.slot(arg.slot_id)?;
    let adds = arg.flags & KDP_SOURCE_ADD != 0;
    // Ranges without a file are for a file that is there already.
    let has_ranges = arg.nr_ranges > 0;
    if arg.fd == -1 && (arg.offset != 0 || adds != has_ranges) || arg.fd != -1 && adds {
        return Err(EINVAL);
    }
    let ranges = read_ranges(&memslot, arg.ranges, arg.nr_ranges)?;
    if adds {
        return memslot.add_source(ranges.as_slice());
    }
    let source = match arg.fd {
        -1 => None,
        fd => {
            let file = SourceFile::from_fd(fd)?;
            Some(Source::new(file, arg.offset, memslot.place.nr_pages)?)
        }
    };
    memslot.set_source(source, ranges.as_slice())
}

fn poison(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_poison) -> Result {
    arg.done = 0;
    arg.changed = 0;
    check_unknown(arg.flags, KDP_POISON_HEAL, 0)?;
    let heals = arg.flags & KDP_POISON_HEAL != 0;
    let cause = match arg.cause {
        0 if heals => None,
        KDP_CAUSE_EMULATED if !heals => Some(Cause::Emulated),
        KDP_CAUSE_INHERITED if !heals => Some(Cause::Inherited),
        0..=KDP_CAUSE_INHERITED => return Err(EINVAL),
        _ => return Err(eopnotsupp()),
    };
    let memslot = vm.slot(arg.slot_id)?;
    let mut progress = Progress::default();
    let result = for_ranges(&memslot, arg.ranges, arg.nr_ranges, |range| match cause {
        Some(cause) => memslot.poison(range, cause, &mut progress),
        None => memslot.heal(range, &mut progress),
    });
    arg.done = progress.done;
    arg.changed = progress.changed;
    result
}

fn poison_list(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_poison_list) -> Result {
    check_unknown(arg.flags, 0, 0)?;
    let memslot = vm.slot(arg.slot_id)?;
    if arg.count == 0 || arg.count > KDP_MAX_RANGES || arg.first > memslot.place.nr_pages {
        return Err(EINVAL);
    }
    let room = arg.count as usize;
    let mut runs = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
    memslot.poisoned(arg.first, &mut runs)?;
    let address = usize::try_from(arg.poisoned).map_err(|_| EFAULT)?;
    let bytes = runs.len() * size_of::<kdp_poisoned>();
    let mut out = UserSlice::new(UserPtr::from_addr(address), bytes).writer();
    for run in runs.iter() {
        let raw = kdp_poisoned {
            first: run.first,
            count: run.count,
            cause: run.cause as u32,
            ..Default::default()
        };
        out.write_slice(raw.bytes())?;
    }
    arg.count = runs.len() as u32;
    arg.first = match runs.last() {
        Some(run) if runs.len() == room => run.first + run.count,
        _ => memslot.place.nr_pages,
    };
    Ok(())
}

fn replace_huge(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_replace) -> Result {
    (arg.copied, arg.lost, arg.healed, arg.errors) = (0, 0, 0, 0);
    check_unknown(arg.flags, 0, 0)?;
    let memslot = vm.slot(arg.slot_id)?;
    let memfd = Memfd::from_fd(arg.memfd)?;
    let replaced = replace::replace(&memslot, arg.first, &memfd, arg.offset)?;
    arg.copied = replaced.copied;
    arg.lost = replaced.lost;
    arg.healed = replaced.healed;
    arg.errors = replaced.errors;
    Ok(())
}

fn place(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_place) -> Result {
    arg.done = 0;
    arg.placed = 0;
    check_unknown(arg.flags, 0, arg.__reserved)?;
    let memslot = vm.slot(arg.slot_id)?;
    let range = memslot.range(arg.first, arg.count).ok_or(EINVAL)?;
    let user = |address: u64| -> Result<_> {
        let address = usize::try_from(address).map_err(|_| EFAULT)?;
        Ok(UserPtr::from_addr(address))
    };
    let bytes = usize::try_from(range.count() << PAGE_SHIFT).map_err(|_| EINVAL)?;
    let mut data = UserSlice::new(user(arg.data)?, bytes).reader();
    let wanted = if arg.results == 0 {
        0
    } else {
        range.count() as usize
    };
    let mut results = UserSlice::new(user(arg.results)?, wanted).writer();
    let mut bounce = Bounce::new()?;
    for page in range.first()..=range.last() {
        if is_being_killed() {
            return Err(EINTR);
        }
        bounce.read(&mut data)?;
        let placed = memslot.place(page, bounce.page())?;
        arg.placed += u64::from(placed == Placed::Now);
        arg.done += 1;
        if wanted > 0 {
            let result = match placed {
                Placed::Now => KDP_PLACED_NOW,
                Placed::Present => KDP_PLACED_PRESENT,
                Placed::Lost => KDP_PLACED_LOST,
                Placed::Claimed => KDP_PLACED_CLAIMED,
            };
            results.write(&(result as u8))?;
        }
        work::yield_now();
    }
    Ok(())
}

fn claimant(vm: ArcBorrow<'_, Vm>, arg: &mut kdp_claimant) -> Result<Fds> {
    check_unknown(arg.flags, 0, 0)?;
    let (fd, file) = reserve(Claimant::file(vm.slot(arg.slot_id)?)?)?;
    arg.fd = fd.reserved_fd() as i32;
    Ok([Some((fd, file)), None])
}

fn memfd(arg: &mut kdp_memfd) -> Result<Fds> {
    check_unknown(arg.flags, 0, arg.__reserved)?;
    if arg.length == 0 {
        return Err(EINVAL);
    }
    let (fd, file) = reserve(shmem::huge_file(arg.length)?)?;
    arg.fd = fd.reserved_fd() as i32;
    Ok([Some((fd, file)), None])
}

fn claim(claimant: &Claimant, arg: &mut kdp_claim) -> Result {
    check_claim(arg, 0)?;
    act(claimant, arg, Act::Claim)
}

fn commit(claimant: &Claimant, arg: &mut kdp_claim) -> Result {
    check_claim(arg, KDP_COMMIT_ABANDON)?;
    let act_for = if arg.flags & KDP_COMMIT_ABANDON != 0 {
        Act::Abandon
    } else {
        Act::Commit
    };
    act(claimant, arg, act_for)
}

fn check_claim(arg: &mut kdp_claim, known: u32) -> Result {
    arg.done = 0;
    arg.changed = 0;
    check_unknown(arg.flags, known, 0)
}

/// Does something to claimed pages, word by word, and tells what became of each.
fn act(claimant: &Claimant, arg: &mut kdp_claim, act: Act) -> Result {
    let memslot = &claimant.memslot;
    let range = memslot.range(arg.first, arg.count).ok_or(EINVAL)?;
    let wanted = if arg.results == 0 { 0 } else { range.count() };
    let address = usize::try_from(arg.results).map_err(|_| EFAULT)?;
    let mut results = UserSlice::new(UserPtr::from_addr(address), wanted as usize).writer();
    let mut first = range.first();
    while first <= range.last() {
        if is_being_killed() {
            return Err(EINTR);
        }
        let count = (WORD_PAGES - first % WORD_PAGES).min(range.last() + 1 - first);
        let part = memslot.range(first, count).ok_or(EINVAL)?;
        let seen = claimant.act(act, part)?;
        let fates = (first..first + count).map(|page| seen.fate(act, locate(page).2));
        arg.done += count;
        arg.changed += fates.clone().filter(|&fate| fate == Fate::Done).count() as u64;
        if wanted > 0 {
            let mut bytes = [0; WORD_PAGES as usize];
            for (byte, fate) in bytes.iter_mut().zip(fates) {
                *byte = match fate {
                    Fate::Done => KDP_CLAIM_DONE,
                    Fate::Present => KDP_CLAIM_PRESENT,
                    Fate::Lost => KDP_CLAIM_LOST,
                    Fate::Claimed => KDP_CLAIM_TAKEN,
                    Fate::Void => KDP_CLAIM_VOID,
                } as u8;
            }
            results.write_slice(&bytes[..count as usize])?;
        }
        first += count;
        work::yield_now();
    }
    Ok(())
}

fn vcpu_exits(vm: ArcBorrow<'_, Vm>, arg: &kdp_vcpu_exits) -> Result {
    check_unknown(arg.flags, 0, arg.__reserved)?;
    let on = match arg.mode {
        KDP_EXITS_OFF => false,
        KDP_EXITS_ON => true,
        _ => return Err(eopnotsupp()),
    };
    vm.threads().lock().set_current(vm.serial(), on)
}

// SPDX-License-Identifier: GPL-2.0

//! What a touch of guest memory does: the fault handlers of a memslot's mappings.
//!
//! A fault looks at the page's state and maps it under the `pages` lock for reading (memslot.rs has
//! the lock order). It never sleeps on an absent page while it holds that lock, or the mmap or VMA
//! lock: it queues itself, if the page is absent still, drops the fault's lock, sleeps, and has the
//! fault retried.

use crate::{
    ahead,
    around,
    collapse,
    compat::ehwpoison,
    events::Access,
    ffi::{
        memfd::Pfn,
        rwsem::ReadGuard,
        task::is_ending,
        trace,
        uapi::*,
        vma::{
            Fault,
            Mapping,
            Outcome,
            PMD_ORDER, //
        },
        wait::Until, //
    },
    lost,
    memslot::Memslot,
    moving::on_its_way,
    pages::Pages,
    rules::{
        collapse::BLOCK_PAGES,
        queue::EnterError,
        range::PageRange,
        touch::{
            decide,
            State,
            Toucher,
            Verdict, //
        }, //
    },
    source::{
        Filled,
        Source,
        Unfilled, //
    },
    vcpu, //
};
use kernel::{
    bindings::vm_flags_t,
    mm::{
        virt::flags,
        Mm, //
    },
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    }, //
};

/// Guest memory on hugetlb: page frames that are not refcounted by the mapping.
pub(crate) struct MemoryMapping;

impl Mapping for MemoryMapping {
    type Owner = Memslot;

    // VM_PFNMAP keeps NUMA balancing, compaction, KSM and get_user_pages() away. A mapping may move
    // but not grow.
    const FLAGS: vm_flags_t = flags::PFNMAP | flags::DONTEXPAND | flags::DONTDUMP;
    const HUGE: bool = true;

    fn opened(slot: ArcBorrow<'_, Memslot>, mm: &Mm) {
        lost::opened(slot, mm);
    }

    #[inline]
    fn fault(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
        if fault.pgoff() >= slot.place.nr_pages {
            return fail(&slot);
        }
        match page_fault(slot, fault) {
            Ok(outcome) => outcome,
            Err(again) => page_fault_again(slot, again),
        }
    }

    fn huge_fault(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
        if !slot.backing.may_have_blocks() {
            return Outcome::Fallback;
        }
        let Some(block) = block_of(&slot, &fault) else {
            return Outcome::Fallback;
        };
        let page = fault.pgoff();
        // A block that cannot be mapped keeps nobody out.
        let pages = slot.pages.read();
        if block_frame(&slot, &pages, page, block).is_none() {
            return incomplete(slot, pages, fault, block);
        }
        drop(pages);
        // For writing: a page must not be inserted into the block at the same time, and insert_pfn()
        // cannot tell (walk_to_pmd() in mm/memory.c).
        let pages = slot.pages.write();
        let Some(frame) = block_frame(&slot, &pages, page, block) else {
            return Outcome::Fallback;
        };
        let outcome = fault.insert_block(frame);
        if outcome == Outcome::Fallback {
            return outcome;
        }
        ahead::consider(slot, &pages, page);
        drop(pages);
        mapped(&slot, fault, page, PMD_ORDER, outcome)
    }
}

/// The block around a fault, if one entry could map it.
pub(crate) fn block_of(slot: &Memslot, fault: &Fault<'_>) -> Option<PageRange> {
    let first = fault.block()?;
    slot.range(first, BLOCK_PAGES)
}

/// A block cannot be mapped by one entry now: a source may have the rest of it.
pub(crate) fn incomplete(
    slot: ArcBorrow<'_, Memslot>,
    pages: ReadGuard<'_, Pages>,
    fault: Fault<'_>,
    block: PageRange,
) -> Outcome {
    let source = pages.source().cloned();
    drop(pages);
    match source {
        Some(source) => help(slot, fault, &source, block),
        None => Outcome::Fallback,
    }
}

/// The first frame of a block around `page`, if all of it is present and one folio holds it. What is wrong
/// otherwise is reported by the page's own fault, which has a chance where the block has none.
fn block_frame<'a>(
    slot: &Memslot,
    pages: &'a Pages,
    page: u64,
    block: PageRange,
) -> Option<Pfn<'a>> {
    // A huge page that is being moved is in two.
    if !pages.all_mappable(block) || pages.moving(page).is_some() {
        return None;
    }
    let frame = slot.backing.frame(pages, page).ok()?;
    slot.backing.block_around(frame, page)
}

/// KVM brings a page in for a guest: a stage-2 fault, or a page that it shares with the guest. Only
/// `fixup_user_fault()` comes with these flags (mm/gup.c). In native memory, this is known of
/// stage-2 faults of threads with exits on only.
fn is_guest(slot: &Memslot, fault: &Fault<'_>, page: u64) -> bool {
    if !fault.is_native() {
        return is_fixup(fault);
    }
    let (gfn, waits) = (slot.place.base_gfn + page, !fault.no_wait());
    !fault.is_user() && vcpu::is_stage2_asking(slot.vm.serial(), gfn, waits)
}

/// KVM's `fixup_user_fault()`, in memory that is not native.
fn is_fixup(fault: &Fault<'_>) -> bool {
    !fault.is_native()
        && !fault.is_user()
        && !fault.is_interruptible()
        && fault.is_killable()
        && fault.may_retry()
}

fn access(slot: &Memslot, fault: &Fault<'_>, page: u64) -> u32 {
    let who = if fault.is_user() {
        KDP_ACCESS_USER
    } else if is_guest(slot, fault, page) || slot.asked.is_by_current(page) {
        KDP_ACCESS_GUEST
    } else {
        KDP_ACCESS_KERNEL
    };
    let write = if fault.is_write() {
        KDP_ACCESS_WRITE
    } else {
        0
    };
    let exec = if fault.is_exec() { KDP_ACCESS_EXEC } else { 0 };
    who | write | exec
}

fn touch(slot: &Memslot, fault: &Fault<'_>, page: u64) -> Access {
    Access {
        slot_id: slot.place.id,
        gfn: slot.place.base_gfn + page,
        flags: access(slot, fault, page),
    }
}

/// If the fault is a stage-2 fault of a thread with exits on, says in its `kvm_run` why KVM_RUN is
/// going to fail, should it fail.
#[inline(always)]
fn prepare_exit(slot: &Memslot, fault: &Fault<'_>, page: u64, reason: u64) -> bool {
    let write = if fault.is_write() { KDP_EXIT_WRITE } else { 0 };
    let (gfn, flags) = (slot.place.base_gfn + page, reason | write);
    if fault.is_native() {
        // The exit follows when KVM asks once more, and waits.
        let may_exit = !fault.is_user() && !fault.no_wait();
        return may_exit && vcpu::prepare_asked_exit(slot.vm.serial(), gfn, flags);
    }
    is_fixup(fault) && vcpu::prepare_exit(slot.vm.serial(), gfn, flags)
}

/// The same for a page that is mapped now, and may be unmapped again before KVM looks for it.
#[inline(never)]
fn prepare_retry(slot: &Memslot, fault: &Fault<'_>, page: u64) -> bool {
    prepare_exit(slot, fault, page, KDP_EXIT_RETRY)
}

/// A fault of one page. Gives the fault back if the page must be looked at again.
#[inline(always)]
fn page_fault<'a>(slot: ArcBorrow<'_, Memslot>, fault: Fault<'a>) -> Result<Outcome, Fault<'a>> {
    let page = fault.pgoff();
    let pages = slot.pages.read();
    let (state, word) = pages.look(page);
    if state == State::Present {
        let frame = slot.backing.frame(&pages, page);
        let outcome = frame.map(|frame| {
            insert(slot, &pages, &fault, frame, || {
                around::map(&slot, &pages, &fault, word);
                word
            })
        });
        drop(pages);
        return Ok(match outcome {
            Ok(outcome) => mapped(&slot, fault, page, 0, outcome),
            Err(e) => unpinned(slot, fault, page, e),
        });
    }
    if state == State::Sourced {
        return fill(slot, pages, fault, page);
    }
    drop(pages);
    if state == State::Absent {
        serve_absent(slot, fault, page)
    } else {
        serve_other(slot, fault, page, state)
    }
}

/// [`serve`] for the one state that is common.
#[inline(never)]
fn serve_absent<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    page: u64,
) -> Result<Outcome, Fault<'a>> {
    serve(slot, fault, page, State::Absent)
}

#[inline(never)]
fn serve_other<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    page: u64,
    state: State,
) -> Result<Outcome, Fault<'a>> {
    serve(slot, fault, page, state)
}

/// The same, until there is an outcome: apart from it, so that the first time, which is nearly always the last,
/// costs little.
#[cold]
#[inline(never)]
fn page_fault_again(slot: ArcBorrow<'_, Memslot>, mut fault: Fault<'_>) -> Outcome {
    loop {
        match page_fault(slot, fault) {
            Ok(outcome) => return outcome,
            Err(again) => fault = again,
        }
    }
}

/// Maps a page that is present, then what is best mapped with it, by `around`, which returns the present bits
/// around it.
#[inline(always)]
fn insert(
    slot: ArcBorrow<'_, Memslot>,
    pages: &Pages,
    fault: &Fault<'_>,
    frame: Pfn<'_>,
    around: impl FnOnce() -> u64,
) -> Outcome {
    // Another thread may have mapped the whole block since this fault fell back to a page.
    let outcome = if fault.is_in_block() {
        Outcome::Mapped
    } else {
        let outcome = fault.insert_pfn(frame);
        collapse::consider(&slot, pages, fault, frame, around());
        outcome
    };
    ahead::consider(slot, pages, fault.pgoff());
    outcome
}

/// A page, or a block, was mapped, or not. No lock of ours is held.
#[inline(always)]
pub(crate) fn mapped(
    slot: &Memslot,
    fault: Fault<'_>,
    page: u64,
    order: u32,
    outcome: Outcome,
) -> Outcome {
    match outcome {
        Outcome::Mapped | Outcome::Page => (),
        Outcome::Fail => return fail(slot),
        other => return other,
    }
    let counter = if order == 0 {
        slot.stats.faults()
    } else {
        slot.stats.faults_huge()
    };
    counter.add(1);
    trace::fault(slot.place.id, page, || access(slot, &fault, page), order);
    // KVM looks for the page table entry next, and fails with an EFAULT that no VMM expects if it has been
    // unmapped again by then. Where the lock was dropped it looks and begins anew instead
    // (hva_to_pfn_remapped() in virt/kvm/kvm_main.c). That costs it a second look, so it is kept
    // - if the lock was dropped before: KVM knows;
    // - in KVM_PRE_FAULT_MEMORY, which is a hint, and may fail;
    // - with exits on: then an exit is prepared.
    if !is_fixup(&fault)
        || fault.is_retried()
        || vcpu::is_pre_faulting()
        || prepare_retry(slot, &fault, page)
    {
        return outcome;
    }
    fault.release_lock();
    Outcome::MappedUnlocked
}

/// Fills a page from the source, if its bytes are in memory. Gives the fault back if the page must be looked at
/// again.
#[inline(never)]
fn fill<'a>(
    slot: ArcBorrow<'_, Memslot>,
    pages: ReadGuard<'_, Pages>,
    fault: Fault<'a>,
    page: u64,
) -> Result<Outcome, Fault<'a>> {
    let Some(source) = pages.source() else {
        return Err(fault);
    };
    let outcome = match source.fill(&slot, &pages, page) {
        Ok(Filled::Now(frame, word)) => {
            slot.stats.source_reads().add(1);
            let Some(frame) = frame.into_pinned() else {
                return Err(fault);
            };
            insert(slot, &pages, &fault, frame, || {
                around::fill(&slot, &pages, &fault, source, frame, word)
            })
        }
        Ok(Filled::Already) => return Err(fault),
        Ok(Filled::NotCached) => {
            let source = source.clone();
            drop(pages);
            return Ok(not_cached(slot, fault, &source, page));
        }
        Err(why) => {
            drop(pages);
            return Ok(unfilled(slot, fault, page, why));
        }
    };
    drop(pages);
    Ok(mapped(&slot, fault, page, 0, outcome))
}

/// The page cache does not have a page of the source: it is read, if the fault may wait for that.
pub(crate) fn not_cached(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    source: &Source,
    page: u64,
) -> Outcome {
    match decide(State::Sourced, toucher(&fault, false), true) {
        Verdict::Fetch => fetch(slot, fault, source, page),
        Verdict::Retry => Outcome::Retry,
        _ => fail(&slot),
    }
}

/// A block with a source is not whole: who has come to it in order helps to fill it, and the fault is retried.
fn help(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    source: &Arc<Source>,
    block: PageRange,
) -> Outcome {
    if !fault.may_retry() || fault.no_wait() || !source.comes_to(block) {
        return Outcome::Fallback;
    }
    unlocked(slot, fault, |slot| ahead::help(slot, source, block))
}

/// How a thread may be kept waiting.
#[inline]
fn toucher(fault: &Fault<'_>, exits: bool) -> Toucher {
    Toucher {
        exits,
        may_retry: fault.may_retry(),
        no_wait: fault.no_wait(),
    }
}

/// Does what is to be done for a page that has neither bytes nor a source. Gives the fault back if the page must be
/// looked at again.
#[inline(always)]
pub(crate) fn serve<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    page: u64,
    state: State,
) -> Result<Outcome, Fault<'a>> {
    let served = slot.vm.events.is_served();
    // What is prepared stands, so only where an exit is going to follow.
    let reason = match state {
        State::Absent if served => KDP_EXIT_ABSENT,
        State::Poisoned if !slot.poison_signals => KDP_EXIT_POISONED,
        _ => 0,
    };
    let exits = reason != 0 && prepare_exit(&slot, &fault, page, reason);
    // KVM would send the signal of a memory error now, and not ask for the exit.
    if reason == KDP_EXIT_POISONED && fault.no_wait() && is_guest(&slot, &fault, page) {
        return Ok(Outcome::Retry);
    }
    match decide(state, toucher(&fault, exits), served) {
        Verdict::Exit => Ok(exit(&slot, &fault, page, reason)),
        Verdict::Poison if slot.poison_signals && is_fixup(&fault) => {
            Ok(lost::show_to_kvm(slot, fault))
        }
        Verdict::Poison => Ok(poisoned(&slot)),
        Verdict::Wait => wait(slot, fault, page),
        Verdict::Retry => Ok(Outcome::Retry),
        Verdict::Fail => Ok(fail(&slot)),
        Verdict::FillZero => match slot.fill_zero(page) {
            Ok(()) => Err(fault),
            Err(e) => Ok(unpinned(slot, fault, page, e)),
        },
        // It has become something else meanwhile.
        Verdict::Map | Verdict::Fetch => Err(fault),
    }
}

fn exit(slot: &Memslot, fault: &Fault<'_>, page: u64, reason: u64) -> Outcome {
    trace::exit(slot.place.id, page, || {
        let write = if fault.is_write() { KDP_EXIT_WRITE } else { 0 };
        let gpa = (slot.place.base_gfn + page) << KDP_PAGE_SHIFT;
        (gpa, reason | write)
    });
    slot.stats.exits().add(1);
    Outcome::Fail
}

#[cold]
fn poisoned(slot: &Memslot) -> Outcome {
    slot.stats.poisoned_touches().add(1);
    Outcome::Poisoned
}

#[cold]
pub(crate) fn fail(slot: &Memslot) -> Outcome {
    slot.stats.sigbus().add(1);
    Outcome::Fail
}

/// A page could not be had.
#[cold]
#[inline(never)]
pub(crate) fn unpinned(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    page: u64,
    error: Error,
) -> Outcome {
    if error == ehwpoison() {
        examine(slot, fault, page)
    } else if error == on_its_way() {
        await_move(slot, fault)
    } else if fault.is_native() && error == ENOMEM {
        prepare_exit(&slot, &fault, page, KDP_EXIT_NO_MEMORY);
        Outcome::OutOfMemory
    } else {
        cannot_pin(&slot, &fault, page)
    }
}

/// The page's folio had memory errors before it was pinned here: they are found, and the fault is retried.
#[cold]
fn examine(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>, page: u64) -> Outcome {
    if !fault.may_retry() {
        return fail(&slot);
    }
    if fault.no_wait() {
        return Outcome::Retry;
    }
    // Without memory for it the retry tries again; who is killed does not come back.
    unlocked(slot, fault, |slot| {
        let _ = slot.examine(page);
    })
}

/// The page is on its way to another frame: the fault is retried when it has arrived.
#[cold]
fn await_move(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
    if !fault.may_retry() {
        return fail(&slot);
    }
    if fault.no_wait() {
        return Outcome::Retry;
    }
    unlocked(slot, fault, |slot| slot.wait_for_move())
}

/// Does something without the fault's lock, and has the fault retried.
fn unlocked(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    f: impl FnOnce(&Arc<Memslot>),
) -> Outcome {
    // The mapping, and with it the memslot's file, may go meanwhile.
    let slot: Arc<Memslot> = slot.into();
    let is_fixup = is_fixup(&fault);
    fault.release_lock();
    f(&slot);
    if is_fixup {
        // KVM does not hear of an error that comes after the lock was dropped: it looks, and begins anew
        // (hva_to_pfn_remapped() in virt/kvm/kvm_main.c). So it is made to look at once.
        Outcome::MappedUnlocked
    } else {
        Outcome::Retry
    }
}

/// There is no memory for the page.
#[cold]
fn cannot_pin(slot: &Memslot, fault: &Fault<'_>, page: u64) -> Outcome {
    prepare_exit(slot, fault, page, KDP_EXIT_NO_MEMORY);
    fail(slot)
}

/// Reads a page from its source, and has the fault retried.
#[inline(never)]
fn fetch(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>, source: &Source, page: u64) -> Outcome {
    // Once the lock is dropped nothing but a retry may follow: an error is for that one.
    match source.failure(page) {
        Some(e) if e == ENOMEM => return cannot_pin(&slot, &fault, page),
        Some(e) => return unfilled(slot, fault, page, Unfilled::Unread(e)),
        None => (),
    }
    unlocked(slot, fault, |slot| source.fetch_for_touch(slot, page))
}

/// A page was not filled from its source.
#[cold]
pub(crate) fn unfilled(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    page: u64,
    why: Unfilled,
) -> Outcome {
    let error = match why {
        Unfilled::Unpinned(error) => return unpinned(slot, fault, page, error),
        Unfilled::Unread(error) => error,
    };
    prepare_exit(&slot, &fault, page, KDP_EXIT_SOURCE_ERROR);
    slot.stats.source_errors().add(1);
    let touch = touch(&slot, &fault, page);
    slot.vm.events.notice(touch, page, error);
    fail(&slot)
}

/// Waits until the page is resolved. Gives the fault back if it need not wait after all.
#[inline(never)]
fn wait<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    page: u64,
) -> Result<Outcome, Fault<'a>> {
    // Nobody can kill a kernel thread. It accesses the memory of another process. The memory and
    // the VM of that process stay until the access ends. A task that closes the VM waits for that
    // (cancel_work_sync() in virt/kvm/async_pf.c). If the access fails, the vCPU's thread makes it.
    let in_kthread = fault.is_native() && fault.is_in_kthread();
    if in_kthread && fault.is_retried() {
        return Ok(Outcome::Fail);
    }
    // When a thread ends, the kernel accesses its robust futexes (exit_robust_list() in
    // kernel/futex/core.c). The thread must not wait: its own process may be the page handler.
    if is_ending() {
        return Ok(fail(&slot));
    }
    let touch = touch(&slot, &fault, page);
    let pages = slot.pages.read();
    let is_absent = || pages.state(page) == State::Absent;
    let entered = slot.vm.events.enter(slot.key(page), touch, is_absent);
    drop(pages);
    let waiter = match entered {
        Ok(Some(waiter)) => waiter,
        Ok(None) => return Err(fault),
        Err(EnterError::Closed) => return Ok(fail(&slot)),
        Err(EnterError::NoMemory) => return Ok(Outcome::OutOfMemory),
    };
    slot.stats.waits().add(1);
    trace::wait(slot.place.id, page, touch.flags);
    // In the kernel a signal that is not fatal does not end a fault (fault_signal_pending() in
    // include/linux/sched/signal.h): it would be retried at once, over and over.
    // get_user_pages() ends at a signal before it comes back (gup_signal_pending() in mm/gup.c).
    let ends = fault.is_user() || fault.is_native() && !fault.is_retried();
    let until = if in_kthread {
        Until::Second
    } else if fault.is_interruptible() && ends {
        Until::Signal
    } else {
        Until::Kill
    };
    // The mapping, and with it the memslot, may go while this thread sleeps: no more of it from here on.
    fault.release_lock();
    waiter.wait(until);
    Ok(Outcome::Retry)
}

/// The present bitmap: pages of ours that the mapping counts.
pub(crate) struct BitmapMapping;

impl Mapping for BitmapMapping {
    type Owner = Memslot;

    const FLAGS: vm_flags_t = flags::MIXEDMAP | flags::DONTEXPAND | flags::DONTDUMP;
    const HUGE: bool = false;

    fn fault(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
        let Some(chunk) = slot.bitmap_chunk(fault.pgoff()) else {
            return Outcome::Fail;
        };
        // The lock keeps a switch of paging from unmapping the bitmap before this page is mapped.
        let pages = slot.pages.read();
        match pages.bitmap_page(chunk) {
            Ok(Some(bits)) => fault.insert_page(bits.page()),
            Ok(None) => Outcome::Fail,
            Err(_) => Outcome::OutOfMemory,
        }
    }
}

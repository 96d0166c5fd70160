//! What is done with events and with pages that come, apart from threads and file descriptors.
//!
//! A page that somebody waits for is in `waiting` from before its presence is looked at until after it is
//! present. Who places a page sets its bit before looking into `waiting`. So either the one finds the page
//! present, or the other finds the waiter: no wake-up is lost.

use super::{
    report::{add, Report, Stats},
    slot::{Placed, Slot},
    slots::Slots,
    Error,
};
use crate::{
    coalesce,
    source::{Content, PageSource},
    Event, EventKind, Marked, PageRange, Result, State, Vm,
};
use rustix::io::Errno;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
    },
    time::{Duration, Instant},
};

/// The pause before a page that the source could not read is asked for again.
const RETRY: Duration = Duration::from_secs(1);

/// What changes the states of pages: the VM.
pub(super) trait Marks: Send + Sync {
    fn mark(&self, slot_id: u32, state: State, ranges: &[PageRange]) -> Result<Marked>;
}

impl Marks for Vm {
    fn mark(&self, slot_id: u32, state: State, ranges: &[PageRange]) -> Result<Marked> {
        Vm::mark(self, slot_id, state, ranges)
    }
}

/// Somebody waits for a page.
struct Waiting {
    since: Instant,
    /// In the kernel: it has to be woken by a mark.
    in_kernel: bool,
    /// In [`Engine::fetch`].
    threads: u32,
    /// The errno of the last attempt, and when the next one is due.
    failed: Option<(i32, Instant)>,
}

type Key = (u32, u64);

/// Pages of one memslot that came together.
struct Arrived {
    slot: Arc<Slot>,
    /// Placed by this call.
    placed: Vec<u64>,
    /// To be marked zero by this call.
    zero: Vec<u64>,
    /// There already, for whoever may still wait.
    found: Vec<u64>,
}

/// Pages that came together: they are marked together.
#[derive(Default)]
pub(super) struct Batch(BTreeMap<u32, Arrived>);

pub(super) struct Engine<M> {
    vm: M,
    faults: Box<dyn PageSource>,
    pub(super) slots: Slots,
    pub(super) stats: Stats,
    waiting: Mutex<HashMap<Key, Waiting>>,
    resolved: Condvar,
    stopped: AtomicBool,
}

impl<M: Marks> Engine<M> {
    pub(super) fn new(vm: M, faults: Box<dyn PageSource>) -> Result<Self, Error> {
        Ok(Self {
            vm,
            faults,
            slots: Slots::default(),
            stats: Stats::new().map_err(Error::Layout)?,
            waiting: Mutex::default(),
            resolved: Condvar::new(),
            stopped: AtomicBool::new(false),
        })
    }

    pub(super) fn vm(&self) -> &M {
        &self.vm
    }

    pub(super) fn faults(&self) -> &dyn PageSource {
        self.faults.as_ref()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Key, Waiting>> {
        // The map is whole between any two of its calls.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Let those in [`Engine::fetch`] go.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        drop(self.waiting());
        self.resolved.notify_all();
        self.faults.stop();
    }

    /// Ask for the pages of these events; mark those that are there already.
    pub(super) fn on_events(&self, events: &[Event]) -> Result<(), Error> {
        let mut batch = Batch::default();
        let mut ask = Vec::new();
        for event in events {
            // Of these, who touches the page knows; there is nobody to answer.
            let told = match event.kind {
                EventKind::Absent => None,
                EventKind::SourceError(errno) => Some(format!(
                    "cannot be read from its source in the kernel: {}",
                    std::io::Error::from_raw_os_error(errno)
                )),
                EventKind::Poisoned => Some(
                    "has a memory error: its bytes are lost ('kdp list' has all such pages)"
                        .to_owned(),
                ),
            };
            if let Some(what) = told {
                tracing::warn!("page {} of memslot {} {what}", event.page, event.slot_id);
                continue;
            }
            add(&self.stats.events, 1);
            if event.deliveries > 1 {
                add(&self.stats.redelivered, 1);
            }
            let Some(slot) = self
                .slots
                .get(event.slot_id)
                .filter(|slot| event.page < slot.pages())
            else {
                tracing::error!(
                    "page {} of memslot {}, which is not served",
                    event.page,
                    event.slot_id
                );
                continue;
            };
            let new = self.wait_for(event.slot_id, event.page, |waiting| {
                waiting.in_kernel = true
            });
            if !batch.look(&slot, event.page) {
                if new {
                    self.stats.touched(Some(event.access.who));
                    ask.push(slot.to_source(PageRange::page(event.page)).first);
                }
            } else {
                add(&self.stats.already_present, 1);
            }
        }
        self.resolve(batch)?;
        self.ask(&mut ask)
    }

    /// Note that somebody waits; whether nobody did before.
    fn wait_for(&self, slot_id: u32, page: u64, note: impl FnOnce(&mut Waiting)) -> bool {
        let mut waiting = self.waiting();
        let before = waiting.len();
        note(waiting.entry((slot_id, page)).or_insert_with(|| Waiting {
            since: Instant::now(),
            in_kernel: false,
            threads: 0,
            failed: None,
        }));
        waiting.len() > before
    }

    fn ask(&self, pages: &mut [u64]) -> Result<(), Error> {
        if pages.is_empty() {
            return Ok(());
        }
        self.faults.request(&coalesce(pages)).map_err(Error::Source)
    }

    /// Wait, in this thread, until a page is present.
    pub(super) fn fetch(&self, slot_id: u32, page: u64) -> Result<(), Error> {
        let slot = self.slots.get(slot_id).filter(|slot| page < slot.pages());
        let slot = slot.ok_or_else(|| {
            Error::Layout(format!("page {page} of memslot {slot_id} is not served"))
        })?;
        if slot.present().is_present(page) {
            return Ok(());
        }
        let key = (slot_id, page);
        let new = self.wait_for(slot_id, page, |waiting| waiting.threads += 1);
        let mut batch = Batch::default();
        if batch.look(&slot, page) {
            self.resolve(batch)?;
        } else if new {
            self.stats.touched(None);
            self.ask(&mut [slot.to_source(PageRange::page(page)).first])?;
        }
        let still = |waiting: &mut HashMap<Key, Waiting>| {
            !self.is_stopped()
                && waiting
                    .get(&key)
                    .is_some_and(|waiting| waiting.failed.is_none())
        };
        let mut waiting = self
            .resolved
            .wait_while(self.waiting(), still)
            .unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = waiting.get_mut(&key) else {
            return Ok(());
        };
        entry.threads = entry.threads.saturating_sub(1);
        let failed = entry.failed;
        if entry.threads == 0 && !entry.in_kernel {
            waiting.remove(&key);
        }
        Err(match failed {
            Some((errno, _)) => Error::Unreadable {
                slot_id,
                page,
                errno,
            },
            None => Error::Source(crate::source::Error::Stopped),
        })
    }

    /// Place pages that came from a source; [`Engine::resolve`] must follow.
    pub(super) fn on_pages(
        &self,
        range: PageRange,
        content: Content<'_>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        for slot in self.slots.of_source(range) {
            let pages = slot.pages_of(range);
            if let Content::Failed(errno) = content {
                self.on_failed(&slot, pages, errno);
                continue;
            }
            for page in pages.iter() {
                let content = match content {
                    Content::Data(data) => {
                        let at =
                            (slot.to_source(PageRange::page(page)).first - range.first) as usize;
                        Content::Data(&data[at * crate::PAGE_SIZE..(at + 1) * crate::PAGE_SIZE])
                    }
                    other => other,
                };
                let placed = match slot.place(page, content) {
                    Err(error) if is_gone(&error) => {
                        self.forget(slot.info().slot_id, &error);
                        break;
                    }
                    placed => placed?,
                };
                match placed {
                    Placed::Present => batch.of(&slot).placed.push(page),
                    Placed::MarkZero => batch.of(&slot).zero.push(page),
                    Placed::Lost => {
                        tracing::warn!(
                            "page {page} of memslot {} is poisoned, and cannot be filled",
                            slot.info().slot_id
                        );
                        continue;
                    }
                    // Whoever is placing it just now wakes those who wait.
                    Placed::TooLate => {
                        add(&self.stats.too_late, 1);
                        batch.look(&slot, page);
                        continue;
                    }
                }
                if content == Content::Zero {
                    add(&self.stats.zero, 1);
                }
            }
        }
        Ok(())
    }

    fn on_failed(&self, slot: &Slot, pages: PageRange, errno: i32) {
        let slot_id = slot.info().slot_id;
        add(&self.stats.failed, pages.count);
        tracing::error!(
            "the source cannot read pages {} to {} of memslot {slot_id}: {}; they stay absent and are asked for again",
            pages.first,
            pages.end(),
            Errno::from_raw_os_error(errno)
        );
        let mut waiting = self.waiting();
        for page in pages.iter() {
            if let Some(entry) = waiting.get_mut(&(slot_id, page)) {
                entry.failed = Some((errno, Instant::now() + RETRY));
            }
        }
        self.resolved.notify_all();
    }

    /// Wake those who wait for pages that are there now.
    pub(super) fn resolve(&self, batch: Batch) -> Result<(), Error> {
        for (slot_id, arrived) in batch.0 {
            let slot = &arrived.slot;
            // Marking a page zero wakes, too; one that was marked before may have been waited for since.
            let found_zero = arrived.found.iter().filter(|page| slot.is_zeroed(**page));
            let mut zero: Vec<u64> = arrived.zero.iter().chain(found_zero).copied().collect();
            self.mark(slot_id, State::Zero, &mut zero)?;

            let (mut since, mut wake) = (Vec::new(), Vec::new());
            let mut take = |waiting: &mut HashMap<Key, Waiting>, pages: &[u64], by_us: bool| {
                let before = since.len();
                for page in pages {
                    if let Some(entry) = waiting.remove(&(slot_id, *page)) {
                        since.push(entry.since);
                        // Who placed it has let the others go.
                        if !by_us && entry.in_kernel && slot.present().is_present(*page) {
                            wake.push(*page);
                        }
                    }
                }
                (since.len() - before) as u64
            };
            let on_demand = {
                let mut waiting = self.waiting();
                take(&mut waiting, &arrived.found, false);
                take(&mut waiting, &arrived.placed, true) + take(&mut waiting, &arrived.zero, false)
            };
            self.mark(slot_id, State::Present, &mut wake)?;
            self.resolved.notify_all();

            let fetched = (arrived.placed.len() + arrived.zero.len()) as u64;
            add(&self.stats.on_demand, on_demand);
            add(&self.stats.in_background, fetched - on_demand);
            self.stats.waited(since.into_iter());
        }
        Ok(())
    }

    fn mark(&self, slot_id: u32, state: State, pages: &mut [u64]) -> Result<(), Error> {
        const AT_ONCE: usize = crate::abi::KDP_MAX_RANGES as usize;

        for ranges in coalesce(pages).chunks(AT_ONCE) {
            match self.vm.mark(slot_id, state, ranges) {
                Ok(_) => {}
                Err(error) if is_gone(&error) => {
                    self.forget(slot_id, &error);
                    return Ok(());
                }
                Err(error) => return Err(Error::Module(error)),
            }
        }
        Ok(())
    }

    /// A memslot is not served any more.
    fn forget(&self, slot_id: u32, error: &crate::Error) {
        tracing::info!("memslot {slot_id} is gone, or its demand paging is off: {error}");
        self.slots.remove(slot_id);
        self.waiting().retain(|(waiting, _), _| *waiting != slot_id);
        self.resolved.notify_all();
    }

    /// Ask again for pages that could not be read and are due.
    pub(super) fn retry(&self) -> Result<(), Error> {
        let now = Instant::now();
        let mut due = Vec::new();
        for ((slot_id, page), entry) in self.waiting().iter_mut() {
            if entry.failed.take_if(|(_, at)| *at <= now).is_some() {
                due.push((*slot_id, *page));
            }
        }
        let to_source = |(slot_id, page)| {
            let slot = self.slots.get(slot_id)?;
            Some(slot.to_source(PageRange::page(page)).first)
        };
        let mut ask: Vec<u64> = due.into_iter().filter_map(to_source).collect();
        self.ask(&mut ask)
    }

    pub(super) fn report(&self) -> Report {
        let slots = self.slots.all();
        let counters = self.faults.counters();
        Report {
            pages: slots.iter().map(|slot| slot.pages()).sum(),
            pages_present: slots.iter().map(|slot| slot.present().count()).sum(),
            bytes_received: counters.bytes,
            reconnects: counters.reconnects,
            ..self.stats.report()
        }
    }
}

impl Batch {
    fn of(&mut self, slot: &Arc<Slot>) -> &mut Arrived {
        self.0
            .entry(slot.info().slot_id)
            .or_insert_with(|| Arrived {
                slot: Arc::clone(slot),
                placed: Vec::new(),
                zero: Vec::new(),
                found: Vec::new(),
            })
    }

    /// Take a page into the batch if it is there already; whether it is.
    fn look(&mut self, slot: &Arc<Slot>, page: u64) -> bool {
        let there = slot.present().is_present(page) || slot.is_zeroed(page);
        if there {
            self.of(slot).found.push(page);
        }
        there
    }
}

/// Whether an error says that there is nothing left to serve in a memslot.
fn is_gone(error: &crate::Error) -> bool {
    [Errno::NOENT, Errno::NXIO]
        .iter()
        .any(|errno| error.errno() == Some(errno.raw_os_error()))
}

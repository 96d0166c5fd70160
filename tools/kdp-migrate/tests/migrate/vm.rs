//! Two VMMs around the guest of threads, one for each side.

use crate::guest::{Memory, Vcpu, PAGE};
use kdp_migrate::{
    Content, DestinationMachine, Epoch, Error, Hint, Layout, MachineError, Misses, PageSet, Placed,
    Slot, SourceMachine,
};
use kvm_demand_paging::PageRange;
use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
        Arc, Condvar, Mutex,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Two memslots; the last page of the first is a device's, the last of all is lost.
pub const SLOTS: [u64; 2] = [300, 212];
pub const PAGES: u64 = SLOTS[0] + SLOTS[1];
pub const DEVICE: u64 = SLOTS[0] - 1;
pub const LOST: u64 = PAGES - 1;

pub fn layout(backing_shift: u32) -> Layout {
    let slot = |id, gfn, pages| Slot {
        id,
        gfn,
        pages,
        backing_shift,
    };
    Layout(vec![slot(0, 0, SLOTS[0]), slot(1, 0x10_0000, SLOTS[1])])
}

/// The vCPUs of a VM, and what went wrong with them.
pub struct Vcpus {
    vcpus: Vec<Mutex<Vcpu>>,
    paused: AtomicBool,
    over: AtomicBool,
    steps: AtomicU64,
    pub errors: Mutex<Vec<String>>,
}

impl Vcpus {
    fn new(vcpus: Vec<Vcpu>) -> Self {
        Self {
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
            paused: AtomicBool::new(false),
            over: AtomicBool::new(false),
            steps: AtomicU64::new(0),
            errors: Mutex::default(),
        }
    }

    fn run(self: &Arc<Self>, memory: Arc<dyn Memory + Send + Sync>) -> Vec<JoinHandle<()>> {
        (0..self.vcpus.len())
            .map(|index| {
                let (vcpus, memory) = (Arc::clone(self), Arc::clone(&memory));
                thread::spawn(move || vcpus.vcpu(index, memory.as_ref()))
            })
            .collect()
    }

    fn vcpu(&self, index: usize, memory: &dyn Memory) {
        while !self.over.load(SeqCst) {
            {
                let mut vcpu = self.vcpus[index].lock().unwrap();
                if !self.paused.load(SeqCst) {
                    if let Err(error) = vcpu.step(memory) {
                        self.errors.lock().unwrap().push(error);
                        return;
                    }
                    self.steps.fetch_add(1, SeqCst);
                }
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn pause(&self) {
        self.paused.store(true, SeqCst);
        for vcpu in &self.vcpus {
            drop(vcpu.lock().unwrap());
        }
    }

    pub fn steps(&self) -> u64 {
        self.steps.load(SeqCst)
    }

    pub fn errors(&self) -> Vec<String> {
        self.errors.lock().unwrap().clone()
    }
}

pub struct SourceVm {
    pages: Vec<Mutex<[u8; PAGE]>>,
    log: Mutex<(bool, PageSet)>,
    pub vcpus: Arc<Vcpus>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    // 0: none is shown.
    shown: AtomicU32,
    epochs: AtomicU32,
    hints: Mutex<VecDeque<(u32, u64)>>,
    pub stops: AtomicU32,
    pub resumes: AtomicU32,
    pub logging: AtomicBool,
    pub gives_hints: bool,
    pub device_writes: AtomicU32,
}

impl SourceVm {
    pub fn boot(seed: u64, gives_hints: bool) -> Arc<Self> {
        let vcpus = vec![
            Vcpu::new(0, DEVICE, seed),
            Vcpu::new(SLOTS[0], SLOTS[1] - 1, seed + 1),
        ];
        let vm = Arc::new(Self {
            pages: (0..PAGES).map(|_| Mutex::new([0; PAGE])).collect(),
            log: Mutex::new((false, PageSet::new(PAGES))),
            vcpus: Arc::new(Vcpus::new(vcpus)),
            threads: Mutex::default(),
            shown: AtomicU32::new(0),
            epochs: AtomicU32::new(1),
            hints: Mutex::default(),
            stops: AtomicU32::new(0),
            resumes: AtomicU32::new(0),
            logging: AtomicBool::new(false),
            gives_hints,
            device_writes: AtomicU32::new(0),
        });
        // It has something to lose before anybody copies it.
        for vcpu in &vm.vcpus.vcpus {
            let mut vcpu = vcpu.lock().unwrap();
            (0..500).for_each(|_| vcpu.step(vm.as_ref()).unwrap());
        }
        *vm.threads.lock().unwrap() = vm.vcpus.run(vm.clone());
        vm
    }

    pub fn is_running(&self) -> bool {
        let before = self.vcpus.steps();
        thread::sleep(Duration::from_millis(50));
        self.vcpus.steps() > before
    }

    /// Power off; what was wrong.
    pub fn off(&self) -> Vec<String> {
        self.vcpus.over.store(true, SeqCst);
        for thread in self.threads.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        let mut errors = self.vcpus.errors();
        for vcpu in &self.vcpus.vcpus {
            errors.extend(vcpu.lock().unwrap().verify_all(self).err());
        }
        errors
    }
}

impl Memory for SourceVm {
    fn read(&self, page: u64, bytes: &mut [u8; PAGE]) -> Result<(), String> {
        *bytes = *self.pages[page as usize].lock().unwrap();
        Ok(())
    }

    fn write(&self, page: u64, bytes: &[u8; PAGE]) -> Result<(), String> {
        *self.pages[page as usize].lock().unwrap() = *bytes;
        let mut log = self.log.lock().unwrap();
        if log.0 {
            log.1.insert(page);
        }
        Ok(())
    }

    fn epoch(&self) -> Option<u32> {
        Some(self.shown.load(SeqCst)).filter(|epoch| *epoch != 0)
    }

    fn hint(&self, epoch: u32, page: u64) {
        self.hints.lock().unwrap().push_back((epoch, page));
    }
}

/// A reference to a source, for an engine.
pub struct Leaving(pub Arc<SourceVm>);

impl SourceMachine for Leaving {
    fn layout(&self) -> Layout {
        layout(12)
    }

    fn read_page(&self, page: u64, bytes: &mut [u8; PAGE]) -> Result<Content, MachineError> {
        if page == LOST {
            return Ok(Content::Lost);
        }
        *bytes = *self.0.pages[page as usize].lock().unwrap();
        Ok(Content::Bytes)
    }

    fn start_log(&self) -> Result<(), MachineError> {
        *self.0.log.lock().unwrap() = (true, PageSet::new(PAGES));
        self.0.logging.store(true, SeqCst);
        Ok(())
    }

    fn stop_log(&self) {
        self.0.log.lock().unwrap().0 = false;
        self.0.logging.store(false, SeqCst);
    }

    fn harvest(&self, written: &mut PageSet) -> Result<(), MachineError> {
        let mut log = self.0.log.lock().unwrap();
        written.union(&log.1);
        log.1.clear();
        Ok(())
    }

    fn begin_hints(&self) -> Option<Epoch> {
        self.0.gives_hints.then(|| {
            let epoch = self.0.epochs.fetch_add(1, SeqCst) + 1;
            self.0.shown.store(epoch, SeqCst);
            Epoch(epoch)
        })
    }

    fn end_hints(&self) {
        self.0.shown.store(0, SeqCst);
    }

    fn drain_hints(&self, hint: &mut dyn FnMut(Hint)) {
        for (epoch, page) in self.0.hints.lock().unwrap().drain(..) {
            hint(Hint {
                epoch: Epoch(epoch),
                pages: PageRange::page(page),
            });
        }
    }

    fn stop(&self) -> Result<Vec<u8>, MachineError> {
        self.0.stops.fetch_add(1, SeqCst);
        self.0.vcpus.pause();
        // Saving a device's state writes guest memory.
        let writes = self.0.device_writes.fetch_add(1, SeqCst) + 1;
        self.0
            .write(DEVICE, &crate::guest::content(DEVICE, writes))?;
        let mut state = writes.to_le_bytes().to_vec();
        for vcpu in &self.0.vcpus.vcpus {
            vcpu.lock().unwrap().save(&mut state);
        }
        Ok(state)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.0.resumes.fetch_add(1, SeqCst);
        self.0.vcpus.paused.store(false, SeqCst);
        Ok(())
    }
}

/// A page of the destination.
enum State {
    Absent,
    Zero,
    Lost,
    Present(Box<[u8; PAGE]>),
}

pub struct DestinationVm {
    pages: Mutex<Vec<State>>,
    changed: Condvar,
    misses: Mutex<Misses>,
    /// vCPUs and others that wait for a page.
    pub waiting: AtomicU32,
    pub vcpus: Mutex<Option<Arc<Vcpus>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    pub starts: AtomicU32,
    pub failed: Mutex<Option<String>>,
    /// How often a page got bytes.
    pub placed: Mutex<Vec<u32>>,
    me: std::sync::Weak<Self>,
}

impl DestinationVm {
    pub fn new() -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            pages: Mutex::new((0..PAGES).map(|_| State::Absent).collect()),
            changed: Condvar::new(),
            misses: Mutex::new(Misses::new(PAGES)),
            waiting: AtomicU32::new(0),
            vcpus: Mutex::default(),
            threads: Mutex::default(),
            starts: AtomicU32::new(0),
            failed: Mutex::default(),
            placed: Mutex::new(vec![0; PAGES as usize]),
            me: me.clone(),
        })
    }

    /// Wait for a page, as a vCPU does, and use it.
    pub fn touch<T>(
        &self,
        page: u64,
        used: impl FnOnce(&mut [u8; PAGE]) -> T,
    ) -> Result<T, String> {
        let mut pages = self.pages.lock().unwrap();
        loop {
            let state = &mut pages[page as usize];
            if matches!(state, State::Zero) {
                *state = State::Present(Box::new([0; PAGE]));
            }
            match state {
                State::Present(bytes) => return Ok(used(bytes)),
                State::Lost => return Err(format!("page {page} is lost")),
                State::Zero | State::Absent => {}
            }
            if let Some(error) = &*self.failed.lock().unwrap() {
                return Err(format!("page {page} will never come: {error}"));
            }
            self.misses().miss(page);
            self.waiting.fetch_add(1, SeqCst);
            pages = self
                .changed
                .wait_timeout(pages, Duration::from_millis(100))
                .unwrap()
                .0;
            self.waiting.fetch_sub(1, SeqCst);
        }
    }

    pub fn misses(&self) -> Misses {
        self.misses.lock().unwrap().clone()
    }

    /// Who waits tells a new engine of it.
    pub fn renew_misses(&self) -> Misses {
        let misses = Misses::new(PAGES);
        *self.misses.lock().unwrap() = misses.clone();
        self.changed.notify_all();
        misses
    }

    /// The pages that are not absent.
    pub fn here(&self) -> PageSet {
        let mut here = PageSet::new(PAGES);
        for (page, state) in (0..).zip(self.pages.lock().unwrap().iter()) {
            if !matches!(state, State::Absent) {
                here.insert(page);
            }
        }
        here
    }

    pub fn is_lost(&self, page: u64) -> bool {
        matches!(self.pages.lock().unwrap()[page as usize], State::Lost)
    }

    /// Power off; what was wrong, and how much the guest did here.
    pub fn off(&self) -> (Vec<String>, u64) {
        let Some(vcpus) = self.vcpus.lock().unwrap().clone() else {
            return (vec!["the guest was never here".into()], 0);
        };
        vcpus.over.store(true, SeqCst);
        for thread in self.threads.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        let mut errors = vcpus.errors();
        for vcpu in &vcpus.vcpus {
            errors.extend(vcpu.lock().unwrap().verify_all(self).err());
        }
        (errors, vcpus.steps())
    }

    fn each(&self, pages: PageRange, change: impl Fn(&mut State)) {
        let mut all = self.pages.lock().unwrap();
        pages
            .iter()
            .for_each(|page| change(&mut all[page as usize]));
        self.changed.notify_all();
    }
}

impl Memory for DestinationVm {
    fn read(&self, page: u64, bytes: &mut [u8; PAGE]) -> Result<(), String> {
        self.touch(page, |there| *bytes = *there)
    }

    fn write(&self, page: u64, bytes: &[u8; PAGE]) -> Result<(), String> {
        self.touch(page, |there| *there = *bytes)
    }

    fn epoch(&self) -> Option<u32> {
        None
    }

    fn hint(&self, _: u32, _: u64) {}
}

/// A reference to a destination, for an engine.
pub struct Arriving(pub Arc<DestinationVm>);

impl DestinationMachine for Arriving {
    fn layout(&self) -> Layout {
        layout(21)
    }

    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        assert_eq!(bytes.len(), results.len() * PAGE);
        let mut pages = self.0.pages.lock().unwrap();
        let mut placed = self.0.placed.lock().unwrap();
        for ((page, bytes), result) in (first..).zip(bytes.chunks_exact(PAGE)).zip(results) {
            let state = &mut pages[page as usize];
            *result = match state {
                State::Absent => {
                    *state = State::Present(Box::new(bytes.try_into()?));
                    placed[page as usize] += 1;
                    Placed::Now
                }
                State::Lost => Placed::Lost,
                State::Zero | State::Present(_) => Placed::Present,
            };
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.each(pages, |state| {
            if matches!(state, State::Absent) {
                *state = State::Zero;
            }
        });
        Ok(())
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.each(pages, |state| {
            if matches!(state, State::Absent) {
                *state = State::Lost;
            }
        });
        Ok(())
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        assert_eq!(
            self.0.starts.load(SeqCst),
            0,
            "a page is dropped under the guest"
        );
        self.0.each(pages, |state| *state = State::Absent);
        Ok(())
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        let (writes, mut rest) = state.split_first_chunk::<4>().ok_or("no state")?;
        // Loading a device's state reads guest memory, which may not be here yet.
        let device = self.0.touch(DEVICE, |bytes| *bytes)?;
        if device != crate::guest::content(DEVICE, u32::from_le_bytes(*writes)) {
            return Err("the device's page is not what it wrote last".into());
        }
        let mut vcpus = Vec::new();
        while !rest.is_empty() {
            vcpus.push(Vcpu::restore(&mut rest));
        }
        *self.0.vcpus.lock().unwrap() = Some(Arc::new(Vcpus::new(vcpus)));
        Ok(())
    }

    fn start(&self) -> Result<(), MachineError> {
        self.0.starts.fetch_add(1, SeqCst);
        let memory = self.0.me.upgrade().ok_or("the VM is gone")?;
        let vcpus = self.0.vcpus.lock().unwrap().clone().ok_or("no state")?;
        *self.0.threads.lock().unwrap() = vcpus.run(memory);
        Ok(())
    }

    fn fail(&self, error: &Error) {
        *self.0.failed.lock().unwrap() = Some(error.to_string());
        self.0.changed.notify_all();
    }
}

//! A machine that runs Linux: its parts, and how they are started and stopped.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    kvm_clock_data, kvm_pit_config, kvm_userspace_memory_region, CpuId, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::acpi::MAX_CPUS;
use super::boot::{self, Kernel};
use super::cpuid;
use super::devices::{Balloon, Console, Devices};
use super::events;
use super::gate::Gate;
use super::layout::TSS;
use super::ram::Ram;
use super::state::{State, VcpuState, VmState};
use super::vcpu::{Shared, Vcpu};
use super::{End, PageRequester};
use crate::error::{kvm, Error, Result};
use crate::paging::ReaderThread;

/// KVM's number of the one memslot.
pub(super) const KVM_SLOT: u32 = 0;

/// What a machine needs beside its memory.
pub struct Setup {
    /// Where the guest's console goes.
    pub console: Console,
    /// Who fetches pages that are absent. Without one all pages must be present.
    pub requester: Option<Arc<dyn PageRequester>>,
}

/// A machine: vCPUs, interrupt controllers, timer, devices; and guest memory, which may outlive it.
///
/// It is made stopped. Dropping it stops it.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    gate: Arc<Gate>,
    // After the vCPUs' threads have ended, in `drop`: one of them may wait for what this fetches.
    events: Option<ReaderThread>,
    devices: Arc<Devices>,
    /// What the guest's clock shows while it is stopped.
    clock: kvm_clock_data,
    pub(super) logs_dirty_pages: bool,
    stopped: bool,
    /// MSRs that a vCPU's state is made of.
    msrs: Vec<u32>,
    // Before the memory that KVM has.
    pub(super) vm: Arc<VmFd>,
    pub(super) ram: Arc<Ram>,
}

/// A KVM VM without vCPUs.
struct Bare {
    host: Kvm,
    vm: Arc<VmFd>,
}

impl Bare {
    fn new(ram: &Ram) -> Result<Self> {
        let host = Kvm::new().map_err(kvm("open /dev/kvm (is a KVM module loaded?)"))?;
        let vm = host.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        if vm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(TSS).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        }
        vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(kvm("KVM_CREATE_PIT2"))?;
        set_memory(&vm, ram, 0)?;
        Ok(Self {
            host,
            vm: Arc::new(vm),
        })
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.host
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))
    }

    fn vcpu(&self, number: u8, cpuid: &CpuId) -> Result<VcpuFd> {
        let fd = self
            .vm
            .create_vcpu(number.into())
            .map_err(kvm("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        Ok(fd)
    }
}

pub(super) fn set_memory(vm: &VmFd, ram: &Ram, flags: u32) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: KVM_SLOT,
        flags,
        guest_phys_addr: 0,
        memory_size: ram.bytes(),
        userspace_addr: ram.guest().addr(),
    };
    // SAFETY: the machine keeps the memory for as long as KVM has the VM: `Machine` drops it last.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))
}

impl Machine {
    /// A machine with so many vCPUs that is about to boot. All of its memory must be present.
    pub fn boot(ram: Arc<Ram>, vcpus: u8, kernel: &Kernel, setup: Setup) -> Result<Self> {
        if !(1..=MAX_CPUS).contains(&vcpus) {
            return Err(Error::invalid(format!(
                "{vcpus} vCPUs: a Linux guest has 1 to {MAX_CPUS}"
            )));
        }
        let bare = Bare::new(&ram)?;
        let supported = bare.supported_cpuid()?;
        let fds = (0..vcpus)
            .map(|n| bare.vcpu(n, &cpuid::of_vcpu(&supported, n)?))
            .collect::<Result<Vec<_>>>()?;
        let entry = boot::load(&ram, kernel, vcpus)?;
        fds.iter().try_for_each(boot::reset)?;
        if let Some(first) = fds.first() {
            boot::enter(first, entry)?;
        }
        let devices = Devices::new(&bare.vm, ram.clone(), setup.console, None)?;
        let clock = kvm_clock_data::default();
        let mut machine = Self::assemble(ram, &bare, devices, clock)?;
        machine.serve_events(setup.requester.as_ref())?;
        machine.add_vcpus(fds, setup.requester)?;
        Ok(machine)
    }

    /// A machine that goes on from a saved state, with memory that is what it was then, or still to come.
    ///
    /// KVM looks at guest memory here, as it does for a guest's clock: absent pages are asked for already.
    pub fn restore(ram: Arc<Ram>, state: &[u8], setup: Setup) -> Result<Self> {
        let state = State::decode(state)?;
        if state.memory != ram.bytes() {
            return Err(Error::invalid(format!(
                "the state is of a machine with {} bytes of memory, and there are {}",
                state.memory,
                ram.bytes()
            )));
        }
        let bare = Bare::new(&ram)?;
        let devices = Devices::new(&bare.vm, ram.clone(), setup.console, Some(&state.devices))?;
        let mut machine = Self::assemble(ram, &bare, devices, state.vm.clock)?;
        machine.serve_events(setup.requester.as_ref())?;
        let mut fds = Vec::new();
        for (number, vcpu) in (0..).zip(&state.vcpus) {
            fds.push(bare.vcpu(number, &cpuid::from_entries(&vcpu.cpuid)?)?);
        }
        state.vm.restore(&machine.vm)?;
        for (fd, vcpu) in fds.iter().zip(&state.vcpus) {
            vcpu.restore(fd)?;
        }
        machine.add_vcpus(fds, setup.requester)?;
        Ok(machine)
    }

    /// The state of the machine, which must be stopped, but for its memory.
    pub fn save(&self) -> Result<Vec<u8>> {
        if !self.stopped {
            return Err(Error::invalid(
                "a machine that runs cannot be saved: stop it",
            ));
        }
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.with(|fd| VcpuState::save(fd, &self.msrs)));
        let state = State {
            memory: self.ram.bytes(),
            vcpus: vcpus.collect::<Result<_>>()?,
            devices: self.devices.save(),
            vm: VmState::save(&self.vm, self.clock)?,
        };
        state.encode()
    }

    /// All but vCPUs, and what asks for pages.
    fn assemble(
        ram: Arc<Ram>,
        bare: &Bare,
        devices: Devices,
        clock: kvm_clock_data,
    ) -> Result<Self> {
        let msrs = bare
            .host
            .get_msr_index_list()
            .map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            vcpus: Vec::new(),
            gate: Arc::new(Gate::new()),
            events: None,
            devices: Arc::new(devices),
            clock,
            logs_dirty_pages: false,
            stopped: true,
            msrs: msrs.as_slice().to_vec(),
            vm: bare.vm.clone(),
            ram,
        })
    }

    fn serve_events(&mut self, requester: Option<&Arc<dyn PageRequester>>) -> Result<()> {
        if let Some(requester) = requester {
            let (ram, gate) = (self.ram.clone(), self.gate.clone());
            self.events = Some(events::spawn(ram, requester.clone(), gate)?);
        }
        Ok(())
    }

    fn add_vcpus(
        &mut self,
        fds: Vec<VcpuFd>,
        requester: Option<Arc<dyn PageRequester>>,
    ) -> Result<()> {
        let shared = Shared {
            gate: self.gate.clone(),
            devices: self.devices.clone(),
            ram: self.ram.clone(),
            requester,
        };
        for (number, fd) in (0..).zip(fds) {
            self.vcpus.push(Vcpu::spawn(number, fd, &shared)?);
        }
        Ok(())
    }

    /// Its memory.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Its balloon.
    pub fn balloon(&self) -> Balloon {
        Balloon::new(self.devices.clone())
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Let the guest run, or go on. No time has passed for its clock since it was stopped.
    pub fn start(&mut self) -> Result<()> {
        self.vm
            .set_clock(&kvm_clock_data {
                clock: self.clock.clock,
                ..Default::default()
            })
            .map_err(kvm("KVM_SET_CLOCK"))?;
        for vcpu in &self.vcpus {
            // So that its watchdogs do not bark. It fails for one whose guest has no kvmclock yet.
            let _ = vcpu.with(VcpuFd::kvmclock_ctrl);
        }
        self.stopped = false;
        self.gate.open()
    }

    /// Stop the guest: when this returns no vCPU runs, no access is half done, and no device works.
    ///
    /// A vCPU that waits for a page is waited for.
    pub fn stop(&mut self) -> Result<()> {
        self.gate.shut(self.vcpus.len(), || {
            self.vcpus.iter().for_each(Vcpu::kick);
        });
        if !self.stopped {
            self.clock = self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
            self.stopped = true;
        }
        Ok(())
    }

    /// End the guest, which cannot go on, for this reason.
    pub fn fail(&self, why: Error) {
        self.gate.end(Err(why));
        self.vcpus.iter().for_each(Vcpu::kick);
    }

    /// How the guest has ended, if it has, in words.
    pub fn how_it_ended(&self) -> Option<String> {
        self.gate.how_it_ended()
    }

    /// Wait until the guest has ended, and how it did; nothing if it has not within that time. An end is told once.
    pub fn wait(&self, within: Option<Duration>) -> Result<Option<End>> {
        self.gate.ended(within)
    }

    /// To wait for its end without it.
    pub fn ending(&self) -> Ending {
        Ending(self.gate.clone())
    }
}

/// The end of a machine's guest.
pub struct Ending(Arc<Gate>);

impl Ending {
    /// As [`Machine::wait`].
    pub fn wait(&self, within: Option<Duration>) -> Result<Option<End>> {
        self.0.ended(within)
    }

    /// It is to end, with this error.
    pub(super) fn end(&self, why: Error) {
        self.0.end(Err(why));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.shut(self.vcpus.len(), || {
            self.vcpus.iter().for_each(Vcpu::kick);
        });
        self.gate.dismiss();
        self.vcpus.drain(..).for_each(Vcpu::join);
        if let Some(events) = self.events.take() {
            // One that panicked has ended, too.
            let _ = events.end();
        }
    }
}

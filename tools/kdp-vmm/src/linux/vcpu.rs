//! The thread of a vCPU.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_demand_paging::{FaultExit, Reason};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::io::Errno;

use super::devices::{Access, Devices};
use super::gate::Gate;
use super::ram::Ram;
use super::{End, PageRequester};
use crate::error::{Error, Result};
use crate::interrupt;

/// Neither is an error: a signal came; or a CPU that does not run yet was looked at.
const INTERRUPTED: [i32; 2] = [Errno::INTR.raw_os_error(), Errno::AGAIN.raw_os_error()];

/// What the threads of a machine share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) gate: Arc<Gate>,
    pub(super) devices: Arc<Devices>,
    pub(super) ram: Arc<Ram>,
    pub(super) requester: Option<Arc<dyn PageRequester>>,
}

/// A vCPU with its thread.
pub(super) struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    thread: JoinHandle<()>,
}

impl Vcpu {
    /// Start its thread, which waits at the gate.
    pub(super) fn spawn(number: u8, fd: VcpuFd, shared: &Shared) -> Result<Self> {
        let fd = Arc::new(Mutex::new(fd));
        let runner = Runner {
            number,
            fd: fd.clone(),
            shared: shared.clone(),
            discards: 0,
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu-{number}"))
            .spawn(move || runner.work())
            .map_err(|e| Error::os(format!("start a thread for vCPU {number}"), e))?;
        Ok(Self { fd, thread })
    }

    /// Make it look whether it is to stop.
    pub(super) fn kick(&self) {
        interrupt::send(&self.thread);
    }

    /// Work with a vCPU that is stopped; one that runs is waited for.
    pub(super) fn with<T>(&self, work: impl FnOnce(&VcpuFd) -> T) -> T {
        work(&self.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wait for the end of its thread.
    pub(super) fn join(self) {
        // A thread that panicked has ended, too.
        let _ = self.thread.join();
    }
}

/// What one KVM_RUN came to.
enum Step {
    Done,
    Interrupted,
    End(End),
}

struct Runner {
    number: u8,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Shared,
    /// How often pages had been given back when it looked last.
    discards: u64,
}

impl Runner {
    fn work(mut self) {
        if let Err(e) = self.prepare() {
            self.shared.gate.end(Err(e));
        }
        while self.shared.gate.pass() {
            let fd = self.fd.clone();
            let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
            match self.run(&mut fd) {
                Ok(None) => {}
                Ok(Some(end)) => self.shared.gate.end(Ok(end)),
                Err(e) => self.shared.gate.end(Err(e)),
            }
        }
    }

    fn prepare(&self) -> Result<()> {
        interrupt::prepare()?;
        if let (Some(_), Some(paged)) = (&self.shared.requester, self.shared.ram.paged()) {
            paged.vm().set_vcpu_exits(true)?;
        }
        Ok(())
    }

    /// Run until it is to stop, or the guest ends.
    fn run(&mut self, fd: &mut VcpuFd) -> Result<Option<End>> {
        while !self.shared.gate.stops() {
            if let Step::End(end) = self.step(fd)? {
                return Ok(Some(end));
            }
        }
        // An access that a device has answered is finished by the next KVM_RUN, which goes no further. One that is longer
        // than a device's register takes several.
        fd.set_kvm_immediate_exit(1);
        let end = loop {
            match self.step(fd)? {
                Step::Done => {}
                Step::Interrupted => break None,
                Step::End(end) => break Some(end),
            }
        };
        fd.set_kvm_immediate_exit(0);
        Ok(end)
    }

    fn step(&mut self, fd: &mut VcpuFd) -> Result<Step> {
        let devices = &self.shared.devices;
        let what = match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                devices.port_in(port, data);
                return Ok(Step::Done);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                return Ok(match devices.port_out(port, data)? {
                    Access::Done => Step::Done,
                    Access::Reset => Step::End(End::Reset),
                });
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                devices.mmio_read(gpa, data);
                return Ok(Step::Done);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                devices.mmio_write(gpa, data)?;
                return Ok(Step::Done);
            }
            // KVM_RUN's own return value is then -1 with errno EFAULT; kvm-ioctls has looked at exit_reason.
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                match FaultExit::decode(flags, gpa, size) {
                    Some(exit) => return self.fault(fd, exit).map(|()| Step::Done),
                    None => format!("a memory fault of KVM's own at {gpa:#x}, flags {flags:#x}"),
                }
            }
            Ok(VcpuExit::Intr) => return Ok(Step::Interrupted),
            Ok(VcpuExit::Shutdown) => return Ok(Step::End(End::TripleFault)),
            Ok(other) => format!("{other:?}"),
            Err(e) if INTERRUPTED.contains(&e.errno()) => return Ok(Step::Interrupted),
            Err(e) => format!(
                "KVM_RUN failed: {}",
                std::io::Error::from_raw_os_error(e.errno())
            ),
        };
        Err(self.stopped(fd, what))
    }

    fn stopped(&self, fd: &VcpuFd, what: String) -> Error {
        Error::Guest {
            vcpu: self.number.into(),
            rip: fd.get_regs().map_or(0, |regs| regs.rip),
            what,
        }
    }

    fn fault(&mut self, fd: &VcpuFd, exit: FaultExit) -> Result<()> {
        let page = exit.gfn();
        let why = match exit.reason {
            Reason::Retry => return Ok(()),
            Reason::Absent if self.shared.ram.discarded_since(&mut self.discards) => return Ok(()),
            Reason::Absent => match &self.shared.requester {
                None => "is absent, and nobody was named who has it".to_owned(),
                Some(requester) => match requester.fetch(page) {
                    Ok(()) => return Ok(()),
                    Err(e) => format!("will never come: {e}"),
                },
            },
            Reason::Poisoned => "is lost by a memory error".to_owned(),
            Reason::NoMemory => "has no memory: on hugetlb, no free huge page".to_owned(),
            Reason::SourceError => "cannot be read from its file".to_owned(),
            other => format!("cannot be had: {other:?}"),
        };
        let what = format!("page {page} (guest physical address {:#x}) {why}", exit.gpa);
        Err(self.stopped(fd, what))
    }
}

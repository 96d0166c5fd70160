//! A vCPU and the ways in which its guest stops.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_demand_paging::abi;
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::io::Errno;

use crate::error::{kvm, Error, Result};
use crate::guest::{PORT_ECHO, PORT_REPORT, PORT_START, PORT_TICK};
use crate::machine::{Inner, PML4};

const INTERRUPTED: [i32; 2] = [Errno::INTR.raw_os_error(), Errno::AGAIN.raw_os_error()];

/// KVM cannot map pages in advance: it is too old, or the CPU has no two-dimensional paging.
const CANNOT_PRE_FAULT: [i32; 2] = [Errno::OPNOTSUPP.raw_os_error(), Errno::NOTTY.raw_os_error()];

/// A vCPU of a [`Machine`](crate::Machine). The thread that first runs it must be the one that goes on.
pub struct Vcpu {
    fd: VcpuFd,
    number: u64,
    // KVM may be able to, as far as is known.
    pre_faults: bool,
    // Where its program is.
    code: u64,
    // Keeps the memory that KVM has.
    machine: Arc<Inner>,
}

pub(crate) struct Start {
    pub(crate) code: u64,
    pub(crate) params: u64,
    pub(crate) stack: u64,
}

/// A fault that KVM_RUN returned with KVM_EXIT_MEMORY_FAULT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// `KVM_MEMORY_EXIT_FLAG_*` and the device's `KDP_EXIT_*`.
    pub flags: u64,
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The program wrote to [`PORT_START`].
    Start,
    /// The program wrote this to [`PORT_TICK`].
    Tick(u32),
    /// The program wrote to [`PORT_REPORT`], with this in rax.
    Report(u64),
    /// The program wrote to [`PORT_ECHO`].
    Echo,
    /// The program ended.
    Halted,
    /// A page is not there; run again when it is.
    Fault(MemoryFault),
    /// A signal came, or [`Vcpu::set_immediate_exit`] was on.
    Interrupted,
}

impl MemoryFault {
    /// Nothing is to be done but to run again.
    fn is_retry(&self) -> bool {
        self.flags & abi::KDP_EXIT_RETRY != 0
    }
}

impl Vcpu {
    pub(crate) fn new(machine: Arc<Inner>, fd: VcpuFd, number: u64, start: &Start) -> Result<Self> {
        let mut sregs = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 16,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 8,
            type_: 11,
            db: 0,
            l: 1,
            ..data
        };
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = data;
        }
        // Long mode: paging with PAE, LME and LMA.
        sregs.cr0 = 0x8000_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620;
        sregs.efer = 0x500;
        fd.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        fd.set_regs(&kvm_regs {
            rip: start.code,
            rsp: start.stack,
            rdi: start.params,
            rsi: number,
            rflags: 2,
            ..Default::default()
        })
        .map_err(kvm("KVM_SET_REGS"))?;
        Ok(Self {
            fd,
            number,
            pre_faults: true,
            code: start.code,
            machine,
        })
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn code(&self) -> u64 {
        self.code
    }

    pub(crate) fn machine(&self) -> &Inner {
        &self.machine
    }

    /// kHz of the TSC that its guest reads.
    pub fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))
    }

    /// Let the next run stop at once.
    pub fn set_immediate_exit(&mut self, on: bool) {
        self.fd.set_kvm_immediate_exit(on.into());
    }

    /// Map pages that are present now, so that the guest finds them when it goes on. What does not work here is
    /// left to the guest's own faults.
    #[inline]
    pub fn pre_fault(&mut self, gpa: u64, bytes: u64) {
        if !self.pre_faults {
            return;
        }
        // SAFETY: the fd is open as long as `self.fd` is, which this call does not outlive.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        if let Err(e) = kvm_demand_paging::pre_fault(fd, gpa, bytes) {
            self.pre_faults = !e
                .errno()
                .is_some_and(|errno| CANNOT_PRE_FAULT.contains(&errno));
        }
    }

    /// The vCPU itself, for everything else that kvm-ioctls can do with it.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Run the guest until it stops.
    #[inline]
    pub fn run(&mut self) -> Result<Stop> {
        loop {
            match self.run_once()? {
                Stop::Fault(fault) if fault.is_retry() => {}
                stop => return Ok(stop),
            }
        }
    }

    fn run_once(&mut self) -> Result<Stop> {
        let what = match self.fd.run() {
            // KVM_RUN's own return value is then -1 with errno EFAULT; kvm-ioctls has looked at exit_reason.
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                return Ok(Stop::Fault(MemoryFault { gpa, size, flags }))
            }
            Ok(VcpuExit::IoOut(PORT_ECHO, _)) => return Ok(Stop::Echo),
            Ok(VcpuExit::IoOut(PORT_TICK, data)) => {
                let mut value = [0; 4];
                let len = data.len().min(4);
                value[..len].copy_from_slice(&data[..len]);
                return Ok(Stop::Tick(u32::from_le_bytes(value)));
            }
            Ok(VcpuExit::IoOut(PORT_REPORT, _)) => {
                let regs = self.fd.get_regs().map_err(kvm("KVM_GET_REGS"))?;
                return Ok(Stop::Report(regs.rax));
            }
            Ok(VcpuExit::IoOut(PORT_START, _)) => return Ok(Stop::Start),
            Ok(VcpuExit::Hlt) => return Ok(Stop::Halted),
            Ok(VcpuExit::Intr) => return Ok(Stop::Interrupted),
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                format!(
                    "it read {} bytes at {gpa:#x}, where no memory is",
                    data.len()
                )
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                format!(
                    "it wrote {} bytes at {gpa:#x}, where no memory is",
                    data.len()
                )
            }
            Ok(other) => format!("{other:?}"),
            Err(e) if INTERRUPTED.contains(&e.errno()) => return Ok(Stop::Interrupted),
            Err(e) => format!(
                "KVM_RUN failed: {}",
                std::io::Error::from_raw_os_error(e.errno())
            ),
        };
        Err(Error::Guest {
            vcpu: self.number,
            rip: self.fd.get_regs().map_or(0, |regs| regs.rip),
            what,
        })
    }
}

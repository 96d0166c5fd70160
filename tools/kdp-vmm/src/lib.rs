//! A small VMM that runs tiny guests in memory that is paged in on demand.
//!
//! It is a test bench and an example: a [`Machine`] runs [`GuestProgram`]s of a few instructions, and
//! [`session::run`] runs one over memory of a chosen [`Mode`], measures it and verifies what the guest saw.
//!
//! A test that needs more than that puts the parts together by itself. Here a guest of two vCPUs, both of which
//! read the same page, over memory of the test's own making:
//!
//! ```no_run
//! use std::sync::Arc;
//! use kdp_vmm::{Machine, Order, Stop, Touch, MIN_GPA};
//! use kvm_demand_paging::{Backing, Memfd, PageRange, Vm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = Vm::open()?;
//! let memfd = Memfd::create("guest", Backing::Shmem, 2 << 20)?;
//! let memslot = vm.create_memslot(0, &memfd).base_gfn(MIN_GPA >> 12).paging(true).create()?;
//! let alias = memfd.map_all()?;
//! let bitmap = memslot.bitmap()?;
//!
//! let machine = Machine::new(0)?;
//! machine.map(MIN_GPA, memslot.map()?)?;
//! let program = Touch::new(MIN_GPA, Order::sequential(1)).first(7).program();
//! let vcpus = [machine.vcpu(0, &program)?, machine.vcpu(1, &program)?];
//! std::thread::scope(|scope| {
//!     for mut vcpu in vcpus {
//!         let (vm, alias, bitmap) = (&vm, &alias, &bitmap);
//!         scope.spawn(move || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!             vm.set_vcpu_exits(true)?;
//!             loop {
//!                 match vcpu.run()? {
//!                     Stop::Fault(fault) => {
//!                         let page = (fault.gpa - MIN_GPA) >> 12;
//!                         alias.write(page, &[0x5a; 4096])?;
//!                         bitmap.set(page);
//!                     }
//!                     Stop::Report(sum) => println!("vCPU {} read {sum:#x}", vcpu.number()),
//!                     Stop::Halted => return Ok(()),
//!                     _ => {}
//!                 }
//!             }
//!         });
//!     }
//! });
//! # Ok(())
//! # }
//! ```
//!
//! [`guest_code!`] assembles other programs.

#![deny(missing_docs)]

mod error;
mod guest;
mod interrupt;
pub mod linux;
mod machine;
mod machine_check;
mod memory;
mod memory_error;
mod paging;
pub mod session;
mod source;
mod vcpu;
mod verify;

pub use error::{Error, Result};
pub use guest::{
    page_hash, Clock, ClockReport, GuestProgram, Order, Revisit, Touch, HASH_FACTOR, PORT_ECHO,
    PORT_REPORT, PORT_START, PORT_TICK,
};
pub use kvm_demand_paging::Backing;
pub use machine::{Machine, MAX_GPA, MAX_VCPUS, MIN_GPA, SCRATCH_GPA};
pub use machine_check::{MSR_ADDR, MSR_MCG_STATUS};
pub use memory::{backing_name, buffer, populate, BackingArg, GuestMemory, PAGE_SIZE};
pub use memory_error::{frame_of, MemoryErrors};
pub use paging::{pager, Counters, EndFlag, Handler, Memory, Mode, Pager, ReaderThread};
pub use source::{fill_page, Image, Remote, Source};
pub use vcpu::{MemoryFault, Stop, Vcpu};

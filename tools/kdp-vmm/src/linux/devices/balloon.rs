//! A virtio balloon (virtio 1.x, "Traditional Memory Balloon Device"): how a guest says which memory it does not use.
//!
//! - Inflating and deflating: the host names a size, the guest gives so many pages.
//! - Reporting: the guest tells of free pages by itself. They are given back before it is told that it may use them again.
//! - Hinting: asked, the guest tells of pages that are free at that moment, and goes on using them when it likes. What
//!   follows from a hint is for whoever asked ([`HintSink`]); nothing is given back.

use std::sync::Arc;

use kvm_demand_paging::{coalesce, PageRange};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryError};

use super::mmio::{Broken, VirtioDevice};
use crate::error::{Error, Result};
use crate::linux::ram::{DeviceMemory, Ram};
use crate::memory::PAGE_SIZE;

/// Feature bits.
pub(super) const F_STATS: u32 = 1;
pub(super) const F_FREE_PAGE_HINT: u32 = 3;
pub(super) const F_REPORTING: u32 = 5;

/// Queues. Their numbers are these if the driver takes all features: the specification counts those that it left out,
/// Linux does not.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
pub(super) const STATS: usize = 2;
const FREE_PAGES: usize = 3;
const REPORTING: usize = 4;

/// The least that every Linux takes. It reports only while it has as many free blocks as it can report at once.
const REPORTING_ENTRIES: u16 = 32;

/// Command ids that are none: stop telling; use again what you have told of.
const STOP: u32 = 0;
const DONE: u32 = 1;
const FIRST_COMMAND: u32 = 2;

/// Where `actual` is in the configuration: all that a driver may write.
const ACTUAL: usize = 4;

/// What hints go to.
///
/// It is called on a vCPU's thread, which goes on when it returns: the driver keeps a page that it has told of until then.
/// It must not call the [`Balloon`](super::Balloon).
pub trait HintSink: Send + Sync {
    /// The driver begins to answer this command.
    fn started(&self, command: u32);
    /// These pages were free when the driver said so, in answer to this command, which is still the last that was given.
    fn hinted(&self, command: u32, range: PageRange);
    /// The driver has told all that it will tell for this command, whether that is all there is or it was told to stop.
    fn finished(&self, command: u32);
}

/// What the guest said of its memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Memory that is free.
    pub free: u64,
    /// All that the guest has.
    pub total: u64,
    /// What could be had for new programs without swapping.
    pub available: u64,
}

/// What of it a driver must find again after its guest was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) target: u32,
    pub(super) actual: u32,
    pub(super) command: u32,
    pub(super) next_command: u32,
    /// The command that the driver is answering.
    pub(super) answering: Option<u32>,
    /// The buffer that the driver has left for statistics.
    pub(super) stats_buffer: Option<u16>,
}

/// The device.
pub(super) struct BalloonDevice {
    pub(super) saved: Saved,
    sink: Option<Arc<dyn HintSink>>,
    pub(super) statistics: Option<Statistics>,
}

impl BalloonDevice {
    pub(super) fn new() -> Self {
        Self {
            saved: Saved {
                next_command: FIRST_COMMAND,
                ..Saved::default()
            },
            sink: None,
            statistics: None,
        }
    }

    /// A new command: tell of free pages.
    pub(super) fn begin(&mut self, sink: Arc<dyn HintSink>) -> u32 {
        let command = self.saved.next_command;
        self.saved.next_command = command.checked_add(1).unwrap_or(FIRST_COMMAND);
        self.saved.command = command;
        self.sink = Some(sink);
        command
    }

    pub(super) fn stop(&mut self) {
        self.saved.command = STOP;
    }

    pub(super) fn done(&mut self) {
        self.saved.command = DONE;
    }

    fn inflate(queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        let memory = ram.memory();
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            for range in page_numbers(chain)? {
                if let Some(range) = ram.pages_in(range.first * PAGE_SIZE, range.count * PAGE_SIZE)
                {
                    ram.discard(range)?;
                }
            }
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// A page that comes back is zeros, as it is.
    fn deflate(queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        while let Some(chain) = queue.iter(ram.memory())?.next() {
            let head = chain.head_index();
            queue.add_used(ram.memory(), head, 0)?;
        }
        Ok(())
    }

    fn report(queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        let memory = ram.memory();
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            for part in chain.writable() {
                if let Some(range) = ram.pages_in(part.addr().0, part.len().into()) {
                    ram.discard(range)?;
                }
            }
            // Only now may the guest use them.
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    fn take_hints(&mut self, queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        let memory = ram.memory();
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            for part in chain {
                if part.is_write_only() {
                    if let Some(range) = ram.pages_in(part.addr().0, part.len().into()) {
                        self.hinted(range);
                    }
                } else {
                    let mut id = [0; 4];
                    memory
                        .read_slice(&mut id, part.addr())
                        .map_err(virtio_queue::Error::GuestMemoryError)?;
                    self.announced(u32::from_le_bytes(id));
                }
            }
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// The driver says what it is answering from now on.
    fn announced(&mut self, command: u32) {
        if let (Some(before), Some(sink)) = (self.saved.answering.take(), &self.sink) {
            sink.finished(before);
        }
        if command != STOP && command == self.saved.command {
            self.saved.answering = Some(command);
            if let Some(sink) = &self.sink {
                sink.started(command);
            }
        }
    }

    fn hinted(&self, range: PageRange) {
        // After a stop, or a newer command, it is a hint that nobody has asked for.
        let asked = self
            .saved
            .answering
            .filter(|&command| command == self.saved.command);
        if let (Some(command), Some(sink)) = (asked, &self.sink) {
            sink.hinted(command, range);
        }
    }

    fn take_statistics(&mut self, queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        while let Some(chain) = queue.iter(ram.memory())?.next() {
            self.saved.stats_buffer = Some(chain.head_index());
            self.statistics = Some(statistics(chain)?);
        }
        Ok(())
    }

    /// Give the driver its buffer back: it fills it anew. False: there is none.
    pub(super) fn ask_statistics(&mut self, queue: &mut Queue, ram: &Ram) -> Result<bool, Broken> {
        match self.saved.stats_buffer.take() {
            None => Ok(false),
            Some(head) => {
                queue.add_used(ram.memory(), head, 0)?;
                Ok(true)
            }
        }
    }
}

impl VirtioDevice for BalloonDevice {
    const ID: u32 = VIRTIO_ID_BALLOON;
    const QUEUES: &'static [u16] = &[256, 256, 256, 256, REPORTING_ENTRIES];
    const FEATURES: u64 = (1 << F_STATS) | (1 << F_FREE_PAGE_HINT) | (1 << F_REPORTING);

    fn config(&self) -> Vec<u8> {
        let Saved {
            target,
            actual,
            command,
            ..
        } = self.saved;
        [target, actual, command]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.saved.actual = u32::from_le_bytes(bytes);
        }
    }

    fn work(&mut self, index: usize, queue: &mut Queue, ram: &Ram) -> Result<(), Broken> {
        match index {
            INFLATE => Self::inflate(queue, ram),
            DEFLATE => Self::deflate(queue, ram),
            STATS => self.take_statistics(queue, ram),
            FREE_PAGES => self.take_hints(queue, ram),
            REPORTING => Self::report(queue, ram),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let (Some(before), Some(sink)) = (self.saved.answering.take(), &self.sink) {
            sink.finished(before);
        }
        self.saved.actual = 0;
        self.saved.stats_buffer = None;
        self.statistics = None;
    }
}

fn unreadable(error: GuestMemoryError) -> Broken {
    virtio_queue::Error::GuestMemoryError(error).into()
}

/// All that a driver has written into a chain.
fn contents(chain: DescriptorChain<&DeviceMemory>) -> Result<Vec<u8>, Broken> {
    /// More than any of these queues has use for.
    const MAX: usize = 1 << 16;
    let memory = chain.memory();
    let mut bytes = Vec::new();
    for part in chain.clone().readable() {
        let from = bytes.len();
        let to = from + part.len() as usize;
        if to > MAX {
            return Err(virtio_queue::Error::InvalidChain.into());
        }
        bytes.resize(to, 0);
        memory
            .read_slice(&mut bytes[from..], part.addr())
            .map_err(unreadable)?;
    }
    Ok(bytes)
}

/// The number that these bytes are, the lowest one first.
fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The pages whose numbers, of 32 bits each, are in a chain.
fn page_numbers(chain: DescriptorChain<&DeviceMemory>) -> Result<Vec<PageRange>, Broken> {
    let bytes = contents(chain)?;
    let mut pages: Vec<u64> = bytes.chunks_exact(4).map(number).collect();
    Ok(coalesce(&mut pages))
}

/// Pairs of a tag of 16 bits and a value of 64.
fn statistics(chain: DescriptorChain<&DeviceMemory>) -> Result<Statistics, Broken> {
    const FREE: u64 = 4;
    const TOTAL: u64 = 5;
    const AVAILABLE: u64 = 6;
    let mut statistics = Statistics::default();
    for pair in contents(chain)?.chunks_exact(10) {
        let (tag, value) = pair.split_at(2);
        match number(tag) {
            FREE => statistics.free = number(value),
            TOTAL => statistics.total = number(value),
            AVAILABLE => statistics.available = number(value),
            _ => {}
        }
    }
    Ok(statistics)
}

/// A feature that a driver lacks.
pub(super) fn lacks(what: &str) -> Error {
    Error::invalid(format!(
        "the guest's balloon driver is not at work, or cannot {what}"
    ))
}

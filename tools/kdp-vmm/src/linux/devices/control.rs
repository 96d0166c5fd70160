//! The balloon as its machine's owner has it.

use std::sync::Arc;

use super::balloon::{self, HintSink, Statistics, F_FREE_PAGE_HINT, F_STATS, STATS};
use super::{locked, Devices};
use crate::error::{Error, Result};

/// The balloon of a machine. Clones are the same balloon; they may be used from any thread, whether the guest runs or not.
#[derive(Clone)]
pub struct Balloon {
    devices: Arc<Devices>,
}

impl Balloon {
    pub(in crate::linux) fn new(devices: Arc<Devices>) -> Self {
        Self { devices }
    }

    /// Whether the guest's driver is at work, and can tell of free pages when it is asked.
    pub fn can_hint(&self) -> bool {
        locked(&self.devices.balloon).has(F_FREE_PAGE_HINT)
    }

    /// Ask the guest which pages are free. What it says goes to `sink`, until [`stop_hints`](Self::stop_hints) or the next
    /// call of this; the number of the command is returned.
    ///
    /// The guest holds pages that it has told of until [`end_hints`](Self::end_hints), but takes them back when it is
    /// short of memory, and does not say so: a hint is about a moment.
    pub fn begin_hints(&self, sink: Arc<dyn HintSink>) -> Result<u32> {
        let mut balloon = locked(&self.devices.balloon);
        if !balloon.has(F_FREE_PAGE_HINT) {
            return Err(balloon::lacks("tell which pages are free"));
        }
        let command = balloon.device.begin(sink);
        balloon.config_changed()?;
        Ok(command)
    }

    /// No hint comes to the sink once this has returned. That the driver has finished still does.
    pub fn stop_hints(&self) -> Result<()> {
        let mut balloon = locked(&self.devices.balloon);
        balloon.device.stop();
        balloon.config_changed()
    }

    /// The guest may use again what it has told of: no hint is acted on any more.
    pub fn end_hints(&self) -> Result<()> {
        let mut balloon = locked(&self.devices.balloon);
        balloon.device.done();
        balloon.config_changed()
    }

    /// How many pages the balloon is to have. The guest gives, or takes back, what is missing, in its own time.
    pub fn set_target(&self, pages: u64) -> Result<()> {
        let mut balloon = locked(&self.devices.balloon);
        if pages >= self.devices.ram.pages() {
            return Err(Error::invalid(format!(
                "a balloon of {pages} pages in a guest of {}",
                self.devices.ram.pages()
            )));
        }
        balloon.device.saved.target = pages as u32;
        balloon.config_changed()
    }

    /// How many pages it has, as the guest says.
    pub fn pages(&self) -> u64 {
        locked(&self.devices.balloon).device.saved.actual.into()
    }

    /// What the guest said of its memory last, and ask it to say so again. Nothing if it has not yet.
    pub fn statistics(&self) -> Result<Option<Statistics>> {
        let mut balloon = locked(&self.devices.balloon);
        let known = balloon.device.statistics;
        let ram = &self.devices.ram;
        if balloon.has(F_STATS) {
            let balloon = &mut *balloon;
            let asked = balloon
                .device
                .ask_statistics(&mut balloon.queues[STATS], ram);
            match asked {
                Ok(false) => {}
                asked => balloon.answer(STATS, asked.map(drop), ram)?,
            }
        }
        Ok(known)
    }
}

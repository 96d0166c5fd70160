//! Serves those who touch an absent page and cannot exit: KVM itself, and the devices.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_demand_paging::EventKind;
use rustix::io::Errno;

use super::gate::Gate;
use super::ram::Ram;
use super::{End, PageRequester};
use crate::error::{Error, Result};
use crate::paging::Stopper;

/// The thread that does it, until this is dropped.
pub(super) struct EventThread {
    stopper: Arc<Stopper>,
    thread: Option<JoinHandle<()>>,
}

impl EventThread {
    /// Start it. If a page never comes it ends the guest, at `gate`: whoever waits for that page would wait for ever.
    pub(super) fn spawn(
        ram: Arc<Ram>,
        requester: Arc<dyn PageRequester>,
        gate: Arc<Gate>,
    ) -> Result<Self> {
        ram.vm().set_nonblocking(true)?;
        let stopper = Arc::new(Stopper::new()?);
        let stop = stopper.clone();
        let thread = thread::Builder::new()
            .name("kdp-events".to_owned())
            .spawn(move || {
                if let Err(e) = serve(&ram, requester.as_ref(), &stop) {
                    gate.end(Err::<End, Error>(e));
                }
            })
            .map_err(|e| Error::os("start a thread for events", e))?;
        Ok(Self {
            stopper,
            thread: Some(thread),
        })
    }
}

impl Drop for EventThread {
    fn drop(&mut self) {
        // An eventfd at 0 can be written to.
        let _ = self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(ram: &Ram, requester: &dyn PageRequester, stop: &Stopper) -> Result<()> {
    let mut events = Vec::new();
    let reader = stop.reader(ram.vm())?;
    while reader.wait()? {
        events.clear();
        match ram.vm().read_events(&mut events, usize::MAX) {
            Err(e) if e.errno() == Some(Errno::AGAIN.raw_os_error()) => {}
            other => {
                other?;
            }
        }
        for event in events
            .iter()
            .filter(|event| event.kind == EventKind::Absent)
        {
            requester.fetch(event.page).map_err(|e| {
                Error::invalid(format!(
                    "page {}, which {:?} waits for, will never come: {e}",
                    event.page, event.tid
                ))
            })?;
            ram.wake(event.page)?;
        }
    }
    Ok(())
}

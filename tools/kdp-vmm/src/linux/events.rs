//! Serves those who touch an absent page and cannot exit: KVM itself, and the devices.

use std::sync::Arc;

use kvm_demand_paging::EventKind;

use super::gate::Gate;
use super::ram::Ram;
use super::{End, PageRequester};
use crate::error::{Error, Result};
use crate::paging::{read_events, EndFlag, ReaderThread};

/// Start the thread that does it. If a page never comes it ends the guest, at `gate`: whoever waits for that page
/// would wait for ever.
pub(super) fn spawn(
    ram: Arc<Ram>,
    requester: Arc<dyn PageRequester>,
    gate: Arc<Gate>,
) -> Result<ReaderThread> {
    ReaderThread::spawn(move |end| {
        if let Err(e) = serve(&ram, requester.as_ref(), end) {
            gate.end(Err::<End, Error>(e));
        }
    })
}

fn serve(ram: &Ram, requester: &dyn PageRequester, end: &EndFlag) -> Result<()> {
    let Some(paged) = ram.paged() else {
        return Ok(());
    };
    let mut events = Vec::new();
    while !end.is_set() {
        read_events(paged.vm(), &mut events)?;
        events.retain(|event| event.kind == EventKind::Absent);
        events.iter().for_each(|event| requester.ask(event.page));
        for event in &events {
            requester.fetch(event.page).map_err(|e| {
                Error::invalid(format!(
                    "page {}, which {:?} waits for, will never come: {e}",
                    event.page, event.tid
                ))
            })?;
            paged.wake(event.page)?;
        }
    }
    Ok(())
}

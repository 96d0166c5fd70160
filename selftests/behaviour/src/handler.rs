// SPDX-License-Identifier: GPL-2.0

//! A thread that serves the events of a VM.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use kvm_demand_paging::Event;

use crate::check::Result;
use crate::slot::Slot;
use crate::task::Task;

/// The thread. It ends when it is stopped.
pub struct Handler {
    stop: Arc<AtomicBool>,
    events: Arc<AtomicU64>,
    task: Task<()>,
}

impl Handler {
    /// Reads events and calls `serve` for each.
    pub fn start(
        slot: &Arc<Slot>,
        mut serve: impl FnMut(&Event) -> Result + Send + 'static,
    ) -> Result<Self> {
        // Between its look and its read an event may go: to another reader, or with its waiter. Then it would wait for
        // one that may never come.
        slot.vm.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let events = Arc::new(AtomicU64::new(0));
        let (slot, stopped, counted) = (slot.clone(), stop.clone(), events.clone());
        let work = move || -> Result {
            let mut events = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                if !slot.vm.wait_event(Some(Duration::from_millis(10)))? {
                    continue;
                }
                events.clear();
                match slot.vm.read_events(&mut events, 16) {
                    Err(e) if e.errno() == Some(libc::EAGAIN) => {}
                    other => {
                        other?;
                    }
                }
                for event in &events {
                    counted.fetch_add(1, Ordering::Relaxed);
                    serve(event)?;
                }
            }
            Ok(())
        };
        let task = Task::work(work)?;
        Ok(Self { stop, events, task })
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub fn stop(self) -> Result {
        self.stop.store(true, Ordering::Release);
        self.task.join("the handler")
    }
}

//! When vCPUs may run: where their threads wait, and how those that stop them know that they have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::End;
use crate::error::{Error, Result};

/// How long to wait for a thread before it is signalled once more. A signal that comes just before KVM_RUN stops nothing.
const AGAIN: Duration = Duration::from_millis(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stopped,
    Running,
    /// The threads are to end.
    Gone,
}

struct Inside {
    wanted: Wanted,
    /// Threads that wait here.
    waiting: usize,
    /// How the guest has ended, in words.
    ended: Option<String>,
    /// The same, until somebody has asked.
    end: Option<Result<End>>,
}

/// Where the threads of a machine's vCPUs wait.
pub(super) struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
    /// The same as `wanted != Running`, for who looks between two KVM_RUNs.
    stop: AtomicBool,
}

impl Gate {
    /// Shut.
    pub(super) fn new() -> Self {
        Self {
            inside: Mutex::new(Inside {
                wanted: Wanted::Stopped,
                waiting: 0,
                ended: None,
                end: None,
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, inside: &mut Inside, wanted: Wanted) {
        inside.wanted = wanted;
        self.stop
            .store(wanted != Wanted::Running, Ordering::Release);
        self.changed.notify_all();
    }

    /// A vCPU's thread comes here before it runs, and whenever it was stopped. False: it is to end.
    pub(super) fn pass(&self) -> bool {
        let mut inside = self.lock();
        inside.waiting += 1;
        self.changed.notify_all();
        while inside.wanted == Wanted::Stopped {
            inside = self.wait(inside);
        }
        inside.waiting -= 1;
        inside.wanted == Wanted::Running
    }

    fn wait<'a>(&self, inside: MutexGuard<'a, Inside>) -> MutexGuard<'a, Inside> {
        self.changed
            .wait(inside)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a vCPU is to come here.
    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Let the vCPUs run.
    pub(super) fn open(&self) -> Result<()> {
        let mut inside = self.lock();
        if let Some(how) = &inside.ended {
            return Err(Error::invalid(format!(
                "the guest has ended and cannot go on: {how}"
            )));
        }
        self.want(&mut inside, Wanted::Running);
        Ok(())
    }

    /// Stop them; `kick` sends all of them a signal. Returns when so many threads wait here.
    pub(super) fn shut(&self, threads: usize, kick: impl Fn()) {
        let mut inside = self.lock();
        self.want(&mut inside, Wanted::Stopped);
        while inside.waiting < threads {
            kick();
            inside = self
                .changed
                .wait_timeout(inside, AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Let the threads end.
    pub(super) fn dismiss(&self) {
        self.want(&mut self.lock(), Wanted::Gone);
    }

    /// The guest has ended like this; what came first counts.
    pub(super) fn end(&self, end: Result<End>) {
        let mut inside = self.lock();
        if inside.ended.is_none() {
            inside.ended = Some(match &end {
                Ok(end) => end.to_string(),
                Err(error) => error.to_string(),
            });
            inside.end = Some(end);
        }
        if inside.wanted == Wanted::Running {
            self.want(&mut inside, Wanted::Stopped);
        }
        self.changed.notify_all();
    }

    /// How the guest has ended, if it has.
    pub(super) fn how_it_ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }

    /// How the guest has ended, told once; nothing if it has not within that time.
    pub(super) fn ended(&self, within: Option<Duration>) -> Result<Option<End>> {
        let deadline = within.map(|within| Instant::now() + within);
        let mut inside = self.lock();
        while inside.ended.is_none() {
            inside =
                match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                    None => self.wait(inside),
                    Some(Duration::ZERO) => return Ok(None),
                    Some(left) => {
                        self.changed
                            .wait_timeout(inside, left)
                            .unwrap_or_else(PoisonError::into_inner)
                            .0
                    }
                };
        }
        let told = Err(Error::invalid(
            "the guest has ended, and how was told before",
        ));
        inside.end.take().unwrap_or(told).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_come_and_go() {
        let gate = Gate::new();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while gate.pass() {
                        while !gate.stops() {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            for _ in 0..20 {
                gate.open().unwrap();
                gate.shut(2, || {});
            }
            gate.dismiss();
        });
    }

    #[test]
    fn the_first_end_counts_and_is_told_once() {
        let gate = Gate::new();
        assert!(matches!(gate.ended(Some(Duration::ZERO)), Ok(None)));
        gate.open().unwrap();
        gate.end(Ok(End::Reset));
        gate.end(Ok(End::TripleFault));
        assert!(gate.stops());
        assert_eq!(gate.how_it_ended(), Some(End::Reset.to_string()));
        assert!(matches!(gate.ended(None), Ok(Some(End::Reset))));
        assert!(gate.ended(None).is_err());
        assert!(gate.open().is_err());
    }
}

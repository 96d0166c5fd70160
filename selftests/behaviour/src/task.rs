// SPDX-License-Identifier: GPL-2.0

//! Threads that may be found waiting.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::check::Result;
use crate::{stuck, sys};

/// How long to wait for what must happen. Much longer than it takes, on a slow machine with others on it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long to watch that something does not happen.
pub const MOMENT: Duration = Duration::from_millis(60);

/// A thread, and what it comes to.
///
/// Dropping it leaves the thread alone: it may be one that waits for ever, and ends with the process.
pub struct Task<T> {
    /// The number of the thread.
    pub tid: i32,
    receiver: Receiver<T>,
    value: Option<T>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts it.
    pub fn spawn(f: impl FnOnce() -> T + Send + 'static) -> Result<Self> {
        let (tell_tid, tid) = mpsc::channel();
        let (sender, receiver) = mpsc::channel();
        thread::Builder::new().spawn(move || {
            // Nobody listens any more if the test has ended for another reason.
            let _ = tell_tid.send(sys::gettid());
            let _ = sender.send(f());
        })?;
        Ok(Self {
            tid: tid.recv()?,
            receiver,
            value: None,
        })
    }

    /// Starts one that must not fail: if it does, it says why and ends the process, because others may wait
    /// for it.
    pub fn work(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<Self> {
        Self::spawn(move || {
            f().unwrap_or_else(|e| {
                eprintln!("{e}");
                std::process::exit(1)
            })
        })
    }

    /// Whether it has ended, at the latest after that time.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool> {
        if self.value.is_none() {
            match self.receiver.recv_timeout(time) {
                Ok(value) => self.value = Some(value),
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => fail!("thread {} died", self.tid),
            }
        }
        Ok(true)
    }

    /// Fails if it does not go on waiting for a moment.
    pub fn still_waits(&mut self, what: &str) -> Result {
        ensure!(!self.ends_within(MOMENT)?, "{what} did not wait");
        Ok(())
    }

    /// What it came to. While the test uses CPU time, the test's own limit is the only one.
    pub fn join(mut self, what: &str) -> Result<T> {
        let mut progress = stuck::Progress::of_this_group();
        while !self.ends_within(PATIENCE)? && progress.is_made(PATIENCE) {}
        ensure!(
            self.ends_within(Duration::ZERO)?,
            "{what} (thread {}) has not ended, and the test has used no CPU time for {PATIENCE:?}; \
             the threads:\n{}\n{}",
            self.tid,
            stuck::threads_of(std::process::id()),
            stuck::trace_of_kvm()
        );
        self.join_long(what)
    }

    /// What it came to, of one that works for a long time: the test's own limit is its.
    pub fn join_long(self, what: &str) -> Result<T> {
        match self.value.map_or_else(|| self.receiver.recv(), Ok) {
            Ok(value) => Ok(value),
            Err(_) => fail!("{what} left nothing"),
        }
    }
}

/// Looks again and again until it is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_so()? {
        ensure!(
            std::time::Instant::now() < deadline,
            "not within {PATIENCE:?}: {what}"
        );
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

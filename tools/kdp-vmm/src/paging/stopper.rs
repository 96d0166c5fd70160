//! Ends a handler thread that waits for events.

use std::os::fd::{AsFd, OwnedFd};

use kvm_demand_paging::{Ready, Waiter};
use rustix::event::{eventfd, EventfdFlags};

use crate::error::{Error, Result};

/// Tells a handler thread to end.
#[derive(Debug)]
pub struct Stopper {
    event: OwnedFd,
}

impl Stopper {
    /// One that has not told anybody to stop.
    pub fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| Error::os("eventfd", e))?;
        Ok(Self { event })
    }

    /// Let the thread end.
    pub fn stop(&self) -> Result<()> {
        rustix::io::write(&self.event, &1_u64.to_ne_bytes())
            .map_err(|e| Error::os("write to an eventfd", e))?;
        Ok(())
    }

    /// Has a handler thread wait for `fd`, and for the time to stop.
    pub fn reader(&self, fd: &impl AsFd) -> Result<Reader> {
        Ok(Reader(Waiter::new(fd, &self.event)?))
    }
}

/// What a handler thread waits by.
#[derive(Debug)]
pub struct Reader(Waiter);

impl Reader {
    /// Wait until there is something to read, or until the time to stop: then false.
    pub fn wait(&self) -> Result<bool> {
        loop {
            match self.0.wait(None)? {
                Ready::Events => return Ok(true),
                Ready::Stop => return Ok(false),
                Ready::Nothing => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_ends_a_wait_and_what_is_to_be_read_comes_first() {
        let stopper = Stopper::new().unwrap();
        let (read, write) = std::os::unix::net::UnixStream::pair().unwrap();
        let reader = stopper.reader(&read).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait().unwrap());
            stopper.stop().unwrap();
            assert!(!waiting.join().unwrap());
        });
        rustix::io::write(&write, b"x").unwrap();
        assert!(reader.wait().unwrap());
    }
}

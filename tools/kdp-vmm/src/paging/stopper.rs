//! Ends a handler thread that waits for events.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

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

    /// Wait until there is something to read from `fd`, or until the time to stop: then false.
    pub fn wait_for(&self, fd: &impl AsFd) -> Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(fd, PollFlags::IN),
                PollFd::new(&self.event, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => return Ok(!fds[0].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::os("poll", e)),
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
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| stopper.wait_for(&read).unwrap());
            stopper.stop().unwrap();
            assert!(!waiting.join().unwrap());
        });
        rustix::io::write(&write, b"x").unwrap();
        assert!(stopper.wait_for(&read).unwrap());
    }
}

//! Waiting for events, or for the word to stop.

use std::time::Duration;

use rustix::{
    buffer::spare_capacity,
    event::{
        epoll::{self, CreateFlags, EventData, EventFlags},
        Timespec,
    },
    fd::{AsFd, OwnedFd},
    io::Errno,
};

use crate::{Error, Result};

/// A span of time, as system calls take it.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// Waits until a file can be read, or another one, which says stop.
///
/// For whoever reads a VM's events (or a userfaultfd's) in a loop. It is an epoll instance: the kernel is told once what
/// is waited for, where poll(2) tells it each time, and pays for that at every event.
///
/// Leave both files open as long as it is used.
#[derive(Debug)]
pub struct Waiter {
    epoll: OwnedFd,
}

/// What a wait came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The file can be read, whatever the other says.
    Events,
    /// The other can be read.
    Stop,
    /// Neither: time is over, or a signal came.
    Nothing,
}

const EVENTS: u64 = 0;
const STOP: u64 = 1;

impl Waiter {
    /// Waits for `events` and `stop`.
    ///
    /// # Errors
    ///
    /// EPERM: a file that cannot be waited for. EMFILE, ENFILE, ENOSPC, ENOMEM: a limit of the process, the system, the
    /// user (fs.epoll.max_user_watches), memory.
    pub fn new(events: impl AsFd, stop: impl AsFd) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|errno| Error::sys("epoll_create1", "a waiter", errno))?;
        for (fd, data) in [(events.as_fd(), EVENTS), (stop.as_fd(), STOP)] {
            epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN)
                .map_err(|errno| Error::sys("epoll_ctl", "a file to wait for", errno))?;
        }
        Ok(Self { epoll })
    }

    /// Wait for at most `timeout`, or without an end.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Ready> {
        let timeout = timeout.map(timespec);
        let mut ready = Vec::with_capacity(2);
        match epoll::wait(&self.epoll, spare_capacity(&mut ready), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::sys("epoll_wait", "events", errno)),
        }
        let has = |data| ready.iter().any(|event| event.data.u64() == data);
        Ok(if has(EVENTS) {
            Ready::Events
        } else if has(STOP) {
            Ready::Stop
        } else {
            Ready::Nothing
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const SOON: Option<Duration> = Some(Duration::from_millis(1));

    #[test]
    fn events_come_before_stop_and_each_until_it_is_read() {
        let (mut served, mut events) = UnixStream::pair().unwrap();
        let (stop, mut stopper) = UnixStream::pair().unwrap();
        let waiter = Waiter::new(&served, &stop).unwrap();
        assert_eq!(waiter.wait(SOON).unwrap(), Ready::Nothing);
        stopper.write_all(b"x").unwrap();
        assert_eq!(waiter.wait(None).unwrap(), Ready::Stop);
        events.write_all(b"xy").unwrap();
        for _ in 0..2 {
            assert_eq!(waiter.wait(None).unwrap(), Ready::Events);
            served.read_exact(&mut [0]).unwrap();
        }
        assert_eq!(waiter.wait(None).unwrap(), Ready::Stop);
    }

    #[test]
    fn a_file_that_cannot_be_waited_for_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = Waiter::new(&file, &file).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::PERM.raw_os_error()));
    }
}

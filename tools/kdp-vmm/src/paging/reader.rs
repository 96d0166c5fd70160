//! A thread that reads events until it is told to end.
//!
//! It sleeps in read(2) itself, not in epoll: that is a system call less for each event, and with the device a reader
//! that looks out for the next event before it sleeps (Documentation/internals.md, "Looking out before sleeping").

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_demand_paging::{Event, Vm};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::interrupt;

/// How long to wait for the thread before it is signalled once more. A signal that comes just before read(2) ends no
/// read.
const AGAIN: Duration = Duration::from_millis(2);

/// Says when to end.
#[derive(Debug, Default)]
pub struct EndFlag(AtomicBool);

impl EndFlag {
    /// Whether it is time to. A read that fails with EINTR is the occasion to ask.
    pub fn is_set(&self) -> bool {
        // It carries nothing but itself: relaxed.
        self.0.load(Ordering::Relaxed)
    }
}

/// The thread. It stays if this is dropped, as one that waits for a page which never comes would otherwise keep who
/// drops it.
#[derive(Debug)]
pub struct ReaderThread {
    end: Arc<EndFlag>,
    thread: JoinHandle<()>,
}

impl ReaderThread {
    /// Start it.
    pub fn spawn(work: impl FnOnce(&EndFlag) + Send + 'static) -> Result<Self> {
        interrupt::prepare()?;
        let end = Arc::new(EndFlag::default());
        let told = end.clone();
        let thread = thread::Builder::new()
            .name("kdp-events".to_owned())
            .spawn(move || work(&told))
            .map_err(|e| Error::os("start a thread for events", e))?;
        Ok(Self { end, thread })
    }

    /// End it, and wait for that. An error: it had panicked.
    pub fn end(self) -> Result<()> {
        self.end.0.store(true, Ordering::Relaxed);
        while !self.thread.is_finished() {
            interrupt::send(&self.thread);
            thread::sleep(AGAIN);
        }
        self.thread
            .join()
            .map_err(|_| Error::invalid("the thread that reads events panicked"))
    }
}

/// Wait for the VM's next events. There are none if a signal came first.
pub fn read_events(vm: &Vm, events: &mut Vec<Event>) -> Result<()> {
    events.clear();
    match vm.read_events(events, usize::MAX) {
        Err(e) if e.errno() == Some(Errno::INTR.raw_os_error()) => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    #[test]
    fn a_thread_that_sleeps_in_a_read_is_ended() {
        let (mut read, mut write) = UnixStream::pair().unwrap();
        let (sender, receiver) = mpsc::channel();
        let thread = ReaderThread::spawn(move |end| {
            while !end.is_set() {
                let mut byte = [0];
                // Not read_exact(), which goes on after EINTR.
                match read.read(&mut byte) {
                    Ok(count) => sender.send((count, byte[0])).unwrap(),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Interrupted),
                }
            }
        })
        .unwrap();
        write.write_all(b"x").unwrap();
        assert_eq!(receiver.recv().unwrap(), (1, b'x'));
        thread.end().unwrap();
        assert!(receiver.recv().is_err());
    }
}

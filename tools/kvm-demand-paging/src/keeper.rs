//! Keeping a VM's fd over the death of its handler.
//!
//! When the last fd of a VM is closed, nobody can resolve its faults any more, and who waits for a page gets
//! SIGBUS. A [`Keeper`] is a process that does nothing but hold VMs' fds, and hands each to whoever asks for
//! it by name: the handler's successor. It never reads events, so what the dead handler had read and not
//! resolved is delivered again to the next one.
//!
//! A VM is let go when its owner says so ([`release`]), or, unless it was given to [`Stay`](Until::Released),
//! when the process that gave it has ended: then there is no guest left.

use crate::{
    pass::{ask, receive, send, Message, Op},
    Error, Result, Vm,
};
use rustix::{
    event::{poll, PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    net::sockopt::socket_peercred,
    process::{pidfd_open, PidfdFlags},
};
use std::{
    collections::BTreeMap,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// A client that says nothing for this long is hung up on.
const PATIENCE: Duration = Duration::from_secs(10);

const STAY: u32 = 1;

/// How long a VM is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until [`release`], or until the process that gave it has ended. For a VMM that gives its VM.
    GiverEnds,
    /// Until [`release`]. For a handler that made the VM and gives it.
    Released,
}

#[derive(Default)]
struct Kept {
    vms: BTreeMap<String, (u64, OwnedFd)>,
    given: u64,
}

/// Holds VMs' fds and hands them out.
#[derive(Clone, Default)]
pub struct Keeper {
    kept: Arc<Mutex<Kept>>,
}

impl Keeper {
    /// A keeper of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many VMs it keeps.
    pub fn count(&self) -> usize {
        self.kept().vms.len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // The map is whole between any two of its calls.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serve whoever connects, for ever. Fails if the listener does.
    pub fn serve(&self, listener: &UnixListener) -> Result<()> {
        for stream in listener.incoming() {
            let stream =
                stream.map_err(|error| Error::sys("accept", "the keeper's socket", error))?;
            let keeper = self.clone();
            let client = move || {
                if let Err(error) = keeper.client(&stream) {
                    tracing::warn!("a client of the keeper: {error}");
                }
            };
            // What is kept is worth more than this client: it is hung up on.
            if let Err(error) = thread::Builder::new().spawn(client) {
                tracing::warn!("no thread for a client of the keeper: {error}");
            }
        }
        Ok(())
    }

    fn client(&self, stream: &UnixStream) -> Result<()> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(|error| Error::sys("setsockopt", "SO_RCVTIMEO", error))?;
        while let Some((message, fd)) = receive(stream)? {
            let (answer, fd) = self
                .answer(stream, &message, fd)
                .unwrap_or_else(|error| (Message::refused(error.to_string()), None));
            send(stream, &answer, fd.as_ref().map(AsFd::as_fd))?;
        }
        Ok(())
    }

    fn answer(
        &self,
        stream: &UnixStream,
        message: &Message,
        fd: Option<OwnedFd>,
    ) -> Result<(Message, Option<OwnedFd>)> {
        let name = message.name.as_str();
        let none = || Error::Peer(format!("no VM of the name '{name}' is kept here"));
        match message.op {
            Op::Give => {
                let fd =
                    fd.ok_or_else(|| Error::Peer("no file descriptor came with it".to_owned()))?;
                let generation = self.keep(name, fd)?;
                if message.flags & STAY == 0 {
                    self.watch_giver(stream, name, generation)?;
                }
                tracing::info!("keeping the VM '{name}'");
                Ok((Message::new(Op::Done, name), None))
            }
            Op::Take => {
                let kept = self.kept();
                let (_, fd) = kept.vms.get(name).ok_or_else(none)?;
                let fd = fd
                    .try_clone()
                    .map_err(|error| Error::sys("dup", "a VM's fd", error))?;
                Ok((Message::new(Op::Done, name), Some(fd)))
            }
            Op::Drop => {
                self.kept().vms.remove(name).ok_or_else(none)?;
                tracing::info!("let go of the VM '{name}'");
                Ok((Message::new(Op::Done, name), None))
            }
            Op::List => {
                let kept = self.kept();
                let name = kept
                    .vms
                    .keys()
                    .nth(message.flags as usize)
                    .map_or("", String::as_str);
                Ok((Message::new(Op::Done, name), None))
            }
            Op::Done | Op::Refused => Err(Error::Peer(format!("{:?} is no request", message.op))),
        }
    }

    fn keep(&self, name: &str, fd: OwnedFd) -> Result<u64> {
        let mut kept = self.kept();
        if name.is_empty() {
            return Err(Error::Peer("a VM must have a name to be kept".to_owned()));
        }
        if kept.vms.contains_key(name) {
            return Err(Error::Peer(format!(
                "a VM of the name '{name}' is kept here already: choose another name, or let go of that one"
            )));
        }
        kept.given += 1;
        let generation = kept.given;
        kept.vms.insert(name.to_owned(), (generation, fd));
        Ok(generation)
    }

    fn watch_giver(&self, stream: &UnixStream, name: &str, generation: u64) -> Result<()> {
        let watched = socket_peercred(stream)
            .and_then(|cred| pidfd_open(cred.pid, PidfdFlags::empty()))
            .map_err(|errno| {
                Error::sys(
                    "pidfd_open",
                    format!("the process that gives '{name}'"),
                    errno,
                )
            })
            .and_then(|giver| self.watch(giver, name, generation));
        if watched.is_err() {
            self.let_go(name, generation);
        }
        watched
    }

    /// Let go of the VM when the process has ended, unless another VM has its name by then.
    fn watch(&self, giver: OwnedFd, name: &str, generation: u64) -> Result<()> {
        let (keeper, owned) = (self.clone(), name.to_owned());
        let watch = move || {
            wait_for_end(giver.as_fd());
            if keeper.let_go(&owned, generation) {
                tracing::info!("the process that gave the VM '{owned}' has ended: let go of it");
            }
        };
        thread::Builder::new()
            .spawn(watch)
            .map(drop)
            .map_err(|error| Error::sys("clone", format!("a thread for the VM '{name}'"), error))
    }

    /// Let go of a VM if it is still the one that was given then; whether it was.
    fn let_go(&self, name: &str, generation: u64) -> bool {
        let mut kept = self.kept();
        let is_same = kept
            .vms
            .get(name)
            .is_some_and(|(kept, _)| *kept == generation);
        if is_same {
            kept.vms.remove(name);
        }
        is_same
    }
}

fn wait_for_end(pidfd: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    while poll(&mut fds, None).is_err() {}
}

fn connect(keeper: &Path) -> Result<UnixStream> {
    UnixStream::connect(keeper).map_err(|error| {
        Error::sys("connect", format!("keeper at {}", keeper.display()), error)
            .advise(Some("start one with 'kdp keep'".to_owned()))
    })
}

/// Give a VM to the keeper at this socket. The caller's own fd stays open.
pub fn give(keeper: &Path, name: &str, vm: &Vm, until: Until) -> Result<()> {
    give_fd(keeper, name, vm.as_fd(), until)
}

fn give_fd(keeper: &Path, name: &str, fd: BorrowedFd<'_>, until: Until) -> Result<()> {
    let mut message = Message::new(Op::Give, name);
    if until == Until::Released {
        message.flags |= STAY;
    }
    ask(&connect(keeper)?, &message, Some(fd)).map(drop)
}

/// Take the VM of this name from the keeper at this socket, which keeps it all the same.
pub fn take(keeper: &Path, name: &str) -> Result<Vm> {
    Vm::from_fd(take_fd(keeper, name)?)
}

fn take_fd(keeper: &Path, name: &str) -> Result<OwnedFd> {
    let (_, fd) = ask(&connect(keeper)?, &Message::new(Op::Take, name), None)?;
    fd.ok_or_else(|| {
        Error::Peer(format!(
            "the keeper handed over no file descriptor for '{name}'"
        ))
    })
}

/// Make the keeper at this socket let go of the VM of this name.
pub fn release(keeper: &Path, name: &str) -> Result<()> {
    ask(&connect(keeper)?, &Message::new(Op::Drop, name), None).map(drop)
}

/// The names of the VMs that the keeper at this socket keeps.
pub fn list(keeper: &Path) -> Result<Vec<String>> {
    let stream = connect(keeper)?;
    let mut names = Vec::new();
    loop {
        let mut message = Message::new(Op::List, "");
        message.flags = names.len() as u32;
        match ask(&stream, &message, None)?.0.name {
            name if name.is_empty() => return Ok(names),
            name => names.push(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        process::{Command, Stdio},
        time::Instant,
    };

    fn keeper() -> (tempfile::TempDir, std::path::PathBuf, Keeper) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keeper");
        let listener = UnixListener::bind(&path).unwrap();
        let keeper = Keeper::new();
        let server = keeper.clone();
        thread::spawn(move || server.serve(&listener));
        (dir, path, keeper)
    }

    #[test]
    fn what_was_given_is_taken_again_until_released() {
        let (_dir, path, keeper) = keeper();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a VM").unwrap();
        give_fd(&path, "one", file.as_fd(), Until::Released).unwrap();
        drop(file);
        for _ in 0..2 {
            let mut again = File::from(take_fd(&path, "one").unwrap());
            again.rewind().unwrap();
            let mut text = String::new();
            again.read_to_string(&mut text).unwrap();
            assert_eq!(text, "a VM");
        }
        assert_eq!(list(&path).unwrap(), ["one"]);
        release(&path, "one").unwrap();
        assert_eq!(keeper.count(), 0);
        assert!(take_fd(&path, "one")
            .unwrap_err()
            .to_string()
            .contains("'one'"));
    }

    #[test]
    fn names_are_unique_and_not_empty() {
        let (_dir, path, keeper) = keeper();
        let file = tempfile::tempfile().unwrap();
        give_fd(&path, "vm", file.as_fd(), Until::GiverEnds).unwrap();
        assert!(give_fd(&path, "vm", file.as_fd(), Until::Released).is_err());
        assert!(give_fd(&path, "", file.as_fd(), Until::Released).is_err());
        assert!(give_fd(&path, &"x".repeat(33), file.as_fd(), Until::Released).is_err());
        assert_eq!(keeper.count(), 1);
    }

    #[test]
    fn a_vm_goes_when_its_giver_ends_and_its_successor_stays() {
        let keeper = Keeper::new();
        let mut givers = Vec::new();
        for name in ["old", "other"] {
            let giver = Command::new("sleep")
                .arg("60")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let pidfd = pidfd_open(
                rustix::process::Pid::from_child(&giver),
                PidfdFlags::empty(),
            )
            .unwrap();
            let generation = keeper
                .keep(name, tempfile::tempfile().unwrap().into())
                .unwrap();
            keeper.watch(pidfd, name, generation).unwrap();
            givers.push(giver);
        }
        // Another VM takes a name over: the first giver's end is none of its business.
        keeper.kept().vms.remove("other");
        keeper
            .keep("other", tempfile::tempfile().unwrap().into())
            .unwrap();
        for giver in &mut givers {
            giver.kill().unwrap();
            giver.wait().unwrap();
        }
        let start = Instant::now();
        while keeper.kept().vms.contains_key("old") {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "it is still kept"
            );
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(50));
        assert!(keeper.kept().vms.contains_key("other"));
    }
}

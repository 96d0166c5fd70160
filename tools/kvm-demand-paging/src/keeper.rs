//! Keeping a VM's fd over the death of its handler.
//!
//! When the last fd of a VM is closed, nobody can resolve its faults any more, and who waits for a page gets
//! SIGBUS. A [`Keeper`] is a process that does nothing but hold VMs' fds, and hands each to whoever asks for
//! it by name: the handler's successor. It never reads events, so what the dead handler had read and not
//! resolved is delivered again to the next one.
//!
//! A VM is let go when its owner says so ([`release`]), or, unless it was given to [`Stay`](Until::Released),
//! when the process that gave it has ended: then there is no guest left.
//!
//! # Restarting the keeper
//!
//! A keeper [with an fd store](Keeper::with_store) stores a duplicate of each VM's fd, and the
//! pidfd of each process that a VM is kept for. The next keeper [takes them back](Keeper::restore),
//! so the VMs survive the end of the keeper. systemd stores each open file once. So a VM that was
//! given under two names has only one of them after a restart.

mod fd_store;

pub use fd_store::FdStore;

use crate::{
    pass::{ask, receive, send, Message, Op},
    Error, Result, Vm,
};
use fd_store::{Entry, Kind};
use rustix::{
    event::{poll, PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    net::sockopt::socket_peercred,
    process::{pidfd_open, PidfdFlags},
};
use std::{
    collections::BTreeMap,
    ops::Bound,
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

struct KeptVm {
    /// Distinguishes this VM from an earlier or later one of the same name.
    generation: u64,
    fd: OwnedFd,
    until: Until,
}

#[derive(Default)]
struct Kept {
    vms: BTreeMap<String, KeptVm>,
    given: u64,
}

impl Kept {
    fn insert(&mut self, name: &str, fd: OwnedFd, until: Until) -> u64 {
        self.given += 1;
        let vm = KeptVm {
            generation: self.given,
            fd,
            until,
        };
        self.vms.insert(name.to_owned(), vm);
        self.given
    }
}

/// Holds VMs' fds and hands them out.
#[derive(Clone, Default)]
pub struct Keeper {
    kept: Arc<Mutex<Kept>>,
    store: Option<Arc<dyn FdStore>>,
}

impl Keeper {
    /// A keeper of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty keeper that stores the descriptors of its VMs in `store`.
    pub fn with_store(store: Arc<dyn FdStore>) -> Self {
        Self {
            store: Some(store),
            ..Self::default()
        }
    }

    /// Take back the descriptors that an earlier keeper stored, with their names in the store. Call
    /// this before [`serve`](Self::serve).
    pub fn restore(&self, stored: impl IntoIterator<Item = (String, OwnedFd)>) -> Result<()> {
        let (mut vms, mut givers) = (Vec::new(), BTreeMap::new());
        for (name, fd) in stored {
            match Entry::parse(&name) {
                Some(Entry {
                    kind: Kind::Vm(until),
                    vm,
                }) => vms.push((vm, fd, until)),
                Some(Entry {
                    kind: Kind::Giver,
                    vm,
                }) => drop(givers.insert(vm, fd)),
                None => tracing::warn!(
                    "the descriptor '{name}' in the fd store is not a keeper's: it is closed"
                ),
            }
        }
        for (name, fd, until) in vms {
            let generation = self.kept().insert(&name, fd, until);
            match (until, givers.remove(&name)) {
                (Until::GiverEnds, Some(giver)) => self.watch(giver, &name, generation)?,
                (Until::GiverEnds, None) => tracing::warn!(
                    "the fd store lacks the pidfd of the process that gave the VM '{name}': \
                     the VM is kept until 'kdp kept --release {name}'"
                ),
                (Until::Released, _) => (),
            }
            tracing::info!("keeping the VM '{name}' again");
        }
        // The earlier keeper ended after it stored the pidfd and before it stored the VM, or after
        // it removed the VM and before it removed the pidfd.
        for name in givers.keys() {
            self.remove_fd(Kind::Giver, name);
        }
        Ok(())
    }

    fn store_fd(&self, kind: Kind, name: &str, fd: BorrowedFd<'_>) {
        if let Some(store) = &self.store {
            if let Err(error) = store.store(&Entry::new(kind, name).to_string(), fd) {
                tracing::warn!("the VM '{name}' will not survive a restart of the keeper: {error}");
            }
        }
    }

    fn remove_fd(&self, kind: Kind, name: &str) {
        if let Some(store) = &self.store {
            if let Err(error) = store.remove(&Entry::new(kind, name).to_string()) {
                tracing::warn!("the fd store still has a descriptor of the VM '{name}': {error}");
            }
        }
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
                let giver = match message.flags & STAY {
                    0 => Some(giver(stream, name)?),
                    _ => None,
                };
                let generation = self.keep(name, fd, giver.as_ref().map(AsFd::as_fd))?;
                if let Some(giver) = giver {
                    if let Err(error) = self.watch(giver, name, generation) {
                        self.let_go(name, generation);
                        return Err(error);
                    }
                }
                tracing::info!("keeping the VM '{name}'");
                Ok((Message::new(Op::Done, name), None))
            }
            Op::Take => {
                let kept = self.kept();
                let vm = kept.vms.get(name).ok_or_else(none)?;
                let fd = vm
                    .fd
                    .try_clone()
                    .map_err(|error| Error::sys("dup", "a VM's fd", error))?;
                Ok((Message::new(Op::Done, name), Some(fd)))
            }
            Op::Drop => {
                self.remove(&mut self.kept(), name).ok_or_else(none)?;
                tracing::info!("let go of the VM '{name}'");
                Ok((Message::new(Op::Done, name), None))
            }
            Op::Next => {
                // Continue after a name, not at a position: a release during the list then skips
                // no VM.
                let kept = self.kept();
                let mut after = kept
                    .vms
                    .range::<str, _>((Bound::Excluded(name), Bound::Unbounded));
                let next = after.next().map_or("", |(name, _)| name.as_str());
                Ok((Message::new(Op::Done, next), None))
            }
            Op::Done | Op::Refused => Err(Error::Peer(format!("{:?} is no request", message.op))),
        }
    }

    /// Keep a VM, until `giver` ends if there is one. The VM is in the store when this returns.
    fn keep(&self, name: &str, fd: OwnedFd, giver: Option<BorrowedFd<'_>>) -> Result<u64> {
        // The lock is held until the store has the descriptors. So a release removes them after
        // that.
        let mut kept = self.kept();
        if name.is_empty() {
            return Err(Error::Peer("a VM must have a name to be kept".to_owned()));
        }
        if kept.vms.contains_key(name) {
            return Err(Error::Peer(format!(
                "a VM of the name '{name}' is kept here already: choose another name, or let go of that one"
            )));
        }
        let until = match giver {
            Some(giver) => {
                // Store the pidfd before the VM: a VM without it would be kept too long.
                self.store_fd(Kind::Giver, name, giver);
                Until::GiverEnds
            }
            None => Until::Released,
        };
        self.store_fd(Kind::Vm(until), name, fd.as_fd());
        Ok(kept.insert(name, fd, until))
    }

    fn remove(&self, kept: &mut Kept, name: &str) -> Option<KeptVm> {
        let vm = kept.vms.remove(name)?;
        self.remove_fd(Kind::Vm(vm.until), name);
        if vm.until == Until::GiverEnds {
            self.remove_fd(Kind::Giver, name);
        }
        Some(vm)
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
            .is_some_and(|vm| vm.generation == generation);
        if is_same {
            self.remove(&mut kept, name);
        }
        is_same
    }
}

/// The pidfd of the process at the other end.
fn giver(stream: &UnixStream, name: &str) -> Result<OwnedFd> {
    socket_peercred(stream)
        .and_then(|cred| pidfd_open(cred.pid, PidfdFlags::empty()))
        .map_err(|errno| {
            let what = format!("the process that gives '{name}'");
            Error::sys("pidfd_open", what, errno)
        })
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
    let mut names: Vec<String> = Vec::new();
    loop {
        let last = names.last().map_or("", String::as_str);
        match ask(&stream, &Message::new(Op::Next, last), None)?.0.name {
            name if name.is_empty() => return Ok(names),
            name if name.as_str() > last => names.push(name),
            name => {
                return Err(Error::Peer(format!(
                    "the keeper listed '{name}' after '{last}': the names must ascend"
                )))
            }
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
    fn a_release_while_names_are_listed_hides_no_other_vm() {
        let (_dir, path, keeper) = keeper();
        let file = tempfile::tempfile().unwrap();
        for name in ["a", "b", "c"] {
            give_fd(&path, name, file.as_fd(), Until::Released).unwrap();
        }
        let stream = connect(&path).unwrap();
        let after = |name| {
            ask(&stream, &Message::new(Op::Next, name), None)
                .unwrap()
                .0
                .name
        };
        assert_eq!(after(""), "a");
        keeper.remove(&mut keeper.kept(), "a").unwrap();
        assert_eq!(after("a"), "b");
        assert_eq!(after("b"), "c");
        assert_eq!(after("c"), "");
    }

    #[test]
    fn a_keeper_that_repeats_a_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keeper");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            while receive(&stream).unwrap().is_some() {
                send(&stream, &Message::new(Op::Done, "a"), None).unwrap();
            }
        });
        let error = list(&path).unwrap_err().to_string();
        assert!(error.contains("'a' after 'a'"), "{error}");
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

    /// A store in memory, in place of systemd's.
    #[derive(Default)]
    struct TestStore(Mutex<BTreeMap<String, OwnedFd>>);

    impl TestStore {
        fn names(&self) -> Vec<String> {
            self.0.lock().unwrap().keys().cloned().collect()
        }

        /// The descriptors that systemd passes to the next keeper. They stay in the store.
        fn pass(&self) -> Vec<(String, OwnedFd)> {
            let pass = |(name, fd): (&String, &OwnedFd)| (name.clone(), fd.try_clone().unwrap());
            self.0.lock().unwrap().iter().map(pass).collect()
        }
    }

    impl FdStore for TestStore {
        fn store(&self, name: &str, fd: BorrowedFd<'_>) -> std::io::Result<()> {
            let fd = fd.try_clone_to_owned()?;
            let before = self.0.lock().unwrap().insert(name.to_owned(), fd);
            assert!(before.is_none(), "{name} is stored twice");
            Ok(())
        }

        fn remove(&self, name: &str) -> std::io::Result<()> {
            self.0.lock().unwrap().remove(name);
            Ok(())
        }
    }

    fn process() -> (std::process::Child, OwnedFd) {
        let child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        (child, pidfd_open(pid, PidfdFlags::empty()).unwrap())
    }

    fn some_fd() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_store_has_what_is_kept() {
        let store = Arc::new(TestStore::default());
        let keeper = Keeper::with_store(store.clone());
        let (mut giver, pidfd) = process();
        keeper.keep("stays", some_fd(), None).unwrap();
        keeper.keep("goes", some_fd(), Some(pidfd.as_fd())).unwrap();
        assert!(keeper.keep("goes", some_fd(), None).is_err());
        assert_eq!(
            store.names(),
            ["kdp-giver.goes", "kdp-vm-of-giver.goes", "kdp-vm.stays"]
        );
        keeper.remove(&mut keeper.kept(), "goes").unwrap();
        assert_eq!(store.names(), ["kdp-vm.stays"]);
        keeper.remove(&mut keeper.kept(), "stays").unwrap();
        assert!(store.names().is_empty());
        giver.kill().unwrap();
        giver.wait().unwrap();
    }

    #[test]
    fn the_next_keeper_goes_on() {
        let store = Arc::new(TestStore::default());
        let first = Keeper::with_store(store.clone());
        let (mut ended, ended_pidfd) = process();
        let (mut giver, pidfd) = process();
        first.keep("stays", some_fd(), None).unwrap();
        first
            .keep("ended", some_fd(), Some(ended_pidfd.as_fd()))
            .unwrap();
        first.keep("goes", some_fd(), Some(pidfd.as_fd())).unwrap();
        store.store("kdp-giver.stray", pidfd.as_fd()).unwrap();
        drop(first);
        // While no keeper runs.
        ended.kill().unwrap();
        ended.wait().unwrap();

        let next = Keeper::with_store(store.clone());
        let mut passed = store.pass();
        passed.push(("of-another-program".to_owned(), some_fd()));
        next.restore(passed).unwrap();
        let names = |keeper: &Keeper| keeper.kept().vms.keys().cloned().collect::<Vec<_>>();
        wait_until("'ended' is still kept", || {
            names(&next) == ["goes", "stays"]
        });
        assert_eq!(
            store.names(),
            ["kdp-giver.goes", "kdp-vm-of-giver.goes", "kdp-vm.stays"]
        );
        giver.kill().unwrap();
        giver.wait().unwrap();
        wait_until("'goes' is still kept", || names(&next) == ["stays"]);
        wait_until("'goes' is still stored", || {
            store.names() == ["kdp-vm.stays"]
        });
    }

    #[test]
    fn a_vm_whose_giver_is_unknown_is_kept() {
        let keeper = Keeper::new();
        let stored = ("kdp-vm-of-giver.vm".to_owned(), some_fd());
        keeper.restore([stored]).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(keeper.count(), 1);
    }

    #[test]
    fn a_vm_goes_when_its_giver_ends_and_its_successor_stays() {
        let keeper = Keeper::new();
        let mut givers = Vec::new();
        for name in ["old", "other"] {
            let (giver, pidfd) = process();
            let generation = keeper.keep(name, some_fd(), None).unwrap();
            keeper.watch(pidfd, name, generation).unwrap();
            givers.push(giver);
        }
        // Another VM takes a name over: the first giver's end is none of its business.
        keeper.kept().vms.remove("other");
        keeper.keep("other", some_fd(), None).unwrap();
        for giver in &mut givers {
            giver.kill().unwrap();
            giver.wait().unwrap();
        }
        wait_until("'old' is still kept", || {
            !keeper.kept().vms.contains_key("old")
        });
        thread::sleep(Duration::from_millis(50));
        assert!(keeper.kept().vms.contains_key("other"));
    }
}

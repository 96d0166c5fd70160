//! The keeper and other commands under a service manager. The tests take the role of systemd.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use rustix::{
    cmsg_space,
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    io::{fcntl_dupfd_cloexec, fcntl_setfd, FdFlags},
    net::{
        recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    },
    process::{pidfd_open, Pid, PidfdFlags},
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::unix::net::{UnixDatagram, UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

const KDP: &str = env!("CARGO_BIN_EXE_kdp");
const LONG: Duration = Duration::from_secs(20);

/// Requests of the keeper's protocol.
const GIVE: u32 = 1;
const TAKE: u32 = 2;
const DONE: u32 = 0x80;
/// The flag of a VM that is kept until it is released.
const STAY: u32 = 1;

/// What systemd does for one service.
struct Systemd {
    dir: tempfile::TempDir,
    notify: UnixDatagram,
    /// The socket that a socket unit holds open.
    socket: OwnedFd,
    /// The fd store. It has no order.
    stored: BTreeMap<String, OwnedFd>,
    /// FileDescriptorStoreMax=.
    max: usize,
}

impl Systemd {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(LONG)).unwrap();
        let socket = UnixListener::bind(dir.path().join("keeper")).unwrap();
        Self {
            dir,
            notify,
            socket: socket.into(),
            stored: BTreeMap::new(),
            max: 8,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keeper")
    }

    fn at(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// Starts `kdp` with these arguments as a service. Passes the socket, if there is one, and the
    /// contents of the store.
    fn command(&self, args: &[&str], is_activated: bool) -> Command {
        let socket = is_activated.then(|| ("kdp-keeper.socket", self.socket.as_fd()));
        let stored = self
            .stored
            .iter()
            .map(|(name, fd)| (name.as_str(), fd.as_fd()));
        let (names, fds): (Vec<&str>, Vec<BorrowedFd<'_>>) =
            socket.into_iter().chain(stored).unzip();
        // The shell moves the descriptors to 3, 4, ... and becomes kdp, so LISTEN_PID is right.
        let mut script = "".to_owned();
        for (n, fd) in fds.iter().enumerate() {
            let high = fcntl_dupfd_cloexec(fd, 100).unwrap();
            fcntl_setfd(&high, FdFlags::empty()).unwrap();
            script += &format!(
                "exec {}<&{high} {high}<&-; ",
                n + 3,
                high = high.as_raw_fd()
            );
            // Closed with the test process.
            std::mem::forget(high);
        }
        let mut command = Command::new("bash");
        command
            .args(["-c", &(script + "LISTEN_PID=$$ exec \"$@\""), "bash", KDP])
            .args(args)
            .env("NOTIFY_SOCKET", self.dir.path().join("notify"))
            .env("FDSTORE", self.max.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // systemd does not set these variables if it passes no descriptor.
        if !fds.is_empty() {
            command
                .env("LISTEN_FDS", fds.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        command
    }

    fn start(&mut self, args: &[&str], is_activated: bool) -> Service {
        let service = Service(Some(self.command(args, is_activated).spawn().unwrap()));
        self.receive_until("READY=1");
        service
    }

    fn start_keeper(&mut self) -> Service {
        self.start(&["-v", "keep"], true)
    }

    /// Handle messages up to this one.
    fn receive_until(&mut self, last: &str) {
        while self.receive() != last {}
    }

    /// Handle a message, as systemd does.
    fn receive(&mut self) -> String {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let len = recvmsg(
            &self.notify,
            &mut iov,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap()
        .bytes;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let text = std::str::from_utf8(&bytes[..len]).unwrap().trim_end();
        let has = |line: &str| text.lines().any(|other| other == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        if has("FDSTORE=1") {
            assert!(has("FDPOLL=0"), "{text}");
            let name = name.unwrap();
            assert!(
                name.len() <= 255 && !name.contains(':') && name.is_ascii(),
                "{name}"
            );
            assert_eq!(fds.len(), 1, "{text}");
            self.stored.insert(name.to_owned(), fds.remove(0));
            assert!(self.stored.len() <= self.max);
        }
        if has("FDSTOREREMOVE=1") {
            assert!(self.stored.remove(name.unwrap()).is_some(), "{text}");
        }
        text.to_owned()
    }

    fn names(&self) -> Vec<&str> {
        self.stored.keys().map(String::as_str).collect()
    }

    /// The VMs that the keeper keeps.
    fn kept(&self) -> Vec<String> {
        let output = Command::new(KDP)
            .args(["kept", "--at", &self.at()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn give(&self, name: &str, flags: u32, fd: BorrowedFd<'_>) {
        assert_eq!(ask(&self.path(), GIVE, flags, name, Some(fd)).0, DONE);
    }
}

/// A running service. It is killed when it is dropped.
struct Service(Option<Child>);

impl Service {
    fn signal(&self, name: &str) {
        let pid = self.0.as_ref().unwrap().id().to_string();
        let status = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// Wait until the service has ended.
    fn end(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }

    fn crash(self) {
        self.signal("-KILL");
        self.end();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Send a request to the keeper. Returns its answer, and the descriptor that came with it.
fn ask(
    keeper: &Path,
    op: u32,
    flags: u32,
    name: &str,
    fd: Option<BorrowedFd<'_>>,
) -> (u32, Option<OwnedFd>) {
    let mut bytes = [0; 256];
    bytes[..8].copy_from_slice(b"KDPPASS\x01");
    bytes[8..12].copy_from_slice(&op.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes[16..16 + name.len()].copy_from_slice(name.as_bytes());
    let stream = UnixStream::connect(keeper).unwrap();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(
        &stream,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();

    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    assert_eq!(
        recvmsg(&stream, &mut iov, &mut control, flags)
            .unwrap()
            .bytes,
        256
    );
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (u32::from_le_bytes(bytes[8..12].try_into().unwrap()), fd)
}

/// A file that stands for a VM: the keeper never uses the descriptors that it keeps.
fn vm(content: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

fn content(systemd: &Systemd, name: &str) -> String {
    let (answer, fd) = ask(&systemd.path(), TAKE, 0, name, None);
    assert_eq!(answer, DONE, "{name}");
    let mut file = File::from(fd.unwrap());
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn keeper_restarts_and_crashes_lose_nothing() {
    let mut systemd = Systemd::new();
    let keeper = systemd.start_keeper();
    systemd.give("web: ü", STAY, vm("one").as_fd());
    // The giver is this process.
    systemd.give("mine", 0, vm("two").as_fd());
    for _ in 0..3 {
        assert!(systemd.receive().starts_with("FDSTORE=1\n"));
    }
    let all = [
        "kdp-giver.mine",
        "kdp-vm-of-giver.mine",
        "kdp-vm.web%3A%20%C3%BC",
    ];
    assert_eq!(systemd.names(), all);
    keeper.crash();

    let keeper = systemd.start_keeper();
    assert_eq!(systemd.kept(), ["mine", "web: ü"]);
    assert_eq!(content(&systemd, "mine"), "two");
    keeper.signal("-TERM");
    assert!(keeper.end().status.success());
    // Nothing is removed from the store, and nothing is stored again.
    assert_eq!(systemd.receive(), "STOPPING=1");
    assert_eq!(systemd.names(), all);
    assert!(systemd.path().exists(), "the socket is systemd's");

    let keeper = systemd.start_keeper();
    assert_eq!(content(&systemd, "web: ü"), "one");
    let release = ["kept", "--at", &systemd.at(), "--release", "web: ü"];
    assert!(Command::new(KDP).args(release).status().unwrap().success());
    assert!(systemd.receive().starts_with("FDSTOREREMOVE=1\n"));
    assert_eq!(systemd.names(), all[..2]);
    assert_eq!(systemd.kept(), ["mine"]);
    drop(keeper);
}

#[test]
fn keeper_releases_the_vm_of_a_giver_that_ended_before_or_after_it_started() {
    let mut systemd = Systemd::new();
    let mut givers: Vec<Child> = Vec::new();
    for name in ["early", "late"] {
        let giver = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(Pid::from_child(&giver), PidfdFlags::empty()).unwrap();
        systemd.stored.insert(format!("kdp-giver.{name}"), pidfd);
        systemd
            .stored
            .insert(format!("kdp-vm-of-giver.{name}"), vm(name).into());
        givers.push(giver);
    }
    let mut end = |n: usize| {
        givers[n].kill().unwrap();
        givers[n].wait().unwrap();
    };
    end(0);
    let keeper = systemd.start_keeper();
    let removed = |systemd: &mut Systemd, left: &[&str]| {
        while systemd.names() != left {
            systemd.receive();
        }
    };
    removed(&mut systemd, &["kdp-giver.late", "kdp-vm-of-giver.late"]);
    assert_eq!(systemd.kept(), ["late"]);
    assert_eq!(content(&systemd, "late"), "late");
    end(1);
    removed(&mut systemd, &[]);
    assert!(systemd.kept().is_empty());
    drop(keeper);
}

#[test]
fn keeper_warns_when_the_store_is_full() {
    let mut systemd = Systemd::new();
    systemd.max = 1;
    let keeper = systemd.start_keeper();
    systemd.give("a", STAY, vm("a").as_fd());
    systemd.give("b", STAY, vm("b").as_fd());
    assert_eq!(systemd.kept(), ["a", "b"]);
    keeper.signal("-TERM");
    let text = String::from_utf8(keeper.end().stderr).unwrap();
    systemd.receive_until("STOPPING=1");
    assert_eq!(systemd.names(), ["kdp-vm.a"]);
    let warning =
        "the VM 'b' will not survive a restart of the keeper: systemd's store holds 1 of at most \
                   1 descriptors: raise FileDescriptorStoreMax= of the service";
    assert!(text.contains(warning), "{text}");
}

#[test]
fn keeper_needs_one_socket() {
    let systemd = Systemd::new();
    let complaint = |args: &[&str], is_activated| {
        let output = systemd.command(args, is_activated).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (status, text) = complaint(&["keep"], false);
    assert_eq!(status, Some(2), "{text}");
    assert!(
        text.contains("no socket to listen at: give --listen unix:PATH"),
        "{text}"
    );
    let (status, text) = complaint(&["keep", "--listen", "unix:/other"], true);
    assert_eq!(status, Some(1), "{text}");
    let expected = format!(
        "--listen is unix:/other, but systemd passed a socket that listens at {}",
        systemd.at()
    );
    assert!(text.contains(&expected), "{text}");

    let tcp = Systemd {
        socket: std::net::TcpListener::bind("127.0.0.1:0").unwrap().into(),
        ..Systemd::new()
    };
    let output = tcp.command(&["keep"], true).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("needs one Unix stream socket"), "{text}");
}

#[test]
fn keeper_without_a_socket_unit_uses_the_store_too() {
    let mut systemd = Systemd::new();
    let path = systemd.dir.path().join("own");
    let at = format!("unix:{}", path.display());
    let keeper = systemd.start(&["keep", "--listen", &at], false);
    assert_eq!(ask(&path, GIVE, STAY, "vm", Some(vm("x").as_fd())).0, DONE);
    assert!(systemd.receive().starts_with("FDSTORE=1\n"));
    keeper.crash();
    let keeper = systemd.start(&["keep", "--listen", &at], false);
    assert!(ask(&path, TAKE, 0, "vm", None).1.is_some());
    keeper.signal("-TERM");
    assert!(keeper.end().status.success());
    assert!(!path.exists());
}

#[test]
fn serve_and_handle_tell_when_they_are_ready() {
    let mut systemd = Systemd::new();
    let file = systemd.dir.path().join("ram");
    fs::write(&file, [1; 4096]).unwrap();
    let file = file.display().to_string();
    let serve = systemd.start(&["serve", "--listen", "127.0.0.1:0", &file], false);
    serve.signal("-TERM");
    assert!(serve.end().status.success());
    assert_eq!(systemd.receive(), "STOPPING=1");

    let socket = systemd.dir.path().join("vm");
    let (at, source) = (format!("unix:{}", socket.display()), format!("file:{file}"));
    let handle = systemd.start(&["handle", "--listen-fd", &at, "--source", &source], false);
    assert!(socket.exists());
    drop(handle);
}

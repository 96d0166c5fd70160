//! The protocol between a service and its service manager, such as systemd.
//!
//! Without NOTIFY_SOCKET and LISTEN_FDS, which systemd sets, the functions have no effect.

use crate::failure::{Context, Failure};
use kvm_demand_paging::keeper::FdStore;
use rustix::{
    fd::{BorrowedFd, FromRawFd, OwnedFd},
    net::{sockopt, SocketType},
};
use sd_notify::NotifyState;
use std::{
    collections::BTreeSet,
    env, io,
    os::unix::net::UnixListener,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Tells the service manager that the service is ready.
pub fn ready() {
    notify(&NotifyState::Ready);
}

/// Tells the service manager that the service is about to end.
pub fn stopping() {
    notify(&NotifyState::Stopping);
}

fn notify(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::warn!("cannot send {state} to NOTIFY_SOCKET: {error}");
    }
}

/// What the service manager passed to this process.
#[derive(Default)]
pub struct Passed {
    /// Sockets that listen.
    pub listeners: Vec<OwnedFd>,
    /// Descriptors of the fd store, with their names.
    pub stored: Vec<(String, OwnedFd)>,
}

impl Passed {
    /// Takes over the descriptors that LISTEN_FDS announces. Call this once, before this process
    /// opens anything.
    pub fn take() -> Result<Self, Failure> {
        let fds = sd_notify::listen_fds_with_names()
            .on("cannot take the file descriptors that LISTEN_FDS announces")?;
        let mut passed = Self::default();
        for (fd, name) in fds {
            // SAFETY: LISTEN_PID names this process: the service manager passed the descriptor to
            // it. It is open, since sd-notify could set its close-on-exec flag. Nothing else in
            // this process owns it, since this runs once and first.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // This fails if the descriptor is not a socket.
            match sockopt::socket_acceptconn(&fd) {
                Ok(true) => passed.listeners.push(fd),
                _ => passed.stored.push((name, fd)),
            }
        }
        Ok(passed)
    }

    /// The one Unix socket that listens, if any does.
    pub fn take_listener(&mut self) -> Result<Option<UnixListener>, Failure> {
        let count = self.listeners.len();
        let Some(fd) = self.listeners.pop() else {
            return Ok(None);
        };
        let listener = UnixListener::from(fd);
        let is_stream =
            sockopt::socket_type(&listener).is_ok_and(|kind| kind == SocketType::STREAM);
        if count != 1 || !is_stream || listener.local_addr().is_err() {
            return Err(Failure::Other(format!(
                "systemd passed {count} sockets: 'kdp keep' needs one Unix stream socket, \
                 such as that of ListenStream=/run/kdp/keeper.sock"
            )));
        }
        listener
            .set_nonblocking(false)
            .on("the socket of systemd")?;
        Ok(Some(listener))
    }
}

/// systemd's store of file descriptors for this service.
pub struct DescriptorStore {
    /// FileDescriptorStoreMax= of the service. systemd passes it from version 254 on.
    max: Option<usize>,
    stored: Mutex<BTreeSet<String>>,
}

impl DescriptorStore {
    /// The store, with the descriptors that this process received from it. `None` without a service
    /// manager.
    pub fn open(passed: &Passed) -> Option<Self> {
        env::var_os("NOTIFY_SOCKET")?;
        let names = passed.stored.iter().map(|(name, _)| name.clone());
        Some(Self {
            max: env::var("FDSTORE").ok().and_then(|max| max.parse().ok()),
            stored: Mutex::new(names.collect()),
        })
    }

    fn stored(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // A panic of another thread leaves the set valid: each call of it is complete.
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FdStore for DescriptorStore {
    fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut stored = self.stored();
        if let Some(max) = self.max.filter(|max| stored.len() >= *max) {
            return Err(io::Error::other(format!(
                "systemd's store holds {} of at most {max} descriptors: raise \
                 FileDescriptorStoreMax= of the service",
                stored.len()
            )));
        }
        let state = [
            NotifyState::FdStore,
            // Without this, systemd drops a descriptor that reports an error or a hang-up. A pidfd
            // reports a hang-up when its process has ended.
            NotifyState::Custom("FDPOLL=0"),
            NotifyState::FdName(name),
        ];
        sd_notify::notify_with_fds(&state, &[fd])?;
        stored.insert(name.to_owned());
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut stored = self.stored();
        if stored.remove(name) {
            sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])?;
        }
        Ok(())
    }
}

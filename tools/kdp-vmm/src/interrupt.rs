//! The signal that calls a thread out of a system call: KVM_RUN, or a read that waits.

use std::thread::JoinHandle;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::error::{Error, Result};

extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Let the signal interrupt threads of this process, instead of ending it. System calls are not restarted after it.
pub(crate) fn prepare() -> Result<()> {
    register_signal_handler(SIGRTMIN(), nothing)
        .map_err(|e| Error::os("sigaction", std::io::Error::from_raw_os_error(e.errno())))
}

/// Interrupt the thread. One that was just about to make its system call makes it all the same: ask again.
pub(crate) fn send<T>(thread: &JoinHandle<T>) {
    // It fails for a thread that has ended, which needs none.
    let _ = thread.kill(SIGRTMIN());
}

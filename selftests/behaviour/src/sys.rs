// SPDX-License-Identifier: GPL-2.0

//! The system calls that the standard library lacks, and accesses that may fail.

use std::arch::global_asm;
use std::cell::Cell;
use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant};

use libc::{c_int, c_void, pid_t};

use crate::check::{Fail, Result};

/// An errno, if the call failed.
pub fn check(ret: c_int) -> io::Result<c_int> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ret)
}

/// The CPUs that this process had when it asked first.
fn cpus() -> io::Result<&'static [usize]> {
    static CPUS: OnceLock<Vec<usize>> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(cpus);
    }
    // SAFETY: zeros are an empty set, and it outlives the call.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        check(libc::sched_getaffinity(
            0,
            size_of::<libc::cpu_set_t>(),
            &mut set,
        ))?;
        set
    };
    let is_ours = |cpu: &usize| {
        // SAFETY: it is below the size of a set.
        unsafe { libc::CPU_ISSET(*cpu, &set) }
    };
    let cpus = (0..libc::CPU_SETSIZE as usize).filter(is_ours).collect();
    Ok(CPUS.get_or_init(|| cpus))
}

/// Binds the current thread to one CPU, the `n`th of this process's, counted round.
///
/// For threads of vCPUs that run for long: the fewer of them share a CPU, the fewer guests QEMU loses (see emulator.rs).
pub fn stay_on_cpu(n: u64) -> io::Result<()> {
    let cpus = cpus()?;
    // SAFETY: zeros are an empty set, and the set outlives the call.
    let ret = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpus[n as usize % cpus.len()], &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    check(ret).map(drop)
}

/// The number of the calling thread.
pub fn gettid() -> i32 {
    // SAFETY: it has no preconditions.
    unsafe { libc::gettid() }
}

/// Two ends of a pipe: read, write.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for two; the descriptors that come back are new and nobody else's.
    unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// The end of a pipe to write to. The other end stays open as long as the process: to close it is to wait for
/// a writer that is in the midst of a fault.
pub fn pipe_to_write() -> io::Result<OwnedFd> {
    let (read, write) = pipe()?;
    mem::forget(read);
    Ok(write)
}

/// mount(2)
pub fn mount(source: &str, target: &Path, kind: &str, options: &str) -> io::Result<()> {
    let source = CString::new(source)?;
    let target = CString::new(target.as_os_str().as_bytes())?;
    let kind = CString::new(kind)?;
    let options = CString::new(options)?;
    // SAFETY: they are strings that outlive the call, which copies them.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    })
    .map(drop)
}

/// An eventfd at 0.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: the descriptor that comes back is new and nobody else's.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::eventfd(
            0,
            libc::EFD_CLOEXEC,
        ))?))
    }
}

/// write(2) from any address, also one that faults.
pub fn write_from(fd: BorrowedFd<'_>, from: *const u8, len: usize) -> io::Result<usize> {
    // SAFETY: the kernel checks the address.
    let n = unsafe { libc::write(fd.as_raw_fd(), from.cast(), len) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// read(2) to an address in a mapping of guest memory.
///
/// # Safety
///
/// Rust references to the bytes must not exist.
pub unsafe fn read_to(fd: BorrowedFd<'_>, to: *mut u8, len: usize) -> io::Result<usize> {
    // SAFETY: by the caller's promise; the kernel checks the address.
    let n = unsafe { libc::read(fd.as_raw_fd(), to.cast(), len) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Memory that a device would use: io_uring has it pinned until its file is closed.
pub fn register_buffer(at: *const u8, len: usize) -> io::Result<OwnedFd> {
    const IORING_REGISTER_BUFFERS: libc::c_uint = 0;
    // struct io_uring_params, in words.
    let mut params = [0u32; 30];
    // SAFETY: the kernel writes at most a struct io_uring_params, which is as long.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let fd = check(fd as c_int)?;
    // SAFETY: the descriptor is new.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let buffer = libc::iovec {
        iov_base: at.cast_mut().cast(),
        iov_len: len,
    };
    // SAFETY: the kernel reads one iovec. No operation is ever submitted that uses the buffer.
    let registered = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd.as_raw_fd(),
            IORING_REGISTER_BUFFERS,
            &raw const buffer,
            1,
        )
    };
    check(registered as c_int)?;
    Ok(fd)
}

/// madvise(2), of advice that leaves the bytes of a shared mapping of a file as they are.
pub fn advise(at: *mut u8, len: usize, advice: c_int) -> io::Result<()> {
    // SAFETY: the memory stays what it is, by the promise above.
    check(unsafe { libc::madvise(at.cast(), len, advice) }).map(drop)
}

/// Whether poll(2) finds the descriptor readable within that time.
pub fn readable(fd: RawFd, within: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = c_int::try_from(within.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: one valid entry.
    check(unsafe { libc::poll(&mut poll, 1, ms) })?;
    Ok(poll.revents & libc::POLLIN != 0)
}

/// A child process. It is killed and waited for when this is dropped.
pub struct Child {
    pid: pid_t,
    reaped: bool,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Status(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Child {
    /// Runs `f` in a child process. The process must have no other thread.
    pub fn fork(f: impl FnOnce() -> Result) -> Result<Self> {
        // Those that were joined may be about to end.
        crate::task::until("the process has one thread", || {
            Ok(std::fs::read_dir("/proc/self/task")?.count() == 1)
        })?;
        // SAFETY: the process has one thread, so the child finds no lock held.
        let pid = check(unsafe { libc::fork() })?;
        if pid > 0 {
            return Ok(Self { pid, reaped: false });
        }
        // SAFETY: it only sets a signal of this process.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let status = match f() {
            Ok(()) => 0,
            Err(Fail::Wrong(why)) => {
                eprintln!("in a child: {why}");
                1
            }
            Err(Fail::Skip(why)) => {
                eprintln!("in a child: cannot be run here: {why}");
                1
            }
        };
        // SAFETY: ends the child without running what the parent has registered for its own end.
        unsafe { libc::_exit(status) }
    }

    /// Runs `f` in a child of a process that has other threads; its result is the child's status.
    ///
    /// # Safety
    ///
    /// `f` takes no lock that another thread may have just now: it does not allocate, print or panic.
    pub unsafe fn fork_beside_threads(f: impl FnOnce() -> i32) -> io::Result<Self> {
        prepare_probes();
        // SAFETY: by the caller's promise; the child ends in here.
        let pid = check(unsafe { libc::fork() })?;
        if pid > 0 {
            return Ok(Self { pid, reaped: false });
        }
        let status = f();
        // SAFETY: ends the child without running what the parent has registered for its own end.
        unsafe { libc::_exit(status) }
    }

    /// Its process id.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: c_int) -> io::Result<()> {
        // SAFETY: the child was not waited for, so the number is still its.
        check(unsafe { libc::kill(self.pid, signal) }).map(drop)
    }

    /// Waits until it ends, but not longer than that.
    pub fn wait(&mut self, within: Duration) -> Result<Ended> {
        let deadline = Instant::now() + within;
        loop {
            let mut status = 0;
            // SAFETY: `status` is valid for a write; the child was not waited for.
            if check(unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG) })? == self.pid {
                self.reaped = true;
                return Ok(if libc::WIFSIGNALED(status) {
                    Ended::Signal(libc::WTERMSIG(status))
                } else {
                    Ended::Status(libc::WEXITSTATUS(status))
                });
            }
            ensure!(
                Instant::now() < deadline,
                "process {} has not ended within {within:?}",
                self.pid
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until it ends well.
    pub fn join(&mut self, within: Duration) -> Result {
        let ended = self.wait(within)?;
        ensure_eq!(ended, Ended::Status(0), "a child's end");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // Nothing is left to be told if the child cannot be killed; the harness ends the group.
            let _ = self.kill(libc::SIGKILL);
            let _ = self.wait(Duration::from_secs(5));
        }
    }
}

extern "C" fn nothing(_signal: c_int) {}

/// Lets a signal interrupt system calls and do nothing else.
pub fn catch(signal: c_int, handler: extern "C" fn(c_int)) -> io::Result<()> {
    // SAFETY: all zero is a valid sigaction; the handler is a function of the program.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        check(libc::sigaction(signal, &action, ptr::null_mut())).map(drop)
    }
}

/// Lets a signal interrupt system calls and do nothing else.
pub fn catch_idly(signal: c_int) -> io::Result<()> {
    catch(signal, nothing)
}

/// Sends a signal to a thread of this process.
pub fn signal_thread(tid: i32, signal: c_int) -> io::Result<()> {
    // SAFETY: tgkill() takes any numbers.
    let ret = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
    check(ret as c_int).map(drop)
}

/// delete_module(2), without waiting.
pub fn delete_module(name: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: the name is a C string.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    check(ret as c_int).map(drop)
}

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// It read this; 0 for a write.
    Value(u64),
    /// A signal, with its si_code and si_addr.
    Signal {
        /// Its number.
        signal: i32,
        /// si_code.
        code: i32,
        /// si_addr.
        address: u64,
        /// si_addr_lsb, of a memory error.
        lsb: u8,
    },
}

impl Touched {
    /// A SIGBUS at this address.
    pub fn sigbus(code: i32, at: *const u64, lsb: u8) -> Self {
        Self::Signal {
            signal: libc::SIGBUS,
            code,
            address: at as u64,
            lsb,
        }
    }
}

#[repr(C)]
struct Probed {
    /// The value, or si_addr.
    value: u64,
    /// 0, or the signal and its code.
    failed: u64,
}

global_asm!(
    "kdp_probe_load:",
    "mov rax, [rdi]",
    "xor edx, edx",
    "ret",
    "kdp_probe_store:",
    "mov [rdi], rsi",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    "kdp_probe_failed:",
    "ret",
);

extern "C" {
    fn kdp_probe_load(at: *const u64) -> Probed;
    fn kdp_probe_store(at: *mut u64, value: u64) -> Probed;
    fn kdp_probe_failed();
}

/// Continues behind a probe's access, whose first instruction is the access.
extern "C" fn probe_failed(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes valid pointers to a handler with SA_SIGINFO.
    unsafe {
        let regs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = regs[libc::REG_RIP as usize] as usize;
        if at != kdp_probe_load as *const () as usize && at != kdp_probe_store as *const () as usize
        {
            if signal == libc::SIGBUS && NOTES.load(Ordering::Relaxed) {
                // It has no destructor and is there from the thread's start: as good as a static.
                BUS_ERROR.set(Some(told(signal, info)));
                return;
            }
            // Not a probe's: the access is repeated, and the signal ends the process.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        // It stands behind si_addr (include/uapi/asm-generic/siginfo.h), and is 0 where it means nothing.
        let lsb = info.cast::<u8>().add(24).read();
        let failed =
            (signal as u64) | (u64::from(lsb) << 8) | (((*info).si_code as u32 as u64) << 32);
        regs[libc::REG_RAX as usize] = (*info).si_addr() as i64;
        regs[libc::REG_RDX as usize] = failed as i64;
        regs[libc::REG_RIP as usize] = kdp_probe_failed as *const () as i64;
    }
}

thread_local! {
    static BUS_ERROR: Cell<Option<Touched>> = const { Cell::new(None) };
}

/// Whether a SIGBUS that is no probe's is noted.
static NOTES: AtomicBool = AtomicBool::new(false);

/// From now on a SIGBUS that comes to a thread in a system call is noted for it, and does nothing else.
pub fn note_bus_errors() {
    prepare_probes();
    NOTES.store(true, Ordering::Relaxed);
}

/// What the current thread was told last, and not yet asked for.
pub fn bus_error() -> Option<Touched> {
    BUS_ERROR.take()
}

/// What a handler was told.
///
/// # Safety
///
/// `info` is what the kernel passes to it.
unsafe fn told(signal: c_int, info: *mut libc::siginfo_t) -> Touched {
    // SAFETY: by the caller's promise. si_addr_lsb stands behind si_addr (include/uapi/asm-generic/siginfo.h), and is 0
    // where it means nothing.
    unsafe {
        Touched::Signal {
            signal,
            code: (*info).si_code,
            address: (*info).si_addr() as u64,
            lsb: info.cast::<u8>().add(24).read(),
        }
    }
}

fn prepare_probes() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGBUS, libc::SIGSEGV] {
            // SAFETY: all zero is a valid sigaction; the handler has the prototype of SA_SIGINFO.
            unsafe {
                let mut action: libc::sigaction = mem::zeroed();
                action.sa_sigaction = probe_failed as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO;
                libc::sigaction(signal, &action, ptr::null_mut());
            }
        }
    });
}

fn touched(probed: &Probed) -> Touched {
    if probed.failed == 0 {
        return Touched::Value(probed.value);
    }
    Touched::Signal {
        signal: i32::from(probed.failed as u8),
        code: (probed.failed >> 32) as i32,
        address: probed.value,
        lsb: (probed.failed >> 8) as u8,
    }
}

/// Reads a word at any address; SIGBUS and SIGSEGV are a result, not the end.
pub fn load(at: *const u64) -> Touched {
    prepare_probes();
    // SAFETY: an access that fails is caught; one that succeeds reads initialised memory of a mapping.
    touched(&unsafe { kdp_probe_load(at) })
}

/// Writes a word.
///
/// # Safety
///
/// The address is in a mapping of guest memory, or in none.
pub unsafe fn store(at: *mut u64, value: u64) -> Touched {
    prepare_probes();
    // SAFETY: by the caller's promise; an access that fails is caught.
    touched(&unsafe { kdp_probe_store(at, value) })
}

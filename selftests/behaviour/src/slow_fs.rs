// SPDX-License-Identifier: GPL-2.0

//! A file system that answers reads when it is told to: a server of 9P2000.L (Linux's fs/9p is the client) for one
//! file, on a socket. What reads from it hangs as it would on a disk or a network that does not answer.
//!
//! Messages are `size[4] type[1] tag[2]` and what the type says, little endian
//! (<https://9p.io/magic/man2html/5/intro>, <https://github.com/chaos/diod/blob/master/protocol.md>).

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::check::Result;
use crate::sys;
use crate::task::PATIENCE;

const RLERROR: u8 = 7;
const TLOPEN: u8 = 12;
const TGETATTR: u8 = 24;
const TVERSION: u8 = 100;
const TATTACH: u8 = 104;
const TFLUSH: u8 = 108;
const TWALK: u8 = 110;
const TREAD: u8 = 116;
const TCLUNK: u8 = 120;

/// The file's name.
pub const FILE: &str = "image";

/// The most bytes of a message.
const MSIZE: u32 = 128 << 10;

#[derive(Default)]
struct Gate {
    closed: bool,
    /// Reads that stand before it.
    held: u64,
}

/// The mounted file system. It answers at once until it is told not to.
pub struct SlowFs {
    path: PathBuf,
    gate: Arc<(Mutex<Gate>, Condvar)>,
}

impl SlowFs {
    /// Mounts one that holds these bytes in [`FILE`].
    pub fn mount(bytes: Vec<u8>) -> Result<Self> {
        let (client, server) = UnixStream::pair()?;
        let path = Path::new("/dev/shm").join(format!("slow-fs-{}", sys::gettid()));
        fs::create_dir_all(&path)?;
        let gate = Arc::new((Mutex::new(Gate::default()), Condvar::new()));
        let serving = gate.clone();
        thread::spawn(move || {
            // It ends with the mount: nobody listens to why.
            let _ = serve(server, &Arc::new(bytes), &serving);
        });
        let fd = client.as_raw_fd();
        // The kernel takes references of its own. Without a cache every read of the file is a message.
        let options =
            format!("trans=fd,rfdno={fd},wfdno={fd},version=9p2000.L,msize={MSIZE},cache=none");
        sys::mount("slow-fs", &path, "9p", &options)?;
        Ok(Self { path, gate })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.path.join(FILE)
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers no read from now on.
    pub fn hold(&self) {
        self.lock().closed = true;
    }

    /// Waits until a read has come that is not answered.
    pub fn until_held(&self) -> Result {
        let (gate, timeout) = self
            .gate
            .1
            .wait_timeout_while(self.lock(), PATIENCE, |gate| gate.held == 0)
            .unwrap_or_else(PoisonError::into_inner);
        drop(gate);
        ensure!(!timeout.timed_out(), "nobody reads from the file system");
        Ok(())
    }

    /// Answers all reads again.
    pub fn release(&self) {
        self.lock().closed = false;
        self.gate.1.notify_all();
    }
}

impl Drop for SlowFs {
    fn drop(&mut self) {
        self.release();
        // A test that has failed is not to fail for this instead.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .output();
        let _ = fs::remove_dir(&self.path);
    }
}

/// What is left of a message that is being taken apart.
struct Message<'a>(&'a [u8]);

impl Message<'_> {
    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let Some((head, rest)) = self.0.split_at_checked(len) else {
            fail!("a message of 9P is too short");
        };
        self.0 = rest;
        Ok(head)
    }

    fn number(&mut self, bytes: usize) -> Result<u64> {
        let head = self.take(bytes)?;
        Ok(head
            .iter()
            .rev()
            .fold(0, |n, byte| (n << 8) | u64::from(*byte)))
    }

    fn string(&mut self) -> Result<String> {
        let len = self.number(2)? as usize;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }
}

/// An answer.
struct Answer(Vec<u8>);

impl Answer {
    fn new(kind: u8, tag: u64) -> Self {
        let answer = Self(vec![0; 4]);
        answer.number(kind.into(), 1).number(tag, 2)
    }

    fn error(tag: u64, errno: i32) -> Self {
        Self::new(RLERROR, tag).number(errno as u64, 4)
    }

    fn number(mut self, n: u64, bytes: usize) -> Self {
        self.0.extend_from_slice(&n.to_le_bytes()[..bytes]);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// What names the folder, or the file.
    fn qid(self, is_file: bool) -> Self {
        let kind = if is_file { 0 } else { 0x80 };
        self.number(kind, 1).number(0, 4).number(is_file.into(), 8)
    }

    fn send(mut self, to: &Mutex<UnixStream>) -> Result {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_le_bytes());
        to.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&self.0)?;
        Ok(())
    }
}

fn serve(mut from: UnixStream, bytes: &Arc<Vec<u8>>, gate: &Arc<(Mutex<Gate>, Condvar)>) -> Result {
    let to = Arc::new(Mutex::new(from.try_clone()?));
    // Which fid is the file's, and not the folder's.
    let mut fids = BTreeMap::new();
    loop {
        let mut size = [0; 4];
        match from.read_exact(&mut size) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let size = u32::from_le_bytes(size);
        ensure!((7..=MSIZE).contains(&size), "a message of {size} bytes");
        let mut body = vec![0; size as usize - 4];
        from.read_exact(&mut body)?;
        let mut message = Message(&body);
        let (kind, tag) = (message.number(1)? as u8, message.number(2)?);
        let ok = Answer::new(kind + 1, tag);
        let answer = match kind {
            TVERSION => ok.bytes(&body[3..]),
            TATTACH => {
                fids.insert(message.number(4)?, false);
                ok.qid(false)
            }
            TWALK => {
                let (fid, new, steps) =
                    (message.number(4)?, message.number(4)?, message.number(2)?);
                let mut is_file = fids.get(&fid).copied().unwrap_or(false);
                if steps == 1 {
                    is_file = message.string()? == FILE;
                }
                if steps > 1 || (steps == 1 && !is_file) {
                    Answer::error(tag, libc::ENOENT)
                } else {
                    fids.insert(new, is_file);
                    let ok = ok.number(steps, 2);
                    if steps == 1 {
                        ok.qid(true)
                    } else {
                        ok
                    }
                }
            }
            TGETATTR => {
                let is_file = fids.get(&message.number(4)?).copied().unwrap_or(false);
                let (mode, len) = if is_file {
                    (libc::S_IFREG | 0o644, bytes.len() as u64)
                } else {
                    (libc::S_IFDIR | 0o755, 0)
                };
                // All that fs/9p calls "basic": mode, nlink, uid, gid, rdev, times, ino, size, blocks.
                let ok = ok.number(0x7ff, 8).qid(is_file).number(mode.into(), 4);
                // uid, gid, nlink, rdev, size, blksize, blocks; then times, generation and version, all 0.
                let ok = ok.number(0, 4).number(0, 4).number(1, 8).number(0, 8);
                let ok = ok.number(len, 8).number(4096, 8).number(len / 512, 8);
                ok.bytes(&[0; 10 * 8])
            }
            TLOPEN => {
                let is_file = fids.get(&message.number(4)?).copied().unwrap_or(false);
                ok.qid(is_file).number(0, 4)
            }
            TREAD => {
                let (_, at, count) = (message.number(4)?, message.number(8)?, message.number(4)?);
                let (bytes, gate, to) = (bytes.clone(), gate.clone(), to.clone());
                // Others go on while one is held.
                thread::spawn(move || answer_read(ok, &bytes, (at, count), &gate, &to));
                continue;
            }
            TCLUNK => {
                fids.remove(&message.number(4)?);
                ok
            }
            TFLUSH => ok,
            _ => Answer::error(tag, libc::EOPNOTSUPP),
        };
        answer.send(&to)?;
    }
}

/// Answers a read, when the gate is open.
fn answer_read(
    answer: Answer,
    bytes: &[u8],
    (at, count): (u64, u64),
    gate: &(Mutex<Gate>, Condvar),
    to: &Mutex<UnixStream>,
) {
    let mut state = gate.0.lock().unwrap_or_else(PoisonError::into_inner);
    state.held += 1;
    gate.1.notify_all();
    let mut state = gate
        .1
        .wait_while(state, |gate| gate.closed)
        .unwrap_or_else(PoisonError::into_inner);
    state.held -= 1;
    drop(state);
    let start = (at as usize).min(bytes.len());
    let end = (start + count as usize).min(bytes.len());
    let answer = answer.number((end - start) as u64, 4);
    // It fails if the mount is gone.
    let _ = answer.bytes(&bytes[start..end]).send(to);
}

// SPDX-License-Identifier: GPL-2.0

//! What the kernel says of a test.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use crate::check::Result;

/// The kernel's log from a point in time on.
pub struct KernelLog(File);

impl KernelLog {
    /// From now on.
    pub fn from_now() -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// The messages of the kernel itself, since then or the last call, that say of themselves that they are errors.
    pub fn errors(&mut self) -> Result<Vec<String>> {
        /// KERN_ERR of the kernel's own facility, 0: what a process writes there has another.
        const ERROR: u32 = 3;
        let mut found = Vec::new();
        let mut record = [0; 8192];
        loop {
            let len = match self.0.read(&mut record) {
                Ok(len) => len,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(found),
                Err(e) => return Err(e.into()),
            };
            // A record is PRIORITY,SEQUENCE,TIME,FLAGS;MESSAGE (Documentation/ABI/testing/dev-kmsg).
            let text = String::from_utf8_lossy(&record[..len]);
            let Some((priority, message)) = text
                .split_once(';')
                .and_then(|(head, message)| Some((head.split_once(',')?.0, message)))
            else {
                fail!("/dev/kmsg has a record '{text}'");
            };
            if priority.parse::<u32>()? <= ERROR {
                found.push(message.trim_end().to_owned());
            }
        }
    }
}

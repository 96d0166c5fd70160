// SPDX-License-Identifier: GPL-2.0

//! Block devices that are files.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::check::Result;

/// A loop device. It is detached when this is dropped.
pub struct LoopDevice {
    /// Its path under /dev.
    pub path: String,
}

impl LoopDevice {
    /// One of this file.
    pub fn of(file: impl AsRef<Path>) -> Result<Self> {
        Self::with(&[], file.as_ref().as_os_str())
    }

    /// The same, which can be read only.
    pub fn read_only(file: impl AsRef<Path>) -> Result<Self> {
        Self::with(&["--read-only"], file.as_ref().as_os_str())
    }

    fn with(more: &[&str], file: &OsStr) -> Result<Self> {
        let output = Command::new("losetup")
            .args(more)
            .args(["--find", "--show"])
            .arg(file)
            .output()?;
        ensure!(output.status.success(), "losetup: {output:?}");
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(Self { path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A test that has failed is not to fail for this instead.
        let _ = Command::new("losetup").args(["-d", &self.path]).output();
    }
}

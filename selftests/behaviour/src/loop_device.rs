// SPDX-License-Identifier: GPL-2.0

//! Block devices that are files.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
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

    /// A device over a file, which can only be read.
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

/// A block device for direct I/O.
pub struct Disk {
    /// The device.
    pub device: LoopDevice,
    /// The file that holds its bytes.
    pub image: String,
}

impl Disk {
    /// Creates a disk of that many bytes, all zeros.
    pub fn new(bytes: u64) -> Result<Self> {
        let image = format!("/dev/shm/kdp-disk-{}", std::process::id());
        File::create(&image)?.set_len(bytes)?;
        let device = LoopDevice::of(&image)?;
        Ok(Self { device, image })
    }

    /// Opens the disk for direct I/O.
    pub fn open(&self) -> Result<File> {
        Ok(OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.device.path)?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // If this fails, the file that remains does not disturb the next test.
        let _ = fs::remove_file(&self.image);
    }
}

/// Swap space on a disk. The kernel uses it until this is dropped.
pub struct Swap(Disk);

impl Swap {
    /// Switches on swap space of that many bytes, beside its header.
    pub fn on(bytes: u64) -> Result<Self> {
        let disk = Disk::new(bytes + 4096)?;
        for command in ["mkswap", "swapon"] {
            let output = Command::new(command).arg(&disk.device.path).output()?;
            ensure!(output.status.success(), "{command}: {output:?}");
        }
        Ok(Self(disk))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // Ignore failures, as the drop of the loop device does.
        let _ = Command::new("swapoff").arg(&self.0.device.path).output();
    }
}

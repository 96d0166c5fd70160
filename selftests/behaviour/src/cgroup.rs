// SPDX-License-Identifier: GPL-2.0

//! Control groups (cgroup2): limits for processes of a test, and the kernel's counters of them.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::check::{skip, Result};
use crate::task::until;

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup with one controller. A drop moves its processes to the root cgroup, and removes the
/// cgroup.
pub struct Cgroup {
    path: PathBuf,
    /// The controller, if this cgroup has switched it on. A drop switches it off again.
    switched_on: Option<&'static str>,
}

impl Cgroup {
    /// Creates a cgroup without a process. Skips the test if there is no such controller.
    pub fn new(controller: &'static str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let has = |file: &str| {
            let text = fs::read_to_string(format!("{ROOT}/{file}"));
            text.is_ok_and(|all| all.split_whitespace().any(|word| word == controller))
        };
        if !has("cgroup.controllers") {
            return skip(format!("there is no cgroup2 with {controller}"));
        }
        let is_on = has("cgroup.subtree_control");
        if !is_on {
            fs::write(
                format!("{ROOT}/cgroup.subtree_control"),
                format!("+{controller}"),
            )?;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroup = Self {
            path: format!("{ROOT}/kdp-{}-{number}", std::process::id()).into(),
            switched_on: (!is_on).then_some(controller),
        };
        fs::create_dir(&cgroup.path)?;
        Ok(cgroup)
    }

    /// Moves this process into the cgroup, with all its threads.
    pub fn enter(&self) -> Result {
        self.set("cgroup.procs", std::process::id())
    }

    /// Writes a value to a file of the cgroup.
    pub fn set(&self, file: &str, value: impl ToString) -> Result {
        Ok(fs::write(self.path.join(file), value.to_string())?)
    }

    /// Reads the number in a file of the cgroup.
    pub fn number(&self, file: &str) -> Result<u64> {
        Ok(fs::read_to_string(self.path.join(file))?.trim().parse()?)
    }

    /// Reads the number of a key in a file that has a line for each key, such as memory.events.
    pub fn entry(&self, file: &str, key: &str) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(file))?;
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        match lines.find(|(name, _)| *name == key) {
            Some((_, value)) => Ok(value.trim().parse()?),
            None => fail!("{file} has no {key}:\n{text}"),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A cgroup that cannot be removed stays, but limits no process.
        let _ = until("the cgroup is removed", || {
            let processes = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
            for pid in processes.lines() {
                let _ = fs::write(format!("{ROOT}/cgroup.procs"), pid);
            }
            Ok(fs::remove_dir(&self.path).is_ok())
        });
        if let Some(controller) = self.switched_on {
            let _ = fs::write(
                format!("{ROOT}/cgroup.subtree_control"),
                format!("-{controller}"),
            );
        }
    }
}

//! Announces that the command is ready: by a file for scripts, by a message to the service manager.

use crate::{
    failure::{Context, Failure},
    systemd,
};
use std::{fs, path::PathBuf, process};

/// The announced readiness. The file holds the PID of this process until this value is dropped.
/// Drop removes the file, and tells the service manager that the command is about to end.
pub struct Ready(Option<PathBuf>);

impl Ready {
    /// Tell, if anybody wants to know. The file appears with its contents in it.
    pub fn tell(path: Option<&PathBuf>) -> Result<Self, Failure> {
        if let Some(path) = path {
            let mut part = path.clone().into_os_string();
            part.push(".part");
            fs::write(&part, format!("{}\n", process::id()))
                .and_then(|()| fs::rename(&part, path))
                .on(format_args!(
                    "cannot write the ready file {}",
                    path.display()
                ))?;
        }
        systemd::ready();
        Ok(Self(path.cloned()))
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        systemd::stopping();
        if let Some(path) = &self.0 {
            // The reader may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

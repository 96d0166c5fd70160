//! The file that tells a script that the command is ready.

use crate::failure::{Context, Failure};
use std::{fs, path::PathBuf, process};

/// Holds the PID of this process while it is ready; removed when it is dropped.
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
        Ok(Self(path.cloned()))
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // The reader may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

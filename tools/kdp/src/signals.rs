//! SIGTERM and SIGINT end the command, SIGUSR1 makes it tell what it has counted.

use crate::failure::{Context, Failure};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    iterator::Signals,
};
use std::thread;

/// Call `end` at the first SIGTERM or SIGINT and `tell` at every SIGUSR1, on a thread of their own.
pub fn watch(
    end: impl FnOnce() + Send + 'static,
    tell: impl Fn() + Send + 'static,
) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).on("cannot watch for signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGUSR1 => tell(),
                _ => return end(),
            }
        }
    });
    Ok(())
}

//! The serial port: the guest's console.

use std::io::{self, Write};

use vm_superio::serial::{Error as SerialError, NoEvents};
use vm_superio::{Serial, SerialState};

use super::interrupt::Interrupt;
use crate::error::{Error, Result};

/// Where a guest's console goes.
pub type Console = Box<dyn Write + Send>;

/// The port.
pub(crate) struct SerialPort(Serial<Interrupt, NoEvents, Console>);

impl SerialPort {
    /// One in this state.
    pub(super) fn new(interrupt: Interrupt, console: Console, state: &SerialState) -> Result<Self> {
        Serial::from_state(state, interrupt, NoEvents, console)
            .map(Self)
            .map_err(failed)
    }

    pub(super) fn state(&self) -> SerialState {
        self.0.state()
    }

    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    pub(crate) fn write(&mut self, register: u8, value: u8) -> Result<()> {
        self.0.write(register, value).map_err(failed)
    }
}

fn failed(error: SerialError<io::Error>) -> Error {
    match error {
        SerialError::Trigger(e) => Error::os("KVM_IRQ_LINE, the serial port's", e),
        SerialError::IOError(e) => Error::os("write what the guest's console says", e),
        SerialError::FullFifo => Error::invalid("more input than the serial port has room for"),
    }
}

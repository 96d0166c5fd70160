// SPDX-License-Identifier: GPL-2.0

//! How a test says what is wrong.

use std::error::Error;
use std::fmt;
use std::panic::Location;

/// Why a test did not pass.
pub enum Fail {
    /// It cannot be run here.
    Skip(String),
    /// What was expected is not so.
    Wrong(String),
}

/// The result of a test, and of most of what it calls.
pub type Result<T = ()> = std::result::Result<T, Fail>;

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skip(why) | Self::Wrong(why) => f.write_str(why),
        }
    }
}

impl<E: Error> From<E> for Fail {
    #[track_caller]
    fn from(error: E) -> Self {
        Self::Wrong(format!("{}: {error}", Location::caller()))
    }
}

/// Ends a test that cannot be run here.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Fail::Skip(why.into()))
}

/// Fails the test.
macro_rules! fail {
    ($($arg:tt)+) => {
        return Err($crate::check::Fail::Wrong(
            format!("{}:{}: {}", file!(), line!(), format_args!($($arg)+))
        ))
    };
}

/// Fails the test unless the condition holds.
macro_rules! ensure {
    ($cond:expr, $($arg:tt)+) => {
        if !$cond {
            fail!($($arg)+)
        }
    };
}

/// Fails the test unless both are equal.
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($arg:tt)+) => {
        match (&$left, &$right) {
            (left, right) => {
                if *left != *right {
                    fail!("{}: {:?}, not {:?}", format_args!($($arg)+), left, right)
                }
            }
        }
    };
}

//! How a VMM is told to migrate, and says how it goes: lines of JSON over a Unix socket, a command and then its replies.
//!
//! ```text
//!   {"command":"migrate","to":"host:4444","bandwidth":100000000}
//!   {"reply":"progress","phase":"pre-copy","round":1,"pages":32768,"remaining":20000,"bytes":52297728}
//!   …
//!   {"reply":"moved","id":"…",…}
//! ```
//!
//! Who closes the socket no longer hears how a migration goes. The migration goes on.

use crate::{DestinationReport, Failure, Guest, Phase, Progress, SourceReport};
use serde::{de::DeserializeOwned, Deserialize, Serialize};
use std::io::{self, BufRead, Read, Write};

/// The longest line that is read: a report is a few hundred bytes.
const LONGEST: u64 = 1 << 20;

/// What a VMM is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Move the guest. The replies are [`Reply::Progress`], as often as there is some, and one of [`Reply::Moved`] and
    /// [`Reply::Failed`].
    Migrate(Order),
    /// The reply is [`Reply::Status`].
    Status,
    /// End the VMM, and its guest. The reply is [`Reply::Done`].
    Quit,
}

/// A migration, as it is wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// HOST:PORT of the VMM that waits for the guest.
    pub to: String,
    /// Bytes a second; `None`: no limit.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Pre-copy ends when the rest can be sent in so many milliseconds; `None`: see [`Rule`](crate::rounds::Rule).
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// Rounds of pre-copy at most, 0: none; `None`: see [`Rule`](crate::rounds::Rule).
    #[serde(default)]
    pub rounds: Option<u32>,
    /// Do not ask the guest which pages are free.
    #[serde(default)]
    pub no_hints: bool,
    /// Seconds after which a connection that cannot be had again is given up; `None`: see
    /// [`SourceOptions`](crate::SourceOptions).
    #[serde(default)]
    pub give_up_s: Option<f64>,
}

/// Where a VMM's guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whereabouts {
    /// It has not come yet.
    Awaited,
    /// It runs here.
    Here,
    /// It was handed over to another VMM, or may have been.
    Gone,
    /// It is stopped here for good.
    Stopped,
}

/// What a VMM says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Where its guest is.
    pub guest: Whereabouts,
    /// Where it waits for a guest.
    pub listening: Option<String>,
    /// The process that places its pages, if that is another one.
    pub handler: Option<u32>,
    /// How far the migration is that is under way, or was the last one.
    pub progress: Option<Progress>,
    /// How its guest came here, when all of it is here.
    pub arrival: Option<DestinationReport>,
    /// Why the last migration failed, to here or from here.
    pub failure: Option<String>,
}

/// What a VMM answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// How far it is.
    Progress(Progress),
    /// The guest is at its destination with all of its pages.
    Moved(SourceReport),
    /// It is not, or may not be.
    Failed {
        /// Why.
        error: String,
        /// Where it is.
        guest: Guest,
    },
    /// How it is.
    Status(Status),
    /// It is done.
    Done,
    /// Nothing was done.
    Refused {
        /// Why.
        why: String,
    },
}

impl From<Result<SourceReport, Failure>> for Reply {
    fn from(result: Result<SourceReport, Failure>) -> Self {
        match result {
            Ok(report) => Self::Moved(report),
            Err(Failure { error, guest }) => Self::Failed {
                error: error.to_string(),
                guest,
            },
        }
    }
}

impl Progress {
    /// At this phase, and nothing done.
    pub fn at(phase: Phase, pages: u64) -> Self {
        Self {
            phase,
            round: 0,
            pages,
            remaining: pages,
            bytes: 0,
        }
    }
}

/// Send a command, or a reply.
pub fn send(mut to: impl Write, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    to.write_all(&text)?;
    to.flush()
}

/// Receive the next one; `None`: the other side has closed its end.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`]: it is none, and the text says why.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    if from.take(LONGEST).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_through() {
        let mut wire = Vec::new();
        let order = Order {
            to: "localhost:1".into(),
            bandwidth: Some(5),
            downtime_ms: None,
            rounds: Some(0),
            no_hints: true,
            give_up_s: Some(0.5),
        };
        let sent = [Command::Migrate(order), Command::Status, Command::Quit];
        for command in &sent {
            send(&mut wire, command).unwrap();
        }
        let mut from = wire.as_slice();
        for command in sent {
            assert_eq!(receive(&mut from).unwrap(), Some(command));
        }
        assert_eq!(receive::<Command>(&mut from).unwrap(), None);
        let reply = Reply::Moved(SourceReport::default());
        let mut wire = Vec::new();
        send(&mut wire, &reply).unwrap();
        assert_eq!(receive(&mut wire.as_slice()).unwrap(), Some(reply));
    }

    #[test]
    fn what_is_left_out_has_a_default_and_what_is_unknown_is_refused() {
        let receive = |text: &str| receive::<Command>(&mut text.as_bytes());
        let command = receive(r#"{"command":"migrate","to":"a:1"}"#).unwrap();
        assert!(
            matches!(command, Some(Command::Migrate(order)) if order.bandwidth.is_none() && !order.no_hints)
        );
        for bad in [
            r#"{"command":"fly"}"#,
            r#"{"command":"migrate"}"#,
            r#"{"command":"migrate","to":"a:1","spped":1}"#,
            "nonsense",
        ] {
            let error = receive(bad).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bad}");
        }
    }
}

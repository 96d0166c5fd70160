//! What a migration has done, and does.

use crate::{rounds::Why, wire::Figures};

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// There is no connection yet.
    Connecting,
    /// The guest runs at the source, and is copied.
    PreCopy,
    /// It runs nowhere.
    Switch,
    /// It runs at the destination, and its pages follow.
    PostCopy,
    /// All is there.
    Done,
}

impl Phase {
    /// As it is written for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::PreCopy => "pre-copy",
            Self::Switch => "switch",
            Self::PostCopy => "post-copy",
            Self::Done => "done",
        }
    }
}

/// What a progress callback is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// How far it is.
    pub phase: Phase,
    /// Which round of pre-copy, from 1.
    pub round: u32,
    /// Pages of the guest.
    pub pages: u64,
    /// At the source: pages that are to be sent still. At the destination: pages that it has not.
    pub remaining: u64,
    /// Bytes that went over the wire.
    pub bytes: u64,
}

/// Pages by how they travelled. A page that was sent twice counts twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Paths {
    /// In pre-copy.
    pub precopy: u64,
    /// After the guest had stopped, because somebody waited for them.
    pub requested: u64,
    /// After the guest had stopped, with nobody waiting.
    pub background: u64,
    /// Of all those, pages of zeros: they travel as a word.
    pub zero: u64,
    /// Of all those, pages that are lost at the source.
    pub lost: u64,
}

/// What a source was told by the destination at the end: figures that only that one knows. They are those of its
/// [`DestinationReport`], so of the last one if its engine was replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DestinationFigures {
    /// Pages that somebody touched and had to wait for.
    pub faults: u64,
    /// From a touch to the page: the median, in microseconds.
    pub fault_p50_us: u64,
    /// The same, the 99th percentile.
    pub fault_p99_us: u64,
    /// The same, the longest.
    pub fault_max_us: u64,
    /// Pages that came when they were present already, and were left as they are.
    pub pages_too_late: u64,
    /// From the order to run to the last page, in milliseconds.
    pub postcopy_ms: f64,
}

impl From<Figures> for DestinationFigures {
    fn from(figures: Figures) -> Self {
        Self {
            faults: figures.faults,
            fault_p50_us: figures.fault_p50_us,
            fault_p99_us: figures.fault_p99_us,
            fault_max_us: figures.fault_max_us,
            pages_too_late: figures.pages_too_late,
            postcopy_ms: figures.postcopy_us as f64 / 1000.0,
        }
    }
}

/// What a source has done.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SourceReport {
    /// The migration's id.
    pub id: String,
    /// Pages of the guest.
    pub pages: u64,
    /// Pages by path.
    pub sent: Paths,
    /// Pages that never travelled in their last state, since the guest had hinted that they are free.
    pub pages_hinted_free: u64,
    /// Pages in hints that counted.
    pub hints_counted: u64,
    /// Pages in hints that came too late, and did not.
    pub hints_stale: u64,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// Why pre-copy ended; `None` if there was none.
    pub precopy_ended: Option<Why>,
    /// Bytes of pages, with what the protocol adds, up to the switch.
    pub bytes_precopy: u64,
    /// The same after the guest had stopped.
    pub bytes_postcopy: u64,
    /// All bytes that were sent.
    pub bytes_sent: u64,
    /// Bytes of the state of vCPUs and devices.
    pub bytes_state: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// From the beginning until the guest stopped, in milliseconds.
    pub precopy_ms: f64,
    /// From the guest's stop until the destination told that it runs.
    pub downtime_ms: f64,
    /// From the beginning until the destination had all.
    pub total_ms: f64,
    /// What the destination told at the end.
    pub destination: DestinationFigures,
}

/// What a destination has done.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DestinationReport {
    /// The migration's id.
    pub id: String,
    /// Pages of the guest.
    pub pages: u64,
    /// Pages by path.
    pub received: Paths,
    /// Pages that are zero because the guest had hinted that they are free.
    pub pages_hinted_free: u64,
    /// Pages that came when they were present already, and were left as they are.
    pub pages_too_late: u64,
    /// Bytes that came.
    pub bytes_received: u64,
    /// Pages that somebody touched and had to wait for.
    pub faults: u64,
    /// From a touch to the page: the median, in microseconds.
    pub fault_p50_us: u64,
    /// The same, the 99th percentile.
    pub fault_p99_us: u64,
    /// The same, the longest.
    pub fault_max_us: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// From the order to run to the last page, in milliseconds; from its own beginning if it replaced another engine.
    pub postcopy_ms: f64,
    /// From the first connection to the last page.
    pub total_ms: f64,
}

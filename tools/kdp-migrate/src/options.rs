//! What can be chosen.

use crate::{rounds::Rule, wire::MigrationId};
use std::time::Duration;

/// How a source behaves.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Which migration this is; `None`: a random one is made.
    pub id: Option<MigrationId>,
    /// When pre-copy ends.
    pub rounds: Rule,
    /// Bytes a second; requested pages do not wait for it, but are counted. `None`: no limit.
    pub bandwidth: Option<u64>,
    /// How long the guest is given to hint before the first page is sent.
    pub hint_lead: Duration,
    /// Bytes that may be on their way.
    pub window: u64,
    /// How much later a requested page may come because of those that nobody asked for; or a quarter of what it takes without
    /// them, if that is more ([`ledbat`](crate::ledbat)).
    pub postcopy_delay: Duration,
    /// A connection over which nothing comes for so long is broken.
    pub stall: Duration,
    /// After so long without a connection that works it is over.
    pub give_up: Duration,
    /// How long the guest may be stopped before the destination is ready to take it; then it runs on here.
    pub switch_timeout: Duration,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            id: None,
            rounds: Rule::default(),
            bandwidth: None,
            hint_lead: Duration::from_millis(200),
            window: 8 << 20,
            postcopy_delay: Duration::from_millis(1),
            stall: Duration::from_secs(5),
            give_up: Duration::from_secs(60),
            switch_timeout: Duration::from_secs(10),
        }
    }
}

/// How a destination behaves.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// The one migration that is taken; `None`: the first that comes.
    pub id: Option<MigrationId>,
    /// How long the first connection is waited for; `None`: for ever.
    pub first: Option<Duration>,
    /// A connection over which nothing comes for so long is broken.
    pub stall: Duration,
    /// A page that was asked for and does not come for so long is asked for again, over a new connection.
    pub answer: Duration,
    /// After so long without a connection, or without a page that was asked for, it is over: if the guest runs, it is
    /// stopped with an error.
    pub give_up: Duration,
    /// The largest state of vCPUs and devices, in bytes.
    pub max_state: usize,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            id: None,
            first: None,
            stall: Duration::from_secs(5),
            answer: Duration::from_secs(5),
            give_up: Duration::from_secs(60),
            max_state: 64 << 20,
        }
    }
}

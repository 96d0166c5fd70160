//! When pre-copy ends.

use std::time::Duration;

/// What the decision is made by.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// If what remains can be sent in this time, another round gains nothing.
    pub downtime: Duration,
    /// Rounds at most; 0: post-copy from the first page on.
    pub max_rounds: u32,
    /// A round must leave less than this share of what the one before left, else it did not help.
    pub must_shrink_to: f64,
    /// After so many rounds in a row that did not help it ends.
    pub patience: u32,
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(100),
            max_rounds: 8,
            must_shrink_to: 0.8,
            patience: 2,
        }
    }
}

/// Why pre-copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// What remains can be sent within the allowed downtime.
    Small,
    /// Rounds do not shrink: the guest writes as fast as pages are sent.
    NoProgress,
    /// There were as many rounds as are allowed.
    Enough,
}

/// The rounds so far.
#[derive(Clone, Debug)]
pub struct Rounds {
    rule: Rule,
    done: u32,
    in_vain: u32,
    left: Option<u64>,
}

impl Rounds {
    /// Before the first round.
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            done: 0,
            in_vain: 0,
            left: None,
        }
    }

    /// Rounds that have been sent.
    pub fn done(&self) -> u32 {
        self.done
    }

    /// Whether there is to be a first one.
    pub fn none_wanted(&self) -> bool {
        self.rule.max_rounds == 0
    }

    /// A round was sent, and the log harvested: `bytes` are to be sent now, at `per_second` as measured in the round.
    /// Whether pre-copy ends.
    pub fn ended(&mut self, bytes: u64, per_second: f64) -> Option<Why> {
        self.done += 1;
        let helped = match self.left.replace(bytes) {
            Some(before) => (bytes as f64) < before as f64 * self.rule.must_shrink_to,
            None => true,
        };
        self.in_vain = if helped { 0 } else { self.in_vain + 1 };
        if bytes as f64 <= per_second * self.rule.downtime.as_secs_f64() {
            Some(Why::Small)
        } else if self.in_vain >= self.rule.patience.max(1) {
            Some(Why::NoProgress)
        } else if self.done >= self.rule.max_rounds {
            Some(Why::Enough)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_quiet_guest_ends_it_at_once_and_a_busy_one_soon() {
        let mut quiet = Rounds::new(Rule::default());
        assert_eq!(quiet.ended(10 << 20, 100e6), None);
        assert_eq!(quiet.ended(9 << 20, 100e6), Some(Why::Small));
        let mut busy = Rounds::new(Rule::default());
        assert_eq!(busy.ended(1 << 30, 100e6), None);
        assert_eq!(busy.ended(1 << 30, 100e6), None);
        assert_eq!(busy.ended(1 << 30, 100e6), Some(Why::NoProgress));
        let mut slow = Rounds::new(Rule {
            max_rounds: 2,
            ..Rule::default()
        });
        assert_eq!(slow.ended(1 << 30, 100e6), None);
        assert_eq!(slow.ended(1 << 29, 100e6), Some(Why::Enough));
        assert!(!slow.none_wanted());
    }

    proptest! {
        #[test]
        fn it_always_ends(left in prop::collection::vec(any::<u64>(), 20), per_second in 0.0f64..1e9, max_rounds in 1u32..20) {
            let mut rounds = Rounds::new(Rule { max_rounds, ..Rule::default() });
            let ended = left.iter().position(|left| rounds.ended(*left, per_second).is_some());
            prop_assert!(ended.is_some_and(|at| (at as u32) < max_rounds));
        }
    }
}

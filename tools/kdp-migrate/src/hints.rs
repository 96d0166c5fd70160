//! What a free-page hint is worth: the rule that a page written after its hint was given is always sent.
//!
//! A guest hints that a page is free, so that it need not be sent. The hint tells of a moment: by the time it is
//! processed the page may long be in use again, and written. Three parties meet there: the hint, which says "do not
//! send"; the dirty log, which says "send"; and the bitmap of what is to be sent, in which both are written down and
//! the later one wins. It must be the dirty log. Hence **the rule**:
//!
//! 1. Writes are logged before the first epoch is published.
//! 2. An epoch is published after a harvest of the dirty log has ended, and withdrawn before the next one begins.
//! 3. A hint names the epoch that the guest had seen *before it found the page free*.
//! 4. A hint counts only if its epoch is the current one when it is processed, and no harvest can begin between
//!    that look and the change of the bitmap.
//! 5. No epoch is used twice in a guest's life: not in the next round, and not by the next migration, when this one
//!    failed and its hints are still in the queue.
//! 6. The last harvest, with the guest stopped, comes after the last epoch is withdrawn.
//!
//! Why it suffices: let a hint count. Its page was free at some time after the epoch was published (3), so after the
//! last harvest had ended (2). What the bitmap knows of the page is from that harvest or an earlier one, since none has
//! begun since (4): it tells of writes *before* the page was free, which nobody will read. What was written after is
//! in the log still (1), and the next harvest, of which there is at least one (6), puts the page back.
//!
//! The race of 2019 is what happens without 4; tests/hint.rs finds it, and one like it for each of the points.
//!
//! 4 is kept by ownership: [`Gate`] is changed by `&mut`, by the thread that harvests and that alone.

use kvm_demand_paging::PageRange;

/// A time between two harvests of the dirty log. For virtio-balloon it is the command id that the device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u32);

/// What a guest said of some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hint {
    /// The epoch that the guest had seen before it found them free.
    pub epoch: Epoch,
    /// The pages.
    pub pages: PageRange,
}

/// Which hints count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Gate {
    current: Option<Epoch>,
    last: Option<Epoch>,
}

/// The epoch was used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reused(pub Epoch);

impl Gate {
    /// No epoch is current: no hint counts.
    pub fn new() -> Self {
        Self::default()
    }

    /// A harvest has ended, and the guest is shown a new epoch.
    ///
    /// # Errors
    ///
    /// One that was published before is refused: hints that were given then would count.
    pub fn publish(&mut self, epoch: Epoch) -> Result<(), Reused> {
        if self.last == Some(epoch) || self.current.is_some() {
            return Err(Reused(epoch));
        }
        self.current = Some(epoch);
        self.last = Some(epoch);
        Ok(())
    }

    /// A harvest is about to begin, or the guest to stop.
    pub fn withdraw(&mut self) {
        self.current = None;
    }

    /// Whether a hint counts now.
    pub fn counts(&self, hint: &Hint) -> bool {
        self.current == Some(hint.epoch)
    }

    /// The epoch whose hints count.
    pub fn current(&self) -> Option<Epoch> {
        self.current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hints_of_the_current_epoch_count() {
        let hint = |epoch| Hint {
            epoch: Epoch(epoch),
            pages: PageRange::page(0),
        };
        let mut gate = Gate::new();
        assert!(!gate.counts(&hint(2)));
        assert_eq!(gate.publish(Epoch(2)), Ok(()));
        assert!(gate.counts(&hint(2)));
        assert!(!gate.counts(&hint(1)));
        assert_eq!(gate.publish(Epoch(3)), Err(Reused(Epoch(3))));
        gate.withdraw();
        assert!(!gate.counts(&hint(2)));
        assert_eq!(gate.publish(Epoch(2)), Err(Reused(Epoch(2))));
        assert_eq!(gate.publish(Epoch(3)), Ok(()));
        assert!(!gate.counts(&hint(2)) && gate.counts(&hint(3)));
    }
}

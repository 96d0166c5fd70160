//! A limit of bandwidth: a token bucket.

use std::time::Duration;

/// Tokens are bytes. Time is what the caller says since some moment of its own.
#[derive(Clone, Debug)]
pub struct Bucket {
    // None: no limit.
    per_second: Option<f64>,
    burst: f64,
    tokens: f64,
    at: Duration,
}

impl Bucket {
    /// `per_second` bytes on average, and up to `burst` at once; `None`: as fast as it goes.
    pub fn new(per_second: Option<u64>, burst: u64) -> Self {
        Self {
            per_second: per_second.map(|bytes| (bytes as f64).max(1.0)),
            burst: burst as f64,
            tokens: burst as f64,
            at: Duration::ZERO,
        }
    }

    /// How long nothing may be sent; zero: now.
    pub fn wait(&mut self, now: Duration) -> Duration {
        let Some(per_second) = self.per_second else {
            return Duration::ZERO;
        };
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * per_second).min(self.burst);
        match self.tokens {
            // A day at most: no debt makes anybody wait for longer than a link is alive.
            debt if debt < 0.0 => Duration::from_secs_f64((-debt / per_second).min(86_400.0)),
            _ => Duration::ZERO,
        }
    }

    /// So many bytes were sent. Who must send at once, as an answer to a request, does not wait but is counted: what is
    /// not urgent pays for it.
    pub fn spend(&mut self, bytes: u64) {
        if self.per_second.is_some() {
            self.tokens -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_limit_holds(per_second in 1_000u64..10_000_000, burst in 1u64..1_000_000, sends in prop::collection::vec(1u64..300_000, 1..50)) {
            let mut bucket = Bucket::new(Some(per_second), burst);
            let (mut now, mut sent) = (Duration::ZERO, 0);
            for bytes in &sends {
                now += bucket.wait(now) + Duration::from_nanos(1);
                prop_assert_eq!(bucket.wait(now), Duration::ZERO);
                // Everything before this send is inside the limit.
                let allowed = burst as f64 + per_second as f64 * (now.as_secs_f64() + 1e-6) + 1.0;
                prop_assert!(sent as f64 <= allowed, "{sent} of {allowed}");
                bucket.spend(*bytes);
                sent += bytes;
            }
        }
    }

    #[test]
    fn no_limit() {
        let mut bucket = Bucket::new(None, 0);
        bucket.spend(u64::MAX);
        assert_eq!(bucket.wait(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn urgent_bytes_are_paid_by_the_others() {
        let mut bucket = Bucket::new(Some(1000), 10);
        bucket.spend(1010);
        assert_eq!(bucket.wait(Duration::ZERO), Duration::from_secs(1));
        assert_eq!(bucket.wait(Duration::from_secs(2)), Duration::ZERO);
    }
}

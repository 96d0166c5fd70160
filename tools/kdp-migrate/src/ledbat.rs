//! How much may be on its way in the background, so that a page that is asked for does not wait long behind it.
//!
//! Frames arrive and are placed in the order in which they were sent, so a request waits for all that was sent before its
//! answer. The time from a frame's sending to its ack has a part that is always there (the way, the placing) and a part that
//! it waits behind others; the window grows while the second is below a target, and shrinks above it: LEDBAT, RFC 6817.
//! The target is at least a quarter of the first part: where CPUs are slow, acks vary by as much without any queue.
//! Unlike a fixed window it is right for a slow link, on which little is much, and for a long one, on which much is little.

use std::collections::VecDeque;
use std::time::Duration;

/// Acks of which the least delay counts, so that one late ack is no queue (CURRENT_FILTER, RFC 6817, section 2.4).
const FILTER: usize = 4;

/// Intervals over which the delay that is always there is remembered, and the length of one (BASE_HISTORY).
const HISTORY: usize = 10;
const INTERVAL: Duration = Duration::from_secs(6);

/// Frames on their way at first. The guest asks for most when it begins, so they are few.
const FIRST: u64 = 4;

/// Frames on their way at least: one is acked while another one comes.
const LEAST: u64 = 2;

/// The target is such a part of the delay that is always there, if that is more than what it was set to.
const PART: u32 = 4;

/// By so many frames the window grows in the time of one window, at most: ALLOWED_INCREASE and GAIN.
const STEP: u64 = 4;

/// The window is halved in the time of one window, at most.
const MOST_AT_ONCE: f64 = 0.5;

/// A window. Time is what the caller says since some moment of its own.
#[derive(Clone, Debug)]
pub struct Ledbat {
    target: Duration,
    frame: u64,
    most: u64,
    window: f64,
    // Frames that were sent and not acked: when, and their bytes.
    flights: VecDeque<(Duration, u64)>,
    // The last delays, the newest last.
    last: VecDeque<Duration>,
    // The least delay of each interval, the newest last; and when that one began.
    base: VecDeque<Duration>,
    began: Duration,
}

impl Ledbat {
    /// Frames shall wait behind others for `target`, or for a quarter of what they take anyway if that is more, with at
    /// most `most` bytes on their way. What is learned is learned from frames of at least `frame` bytes: smaller ones are
    /// there sooner, also if nothing is before them.
    pub fn new(target: Duration, frame: u64, most: u64) -> Self {
        let frame = frame.max(1);
        Self {
            target: target.max(Duration::from_micros(1)),
            frame,
            most: most.max(FIRST * frame),
            window: (FIRST * frame) as f64,
            flights: VecDeque::new(),
            last: VecDeque::new(),
            base: VecDeque::new(),
            began: Duration::ZERO,
        }
    }

    /// Bytes that may be on their way.
    pub fn window(&self) -> u64 {
        self.window as u64
    }

    /// A frame is sent.
    pub fn sent(&mut self, bytes: u64, now: Duration) {
        self.flights.push_back((now, bytes));
    }

    /// The next `frames` frames have come.
    pub fn acked(&mut self, frames: u64, now: Duration) {
        for _ in 0..frames {
            let Some((sent, bytes)) = self.flights.pop_front() else {
                return;
            };
            if bytes >= self.frame {
                self.learn(now.saturating_sub(sent), now);
                self.adjust(bytes);
            }
        }
    }

    /// The connection is another one: its delays are its own, and nothing is on its way.
    pub fn reconnected(&mut self) {
        *self = Self::new(self.target, self.frame, self.most);
    }

    fn learn(&mut self, delay: Duration, now: Duration) {
        if self.last.len() == FILTER {
            self.last.pop_front();
        }
        self.last.push_back(delay);
        if self.base.is_empty() || now.saturating_sub(self.began) >= INTERVAL {
            self.began = now;
            if self.base.len() == HISTORY {
                self.base.pop_front();
            }
            self.base.push_back(delay);
        } else if let Some(least) = self.base.back_mut() {
            *least = delay.min(*least);
        }
    }

    fn adjust(&mut self, acked: u64) {
        let least = |delays: &VecDeque<Duration>| delays.iter().min().copied().unwrap_or_default();
        let base = least(&self.base);
        // How long frames wait behind others.
        let queueing = least(&self.last).saturating_sub(base);
        let target = self.target.max(base / PART);
        let off = 1.0 - queueing.as_secs_f64() / target.as_secs_f64();
        let share = (acked as f64 / self.window).min(1.0);
        self.window += share
            * if off >= 0.0 {
                off * (STEP * self.frame) as f64
            } else {
                off.max(-MOST_AT_ONCE) * self.window
            };
        self.window = self
            .window
            .clamp((LEAST * self.frame) as f64, self.most as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: u64 = 16 << 10;
    const MOST: u64 = 8 << 20;
    const TARGET: Duration = Duration::from_millis(5);

    /// A link: a frame takes `way` and its bytes at `rate` a second, behind those before it.
    struct Link {
        way: Duration,
        rate: f64,
        free: Duration,
    }

    impl Link {
        /// From this moment on.
        fn new(way_us: u64, rate: f64, free: Duration) -> Self {
            Self {
                way: Duration::from_micros(way_us),
                rate,
                free,
            }
        }

        fn takes(&self, bytes: u64) -> Duration {
            Duration::from_secs_f64(bytes as f64 / self.rate)
        }

        /// When the ack of a frame is here that is sent now.
        fn ack(&mut self, bytes: u64, now: Duration) -> Duration {
            self.free = self.free.max(now) + self.takes(bytes);
            self.free + self.way
        }
    }

    /// Send for so long what the window allows: bytes that were acked in the second half of the time, and the longest
    /// that a frame had to wait behind others in it.
    fn run(ledbat: &mut Ledbat, link: &mut Link, seconds: u64) -> (u64, Duration) {
        let (mut now, mut done, mut waited) = (link.free, 0, Duration::ZERO);
        let end = now + Duration::from_secs(seconds);
        let half = end - Duration::from_secs(seconds) / 2;
        let mut acks: VecDeque<(Duration, u64)> = VecDeque::new();
        let mut on_its_way = 0;
        while now < end {
            let frame = (ledbat.window() / 16).clamp(FRAME, 4 * FRAME);
            if on_its_way < ledbat.window() {
                if now >= half {
                    waited = waited.max(link.free.saturating_sub(now));
                }
                acks.push_back((link.ack(frame, now), frame));
                ledbat.sent(frame, now);
                on_its_way += frame;
                continue;
            }
            let (at, bytes) = acks.pop_front().unwrap();
            now = now.max(at);
            on_its_way -= bytes;
            ledbat.acked(1, now);
            if now >= half {
                done += bytes;
            }
        }
        // All of them arrive.
        for (at, _) in acks {
            ledbat.acked(1, at);
        }
        (done, waited)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What a request waits behind stays near the target, and the link is not left idle.
        #[test]
        fn a_link_is_used_and_nobody_waits_long(way_us in 50u64..20_000, mbit in 20u64..10_000) {
            let rate = mbit as f64 * 125_000.0;
            let (mut ledbat, mut link) = (Ledbat::new(TARGET, FRAME, MOST), Link::new(way_us, rate, Duration::ZERO));
            let (done, waited) = run(&mut ledbat, &mut link, 10);
            // One frame more than the window, and the delay of a whole window until it is seen. Of larger frames the delay
            // that is always there is larger, too.
            let target = TARGET.max((link.way + link.takes(4 * FRAME)) / PART);
            let allowed = 2 * target + link.takes((LEAST + 5) * FRAME);
            prop_assert!(waited <= allowed, "waited {waited:?} of {allowed:?}");
            let possible = (rate * 5.0).min(MOST as f64 * 5.0 / link.way.as_secs_f64());
            prop_assert!(done as f64 >= 0.8 * possible, "{done} of {possible}");
        }

        #[test]
        fn the_window_stays_within_its_limits(delays in prop::collection::vec(0u64..1_000_000, 1..200)) {
            let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
            let mut now = Duration::ZERO;
            for delay in delays {
                ledbat.sent(FRAME, now);
                now += Duration::from_micros(delay);
                ledbat.acked(1, now);
                prop_assert!((LEAST * FRAME..=MOST).contains(&ledbat.window()));
            }
            ledbat.acked(9, now);
        }
    }

    #[test]
    fn a_link_that_became_slower_has_less_on_its_way() {
        let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
        let mut link = Link::new(1000, 1e9, Duration::ZERO);
        run(&mut ledbat, &mut link, 5);
        let before = ledbat.window();
        link.rate = 1e8;
        let (_, waited) = run(&mut ledbat, &mut link, 5);
        assert!(waited <= 2 * TARGET + link.takes(4 * FRAME), "{waited:?}");
        assert!(
            ledbat.window() < before / 2,
            "{} of {before}",
            ledbat.window()
        );
    }

    #[test]
    fn acks_that_vary_by_themselves_are_no_queue() {
        let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
        // A slow CPU: from 40 ms to 55 ms, whatever is on its way.
        for n in 0..1000u64 {
            let now = Duration::from_millis(60 * n);
            ledbat.sent(FRAME, now);
            ledbat.acked(1, now + Duration::from_millis(40 + n / 4 * 7 % 16));
        }
        assert!(ledbat.window() > 2 * FIRST * FRAME, "{}", ledbat.window());
    }

    #[test]
    fn a_way_that_became_longer_is_no_queue_for_ever() {
        let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
        run(&mut ledbat, &mut Link::new(100, 1e8, Duration::ZERO), 5);
        let mut longer = Link::new(50_000, 1e8, Duration::from_secs(6));
        let (done, _) = run(
            &mut ledbat,
            &mut longer,
            4 * HISTORY as u64 * INTERVAL.as_secs(),
        );
        let possible = 1e8 * 2.0 * HISTORY as f64 * INTERVAL.as_secs_f64();
        assert!(done as f64 > 0.8 * possible, "{done} of {possible}");
    }

    #[test]
    fn a_new_connection_is_learned_anew() {
        let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
        run(&mut ledbat, &mut Link::new(100, 1e9, Duration::ZERO), 2);
        assert!(ledbat.window() > FIRST * FRAME);
        ledbat.reconnected();
        assert_eq!(ledbat.window(), FIRST * FRAME);
        // Nothing of the old one is acked any more.
        ledbat.acked(1, Duration::from_secs(3));
        assert_eq!(ledbat.window(), FIRST * FRAME);
    }

    #[test]
    fn small_frames_teach_nothing() {
        let mut ledbat = Ledbat::new(TARGET, FRAME, MOST);
        let mut link = Link::new(1000, 1e8, Duration::ZERO);
        run(&mut ledbat, &mut link, 5);
        let before = ledbat.window();
        // As if each of them had an empty link to itself.
        for n in 0..1000 {
            let now = link.free + Duration::from_millis(n);
            ledbat.sent(FRAME / 4, now);
            ledbat.acked(1, now + Duration::from_micros(1));
        }
        assert_eq!(ledbat.window(), before);
        link.free += Duration::from_secs(1);
        run(&mut ledbat, &mut link, 5);
        assert!(
            ledbat.window() > before / 2,
            "{} of {before}",
            ledbat.window()
        );
    }
}

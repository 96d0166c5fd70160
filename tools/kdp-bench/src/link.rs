//! A link between the contents and whoever fetches them, simulated by its serialization delay.
//!
//! A token bucket that holds nothing: the link sends one bit after another, at its rate, from the moment at which
//! something is asked for. What was asked for is there when its last bit is there, in pieces of 64 KiB that are
//! copied as they come, so that a fetch of a huge page overlaps its copy with its transfer. There is no latency
//! beside that, no protocol, and no loss: they would cost every mode the same for each fetch.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kdp_vmm::{Error, Image, Source, PAGE_SIZE};
use kvm_demand_paging::PageRange;
use vm_memory::volatile_memory::VolatileSlice;

/// Pages in a piece.
const PIECE: u64 = 16;

/// What is shorter is not slept through but spun through, because sleeping takes as long.
const SLEEP: Duration = Duration::from_millis(2);

/// An image at the other end of a link.
pub struct Link {
    image: Image,
    ns_per_page: u64,
    /// When the link has sent all that it was asked for.
    idle_at: Mutex<Instant>,
}

impl Link {
    pub fn new(image: Image, gbit: u64) -> Self {
        Self {
            image,
            // A Gbit/s is a bit each nanosecond.
            ns_per_page: PAGE_SIZE * 8 / gbit.max(1),
            idle_at: Mutex::new(Instant::now()),
        }
    }

    /// Microseconds that this many bytes take, and nothing else.
    pub fn us(bytes: u64, gbit: u64) -> f64 {
        bytes as f64 * 8.0 / (gbit as f64 * 1e3)
    }
}

impl Source for Link {
    fn pages(&self) -> u64 {
        self.image.pages()
    }

    fn fetch(&self, pages: PageRange, to: &VolatileSlice<'_>) -> kdp_vmm::Result<()> {
        // Two fetches at once share the link one after the other.
        let mut idle_at = self.idle_at.lock().unwrap_or_else(PoisonError::into_inner);
        *idle_at = Instant::now().max(*idle_at);
        for first in (0..pages.count).step_by(PIECE as usize) {
            let count = PIECE.min(pages.count - first);
            *idle_at += Duration::from_nanos(count * self.ns_per_page);
            wait_until(*idle_at);
            let part = to
                .subslice((first * PAGE_SIZE) as usize, (count * PAGE_SIZE) as usize)
                .map_err(|e| Error::Invalid(e.to_string()))?;
            self.image
                .fetch(PageRange::new(pages.first + first, count), &part)?;
        }
        Ok(())
    }
}

fn wait_until(time: Instant) {
    loop {
        let left = time.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        if left > SLEEP {
            thread::sleep(left - SLEEP);
        } else {
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kdp_vmm::buffer;

    #[test]
    fn a_transfer_takes_what_the_rate_says_and_brings_the_contents() {
        const PAGES: u64 = 256;
        let image = || Image::generate(PAGES * PAGE_SIZE, 1).unwrap();
        let link = Link::new(image(), 1);
        let [got, expected] = [(); 2].map(|()| buffer(PAGES * PAGE_SIZE).unwrap());
        let all = PageRange::new(0, PAGES);
        let started = Instant::now();
        link.fetch(all, &got.volatile()).unwrap();
        let (elapsed, idle_at) = (started.elapsed(), *link.idle_at.lock().unwrap());
        let least = Link::us(PAGES * PAGE_SIZE, 1);
        assert!((8_388.0..8_389.0).contains(&least), "{least}");
        // By its own account, however long the copies took on a busy machine; and it has waited for that.
        let sent = idle_at.duration_since(started);
        assert!(sent.as_secs_f64() * 1e6 >= least, "{sent:?}");
        assert!(elapsed >= sent, "{elapsed:?}, {sent:?}");

        image().fetch(all, &expected.volatile()).unwrap();
        let [mut a, mut b] = [[0; PAGE_SIZE as usize]; 2];
        for page in 0..PAGES {
            got.read(page, &mut a).unwrap();
            expected.read(page, &mut b).unwrap();
            assert!(a == b, "page {page}");
        }
    }
}

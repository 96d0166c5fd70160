// SPDX-License-Identifier: GPL-2.0

//! Who goes through memory in order, and what to read ahead for them.
//!
//! A touch right behind the one before it begins a stream, and a first window ahead of it is asked for.
//! When the stream enters the newest window, the next one is: twice as long, up to blocks that one page
//! table entry maps. So one window is always ready, and a touch elsewhere asks for nothing.
//!
//! Who only looks at one word of each page is faster than any reader. A stream that comes to a block that was asked
//! for, and is not whole, is told once to see to the block itself.

use super::collapse::BLOCK_PAGES;

/// Streams that one observer tells apart.
const STREAMS: usize = 4;

/// Pages of the first window.
const FIRST: u64 = 4;

/// Pages of the longest window, up to the end of whose last block it goes.
const LONGEST: u64 = 2 * BLOCK_PAGES;

/// Touches from `from` on belong to the stream; those from `mark` on are in the newest window, which ends
/// before `next`. It has been told of blocks that end at `told` or before.
///
/// # Invariants
///
/// `from <= mark <= next`.
#[derive(Clone, Copy, Debug)]
struct Stream {
    from: u64,
    mark: u64,
    next: u64,
    told: u64,
}

impl Stream {
    /// Of one touch.
    fn new(page: u64) -> Self {
        let next = page.saturating_add(1);
        Self {
            from: page,
            mark: next,
            next,
            told: 0,
        }
    }

    fn has(&self, page: u64) -> bool {
        self.from <= page && page <= self.next
    }

    /// A touch of the newest window, or right behind it.
    fn advance(&mut self, page: u64, limit: u64) -> Option<(u64, u64)> {
        let first = self.next.max(page.saturating_add(1));
        let window = ((self.next - self.mark) * 2).clamp(FIRST, LONGEST);
        let mut end = first.saturating_add(window);
        if window >= BLOCK_PAGES {
            end = end.checked_next_multiple_of(BLOCK_PAGES).unwrap_or(end);
        }
        let end = end.min(limit);
        *self = Self {
            from: self.mark,
            mark: first,
            next: end.max(first),
            told: self.told,
        };
        (first < end).then_some((first, end))
    }

    fn comes_to(&mut self, first: u64, end: u64) -> bool {
        let news = self.from <= first && end <= self.next && self.told < end;
        if news {
            self.told = end;
        }
        news
    }
}

/// The streams of one observer.
#[derive(Debug)]
pub struct Streams {
    streams: [Stream; STREAMS],
    /// Which of them makes room for the next.
    turn: usize,
}

impl Default for Streams {
    fn default() -> Self {
        // Page 0 belongs to none of these, or every memslot would begin with a stream.
        let none = Stream {
            from: u64::MAX,
            mark: u64::MAX,
            next: u64::MAX,
            told: 0,
        };
        Self {
            streams: [none; STREAMS],
            turn: 0,
        }
    }
}

impl Streams {
    /// A page of a memslot of `limit` pages is touched: what to read ahead, first and one past the last.
    pub fn touched(&mut self, page: u64, limit: u64) -> Option<(u64, u64)> {
        for stream in &mut self.streams {
            if stream.has(page) {
                return (page >= stream.mark)
                    .then(|| stream.advance(page, limit))
                    .flatten();
            }
        }
        self.streams[self.turn] = Stream::new(page);
        self.turn = (self.turn + 1) % STREAMS;
        None
    }

    /// A block, from `first` to before `end`, is touched, and is not whole. Says, once, whether a stream has come to it that
    /// all of it was asked for.
    pub fn comes_to(&mut self, first: u64, end: u64) -> bool {
        self.streams
            .iter_mut()
            .any(|stream| stream.comes_to(first, end))
    }
}

//! What memory a guest has.
//!
//! The engines number pages through: those of the first memslot, then those of the second. A run of pages that goes
//! over the wire never reaches from one memslot into the next.

/// A memslot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number.
    pub id: u32,
    /// Where it is in the guest: the number of its first page of 4096 bytes.
    pub gfn: u64,
    /// How many pages of 4096 bytes it has.
    pub pages: u64,
    /// The size of its backing's pages, as a power of 2. It may be another one on the other side.
    pub backing_shift: u32,
}

/// All memslots, in the order that numbers pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout(pub Vec<Slot>);

/// The most memslots that a layout may have.
pub const MAX_SLOTS: usize = 512;

/// The most pages: 2^36, or 256 TiB, so that bitmaps of them can be allocated at all.
pub const MAX_PAGES: u64 = 1 << 36;

impl Layout {
    /// Pages of all memslots; `None` if those are more than can be, or there is none.
    pub fn pages(&self) -> Option<u64> {
        let pages = self
            .0
            .iter()
            .try_fold(0u64, |sum, slot| sum.checked_add(slot.pages))?;
        let fits = self.0.len() <= MAX_SLOTS && (1..=MAX_PAGES).contains(&pages);
        fits.then_some(pages)
    }

    /// The memslot that page `page` is in, as an index, and which of its pages it is.
    pub fn locate(&self, page: u64) -> Option<(usize, u64)> {
        let mut first = 0u64;
        self.0.iter().enumerate().find_map(|(index, slot)| {
            let at = page.checked_sub(first)?;
            first = first.saturating_add(slot.pages);
            (at < slot.pages).then_some((index, at))
        })
    }

    /// The first page behind the memslot that `page` is in.
    pub fn end_of(&self, page: u64) -> u64 {
        self.locate(page)
            .map_or(page, |(index, at)| page - at + self.0[index].pages)
    }

    /// Why a guest of this layout cannot go on in one of another.
    pub fn mismatch(&self, other: &Self) -> Option<String> {
        if self.0.len() != other.0.len() {
            return Some(format!(
                "the source has {} memslots, the destination {}",
                self.0.len(),
                other.0.len()
            ));
        }
        let pair = self
            .0
            .iter()
            .zip(&other.0)
            .find(|(a, b)| (a.id, a.gfn, a.pages) != (b.id, b.gfn, b.pages))?;
        let text = |slot: &Slot| format!("{} pages at GFN {:#x}", slot.pages, slot.gfn);
        Some(format!(
            "memslot {} of the source has {}; the destination's memslot {} has {}",
            pair.0.id,
            text(pair.0),
            pair.1.id,
            text(pair.1)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_numbered_through() {
        let slot = |id, gfn, pages| Slot {
            id,
            gfn,
            pages,
            backing_shift: 12,
        };
        let layout = Layout(vec![slot(0, 0, 10), slot(1, 100, 5)]);
        assert_eq!(layout.pages(), Some(15));
        assert_eq!(layout.locate(9), Some((0, 9)));
        assert_eq!(layout.locate(10), Some((1, 0)));
        assert_eq!(layout.locate(15), None);
        assert_eq!((layout.end_of(3), layout.end_of(10)), (10, 15));
        let mut other = layout.clone();
        other.0[1].backing_shift = 21;
        assert_eq!(layout.mismatch(&other), None);
        other.0[1].pages = 6;
        let text = layout.mismatch(&other).unwrap();
        assert!(
            text.contains("5 pages at GFN 0x64") && text.contains("6 pages"),
            "{text}"
        );
        assert_eq!(
            Layout(vec![slot(0, 0, u64::MAX), slot(1, 0, 2)]).pages(),
            None
        );
        assert_eq!(Layout::default().pages(), None);
    }
}

//! A memslot as its handler sees it: where its pages come from, and how one is placed.

use crate::{
    bits::{words_for, Bits},
    map::Mapping,
    place,
    source::Content,
    Error, MemslotInfo, PageRange, PresentBitmap, Result, Vm, PAGE_SIZE,
};
use std::sync::Arc;

/// What became of pages that came from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// They are present, by this call.
    Present,
    /// They must be marked zero.
    MarkZero,
    /// They are present already, or somebody else is placing them.
    TooLate,
    /// They are poisoned, and stay absent beneath.
    Lost,
}

/// How an absent page gets its bytes.
pub(super) trait Memory: Send + Sync {
    /// Fill the page, make it present and let go who waits for it, unless it is present.
    fn place(&self, page: u64, data: &[u8]) -> Result<place::Placed>;
}

/// By the module: no mapping of the memfd is needed, which a memory error would take away.
struct Module {
    vm: Vm,
    slot_id: u32,
}

impl Memory for Module {
    fn place(&self, page: u64, data: &[u8]) -> Result<place::Placed> {
        let placed = self.vm.place(self.slot_id, page, data)?;
        Ok(placed.first().copied().unwrap_or(place::Placed::Present))
    }
}

/// A memslot with demand paging on.
pub(super) struct Slot {
    info: MemslotInfo,
    memory: Box<dyn Memory>,
    present: Arc<PresentBitmap>,
    // Who sets a page's bit here may place it, and clears it when the page is present.
    placing: Mapping,
    // Pages that were marked zero: never written by us, since the kernel may fill them at any time.
    zeroed: Mapping,
    // Pages that were found poisoned: they are not asked for in the background.
    lost: Mapping,
    // The page of the source that is page 0.
    source_first: u64,
}

impl Slot {
    /// Map all that is needed to serve a memslot.
    pub(super) fn attach(vm: &Vm, info: MemslotInfo, source_first: u64) -> Result<Self> {
        let present = Arc::new(vm.memslot(info.slot_id)?.bitmap()?);
        let memory = Module {
            vm: vm.try_clone()?,
            slot_id: info.slot_id,
        };
        Self::new(info, Box::new(memory), present, source_first)
    }

    pub(super) fn new(
        info: MemslotInfo,
        memory: Box<dyn Memory>,
        present: Arc<PresentBitmap>,
        source_first: u64,
    ) -> Result<Self> {
        let bytes = (words_for(info.pages) as usize * 8).next_multiple_of(PAGE_SIZE);
        let bits = || {
            Mapping::anonymous(bytes)
                .map_err(|errno| Error::sys("mmap", format!("{bytes} bytes for claims"), errno))
        };
        Ok(Self {
            memory,
            present,
            placing: bits()?,
            zeroed: bits()?,
            lost: bits()?,
            source_first,
            info,
        })
    }

    pub(super) fn info(&self) -> &MemslotInfo {
        &self.info
    }

    pub(super) fn pages(&self) -> u64 {
        self.info.pages
    }

    pub(super) fn present(&self) -> &PresentBitmap {
        &self.present
    }

    fn zeroed(&self) -> Bits<'_> {
        Bits::new(self.zeroed.words(), self.pages())
    }

    fn lost(&self) -> Bits<'_> {
        Bits::new(self.lost.words(), self.pages())
    }

    /// Whether the page was marked zero by this handler, and may have become present since.
    pub(super) fn is_zeroed(&self, page: u64) -> bool {
        self.zeroed().get(page)
    }

    /// The pages of the source that are pages of this memslot.
    pub(super) fn in_source(&self) -> PageRange {
        PageRange::new(self.source_first, self.pages())
    }

    /// The page of the source that holds a page.
    pub(super) fn to_source(&self, range: PageRange) -> PageRange {
        PageRange::new(self.source_first + range.first, range.count)
    }

    /// The pages of this memslot among pages of the source.
    pub(super) fn pages_of(&self, range: PageRange) -> PageRange {
        let first = range.first.max(self.source_first);
        let end = range.end().min(self.in_source().end());
        PageRange::from(first - self.source_first..end.max(first) - self.source_first)
    }

    /// The first run of pages that still have to be fetched.
    pub(super) fn next_missing(&self, from: u64, max: u64) -> Option<PageRange> {
        let mut within = PageRange::from(from..self.pages());
        loop {
            let absent = self.present.next_absent_run(within, max)?;
            let unmarked = self.zeroed().find_run(absent, false, max);
            let missing = unmarked.and_then(|run| self.lost().find_run(run, false, max));
            if missing.is_some() {
                return missing;
            }
            let looked_at = unmarked.unwrap_or(absent);
            within = PageRange::from(looked_at.end()..self.pages());
        }
    }

    /// Place one page, once: if it is absent and nobody else is at it.
    ///
    /// Zero pages of shmem are left to the kernel, which allocates them when they are touched. Those of
    /// hugetlb have their memory already, and are written so that their block becomes whole.
    pub(super) fn place(&self, page: u64, content: Content<'_>) -> Result<Placed> {
        let placing = Bits::new(self.placing.words(), self.pages());
        if !placing.set(page) {
            return Ok(Placed::TooLate);
        }
        let placed = self.place_claimed(page, content);
        placing.clear(page);
        placed
    }

    fn place_claimed(&self, page: u64, content: Content<'_>) -> Result<Placed> {
        if self.present.is_present(page) || self.is_zeroed(page) {
            return Ok(Placed::TooLate);
        }
        let placed = match content {
            Content::Data(data) => self.memory.place(page, data)?,
            Content::Zero if self.info.backing_page_size == PAGE_SIZE as u64 => {
                self.zeroed().set(page);
                return Ok(Placed::MarkZero);
            }
            Content::Zero => self.memory.place(page, &[0; PAGE_SIZE])?,
            Content::Failed(errno) => {
                return Err(Error::Argument(format!(
                    "page {page} has no data to place: errno {errno}"
                )));
            }
        };
        Ok(match placed {
            place::Placed::Now => {
                self.lost().clear(page);
                Placed::Present
            }
            // Who has claimed it makes it present, or there is another event.
            place::Placed::Present | place::Placed::Claimed => Placed::TooLate,
            place::Placed::Lost => {
                self.lost().set(page);
                Placed::Lost
            }
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{AliasMap, Backing, Memfd};

    /// Memory without a module.
    struct Plain {
        alias: AliasMap,
        present: Arc<PresentBitmap>,
    }

    impl Memory for Plain {
        fn place(&self, page: u64, data: &[u8]) -> Result<place::Placed> {
            if page == LOST {
                return Ok(place::Placed::Lost);
            }
            self.alias.write(page, data)?;
            Ok(match self.present.set(page) {
                true => place::Placed::Now,
                false => place::Placed::Present,
            })
        }
    }

    /// A page that is poisoned.
    pub(in super::super) const LOST: u64 = 1000;

    /// A memslot without a module: a plain memfd, and a bitmap of its own.
    pub(in super::super) fn slot(
        pages: u64,
        source_first: u64,
        backing_page_size: u64,
    ) -> (Slot, AliasMap) {
        let memfd = Memfd::create("slot", Backing::Shmem, pages * 4096).unwrap();
        let info = MemslotInfo {
            slot_id: 0,
            paging: true,
            base_gfn: source_first,
            pages,
            memfd_offset: 0,
            backing_page_size,
            name: None,
        };
        let slot = plain(info, &memfd, source_first);
        (slot, memfd.map_all().unwrap())
    }

    pub(in super::super) fn plain(info: MemslotInfo, memfd: &Memfd, source_first: u64) -> Slot {
        let present = Arc::new(PresentBitmap::for_tests(info.pages));
        let memory = Plain {
            alias: memfd.map_all().unwrap(),
            present: present.clone(),
        };
        Slot::new(info, Box::new(memory), present, source_first).unwrap()
    }

    fn byte(view: &AliasMap, page: u64) -> u8 {
        let mut data = [0; PAGE_SIZE];
        view.read(page, &mut data).unwrap();
        data[4095]
    }

    #[test]
    fn a_page_is_placed_once_until_it_is_absent_again() {
        let (slot, view) = slot(8, 0, 2 << 20);
        assert_eq!(
            slot.place(3, Content::Data(&[1; 4096])).unwrap(),
            Placed::Present
        );
        assert_eq!(
            slot.place(3, Content::Data(&[2; 4096])).unwrap(),
            Placed::TooLate
        );
        assert_eq!(slot.place(3, Content::Zero).unwrap(), Placed::TooLate);
        assert_eq!(byte(&view, 3), 1);
        slot.present.clear_for_tests(3);
        assert_eq!(slot.place(3, Content::Zero).unwrap(), Placed::Present);
        assert_eq!(byte(&view, 3), 0);
    }

    #[test]
    fn zeros_on_shmem_are_the_kernels() {
        let (slot, view) = slot(8, 0, 4096);
        view.write(5, &[9; 4096]).unwrap();
        assert_eq!(slot.place(5, Content::Zero).unwrap(), Placed::MarkZero);
        assert!(!slot.present.is_present(5));
        assert_eq!(
            slot.place(5, Content::Data(&[2; 4096])).unwrap(),
            Placed::TooLate
        );
        assert_eq!(byte(&view, 5), 9);
        assert_eq!(slot.next_missing(5, 64), Some(PageRange::new(6, 2)));
        assert_eq!(slot.next_missing(0, 3), Some(PageRange::new(0, 3)));
    }

    #[test]
    fn what_could_not_be_read_is_not_placed() {
        let (slot, _view) = slot(8, 0, 4096);
        assert!(slot.place(1, Content::Failed(5)).is_err());
        assert!(!slot.present.is_present(1));
        assert_eq!(
            slot.place(1, Content::Data(&[1; 4096])).unwrap(),
            Placed::Present
        );
    }

    #[test]
    fn a_poisoned_page_is_left_out() {
        let (slot, _view) = slot(LOST + 3, 0, 4096);
        assert_eq!(slot.next_missing(LOST, 9), Some(PageRange::new(LOST, 3)));
        let placed = slot.place(LOST, Content::Data(&[1; 4096])).unwrap();
        assert_eq!(placed, Placed::Lost);
        assert!(!slot.present.is_present(LOST));
        assert_eq!(
            slot.next_missing(LOST, 9),
            Some(PageRange::new(LOST + 1, 2))
        );
        assert_eq!(
            slot.next_missing(LOST - 1, 1),
            Some(PageRange::new(LOST - 1, 1))
        );
        assert_eq!(
            slot.next_missing(LOST - 1, 9),
            Some(PageRange::new(LOST - 1, 1))
        );
    }

    #[test]
    fn source_pages() {
        let (slot, _view) = slot(8, 100, 4096);
        assert_eq!(slot.to_source(PageRange::new(2, 3)), PageRange::new(102, 3));
        assert_eq!(slot.pages_of(PageRange::new(98, 4)), PageRange::new(0, 2));
        assert_eq!(slot.pages_of(PageRange::new(106, 9)), PageRange::new(6, 2));
        assert!(slot.pages_of(PageRange::new(0, 100)).is_empty());
        assert!(slot.pages_of(PageRange::new(108, 5)).is_empty());
    }

    #[test]
    fn of_many_placers_one_places() {
        let (slot, view) = slot(512, 0, 4096);
        let wins: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=4u8)
                .map(|byte| {
                    let slot = &slot;
                    scope.spawn(move || {
                        let place =
                            |page: &u64| slot.place(*page, Content::Data(&[byte; 4096])).unwrap();
                        (0..512)
                            .filter(|page| place(page) == Placed::Present)
                            .count()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(wins, 512);
        assert_eq!(slot.present.count(), 512);
        assert!((0..512).all(|page| (1..=4).contains(&byte(&view, page))));
    }
}

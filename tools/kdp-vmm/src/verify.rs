//! Does the guest have what the source has? Checked on the host's side.

use kvm_demand_paging::{AliasMap, PageRange};

use crate::error::Result;
use crate::guest::Touch;
use crate::memory::{buffer, PAGE_SIZE};
use crate::source::Source;

/// What the host found.
pub(crate) struct Verdict {
    /// The sum that the guest should have reported in each round.
    pub(crate) checksum: u64,
    /// Does guest memory hold the source's contents, and what the guest wrote, in every visited page?
    pub(crate) memory_ok: bool,
}

/// How many pages are fetched from the source at a time.
const CHUNK: u64 = 256;

pub(crate) fn verify(touches: &[Touch], source: &dyn Source, memory: &AliasMap) -> Result<Verdict> {
    let chunk = buffer(CHUNK * PAGE_SIZE)?;
    let mut verdict = Verdict {
        checksum: 0,
        memory_ok: true,
    };
    let mut have = None;
    for touch in touches {
        // The sum does not depend on the order, and a source is read fastest from front to back.
        let mut pages: Vec<u64> = touch.pages().collect();
        pages.sort_unstable();
        for page in pages {
            let first = page - page % CHUNK;
            if have != Some(first) {
                let count = CHUNK.min(source.pages() - first);
                let to = chunk.slice(PageRange::new(0, count))?;
                source.fetch(PageRange::new(first, count), &to)?;
                have = Some(first);
            }
            let mut words = words_of(&chunk, page - first)?;
            if let Some(word) = touch.written(page) {
                words[0] = word;
            }
            verdict.memory_ok &= words == words_of(memory, page)?;
            let value = touch.value(words);
            verdict.checksum = verdict
                .checksum
                .wrapping_add(value.wrapping_mul(2 * page + 1));
        }
    }
    Ok(verdict)
}

fn words_of(memory: &AliasMap, page: u64) -> Result<[u64; 512]> {
    let mut bytes = [0_u8; PAGE_SIZE as usize];
    memory.read(page, &mut bytes)?;
    let mut words = [0; 512];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut le = [0; 8];
        le.copy_from_slice(bytes);
        *word = u64::from_le_bytes(le);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Order;
    use crate::source::Image;

    const PAGES: u64 = 300;

    fn image_and_copy() -> (Image, AliasMap) {
        let image = Image::generate(PAGES * PAGE_SIZE, 3).unwrap();
        let copy = buffer(PAGES * PAGE_SIZE).unwrap();
        let all = PageRange::new(0, PAGES);
        image.fetch(all, &copy.volatile()).unwrap();
        (image, copy)
    }

    #[test]
    fn one_wrong_byte_in_a_visited_page_is_seen() {
        let (image, memory) = image_and_copy();
        let touch = Touch::new(0, Order::random(PAGES - 1, 1)).hash();
        assert!(verify(&[touch.clone()], &image, &memory).unwrap().memory_ok);
        for (page, seen) in [(PAGES - 1, false), (PAGES - 2, true)] {
            let mut bytes = [0; PAGE_SIZE as usize];
            memory.read(page, &mut bytes).unwrap();
            bytes[4095] ^= 1;
            memory.write(page, &bytes).unwrap();
            let ok = verify(&[touch.clone()], &image, &memory).unwrap().memory_ok;
            assert_eq!(ok, !seen, "page {page}");
        }
    }

    #[test]
    fn what_the_guest_writes_belongs_to_it() {
        let (image, memory) = image_and_copy();
        let touch = Touch::new(0, Order::sequential(PAGES)).write(9);
        assert!(!verify(&[touch.clone()], &image, &memory).unwrap().memory_ok);
        for page in 0..PAGES {
            let mut bytes = [0; PAGE_SIZE as usize];
            memory.read(page, &mut bytes).unwrap();
            let word = touch.written(page).unwrap();
            bytes[..8].copy_from_slice(&word.to_le_bytes());
            memory.write(page, &bytes).unwrap();
        }
        assert!(verify(&[touch], &image, &memory).unwrap().memory_ok);
    }

    #[test]
    fn checksum_depends_on_contents_and_on_which_page_has_them() {
        let (image, memory) = image_and_copy();
        let other = Image::generate(PAGES * PAGE_SIZE, 4).unwrap();
        let sum = |first, image| {
            let touch = Touch::new(0, Order::sequential(10)).first(first).hash();
            verify(&[touch], image, &memory).unwrap().checksum
        };
        assert_eq!(sum(0, &image), sum(0, &image));
        assert_ne!(sum(0, &image), sum(0, &other));
        assert_ne!(sum(0, &image), sum(1, &image));
    }
}

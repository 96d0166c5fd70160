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

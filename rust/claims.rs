// SPDX-License-Identifier: GPL-2.0

//! The pages of a memslot that are claimed, and by whom.
//!
//! All of it is under the memslot's locks (see memslot.rs). A page is claimed under `changes` and `pages` for reading; for
//! writing where there is a source, so that nobody fills the page from it meanwhile. A claim ends under the same, or under
//! `pages` for writing alone. A touch looks under `pages` for reading.
//!
//! A claim is a bit in the claimant's own bitmap and the same in the common one: a touch asks the common one alone, and who
//! ends the claim of a page need not know whose it is. Both come in chunks, as the present bits do, and there are none
//! before the first claim; the common ones go with the last claimant.

use crate::{
    ffi::{
        shared_page::{
            SharedPage,
            SharedWord, //
        },
        tree::Tree,
        uapi::KDP_MAX_CLAIMANTS, //
    },
    rules::{
        bits::{
            clear_both,
            is_set,
            Word, //
        },
        claim,
        range::{
            locate,
            ChunkPart,
            CHUNK_PAGES, //
        }, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The pages that one claimant has.
pub(crate) struct Held {
    bits: Tree<SharedPage>,
}

/// Those that anybody has.
///
/// # Invariants
///
/// A bit is set in `all` if it is in the bitmap of one of `claimants`, and never in those of two.
pub(crate) struct Claims {
    all: Tree<SharedPage>,
    claimants: KVec<Arc<Held>>,
}

fn words(tree: &Tree<SharedPage>, chunk: u64) -> Option<&[SharedWord]> {
    tree.get(chunk as usize).map(|page| &page.words()[..])
}

fn word(tree: &Tree<SharedPage>, page: u64) -> u64 {
    let (chunk, word, _) = locate(page);
    words(tree, chunk).map_or(0, |words| words[word].load_acquire())
}

fn chunk(tree: &Tree<SharedPage>, chunk: u64) -> Result<&SharedPage> {
    if tree.get(chunk as usize).is_none() {
        let page = KBox::new(SharedPage::new(false)?, GFP_KERNEL_ACCOUNT)?;
        tree.insert(chunk as usize, page)?;
    }
    tree.get(chunk as usize).ok_or(ENOMEM)
}

fn clear(tree: &Tree<SharedPage>, part: ChunkPart) {
    clear_both(words(tree, part.chunk), None, part);
}

impl Held {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self { bits: Tree::new()? }, GFP_KERNEL_ACCOUNT)?)
    }

    /// Those of the pages whose bits are in one word with a page's, as such bits.
    pub(crate) fn word(&self, page: u64) -> u64 {
        word(&self.bits, page)
    }

    /// The runs of its pages in the first chunk that has any bits from page `from` on, and where the next chunk begins.
    pub(crate) fn next(&self, from: u64) -> Option<(impl Iterator<Item = ChunkPart> + '_, u64)> {
        let first = from.div_ceil(CHUNK_PAGES) as usize;
        let chunk = self.bits.next(first, usize::MAX)? as u64;
        let whole = ChunkPart {
            chunk,
            first: 0,
            count: CHUNK_PAGES,
        };
        let runs = claim::claimed(words(&self.bits, chunk), whole);
        Some((runs, (chunk + 1) * CHUNK_PAGES))
    }
}

impl Claims {
    /// None.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            all: Tree::new()?,
            claimants: KVec::new(),
        })
    }

    /// Whether nothing has been claimed since there were claimants.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether a page is claimed.
    #[inline]
    pub(crate) fn has(&self, page: u64) -> bool {
        let (chunk, word, bit) = locate(page);
        words(&self.all, chunk).is_some_and(|words| is_set(words, word, bit))
    }

    /// Those of the pages whose bits are in one word with a page's, as such bits.
    pub(crate) fn word(&self, page: u64) -> u64 {
        word(&self.all, page)
    }

    /// The pages of a part that are not claimed.
    pub(crate) fn free(&self, part: ChunkPart) -> impl Iterator<Item = ChunkPart> + '_ {
        claim::free(words(&self.all, part.chunk), part)
    }

    /// The pages of a part that are.
    pub(crate) fn claimed(&self, part: ChunkPart) -> impl Iterator<Item = ChunkPart> + '_ {
        claim::claimed(words(&self.all, part.chunk), part)
    }

    /// There is one more claimant.
    pub(crate) fn enlist(&mut self, held: &Arc<Held>) -> Result {
        if self.claimants.len() >= KDP_MAX_CLAIMANTS as usize {
            return Err(ENOSPC);
        }
        self.claimants.push(held.clone(), GFP_KERNEL_ACCOUNT)?;
        Ok(())
    }

    /// A claimant that has no page any more goes.
    pub(crate) fn delist(&mut self, held: &Arc<Held>) {
        self.claimants.retain(|other| !Arc::ptr_eq(other, held));
        if self.claimants.is_empty() {
            self.all.clear();
        }
    }

    /// Pages that nobody has claimed, bits of the word of `page`, are a claimant's.
    pub(crate) fn add(&self, held: &Held, page: u64, bits: u64) -> Result {
        let (at, word, _) = locate(page);
        if bits != 0 {
            let (all, own) = (chunk(&self.all, at)?, chunk(&held.bits, at)?);
            all.words()[word].set_release(bits);
            own.words()[word].set_release(bits);
        }
        Ok(())
    }

    /// The claims on the pages of a part are over, whoever has them.
    pub(crate) fn end(&self, part: ChunkPart) {
        clear(&self.all, part);
        for held in &self.claimants {
            clear(&held.bits, part);
        }
    }

    /// All claims are over.
    pub(crate) fn end_all(&mut self) {
        let mut next = 0;
        while let Some(chunk) = self.all.next(next, usize::MAX) {
            self.end(ChunkPart {
                chunk: chunk as u64,
                first: 0,
                count: CHUNK_PAGES,
            });
            next = chunk + 1;
        }
        self.all.clear();
    }
}

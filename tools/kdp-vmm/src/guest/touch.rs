//! The program that visits the pages of a range, reads or writes them and reports a checksum.

use super::{GuestProgram, Order, PORT_REPORT, PORT_START, PORT_TICK};
use crate::memory::PAGE_SIZE;

/// What words are multiplied by in a page's hash; also makes the values that guests write.
pub const HASH_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The hash of a page that the guest computes: it depends on the order of the words.
pub fn page_hash(words: impl IntoIterator<Item = u64>) -> u64 {
    words
        .into_iter()
        .fold(0, |hash, word| (hash ^ word).wrapping_mul(HASH_FACTOR))
}

/// Pages in a block: see [`Touch::block_distance`].
pub const BLOCK: u64 = 512;

const WRITE: u64 = 1;
const HASH: u64 = 2;

/// Builds a program that visits pages.
///
/// For each page it accesses the first word, by a read or, with [`write`](Self::write), by a write. With
/// [`hash`](Self::hash) it then reads the whole page. After each round it reports the sum of
/// `value * (2 * page + 1)` over the pages, where `value` is the first word or the page's hash, and `page`
/// counts from the start of the memslot.
#[derive(Clone, Debug)]
pub struct Touch {
    slot_gpa: u64,
    first: u64,
    stride: u64,
    distance: u64,
    order: Order,
    flags: u64,
    salt: u64,
    rounds: u64,
    tick: u64,
    samples: u64,
}

impl Touch {
    /// Visit pages of the memslot that begins at `slot_gpa`, in this order, from page 0.
    pub fn new(slot_gpa: u64, order: Order) -> Self {
        Self {
            slot_gpa,
            first: 0,
            stride: 1,
            distance: BLOCK,
            order,
            flags: 0,
            salt: 0,
            rounds: 1,
            tick: 0,
            samples: 0,
        }
    }

    /// Begin at this page of the memslot.
    #[must_use]
    pub fn first(mut self, page: u64) -> Self {
        self.first = page;
        self
    }

    /// Visit only every `pages`th page.
    #[must_use]
    pub fn stride(mut self, pages: u64) -> Self {
        self.stride = pages;
        self
    }

    /// Leave gaps after each [`BLOCK`] of pages that it visits: from the start of one to the start of the next are
    /// this many pages, and no gap if that is [`BLOCK`]. Without a stride.
    #[must_use]
    pub fn block_distance(mut self, pages: u64) -> Self {
        self.distance = pages;
        self
    }

    fn gap(&self) -> u64 {
        self.distance.saturating_sub(BLOCK)
    }

    /// Write the first word of each page: see [`written`](Self::written).
    #[must_use]
    pub fn write(mut self, salt: u64) -> Self {
        self.flags |= WRITE;
        self.salt = salt;
        self
    }

    /// Read every word of each page.
    #[must_use]
    pub fn hash(mut self) -> Self {
        self.flags |= HASH;
        self
    }

    /// Do it all this many times, with a report after each.
    #[must_use]
    pub fn rounds(mut self, rounds: u64) -> Self {
        self.rounds = rounds.max(1);
        self
    }

    /// Write to [`PORT_TICK`] after every `pages` pages; 0 is never.
    #[must_use]
    pub fn tick_every(mut self, pages: u64) -> Self {
        self.tick = pages;
        self
    }

    /// Store how long the first access of each page took in the first round, as 32-bit counts of the TSC
    /// in the order of visits, at this address in scratch memory.
    #[must_use]
    pub fn samples(mut self, gpa: u64) -> Self {
        self.samples = gpa;
        self
    }

    /// How many pages it visits.
    pub fn count(&self) -> u64 {
        self.order.count()
    }

    /// The pages of the memslot in the order of visits.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        let (first, stride, gap) = (self.first, self.stride, self.gap());
        self.order
            .iter()
            .map(move |i| first + i * stride + i / BLOCK * gap)
    }

    /// The word that it writes at the start of a page.
    pub fn written(&self, page: u64) -> Option<u64> {
        (self.flags & WRITE != 0).then(|| page.wrapping_mul(HASH_FACTOR).wrapping_add(self.salt))
    }

    /// What it makes of a page with these words, before the factor of the page's number.
    pub fn value(&self, words: impl IntoIterator<Item = u64>) -> u64 {
        if self.flags & HASH != 0 {
            page_hash(words)
        } else {
            words.into_iter().next().unwrap_or(0)
        }
    }

    /// The program.
    pub fn program(&self) -> GuestProgram {
        GuestProgram::new(code())
            .params(&self.order.words())
            .params(&[
                self.slot_gpa,
                self.slot_gpa + self.first * PAGE_SIZE,
                self.stride * PAGE_SIZE,
                self.flags,
                self.salt,
                self.rounds,
                self.tick,
                self.samples,
                self.gap() * PAGE_SIZE,
            ])
    }
}

fn code() -> &'static [u8] {
    crate::guest_code!(
        "mov rbp, {factor}",
        "mov r11, [rdi + 72]",          // flags
        "mov r13, [rdi + 88]",          // rounds left
        "mov r12, [rdi + 104]",         // where samples go
        // The samples' own memory must not fault while the clock runs.
        "test r12, r12",
        "jz 3f",
        "mov rcx, [rdi + 40]",
        "lea rdx, [r12 + rcx * 4]",
        "mov rax, r12",
        "2: mov dword ptr [rax], 0",
        "add rax, 4096",
        "cmp rax, rdx",
        "jb 2b",
        "3: out {start}, al",
        // What is measured begins here: a no-op that scripts/profile looks for.
        ".byte 0x0f, 0x1f, 0x80", ".ascii \"KDP1\"",

        "4: xor r10d, r10d",            // the round's sum
        "mov r8, [rdi]",                // the generator's state
        "mov r9, [rdi + 40]",           // pages left
        "mov r14, [rdi + 96]",          // pages to the next tick
        "test r9, r9",
        "jz 12f",

        // The next page: r15 is its index in the memslot, rsi its address.
        "5: mov rcx, [rdi + 32]",
        "mov r15, r8",
        "shr r15, cl",
        "xor r15, r8",
        "imul r8, [rdi + 8]",
        "add r8, [rdi + 16]",
        "and r8, [rdi + 24]",
        "cmp r15, [rdi + 40]",
        "jae 5b",
        "mov rsi, r15",
        "shr rsi, {block_shift}",
        "imul rsi, [rdi + 112]",
        "imul r15, [rdi + 64]",
        "add rsi, r15",
        "add rsi, [rdi + 56]",
        "mov r15, rsi",
        "sub r15, [rdi + 48]",
        "shr r15, 12",

        // Its first access, between two readings of the TSC. rax is then the page's first word.
        "mov rcx, r15",
        "imul rcx, rbp",
        "add rcx, [rdi + 80]",
        "test r12, r12",
        "jz 6f",
        "lfence",
        "rdtsc",
        "shl rdx, 32",
        "or rdx, rax",
        "mov rbx, rdx",
        "6: test r11d, {write}",
        "jz 7f",
        "mov [rsi], rcx",
        "jmp 8f",
        "7: mov rcx, [rsi]",
        "8: test r12, r12",
        "jz 9f",
        "lfence",
        "rdtsc",
        "shl rdx, 32",
        "or rdx, rax",
        "sub rdx, rbx",
        "mov eax, 0xffffffff",
        "cmp rdx, rax",
        "cmova rdx, rax",
        "mov [r12], edx",
        "add r12, 4",
        "9: mov rax, rcx",

        // The rest of it.
        "test r11d, {hash}",
        "jz 21f",
        "imul rax, rbp",
        "mov ecx, 1",
        "20: xor rax, [rsi + rcx * 8]",
        "imul rax, rbp",
        "inc ecx",
        "cmp ecx, 512",
        "jb 20b",
        "21: lea rbx, [r15 + r15 + 1]",
        "imul rax, rbx",
        "add r10, rax",

        "test r14, r14",
        "jz 22f",
        "dec r14",
        "jnz 22f",
        "mov eax, r15d",
        "out {tick}, eax",
        "mov r14, [rdi + 96]",
        "22: dec r9",
        "jnz 5b",

        // It ends.
        "12: .byte 0x0f, 0x1f, 0x80", ".ascii \"KDP0\"",
        "mov rax, r10",
        "out {report}, al",
        "xor r12d, r12d",
        "dec r13",
        "jnz 4b",
        "hlt";
        factor = HASH_FACTOR,
        block_shift = BLOCK.trailing_zeros(),
        start = PORT_START,
        tick = PORT_TICK,
        report = PORT_REPORT,
        write = WRITE,
        hash = HASH,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_and_ends_with_hlt() {
        let code = code();
        assert!(code.len() < PAGE_SIZE as usize, "{} bytes", code.len());
        assert_eq!(code.last(), Some(&0xf4));
    }

    #[test]
    fn hash_sees_words_that_changed_places() {
        let touch = Touch::new(0, Order::sequential(1)).hash();
        assert_ne!(touch.value(0..512), touch.value((0..512).rev()));
    }

    #[test]
    fn pages_are_counted_from_the_start_of_the_memslot() {
        let touch = Touch::new(0, Order::sequential(3)).first(10).stride(4);
        assert_eq!(touch.pages().collect::<Vec<_>>(), [10, 14, 18]);
        let spread = Touch::new(0, Order::sequential(BLOCK + 1)).block_distance(4 * BLOCK);
        let pages: Vec<u64> = spread.pages().collect();
        assert_eq!(pages[..2], [0, 1]);
        assert_eq!(pages[511..], [511, 4 * BLOCK]);
        assert_eq!(touch.written(10), None);
        assert_ne!(
            touch.clone().write(1).written(10),
            touch.write(2).written(10)
        );
    }
}

// SPDX-License-Identifier: GPL-2.0

//! What pages hold: words that tell which page they belong to and which version of it.

/// Words of a page.
pub const WORDS: usize = 512;

/// The word at one place of a page.
pub fn word(page: u64, version: u64, at: usize) -> u64 {
    let x = (page << 40) ^ (version << 9) ^ at as u64 ^ 0x5bd1_e995_9e37_79b9;
    let x = (x ^ (x >> 31)).wrapping_mul(0x7fb5_d329_728e_a185);
    x ^ (x >> 27)
}

/// All the bytes of a page.
pub fn bytes(page: u64, version: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (at, eight) in bytes.chunks_exact_mut(8).enumerate() {
        eight.copy_from_slice(&word(page, version, at).to_le_bytes());
    }
    bytes
}

/// Whether these are the words of that page and version; if not, what is wrong.
pub fn check(words: &[u64; WORDS], page: u64, version: u64) -> Result<(), String> {
    let wrong = |at: usize| words[at] != word(page, version, at);
    let Some(first) = (0..WORDS).find(|&at| wrong(at)) else {
        return Ok(());
    };
    let zeros = words.iter().filter(|&&word| word == 0).count();
    Err(format!(
        "page {page}, version {version}: word {first} is {:#x}, not {:#x}; {} words are wrong, {zeros} are zero",
        words[first],
        word(page, version, first),
        (0..WORDS).filter(|&at| wrong(at)).count(),
    ))
}

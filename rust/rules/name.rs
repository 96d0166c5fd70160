// SPDX-License-Identifier: GPL-2.0

//! The names of memslots, which become file names under /dev/kdp.

/// Checks a name field: NUL-terminated and zero-padded. Returns its length without the NUL, 0 for
/// "no name", or [`None`] if it is malformed.
pub fn parse(field: &[u8]) -> Option<usize> {
    let len = field.iter().position(|&b| b == 0)?;
    let (name, padding) = field.split_at(len);
    let good = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let ok =
        name.iter().all(good) && name.first() != Some(&b'.') && padding.iter().all(|&b| b == 0);
    ok.then_some(len)
}

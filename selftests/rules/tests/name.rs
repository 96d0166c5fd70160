// SPDX-License-Identifier: GPL-2.0

//! rust/rules/name.rs

use kdp_rules::rules::name::parse;
use proptest::prelude::*;

/// KDP_NAME_LEN.
const LEN: usize = 32;

const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";

/// The ABI's words: NUL-terminated and zero-padded; empty, or of [A-Za-z0-9._-] and not begun with a
/// dot.
fn naive(field: &[u8]) -> Option<usize> {
    let mut len = 0;
    while *field.get(len)? != 0 {
        if !ALPHABET.contains(&field[len]) || field[0] == b'.' {
            return None;
        }
        len += 1;
    }
    (field[len..].iter().max() == Some(&0)).then_some(len)
}

fn field(name: &[u8]) -> [u8; LEN] {
    let mut field = [0; LEN];
    field[..name.len()].copy_from_slice(name);
    field
}

#[test]
fn names_that_are_and_are_not() {
    for name in ["ram", "a", "A.b_c-9", "-", "_x", "a..b", &"n".repeat(31)] {
        assert_eq!(parse(&field(name.as_bytes())), Some(name.len()), "{name}");
    }
    assert_eq!(parse(&field(b"")), Some(0), "no name");
    for name in [
        ".",
        "..",
        ".hidden",
        "a/b",
        "/",
        "a b",
        "\u{e9}",
        "a\n",
        &"n".repeat(32),
    ] {
        assert_eq!(parse(&field(name.as_bytes())), None, "{name}");
    }
    assert_eq!(parse(b"a\0b\0"), None, "padding that is not zero");
    assert_eq!(parse(b""), None, "no NUL");
}

#[test]
fn every_byte_at_every_place() {
    for at in 0..LEN {
        for byte in 0..=u8::MAX {
            for name in [&b""[..], b"x", b"name", &[b'n'; LEN - 1]] {
                let mut field = field(name);
                field[at] = byte;
                assert_eq!(parse(&field), naive(&field), "{field:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn any_field_is_judged_by_the_rule(
        field in prop::collection::vec(
            prop_oneof![
                8 => prop::sample::select(ALPHABET),
                2 => Just(0),
                1 => any::<u8>(),
            ],
            0..=LEN
        ),
        zeros in 0..=LEN,
    ) {
        let mut field = field;
        let kept = field.len().saturating_sub(zeros);
        field[kept..].fill(0);
        prop_assert_eq!(parse(&field), naive(&field));
    }
}

// SPDX-License-Identifier: GPL-2.0

//! What the rules' files are made of.

use std::fs;
use std::path::Path;

const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../rust/rules");

/// The words of a file's code, without its comments.
fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).expect("a rule's file can be read");
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .flat_map(|code| code.split(|c: char| !c.is_alphanumeric() && c != '_'))
        .map(String::from)
        .collect()
}

/// A file that this package does not compile would go untested.
#[test]
fn every_file_is_compiled_here() {
    let root = words(&Path::new(RULES).join("mod.rs"));
    let mut files = 0;
    for entry in fs::read_dir(RULES).expect("rust/rules can be listed") {
        let path = entry.expect("rust/rules can be listed").path();
        let name = path
            .file_stem()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        if name != "mod" {
            assert!(root.contains(&name), "mod.rs does not name {name}");
            files += 1;
        }
    }
    assert!(files >= 6, "{files} files");
}

/// `forbid` in src/lib.rs refuses unsafe code; this says the same of the text, and that no lint is
/// lifted and nothing of the kernel used.
#[test]
fn no_unsafe_and_no_kernel_types() {
    for entry in fs::read_dir(RULES).expect("rust/rules can be listed") {
        let path = entry.expect("rust/rules can be listed").path();
        let words = words(&path);
        for never in ["unsafe", "extern", "allow", "kernel", "bindings", "std"] {
            let found = words.iter().any(|word| word == never);
            assert!(!found, "'{never}' in {}", path.display());
        }
    }
}

//! What the module's part of a fault is: from the counts by function that scripts/profile leaves.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::row::{Clock, Row};
use crate::Error;

const MODULE: &str = "kvm_demand_paging";

#[derive(Deserialize)]
struct Profile {
    pages: u64,
    functions: Vec<Function>,
}

#[derive(Deserialize)]
struct Function {
    owner: String,
    /// For each page.
    instructions: f64,
}

/// The row of mode "MODE-module" of a file that is named MODE-BACKING-PATTERN.json.
pub fn row(file: &Path) -> Result<Row, Error> {
    let text = fs::read_to_string(file).map_err(|source| Error::Io {
        what: format!("read {}", file.display()),
        source,
    })?;
    let profile: Profile = serde_json::from_str(&text).map_err(|source| Error::Json {
        file: file.display().to_string(),
        source,
    })?;
    let bad = || Error::Profile(file.display().to_string());
    let name = file
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("");
    let (name, pattern) = name.rsplit_once('-').ok_or_else(bad)?;
    let (mode, backing) = ["shmem", "hugetlb-2M", "hugetlb-1G"]
        .iter()
        .find_map(|&backing| Some((name.strip_suffix(backing)?.strip_suffix('-')?, backing)))
        .ok_or_else(bad)?;
    let ours = profile.functions.iter().filter(|f| f.owner == MODULE);
    let us = ours.map(|f| f.instructions).sum::<f64>() / 1e3;
    if us <= 0.0 {
        return Err(bad());
    }
    Ok(Row {
        mode: format!("{mode}-module"),
        backing: backing.to_owned(),
        pattern: pattern.to_owned(),
        vcpus: 1,
        readers: 0,
        link_gbit: None,
        bytes: profile.pages * 4096,
        clock: Clock::Icount,
        us_per_page: us,
        pages_per_s: 1e6 / us,
        p50_us: us,
        p99_us: us,
        exits: 0,
        events: 0,
        pages: profile.pages,
        fault_bytes: 4096,
        pages_fetched: 0,
        pages_unneeded: 0,
        runs: 1,
        us_per_page_range: [us, us],
        cdf: Vec::new(),
        machine: None,
        parts: None,
        damage: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_functions_are_added_up() {
        let dir = std::env::temp_dir().join(format!("kdp-bench-profile-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, owner: &str| {
            let file = dir.join(name);
            let text = format!(
                r#"{{"pages": 4096, "functions": [
                    {{"function": "a", "owner": "{owner}", "instructions": 200.5, "code_pages": 0, "data_pages": 0}},
                    {{"function": "b", "owner": "kernel", "instructions": 9000, "code_pages": 0, "data_pages": 0}},
                    {{"function": "c", "owner": "{owner}", "instructions": 49.5, "code_pages": 0, "data_pages": 0}}]}}"#
            );
            fs::write(&file, text).unwrap();
            row(&file)
        };
        let row = write("exit-hugetlb-2M-random.json", MODULE).unwrap();
        let other = [
            write("exit.json", MODULE),
            write("exit-shmem-random.json", "kvm"),
        ];
        fs::remove_dir_all(dir).unwrap();
        assert_eq!(
            (
                row.mode.as_str(),
                row.backing.as_str(),
                row.pattern.as_str()
            ),
            ("exit-module", "hugetlb-2M", "random")
        );
        assert_eq!(row.us_per_page, 0.25);
        assert!(other.iter().all(Result::is_err));
    }
}

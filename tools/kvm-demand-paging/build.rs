//! Generates the bindings of the ABI from its one definition, the module's UAPI header.

use std::{env, error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let include = root.join("../../include/uapi");
    let header = include.join("linux/kvm_demand_paging.h");
    println!("cargo:rerun-if-changed={}", header.display());

    let out = PathBuf::from(env::var("OUT_DIR")?);
    // `_IO()` is a function-like macro, which bindgen only evaluates with clang's help.
    bindgen::Builder::default()
        .header(
            header
                .to_str()
                .ok_or("the path of the ABI header is not UTF-8")?,
        )
        .allowlist_type("kdp_.*")
        .allowlist_var("KDP_.*")
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(&out)
        .derive_default(true)
        .generate_comments(false)
        .layout_tests(true)
        .generate()?
        .write_to_file(out.join("abi.rs"))?;
    Ok(())
}

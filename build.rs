//! Builds the C++ core and the cxx bridge into one static library.
//!
//! A folder is its own list: every `.cpp` of a room is built, here and in CMakeLists.txt alike.

use std::path::{Path, PathBuf};

const ROOMS: [&str; 4] = ["cpp/ops", "cpp/reference", "cpp/core", "cpp/api"];

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=src/bridge.rs");
    if std::env::var_os("DOCS_RS").is_some() {
        return; // documentation needs no C++ toolchain
    }
    let mut build = cxx_build::bridge("src/bridge.rs");
    build.std("c++20").include("cpp").include("include").warnings(true).extra_warnings(true);
    // The core is the hot path in every profile; Rust's debug info level still applies.
    // No contraction into fused multiply-adds behind our back: a result must not depend on how a loop was unrolled.
    build.opt_level(3).flag("-fvisibility=hidden").flag("-ffp-contract=off").flag_if_supported("-Wno-psabi");
    for room in ROOMS {
        build.files(sources(Path::new(room)));
    }
    build.compile("gemma_cuda_core");
}

fn sources(room: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(room).unwrap_or_else(|e| panic!("{}: {e}", room.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a readable folder entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cpp"))
        .collect();
    files.sort();
    files
}

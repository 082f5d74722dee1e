//! Builds the C++ core, with `--features cuda` its kernels too, and the cxx bridge into one static library.
//!
//! A folder is its own list: every `.cpp` and `.cu` of a room is built, here and in CMakeLists.txt alike.

#[path = "cpp/cuda/toolkit.rs"]
mod cuda;

use std::path::{Path, PathBuf};

const ROOMS: [&str; 6] = ["cpp/support", "cpp/ops", "cpp/reference", "cpp/core", "cpp/config", "cpp/api"];

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=include");
    println!("cargo:rerun-if-changed=src/bridge.rs");
    if std::env::var_os("DOCS_RS").is_some() {
        return; // documentation needs no C++ toolchain
    }
    let mut build = cxx_build::bridge("src/bridge.rs");
    build.define("GEMMA_CUDA_VERSION", format!("{:?}", env!("CARGO_PKG_VERSION")).as_str());
    build.std("c++20").include("cpp").include("include").warnings(true).extra_warnings(true);
    // The core is the hot path in every profile; Rust's debug info level still applies.
    // No contraction into fused multiply-adds behind our back: a result must not depend on how a loop was unrolled.
    build.opt_level(3).flag("-fvisibility=hidden").flag("-ffp-contract=off").flag_if_supported("-Wno-psabi");
    for room in ROOMS {
        build.files(sources(Path::new(room), "cpp"));
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let toolkit = cuda::Toolkit::find().unwrap_or_else(|message| fail(&message));
        build.define("GEMMA_CUDA_WITH_CUDA", None).include(toolkit.include());
        build.files(sources(Path::new("cpp/cuda"), "cpp"));
        let kernels = toolkit.compile(&sources(Path::new("cpp/cuda"), "cu")).unwrap_or_else(|message| fail(&message));
        build.objects(kernels);
        build.compile("gemma_cuda_core");
        toolkit.link();
    } else {
        build.compile("gemma_cuda_core");
    }
}

fn sources(room: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(room).unwrap_or_else(|e| panic!("{}: {e}", room.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a readable folder entry").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

/// A sentence instead of a backtrace.
fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    std::process::exit(1)
}

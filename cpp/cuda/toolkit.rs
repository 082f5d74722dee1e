//! A part of build.rs: finds the CUDA toolkit, compiles the kernels with it, and says what to link.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// 12.8 is the first that knows sm_100 and sm_120.
const LEAST_VERSION: (u32, u32) = (12, 8);
/// The first whose kernels only run under drivers that know the denser packing of machine code.
const PACKS_DENSELY: (u32, u32) = (13, 0);
const ARCHITECTURES: &str = "80,89,90a,100,120";

pub struct Toolkit {
    root: PathBuf,
    version: (u32, u32),
    architectures: Vec<String>,
    warnings_as_errors: bool,
}

impl Toolkit {
    /// Looks where a toolkit can be; the message of an error lists these places and says what helps.
    pub fn find() -> Result<Self, String> {
        for name in ["CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV", "GEMMA_CUDA_ARCHITECTURES", "GEMMA_CUDA_WERROR"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let mut looked = Vec::new();
        for root in candidates() {
            match version(&root) {
                Ok(version) if version >= LEAST_VERSION => return Ok(Toolkit::at(root, version)),
                Ok((major, minor)) => looked.push(format!("{}: {major}.{minor} is too old", root.display())),
                Err(why) => looked.push(format!("{}: {why}", root.display())),
            }
        }
        let (major, minor) = LEAST_VERSION;
        Err(format!(
            "feature `cuda` needs nvcc {major}.{minor} or newer, in CUDA_HOME, on the PATH, in the active virtual \
             environment or where scripts/fetch-cuda puts it.\nFound: {}\nRun `scripts/fetch-cuda` (from PyPI, no \
             root needed), or set CUDA_HOME.",
            if looked.is_empty() { "nothing".to_owned() } else { looked.join("; ") }
        ))
    }

    fn at(root: PathBuf, version: (u32, u32)) -> Self {
        let wanted = std::env::var("GEMMA_CUDA_ARCHITECTURES").unwrap_or_else(|_| ARCHITECTURES.to_owned());
        Toolkit {
            root,
            version,
            architectures: wanted.split(',').map(|architecture| architecture.trim().to_owned()).collect(),
            warnings_as_errors: std::env::var_os("GEMMA_CUDA_WERROR").is_some(),
        }
    }

    pub fn include(&self) -> PathBuf {
        self.root.join("include")
    }

    /// Compiles each kernel file by itself (no relocatable device code), as many at once as cargo allows jobs.
    pub fn compile(&self, sources: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let mut objects = Vec::new();
        for batch in sources.chunks(jobs) {
            let mut running = Vec::new();
            for source in batch {
                let name = source.file_stem().expect("a file has a name").to_string_lossy();
                let object = out.join(format!("{name}.cu.o"));
                let mut command = self.command(source, &object);
                let child = command.spawn().map_err(|error| format!("{}: {error}", self.nvcc().display()))?;
                running.push((source, child));
                objects.push(object);
            }
            for (source, mut child) in running {
                let status = child.wait().map_err(|error| format!("nvcc: {error}"))?;
                if !status.success() {
                    return Err(format!("nvcc could not compile {}; its messages stand above", source.display()));
                }
            }
        }
        Ok(objects)
    }

    fn command(&self, source: &Path, object: &Path) -> Command {
        let mut command = Command::new(self.nvcc());
        command.args(["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]);
        for architecture in &self.architectures {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        if self.version >= PACKS_DENSELY {
            command.arg("--compress-mode=size");
        }
        if self.warnings_as_errors {
            command.args(["-Werror", "all-warnings"]);
        }
        command.args(["-I", "cpp", "-c"]).arg(source).arg("-o").arg(object).stdin(Stdio::null());
        command
    }

    /// The runtime is linked statically; cuBLASLt is loaded when it is needed, the driver by the runtime.
    pub fn link(&self) {
        for folder in ["lib64", "lib", "targets/x86_64-linux/lib"] {
            println!("cargo:rustc-link-search=native={}", self.root.join(folder).display());
        }
        println!("cargo:rustc-link-lib=static=cudart_static");
        for library in ["dl", "rt", "pthread"] {
            println!("cargo:rustc-link-lib={library}");
        }
    }

    fn nvcc(&self) -> PathBuf {
        self.root.join("bin/nvcc")
    }
}

/// Folders that may hold `bin/nvcc`.
fn candidates() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        roots.extend(std::env::var_os(variable).map(PathBuf::from));
    }
    for folder in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        if folder.join("nvcc").is_file() {
            let real = folder.join("nvcc").canonicalize().unwrap_or_else(|_| folder.join("nvcc"));
            roots.extend(real.parent().and_then(Path::parent).map(Path::to_path_buf));
        }
    }
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        roots.extend(wheels(&Path::new(&environment).join("lib")));
    }
    let manifest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    roots.push(manifest.join(".cuda/nvidia/cu13"));
    roots.push("/usr/local/cuda".into());
    roots.retain(|root| root.join("bin/nvcc").is_file());
    roots
}

/// `python3.*/site-packages/nvidia/cu*` under a virtual environment's `lib`.
fn wheels(lib: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let found = std::fs::read_dir(folder).into_iter().flatten().flatten();
        found.map(|entry| entry.path()).collect()
    };
    entries(lib).iter().flat_map(|python| entries(&python.join("site-packages/nvidia"))).collect()
}

/// As `nvcc --version` prints it: "… release 13.0, V13.0.88".
fn version(root: &Path) -> Result<(u32, u32), String> {
    let output = Command::new(root.join("bin/nvcc")).arg("--version").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let parsed = number.and_then(|number| {
        let (major, minor) = number.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    parsed.ok_or_else(|| format!("`nvcc --version` says {:?}", text.trim()))
}

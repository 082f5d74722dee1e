//! Where prompts come from: the command line, a file, standard input.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

use crate::exit::bad_input;

/// One prompt a line; empty lines are left out.
pub fn from_file(path: &Path) -> Result<Vec<String>> {
    let text = read(path)?;
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    if lines.is_empty() {
        return Err(bad_input(format!("{} holds no prompt", path.display())));
    }
    Ok(lines)
}

/// All of standard input as one prompt, without the newline at its end.
pub fn from_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
    let text = utf8(bytes, "standard input")?;
    Ok(text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(&text).to_owned())
}

pub fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| gemma_cuda::Error::Io { path: path.to_owned(), source })?;
    utf8(bytes, &path.display().to_string())
}

fn utf8(bytes: Vec<u8>, origin: &str) -> Result<String> {
    String::from_utf8(bytes)
        .map_err(|error| bad_input(format!("{origin} is not valid UTF-8 (byte {})", error.utf8_error().valid_up_to())))
}

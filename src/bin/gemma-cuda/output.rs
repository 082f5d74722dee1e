//! Writing to standard output, flushed piece by piece, and notes to standard error.

use std::io::{self, Write};

use serde::Serialize;

pub fn text(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A line for the person at the terminal.
pub fn note(line: &str) {
    // Where standard error is closed, there is nobody to tell, and nothing is lost that was asked for.
    let _closed = writeln!(io::stderr(), "{line}");
}

/// One object a line.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    Ok(text(&line)?)
}

//! Calibration text to sequences of tokens.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// How a file holds its texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextFormat {
    /// One text.
    Plain,
    /// A JSON object a line, with a text in `text`.
    JsonLines,
}

impl TextFormat {
    /// `.jsonl` and `.ndjson` are JSON lines, all else is text.
    pub fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "ndjson") => TextFormat::JsonLines,
            _ => TextFormat::Plain,
        }
    }
}

/// Cuts the texts of a file into sequences of at most `window` tokens, each with the beginning-of-sequence token first, and
/// no more than `most` tokens in all.
///
/// # Errors
/// [`Error::Checkpoint`] naming the file if it is empty, not text, or shorter than `most`; [`Error::Tokenizer`] if the model
/// has none; [`Error::InvalidArgument`] for a window of less than two tokens.
pub fn sequences(
    checkpoint: &Checkpoint,
    path: &Path,
    format: TextFormat,
    window: usize,
    most: Option<usize>,
) -> Result<Vec<Vec<u32>>> {
    if window < 2 {
        return Err(Error::InvalidArgument(format!("a window of {window} tokens; it must be at least 2")));
    }
    let tokenizer = checkpoint
        .tokenizer()
        .ok_or_else(|| Error::Tokenizer("the checkpoint has no tokenizer.json, which calibration needs".into()))?;
    let bos = checkpoint.generation_config().bos_token_id;
    let first = usize::from(bos.is_some());
    let (mut out, mut tokens) = (Vec::new(), 0);
    for text in texts(path, format)? {
        let mut ids = tokenizer.encode(&text, false)?;
        ids.retain(|&id| id < checkpoint.spec().vocab_size);
        for chunk in ids.chunks(window - first) {
            let room = most.map_or(usize::MAX, |most| most - tokens);
            let chunk = &chunk[..chunk.len().min(room.saturating_sub(first))];
            if chunk.is_empty() {
                return Ok(out);
            }
            out.push(bos.iter().chain(chunk).copied().collect());
            tokens += first + chunk.len();
        }
    }
    match most {
        _ if out.is_empty() => Err(Error::checkpoint(path, "holds no text to calibrate with")),
        Some(most) if tokens + first < most => {
            Err(Error::checkpoint(path, format!("makes {tokens} tokens, fewer than the {most} asked for")))
        }
        _ => Ok(out),
    }
}

fn texts(path: &Path, format: TextFormat) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Error::checkpoint(path, format!("is not valid UTF-8 (byte {})", error.utf8_error().valid_up_to()))
    })?;
    if let Some(at) = text.find('\0') {
        return Err(Error::checkpoint(path, format!("is not text: byte {at} is zero")));
    }
    if format == TextFormat::Plain {
        return Ok(vec![text]);
    }
    let line = |(number, line): (usize, &str)| {
        let value: Option<Value> = serde_json::from_str(line).ok();
        let text = value.as_ref().and_then(|value| value.get("text")).and_then(Value::as_str);
        text.map(str::to_owned).ok_or_else(|| {
            Error::checkpoint(path, format!("line {}: not a JSON object with a string `text`", number + 1))
        })
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

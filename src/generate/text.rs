//! From generated tokens to text that can be shown.

use super::stop::{Scan, StopMatcher};
use crate::Result;
use crate::checkpoint::IncrementalDecoder;

/// Decodes tokens as they come and looks for stop strings in their text. Without a decoder all text is empty.
pub(crate) struct TextStream {
    decoder: Option<IncrementalDecoder>,
    matcher: StopMatcher,
    /// Tokens whose text is not searched.
    unsearched: usize,
}

impl TextStream {
    pub fn new(decoder: Option<IncrementalDecoder>, stops: Vec<String>, unsearched: usize) -> Self {
        TextStream { decoder, matcher: StopMatcher::new(stops), unsearched }
    }

    pub fn push(&mut self, token: u32) -> Result<Scan> {
        let text = match &mut self.decoder {
            Some(decoder) => decoder.push(token)?,
            None => String::new(),
        };
        if self.unsearched > 0 {
            self.unsearched -= 1;
            return Ok(Scan::Text(text));
        }
        Ok(self.matcher.push(&text))
    }

    /// The text still held back, once no more tokens can come.
    pub fn finish(&mut self) -> Result<Scan> {
        let text = match &mut self.decoder {
            Some(decoder) => decoder.finish()?,
            None => String::new(),
        };
        match self.matcher.push(&text) {
            Scan::Text(text) => Ok(Scan::Text(text + &self.matcher.finish())),
            stopped => Ok(stopped),
        }
    }
}

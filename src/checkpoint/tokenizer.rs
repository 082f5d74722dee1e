//! Text to token ids and back.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

/// A checkpoint's `tokenizer.json`. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: Option<u32>,
    vocab_size: u32,
}

impl Tokenizer {
    /// `vocab_size` is the number of rows of the model's embedding, which may be fewer than the tokenizer's ids.
    pub(super) fn read(dir: &Path, vocab_size: u32) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Ok(None);
        }
        let inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| Error::Tokenizer(format!("{}: {error}", path.display())))?;
        let bos = inner.token_to_id("<bos>");
        Ok(Some(Tokenizer { inner: Arc::new(inner), bos, vocab_size }))
    }

    /// The ids of `text`. With `add_bos` they begin with the beginning-of-text token, once, also where the text
    /// spells it itself.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming a token that the model's embedding lacks.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>> {
        // What a post-processor of the file would add is left out: who adds what is decided here alone.
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| Error::Tokenizer(format!("the text cannot be tokenized: {error}")))?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, Some(bos)) = (add_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        if let Some(&id) = ids.iter().find(|&&id| id >= self.vocab_size) {
            let token = self.inner.id_to_token(id).unwrap_or_default();
            return Err(Error::Tokenizer(format!(
                "the text holds {token:?}, token id {id}, which the model's embedding of {} rows lacks",
                self.vocab_size
            )));
        }
        Ok(ids)
    }

    /// The text of `ids`, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        decode(&self.inner, ids)
    }

    /// The id of a token spelled out, such as `<end_of_turn>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Ids the tokenizer knows; the model's embedding may have more rows or fewer.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Turns a stream of ids into a stream of text.
    pub fn incremental_decoder(&self) -> IncrementalDecoder {
        IncrementalDecoder { inner: self.inner.clone(), ids: Vec::new(), shown: 0 }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

fn decode(tokenizer: &tokenizers::Tokenizer, ids: &[u32]) -> Result<String> {
    tokenizer.decode(ids, true).map_err(|error| Error::Tokenizer(format!("the ids cannot be decoded: {error}")))
}

/// Ids in, text out, never a part of a character.
///
/// A token's text can depend on those before it (a character spelled in bytes over several tokens), so a window of
/// ids is decoded: what has been shown of it, and what has not. It starts anew once its text is complete.
pub struct IncrementalDecoder {
    inner: Arc<tokenizers::Tokenizer>,
    ids: Vec<u32>,
    /// The first so many of `ids` have been shown; they are kept as context.
    shown: usize,
}

impl IncrementalDecoder {
    /// The text that `id` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        // A decoder shows unfinished bytes as U+FFFD. Four bytes make the longest character; a longer run is damage.
        if text.ends_with('\u{FFFD}') && self.ids.len() - self.shown < 4 {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// What is left at the end of the stream: the replacement of an unfinished character, or nothing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.pending()?;
        self.ids.clear();
        self.shown = 0;
        Ok(text)
    }

    /// The text of the ids that have not been shown.
    fn pending(&self) -> Result<String> {
        let context = decode(&self.inner, &self.ids[..self.shown])?;
        let all = decode(&self.inner, &self.ids)?;
        match all.strip_prefix(&context) {
            Some(text) => Ok(text.to_owned()),
            // Bytes that make no character together with those before them change how the whole run decodes. What
            // was shown stays; the new ids stand for themselves.
            None => decode(&self.inner, &self.ids[self.shown..]),
        }
    }
}

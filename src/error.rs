//! The one error type of the library.

use std::path::{Path, PathBuf};

/// With [`enum@Error`] unless said otherwise.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by what a caller can do about it. Each message names the thing at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Of the file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// `config.json` (or another JSON file of a checkpoint) is not what a Gemma model has.
    #[error("{}: {message}", path.display())]
    Config {
        /// Of the file.
        path: PathBuf,
        /// What is wrong in it.
        message: String,
    },

    /// A safetensors file is malformed, or its tensors are not those the model has.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// Of the file or folder.
        path: PathBuf,
        /// What is wrong in it.
        message: String,
    },

    /// The tokenizer or the chat template failed.
    #[error("{0}")]
    Tokenizer(String),

    /// A parameter is out of range; nothing was started.
    #[error("{0}")]
    InvalidArgument(String),

    /// The prompt, with what it is to generate, does not fit the model's context or the KV cache.
    #[error("{0}")]
    TooLong(String),

    /// The device asked for cannot be used, or failed in a step, which the message names. After that the engine computes
    /// no more; one that is new may.
    #[error("{0}")]
    Device(String),

    /// No page of the KV cache is free.
    #[error("{0}")]
    OutOfPages(String),

    /// The core failed in a way that no caller can cause; the generation was abandoned.
    #[error("the engine failed: {0}")]
    Engine(String),
}

impl Error {
    /// The same error for one more of those it concerns; an I/O error keeps its kind and text.
    pub(crate) fn duplicate(&self) -> Self {
        match self {
            Error::Io { path, source } => {
                Error::Io { path: path.clone(), source: std::io::Error::new(source.kind(), source.to_string()) }
            }
            Error::Config { path, message } => Error::Config { path: path.clone(), message: message.clone() },
            Error::Checkpoint { path, message } => Error::Checkpoint { path: path.clone(), message: message.clone() },
            Error::Tokenizer(message) => Error::Tokenizer(message.clone()),
            Error::InvalidArgument(message) => Error::InvalidArgument(message.clone()),
            Error::TooLong(message) => Error::TooLong(message.clone()),
            Error::Device(message) => Error::Device(message.clone()),
            Error::OutOfPages(message) => Error::OutOfPages(message.clone()),
            Error::Engine(message) => Error::Engine(message.clone()),
        }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), source }
    }

    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Error::Config { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn checkpoint(path: &Path, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.to_owned(), message: message.into() }
    }
}

/// The core's errors start with their kind.
impl From<cxx::Exception> for Error {
    fn from(exception: cxx::Exception) -> Self {
        let text = exception.what();
        match text.split_once(": ") {
            Some(("invalid_argument", message)) => Error::InvalidArgument(message.into()),
            Some(("out_of_pages", message)) => Error::OutOfPages(message.into()),
            Some(("device", message)) => Error::Device(message.into()),
            _ => Error::Engine(text.into()),
        }
    }
}

//! How a run ends: its exit code, and the one line that says why.

use std::io;
use std::process::ExitCode;

use gemma_cuda::Error;

use crate::output;

/// How a command that did not fail ended.
pub enum Outcome {
    Done,
    /// It ran, but what it checked is beyond a limit.
    BeyondLimits,
    /// By Ctrl-C; what there was has been written.
    Interrupted,
}

/// Something in the input that the library could not see.
#[derive(Debug)]
struct BadInput(String);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

pub fn bad_input(message: impl Into<String>) -> anyhow::Error {
    BadInput(message.into()).into()
}

pub const INTERRUPTED: u8 = 130;

pub fn code(result: anyhow::Result<Outcome>) -> ExitCode {
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::BeyondLimits) => ExitCode::FAILURE,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        // Whoever read our output has enough of it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("error: {error:#}"));
            ExitCode::from(if is_bad_input(&error) { 2 } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn is_bad_input(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Error>() {
        Some(Error::Engine(_) | Error::OutOfPages(_)) => false,
        Some(_) => true,
        None => error.is::<BadInput>(),
    }
}

//! Ctrl-C: what is being generated is cancelled, so that its part can still be written; with nothing to cancel, or the
//! second time, the process ends at once.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use gemma_cuda::Canceller;

use crate::exit::INTERRUPTED;

#[derive(Clone, Default)]
pub struct Interrupt {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    running: Vec<Canceller>,
    interrupted: bool,
}

impl Interrupt {
    /// To be called once.
    pub fn install() -> Result<Self> {
        let interrupt = Interrupt::default();
        let handler = interrupt.clone();
        ctrlc::set_handler(move || handler.fire()).context("cannot handle Ctrl-C")?;
        Ok(interrupt)
    }

    /// Ctrl-C cancels these, until [`Interrupt::take`].
    pub fn watch(&self, generations: impl IntoIterator<Item = Canceller>) {
        self.with(|state| {
            state.running.extend(generations);
            if state.interrupted {
                state.running.iter().for_each(Canceller::cancel);
            }
        });
    }

    /// Whether Ctrl-C came since the last call; nothing is watched any more.
    pub fn take(&self) -> bool {
        self.with(|state| {
            state.running.clear();
            std::mem::take(&mut state.interrupted)
        })
    }

    fn fire(&self) {
        let cancelled = self.with(|state| {
            let first = !state.running.is_empty() && !state.interrupted;
            state.interrupted = true;
            state.running.iter().for_each(Canceller::cancel);
            first
        });
        if !cancelled {
            std::process::exit(INTERRUPTED.into());
        }
    }

    /// The state is plain data, good even if a thread panicked while it held the lock.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

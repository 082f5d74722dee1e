//! A progress bar on a terminal, and nothing at all elsewhere.

use std::io::{IsTerminal, stderr};

use gemma_cuda::LoadProgress;
use indicatif::{ProgressBar, ProgressStyle};

pub fn loading() -> ProgressBar {
    bar("loading {bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}")
}

pub fn writing() -> ProgressBar {
    bar("writing {bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}")
}

pub fn tokens() -> ProgressBar {
    bar("{bar:40} {human_pos}/{human_len} tokens, {per_sec}, {eta} left")
}

fn bar(template: &str) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

pub fn show(bar: &ProgressBar, loaded: LoadProgress) {
    bar.set_length(loaded.total);
    bar.set_position(loaded.done);
}

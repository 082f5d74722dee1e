//! What is written: the table's lines, and the chart.

use serde::Serialize;

use super::agreement::Agreement;
use super::chart::{Bar, Chart, Panel};
use super::measure::Figures;
use super::workload::Workload;

/// One line of the table.
#[derive(Serialize)]
pub struct Row {
    pub workload: Workload,
    pub configuration: &'static str,
    pub device: String,
    pub model: String,
    pub padded: bool,
    pub graphs: bool,
    #[serde(flatten)]
    pub figures: Figures,
    /// With the first row of the ladder; not there without one.
    #[serde(flatten)]
    pub agreement: Option<Agreement>,
}

/// `copy` in bytes a second.
pub fn head(model: &str, device: &str, copy: f64, max_new: Option<u32>, ladder: bool) -> String {
    let lengths = max_new.map_or(String::new(), |new| format!("; cut to {new} new tokens a request"));
    format!(
        "{model} on {device}; its copies reach {:.0} GB/s{lengths}\n{:>8} {:>15} {:>8} {:>7} {:>7} {:>9} {:>9} {:>7} {:>7} \
         {:>8} {:>9}  {:16}{}\n",
        copy / 1e9,
        "workload",
        "configuration",
        "requests",
        "prompt",
        "new",
        "seconds",
        "tokens/s",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "peak",
        "tokens",
        if ladder { "  equal" } else { "" },
    )
}

pub fn line(row: &Row) -> String {
    let Row { figures: f, agreement, .. } = row;
    let agreement = agreement.as_ref().map_or(String::new(), |agreement| {
        let gap = agreement.widest_near_tie.map_or(String::new(), |gap| format!(", others within {gap:.3}"));
        format!("  {} of {}{gap}", agreement.equal_requests, f.requests)
    });
    format!(
        "{:>8} {:>15} {:>8} {:>7} {:>7} {:>9.3} {:>9.1} {:>7.1} {:>6.1}% {:>8.2} {:>5.1} GiB  {}{agreement}\n",
        row.workload.to_string(),
        row.configuration,
        f.requests,
        f.prompt_tokens,
        f.new_tokens,
        f.seconds,
        f.tokens_per_second,
        f.gb_per_second,
        100.0 * f.share_of_copy,
        f.tflops,
        f.peak_memory_bytes as f64 / f64::from(1u32 << 30),
        f.tokens_hash,
    )
}

/// Seconds of every configuration, a panel a workload, as the tutorial's Figure 11 has them.
pub fn ladder_chart(rows: &[Row]) -> Chart {
    let mut panels: Vec<Panel> = Vec::new();
    let mut slowest = 0.0;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by_key(|row| rows.iter().position(|other| other.workload == row.workload));
    for row in sorted {
        let title = format!("{}: seconds", row.workload);
        if panels.last().is_none_or(|panel| panel.title != title) {
            panels.push(Panel { title, bars: Vec::new() });
            slowest = row.figures.seconds;
        }
        let seconds = row.figures.seconds;
        let text = format!("{seconds:.2} s ({:.2}x)", slowest / seconds);
        if let Some(panel) = panels.last_mut() {
            panel.bars.push(Bar { label: row.configuration.into(), value: seconds, text });
        }
    }
    Chart { title: title(rows), panels }
}

/// Tokens a second of every workload.
pub fn speed_chart(rows: &[Row]) -> Chart {
    let bars = rows.iter().map(|row| {
        let Figures { tokens_per_second: speed, share_of_copy, .. } = row.figures;
        let text = format!("{speed:.0} tokens/s ({:.0} % of copy)", 100.0 * share_of_copy);
        Bar { label: row.workload.to_string(), value: speed, text }
    });
    Chart { title: title(rows), panels: vec![Panel { title: "tokens/s".into(), bars: bars.collect() }] }
}

fn title(rows: &[Row]) -> String {
    rows.first().map_or(String::new(), |row| format!("{} on {}", row.model, row.device))
}

//! What is written: the table's lines, and the chart.

use serde::Serialize;

use super::agreement::Agreement;
use super::chart::{Bar, Chart, Panel};
use super::configuration::PUBLISHED;
use super::measure::Figures;
use super::peer::PeerRow;
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

/// The figures of another program that we have too.
pub fn peer_line(row: &PeerRow) -> String {
    format!(
        "{:>8} {:>15} {:>8} {:>7} {:>7} {:>9.3} {:>9.1}  ({})\n",
        row.workload,
        row.configuration,
        row.requests,
        row.prompt_tokens,
        row.new_tokens,
        row.seconds,
        row.tokens_per_second,
        row.device
    )
}

/// What the tutorial says of itself, told apart from what was measured.
pub fn published() -> String {
    let figures: Vec<String> = PUBLISHED.iter().map(|(name, seconds)| format!("{name} {seconds:.2} s")).collect();
    format!(
        "not measured here: the tutorial's own figures, on a machine of theirs, for what `seed` is like: {}\n",
        figures.join("; ")
    )
}

/// Seconds of every configuration, a panel a workload, as the tutorial's Figure 11 has them.
pub fn ladder_chart(rows: &[Row], peers: &[PeerRow]) -> Chart {
    let mut panels: Vec<Panel> = Vec::new();
    let mut slowest = 0.0;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by_key(|row| rows.iter().position(|other| other.workload == row.workload));
    for row in sorted {
        let title = format!("{}: seconds", row.workload);
        if panels.last().is_none_or(|panel| panel.title != title) {
            let others: Vec<&PeerRow> = peers.iter().filter(|peer| peer.workload == row.workload.to_string()).collect();
            slowest = others.iter().map(|peer| peer.seconds).fold(row.figures.seconds, f64::max);
            let bars = others.iter().map(|peer| bar(&peer.configuration, peer.seconds, slowest)).collect();
            panels.push(Panel { title, bars, published: false });
        }
        if let Some(panel) = panels.last_mut() {
            panel.bars.push(bar(row.configuration, row.figures.seconds, slowest));
        }
    }
    panels.push(Panel {
        title: "seed, as the tutorial publishes it, on a machine of theirs: seconds".into(),
        bars: PUBLISHED.iter().map(|(name, seconds)| bar(name, *seconds, PUBLISHED[0].1)).collect(),
        published: true,
    });
    Chart { title: title(rows), panels }
}

fn bar(label: &str, seconds: f64, slowest: f64) -> Bar {
    Bar { label: label.into(), value: seconds, text: format!("{seconds:.2} s ({:.2}x)", slowest / seconds) }
}

/// Tokens a second of every workload.
pub fn speed_chart(rows: &[Row]) -> Chart {
    let bars = rows.iter().map(|row| {
        let Figures { tokens_per_second: speed, share_of_copy, .. } = row.figures;
        let text = format!("{speed:.0} tokens/s ({:.0} % of copy)", 100.0 * share_of_copy);
        Bar { label: row.workload.to_string(), value: speed, text }
    });
    Chart {
        title: title(rows),
        panels: vec![Panel { title: "tokens/s".into(), bars: bars.collect(), published: false }],
    }
}

fn title(rows: &[Row]) -> String {
    rows.first().map_or(String::new(), |row| format!("{} on {}", row.model, row.device))
}

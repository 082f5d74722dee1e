//! Rows that another program measured: `benches/hf_baseline.py --json` writes them.

use std::path::Path;

use serde::Deserialize;

#[derive(Deserialize)]
pub struct PeerRow {
    pub workload: String,
    pub configuration: String,
    pub device: String,
    pub requests: usize,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
}

/// One object a line.
pub fn read(path: &Path) -> Result<Vec<PeerRow>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let rows = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| {
        serde_json::from_str(line)
            .map_err(|error| format!("{}, line {}: not a row of hf_baseline.py --json: {error}", path.display(), i + 1))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_others_named_by_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.jsonl");
        let row = r#"{"workload":"seed","configuration":"hf eager","device":"H100","requests":64,"prompt_tokens":4097,
            "new_tokens":57344,"seconds":90.5,"tokens_per_second":633.6,"torch":"2.11"}"#
            .replace('\n', " ");
        std::fs::write(&path, format!("{row}\n\n{row}\n")).unwrap();
        let rows = read(&path).unwrap();
        assert_eq!((rows.len(), rows[1].configuration.as_str(), rows[1].seconds), (2, "hf eager", 90.5));
        std::fs::write(&path, format!("{row}\nseed 90.5\n")).unwrap();
        assert!(read(&path).err().unwrap().contains("line 2"));
        assert!(read(&dir.path().join("none")).err().unwrap().contains("none"));
    }
}

//! Bar charts as SVG: one file that a browser or a README shows, readable on light and dark ground.

use std::fmt::Write;
use std::path::{Path, PathBuf};

pub struct Chart {
    pub title: String,
    pub panels: Vec<Panel>,
}

/// Bars that share a scale, from zero to the longest.
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
    /// Somebody else's figures, drawn as outlines.
    pub published: bool,
}

pub struct Bar {
    pub label: String,
    /// Its length; not below zero.
    pub value: f64,
    /// The value as it is written beside the bar.
    pub text: String,
}

const WIDTH: u32 = 760;
const LABELS: u32 = 180; // where bars begin
const LONGEST: u32 = 330; // of a bar; the rest is for its value
const ROW: u32 = 30;
const THICKNESS: u32 = 20;
const HEAD: u32 = 56; // above the first panel
const PANEL_HEAD: u32 = 34;

/// No ground of its own, and text in a color that the reader's ground decides.
const STYLE: &str = "\
text { font-family: system-ui, sans-serif; font-size: 14px; fill: #1f2328 }
.title { font-size: 18px; font-weight: 600 }
.panel { font-weight: 600 }
.label { text-anchor: end }
.bar { fill: #5b8c00 }
.published { fill: none; stroke: #808890; stroke-width: 1.5; stroke-dasharray: 5 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #9bd33c } }";

impl Chart {
    pub fn svg(&self) -> String {
        let rows = |panel: &Panel| PANEL_HEAD + ROW * panel.bars.len() as u32;
        let height = HEAD + self.panels.iter().map(rows).sum::<u32>() + 16;
        let mut out = String::new();
        let title = escape(&self.title);
        element(
            &mut out,
            format_args!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>"
            ),
        );
        text(&mut out, "title", 16, 32, &title);
        let mut y = HEAD;
        for panel in &self.panels {
            text(&mut out, "panel", 16, y + 18, &escape(&panel.title));
            y += PANEL_HEAD;
            for bar in &panel.bars {
                draw(&mut out, bar, panel, y);
                y += ROW;
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

impl Panel {
    fn longest(&self) -> f64 {
        self.bars.iter().map(|bar| bar.value).fold(0.0, f64::max)
    }
}

fn draw(out: &mut String, bar: &Bar, panel: &Panel, y: u32) {
    let longest = panel.longest();
    let class = if panel.published { "published" } else { "bar" };
    let share = if longest > 0.0 { (bar.value / longest).clamp(0.0, 1.0) } else { 0.0 };
    let width = share * f64::from(LONGEST);
    text(out, "label", LABELS - 10, y + 15, &escape(&bar.label));
    element(
        out,
        format_args!(
            "<rect class=\"{class}\" x=\"{LABELS}\" y=\"{y}\" width=\"{width:.1}\" height=\"{THICKNESS}\" rx=\"2\"/>"
        ),
    );
    text(out, "value", LABELS + 8 + width.ceil() as u32, y + 15, &escape(&bar.text));
}

fn text(out: &mut String, class: &str, x: u32, y: u32, escaped: &str) {
    element(out, format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{escaped}</text>"));
}

fn element(out: &mut String, markup: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _never = writeln!(out, "{markup}");
}

/// As XML's character data and attribute values; what XML cannot hold becomes U+FFFD.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            _ => out.push(c),
        }
    }
    out
}

/// Whether a file can come to be here, asked before hours of measuring; the error names what is wrong.
pub fn check_place(path: &Path) -> Result<(), String> {
    if path.is_dir() {
        return Err(format!("{} is a folder; give the chart's file", path.display()));
    }
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() || folder.is_dir() => Ok(()),
        _ => Err(format!("there is no folder to write {} into", path.display())),
    }
}

/// The whole file or none: it is written beside its place and then renamed.
pub fn write(path: &Path, svg: &str) -> Result<(), String> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    std::fs::write(&beside, svg).and_then(|()| std::fs::rename(&beside, path)).map_err(|error| {
        let _nothing_there = std::fs::remove_file(&beside);
        format!("cannot write {}: {error}", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        let bar = |label: &str, value, text: &str| Bar { label: label.into(), value, text: text.into() };
        Chart {
            title: "R&D <7B> on \"cuda:0\"\u{1}".into(),
            panels: vec![
                Panel {
                    title: "seed".into(),
                    bars: vec![bar("padded", 20.0, "20.0 s"), bar("a < b", 5.0, "5.0 s")],
                    published: false,
                },
                Panel { title: "none".into(), bars: vec![bar("nothing", 0.0, "0")], published: true },
            ],
        }
    }

    /// Every tag is closed in its turn, attributes are quoted, and text holds no bare `<` or `&`. Returns tag names in
    /// the order they open.
    fn elements(xml: &str) -> Vec<String> {
        let (mut open, mut all, mut rest) = (Vec::new(), Vec::new(), xml);
        while let Some((text, tail)) = rest.split_once('<') {
            for reference in text.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|known| reference.starts_with(known)), "{text}");
            }
            let (tag, after) = tail.split_once('>').expect("a tag ends");
            rest = after;
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
                continue;
            }
            let name = tag.split([' ', '/']).next().unwrap().to_owned();
            all.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        all
    }

    #[test]
    fn it_is_well_formed_and_holds_labels_and_values() {
        let svg = chart().svg();
        let all = elements(&svg);
        assert_eq!(all[..3], ["svg", "title", "style"]);
        assert_eq!(all.iter().filter(|name| *name == "rect").count(), 3);
        assert_eq!((svg.matches("class=\"bar\"").count(), svg.matches("class=\"published\"").count()), (2, 1));
        for part in
            ["R&amp;D &lt;7B&gt; on &quot;cuda:0&quot;\u{fffd}", ">padded<", ">a &lt; b<", ">20.0 s<", ">5.0 s<"]
        {
            assert!(svg.contains(part), "{part}: {svg}");
        }
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let svg = chart().svg();
        let widths: Vec<&str> = svg.lines().filter(|line| line.starts_with("<rect")).collect();
        assert!(widths[0].contains("width=\"330.0\"") && widths[1].contains("width=\"82.5\""), "{widths:?}");
        assert!(widths[2].contains("width=\"0.0\""));
    }

    #[test]
    fn a_file_is_replaced_whole_and_errors_name_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chart.svg");
        write(&path, "one").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(check_place(&path).is_ok() && check_place(Path::new("chart.svg")).is_ok());
        assert!(check_place(dir.path()).unwrap_err().contains("is a folder"));
        let nowhere = dir.path().join("none").join("chart.svg");
        assert!(check_place(&nowhere).unwrap_err().contains("chart.svg"));
        assert!(write(&nowhere, "three").unwrap_err().contains("chart.svg"));
    }
}

//! The largest magnitudes by layer as SVG: a line for each kind of tensor, on a logarithmic scale.

use std::collections::BTreeMap;
use std::fmt::Write;

const KINDS: [(&str, &str, &str); 6] = [
    ("self_attn.q_proj.input_scale", "input of q, k, v", "#0969da"),
    ("self_attn.k_scale", "keys", "#bf3989"),
    ("self_attn.v_scale", "values", "#8250df"),
    ("self_attn.o_proj.input_scale", "input of the attention's output", "#1a7f37"),
    ("mlp.gate_proj.input_scale", "input of gate and up", "#9a6700"),
    ("mlp.down_proj.input_scale", "input of down", "#cf222e"),
];

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 520.0; // the rest is for the legend
const TOP: f64 = 60.0;
const BOTTOM: f64 = 370.0;

const STYLE: &str = "\
text { font-family: system-ui, sans-serif; font-size: 13px; fill: #1f2328 }
.title { font-size: 18px; font-weight: 600 }
.axis { stroke: #8c959f; stroke-width: 1 }
.grid { stroke: #8c959f; stroke-width: 0.5; stroke-dasharray: 2 3 }
polyline { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }";

/// The tensor's layer and kind, in the order of the forward pass; what is in no layer comes last.
pub fn place(name: &str) -> (u32, usize) {
    let (layer, rest) = split(name).unwrap_or((u32::MAX, name));
    (layer, KINDS.iter().position(|(kind, ..)| *kind == rest).unwrap_or(KINDS.len()))
}

fn split(name: &str) -> Option<(u32, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

pub fn svg(largest: &[(&str, f32)]) -> String {
    let mut lines: BTreeMap<usize, Vec<(u32, f64)>> = BTreeMap::new();
    for (name, value) in largest {
        let (layer, kind) = place(name);
        if kind < KINDS.len() && *value > 0.0 {
            lines.entry(kind).or_default().push((layer, f64::from(*value).log10()));
        }
    }
    let points = || lines.values().flatten();
    let last = points().map(|&(layer, _)| layer).max().unwrap_or(0).max(1);
    let low = points().map(|&(_, value)| value).fold(0.0, f64::min).floor();
    let high = points().map(|&(_, value)| value).fold(low + 1.0, f64::max).ceil();
    let x = |layer: u32| LEFT + (RIGHT - LEFT) * f64::from(layer) / f64::from(last);
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low);

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         role=\"img\">\n<title>Largest magnitudes by layer</title>\n<style>{STYLE}</style>\n\
         <text class=\"title\" x=\"16\" y=\"32\">Largest magnitudes by layer</text>\n"
    );
    let mut add = |line: std::fmt::Arguments| writeln!(out, "{line}").expect("writing to a string");
    for power in low as i32..=high as i32 {
        let at = y(f64::from(power));
        add(format_args!("<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\"/>"));
        let text = format!("{}", 10f64.powi(power));
        add(format_args!("<text text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{text}</text>", LEFT - 8.0, at + 4.0));
    }
    add(format_args!("<line class=\"axis\" x1=\"{LEFT}\" y1=\"{BOTTOM}\" x2=\"{RIGHT}\" y2=\"{BOTTOM}\"/>"));
    for layer in [0, last / 2, last] {
        add(format_args!("<text text-anchor=\"middle\" x=\"{:.1}\" y=\"{}\">{layer}</text>", x(layer), BOTTOM + 20.0));
    }
    add(format_args!("<text text-anchor=\"middle\" x=\"{:.1}\" y=\"{}\">layer</text>", x(last / 2), BOTTOM + 40.0));
    for (row, (&kind, line)) in lines.iter().enumerate() {
        let (_, label, color) = KINDS[kind];
        let path: Vec<String> = line.iter().map(|&(layer, value)| format!("{:.1},{:.1}", x(layer), y(value))).collect();
        add(format_args!("<polyline stroke=\"{color}\" points=\"{}\"/>", path.join(" ")));
        let at = TOP + 14.0 + 24.0 * row as f64;
        let (from, to) = (RIGHT + 20.0, RIGHT + 44.0);
        add(format_args!(
            "<line x1=\"{from}\" y1=\"{at}\" x2=\"{to}\" y2=\"{at}\" stroke=\"{color}\" stroke-width=\"2\"/>"
        ));
        add(format_args!("<text x=\"{}\" y=\"{}\">{label}</text>", to + 8.0, at + 4.0));
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_line_and_numbers_are_finite() {
        let names: Vec<String> =
            (0..3).flat_map(|layer| KINDS.map(|(kind, ..)| format!("model.layers.{layer}.{kind}"))).collect();
        let values: Vec<(&str, f32)> =
            names.iter().zip(1..).map(|(name, i)| (name.as_str(), i as f32 * 0.01)).collect();
        let drawn = svg(&values);
        assert_eq!(drawn.matches("<polyline").count(), KINDS.len());
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"));
        assert!(svg(&[("model.layers.0.self_attn.k_scale", 0.0)]).ends_with("</svg>\n"));
        assert!(place("model.layers.10.self_attn.k_scale") > place("model.layers.9.mlp.down_proj.input_scale"));
    }
}

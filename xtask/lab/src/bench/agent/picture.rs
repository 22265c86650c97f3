//! The page's picture: bars, readable in light and dark.

use std::fmt::Write as _;

const WIDTH: f64 = 790.0;
const LABEL: f64 = 400.0;
const BAR: f64 = 18.0;
const GAP: f64 = 14.0;

/// A pair of bars.
pub(in crate::bench) struct Bars {
    pub(in crate::bench) label: String,
    /// What they show, the most important first.
    pub(in crate::bench) values: Vec<(&'static str, f64)>,
}

/// Draws `bars` in `unit` below `title`.
pub(in crate::bench) fn draw(title: &str, unit: &str, bars: &[Bars]) -> String {
    const COLOURS: [&str; 4] = ["#2f81f7", "#8b949e", "#3fb950", "#d29922"];
    let most = bars.iter().flat_map(|it| &it.values).map(|(_, value)| *value).fold(1.0, f64::max);
    let rows: usize = bars.iter().map(|it| it.values.len()).sum();
    let height = 60.0 + rows as f64 * BAR + bars.len() as f64 * GAP;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"26\" font-size=\"16\" fill=\"#1f2328\">{title} ({unit})</text>\n"
    );
    let mut y = 44.0;
    for group in bars {
        let middle = y + group.values.len() as f64 * BAR / 2.0 + 4.0;
        let label = &group.label;
        let _ = writeln!(
            svg,
            "<text x=\"{LABEL}\" y=\"{middle}\" text-anchor=\"end\" fill=\"#1f2328\">{label}</text>"
        );
        for (index, (name, value)) in group.values.iter().enumerate() {
            let width = value / most * (WIDTH - LABEL - 170.0);
            let (x, text_y) = (LABEL + 10.0, y + BAR - 5.0);
            let (colour, end) = (COLOURS[index % COLOURS.len()], x + width + 6.0);
            let shown =
                if *value < 1_000.0 { format!("{value:.1}") } else { format!("{value:.0}") };
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>\n\
                 <text x=\"{end:.1}\" y=\"{text_y}\" fill=\"#57606a\">{shown} {name}</text>",
                BAR - 2.0
            );
            y += BAR;
        }
        y += GAP;
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_bar_is_the_largest_value() {
        let bars =
            |label: &str, value| Bars { label: label.to_owned(), values: vec![("x", value)] };
        let svg = draw("title", "req/s", &[bars("a", 10.0), bars("b", 20.0)]);
        let widths: Vec<&str> =
            svg.split("width=\"").skip(2).map(|it| it.split('"').next().unwrap()).collect();
        assert_eq!(widths, ["110.0", "220.0"]);
    }
}

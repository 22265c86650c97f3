//! The picture of the dashboard in the documents: its panels where Grafana has them, and in them what Prometheus answered.

use std::{env, fmt::Write as _, fs, thread, time::Duration};

use lab::{
    monitoring::{Panel, panels},
    prometheus::Prometheus,
};
use serde_json::Value;

use super::{WINDOW, numbers};

/// The file to write, from the workspace's folder.
const VARIABLE: &str = "KIAM_DASHBOARD_PICTURE";
/// What the picture shows.
const SECONDS: u32 = 90;
/// Points a column and a row of Grafana's grid, and between panels.
const COLUMN: f64 = 50.0;
const ROW: f64 = 26.0;
const GAP: f64 = 6.0;
/// Above and below a panel's curves, and left of them.
const HEAD: f64 = 24.0;
const FOOT: f64 = 40.0;
const LEFT: f64 = 52.0;
const COLOURS: [&str; 8] =
    ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"];
/// Names that fit below a panel.
const NAMES: usize = 6;

/// A series: its name and its points, in seconds since the start.
struct Series(String, Vec<(f64, f64)>);

/// Where a panel is drawn.
struct Frame {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

/// Draws it if [`VARIABLE`] says where, after a minute or two of `traffic`.
pub(super) fn draw_if_asked(prometheus: &Prometheus, mut traffic: impl FnMut()) {
    let Some(file) = env::var_os(VARIABLE) else { return };
    for _ in 0..60 {
        traffic();
        thread::sleep(Duration::from_millis(300));
    }
    let now = numbers(&prometheus.query("timestamp(kiam_agent_ready)").unwrap_or_default());
    let now = now.first().copied().expect("Prometheus knows the time");
    let text = drawing(prometheus, now);
    fs::write(xtask::command::workspace().join(file), text).expect("the picture can be written");
}

fn drawing(prometheus: &Prometheus, now: f64) -> String {
    let panels = panels(WINDOW);
    let bottom = panels.iter().map(|panel| panel.place[1] + panel.place[3]).max().unwrap_or(0);
    let (width, height) = (24.0 * COLUMN, f64::from(bottom) * ROW);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n<title>The dashboard kiam-agent</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#f4f5f5\"/>\n"
    );
    for panel in &panels {
        let [x, y, w, h] = panel.place.map(f64::from);
        let frame = Frame { x: x * COLUMN, y: y * ROW, width: w * COLUMN, height: h * ROW };
        draw(&mut svg, panel, &frame, prometheus, now);
    }
    svg + "</svg>\n"
}

fn draw(svg: &mut String, panel: &Panel, frame: &Frame, prometheus: &Prometheus, now: f64) {
    let (x, y) = (frame.x + GAP, frame.y + GAP);
    if panel.targets.is_empty() {
        line(svg, x, frame.y + 19.0, "font-size=\"14\" font-weight=\"bold\"", &panel.title);
        return;
    }
    let (width, height) = (frame.width - GAP, frame.height - GAP);
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#fff\" stroke=\"#d8d9da\"/>"
    );
    line(svg, x + 6.0, y + 15.0, "font-weight=\"bold\"", &panel.title);
    if panel.is_stat {
        let answer = prometheus.query(&panel.targets[0].0).expect("the query is right");
        let value = numbers(&answer).first().map_or_else(|| "no data".to_owned(), f64::to_string);
        line(svg, x + 12.0, y + 66.0, "font-size=\"34\"", &value);
        return;
    }
    let mut series = Vec::new();
    for (expression, name) in &panel.targets {
        let answer = prometheus.query_range(expression, now, SECONDS).expect("the query is right");
        series.extend(answer.iter().map(|it| read(it, name, now)));
    }
    series.retain(|Series(_, points)| !points.is_empty());
    if series.is_empty() {
        line(svg, x + 12.0, y + 60.0, "fill=\"#888\"", "no data");
    }
    if panel.is_stacked {
        stack(&mut series);
    }
    let inner =
        Frame { x: x + LEFT, y: y + HEAD, width: width - LEFT - 8.0, height: height - HEAD - FOOT };
    curves(svg, panel, &inner, &series);
}

/// Points of a series, one each two seconds, with the name that the dashboard gives it.
fn read(series: &Value, name: &str, now: f64) -> Series {
    let mut name = name.to_owned();
    for (label, value) in series["metric"].as_object().into_iter().flatten() {
        name = name.replace(&format!("{{{{{label}}}}}"), value.as_str().unwrap_or_default());
    }
    let point = |pair: &Value| {
        let value: f64 = pair[1].as_str()?.parse().ok()?;
        let at = pair[0].as_f64()? - (now - f64::from(SECONDS));
        value.is_finite().then_some((at, value))
    };
    let values = series["values"].as_array().into_iter().flatten();
    Series(name, values.filter_map(point).step_by(2).collect())
}

/// Puts each series on top of the one before. All have the same instants, or lack some at the start.
fn stack(series: &mut [Series]) {
    let mut below: Vec<(f64, f64)> = Vec::new();
    for Series(_, points) in series {
        for (at, value) in points.iter_mut() {
            let under = below.iter().find(|(instant, _)| (instant - *at).abs() < 0.5);
            *value += under.map_or(0.0, |(_, value)| *value);
        }
        below.retain(|(instant, _)| !points.iter().any(|(at, _)| (instant - at).abs() < 0.5));
        below.extend(points.iter().copied());
    }
}

fn curves(svg: &mut String, panel: &Panel, frame: &Frame, series: &[Series]) {
    let values = series.iter().flat_map(|Series(_, points)| points.iter().map(|(_, value)| *value));
    let top = values.fold(0.0, f64::max);
    let top = if top > 0.0 { top } else { 1.0 };
    for share in [0.0, 0.5, 1.0] {
        let at = frame.y + frame.height * (1.0 - share);
        let _ = writeln!(
            svg,
            "<path d=\"M{:.0} {at:.0}h{:.0}\" stroke=\"#e8e8e8\"/>",
            frame.x, frame.width
        );
        let label = with_unit(top * share, &panel.unit);
        line(svg, frame.x - 4.0, at + 3.0, "fill=\"#666\" text-anchor=\"end\"", &label);
    }
    for (index, Series(name, points)) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut path = String::new();
        for (at, value) in points {
            let x = frame.x + frame.width * at / f64::from(SECONDS);
            let y = frame.y + frame.height * (1.0 - value / top);
            let _ = write!(path, "{}{x:.0} {y:.0}", if path.is_empty() { "M" } else { "L" });
        }
        let _ = writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\"/>");
        if index >= NAMES {
            continue;
        }
        let x = frame.x - LEFT + 10.0 + (index % 3) as f64 * (frame.width + LEFT) / 3.0;
        let y = frame.y + frame.height + 16.0 + (index / 3) as f64 * 13.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.0}\" y=\"{:.0}\" width=\"8\" height=\"3\" fill=\"{colour}\"/>",
            y - 5.0
        );
        line(svg, x + 11.0, y, "fill=\"#333\"", name);
    }
    if let Some(more) = series.len().checked_sub(NAMES).filter(|more| *more > 0) {
        let (x, y) = (frame.x + frame.width, frame.y - 9.0);
        line(svg, x, y, "fill=\"#666\" text-anchor=\"end\"", &format!("{more} more names"));
    }
}

fn with_unit(value: f64, unit: &str) -> String {
    match unit {
        "s" if value > 0.0 && value < 1.0 => format!("{:.1} ms", value * 1000.0),
        "s" => format!("{value:.1} s"),
        "reqps" | "cps" | "eps" => format!("{value:.1}/s"),
        _ => format!("{value:.1}"),
    }
}

fn line(svg: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, "<text x=\"{x:.0}\" y=\"{y:.0}\" {style}>{text}</text>");
}

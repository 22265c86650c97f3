//! Numbers and items as the document shows them.

use std::time::Duration;

use crate::tally::Millis;

/// 0.46, 5.3, 27, 1,234.
pub(super) fn count(number: f64) -> String {
    if number > 0.0 && number < 0.995 {
        return format!("{number:.2}");
    }
    if number < 9.95 && number.fract() > 0.0 {
        return format!("{number:.1}");
    }
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// As a percentage that is 0 only for nothing.
pub(super) fn share(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        0.0 => "0 %".to_owned(),
        _ if percent < 0.1 => "< 0.1 %".to_owned(),
        _ if percent < 9.95 => format!("{percent:.1} %"),
        _ => format!("{percent:.0} %"),
    }
}

/// Bytes a second.
pub(super) fn rate(bytes: f64) -> String {
    match bytes {
        _ if bytes >= 1e6 => format!("{} MB/s", count(bytes / 1e6)),
        _ => format!("{} kB/s", count(bytes / 1e3)),
    }
}

/// 15 min, 1 h.
pub(super) fn span(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds.is_multiple_of(3600) => format!("{} h", seconds / 3600),
        seconds => format!("{} min", seconds / 60),
    }
}

/// How long was waited; nothing if nobody did.
pub(super) fn wait(waiting: usize, millis: Millis) -> String {
    if waiting == 0 { String::new() } else { clock(millis) }
}

/// 7 s, 12 min.
pub(super) fn clock(millis: Millis) -> String {
    let seconds = if millis < 10 { 0.0 } else { millis as f64 / 1000.0 };
    if seconds < 100.0 {
        format!("{} s", count(seconds))
    } else {
        format!("{} min", count(seconds / 60.0))
    }
}

pub(super) fn emphasised(text: String, is_bad: bool) -> String {
    if is_bad { format!("**{text}**") } else { text }
}

/// An item of a list, wrapped at 100 columns.
pub(super) fn bullet(line: &str) -> String {
    let mut text = "-".to_owned();
    let mut column = 1;
    for word in line.split(' ') {
        let length = word.chars().count();
        if column + 1 + length > 100 {
            text.push_str("\n ");
            column = 1;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + length;
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_is_wrapped_at_100_columns() {
        let word = "x".repeat(48);
        assert_eq!(bullet("a b"), "- a b\n");
        assert_eq!(bullet(&format!("{word} {word} y")), format!("- {word} {word}\n  y\n"));
        assert_eq!(bullet(&format!("{word} {word}yy")), format!("- {word}\n  {word}yy\n"));
    }

    #[test]
    fn numbers_are_as_exact_as_they_are_useful() {
        let shown = [0.0, 0.46, 5.0, 5.53, 27.4, 999.6, 1234.5, 500_000.0].map(count);
        assert_eq!(shown, ["0", "0.46", "5", "5.5", "27", "1,000", "1,234", "500,000"]);
        let shown = [0.0, 0.000_01, 0.054, 0.5, 1.4].map(share);
        assert_eq!(shown, ["0 %", "< 0.1 %", "5.4 %", "50 %", "140 %"]);
        assert_eq!([1.0, 33.4e6].map(rate), ["0.00 kB/s", "33 MB/s"]);
    }
}

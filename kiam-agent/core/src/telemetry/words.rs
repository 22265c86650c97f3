//! Parts of the messages that people read.

/// `count` in words, such as `3 times`.
#[must_use]
pub fn times(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// `c`, or what stands for it in a line of printable ASCII: durations have a micro sign.
#[must_use]
pub fn plain_char(c: char) -> char {
    match c {
        ' '..='~' => c,
        '\u{b5}' | '\u{3bc}' => 'u',
        _ => '?',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_is_not_a_number_of_times() {
        assert_eq!([0, 1, 2].map(times), ["0 times", "once", "2 times"]);
    }
}

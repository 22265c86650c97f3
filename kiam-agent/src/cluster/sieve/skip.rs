//! Finds the end of skipped values, strings and numbers.

use std::mem;

use memchr::memchr2;

/// The position in a skipped value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SkipState {
    /// Outside of strings, at this depth of arrays and objects.
    Within { depth: usize },
    /// In a string.
    String { depth: usize },
    /// In a number, `true`, `false` or `null`.
    Scalar,
}

// === impl SkipState ===

impl SkipState {
    /// Takes the bytes that belong to the value, and returns how many, and whether it ends there.
    pub(super) fn take(&mut self, bytes: &[u8], escaped: &mut bool) -> (usize, bool) {
        match *self {
            Self::Scalar => {
                let end = end_of_scalar(bytes);
                (end.unwrap_or(bytes.len()), end.is_some())
            }
            Self::String { depth } => {
                let (within, ended, _) = string(bytes, escaped);
                if !ended {
                    return (within, false);
                }
                *self = Self::Within { depth };
                (within + 1, depth == 0)
            }
            Self::Within { mut depth } => {
                for (at, byte) in bytes.iter().enumerate() {
                    match byte {
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' if depth == 1 => return (at + 1, true),
                        b'}' | b']' => depth -= 1,
                        b'"' => {
                            *self = Self::String { depth };
                            return (at + 1, false);
                        }
                        _ => {}
                    }
                }
                *self = Self::Within { depth };
                (bytes.len(), false)
            }
        }
    }
}

/// The number of `bytes` within a string, whether its closing quote follows, and how many of those bytes belong to
/// escapes.
pub(super) fn string(bytes: &[u8], escaped: &mut bool) -> (usize, bool, usize) {
    let (mut at, mut escapes) = (0, 0);
    while at < bytes.len() {
        if mem::take(escaped) {
            // `\u` and its four digits stand for at least one byte.
            escapes += if bytes[at] == b'u' { 4 } else { 0 };
            at += 1;
            continue;
        }
        match memchr2(b'"', b'\\', &bytes[at..]) {
            None => return (bytes.len(), false, escapes),
            Some(next) if bytes[at + next] == b'"' => return (at + next, true, escapes),
            Some(next) => {
                *escaped = true;
                escapes += 1;
                at += next + 1;
            }
        }
    }
    (bytes.len(), false, escapes)
}

pub(super) fn end_of_scalar(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| byte.is_ascii_whitespace() || b",]}".contains(byte))
}

//! Reduces JSON while it arrives to the fields that are needed.
//!
//! An API object may have megabytes of other fields, a list of objects gigabytes. Each byte is read once, as it arrives,
//! and only the fields that a [`Filter`] names are copied. The result is a small JSON document of the same structure,
//! which `serde_json` parses and validates.
//!
//! A text that is longer than its `Filter` allows becomes `{"tooLong": <length>}`. Any other value of the wrong type
//! becomes an empty one or a short scalar, so that the parser rejects it.

mod skip;

use std::{mem, ops::ControlFlow};

use self::skip::{SkipState, end_of_scalar, string};

/// The part of a value that is copied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Filter {
    /// A scalar, of at most this many bytes if it is a string.
    Text(usize),
    /// These fields of an object.
    Fields(&'static [(&'static str, Filter)]),
    /// The first elements of an array.
    Each(&'static Filter),
    /// The elements of an array, each of which is returned by itself.
    Items(&'static Filter),
}

/// The bytes are invalid JSON, or too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidJson {
    #[error("unexpected {0:?} at byte {1}")]
    Unexpected(char, u64),
    #[error("it ends after {0} bytes, before the document is complete")]
    Short(u64),
    #[error("its needed fields have more than {MOST_KEPT} bytes")]
    Large,
}

/// A reader that reduces one document after another.
#[derive(Debug)]
pub(super) struct Sieve {
    root: &'static Filter,
    state: State,
    frames: Vec<Frame>,
    /// The reduced document so far.
    kept: Vec<u8>,
    /// The raw bytes of the current key.
    key: Vec<u8>,
    /// Whether the last byte was a backslash in a string.
    escaped: bool,
    /// The bytes of the document so far.
    position: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Before a value, which is skipped if `None`.
    Value(Option<&'static Filter>),
    /// Before the first element of an array, or its end.
    FirstElement,
    /// Before a key, or, if it is the `first`, the end of the object.
    Key {
        first: bool,
    },
    /// Within a key.
    InKey,
    /// Before the colon and the value of a field.
    Colon(Option<&'static Filter>),
    /// Within a string that is copied.
    Text(Text),
    /// Within another scalar, copied from `start` on.
    Scalar {
        start: usize,
    },
    /// Within a value that is skipped.
    Skip(SkipState),
    /// Before a comma, or the end of the innermost array or object.
    After,
    /// The document is complete.
    Done,
    Invalid(InvalidJson),
}

/// The state of a string that is copied.
#[derive(Clone, Copy, Debug)]
struct Text {
    /// Its offset in the reduced document.
    start: usize,
    /// Its longest length, in bytes.
    most: usize,
    /// Its raw bytes so far, and how many of them belong to escapes.
    raw: usize,
    escapes: usize,
    /// Whether it is longer than `most`.
    too_long: bool,
}

/// An array or object that is copied.
#[derive(Debug)]
struct Frame {
    keep: &'static Filter,
    /// The number of members copied.
    written: usize,
    /// The offset of the current element in the reduced document.
    start: usize,
}

type Step = ControlFlow<InvalidJson, usize>;

/// The largest reduced document; real ones are a tenth of it.
const MOST_KEPT: usize = 2 * 1024 * 1024;
/// The most elements of a [`Filter::Each`].
const MOST_ELEMENTS: usize = 64;
/// The longest raw key that may match a field, even if all of it is escaped.
const LONGEST_KEY: usize = 512;
/// The longest number.
const LONGEST_SCALAR: usize = 64;
/// The value in place of the elements beyond [`MOST_ELEMENTS`], which no parser here accepts.
const ODD: &[u8] = b"0";

// === impl Sieve ===

impl Sieve {
    pub(super) fn new(root: &'static Filter) -> Self {
        let (frames, kept, key) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            root,
            state: State::Value(Some(root)),
            frames,
            kept,
            key,
            escaped: false,
            position: 0,
        }
    }

    /// Takes the next bytes, and calls `item` with each complete element of a [`Filter::Items`].
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut item: impl FnMut(&[u8])) {
        while !bytes.is_empty() {
            match self.step(bytes, &mut item) {
                ControlFlow::Continue(taken) => {
                    self.position += taken as u64;
                    bytes = &bytes[taken..];
                }
                ControlFlow::Break(broken) => self.state = State::Invalid(broken),
            }
            if matches!(self.state, State::Invalid(_)) {
                return;
            }
        }
    }

    /// Ends the document, and returns it reduced; `None` if there was only white space. The next bytes begin another one.
    pub(super) fn finish(&mut self) -> Result<Option<Vec<u8>>, InvalidJson> {
        if let State::Scalar { .. } = self.state {
            let ended = self.value_done(&mut |_| {});
            if let ControlFlow::Break(broken) = ended {
                self.state = State::Invalid(broken);
            }
        }
        let Self { state, kept, position, .. } = mem::replace(self, Self::new(self.root));
        match state {
            State::Done => Ok(Some(kept)),
            State::Value(_) if kept.is_empty() => Ok(None),
            State::Invalid(broken) => Err(broken),
            _ => Err(InvalidJson::Short(position)),
        }
    }

    /// Takes some of `bytes`, which must not be empty, and returns how many.
    fn step(&mut self, bytes: &[u8], item: &mut impl FnMut(&[u8])) -> Step {
        match self.state {
            State::Text(text) => self.text(bytes, text, item),
            State::InKey => self.key(bytes),
            State::Skip(skip) => self.skip(bytes, skip, item),
            State::Scalar { start } => {
                let end = end_of_scalar(bytes);
                self.kept.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
                if self.kept.len() - start > LONGEST_SCALAR {
                    return self.unexpected(bytes[0]);
                }
                if end.is_some() {
                    self.value_done(item)?;
                }
                ControlFlow::Continue(end.unwrap_or(bytes.len()))
            }
            _ if bytes[0].is_ascii_whitespace() => {
                let blank = bytes.iter().position(|byte| !byte.is_ascii_whitespace());
                ControlFlow::Continue(blank.unwrap_or(bytes.len()))
            }
            _ => self.sign(bytes[0], item),
        }
    }

    /// Takes one byte outside of strings and numbers.
    fn sign(&mut self, byte: u8, item: &mut impl FnMut(&[u8])) -> Step {
        match (self.state, byte) {
            (State::FirstElement, b']') | (State::Key { first: true }, b'}') => {
                self.close(byte, item)?;
            }
            (State::FirstElement, _) => {
                self.state = State::Value(self.element());
                return ControlFlow::Continue(0);
            }
            (State::Value(keep), _) => return self.begin(keep, byte),
            (State::Key { .. }, b'"') => {
                self.key.clear();
                self.state = State::InKey;
            }
            (State::Colon(keep), b':') => self.state = State::Value(keep),
            (State::After, b',') => match self.frames.last().map(|frame| frame.keep) {
                Some(Filter::Fields(_)) => self.state = State::Key { first: false },
                _ => self.state = State::Value(self.element()),
            },
            (State::After, b']' | b'}') => self.close(byte, item)?,
            _ => return self.unexpected(byte),
        }
        ControlFlow::Continue(1)
    }

    /// A value begins with `byte`.
    fn begin(&mut self, keep: Option<&'static Filter>, byte: u8) -> Step {
        if self.kept.len() > MOST_KEPT {
            return ControlFlow::Break(InvalidJson::Large);
        }
        if !matches!(byte, b'{' | b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') {
            return self.unexpected(byte);
        }
        let start = self.kept.len();
        self.state = match (keep, byte) {
            (Some(Filter::Fields(_)), b'{') | (Some(Filter::Each(_) | Filter::Items(_)), b'[') => {
                self.kept.push(byte);
                let start = self.kept.len();
                self.frames.extend(keep.map(|keep| Frame { keep, written: 0, start }));
                match byte {
                    b'{' => State::Key { first: true },
                    _ => State::FirstElement,
                }
            }
            (Some(keep), b'"') => {
                self.kept.push(byte);
                let most = match keep {
                    Filter::Text(most) => *most,
                    _ => LONGEST_SCALAR,
                };
                State::Text(Text { start, most, raw: 0, escapes: 0, too_long: false })
            }
            (Some(_), b'{' | b'[') => {
                self.kept.extend_from_slice(if byte == b'{' { b"{}" } else { b"[]" });
                State::Skip(SkipState::Within { depth: 1 })
            }
            (None, b'{' | b'[') => State::Skip(SkipState::Within { depth: 1 }),
            (None, b'"') => State::Skip(SkipState::String { depth: 0 }),
            // The byte is taken with the scalar.
            (Some(_), _) => {
                self.state = State::Scalar { start };
                return ControlFlow::Continue(0);
            }
            (None, _) => State::Skip(SkipState::Scalar),
        };
        ControlFlow::Continue(1)
    }

    /// The filter of the next element of the innermost array.
    fn element(&mut self) -> Option<&'static Filter> {
        let frame = self.frames.last_mut()?;
        match *frame.keep {
            Filter::Items(keep) => {
                frame.start = self.kept.len();
                Some(keep)
            }
            Filter::Each(keep) => {
                frame.written += 1;
                if frame.written > MOST_ELEMENTS + 1 {
                    return None;
                }
                if frame.written > 1 {
                    self.kept.push(b',');
                }
                if frame.written > MOST_ELEMENTS {
                    self.kept.extend_from_slice(ODD);
                    return None;
                }
                Some(keep)
            }
            Filter::Text(_) | Filter::Fields(_) => None,
        }
    }

    /// The innermost array or object ends with `byte`.
    fn close(&mut self, byte: u8, item: &mut impl FnMut(&[u8])) -> ControlFlow<InvalidJson> {
        let is_object = |frame: &Frame| matches!(frame.keep, Filter::Fields(_));
        if self.frames.last().map(is_object) != Some(byte == b'}') {
            return ControlFlow::Break(InvalidJson::Unexpected(char::from(byte), self.position));
        }
        self.frames.pop();
        self.kept.push(byte);
        self.value_done(item)
    }

    fn value_done(&mut self, item: &mut impl FnMut(&[u8])) -> ControlFlow<InvalidJson> {
        if self.kept.len() > MOST_KEPT {
            return ControlFlow::Break(InvalidJson::Large);
        }
        self.state = match self.frames.last() {
            None => State::Done,
            Some(frame) => {
                if let Filter::Items(_) = frame.keep {
                    item(&self.kept[frame.start..]);
                    self.kept.truncate(frame.start);
                }
                State::After
            }
        };
        ControlFlow::Continue(())
    }

    fn key(&mut self, bytes: &[u8]) -> Step {
        let (within, ended, _) = string(bytes, &mut self.escaped);
        let room = LONGEST_KEY.saturating_sub(self.key.len()) + 1;
        self.key.extend_from_slice(&bytes[..within.min(room)]);
        if !ended {
            return ControlFlow::Continue(within);
        }
        let found = self.field();
        if let (Some((name, _)), Some(frame)) = (found, self.frames.last_mut()) {
            if frame.written > 0 {
                self.kept.push(b',');
            }
            frame.written += 1;
            self.kept.push(b'"');
            self.kept.extend_from_slice(name.as_bytes());
            self.kept.extend_from_slice(b"\":");
        }
        self.state = State::Colon(found.map(|(_, keep)| keep));
        ControlFlow::Continue(within + 1)
    }

    /// The filter of the field whose key was read; `None` if it is skipped.
    fn field(&self) -> Option<&'static (&'static str, Filter)> {
        let Some(Filter::Fields(fields)) = self.frames.last().map(|frame| frame.keep) else {
            return None;
        };
        if self.key.len() > LONGEST_KEY {
            return None;
        }
        if !self.key.contains(&b'\\') {
            return fields.iter().find(|(name, _)| name.as_bytes() == self.key);
        }
        let quoted = [b"\"", &*self.key, b"\""].concat();
        let key: String = serde_json::from_slice(&quoted).ok()?;
        fields.iter().find(|(name, _)| *name == key)
    }

    fn text(&mut self, bytes: &[u8], mut text: Text, item: &mut impl FnMut(&[u8])) -> Step {
        let (within, ended, escapes) = string(bytes, &mut self.escaped);
        text.raw += within;
        text.escapes += escapes;
        // In the middle of an escape this is too low, but never too high.
        let length = text.raw.saturating_sub(text.escapes);
        text.too_long |= length > text.most;
        if text.too_long {
            self.kept.truncate(text.start);
        } else {
            self.kept.extend_from_slice(&bytes[..within]);
        }
        self.state = State::Text(text);
        if !ended {
            return ControlFlow::Continue(within);
        }
        if text.too_long {
            self.kept.extend_from_slice(format!("{{\"tooLong\":{length}}}").as_bytes());
        } else {
            self.kept.push(b'"');
        }
        self.value_done(item)?;
        ControlFlow::Continue(within + 1)
    }

    fn skip(&mut self, bytes: &[u8], mut skip: SkipState, item: &mut impl FnMut(&[u8])) -> Step {
        let (taken, ended) = skip.take(bytes, &mut self.escaped);
        self.state = State::Skip(skip);
        if ended {
            self.value_done(item)?;
        }
        ControlFlow::Continue(taken)
    }

    fn unexpected(&self, byte: u8) -> Step {
        ControlFlow::Break(InvalidJson::Unexpected(char::from(byte), self.position))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;

    const INNER: Filter =
        Filter::Fields(&[("a", Filter::Text(8)), ("list", Filter::Each(&Filter::Text(8)))]);
    static ROOT: Filter = Filter::Fields(&[
        ("a", Filter::Text(8)),
        ("b", INNER),
        ("items", Filter::Items(&INNER)),
        ("list", Filter::Each(&INNER)),
    ]);

    /// What comes out of `text`, fed in pieces of these lengths.
    fn reduce(
        text: &str,
        mut piece: impl FnMut() -> usize,
    ) -> Result<(Value, Vec<Value>), InvalidJson> {
        let (mut sieve, mut items, mut rest) = (Sieve::new(&ROOT), Vec::new(), text.as_bytes());
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            sieve.feed(now, |item| items.push(serde_json::from_slice(item).unwrap()));
            rest = later;
        }
        let document = sieve.finish()?.unwrap_or_else(|| b"\"nothing\"".to_vec());
        Ok((serde_json::from_slice(&document).unwrap(), items))
    }

    /// The same, from the whole value.
    fn reduced(value: &Value, keep: &Filter, items: &mut Vec<Value>) -> Value {
        let most = match keep {
            Filter::Text(most) => *most,
            _ => LONGEST_SCALAR,
        };
        match (value, keep) {
            (Value::String(text), _) if text.len() > most => json!({ "tooLong": text.len() }),
            (Value::Object(object), Filter::Fields(fields)) => {
                let mut kept = Map::new();
                for (name, keep) in *fields {
                    if let Some(value) = object.get(*name) {
                        kept.insert((*name).to_owned(), reduced(value, keep, items));
                    }
                }
                Value::Object(kept)
            }
            (Value::Array(array), Filter::Each(keep)) => {
                array.iter().map(|value| reduced(value, keep, items)).collect()
            }
            (Value::Array(array), Filter::Items(keep)) => {
                for value in array {
                    let item = reduced(value, keep, &mut Vec::new());
                    items.push(item);
                }
                json!([])
            }
            (Value::Object(_), _) => json!({}),
            (Value::Array(_), _) => json!([]),
            (scalar, _) => scalar.clone(),
        }
    }

    fn random(rng: &mut fastrand::Rng, depth: usize) -> Value {
        let texts = [
            "",
            "a",
            "\"",
            "\\",
            "}{",
            "][",
            "a,b:c",
            "\n\t\u{1}",
            "tooLong",
            "12345678",
            "123456789",
        ];
        match rng.u8(0..if depth == 0 { 4 } else { 7 }) {
            0 => json!(texts[rng.usize(..texts.len())]),
            1 => json!(rng.i32(..)),
            2 => [json!(null), json!(true), json!(-1.5e7)][rng.usize(..3)].clone(),
            3 => json!("x".repeat(rng.usize(0..200))),
            4 => (0..rng.usize(0..5)).map(|_| random(rng, depth - 1)).collect(),
            _ => object(rng, depth - 1),
        }
    }

    fn object(rng: &mut fastrand::Rng, depth: usize) -> Value {
        let keys = ["a", "b", "items", "list", "other", "\"a", "\\", "{"];
        let key = |rng: &mut fastrand::Rng| keys[rng.usize(..keys.len())].to_owned();
        let members = (0..rng.usize(0..6)).map(|_| (key(rng), random(rng, depth)));
        Value::Object(members.collect())
    }

    #[test]
    fn what_comes_out_is_what_is_wanted_of_the_whole_however_it_is_cut() {
        let mut with_items = 0;
        for seed in 0..4_000 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let value = match rng.u8(0..8) {
                0 => random(&mut rng, 4),
                _ => object(&mut rng, 4),
            };
            let text = if rng.bool() { value.to_string() } else { format!("{value:#}") };
            let most = rng.usize(1..20);
            let mut expected_items = Vec::new();
            let expected = reduced(&value, &ROOT, &mut expected_items);
            let (kept, items) = reduce(&text, || rng.usize(1..=most)).unwrap();
            assert_eq!(kept, expected, "seed {seed}: {text}");
            // Those of one array alone are in order; fields come in that of their names here.
            assert_eq!(items, expected_items, "seed {seed}: {text}");
            with_items += usize::from(!items.is_empty());
        }
        assert!(with_items > 50, "{with_items}");
    }

    #[test]
    fn escapes_hide_no_key_and_are_not_counted() {
        for (text, expected) in [
            (r#"{"\u0061":"x"}"#, json!({"a": "x"})),
            (r#"{"a\u0000":"x","\"a":1}"#, json!({})),
            (
                r#"{"a":"\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061"}"#,
                json!({"a": "aaaaaaaa"}),
            ),
            (
                r#"{"a":"\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061a"}"#,
                json!({"a": {"tooLong": 9}}),
            ),
            (r#"{"a":"\"\\\/\b\f\n\r\t"}"#, json!({"a": "\"\\/\u{8}\u{c}\n\r\t"})),
            (r#"{"a":"123456789\u0061\u0061"}"#, json!({"a": {"tooLong": 11}})),
        ] {
            for piece in 1..=text.len() {
                assert_eq!(reduce(text, || piece).unwrap().0, expected, "{text} by {piece}");
            }
        }
    }

    #[test]
    fn what_is_no_json_is_told_and_nothing_else_follows_a_document() {
        for text in [
            "x",
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":1",
            "{\"a\":1,",
            "{\"a\":1,}",
            "{\"a\" 1}",
            "{a:1}",
            "[",
            "{]",
            "{} {}",
            "{\"b\":{\"a\":\"x",
            "{\"items\":[1",
            "{\"items\":[1,]}",
            "{\"items\":[1}}",
            "{\"o\":[",
            "{\"o\":\"",
            "<html>",
        ] {
            for piece in 1..=text.len() {
                assert!(reduce(text, || piece).is_err(), "{text} by {piece}");
            }
        }
        assert_eq!(reduce(" \n", || 1).unwrap().0, json!("nothing"));
    }

    #[test]
    fn however_much_comes_little_is_kept() {
        let mut sieve = Sieve::new(&ROOT);
        let mut items = 0;
        let many = "\"y\",".repeat(1_000);
        let big = "x".repeat(1_000_000);
        sieve.feed(b"{\"items\":[", |_| items += 1);
        for n in 0..20 {
            let comma = if n == 0 { "" } else { "," };
            let item = format!("{comma}{{\"a\":\"{big}\",\"o\":[{many}0],\"list\":[{many}1]}}");
            sieve.feed(item.as_bytes(), |item| {
                assert!(item.len() < 1_000, "{}", item.len());
                items += 1;
            });
        }
        sieve.feed(b"]}", |_| items += 1);
        assert!(sieve.kept.capacity() < 4_096, "{}", sieve.kept.capacity());
        assert_eq!((items, sieve.finish().unwrap().unwrap()), (20, b"{\"items\":[]}".to_vec()));
    }
}

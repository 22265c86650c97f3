//! Reads manifests: YAML of several documents or JSON, from files and standard input.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::PathBuf,
};

use serde::Deserialize as _;
use serde_json::Value;

use super::{Error, printable::printable};

/// The name of standard input on the command line.
const STDIN: &str = "-";
/// The most nodes of one YAML document. A list of all pods of a large cluster has millions; the parser's own limit is for
/// input from strangers.
const MAX_NODES: usize = 50_000_000;

/// A source of manifests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

/// The place of an object, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub(super) source: String,
    /// The number of the document in the source, from 1; 0 where there are none.
    pub(super) document: usize,
}

/// A Kubernetes object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) place: Place,
    pub(super) value: Value,
}

// === impl Source ===

impl Source {
    /// The source that the command line names.
    #[must_use]
    pub fn new(text: &str) -> Self {
        if text == STDIN { Self::Stdin } else { Self::File(text.into()) }
    }

    fn read(&self) -> io::Result<String> {
        match self {
            Self::File(path) => fs::read_to_string(path),
            Self::Stdin => {
                let mut text = String::new();
                io::stdin().read_to_string(&mut text).map(|_| text)
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

// === impl Place ===

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.document {
            0 => f.write_str(&self.source),
            number => write!(f, "{}, document {number}", self.source),
        }
    }
}

/// All objects of `sources`, those in lists one by one.
pub(super) fn read(sources: &[Source]) -> Result<Vec<Object>, Error> {
    let mut objects = Vec::new();
    for source in sources {
        let name = source.to_string();
        let text =
            source.read().map_err(|error| Error::Read { source_name: name.clone(), error })?;
        parse(&name, &text, &mut objects)?;
    }
    Ok(objects)
}

/// Adds the objects of `text`.
pub(super) fn parse(name: &str, text: &str, objects: &mut Vec<Object>) -> Result<(), Error> {
    // A byte order mark is no text.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let start = text.trim_start();
    if start.starts_with(['{', '[']) && !start.starts_with("{{") {
        let before = objects.len();
        let Err(wrong) = json(name, text, objects) else { return Ok(()) };
        // YAML may begin with a brace, too.
        objects.truncate(before);
        return yaml(name, text, objects).map_err(|_| wrong);
    }
    yaml(name, text, objects)
}

fn yaml(name: &str, text: &str, objects: &mut Vec<Object>) -> Result<(), Error> {
    for (index, document) in documents(text).into_iter().enumerate() {
        let place = Place { source: name.to_owned(), document: index + 1 };
        let value: Value = match serde_saphyr::from_str_with_options(&document.text, options()) {
            Ok(value) => value,
            Err(error) => return Err(not_yaml(&place, &document, &error)),
        };
        add(&place, value, objects)?;
    }
    Ok(())
}

fn json(name: &str, text: &str, objects: &mut Vec<Object>) -> Result<(), Error> {
    let mut values = serde_json::Deserializer::from_str(text);
    for number in 1.. {
        let place = Place { source: name.to_owned(), document: number };
        match Value::deserialize(&mut values) {
            Ok(value) => add(&place, value, objects)?,
            Err(error) if error.is_eof() && number > 1 => break,
            Err(error) => return Err(Error::NotJson { place, error }),
        }
    }
    Ok(())
}

/// Adds `value`, or its items.
fn add(place: &Place, value: Value, objects: &mut Vec<Object>) -> Result<(), Error> {
    match value {
        Value::Null => Ok(()),
        Value::Array(values) => values.into_iter().try_for_each(|it| add(place, it, objects)),
        Value::Object(mut map) => {
            if let Some(Value::Array(items)) = map.get_mut("items").map(Value::take) {
                return items.into_iter().try_for_each(|item| add(place, item, objects));
            }
            objects.push(Object { place: place.clone(), value: Value::Object(map) });
            Ok(())
        }
        other => Err(Error::NoObject { place: place.clone(), found: shown(&other) }),
    }
}

/// The first words of a value that is no object.
fn shown(value: &Value) -> String {
    printable(&value.to_string().chars().take(60).collect::<String>())
}

/// A document of a stream, with the number of the line before it.
struct Document {
    text: String,
    line: usize,
}

/// The documents of a YAML stream. A line that begins with `---` is never part of a value, so that each can be parsed by
/// itself, and errors can name it. Empty ones, which Helm prints, count.
fn documents(text: &str) -> Vec<Document> {
    let mut documents = vec![Document { text: String::new(), line: 0 }];
    let mut has_marker = false;
    for (index, line) in text.lines().enumerate() {
        let marker = line.strip_prefix("---");
        let Some(rest) = marker.filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        else {
            if let Some(document) = documents.last_mut() {
                document.text.push_str(line);
                document.text.push('\n');
            }
            continue;
        };
        // Comments and directives before the first marker are no document.
        let is_first = !std::mem::replace(&mut has_marker, true);
        if is_first && documents[0].is_blank() {
            documents.clear();
        }
        documents.push(Document { text: format!("{rest}\n"), line: index });
    }
    documents
}

impl Document {
    fn is_blank(&self) -> bool {
        let mut lines = self.text.lines().map(str::trim_start);
        lines.all(|line| line.is_empty() || line.starts_with(['#', '%']))
    }
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MAX_NODES,
            max_events: MAX_NODES * 2,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
        },
        // As the API server and kubectl take them.
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        with_snippet: false,
    }
}

fn not_yaml(place: &Place, document: &Document, error: &serde_saphyr::Error) -> Error {
    let line = error.location().map(|location| document.line + location.line() as usize);
    Error::NotYaml {
        place: place.clone(),
        line,
        problem: printable(&error.without_snippet().to_string()),
        template: document.text.contains("{{"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Result<Vec<(usize, String)>, String> {
        let mut objects = Vec::new();
        parse("old.yaml", text, &mut objects).map_err(|error| error.to_string())?;
        let name = |object: &Object| object.value["metadata"]["name"].as_str().unwrap().to_owned();
        Ok(objects.iter().map(|object| (object.place.document, name(object))).collect())
    }

    fn found(pairs: &[(usize, &str)]) -> Result<Vec<(usize, String)>, String> {
        Ok(pairs.iter().map(|(document, name)| (*document, (*name).to_owned())).collect())
    }

    #[test]
    fn documents_lists_and_json_are_read_one_by_one() {
        let one = "kind: Pod\nmetadata: {name: a}\n";
        assert_eq!(names(one), found(&[(1, "a")]));
        let helm = "# Source: a.yaml\n---\n# Source: b.yaml\n---\nkind: Pod\nmetadata: {name: a}\n---\n\
                    kind: Pod\nmetadata:\n  name: b\n  annotations:\n    text: |\n      a\n      ---\n";
        assert_eq!(names(helm), found(&[(2, "a"), (3, "b")]));
        let list = "kind: List\nitems:\n- {kind: Pod, metadata: {name: a}}\n- {kind: Pod, metadata: {name: b}}\n";
        assert_eq!(names(list), found(&[(1, "a"), (1, "b")]));
        let json = "{\"kind\":\"PodList\",\"items\":[{\"metadata\":{\"name\":\"a\"}}]}\n{\"metadata\":{\"name\":\"b\"}}\n";
        assert_eq!(names(json), found(&[(1, "a"), (2, "b")]));
        assert_eq!(names("\u{feff}--- # first\nmetadata: {name: a}\n"), found(&[(1, "a")]));
        assert_eq!(names("---\n---\n"), found(&[]));
        assert_eq!(names("{metadata: {name: a}}\n"), found(&[(1, "a")]));
        assert_eq!(names("metadata: {name: a, name: b}\n"), found(&[(1, "b")]));
    }

    #[test]
    fn what_is_no_manifest_is_named_by_file_document_and_line() {
        let wrong = names("kind: Pod\n---\nkind: Pod\nmetadata: [a\n").unwrap_err();
        assert!(wrong.starts_with("old.yaml, document 2, line "), "{wrong}");
        assert!(wrong.contains("not YAML"), "{wrong}");
        let template = names("kind: Pod\nmetadata:\n  name: {{ .Values.name }}\n").unwrap_err();
        assert!(template.contains("helm template"), "{template}");
        let text = names("just a sentence\n").unwrap_err();
        assert!(text.contains("old.yaml, document 1: \"just a sentence\""), "{text}");
        let json = names("{\"kind\": ").unwrap_err();
        assert!(json.starts_with("old.yaml, document 1: not JSON"), "{json}");
        let second = names("{}\n{\"kind\": x}").unwrap_err();
        assert!(second.starts_with("old.yaml, document 2: not JSON"), "{second}");
    }
}

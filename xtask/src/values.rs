//! The chart's `values.yaml`, and the table that its README makes of it: a comment is the meaning of the value below it.

use serde_json::Value;

use crate::page::table;

/// How the table begins.
const HEAD: &str = "| value | default | meaning |";
/// Longer defaults are looked up in the file.
const LONGEST: usize = 40;

/// A value that operators set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its name, such as `image.tag`.
    pub path: String,
    /// Its comment.
    pub meaning: String,
}

/// The values of the file, in its order. A value without a comment, or a section's comment, is a mistake.
pub fn rows(text: &str) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    let mut sections: Vec<(usize, &str)> = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    // What is further in belongs to the value that was read last.
    let mut inside = None;
    for line in text.lines() {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        if content.is_empty() {
            comment.clear();
        } else if let Some(words) = content.strip_prefix("# ") {
            comment.push(words);
        } else if inside.is_none_or(|of| indent < of || (indent == of && !content.starts_with('-')))
        {
            let (key, value) =
                content.split_once(':').ok_or_else(|| format!("`{content}` is no value"))?;
            sections.retain(|(of, _)| *of < indent);
            sections.push((indent, key));
            let path = sections.iter().map(|(_, key)| *key).collect::<Vec<_>>().join(".");
            inside = (!comment.is_empty()).then_some(indent);
            match (comment.is_empty(), value.is_empty()) {
                (true, false) => return Err(format!("`{path}` has no comment")),
                (true, true) => {}
                (false, _) => rows.push(Row { path, meaning: comment.join(" ") }),
            }
            comment.clear();
        }
    }
    Ok(rows)
}

/// `readme` with the table of these values in place of the one that it has.
pub fn documented(readme: &str, values: &str) -> Result<String, String> {
    let parsed: Value = serde_saphyr::from_str(values).map_err(|error| error.to_string())?;
    let cells = rows(values)?.into_iter().map(|Row { path, meaning }| {
        let default = parsed.pointer(&format!("/{}", path.replace('.', "/")));
        let default = shown(default.ok_or_else(|| format!("`{path}` is not read"))?);
        Ok(vec![format!("`{path}`"), default, meaning])
    });
    let cells = cells.collect::<Result<Vec<_>, String>>()?;
    let table = table(&["value", "default", "meaning"], 0..3, cells);
    let (before, rest) = readme.split_once(HEAD).ok_or_else(|| format!("no `{HEAD}`"))?;
    let after = rest.find("\n\n").map_or("", |end| &rest[end + 1..]);
    Ok(format!("{before}{table}{after}"))
}

fn shown(value: &Value) -> String {
    let text = match value.as_str() {
        Some(text) if !text.is_empty() => text.to_owned(),
        _ => value.to_string(),
    };
    if text.len() > LONGEST {
        return "[values.yaml](values.yaml)".to_owned();
    }
    format!("`{text}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: &str = "# About the file.\n\n# Its name\nname: a\n\nimage:\n  # Its tag\n  tag: \"\"\n\
                          # Where\n# it runs\ntolerations:\n- operator: Exists\n  key: b\n# The last\nlast: {}\n";

    #[test]
    fn each_value_is_a_row_with_its_comment() {
        let rows = rows(VALUES).unwrap();
        let found: Vec<_> =
            rows.iter().map(|row| (row.path.as_str(), row.meaning.as_str())).collect();
        let wanted = [
            ("name", "Its name"),
            ("image.tag", "Its tag"),
            ("tolerations", "Where it runs"),
            ("last", "The last"),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_value_without_a_comment_is_a_mistake() {
        assert_eq!(rows("a:\n  b: 1\n"), Err("`a.b` has no comment".to_owned()));
    }

    #[test]
    fn the_table_takes_the_place_of_the_old_one() {
        let readme = format!("Before\n\n{HEAD}\n| old |\n\nAfter\n");
        let table = format!(
            "{HEAD}\n| --- | --- | --- |\n| `name` | `a` | Its name |\n| `image.tag` | `\"\"` | Its tag |\n\
             | `tolerations` | `[{{\"key\":\"b\",\"operator\":\"Exists\"}}]` | Where it runs |\n\
             | `last` | `{{}}` | The last |\n"
        );
        assert_eq!(documented(&readme, VALUES), Ok(format!("Before\n\n{table}\nAfter\n")));
        let long = VALUES.replace("key: b", "key: a-key-that-is-too-long-for-a-cell");
        assert!(documented(&readme, &long).unwrap().contains("| [values.yaml](values.yaml) |"));
        assert!(documented("no table", VALUES).is_err());
    }
}

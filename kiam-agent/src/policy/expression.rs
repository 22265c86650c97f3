//! `iam.amazonaws.com/permitted`: a regular expression that a role's whole ARN must match.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use regex::{Regex, RegexBuilder};

use crate::role::{Quoted, RoleArn};

/// A larger compiled expression is refused: whoever annotates namespaces must not fill the agent's memory.
const MAX_COMPILED_BYTES: usize = 256 * 1024;

/// How many expressions are kept compiled; namespaces mostly share a few.
const KEPT: usize = 256;

static COMPILED: LazyLock<Mutex<HashMap<String, Result<Regex, InvalidExpression>>>> =
    LazyLock::new(Mutex::default);

/// The roles that a namespace's pods may have.
#[derive(Clone, Debug)]
pub struct Permitted(Regex);

/// An expression that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no regular expression that can be used: {1}")]
pub struct InvalidExpression(Quoted, String);

// === impl Permitted ===

impl Permitted {
    /// Compiles `text`, anchored as a whole: kiam's `^` and `$` around `a|b` also permitted `a-admin`.
    ///
    /// # Errors
    ///
    /// [`InvalidExpression`] when it has a mistake or grows too large.
    pub fn parse(text: &str) -> Result<Self, InvalidExpression> {
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = compiled.get(text) {
            return known.clone().map(Self);
        }
        if compiled.len() >= KEPT {
            compiled.clear();
        }
        let regex = RegexBuilder::new(&format!("^(?:{text})$"))
            .size_limit(MAX_COMPILED_BYTES)
            .build()
            .map_err(|error| InvalidExpression(Quoted::new(text), last_line(&error)));
        compiled.insert(text.to_owned(), regex.clone());
        regex.map(Self)
    }

    /// Whether it matches the whole ARN.
    #[must_use]
    pub fn matches(&self, role: &RoleArn) -> bool {
        self.0.is_match(role.as_ref())
    }
}

/// The error's last line says what is wrong; those before it draw where.
fn last_line(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

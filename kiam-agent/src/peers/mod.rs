//! Knows the flags and variables of kiam and kube2iam, and what becomes of each. The one table: the agent's command line
//! answers a flag of theirs from it, and `migrate` translates by it.

mod flags;
mod releases;
#[cfg(test)]
mod tests;
mod variables;

pub use self::{
    flags::FLAGS,
    releases::{Program, Releases},
    variables::{Variable, VariableFate, variable},
};

/// The words of kiam's command line that are no flags.
const WORDS: [(&str, &str); 3] = [
    ("agent", "run kiam-agent without a subcommand"),
    ("server", "there is no server: every node's agent calls STS itself"),
    ("health", "use kiam-agent status"),
];

/// A flag of kiam or kube2iam. One name is several rows where it means different things.
#[derive(Clone, Copy, Debug)]
pub struct PeerFlag {
    /// The name, without dashes.
    pub name: &'static str,
    /// The releases that have the flag.
    pub releases: Releases,
    /// Whether it takes no value.
    pub switch: bool,
    /// What becomes of it.
    pub fate: Fate,
    /// What to do, as the rest of a sentence; empty for flags that are kept.
    pub advice: &'static str,
}

/// What becomes of a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The agent has the same flag.
    Kept,
    /// The agent has this flag instead, named without dashes. Its value may be another.
    Renamed(&'static str),
    /// The agent works without it.
    Unneeded,
    /// The agent can't do the same.
    NoEqual,
}

/// The flag `name`, without dashes, of one of `releases`.
#[must_use]
pub fn flag(name: &str, releases: Releases) -> Option<&'static PeerFlag> {
    FLAGS.iter().find(|flag| flag.name == name && flag.releases.intersects(releases))
}

/// What to do instead of `word`, a flag with its dashes or a subcommand of kiam or kube2iam.
#[must_use]
pub fn advice(word: &str) -> Option<String> {
    if let Some((_, advice)) = WORDS.iter().find(|(former, _)| *former == word) {
        return Some((*advice).to_owned());
    }
    let name = word.strip_prefix("--")?;
    let mut advices = advices(name);
    if advices.is_empty() {
        // kiam takes `--no-` before each of its switches.
        advices = self::advices(name.strip_prefix("no-")?);
    }
    (!advices.is_empty()).then(|| advices.join("; or "))
}

/// What the rows of `name` say, each once.
fn advices(name: &str) -> Vec<&'static str> {
    let mut advices = Vec::new();
    for flag in FLAGS.iter().filter(|flag| flag.name == name && !flag.advice.is_empty()) {
        if !advices.contains(&flag.advice) {
            advices.push(flag.advice);
        }
    }
    advices
}

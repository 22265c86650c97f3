//! Variables of the environment that stand in for flags, so that a mistake names what was set.

use super::Vars;
use kiam_core::role::QuotedText;

/// Variables that are set, in place of flags that are absent.
#[derive(Debug, Default)]
pub(super) struct Variables(Vec<Variable>);

#[derive(Debug)]
struct Variable {
    /// With its dashes.
    flag: String,
    name: String,
    value: String,
}

/// The variable of a flag, which is given without its dashes.
pub(super) fn name_of(flag: &str) -> String {
    format!("KIAM_{}", flag.to_uppercase().replace('-', "_"))
}

// === impl Variables ===

impl Variables {
    /// The argument that the variable of `flag` stands for, if it is set.
    pub(super) fn argument(&mut self, flag: &str, vars: &dyn Vars) -> Option<String> {
        let name = name_of(flag);
        let value = vars.get(&name)?;
        let flag = format!("--{flag}");
        let argument = format!("{flag}={value}");
        self.0.push(Variable { flag, name, value });
        Some(argument)
    }

    /// The mistakes, each with the variables behind the flags that it speaks of.
    pub(super) fn named(&self, mistakes: Vec<String>) -> Vec<String> {
        mistakes.into_iter().map(|mistake| self.name_in(mistake)).collect()
    }

    fn name_in(&self, mistake: String) -> String {
        let spoken_of = self.0.iter().filter(|variable| variable.is_in(&mistake));
        spoken_of.fold(mistake.clone(), |mut text, variable| {
            let Variable { flag, name, value } = variable;
            if let Some(problem) = text.strip_prefix(&format!("{flag}: ")) {
                text = format!("{name} ({flag}): {problem}");
            }
            let value = QuotedText::new(value).to_string();
            if !(text.starts_with(name) && text.contains(&value)) {
                text.truncate(text.trim_end().len());
                text += &format!("; {name}={value} sets {flag}");
            }
            text
        })
    }
}

// === impl Variable ===

impl Variable {
    /// Whether `text` has the flag, and not only a longer one.
    fn is_in(&self, text: &str) -> bool {
        let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '-';
        text.match_indices(&self.flag)
            .any(|(at, flag)| !text[at + flag.len()..].starts_with(goes_on))
    }
}

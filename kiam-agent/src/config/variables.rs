//! Environment variables that set flags, so that a mistake names the variable.

use super::Vars;
use kiam_core::role::QuotedText;

/// The variables that set flags.
#[derive(Debug, Default)]
pub(super) struct Variables(Vec<Variable>);

#[derive(Debug)]
struct Variable {
    /// The flag, with its dashes.
    flag: String,
    name: String,
    value: String,
}

/// The name of the variable of a flag, whose dashes are left out.
pub(super) fn name_of(flag: &str) -> String {
    format!("KIAM_{}", flag.to_uppercase().replace('-', "_"))
}

// === impl Variables ===

impl Variables {
    /// The argument of the variable of `flag`, if it is set.
    pub(super) fn argument(&mut self, flag: &str, vars: &dyn Vars) -> Option<String> {
        let name = name_of(flag);
        let value = vars.get(&name)?;
        let flag = format!("--{flag}");
        let argument = format!("{flag}={value}");
        self.0.push(Variable { flag, name, value });
        Some(argument)
    }

    /// The mistakes, each with the variables that set the flags in it.
    pub(super) fn named(&self, mistakes: Vec<String>) -> Vec<String> {
        mistakes.into_iter().map(|mistake| self.name_in(mistake)).collect()
    }

    fn name_in(&self, mistake: String) -> String {
        let present = self.0.iter().filter(|variable| variable.is_in(&mistake));
        present.fold(mistake.clone(), |mut text, variable| {
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
    /// Whether `text` contains the flag, and not only a longer one.
    fn is_in(&self, text: &str) -> bool {
        let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '-';
        text.match_indices(&self.flag)
            .any(|(at, flag)| !text[at + flag.len()..].starts_with(goes_on))
    }
}

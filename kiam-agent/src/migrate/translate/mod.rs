//! Translates the flags and variables of an installation to the agent's, and records what became of each.

mod outcome;
mod secrets;
mod values;
mod variables;

use self::outcome::Verdict;
pub(super) use self::outcome::{Line, Outcome};
use super::{
    Checker,
    installation::{Installation, Part},
    printable::is_all_printable,
    settings::Settings,
    words::{HOST_IP, NODE_NAME, Setting},
};
use crate::peers::{self, Fate, PeerFlag, Program, Releases};

/// kiam's own port, and this agent's.
const PORT: &str = "3100";
/// A port for this agent where the old one has [`PORT`].
const OTHER_PORT: &str = "3110";

/// The translation of an installation.
#[derive(Debug)]
pub(super) struct Translation {
    pub(super) settings: Settings,
    /// What became of each flag and variable.
    pub(super) lines: Vec<Line>,
    /// Flags that no old flag names, with the reason.
    pub(super) additions: Vec<(String, String)>,
}

/// How to translate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// For an agent that observes beside the old one.
    pub(super) observes: bool,
}

/// A translation under way.
struct Translator<'a> {
    installation: &'a Installation,
    manner: Manner,
    settings: Settings,
    additions: Vec<(String, String)>,
}

/// Translates `installation`, to flags that `check` accepts.
pub(super) fn translate(
    installation: &Installation,
    manner: Manner,
    check: Checker<'_>,
) -> Translation {
    let (settings, additions) = (Settings::new(), Vec::new());
    let mut translator = Translator { installation, manner, settings, additions };
    let mut lines = Vec::new();
    for part in &installation.parts {
        for setting in &part.settings {
            let verdict = translator.setting(part, setting);
            lines.push(verdict.line(part.program, &secrets::shown(setting)));
        }
        for stray in &part.strays {
            let verdict = Verdict::no_equal("it is neither a flag nor a value: leave it out");
            lines.push(verdict.line(part.program, &secrets::without_password(stray)));
        }
        for (probe, words) in &part.container.probes {
            let written = format!("{probe}: {}", secrets::shown_words(words));
            let verdict = Verdict::unneeded("the manifest probes with kiam-agent status");
            lines.push(verdict.line(Program::Health, &written));
        }
        variables::translate(&mut translator.settings, part, &mut lines);
    }
    translator.complete(&mut lines);
    let Translator { mut settings, additions, .. } = translator;
    leave_out_what_is_rejected(&mut settings, check, &mut lines);
    Translation { settings, lines, additions }
}

/// Leaves out each flag that the agent's own parser rejects, and says so.
fn leave_out_what_is_rejected(settings: &mut Settings, check: Checker<'_>, lines: &mut Vec<Line>) {
    // Without one flag another may be a mistake, so that each is checked again; at the latest without all.
    for _ in 0..settings.args().len() {
        let args = settings.args();
        // Any node's address and name will do.
        let sample = args
            .iter()
            .map(|arg| arg.replace(HOST_IP, "192.0.2.1").replace(NODE_NAME, "node-1"))
            .collect::<Vec<_>>();
        let mistakes = check(&sample);
        let Some(mistake) = mistakes.first() else { return };
        let name = mistake.strip_prefix("--").and_then(|it| it.split([':', ' ']).next());
        let Some(name) = name.filter(|name| settings.has(name)) else {
            // It is of several flags, or of none: somebody must look.
            let detail = format!("the agent rejects these flags: {}", mistake.trim_end());
            lines.push(Verdict::no_equal(detail).line_of_ours("(the flags together)"));
            return;
        };
        settings.remove(name);
        reject(name, mistake.trim_end(), lines);
    }
}

/// Marks the line that sets the agent's flag `name`, or adds one.
fn reject(name: &str, mistake: &str, lines: &mut Vec<Line>) {
    let flag = format!("--{name}");
    // `--role-base-arn` is not `--role-base-arn-autodetect`.
    let is_it = |text: &str| text.split(['=', ' ', ',']).next() == Some(&flag);
    let detail = format!("the agent rejects it: {mistake}");
    let sets = |line: &&mut Line| match line.outcome {
        Outcome::Kept => is_it(&line.written),
        Outcome::Renamed => is_it(&line.detail),
        Outcome::Unneeded | Outcome::NoEqual => false,
    };
    match lines.iter_mut().find(sets) {
        Some(line) => (line.outcome, line.detail) = (Outcome::NoEqual, detail),
        None => lines.push(Verdict::no_equal(detail).line_of_ours(&flag)),
    }
}

// === impl Translator ===

impl Translator<'_> {
    /// What becomes of `setting`; the agent's flag is set.
    fn setting(&mut self, part: &Part, setting: &Setting) -> Verdict {
        let Some(flag) = peers::flag(&setting.name, Releases::of(part.program, None)) else {
            let whose = match part.program {
                program @ (Program::Kube2iam | Program::Kiam) => program.to_string(),
                program => format!("kiam {program}"),
            };
            return Verdict::no_equal(format!(
                "no release of {whose} has this flag: find out what it does in your image"
            ));
        };
        if !is_all_printable(&setting.value) {
            return Verdict::no_equal(format!(
                "its value has characters that are not printed: set {} yourself",
                named(flag)
            ));
        }
        if secrets::has_password(&setting.value) {
            return Verdict::no_equal(format!(
                "its value has a password, which stays out of arguments: set {} without it",
                named(flag)
            ));
        }
        if let Some(name) = unresolved(&setting.value) {
            return Verdict::no_equal(format!(
                "the value of $({name}) is not in the input: set {} yourself",
                named(flag)
            ));
        }
        if flag.switch && !setting.is_on() {
            return match setting.name.as_str() {
                "iptables-remove" => {
                    Verdict::unneeded(format!("{}; see the rule below", flag.advice))
                }
                _ => Verdict::unneeded("it is off"),
            };
        }
        if !flag.switch && setting.value.is_empty() {
            return Verdict::unneeded("it is empty");
        }
        self.special(part, setting, flag).unwrap_or_else(|| self.usual(part, setting, flag))
    }

    /// What becomes of a flag whose value stays as it is.
    fn usual(&mut self, part: &Part, setting: &Setting, flag: &PeerFlag) -> Verdict {
        match flag.fate {
            Fate::Unneeded => Verdict::unneeded(flag.advice),
            Fate::NoEqual => Verdict::no_equal(flag.advice),
            Fate::Kept if flag.switch => {
                self.settings.switch(flag.name);
                Verdict::kept()
            }
            Fate::Renamed(to) if flag.switch => {
                self.settings.switch(to);
                Verdict::renamed(format!("--{to}"))
            }
            Fate::Kept => self.set(part, flag.name, &setting.value, Verdict::kept()),
            Fate::Renamed(to) => {
                let verdict = Verdict::renamed(format!("--{to}={}", setting.value));
                self.set(part, to, &setting.value, verdict)
            }
        }
    }

    /// Sets a flag that both programs of kiam have: the agent's value counts, since it was the one on the nodes.
    fn set(&mut self, part: &Part, name: &str, value: &str, verdict: Verdict) -> Verdict {
        match self.settings.value(name) {
            Some(other) if other != value && part.program == Program::Server => {
                Verdict::unneeded(format!("the agents' --{name}={other} counts"))
            }
            _ => {
                self.settings.set(name, value);
                verdict
            }
        }
    }

    /// Adds what no old flag names.
    fn complete(&mut self, lines: &mut Vec<Line>) {
        self.complete_base(lines);
        self.complete_policy();
        let installation = self.installation;
        self.complete_paths(lines);
        let name = if installation.is_kube2iam() { "app-port" } else { "port" };
        let is_unset = installation.agent().is_some() && installation.value(name).is_none();
        if is_unset && !installation.is_kube2iam() {
            self.settings.set("port", OTHER_PORT);
            self.added(
                &format!("--port={OTHER_PORT}"),
                "kiam's agents have 3100, and both run during the change",
            );
        }
        if self.manner.observes {
            self.settings.set("mode", "observe");
            self.added("--mode=observe", "asked for: nothing changes for pods");
        }
    }

    /// kiam v3 was the first to keep metadata paths shut.
    fn complete_paths(&mut self, lines: &mut Vec<Line>) {
        let installation = self.installation;
        let names = ["whitelist-route-regexp", "allow-route-regexp"];
        let has_paths = names.iter().any(|name| installation.value(name).is_some());
        let who = match installation.version {
            _ if installation.is_kube2iam() => "kube2iam".to_owned(),
            Some((major @ (1 | 2), _)) => format!("kiam v{major}"),
            // Only versions that keep paths shut have a flag that opens some.
            None if !has_paths => {
                let verdict = Verdict::no_equal(
                    "kiam v1 and v2 pass every other metadata path on, and v3 is the first that does not: name the \
                     version with --kiam-version, or add --allow-path=common",
                );
                lines.push(verdict.line_of_ours("--allow-path"));
                return;
            }
            _ => return,
        };
        self.settings.add("allow-path", "common");
        self.added(
            "--allow-path=common",
            &format!(
                "{who} passes every other metadata path on; these are what most programs ask for"
            ),
        );
    }

    fn complete_base(&mut self, lines: &mut Vec<Line>) {
        let installation = self.installation;
        if let (Some(agent), None) =
            (installation.part(Program::Agent), installation.part(Program::Server))
        {
            let verdict = Verdict::no_equal(
                "the server's manifest is not in the input: pass it too, since it has the base ARN, the role and \
                 the duration of sessions",
            );
            lines.push(verdict.line(Program::Server, &format!("(of {})", agent.workload.title())));
        }
        if installation.agent().is_none() {
            let verdict = Verdict::no_equal(
                "the agent's manifest is not in the input: pass it too, since it has the rule to remove",
            );
            lines.push(verdict.line(Program::Agent, "(not found)"));
        }
        if self.settings.has("role-base-arn-autodetect") {
            self.settings.remove("role-base-arn");
        } else if !self.settings.has("role-base-arn") {
            self.settings.switch("role-base-arn-autodetect");
            self.added(
                "--role-base-arn-autodetect",
                "the agent needs a base for short names of roles",
            );
        }
    }

    fn complete_policy(&mut self) {
        if self.settings.has("namespace-policy") {
            return;
        }
        let (policy, reason) = match self.installation.version {
            _ if self.installation.is_kube2iam() => (
                "optional",
                "without --namespace-restrictions every pod may have every role; change it once namespaces are annotated",
            ),
            Some((1, _)) => {
                ("optional", "kiam v1 reads no namespaces; change it once they are annotated")
            }
            _ => ("required", "kiam's rule: a namespace without an annotation allows no role"),
        };
        self.settings.set("namespace-policy", policy);
        self.added(&format!("--namespace-policy={policy}"), reason);
    }

    fn added(&mut self, flag: &str, reason: &str) {
        self.additions.push((flag.to_owned(), reason.to_owned()));
    }
}

/// The flag to set instead, or the flag itself.
fn named(flag: &PeerFlag) -> String {
    match flag.fate {
        Fate::Renamed(to) => format!("--{to}"),
        _ => format!("--{}", flag.name),
    }
}

/// The first variable in `value` that neither the input nor the agent's manifest has.
fn unresolved(value: &str) -> Option<&str> {
    let names = value.split("$(").skip(1).filter_map(|rest| rest.split_once(')'));
    names.map(|(name, _)| name).find(|name| *name != "HOST_IP" && *name != "NODE_NAME")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(check: Checker<'_>) -> (Vec<String>, Vec<Line>) {
        let mut settings = Settings::new();
        settings.set("role-base-arn", "x");
        settings.switch("role-base-arn-autodetect");
        let kept = |written| Verdict::kept().line(Program::Server, written);
        let mut lines = vec![kept("--role-base-arn-autodetect"), kept("--role-base-arn=x")];
        leave_out_what_is_rejected(&mut settings, check, &mut lines);
        (settings.args(), lines)
    }

    #[test]
    fn the_flag_that_is_rejected_is_the_one_that_is_marked() {
        let has = |args: &[String], flag: &str| args.iter().any(|arg| arg == flag);
        let (args, lines) = left(&|args| match has(args, "--role-base-arn=x") {
            true => vec!["--role-base-arn: \"x\" is no base".to_owned()],
            false => Vec::new(),
        });
        assert!(!has(&args, "--role-base-arn=x") && has(&args, "--role-base-arn-autodetect"));
        let outcomes: Vec<Outcome> = lines.iter().map(|line| line.outcome).collect();
        assert_eq!(outcomes, [Outcome::Kept, Outcome::NoEqual]);
        assert!(lines[1].detail.contains("is no base"), "{lines:?}");
    }

    #[test]
    fn a_mistake_of_no_flag_is_reported() {
        for mistake in ["--upstream: is missing", "two of these exclude each other"] {
            let (args, lines) = left(&|_| vec![mistake.to_owned()]);
            assert_eq!(args.len(), 5, "{args:?}");
            let last = lines.last().unwrap();
            assert_eq!(last.outcome, Outcome::NoEqual, "{mistake}");
            assert!(last.detail.contains(mistake), "{lines:?}");
        }
    }
}

//! One run of `kiam-agent preflight`.

use std::{any::Any, time::Duration};

use lab::{Lab, LabPod, Refusal};
use serde_json::Value;
use tokio::time::Instant;

/// What preflight is run with, beside the flags of the lab's agents.
#[derive(Default)]
pub(super) struct Setting {
    prefix: Vec<String>,
    without: Vec<&'static str>,
    flags: Vec<String>,
    variables: Vec<(&'static str, String)>,
    /// A system call, an argument of it, and what is answered in its place.
    forbidden: Vec<Forbidden>,
    /// What keeps the node as it is.
    held: Vec<Box<dyn Any>>,
    /// The pod that it runs in, as an init container does.
    pod: Option<LabPod>,
}

/// A system call that is forbidden: its number, an argument's index and value if only such calls are, and the answer.
pub(super) type Forbidden = (libc::c_long, Option<(u32, u32)>, i32);

/// A line of the report.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) verdict: String,
    pub(super) finding: String,
    pub(super) remedy: String,
}

/// What came of a run.
#[derive(Debug)]
pub(super) struct Played {
    pub(super) status: Option<i32>,
    pub(super) checks: Vec<Line>,
    pub(super) took: Duration,
    /// The report's own verdict.
    pub(super) verdict: String,
}

// === impl Setting ===

impl Setting {
    /// With these flags.
    pub(super) fn flags(flags: &[&str]) -> Self {
        Self { flags: flags.iter().map(|flag| (*flag).to_owned()).collect(), ..Self::default() }
    }

    /// Without the kernel's part, for what servers lack.
    pub(super) fn of_servers(flags: &[&str]) -> Self {
        let mut setting = Self::flags(flags);
        setting.flags.push("--interceptor=off".to_owned());
        setting
    }

    /// Run by this command.
    pub(super) fn by(prefix: &[&str]) -> Self {
        Self { prefix: prefix.iter().map(|word| (*word).to_owned()).collect(), ..Self::default() }
    }

    /// Run in mounts of its own, after this shell script has changed them.
    pub(super) fn in_mounts(script: &str) -> Self {
        let script = format!("{script} && exec \"$0\" \"$@\"");
        Self::by(&["unshare", "--mount", "sh", "-ec", &script])
    }

    /// Run with a forbidden system call.
    pub(super) fn forbidding(forbidden: Forbidden) -> Self {
        Self { forbidden: vec![forbidden], ..Self::default() }
    }

    /// And with these flags.
    pub(super) fn and_flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    /// And without the lab's own flags of these names.
    pub(super) fn without(mut self, names: &[&'static str]) -> Self {
        self.without.extend(names);
        self
    }

    /// And with this variable.
    pub(super) fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Runs it in this pod.
    pub(super) fn in_pod(mut self, pod: LabPod) -> Self {
        self.pod = Some(pod);
        self
    }

    /// Keeps `thing` until the run is over.
    pub(super) fn holding(mut self, thing: impl Any) -> Self {
        self.held.push(Box::new(thing));
        self
    }

    /// Runs it. The calling thread keeps what is forbidden.
    pub(super) fn play(self, lab: &Lab) -> Played {
        let prefix: Vec<&str> = self.prefix.iter().map(String::as_str).collect();
        let mut flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        flags.push("--output=json");
        if !self.flags.iter().any(|flag| flag.starts_with("--namespace-policy")) {
            flags.push("--namespace-policy=required");
        }
        let mut command = lab.preflight(&prefix, &self.without, &flags).unwrap();
        if let Some(pod) = &self.pod {
            let mut inside = pod.command(command.get_program()).unwrap();
            inside.args(command.get_args()).env_clear();
            command = inside;
        }
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.envs(self.variables);
        let refusals = self.forbidden.into_iter().map(|(call, argument, errno)| match argument {
            Some(argument) => Refusal::of_argument(call, argument, errno).unwrap(),
            None => Refusal::of(call, errno).unwrap(),
        });
        let refusals: Vec<_> = refusals.collect();
        let begun = Instant::now();
        let output = command.output().unwrap();
        let took = begun.elapsed();
        drop((refusals, self.held, self.pod));
        let text = String::from_utf8_lossy(&output.stdout);
        let report: Value = serde_json::from_str(&text).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{error}: {} {text}{said}", output.status)
        });
        let part = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
        let lines = report["checks"].as_array().unwrap().iter().map(|check| Line {
            name: part(check, "check"),
            verdict: part(check, "verdict"),
            finding: part(check, "finding"),
            remedy: part(check, "remedy"),
        });
        Played {
            status: output.status.code(),
            checks: lines.collect(),
            took,
            verdict: part(&report, "verdict"),
        }
    }
}

//! Compares what pods get by the old rules and by the agent's: which pods lose a role or get one, and which annotations
//! are read otherwise. Decisions of the agent are made by its own policy.

mod base;
mod expressions;
mod old;
mod shown;

use std::collections::{BTreeMap, BTreeSet};

use self::{
    expressions::Difference,
    old::{DefaultRole, OldRules},
    shown::{account, annotate, literal, some, title},
};
use super::{
    installation::Installation,
    objects::{Inventory, NamespaceObject, Workload},
    settings::Settings,
    words::quoted,
};
use kiam_core::{
    pods::{
        Annotation, Namespace, Pod, PodIndex, PodUid,
        annotations::{ALLOWED_ROLES, IMDSV2, PERMITTED, ROLE},
    },
    policy::{self, Decision, NamespacePolicy, RolePolicy},
    role::{BaseArn, RoleArn, RoleResolver},
};

/// What a comparison found.
#[derive(Clone, Debug, Default)]
pub(super) struct Comparison {
    pub(super) findings: Vec<Finding>,
    /// What the comparison rests on, and what it left out.
    pub(super) notes: Vec<String>,
}

/// Something that changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// Whether somebody must decide.
    pub(super) decides: bool,
    pub(super) subject: String,
    pub(super) text: String,
    /// A command or a value that helps.
    pub(super) remedy: Option<String>,
}

/// A comparison under way.
struct Comparer<'a> {
    rules: Option<OldRules>,
    base: BaseArn,
    /// Whether commands may name roles by the base.
    is_certain: bool,
    policy: RolePolicy,
    requires: bool,
    namespaces: BTreeMap<&'a str, &'a NamespaceObject>,
    findings: Vec<Finding>,
}

/// A change for pods: their namespace, what they ask for, and what is said of them.
type Change = (String, String, Verdict);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Loses(String),
    Gains,
    /// It is not known whether the pod had the role.
    Refused(String),
}

/// Compares all pods and namespaces of `inventory`. `given` is the base of short names, if the operator names it.
pub(super) fn compare(
    installation: &Installation,
    settings: &Settings,
    inventory: &Inventory,
    given: Option<&BaseArn>,
) -> Comparison {
    let pods: Vec<&Workload> =
        inventory.workloads.iter().filter(|it| is_compared(it, installation)).collect();
    if pods.is_empty() && inventory.namespaces.is_empty() {
        let note = "the input has neither pods nor namespaces: pass them too, or read the cluster";
        return Comparison { findings: Vec::new(), notes: vec![note.to_owned()] };
    }
    let rules = OldRules::of(installation);
    let base::Base { base, note, is_certain } = base::of(settings, installation, inventory, given);
    let mut notes: Vec<String> = note.into_iter().collect();
    if rules.is_none() {
        notes.push(
            "the version of kiam shows neither by image nor by flags: --kiam-version=N compares with its rules".to_owned(),
        );
    }
    let requires = settings.value("namespace-policy") == Some("required");
    let policy = policy_of(inventory, &base, requires);
    let namespaces = inventory.namespaces.iter().map(|it| (it.name.as_str(), it)).collect();
    let mut comparer =
        Comparer { rules, base, is_certain, policy, requires, namespaces, findings: Vec::new() };
    comparer.pods(&pods, &mut notes);
    comparer.namespaces(&pods);
    Comparison { findings: comparer.findings, notes }
}

/// Pods on the node's network get to neither agent, and the old agents ask the metadata service themselves.
fn is_compared(workload: &Workload, installation: &Installation) -> bool {
    let is_part = installation.parts.iter().any(|part| {
        part.workload.name == workload.name && part.workload.namespace == workload.namespace
    });
    !is_part && !workload.host_network && !workload.has_ended
}

/// The agent's own policy, over the namespaces of the input.
fn policy_of(inventory: &Inventory, base: &BaseArn, requires: bool) -> RolePolicy {
    let (index, reader) = PodIndex::new();
    for namespace in &inventory.namespaces {
        index.apply(record(namespace));
    }
    let namespaces = if requires { NamespacePolicy::Required } else { NamespacePolicy::Optional };
    let config = policy::Config::new(RoleResolver::new(Some(base.clone())));
    RolePolicy::new(policy::Config { namespaces, ..config }, reader)
}

fn record(namespace: &NamespaceObject) -> Namespace {
    let annotation =
        |name| namespace.annotations.get(name).map(|text| Annotation::from(text.as_str()));
    Namespace {
        name: namespace.name.clone(),
        resource_version: None,
        permitted: annotation(PERMITTED),
        allowed_roles: annotation(ALLOWED_ROLES),
        imdsv2: annotation(IMDSV2),
    }
}

// === impl Comparer ===

impl Comparer<'_> {
    /// What changes for pods.
    fn pods(&mut self, pods: &[&Workload], notes: &mut Vec<String>) {
        let mut changes: BTreeMap<Change, BTreeSet<String>> = BTreeMap::new();
        let (mut renamed, mut fallen, mut unknown) = (Vec::new(), Vec::new(), 0);
        for pod in pods {
            let key = self.rules.as_ref().map_or(ROLE, OldRules::role_key).to_owned();
            let Some(role) = pod.annotations.get(&key).filter(|role| !role.is_empty()) else {
                fallen.push(*pod);
                continue;
            };
            if key != ROLE && pod.annotations.get(ROLE) != Some(role) {
                renamed.push(*pod);
            }
            let known =
                pod.namespace.as_deref().and_then(|name| self.namespaces.get(name).copied());
            let Some(namespace) = known else {
                unknown += 1;
                continue;
            };
            if let Some(verdict) = self.change(namespace, role) {
                let change = (namespace.name.clone(), role.clone(), verdict);
                changes.entry(change).or_default().insert(title(pod));
            }
        }
        self.report_changes(&changes);
        self.report_roles(&changes);
        self.report_renamed(&renamed);
        self.report_fallen(&fallen);
        if unknown > 0 {
            notes.push(format!(
                "{unknown} pods with a role are not compared: the input has no such namespace (kubectl get namespaces -o yaml)"
            ));
        }
    }

    /// What changes for a pod of `namespace` that names `role`.
    fn change(&self, namespace: &NamespaceObject, role: &str) -> Option<Verdict> {
        let before =
            self.rules.as_ref().map(|it| it.allows(&namespace.annotations, role, &self.base));
        match (before, self.decide(&namespace.name, role)) {
            (Some(true), Err(reason)) => Some(Verdict::Loses(reason)),
            (Some(false), Ok(())) => Some(Verdict::Gains),
            (None, Err(reason)) => Some(Verdict::Refused(reason)),
            _ => None,
        }
    }

    /// The agent's decision, with its own words for a refusal.
    fn decide(&self, namespace: &str, role: &str) -> Result<(), String> {
        match self.policy.decide(&asking(namespace, role)) {
            Decision::Allow(_) => Ok(()),
            Decision::Refuse(refusal) => Err(refusal.to_string()),
        }
    }

    fn report_changes(&mut self, changes: &BTreeMap<Change, BTreeSet<String>>) {
        // One command for all roles of a namespace, since each would replace the one before it.
        let lost = changes.keys().filter(|(_, _, verdict)| matches!(verdict, Verdict::Loses(_)));
        let last: BTreeMap<&str, &str> =
            lost.map(|(namespace, role, _)| (namespace.as_str(), role.as_str())).collect();
        for ((namespace, role, verdict), pods) in changes {
            let subject = format!("{}, which asks for {role:?}", some(pods));
            let (decides, text) = match verdict {
                Verdict::Loses(reason) => (true, format!("loses its role: {reason}")),
                Verdict::Gains => (true, "gets a role that it did not get before".to_owned()),
                Verdict::Refused(reason) => (true, format!("gets no role: {reason}")),
            };
            let is_last = last.get(namespace.as_str()) == Some(&role.as_str());
            let remedy = match verdict {
                Verdict::Loses(_) if is_last => self.annotate(namespace, changes),
                _ => None,
            };
            self.findings.push(Finding { decides, subject, text, remedy });
        }
    }

    fn is_silent(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|namespace| {
            let annotations = &namespace.annotations;
            !annotations.contains_key(PERMITTED) && !annotations.contains_key(ALLOWED_ROLES)
        })
    }

    /// The command that permits what pods of `namespace` had and lose. None for roles that they did not have or may not
    /// have had, or whose account is a guess: it would grant what a tenant asks for.
    fn annotate(
        &self,
        namespace: &str,
        changes: &BTreeMap<Change, BTreeSet<String>>,
    ) -> Option<String> {
        if !self.is_certain || !self.is_silent(namespace) {
            return None;
        }
        let lost = changes
            .keys()
            .filter(|(of, _, verdict)| of == namespace && matches!(verdict, Verdict::Loses(_)));
        let roles: BTreeSet<String> =
            lost.filter_map(|(_, role, _)| Some(literal(&self.resolve(role)?))).collect();
        let roles: Vec<String> = roles.into_iter().collect();
        (!roles.is_empty()).then(|| annotate("", namespace, &roles.join("|")))
    }

    fn resolve(&self, role: &str) -> Option<RoleArn> {
        RoleResolver::new(Some(self.base.clone())).resolve(role).ok()
    }

    /// Roles that pods lose, and that no namespace at all permits: these are misspelt, or the base is another.
    fn report_roles(&mut self, changes: &BTreeMap<Change, BTreeSet<String>>) {
        let lost = changes.keys().filter(|(_, _, verdict)| *verdict != Verdict::Gains);
        let roles: BTreeSet<&String> = lost.map(|(_, role, _)| role).collect();
        for role in roles {
            let mut names = self.namespaces.keys();
            if names.any(|namespace| self.decide(namespace, role).is_ok()) {
                continue;
            }
            let shown =
                self.resolve(role).map_or_else(|| format!("{role:?}"), |arn| arn.to_string());
            // The pods above are to be decided about.
            self.findings.push(Finding {
                decides: false,
                subject: format!("role {shown}"),
                text: "no namespace permits it".to_owned(),
                remedy: None,
            });
        }
    }

    fn report_renamed(&mut self, pods: &[&Workload]) {
        let Some(rules) = self.rules.as_ref().filter(|_| !pods.is_empty()) else { return };
        self.findings.push(Finding {
            decides: true,
            subject: some(&pods.iter().map(|pod| title(pod)).collect()),
            text: format!("has its role in {}; the agent reads {ROLE}", rules.role_key()),
            remedy: None,
        });
    }

    /// Pods without a role of their own, which had kube2iam's fallback.
    fn report_fallen(&mut self, pods: &[&Workload]) {
        let rules = self.rules.as_ref().and_then(OldRules::kube2iam);
        let Some(rules) = rules.filter(|_| !pods.is_empty()) else { return };
        let (had, remedy) = match &rules.default_role {
            DefaultRole::Absent => return,
            DefaultRole::Named(role) => (
                format!("role {role:?} of --default-role"),
                format!("annotate the pods with {ROLE}={}", quoted(role)),
            ),
            DefaultRole::Node => {
                let accounts: BTreeSet<String> = pods.iter().map(|pod| account(pod)).collect();
                let flags: Vec<String> = accounts
                    .iter()
                    .map(|account| format!("--node-role={}", quoted(account)))
                    .collect();
                (
                    "node's role".to_owned(),
                    format!("of these, those that need it: {}", flags.join(" ")),
                )
            }
        };
        self.findings.push(Finding {
            decides: true,
            subject: some(&pods.iter().map(|pod| title(pod)).collect()),
            text: format!("names no role, had the {had}, and gets none"),
            remedy: Some(remedy),
        });
    }

    /// What changes for namespaces.
    fn namespaces(&mut self, pods: &[&Workload]) {
        let asking: BTreeSet<&str> = pods
            .iter()
            .filter(|pod| pod.annotations.contains_key(ROLE))
            .filter_map(|pod| pod.namespace.as_deref())
            .collect();
        let mut silent = Vec::new();
        for namespace in self.namespaces.values().copied().collect::<Vec<_>>() {
            let subject = format!("namespace {}", namespace.name);
            for mistake in self.policy.mistakes(&record(namespace)) {
                let (subject, text) = (subject.clone(), mistake.to_string());
                self.findings.push(Finding { decides: true, subject, text, remedy: None });
            }
            for (annotation, difference) in self.differences(namespace) {
                let Difference { decides, text, instead } = difference;
                let written = &namespace.annotations[annotation];
                let remedy = instead
                    .filter(|_| self.is_certain)
                    .map(|instead| annotate("--overwrite ", &namespace.name, &instead));
                let (subject, text) =
                    (subject.clone(), format!("{annotation} {written:?}: {text}"));
                self.findings.push(Finding { decides, subject, text, remedy });
            }
            if self.requires && self.is_silent(&namespace.name) {
                silent.push(namespace.name.as_str());
            }
        }
        let (with, without): (Vec<_>, Vec<_>) =
            silent.into_iter().partition(|name| asking.contains(name));
        for (names, decides, says) in [
            (with, true, "neither annotation, and pods that ask for roles"),
            (without, false, "neither annotation, so that no pod there gets a role"),
        ] {
            let subject = match names[..] {
                [] => continue,
                [name] => format!("namespace {name}"),
                _ => format!("namespaces {}", names.join(", ")),
            };
            self.findings.push(Finding { decides, subject, text: says.to_owned(), remedy: None });
        }
    }

    fn differences(&self, namespace: &NamespaceObject) -> Vec<(&'static str, Difference)> {
        let Some(rules) = &self.rules else { return Vec::new() };
        let text = |name| namespace.annotations.get(name).filter(|text| !text.trim().is_empty());
        let permitted = text(PERMITTED)
            .and_then(|text| expressions::permitted(text, rules, &self.base))
            .map(|difference| (PERMITTED, difference));
        let allowed = text(ALLOWED_ROLES)
            .and_then(|text| expressions::allowed_roles(text, rules, &self.base))
            .map(|difference| (ALLOWED_ROLES, difference));
        permitted.into_iter().chain(allowed).collect()
    }
}

/// A pod of `namespace` that names `role` and nothing else.
fn asking(namespace: &str, role: &str) -> Pod {
    let uid = PodUid::new("00000000-0000-4000-8000-000000000000");
    Pod { role: Some(role.into()), ..Pod::new(uid, namespace, "pod") }
}

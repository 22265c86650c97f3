//! Why a pod gets what it gets: one account, for `/pods` and for `kiam-agent explain`. No secrets.

use std::{
    cmp::Reverse,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{knowledge::Knowledge, noted, older::Entitled};
use crate::{
    config::Config,
    imds::{self, Imdsv2, NodeRole, PathKind, RecordedRequest},
};
use kiam_core::{
    clock::Clock,
    credentials::State,
    pods::{Annotation, Namespace, Pod},
    policy::{Decision, Refusal, Ruling, Rulings},
    role::RoleArn,
};
use kiam_kernel::intercept::HostNetworkPods;

/// How many pods are shown instead of one that is not known.
const ALIKE: usize = 5;
/// In how many characters names must begin alike.
const BEGINNING: usize = 3;

/// What accounts are made of. Cheap to clone.
#[derive(Clone)]
pub(super) struct Explainer {
    knowledge: Knowledge,
    clock: Clock,
    settings: Arc<Settings>,
}

/// What the flags say about all pods.
struct Settings {
    /// The only node whose pods are watched.
    node: Option<String>,
    tokens: Imdsv2,
    node_roles: Vec<NodeRole>,
    passes_host_network: bool,
    entitled: Entitled,
    observes: bool,
}

/// All that is known of one pod, at one moment.
pub(super) struct Account<'a> {
    pod: Arc<Pod>,
    namespace: Option<Arc<Namespace>>,
    role: Option<Result<RoleArn, Refusal>>,
    rulings: Option<Rulings>,
    decision: Decision,
    credentials: Option<State>,
    /// How its connections reach the agent, or why they don't.
    path: Result<String, String>,
    journal: imds::Page,
    /// Until when it may hold the node's credentials.
    exposed: Option<SystemTime>,
    now: SystemTime,
    settings: &'a Settings,
}

// === impl Explainer ===

impl Explainer {
    /// Explains from `knowledge`, as it is whenever it is asked.
    pub(super) fn new(config: &Config, knowledge: &Knowledge, clock: &Clock) -> Self {
        let passes = |it: &kiam_kernel::intercept::Config| it.host_network == HostNetworkPods::Pass;
        let settings = Settings {
            node: config.cluster.node_name.clone(),
            tokens: config.imds.imdsv2,
            node_roles: config.imds.node_roles.clone(),
            passes_host_network: config.intercept.as_ref().is_some_and(passes),
            entitled: Entitled::new(config),
            observes: config.observes(),
        };
        let (knowledge, clock) = (knowledge.clone(), clock.clone());
        Self { knowledge, clock, settings: Arc::new(settings) }
    }

    /// Every pod that is known, by namespace and name.
    pub(super) fn all(&self) -> Value {
        let mut all = self.knowledge.pods.all();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all.iter().map(|pod| self.shown(pod)).collect()
    }

    /// What is known of the pod of this name: `Ok` if it would get credentials, `Err` if not.
    pub(super) fn explain(&self, namespace: &str, name: &str) -> Result<String, String> {
        let all = self.knowledge.pods.all();
        let mut asked: Vec<_> =
            all.iter().filter(|pod| pod.namespace == namespace && pod.name == name).collect();
        // One that has ended may have left its name to another.
        if asked.iter().any(|pod| pod.live) {
            asked.retain(|pod| pod.live);
        }
        if asked.is_empty() {
            return Err(self.unknown(&all, namespace, name));
        }
        let accounts: Vec<_> = asked.into_iter().map(|pod| self.account(pod)).collect();
        let texts: Vec<_> = accounts.iter().map(Account::text).collect();
        let text = texts.join("\n");
        if accounts.iter().all(|account| account.answer().is_ok()) { Ok(text) } else { Err(text) }
    }

    fn account(&self, pod: &Arc<Pod>) -> Account<'_> {
        let Knowledge { pods, policy, credentials, paths, .. } = &self.knowledge;
        let namespace = pods.namespace(&pod.namespace);
        let role = policy.role(pod);
        let rulings = match (&namespace, &role) {
            (Some(namespace), Some(Ok(role))) => Some(policy.rulings(namespace, role)),
            _ => None,
        };
        let decision = policy.decide(pod);
        let credentials = match &decision {
            Decision::Allow(identity) => credentials.get(identity),
            Decision::Refuse(_) => None,
        };
        let (path, now) = (paths.of(pod), self.clock.now());
        let journal = self.knowledge.journal.of(&pod.uid);
        let (pod, settings) = (pod.clone(), &*self.settings);
        let exposed =
            self.knowledge.older.until(&pod).filter(|_| !settings.entitled.includes(&pod));
        Account {
            pod,
            namespace,
            role,
            rulings,
            decision,
            credentials,
            path,
            journal,
            exposed,
            now,
            settings,
        }
    }

    fn shown(&self, pod: &Arc<Pod>) -> Value {
        let mut shown = self.account(pod).json();
        let observed = self.knowledge.sightings.of(&pod.uid);
        if !observed.is_empty() {
            shown["observed"] = json!(observed);
        }
        shown
    }

    /// What there is instead of a pod that is not known.
    fn unknown(&self, all: &[Arc<Pod>], namespace: &str, name: &str) -> String {
        let watched = match &self.settings.node {
            Some(node) => format!(" on node {node}, whose pods alone this agent watches"),
            None => String::new(),
        };
        let mut text = format!("there is no pod {namespace}/{name}{watched}\n");
        let beginning = |pod: &Pod| {
            pod.name.bytes().zip(name.bytes()).take_while(|(one, other)| one == other).count()
        };
        let mut alike: Vec<_> = all
            .iter()
            .filter(|pod| {
                pod.name == name || (pod.namespace == namespace && beginning(pod) >= BEGINNING)
            })
            .collect();
        alike.sort_by_key(|pod| (Reverse(beginning(pod)), &pod.namespace, &pod.name));
        for pod in alike.into_iter().take(ALIKE) {
            let _ = writeln!(text, "alike: {}/{}", pod.namespace, pod.name);
        }
        text
    }
}

// === impl Account ===

impl Account<'_> {
    /// What `/pods` shows.
    fn json(&self) -> Value {
        let pod = &self.pod;
        let mut shown = json!({
            "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.to_string(),
            "addresses": pod.addresses, "hostNetwork": pod.host_network, "live": pod.live,
            "annotation": shown_annotation(pod.role.as_ref()), "path": path(&self.path),
        });
        for (list, requests) in self.noted() {
            if !requests.is_empty() {
                shown[list] = requests.iter().map(noted::json).collect();
            }
        }
        if let Some(until) = self.exposed {
            shown["mayHoldNodeCredentialsUntil"] = json!(time(until));
        }
        match &self.decision {
            Decision::Refuse(refusal) => shown["refused"] = json!(refusal.to_string()),
            Decision::Allow(identity) => {
                shown["role"] = json!(identity.role.to_string());
                shown["sessionName"] = json!(identity.session_name.to_string());
                shown["credentials"] = match &self.credentials {
                    None => json!("not wanted"),
                    Some(State::Pending(None)) => json!("pending"),
                    Some(State::Pending(Some(limit))) => json!({ "waiting": limit.to_string() }),
                    Some(State::Failed { error, .. }) => json!({ "failed": error.message }),
                    Some(State::Ready(issued)) => json!({
                        "accessKeyId": issued.credentials.access_key_id,
                        "expiration": time(issued.credentials.expires),
                    }),
                };
            }
        }
        shown
    }

    /// What `kiam-agent explain` prints.
    fn text(&self) -> String {
        let pod = &self.pod;
        let mut lines = vec![("pod", self.who())];
        let annotation = match &pod.role {
            Some(annotation) => annotation.to_string(),
            None => "the pod has none".to_owned(),
        };
        lines.push(("annotation", annotation));
        match &self.role {
            None => {}
            Some(Ok(role)) => lines.push(("role", role.to_string())),
            Some(Err(error)) => lines.push(("role", error.to_string())),
        }
        lines.extend(self.namespace());
        if let Decision::Allow(identity) = &self.decision {
            let account = identity.service_account.as_ref();
            lines.extend(account.map(|account| ("vouched for", format!("by {account}'s token"))));
            lines.push(("session name", identity.session_name.to_string()));
            let source = identity.source_identity.as_ref();
            lines.extend(source.map(|source| ("source identity", source.to_string())));
        }
        let is_set = if pod.external_id.is_some() { "set" } else { "not set" };
        lines.push(("external id", is_set.to_owned()));
        lines.push(("tokens", self.tokens().to_owned()));
        lines.push(("path", path(&self.path).to_owned()));
        if let Decision::Allow(_) = &self.decision {
            lines.push(("credentials", self.held()));
        }
        if let Some(until) = self.exposed {
            let says = format!(
                "the pod ran before the kernel programs were attached, and may hold the node's credentials until {}",
                time(until)
            );
            lines.push(("older", says));
        }
        if self.settings.observes {
            let only = "observe: the pod's requests are left alone; they would be answered so:";
            lines.push(("mode", only.to_owned()));
        }
        let (Ok(answer) | Err(answer)) = self.answer();
        lines.push(("answer", answer));
        for (list, requests) in self.noted() {
            lines.extend(requests.iter().map(|noted| (list, noted::text(noted))));
        }
        lines.iter().fold(String::new(), |mut text, (what, says)| {
            // AWS's words may have any form; nothing fails when it is written to memory.
            let _ = writeln!(text, "{what:15} {}", says.replace(char::is_control, " "));
            text
        })
    }

    /// What the pod asked, by what became of it.
    fn noted(&self) -> [(&'static str, &[RecordedRequest]); 2] {
        [("rejected", &self.journal.refused), ("imdsv1", &self.journal.imdsv1)]
    }

    fn who(&self) -> String {
        let pod = &self.pod;
        let mut who = format!("{}/{}, uid {}", pod.namespace, pod.name, pod.uid);
        if let Some(node) = &pod.node {
            who += &format!(", on node {node}");
        }
        if pod.host_network {
            who += ", on the node's network";
        }
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        match addresses.as_slice() {
            [] => who += ", without address yet",
            some => who += &format!(", at {}", some.join(" ")),
        }
        if pod.live { who } else { who + ", ended" }
    }

    /// What the namespace's annotations say, each.
    fn namespace(&self) -> Vec<(&'static str, String)> {
        let name = &self.pod.namespace;
        let Some(namespace) = &self.namespace else {
            return vec![("namespace", format!("{name} is not known yet"))];
        };
        let raw = |annotation: &Option<Annotation>| match annotation {
            Some(annotation) => format!("says {annotation}"),
            None => "the namespace has none".to_owned(),
        };
        let (permitted, allowed_roles) = match &self.rulings {
            Some(Rulings { permitted, allowed_roles }) => {
                (ruling(permitted.as_ref()), ruling(allowed_roles.as_ref()))
            }
            None => (raw(&namespace.permitted), raw(&namespace.allowed_roles)),
        };
        vec![("permitted", permitted), ("allowed-roles", allowed_roles)]
    }

    fn tokens(&self) -> &'static str {
        match (&self.namespace, self.settings.tokens) {
            (_, Imdsv2::Required) => "required, by --imdsv2",
            (Some(namespace), _) if namespace.requires_imdsv2() => "required, by the namespace",
            (Some(_), _) => "optional",
            (None, _) => "required, as long as the namespace is not known",
        }
    }

    fn held(&self) -> String {
        let whole =
            |left: Duration| humantime::format_duration(Duration::from_secs(left.as_secs()));
        match &self.credentials {
            None => "none: this agent does not want them (yet)".to_owned(),
            Some(State::Pending(None)) => "none yet: STS is asked".to_owned(),
            Some(State::Pending(Some(limit))) => format!("none yet: {limit}"),
            Some(State::Failed { error, retry_at }) => {
                let left = retry_at.saturating_duration_since(Instant::now());
                format!("none: {error}; STS is asked again in {}", whole(left))
            }
            Some(State::Ready(issued)) => {
                let held = &issued.credentials;
                let left = held.expires.duration_since(self.now).unwrap_or_default();
                let until = time(held.expires);
                format!("{}, valid until {until} ({})", held.access_key_id, whole(left))
            }
        }
    }

    /// What the pod is answered, if it asks now; `Ok` if that is credentials.
    fn answer(&self) -> Result<String, String> {
        let (pod, settings) = (&self.pod, self.settings);
        if !pod.live {
            return Err("none: the pod has ended".to_owned());
        }
        if settings.node_roles.iter().any(|role| role.names(pod)) {
            return Err("the real metadata service's: --node-role names the pod".to_owned());
        }
        if pod.host_network && settings.passes_host_network {
            return Err("the real metadata service's, by --host-network-pods=pass".to_owned());
        }
        if let Err(path) = &self.path {
            return Err(format!("none, it can't connect: {path}"));
        }
        let refused = |error: &imds::Error| {
            let (role, credentials) =
                (error.status(PathKind::Elsewhere), error.status(PathKind::Credentials));
            if role == credentials {
                return format!("{}: {error}", role.as_u16());
            }
            format!(
                "{} for its role, {} for credentials: {error}",
                role.as_u16(),
                credentials.as_u16()
            )
        };
        match &self.decision {
            Decision::Refuse(refusal) => Err(refused(&imds::Error::Refused(refusal.clone()))),
            Decision::Allow(_) => match imds::ready(self.credentials.clone()) {
                Ok(_) => Ok("200, with these credentials".to_owned()),
                Err(error) => Err(refused(&error)),
            },
        }
    }
}

fn shown_annotation(annotation: Option<&Annotation>) -> Option<String> {
    annotation.map(|it| it.text().map_or_else(|too_long| too_long.to_string(), str::to_owned))
}

fn path(path: &Result<String, String>) -> &str {
    let (Ok(text) | Err(text)) = path;
    text
}

fn ruling<E: std::fmt::Display>(ruling: Option<&Ruling<E>>) -> String {
    match ruling {
        None => "the namespace has none".to_owned(),
        Some(Ruling::Allows(text)) => format!("allows the role by {text}"),
        Some(Ruling::Forbids(text)) => format!("forbids the role: {text} does not match it"),
        Some(Ruling::Invalid(error)) => format!("forbids every role: {error}"),
    }
}

pub(super) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::{
        app::{inside::Paths, observe::Sightings, older::Older},
        config::{Task, Vars, parse},
    };
    use kiam_core::{
        credentials::{self, CredentialSource, Credentials, Prefetcher, SourceError},
        lifecycle::Readiness,
        pods::{PodIndex, fixtures},
        policy::{self, RolePolicy},
        role::{Claimant, RoleIdentity, RoleResolver, WantedRoles},
        telemetry::Statsd,
    };

    struct Nobody;

    impl CredentialSource for Nobody {
        fn issue<'a>(
            &'a self,
            _identity: &'a RoleIdentity,
            _claimant: &'a Claimant,
        ) -> futures::future::BoxFuture<'a, Result<Credentials, SourceError>> {
            Box::pin(std::future::pending())
        }
    }

    struct Unset;

    impl Vars for Unset {
        fn get(&self, _name: &str) -> Option<String> {
            None
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }
    }

    fn config(flags: &str) -> Config {
        let line = format!(
            "--host=192.0.2.1 --role-base-arn=arn:aws:iam::123456789012:role/ --node-name=node-1 {flags}"
        );
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let Ok(Task::Run(config)) = parse(&words, &Unset) else { panic!("{flags}") };
        *config
    }

    fn explainer(flags: &str) -> (PodIndex, Explainer) {
        let config = config(flags);
        let (index, pods) = PodIndex::new();
        let resolver = RoleResolver::new(Some("arn:aws:iam::123456789012:role/".parse().unwrap()));
        let source = config.sts.source;
        let policy = policy::Config { source, ..policy::Config::new(resolver) };
        let clock = Clock::system();
        let parts = credentials::PrefetcherParts {
            source: Arc::new(Nobody),
            render: imds::wire::render,
            clock: clock.clone(),
            wanted: watch::channel(WantedRoles::default()).1,
            silence: Box::new(|| None),
            names: Box::new(|_| None),
            metrics: credentials::Metrics::register(
                &mut prometheus_client::registry::Registry::default(),
                Statsd::off(),
            ),
            first_pass: Readiness::default().latch("first credentials"),
        };
        let (prefetcher, credentials) = Prefetcher::new(credentials::Config::default(), parts);
        let knowledge = Knowledge {
            policy: RolePolicy::new(policy, pods.clone()),
            pods,
            credentials,
            refresher: prefetcher.refresher(),
            sightings: Sightings::default(),
            paths: Paths::default(),
            older: Older::default(),
            node: Arc::default(),
            journal: imds::Journal::default(),
        };
        let explainer = Explainer::new(&config, &knowledge, &clock);
        (index, explainer)
    }

    fn pod(n: u32) -> Pod {
        Pod { role: Some("reader".into()), ..Pod::test(n) }
    }

    #[test]
    fn the_answer_is_what_the_pod_would_see() {
        let cases = [
            (
                "",
                Pod::test(1),
                "answer          404 for its role, 403 for credentials: the pod has no",
            ),
            (
                "",
                pod(1),
                "answer          503: no credentials yet: the agent does not know yet which roles",
            ),
            ("", pod(1), "credentials     none: this agent does not want them (yet)"),
            ("", pod(1), "tokens          optional"),
            ("--imdsv2=required", pod(1), "tokens          required, by --imdsv2"),
            ("", Pod { live: false, ..pod(1) }, "answer          none: the pod has ended"),
            ("", Pod { host_network: true, ..pod(1) }, "by --host-network-pods=pass"),
            ("--host-network-pods=intercept", Pod { host_network: true, ..pod(1) }, "503: "),
            ("--node-role=default/default", pod(1), "real metadata service's: --node-role"),
            ("--mode=observe", pod(1), "mode            observe: "),
            (
                "--credential-source=web-identity",
                pod(1),
                "vouched for     by default/default's token",
            ),
            (
                "--credential-source=web-identity",
                Pod::test(1),
                "ServiceAccount default/default is not",
            ),
            ("", Pod { namespace: "lost".to_owned(), ..pod(1) }, "lost is not known yet"),
        ];
        for (flags, pod, expected) in cases {
            let (index, explainer) = explainer(flags);
            index.apply(fixtures::namespace("default", 1));
            let namespace = pod.namespace.clone();
            index.apply(pod);
            let text = explainer.explain(&namespace, "pod-1").unwrap_err();
            assert!(text.contains(expected), "{flags} {expected}:\n{text}");
        }
    }

    #[test]
    fn what_the_pod_was_refused_is_shown_with_who_asked() {
        let (index, explainer) = explainer("");
        index.apply(fixtures::namespace("default", 1));
        index.apply(pod(1));
        index.apply(pod(2));
        let head = |path: &str, program: &str| {
            let request = http::Request::get(path).header(http::header::USER_AGENT, program);
            request.body(()).unwrap().into_parts().0
        };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600);
        let journal = &explainer.knowledge.journal;
        for _ in 0..3 {
            let head = head("/latest/user-data", "a\t\"b");
            journal.refused(&fixtures::uid(1), &head, imds::ErrorKind::Path, at);
        }
        journal.imdsv1(&fixtures::uid(1), &head("/latest/meta-data/", "Boto/2.49"), at);
        let text = explainer.explain("default", "pod-1").unwrap_err();
        for line in [
            r#"rejected        GET /latest/user-data (Path), 3 times, by "a\t\"b", last at 2026-01-01T00:00:00Z"#,
            r#"imdsv1          GET /latest/meta-data/, 1 times, by "Boto/2.49", last at 2026-01-01T00:00:00Z"#,
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
        let all = explainer.all();
        assert_eq!(
            all[0]["rejected"],
            json!([{
                "method": "GET", "path": "/latest/user-data", "userAgent": "a\\t\\\"b",
                "count": 3, "last": "2026-01-01T00:00:00Z", "reason": "Path",
            }])
        );
        assert_eq!(all[0]["imdsv1"][0]["userAgent"], "Boto/2.49");
        assert!(all[1].get("rejected").is_none() && all[1].get("imdsv1").is_none(), "{all}");
        assert!(!explainer.explain("default", "pod-2").unwrap_err().contains("rejected"));
    }

    #[test]
    fn a_pod_that_ended_does_not_hide_the_one_that_has_its_name_now() {
        let (index, explainer) = explainer("");
        index.apply(fixtures::namespace("default", 1));
        index.apply(Pod { live: false, ..pod(1) });
        index.apply(Pod { name: "pod-1".to_owned(), ..pod(2) });
        index.apply(pod(12));
        let text = explainer.explain("default", "pod-1").unwrap_err();
        assert!(text.contains("uid 00000002") && !text.contains("ended"), "{text}");
        let text = explainer.explain("default", "pod-13").unwrap_err();
        assert!(
            text.contains("on node node-1") && text.contains("alike: default/pod-12\n"),
            "{text}"
        );
        let text = explainer.explain("other", "pod-12").unwrap_err();
        assert!(text.ends_with("alike: default/pod-12\n"), "{text}");
    }
}

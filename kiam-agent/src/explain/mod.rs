//! Explains what a pod gets and why: one account, for `/pods` and for `kiam-agent explain`. It has no secrets.

mod account;
mod counts;
mod requests;

use std::{cmp::Reverse, fmt::Write as _, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::account::Account;
pub use self::counts::PodCounts;
use crate::{observe::Sightings, older_pods::Exposure, pod_listeners::Paths};
use kiam_core::{
    clock::Clock,
    credentials::CredentialReader,
    pods::{Pod, PodReader},
    policy::{Decision, RolePolicy},
};
use kiam_requests::imds::{self, Imdsv2};

/// How many pods are suggested instead of one that is not known.
const ALIKE: usize = 5;
/// How many characters a suggested name has in common with the name that was asked for.
const BEGINNING: usize = 3;

/// The account of each pod. Cheap to clone.
#[derive(Clone)]
pub struct Explainer {
    sources: Sources,
    clock: Clock,
    settings: Arc<Settings>,
}

/// The readers that an account is made from.
#[derive(Clone)]
pub struct Sources {
    /// Pods and namespaces.
    pub pods: PodReader,
    /// Who may have which role.
    pub policy: RolePolicy,
    /// Cached credentials.
    pub credentials: CredentialReader,
    /// Which listener pods connect to.
    pub paths: Paths,
    /// Pods that may hold the node's credentials.
    pub exposure: Exposure,
    /// Requests that pods made.
    pub journal: imds::Journal,
    /// Connects that were observed, with `--mode=observe`.
    pub sightings: Sightings,
}

/// What is known of the pods of one name: one pod, or those that had the name before.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    /// Whether all of them would get credentials.
    pub served: bool,
    /// What `kiam-agent explain` prints.
    pub text: String,
    /// What `/pods` shows of each; none where there is no pod of the name.
    pub pods: Vec<Value>,
}

/// The flags that decide about all pods.
pub struct Settings {
    /// `--node-name`: the only node whose pods are watched.
    pub node: Option<String>,
    /// `--imdsv2`.
    pub imdsv2: Imdsv2,
    /// `--mode=observe`.
    pub observes: bool,
}

// === impl Explainer ===

impl Explainer {
    /// Explains from what `sources` have at the time of each question.
    #[must_use]
    pub fn new(settings: Settings, sources: Sources, clock: Clock) -> Self {
        Self { sources, clock, settings: Arc::new(settings) }
    }

    /// Every known pod, by namespace and name.
    #[must_use]
    pub fn all(&self) -> Value {
        let mut all = self.sources.pods.all();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all.iter().map(|pod| self.shown(pod)).collect()
    }

    /// How many pods there are, and what becomes of them.
    #[must_use]
    pub fn counts(&self) -> PodCounts {
        let mut counts = PodCounts::default();
        let all = self.sources.pods.all();
        all.iter().for_each(|pod| counts.add(&self.account(pod)));
        counts
    }

    /// What is known of the pod of this name.
    ///
    /// # Errors
    ///
    /// The same, of a pod that would get no credentials.
    pub fn explain(&self, namespace: &str, name: &str) -> Result<String, String> {
        let Explanation { served, text, .. } = self.explanation(namespace, name);
        if served { Ok(text) } else { Err(text) }
    }

    /// What is known of the pod of this name, as text and as facts.
    #[must_use]
    pub fn explanation(&self, namespace: &str, name: &str) -> Explanation {
        let all = self.sources.pods.all();
        let mut asked: Vec<_> =
            all.iter().filter(|pod| pod.namespace == namespace && pod.name == name).collect();
        // One that has ended may have left its name to another.
        if asked.iter().any(|pod| pod.live) {
            asked.retain(|pod| pod.live);
        }
        if asked.is_empty() {
            let text = self.unknown(&all, namespace, name);
            return Explanation { served: false, text, pods: Vec::new() };
        }
        let accounts: Vec<_> = asked.into_iter().map(|pod| self.account(pod)).collect();
        let texts: Vec<_> = accounts.iter().map(Account::text).collect();
        Explanation {
            served: accounts.iter().all(|account| account.answer().is_ok()),
            text: texts.join("\n"),
            pods: accounts.iter().map(Account::json).collect(),
        }
    }

    fn account(&self, pod: &Arc<Pod>) -> Account<'_> {
        let Sources { pods, policy, credentials, paths, exposure, journal, .. } = &self.sources;
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
        // Its processes have the static pod's UID, not that of the mirror pod.
        let static_uid = pod.config_hash.as_ref().filter(|_| pod.live);
        let missing = static_uid.and_then(|uid| pods.by_uid(uid).err());
        let (path, now) = (paths.of(pod), self.clock.now());
        let journal = journal.of(&pod.uid);
        let (pod, settings) = (pod.clone(), &*self.settings);
        let (exposed, grounds) = (exposure.of(&pod), exposure.entitlement().of(&pod));
        Account {
            pod,
            namespace,
            role,
            rulings,
            decision,
            missing,
            credentials,
            path,
            journal,
            exposed,
            grounds,
            now,
            settings,
        }
    }

    fn shown(&self, pod: &Arc<Pod>) -> Value {
        let mut shown = self.account(pod).json();
        let observed = self.sources.sightings.of(&pod.uid);
        if !observed.is_empty() {
            shown["observed"] = json!(observed);
        }
        shown
    }

    /// Suggestions for the name of a pod that is not known.
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

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, ready},
        time::{Duration, SystemTime},
    };

    use tokio::{sync::watch, time::Instant};

    use super::*;
    use crate::{
        cluster::{Age, Exposed},
        older_pods::Entitlement,
    };
    use kiam_core::{
        credentials::{
            self, CredentialSource, Credentials, Prefetcher, SourceError, State, fixtures::FnSource,
        },
        pods::{Namespace, PodIndex, fixtures},
        policy,
        role::{RoleIdentity, RoleResolver, Source, WantedRoles},
    };

    /// The flags of one case.
    struct Flags {
        imdsv2: Imdsv2,
        entitlement: Entitlement,
        observes: bool,
        source: Source,
    }

    /// Issues `reader`'s, and denies all else.
    fn reader(identity: &RoleIdentity, now: SystemTime) -> Result<Credentials, SourceError> {
        if identity.role.name() == "reader" {
            let hour = Duration::from_secs(3600);
            return Ok(Credentials::test(&identity.role, "ASIA0000000000000001", now, hour));
        }
        let message = "STS: AccessDenied: not authorized to perform: sts:AssumeRole".to_owned();
        Err(SourceError { class: credentials::ErrorClass::Denied, message })
    }

    impl Default for Flags {
        fn default() -> Self {
            let entitlement = Entitlement { passes_host_network: true, node_roles: Vec::new() };
            let (imdsv2, source) = (Imdsv2::Optional, Source::Node);
            Self { imdsv2, entitlement, observes: false, source }
        }
    }

    fn explainer(flags: Flags) -> (PodIndex, Explainer) {
        let nobody = FnSource(|_: &_| pending());
        let (index, explainer, ..) = with_source(flags, nobody, Clock::system());
        (index, explainer)
    }

    fn with_source(
        flags: Flags,
        source: impl CredentialSource,
        clock: Clock,
    ) -> (PodIndex, Explainer, Prefetcher, watch::Sender<WantedRoles>) {
        let (wanted, wants) = watch::channel(WantedRoles::default());
        let (index, pods) = PodIndex::new();
        let resolver = RoleResolver::new(Some("arn:aws:iam::123456789012:role/".parse().unwrap()));
        let Flags { imdsv2, entitlement, observes, source: shown } = flags;
        let policy = policy::Config { source: shown, ..policy::Config::new(resolver) };
        let parts = credentials::PrefetcherParts {
            render: imds::wire::render,
            ..credentials::PrefetcherParts::test(source, clock.clone(), wants)
        };
        let (prefetcher, credentials) = Prefetcher::new(credentials::Config::default(), parts);
        let sources = Sources {
            policy: RolePolicy::new(policy, pods.clone()),
            pods,
            credentials,
            paths: Paths::default(),
            exposure: Exposure::new(entitlement),
            journal: imds::Journal::default(),
            sightings: Sightings::default(),
        };
        let node = Some("node-1".to_owned());
        let settings = Settings { node, imdsv2, observes };
        (index, Explainer::new(settings, sources, clock), prefetcher, wanted)
    }

    fn pod(n: u32) -> Pod {
        Pod { role: Some("reader".into()), ..Pod::test(n) }
    }

    /// The blocks of `docs/policy.md` that show what `explain` prints, without the commands before it.
    fn samples() -> Vec<String> {
        let page = std::fs::read_to_string("../docs/policy.md").unwrap();
        let blocks = page.split("```console\n").skip(1).filter_map(|rest| rest.split("```").next());
        let lines = |block: &str| -> Vec<String> {
            block.lines().filter(|it| !it.starts_with("$ ")).map(|it| format!("{it}\n")).collect()
        };
        blocks.map(|block| lines(block).concat()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_page_shows_what_explain_prints() {
        const SESSION: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_771_860);
        let source = FnSource(move |identity: &_| ready(reader(identity, at)));
        let parts = with_source(Flags::default(), source, Clock::simulated(at));
        let (index, explainer, prefetcher, wanted) = parts;
        index.apply(Namespace {
            permitted: Some(".*".into()),
            allowed_roles: Some(r#"["reader", "de*"]"#.into()),
            ..fixtures::namespace("shop", 1)
        });
        let asks = |n, name: &str, role: &str| Pod {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            role: Some(role.into()),
            ..Pod::test(n).at(&["10.77.1.2", "fd77:1::2"])
        };
        let reader = Pod { session_policies: Some(SESSION.into()), ..asks(1, "orders", "reader") };
        let (writer, denied) = (asks(2, "writer", "writer"), asks(3, "denied", "denied"));
        let jobs = Pod { role: None, ..asks(4, "jobs", "") };
        let pods = [reader, writer, denied, jobs].map(Arc::new);
        let head = |path: &str, program: &str| {
            let request = http::Request::get(path).header(http::header::USER_AGENT, program);
            request.body(()).unwrap().into_parts().0
        };
        let journal = &explainer.sources.journal;
        let path = head("/latest/user-data", "aws-sdk-go/1.44.133");
        journal.refused(&pods[0].uid, &path, imds::ErrorKind::Path, at);
        journal.imdsv1(&pods[0].uid, &head("/latest/meta-data/", "Boto/2.49"), at);
        pods.iter().for_each(|pod| index.apply(Pod::clone(pod)));
        wanted.send_replace(explainer.sources.policy.wanted(&|_: &Pod| true));
        let (_signal, drain) = kiam_core::lifecycle::drain();
        let prefetching = tokio::spawn(prefetcher.run(drain));
        tokio::time::sleep(Duration::from_secs(2)).await;
        prefetching.abort();
        let mut accounts = pods.each_ref().map(|pod| explainer.account(pod));
        for account in &mut accounts {
            account.path = Ok("pod-local: listening on port 62575 inside the pod".to_owned());
        }
        let until = at + Duration::from_secs(5 * 3600);
        accounts[0].exposed = Some(Exposed { until, age: Age::Older });
        // It is varied at random.
        if let Some(State::Failed { retry_at, .. }) = &mut accounts[2].credentials {
            *retry_at = Instant::now() + Duration::from_secs(12);
        }
        let mut printed = accounts.map(|account| account.text()).to_vec();
        printed.push(explainer.explain("shop", "order").unwrap_err());
        assert_eq!(samples(), printed);
    }

    #[test]
    fn the_answer_is_what_the_pod_would_see() {
        let default = Flags::default;
        let entitled = |passes_host_network, role: Option<&str>| {
            let node_roles = role.into_iter().map(|role| role.parse().unwrap()).collect();
            Flags { entitlement: Entitlement { passes_host_network, node_roles }, ..default() }
        };
        let web_identity = || Flags { source: Source::WebIdentity, ..default() };
        let host_network = || Pod { host_network: true, ..pod(1) };
        let mirror = |namespace| pod(1).mirroring(namespace, fixtures::config_hash(1));
        let cases = [
            (
                default(),
                Pod::test(1),
                "answer          404 for its role, 403 for credentials: the pod has no",
            ),
            (
                default(),
                pod(1),
                "answer          503: no credentials yet: the agent does not know yet which roles",
            ),
            (default(), pod(1), "credentials     none: this agent does not want them (yet)"),
            (default(), pod(1), "tokens          optional"),
            (
                Flags { imdsv2: Imdsv2::Required, ..default() },
                pod(1),
                "tokens          required, by --imdsv2",
            ),
            (default(), Pod { live: false, ..pod(1) }, "answer          none: the pod has ended"),
            (default(), host_network(), "by --host-network-pods=pass"),
            (entitled(false, None), host_network(), "503: "),
            (
                entitled(true, Some("default/default")),
                pod(1),
                "real metadata service's: --node-role",
            ),
            (Flags { observes: true, ..default() }, pod(1), "mode            observe: "),
            (web_identity(), pod(1), "vouched for     by default/default's token"),
            (web_identity(), Pod::test(1), "ServiceAccount default/default is not"),
            (default(), Pod { namespace: "lost".to_owned(), ..pod(1) }, "lost is not known yet"),
            (
                default(),
                mirror("default"),
                "403 for credentials: pod not found: it is a static pod, and --static-pod-namespaces",
            ),
            (default(), mirror("kube-system"), "answer          503: no credentials yet: "),
        ];
        for (flags, pod, expected) in cases {
            let (index, explainer) = explainer(flags);
            index.apply(fixtures::namespace("default", 1));
            index.apply(fixtures::namespace("kube-system", 1));
            let namespace = pod.namespace.clone();
            index.apply(pod);
            let text = explainer.explain(&namespace, "pod-1").unwrap_err();
            assert!(text.contains(expected), "{expected}:\n{text}");
        }
    }

    #[test]
    fn nothing_that_tenants_write_adds_a_line_or_moves_the_cursor() {
        let hostile =
            "reader\n\ranswer          200\u{1b}[2J\u{9b}31m\u{7f}\u{202e}\u{2028}\u{200b}";
        let annotation = || Some(hostile.into());
        let list = Some(format!("[{hostile:?}, \"{}\"]", "a\u{202e}").as_str().into());
        let namespaces = [
            (annotation(), annotation()),
            (Some("(a\u{202e}".into()), list),
            (Some("a\u{202e}".into()), Some("[\"a\u{202e}\"]".into())),
            (None, None),
        ];
        let whole = Pod { session_name: annotation(), external_id: annotation(), ..pod(1) };
        let pods = [
            Pod { role: annotation(), ..whole.clone() },
            Pod { session_policies: annotation(), ..whole.clone() },
            whole,
        ];
        let request = http::Request::get("/latest/user-data").header(
            http::header::USER_AGENT,
            http::HeaderValue::from_bytes(b"\xc2\x9b2J\xe2\x80\xae").unwrap(),
        );
        let head = request.body(()).unwrap().into_parts().0;
        let mut lines = 0;
        for (permitted, allowed_roles) in namespaces {
            for pod in &pods {
                let (index, explainer) = explainer(Flags::default());
                let namespace = fixtures::namespace("default", 1);
                index.apply(Namespace {
                    permitted: permitted.clone(),
                    allowed_roles: allowed_roles.clone(),
                    ..namespace
                });
                index.apply(pod.clone());
                let journal = &explainer.sources.journal;
                journal.refused(&pod.uid, &head, imds::ErrorKind::Path, SystemTime::UNIX_EPOCH);
                let text = explainer.explain("default", "pod-1").unwrap_err();
                let plain = |text: char| text == '\n' || (' '..='~').contains(&text);
                assert!(text.chars().all(plain), "{text:?}");
                let answers = text.lines().filter(|line| line.starts_with("answer  ")).count();
                assert_eq!(answers, 1, "{text}");
                lines += text.lines().count();
            }
        }
        assert!(lines > 100, "{lines}");
    }

    #[test]
    fn what_the_pod_was_refused_is_shown_with_who_asked() {
        let (index, explainer) = explainer(Flags::default());
        index.apply(fixtures::namespace("default", 1));
        index.apply(pod(1));
        index.apply(pod(2));
        let head = |path: &str, program: &str| {
            let request = http::Request::get(path).header(http::header::USER_AGENT, program);
            request.body(()).unwrap().into_parts().0
        };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600);
        let journal = &explainer.sources.journal;
        for _ in 0..3 {
            let head = head("/latest/user-data", "a\t\"b");
            journal.refused(&fixtures::uid(1), &head, imds::ErrorKind::Path, at);
        }
        journal.imdsv1(&fixtures::uid(1), &head("/latest/meta-data/", "Boto/2.49"), at);
        let text = explainer.explain("default", "pod-1").unwrap_err();
        for line in [
            r#"rejected        GET /latest/user-data (Path), 3 times, by "a\t\"b", last at 2026-01-01T00:00:00Z"#,
            r#"imdsv1          GET /latest/meta-data/, once, by "Boto/2.49", last at 2026-01-01T00:00:00Z"#,
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
        let (index, explainer) = explainer(Flags::default());
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

//! Events about pods and namespaces, as a small API server over real HTTP gets and keeps them.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    collections::BTreeSet,
    future::ready,
    time::{Duration, SystemTime},
};

use kiam_agent::{
    cluster::{self, Age, Cluster, EventParts, Exposed},
    proxy::Proxies,
};
use kiam_core::{
    clock::Clock,
    credentials::{self, Credentials, ErrorClass, Prefetcher, SourceError, fixtures::FnSource},
    lifecycle::{self, DrainSignal, Readiness},
    pods::{Namespace, Pod, PodIndex, PodUid},
    policy::{self, RolePolicy, publish_wanted},
    role::{RoleIdentity, RoleResolver, WantedRoles},
    telemetry::Statsd,
};
use kiam_requests::imds;
use lab::fake::{Injected, Place, kubernetes::Kubernetes};
use prometheus_client::registry::Registry;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet, time};

const PATIENCE: Duration = Duration::from_secs(60);
const PERIOD: Duration = Duration::from_millis(20);

/// AWS, which denies the role `denied` and is asked too often for `throttled`.
fn aws(identity: &RoleIdentity) -> Result<Credentials, SourceError> {
    let refused = |class, message: &str| Err(SourceError { class, message: message.to_owned() });
    match identity.role.name() {
        "denied" => refused(ErrorClass::Denied, "AccessDenied: not you"),
        "throttled" => refused(ErrorClass::Throttled, "Throttling: slower"),
        _ => {
            let (now, hour) = (Clock::system().now(), Duration::from_secs(3600));
            Ok(Credentials::test(&identity.role, "ASIA", now, hour))
        }
    }
}

/// What tells, and what it tells of.
struct Fixture {
    index: PodIndex,
    api: Kubernetes,
    registry: Registry,
    wanted: watch::Receiver<WantedRoles>,
    stop: DrainSignal,
    tasks: JoinSet<()>,
    folder: TempDir,
}

impl Fixture {
    async fn start() -> Self {
        Self::tell(Kubernetes::start(Place::loopback()).unwrap(), |_| true, true).await
    }

    async fn tell(api: Kubernetes, serves: fn(&Pod) -> bool, send: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig).unwrap();
        let (index, pods) = PodIndex::new();
        let mut registry = Registry::default();
        let (stop, drain) = lifecycle::drain();
        let policy = RolePolicy::new(policy(), pods.clone());
        let (sender, wanted) = watch::channel(WantedRoles::default());
        let clock = Clock::system();
        let parts = credentials::PrefetcherParts {
            render: imds::wire::render,
            metrics: credentials::Metrics::register(&mut registry, Statsd::off()),
            ..credentials::PrefetcherParts::test(
                FnSource(|identity: &_| ready(aws(identity))),
                clock.clone(),
                wanted.clone(),
            )
        };
        let (prefetcher, credentials) = Prefetcher::new(credentials::Config::default(), parts);
        let config = cluster::Config {
            kubeconfig: Some(kubeconfig),
            node_name: Some("n1".to_owned()),
            sync_interval: PATIENCE,
            stall: PATIENCE,
            startup_taint: None,
            evict_older_pods: false,
            prove_after: PATIENCE,
            proxies: Proxies::default(),
        };
        let metrics = cluster::Metrics::register(&mut registry);
        let events = Cluster::new(config, &Readiness::default()).unwrap().events(&metrics);
        let parts = EventParts {
            pods,
            serves: Box::new(serves),
            policy: policy.clone(),
            credentials,
            exposed: Box::new(exposed),
            clock,
            period: PERIOD,
            send,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(publish_wanted(policy, |_| true, sender, drain.clone()));
        tasks.spawn(prefetcher.run(drain.clone()));
        tasks.spawn(events.run(parts, drain));
        Self { index, api, registry, wanted, stop, tasks, folder }
    }

    /// Ends it; the API server goes on.
    async fn end(mut self) -> Kubernetes {
        self.stop.start();
        while self.tasks.join_next().await.is_some() {}
        drop(self.folder);
        self.api
    }

    fn namespace(&self, permitted: &str) {
        self.namespace_called("shop", permitted);
    }

    fn namespace_called(&self, name: &str, permitted: &str) {
        let permitted = Some(permitted.into());
        self.index.apply(Namespace { permitted, ..Namespace::new(name) });
    }

    /// The reasons of all Events, with whom each is about.
    fn told(&self) -> BTreeSet<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let events = self.api.store().events();
        events
            .iter()
            .map(|event| (text(&event["regarding"]["name"]), text(&event["reason"])))
            .collect()
    }

    async fn until_told(&self, expected: &[(&str, &str)]) {
        let expected: BTreeSet<_> =
            expected.iter().map(|(who, why)| ((*who).to_owned(), (*why).to_owned())).collect();
        self.until(|| self.told() == expected).await;
    }

    async fn until(&self, holds: impl Fn() -> bool) {
        let waited = time::timeout(PATIENCE, async {
            while !holds() {
                time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(waited.await.is_ok(), "{:?}\n{}", self.api.store().events(), self.metrics());
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    fn counts(&self, outcome: &str, events: u64) -> bool {
        self.metrics().contains(&format!("kiam_events_total{{outcome=\"{outcome}\"}} {events}\n"))
    }
}

/// Of pods that are called so.
fn exposed(pod: &Pod) -> Option<Exposed> {
    let until = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600);
    let age = match &*pod.name {
        "old" => Age::Older,
        "hidden" => Age::Unknown,
        _ => return None,
    };
    Some(Exposed { until, age })
}

fn policy() -> policy::Config {
    policy::Config::new(RoleResolver::new(Some("arn:aws:iam::123456789012:role/".parse().unwrap())))
}

fn pod(name: &str, role: Option<&str>) -> Pod {
    Pod {
        node: Some("n1".to_owned()),
        role: role.map(Into::into),
        ..Pod::new(PodUid::new(&format!("uid-{name}")), "shop", name)
    }
}

#[tokio::test]
async fn pods_that_get_nothing_are_told_why_and_nobody_else_is() {
    let fixture = Fixture::tell(
        Kubernetes::start(Place::loopback()).unwrap(),
        |pod| pod.name != "elsewhere",
        true,
    )
    .await;
    fixture.namespace(".*/(reader|denied|throttled)");
    for (name, role) in [
        ("good", Some("reader")),
        ("plain", None),
        ("forbidden", Some("writer")),
        ("garbled", Some("arn:aws:iam")),
        ("denied", Some("denied")),
        ("early", Some("throttled")),
        ("elsewhere", Some("writer")),
    ] {
        fixture.index.apply(pod(name, role));
    }
    fixture.index.apply(Pod { live: false, ..pod("over", Some("writer")) });
    let hash = PodUid::new("0123456789abcdef0123456789abcdef");
    fixture.index.apply(Pod { config_hash: Some(hash), ..pod("static", Some("writer")) });
    fixture
        .until_told(&[
            ("denied", "CredentialError"),
            ("forbidden", "RoleForbidden"),
            ("garbled", "RoleForbidden"),
            ("static", "RoleForbidden"),
        ])
        .await;
    let events = fixture.api.store().events();
    let of = |name: &str| {
        events.iter().find(|event| event["regarding"]["name"] == *name).unwrap().clone()
    };
    let forbidden = of("forbidden");
    let regarding = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "forbidden", "uid": "uid-forbidden",
    });
    assert_eq!(forbidden["regarding"], regarding);
    assert_eq!(forbidden["type"], "Warning");
    assert_eq!(forbidden["reportingController"], "kiam-agent");
    assert_eq!(forbidden["reportingInstance"], "n1");
    let note = forbidden["note"].as_str().unwrap();
    assert!(note.contains("role/writer") && note.contains("\"shop\""), "{note}");
    let denied = of("denied");
    let note = denied["note"].as_str().unwrap();
    assert!(note.contains("role/denied") && note.contains("AccessDenied: not you"), "{note}");
    assert_eq!(of("static")["regarding"]["uid"], "0123456789abcdef0123456789abcdef");
    fixture.until(|| fixture.counts("Created", 4)).await;
    assert_eq!(fixture.wanted.borrow().len(), 3, "nothing of this touches what is fetched");
}

#[tokio::test]
async fn pods_that_may_hold_the_nodes_credentials_are_told_once_whether_or_not_they_want_a_role() {
    let fixture = Fixture::start().await;
    fixture.index.apply(pod("old", None));
    fixture.index.apply(pod("young", None));
    fixture.until_told(&[("old", "NodeCredentialsExposed")]).await;
    let note = |name: &str| {
        let events = fixture.api.store().events();
        let event = events.iter().find(|event| event["regarding"]["name"] == name).unwrap();
        event["note"].as_str().unwrap().to_owned()
    };
    fixture.index.apply(pod("hidden", None));
    let reason = "NodeCredentialsExposed";
    fixture.until_told(&[("hidden", reason), ("old", reason)]).await;
    for (name, says) in [("old", "the pod ran before"), ("hidden", "the agent can't tell whether")]
    {
        let note = note(name);
        assert!(note.starts_with(says), "{note}");
        let until = "may hold the node's credentials until 2026-01-01T00:00:00Z";
        assert!(note.contains(until), "{note}");
    }
}

#[tokio::test]
async fn mistakes_of_a_namespace_are_told_where_its_pods_want_roles() {
    let fixture = Fixture::start().await;
    fixture.namespace("(");
    fixture.index.apply(pod("plain", None));
    fixture.namespace_called("other", ".*/writer");
    fixture.index.apply(Pod { namespace: "other".to_owned(), ..pod("a", Some("reader")) });
    fixture.until_told(&[("a", "RoleForbidden")]).await;
    fixture.index.apply(pod("b", Some("reader")));
    let expected = [("a", "RoleForbidden"), ("b", "RoleForbidden"), ("shop", "InvalidPermitted")];
    fixture.until_told(&expected).await;
    let events = fixture.api.store().events();
    let namespace = events.iter().find(|event| event["reason"] == "InvalidPermitted").unwrap();
    assert_eq!(namespace["metadata"]["namespace"], "shop", "its own people see it there");
    assert_eq!(namespace["regarding"]["kind"], "Namespace");
    // Another agent, with a pod of the same namespace: the namespace's Event is there already.
    let api = fixture.end().await;
    let second = Fixture::tell(api, |_| true, true).await;
    second.namespace("(");
    second.index.apply(pod("c", Some("reader")));
    second.until(|| second.told().contains(&("c".to_owned(), "RoleForbidden".to_owned()))).await;
    second.until(|| second.counts("Repeated", 1)).await;
    let events = second.api.store().events();
    let namespace = events.iter().find(|event| event["reason"] == "InvalidPermitted").unwrap();
    assert!(namespace["series"].is_null(), "{namespace}");
}

#[tokio::test]
async fn an_agent_that_starts_again_goes_on_with_the_same_events() {
    let first = Fixture::start().await;
    first.namespace(".*/reader");
    first.index.apply(pod("a", Some("writer")));
    first.until_told(&[("a", "RoleForbidden")]).await;
    let second = Fixture::tell(first.end().await, |_| true, true).await;
    second.namespace(".*/reader");
    second.index.apply(pod("a", Some("writer")));
    second.until(|| second.counts("Repeated", 1)).await;
    let events = second.api.store().events();
    assert_eq!((events.len(), &events[0]["series"]["count"]), (1, &2.into()), "{events:?}");
    let last = events[0]["series"]["lastObservedTime"].as_str().unwrap();
    let last: SystemTime = humantime::parse_rfc3339(last).unwrap();
    assert!(last <= Clock::system().now(), "{last:?}");
}

#[tokio::test]
async fn without_an_api_server_or_leave_to_write_nothing_is_lost_or_delayed() {
    let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
    let api = Kubernetes::start(Place::loopback()).unwrap();
    let down = api.faults().inject(Injected::refuse(503, "ServiceUnavailable").path(path).times(2));
    let fixture = Fixture::tell(api, |_| true, true).await;
    fixture.namespace(".*/reader");
    fixture.index.apply(pod("a", Some("writer")));
    fixture.index.apply(pod("b", Some("reader")));
    let mut wanted = fixture.wanted.clone();
    wanted.wait_for(|wanted| wanted.len() == 1).await.unwrap();
    fixture.until_told(&[("a", "RoleForbidden")]).await;
    assert_eq!(down.met(), 2);
    let forbidden = fixture.api.faults().inject(Injected::refuse(403, "Forbidden").path(path));
    fixture.index.apply(pod("c", Some("writer")));
    fixture.until(|| forbidden.met() == 1).await;
    fixture.index.apply(pod("d", Some("writer")));
    // A server that fails would be asked again within a second.
    time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(forbidden.met(), 1, "asking again at once changes nothing");
    fixture.until(|| fixture.counts("Failed", 3) && fixture.counts("Created", 1)).await;
    fixture.end().await;
}

#[tokio::test]
async fn an_event_that_the_server_never_takes_is_not_tried_again() {
    let api = Kubernetes::start(Place::loopback()).unwrap();
    let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
    let gone = api.faults().inject(Injected::refuse(404, "NotFound").path(path).times(1));
    let fixture = Fixture::tell(api, |_| true, true).await;
    fixture.namespace(".*/reader");
    fixture.index.apply(pod("a", Some("writer")));
    fixture.until(|| gone.met() == 1).await;
    fixture.index.apply(pod("b", Some("writer")));
    fixture.until_told(&[("b", "RoleForbidden")]).await;
    fixture.until(|| fixture.counts("Refused", 1)).await;
}

#[tokio::test]
async fn an_agent_that_only_observes_writes_nothing() {
    let api = Kubernetes::start(Place::loopback()).unwrap();
    let fixture = Fixture::tell(api, |_| true, false).await;
    fixture.namespace("(");
    fixture.index.apply(pod("a", Some("writer")));
    // Long enough for others to have told.
    time::sleep(PERIOD * 10).await;
    assert_eq!(fixture.told(), BTreeSet::new());
}

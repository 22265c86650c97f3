//! Evicts pods that may hold the node's credentials, so that their controllers recreate them.
//!
//! One at a time, through the Eviction API, which respects PodDisruptionBudgets
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/api-eviction/>). The one rule: no pod is evicted that would not
//! be recreated.

use std::{collections::HashMap, sync::Arc, time::Duration};

use kube::{
    api::PostParams,
    core::{Request, Status},
};
use serde_json::{Value, json};
use tokio::time::{Instant, error::Elapsed, sleep, timeout};
use tracing::{Instrument as _, debug, info, info_span, warn};

use super::{
    backoff::jittered,
    describe,
    metrics::{EvictionOutcome, Metrics},
    tokens::lacks_right,
};
use kiam_core::{
    lifecycle::Drain,
    pods::{Pod, PodReader, PodUid},
};

/// How many paces an evicted pod may take to end before the next one is evicted.
const ENDS: u32 = 12;
/// The paces between the first two attempts to evict a pod; doubled after each, up to [`LONGEST`].
const FIRST: u32 = 3;
const LONGEST: u32 = 60;
/// The delay of the next attempt after the API server denied an eviction.
const FORBIDDEN: Duration = Duration::from_secs(600);
/// The deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);

/// The dependencies of evictions.
pub struct EvictionParts {
    /// All known pods.
    pub pods: PodReader,
    /// Whether a pod is on this node and should be recreated.
    pub is_due: Box<dyn Fn(&Pod) -> bool + Send + Sync>,
    /// The time between two evictions.
    pub pace: Duration,
}

/// The task that evicts pods.
pub struct Evictions {
    pub(super) client: kube::Client,
    pub(super) metrics: Metrics,
}

/// The state of one run.
struct Evictor {
    parts: EvictionParts,
    client: kube::Client,
    metrics: Metrics,
    delays: HashMap<PodUid, RetryDelay>,
    /// The last evicted pod, and the time of its eviction.
    last: Option<(PodUid, Instant)>,
    /// Whether a warning was logged that evictions are denied.
    warned: bool,
}

/// The delay of the next attempt to evict a pod.
#[derive(Clone, Copy, Debug)]
struct RetryDelay {
    length: Duration,
    until: Instant,
}

/// Why a pod was not evicted.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// A PodDisruptionBudget allows no disruption now, the server is busy, the namespace is being deleted, or an admission
    /// policy denies the eviction.
    #[error("{}", describe(.0))]
    Later(kube::Error),
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Deadline(#[from] Elapsed),
    /// The agent lacks the right.
    #[error("apply deploy/evict-older-pods, which grants it: {}", describe(.0))]
    Forbidden(kube::Error),
    /// The pod is gone, or another pod has its name now.
    #[error("the pod is gone")]
    Gone,
}

// === impl RetryDelay ===

impl RetryDelay {
    /// The delay after `before`.
    fn after(before: Option<Self>, pace: Duration, now: Instant) -> Self {
        let (first, longest) = (pace * FIRST, pace * LONGEST);
        let length = before.map_or(first, |before| (before.length * 2).min(longest));
        Self { length, until: now + jittered(length) }
    }
}

// === impl Evictions ===

impl Evictions {
    /// Evicts pods that are due until the drain begins.
    pub async fn run(self, parts: EvictionParts, mut drain: Drain) {
        let evictor = Evictor {
            parts,
            client: self.client,
            metrics: self.metrics,
            delays: HashMap::new(),
            last: None,
            warned: false,
        };
        tokio::select! {
            () = drain.started() => {}
            () = evictor.run().instrument(info_span!("evictions")) => {}
        }
    }
}

// === impl Evictor ===

impl Evictor {
    async fn run(mut self) {
        loop {
            let pause = match self.next(Instant::now()) {
                Some(pod) => self.evict(&pod).await,
                None => self.parts.pace,
            };
            sleep(jittered(pause)).await;
        }
    }

    /// The next pod to evict; `None` while the last one is ending.
    fn next(&mut self, now: Instant) -> Option<Arc<Pod>> {
        let pods = self.parts.pods.all();
        self.delays.retain(|uid, _| pods.iter().any(|pod| pod.live && pod.uid == *uid));
        let ends = |(uid, at): &(PodUid, Instant)| {
            now.duration_since(*at) < self.parts.pace * ENDS
                && pods.iter().any(|pod| pod.uid == *uid)
        };
        if self.last.as_ref().is_some_and(ends) {
            return None;
        }
        let rests = |pod: &Pod| self.delays.get(&pod.uid).is_some_and(|pause| now < pause.until);
        let is_due = |pod: &&Arc<Pod>| {
            let stays = pod.live && !pod.terminating;
            stays && pod.comes_back() && (self.parts.is_due)(pod) && !rests(pod)
        };
        // Pods without an attempt come first.
        pods.iter()
            .filter(is_due)
            .min_by_key(|pod| self.delays.get(&pod.uid).map(|it| it.until))
            .cloned()
    }

    /// Evicts a pod, and returns the time until the next eviction.
    async fn evict(&mut self, pod: &Pod) -> Duration {
        let evicted = self.request(pod).await;
        let now = Instant::now();
        self.metrics.count_eviction(outcome(&evicted));
        let mut wait = self.parts.pace;
        match evicted {
            Ok(()) => {
                info!(
                    pod.namespace = %pod.namespace, pod.name = %pod.name,
                    "Evicted a pod that may hold the node's credentials"
                );
                self.warned = false;
                self.last = Some((pod.uid.clone(), now));
            }
            Err(Failure::Gone) => {}
            Err(error @ Failure::Forbidden(_)) => {
                if !std::mem::replace(&mut self.warned, true) {
                    warn!(%error, "Evicting pods that may hold the node's credentials is denied; retrying");
                }
                wait = FORBIDDEN;
            }
            Err(error) => {
                debug!(
                    %error, pod.namespace = %pod.namespace, pod.name = %pod.name,
                    "Evicting a pod that may hold the node's credentials failed; retrying"
                );
            }
        }
        // Until the watch reports that the evicted pod is terminating.
        let pause = RetryDelay::after(self.delays.get(&pod.uid).copied(), self.parts.pace, now);
        self.delays.insert(pod.uid.clone(), pause);
        wait
    }

    async fn request(&self, pod: &Pod) -> Result<(), Failure> {
        // Not kube's own call, whose field for the options no server reads. Another pod may have the name by now.
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": { "namespace": pod.namespace, "name": pod.name },
            "deleteOptions": { "preconditions": { "uid": pod.uid.to_string() } },
        });
        let pods = Request::new(format!("/api/v1/namespaces/{}/pods", pod.namespace));
        let body = eviction.to_string().into_bytes();
        let request = pods.create_subresource("eviction", &pod.name, &PostParams::default(), body);
        let request = request.map_err(|error| Failure::Later(kube::Error::BuildRequest(error)))?;
        let answer = timeout(DEADLINE, self.client.request::<Value>(request)).await?;
        answer.map(drop).map_err(|error| match &error {
            kube::Error::Api(status) if lacks_right(status) => Failure::Forbidden(error),
            kube::Error::Api(status) if is_gone(status) => Failure::Gone,
            _ => Failure::Later(error),
        })
    }
}

/// Whether there is no pod of this name, or another one: 409, in the words of the registry or of etcd's client
/// (<https://github.com/kubernetes/kubernetes/blob/v1.31.0/staging/src/k8s.io/apiserver/pkg/registry/rest/delete.go#L87>,
/// <https://github.com/kubernetes/kubernetes/blob/v1.31.0/staging/src/k8s.io/apiserver/pkg/storage/interfaces.go#L137>). Any
/// other conflict passes, such as one between two writers of the pod or of its budget.
fn is_gone(status: &Status) -> bool {
    let says = |words: &str| status.message.contains(words);
    status.code == 404
        || status.code == 409 && (says("UID in the precondition") || says("UID in precondition"))
}

fn outcome(evicted: &Result<(), Failure>) -> EvictionOutcome {
    match evicted {
        Ok(()) => EvictionOutcome::Evicted,
        Err(Failure::Gone) => EvictionOutcome::Gone,
        Err(Failure::Forbidden(_)) => EvictionOutcome::Forbidden,
        Err(Failure::Later(kube::Error::Api(status))) if status.code == 429 => {
            EvictionOutcome::Budget
        }
        Err(Failure::Later(_) | Failure::Deadline(_)) => EvictionOutcome::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, convert::Infallible, sync::Mutex};

    use http::{Request, Response, StatusCode};
    use kiam_core::{lifecycle, pods::PodIndex};
    use kube::client::Body;
    use prometheus_client::registry::Registry;
    use tower::service_fn;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_missing_right_is_asked_for_seldom_and_each_time_for_another_pod() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let server = service_fn(move |request: Request<Body>| {
            seen.lock().unwrap().push(request.uri().path().to_owned());
            // As the authorizer words it.
            let message =
                "pods is forbidden: User \"agent\" cannot create resource \"pods/eviction\"";
            let denied =
                json!({ "kind": "Status", "status": "Failure", "message": message, "code": 403 });
            let mut answer = Response::new(Body::from(denied.to_string().into_bytes()));
            *answer.status_mut() = StatusCode::FORBIDDEN;
            async { Ok::<_, Infallible>(answer) }
        });
        let (index, pods) = PodIndex::new();
        for number in 1..=3 {
            let controller = Some("ReplicaSet".into());
            index.apply(Pod { controller, ..Pod::test(number) });
        }
        let client = kube::Client::new(server, "default");
        let metrics = Metrics::register(&mut Registry::default());
        let parts =
            EvictionParts { pods, is_due: Box::new(|_| true), pace: Duration::from_secs(10) };
        let (_signal, drain) = lifecycle::drain();
        let run = Evictions { client, metrics }.run(parts, drain);
        assert!(timeout(FORBIDDEN * 4, run).await.is_err());
        let asked = asked.lock().unwrap();
        assert!(asked.len() <= 5, "seldom: {asked:?}");
        assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), 3, "{asked:?}");
    }
}

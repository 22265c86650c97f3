//! An API server that fails in each way for longer than a minute, and how that shows.

use std::time::Instant;

use super::*;

/// By how much time jumps, while the network goes on in real time.
const JUMP: Duration = Duration::from_secs(10);
const STALL: Duration = Duration::from_secs(75);
const REAL: Duration = Duration::from_millis(10);
const MOST_REAL: Duration = Duration::from_secs(2);

/// What fails.
#[derive(Clone, Copy, Debug)]
enum Ask {
    List,
    Watch,
}

impl Ask {
    fn faults(self, fault: Injected) -> Injected {
        match self {
            // No watch begins before a list is taken.
            Self::List => fault,
            Self::Watch => fault.field("watch", "true"),
        }
    }

    /// Whether the metric says that it fails.
    fn fails(self, fed: &Fed) -> bool {
        let failing = format!("kiam_cluster_failing{{resource=\"Pods\",request=\"{self:?}\"}}");
        fed.metric(&failing).as_deref() == Some("1")
    }

    /// What `/ready` says of it.
    fn detail(self, fed: &Fed) -> Option<String> {
        let name = format!("Kubernetes API, {self:?} of pods").to_lowercase();
        let details = fed.readiness.details().into_iter();
        details.filter(|(of, _)| of.to_lowercase() == name).map(|(_, why)| why.into_owned()).next()
    }
}

/// A watch's answer of this line alone.
fn line(code: u16, reason: &str) -> Injected {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code, "reason": reason, "message": "so it is",
    });
    Injected::body(200, &format!("{}\n", json!({ "type": "ERROR", "object": status })))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the limit is real time, which the test does not move"
)]
async fn time_passes(what: &str, holds: impl Fn() -> bool) {
    let (began, mut real) = (Instant::now(), REAL);
    while !holds() {
        assert!(began.elapsed() < PATIENCE * 3, "never came: {what}");
        time::pause();
        time::advance(JUMP).await;
        time::resume();
        time::sleep(real).await;
        // On a busy machine an answer may take longer, and each jump ends what waits for one.
        real = (real * 5 / 4).min(MOST_REAL);
    }
}

async fn shows(ask: Ask, fault: Injected, why: &str) {
    let case = format!("{ask:?}: {fault:?}");
    let api = server();
    let fault = api.faults().inject(ask.faults(fault));
    let fed = Fed::by(&api.address().to_string(), |config| config.stall = STALL).await;
    time_passes(&format!("{case}: the metric"), || ask.fails(&fed)).await;
    time_passes(&format!("{case}: the reason"), || ask.detail(&fed).is_some()).await;
    let detail = ask.detail(&fed).unwrap();
    assert!(detail.contains(why), "{case}: {detail}");
    fault.lift();
    let over = || !ask.fails(&fed) && ask.detail(&fed).is_none();
    time_passes(&format!("{case}: its end"), over).await;
}

#[tokio::test]
async fn each_failure_shows_in_the_metric_and_with_its_reason() {
    let statuses = [
        (401, "Unauthorized"),
        (403, "Forbidden"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
    ];
    for (status, reason) in statuses {
        for ask in [Ask::List, Ask::Watch] {
            shows(ask, Injected::refuse(status, reason), &status.to_string()).await;
        }
    }
    for ask in [Ask::List, Ask::Watch] {
        shows(ask, Injected::hang(), "no answer within").await;
    }
    shows(Ask::List, Injected::refuse(410, "Expired"), "410").await;
    shows(Ask::Watch, Injected::refuse(410, "Expired"), "rejects a watch from the version").await;
}

#[tokio::test]
async fn watches_that_are_opened_and_end_at_once_fail() {
    shows(Ask::Watch, Injected::body(200, ""), "ends them at once").await;
    shows(Ask::Watch, line(500, "InternalError"), "500 InternalError: so it is").await;
    shows(Ask::Watch, line(403, "Forbidden"), "403 Forbidden: so it is").await;
    shows(Ask::Watch, line(410, "Expired"), "rejects a watch from the version").await;
}

#[tokio::test]
async fn refused_connections_show_too() {
    for ask in [Ask::List, Ask::Watch] {
        let api = server();
        if let Ask::List = ask {
            api.stop();
        }
        let fed = Fed::by(&api.address().to_string(), |_| {}).await;
        if let Ask::Watch = ask {
            eventually("both watches", || api.open_watches() == 2).await;
            api.stop();
        }
        time_passes("the reason", || ask.detail(&fed).is_some()).await;
        let detail = ask.detail(&fed).unwrap().to_lowercase();
        assert!(ask.fails(&fed) && detail.contains("refused"), "{ask:?}: {detail}");
        api.restart().unwrap();
        time_passes("its end", || !ask.fails(&fed) && ask.detail(&fed).is_none()).await;
    }
}

#[tokio::test]
async fn one_watch_that_ends_at_once_is_no_failure_and_an_event_ends_one() {
    let api = server();
    let once = api.faults().inject(line(410, "Expired").field("watch", "true").times(1));
    let fed = Fed::with(&api, |_| {}).await;
    eventually("other watches", || once.met() == 1 && api.open_watches() == 2).await;
    assert!(!Ask::Watch.fails(&fed));
    let ends = api.faults().inject(Injected::body(200, "").field("watch", "true"));
    api.close_watches();
    eventually("a failure", || Ask::Watch.fails(&fed)).await;
    ends.lift();
    eventually("both watches", || api.open_watches() == 2).await;
    api.apply_pod(&pod("a", 1));
    fed.has(&["a"]).await;
    assert!(!Ask::Watch.fails(&fed), "an event is a sign that the watch works");
}

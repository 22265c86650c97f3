//! The API server is away from the start, or says odd things.

use lab::{
    fake::{Injected, kubernetes::NamespaceRecord},
    loopback::schedule,
};

use super::{eventually, pod, start};

#[test]
fn an_agent_that_starts_without_the_api_server_refuses_and_then_catches_up() {
    let pod = pod(1, "orders");
    let node = start(&[], |kubernetes, _| {
        schedule(kubernetes, &pod);
        kubernetes.stop();
    });
    let attempt = node.credentials(&pod);
    assert_eq!((attempt.status, attempt.reason()), (Some(404), "pod not found"), "{attempt:?}");
    assert_eq!((node.status("/ready"), node.status("/live")), (503, 200));
    assert_eq!(node.sts.requests(), 0);
    node.kubernetes.restart().unwrap();
    eventually("credentials", || node.credentials(&pod).status == Some(200));
    node.assert_served(&pod);
    eventually("readiness", || node.status("/ready") == 200);
}

#[test]
fn an_api_server_that_answers_nonsense_later_is_not_noticed() {
    let (known, new) = (pod(1, "orders"), pod(2, "reports"));
    let node = start(&["--sync-interval=1s"], |kubernetes, _| schedule(kubernetes, &known));
    node.assert_served(&known);
    let list = || format!("{:?}", node.kubernetes.seen().len());
    for fault in [
        Injected::refuse(500, "InternalError"),
        Injected::refuse(429, "TooManyRequests"),
        Injected::cut(),
        Injected::body(200, "<html>a proxy's</html>"),
        Injected::body(200, "{}"),
        Injected::body(
            200,
            "{\"kind\":\"PodList\",\"metadata\":{\"resourceVersion\":\"1\"},\"items\":\"none\"}",
        ),
    ] {
        let shown = format!("{fault:?}");
        let fault = node.kubernetes.faults().inject(fault);
        node.kubernetes.close_watches();
        eventually(&format!("a request that meets {shown}"), || fault.met() >= 2);
        node.assert_served(&known);
        fault.lift();
        let before = list();
        eventually("another request", || list() != before);
        node.assert_served(&known);
    }
    schedule(&node.kubernetes, &new);
    eventually("the new pod's credentials", || node.credentials(&new).status == Some(200));
    node.assert_served(&new);
    assert_eq!(node.sts.requests(), 2);
}

#[test]
fn a_pod_whose_namespace_went_first_is_refused_and_its_credentials_are_kept_for_a_while() {
    let pod = pod(1, "orders");
    let node = start(&[], |kubernetes, _| schedule(kubernetes, &pod));
    node.assert_served(&pod);
    node.kubernetes.delete_namespace(&pod.namespace);
    eventually("a refusal", || node.credentials(&pod).status == Some(404));
    let attempt = node.credentials(&pod);
    assert!(attempt.reason().contains("namespace \"shop\" is not known"), "{attempt:?}");
    node.kubernetes.apply_namespace(&NamespaceRecord::new(&pod.namespace));
    eventually("credentials", || node.credentials(&pod).status == Some(200));
    node.assert_served(&pod);
    assert_eq!(node.sts.requests(), 1);
}

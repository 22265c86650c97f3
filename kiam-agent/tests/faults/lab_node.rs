//! On a lab node, with the kernel's identity: a watch that is black-holed, and the metadata service with the node's
//! own credentials.

use http::Method;
use lab::{
    Lab, LabPod, PodSpec,
    fake::{
        Injected,
        imds::{INSTANCE_ID, NODE_ACCESS_KEY, NODE_ROLE},
    },
    pod_client::Options,
    role_arn,
};

use super::eventually;

#[test]
fn a_black_holed_watch_never_gives_an_address_its_old_pods_role() {
    if lab::skip!() {
        return;
    }
    for path in ["--path=auto", "--path=node"] {
        let lab = Lab::start().unwrap();
        let _agent = lab.agent(&[path]);
        let first = lab.unpublished_pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
        lab.publish(&first);
        lab.assert_served(&first, "orders");
        let (v4, v6) = (first.v4(), first.v6());
        // Connections stay open and nothing comes through them any more, whatever is asked.
        lab.kubernetes.stall_watches(true);
        let lists = lab.kubernetes.faults().inject(Injected::hang().method(Method::GET));
        lab.delete(first);
        let spec = PodSpec::new("data", "reports").role("reports").addresses(v4, v6);
        let second = lab.node.pod(lab.schedule(spec).unwrap()).unwrap();
        let asking = Options { for_ms: Some(1500), pause_ms: 5, ..Options::default() };
        for attempt in second.ask(&asking).unwrap() {
            assert_eq!((attempt.status, attempt.body.as_str()), (Some(404), ""), "{attempt:?}");
        }
        assert!(lists.met() > 0, "nobody listed for the pod that is missing");
        lists.lift();
        lab.kubernetes.stall_watches(false);
        eventually("the new pod's credentials", || {
            let attempt = second.credentials().unwrap();
            let role = lab.role_of(&attempt);
            assert_ne!(role, Some(role_arn("orders")), "{attempt:?}");
            role == Some(role_arn("reports"))
        });
    }
}

#[test]
fn pods_do_not_notice_that_the_metadata_service_is_away() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let pod = |role: &str| lab.pod(PodSpec::new("shop", role).role(role)).unwrap();
    let assert_served = |pod: &LabPod, role: &str| {
        lab.assert_served(pod, role);
    };
    let known = pod("orders");
    assert_served(&known, "orders");
    let instance = || known.get("/latest/meta-data/instance-id").unwrap();
    lab.imds.stop();
    assert_eq!(instance().status, Some(503));
    assert_served(&known, "orders");
    // The node's own credentials are still good for a new role.
    assert_served(&pod("reports"), "reports");
    lab.imds.restart().unwrap();
    assert_eq!(instance().body, INSTANCE_ID);
}

/// The node's own credentials expire, and STS refuses them: IMDS gives out none that are fresh for a while.
#[test]
fn node_credentials_that_have_expired_are_not_noticed_and_fresh_ones_are_taken() {
    let Some(lab) = lab::node_test!() else { return };
    let path = format!("/latest/meta-data/iam/security-credentials/{NODE_ROLE}");
    // In an outage of IMDS, AWS itself takes these for a while.
    let expired = lab.imds.faults().inject(Injected::edit(expired).path(&path));
    let _agent = lab.agent(&[]);
    let known = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_eq!(lab.role_of(&known.credentials().unwrap()), Some(role_arn("orders")));
    let refused = lab.sts.faults().inject(Injected::refuse(403, "ExpiredToken"));
    let new = lab.pod(PodSpec::new("shop", "reports").role("reports")).unwrap();
    eventually("a refusal by STS", || refused.met() >= 2);
    let attempt = new.credentials().unwrap();
    assert_eq!(attempt.status, Some(503), "{attempt:?}");
    assert!(attempt.headers["x-kiam-reason"].contains("ExpiredToken"), "{attempt:?}");
    assert_eq!(lab.role_of(&known.credentials().unwrap()), Some(role_arn("orders")));

    let fresh = "ASIANODE000000000001";
    lab.sts.set_caller(fresh);
    lab.imds.set_node_credentials(fresh, "secret-of-the-node", "token-of-the-node");
    expired.lift();
    refused.lift();
    eventually("credentials by the node's new ones", || {
        lab.role_of(&new.credentials().unwrap()) == Some(role_arn("reports"))
    });
    let callers = lab.sts.issued().into_iter().map(|issued| issued.caller);
    assert_eq!(callers.collect::<Vec<_>>(), [NODE_ACCESS_KEY, fresh]);
}

/// IMDS's answer with credentials of long ago.
fn expired(body: &str) -> String {
    let (before, _) = body.split_once("\"Expiration\"").unwrap();
    format!("{before}\"Expiration\":\"2026-01-01T00:00:00Z\"}}")
}

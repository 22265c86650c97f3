//! Broken pods, and what `kubectl kiam explain` names as the cause.

use lab::{
    eventually,
    fake::{Injected, kubernetes::ExecProtocol},
    loopback,
    pod_client::{Imds, Options, attempt},
    role_base_arn,
};
use serde_json::json;

use crate::stage::{Cluster, pod};

/// A pod, the exit status of `explain`, and parts of what it prints.
struct Row {
    pod: &'static str,
    code: i32,
    parts: &'static [&'static str],
}

const fn row(pod: &'static str, code: i32, parts: &'static [&'static str]) -> Row {
    Row { pod, code, parts }
}

const ROWS: &[Row] = &[
    row(
        "shop/good",
        0,
        &[
            "cause           none: it gets credentials",
            "Running on node n1; asked its agent kiam-agent-n1",
        ],
    ),
    row(
        "shop/plain",
        1,
        &["the pod has no annotation iam.amazonaws.com/role", "annotate the pod's template"],
    ),
    row(
        "shop/forbidden",
        1,
        &[
            "cause           404 for its role",
            "does not match it",
            "the namespace's annotations decide",
        ],
    ),
    row("bare/good", 1, &["--namespace-policy=required", "the namespace's annotations decide"]),
    row("shop/garbled", 1, &["arn:aws:iam", "cause           404", "docs/annotations.md"]),
    row("shop/denied", 1, &["STS: AccessDenied", "trust policy"]),
    row("shop/unreachable", 1, &["cause           503", "see whether the node reaches STS"]),
    row(
        "shop/pending",
        1,
        &["the pod is Pending and on no node: 0/3 nodes are available", "before it is scheduled"],
    ),
    row(
        "shop/goode",
        1,
        &["there is no pod goode in namespace shop", "pods with such a name: good"],
    ),
    row("nowhere/x", 1, &["there is no pod x in namespace nowhere"]),
    row("shop/elsewhere", 1, &["no agent answers for it on node n2", "the taint gpu=x:NoExecute"]),
    row("shop/fargate", 1, &["Fargate's nodes run no DaemonSets", "by IRSA"]),
    row("shop/lost", 1, &["there is no node n9"]),
    row("shop/ended", 1, &["cause           none: the pod has ended"]),
    row(
        "shop/curious",
        0,
        &[
            "rejected        GET /latest/user-data (Path), once, by \"kiam-lab\"",
            "/latest/user-data, which is the node's and which no flag opens",
        ],
    ),
    row("strict/old", 0, &["(TokenMissing)", "kiam-lab asks without a token"]),
    row("shop/thief", 0, &["(OtherRole)", "a role that is not its own"]),
];

fn cast(cluster: &Cluster) {
    let store = &cluster.kubernetes;
    cluster.namespace("shop", &[("permitted", ".*/(reader|denied|unreachable)")]);
    cluster.namespace("bare", &[]);
    cluster.namespace("strict", &[("permitted", ".*"), ("imdsv2", "required")]);
    let reader =
        |namespace: &str, name: &str, number| pod("n1", namespace, name, number).role("reader");
    store.apply_pod(&reader("shop", "good", 1));
    store.apply_pod(&pod("n1", "shop", "plain", 2));
    store.apply_pod(&pod("n1", "shop", "forbidden", 3).role("writer"));
    store.apply_pod(&reader("bare", "good", 4));
    store.apply_pod(&pod("n1", "shop", "garbled", 5).role("arn:aws:iam"));
    store.apply_pod(&pod("n1", "shop", "denied", 6).role("denied"));
    store.apply_pod(&pod("n1", "shop", "unreachable", 7).role("unreachable"));
    store.apply_pod_object(json!({
        "kind": "Pod",
        "metadata": { "namespace": "shop", "name": "pending", "uid": "pending" },
        "spec": {},
        "status": {
            "phase": "Pending",
            "conditions": [{
                "type": "PodScheduled", "status": "False",
                "message": "0/3 nodes are available: 3 Insufficient cpu.",
            }],
        },
    }));
    store.apply_pod(&pod("n2", "shop", "elsewhere", 8).role("reader"));
    store.apply_pod(&pod("n3", "shop", "fargate", 9).role("reader"));
    store.apply_pod(&pod("n9", "shop", "lost", 10).role("reader"));
    let mut ended = reader("shop", "ended", 11);
    "Succeeded".clone_into(&mut ended.phase);
    store.apply_pod(&ended);
    store.apply_pod(&reader("shop", "curious", 12));
    store.apply_pod(&reader("strict", "old", 13));
    store.apply_pod(&reader("shop", "thief", 14));
    cluster.node(
        "n2",
        json!({
            "spec": { "taints": [{ "key": "gpu", "value": "x", "effect": "NoExecute" }] },
        }),
    );
    cluster.node(
        "n3",
        json!({ "metadata": { "labels": { "eks.amazonaws.com/compute-type": "fargate" } } }),
    );
}

#[test]
fn the_cause_of_each_broken_pod_is_named() {
    let cluster = Cluster::start();
    let role = |name: &str| format!("{}{name}", role_base_arn());
    let faults = cluster.sts.faults();
    faults.inject(Injected::refuse(403, "AccessDenied").field("RoleArn", &role("denied")));
    faults
        .inject(Injected::refuse(503, "ServiceUnavailable").field("RoleArn", &role("unreachable")));
    cast(&cluster);
    let agent = cluster.agent("n1", &["--namespace-policy=required"]);
    let ask = |number: u8, path: &str, imds| {
        attempt(&Options {
            to: Some(agent.pods().ip()),
            port: agent.pods().port(),
            bind: Some([127, 77, 1, number].into()),
            imds,
            ..Options::get(path)
        })
    };
    eventually("the good pod's credentials", || {
        ask(1, "/latest/meta-data/iam/security-credentials/", Imds::V2).status == Some(200)
    });
    assert_eq!(ask(12, "/latest/user-data", Imds::V2).status, Some(404));
    assert_eq!(ask(13, "/latest/meta-data/", Imds::V1).status, Some(401));
    let other = "/latest/meta-data/iam/security-credentials/writer";
    assert_eq!(ask(14, other, Imds::V2).status, Some(403));
    // Of each protocol that API servers speak.
    for protocol in [ExecProtocol::V4, ExecProtocol::V5] {
        cluster.kubernetes.speak_exec(protocol);
        for Row { pod, code, parts } in ROWS {
            let said = cluster.ctl(&["explain", pod]);
            assert_eq!(said.code, Some(*code), "{pod}: {said:?}");
            for part in *parts {
                assert!(said.text.contains(part), "{pod}: {part:?} is missing from\n{}", said.text);
            }
        }
    }
    // What the agent has not heard of yet.
    cluster.kubernetes.stall_watches(true);
    loopback::schedule(&cluster.kubernetes, &pod("n1", "shop", "unseen", 20).role("reader"));
    let said = cluster.ctl(&["explain", "shop/unseen"]);
    assert!(said.text.contains("the node's agent does not know the pod"), "{said:?}");
    cluster.kubernetes.stall_watches(false);
}

//! The whole agent on a lab node, with the kernel's part: who gets what.

use std::net::Ipv4Addr;

use lab::{
    AGENT_PORT, Cgroup, Layout, NODE_V4, PodSpec, eventually,
    fake::imds::{INSTANCE_ID, NODE_ACCESS_KEY, NODE_ROLE},
    pod_client::{Attempt, Imds, Options, Via},
    role_arn, tells_namespaces_apart,
};

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";

fn assert_refused(attempt: &Attempt, status: u16) {
    assert_eq!((attempt.status, attempt.body.as_str()), (Some(status), ""), "{attempt:?}");
}

#[test]
fn each_pod_gets_its_own_role_by_every_way() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let cast = [
        ("orders", Layout::SystemdBurstable),
        ("team/invoices", Layout::SystemdGuaranteed),
        ("reports", Layout::CgroupfsBurstable),
    ];
    let pods = cast.map(|(role, layout)| {
        let name = role.rsplit('/').next().unwrap();
        lab.pod(PodSpec::new("shop", name).role(role).layout(layout)).unwrap()
    });
    let ways =
        [(Via::V4, Imds::V2), (Via::V4, Imds::V1), (Via::V4Mapped, Imds::V2), (Via::V6, Imds::V2)];
    for (via, imds) in ways {
        for (pod, (role, _)) in pods.iter().zip(cast) {
            let attempt = pod.ask_once(&Options { via, imds, ..Options::default() }).unwrap();
            lab.assert_role(&attempt, role);
            assert_eq!(attempt.role.as_deref(), Some(pod.spec().name.as_str()), "{via:?} {imds:?}");
        }
    }
    let other = pods[0].get(&format!("{CREDENTIALS}reports")).unwrap();
    assert_refused(&other, 403);
    lab.assert_no_packets(&pods.each_ref());
}

#[test]
fn a_pod_without_a_role_gets_404_and_the_reason() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let pod = lab.pod(PodSpec::new("shop", "scratch")).unwrap();
    let attempt = pod.credentials().unwrap();
    assert_refused(&attempt, 404);
    assert!(attempt.headers.contains_key("x-kiam-reason"), "{attempt:?}");
    assert_refused(&pod.get(CREDENTIALS).unwrap(), 404);
    assert_refused(&pod.get(&format!("{CREDENTIALS}{NODE_ROLE}")).unwrap(), 403);
    assert_refused(&pod.get("/latest/user-data").unwrap(), 404);
    assert_eq!(pod.get("/latest/meta-data/instance-id").unwrap().body, INSTANCE_ID);
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn an_address_that_another_pod_had_gives_the_new_pods_role() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let first = lab.unpublished_pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    lab.publish(&first);
    lab.assert_served(&first, "orders");
    let (v4, v6) = (first.v4(), first.v6());
    // The sandbox is gone; the API has not heard yet, as when the kubelet is slow or the watch stalls.
    drop(first);
    lab.kubernetes.stall_watches(true);
    let early = lab.schedule(PodSpec::new("data", "reports").role("reports").addresses(v4, v6));
    let mut second = lab.node.pod(early.unwrap()).unwrap();
    second.pause().unwrap();
    let unheard = second.credentials().unwrap();
    assert_ne!(lab.role_of(&unheard), Some(role_arn("orders")), "{unheard:?}");
    lab.kubernetes.stall_watches(false);
    lab.publish(&second);
    lab.assert_served(&second, "reports");
    lab.kubernetes.delete_pod("shop", "orders");
    lab.assert_served(&second, "reports");
    lab.assert_no_packets(&[&second]);
}

#[test]
fn a_pod_is_answered_before_its_address_is_published() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let pod = lab.unpublished_pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    if tells_namespaces_apart().unwrap() {
        lab.assert_served(&pod, "orders");
        lab.publish(&pod);
    } else {
        // Its address is all that says that the network namespace is the pod's.
        assert_refused(&pod.credentials().unwrap(), 403);
        lab.publish(&pod);
        eventually("its address is known", || pod.credentials().unwrap().status != Some(403));
    }
    lab.assert_served(&pod, "orders");
}

#[test]
fn a_source_address_that_is_not_the_pods_is_refused() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&["--path=node"]);
    let victim = lab.unpublished_pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let thief = lab.unpublished_pod(PodSpec::new("shop", "thief").role("reports")).unwrap();
    lab.publish(&victim);
    lab.publish(&thief);
    lab.assert_served(&thief, "reports");
    // Root in the pod can take any address that the network brings it the answers to.
    let stolen = Ipv4Addr::new(10, 77, 9, 9);
    thief.take_address(stolen).unwrap();
    let bind = Some(stolen.into());
    let attempt = thief.ask_once(&Options { bind, imds: Imds::V1, ..Options::default() }).unwrap();
    assert_refused(&attempt, 403);
    lab.assert_served(&victim, "orders");
}

#[test]
fn a_cgroup_named_like_another_pods_gives_nothing_of_it() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let victim = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let thief = lab.pod(PodSpec::new("shop", "thief").role("reports")).unwrap();
    for layout in [Layout::SystemdBurstable, Layout::CgroupfsBurstable] {
        let disguise = thief.cgroup().path().join(layout.container(victim.uid(), "c0ffee"));
        let disguise = Cgroup::create(disguise).unwrap();
        let attempt = thief.ask_in(&disguise, &Options::default()).unwrap();
        lab.assert_role(&attempt, "reports");
    }
}

#[test]
fn a_direct_connection_to_the_agent_is_refused() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    lab.assert_served(&pod, "orders");
    for imds in [Imds::V1, Imds::V2] {
        let direct = Options {
            to: Some(NODE_V4.into()),
            port: AGENT_PORT,
            imds,
            ..Options::get(&format!("{CREDENTIALS}orders"))
        };
        let attempt = pod.ask_once(&direct).unwrap();
        assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}");
        // Nobody but pods is refused a connect; the listener takes no SYN without a record.
        let direct = Options { timeout_ms: 300, ..direct };
        let attempt = lab.node.ask_once(&direct).unwrap();
        assert_eq!(attempt.error.as_deref(), Some("ETIMEDOUT"), "{attempt:?}");
    }
}

#[test]
fn the_host_and_its_pods_keep_the_nodes_role() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let spec = PodSpec::new("kube-system", "cni").role("orders").host_network();
    let pod = lab.pod(spec).unwrap();
    for attempt in [pod.credentials().unwrap(), lab.node.ask_once(&Options::default()).unwrap()] {
        assert_eq!(attempt.field("AccessKeyId").as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
        assert_eq!(attempt.role.as_deref(), Some(NODE_ROLE));
    }
}

#[test]
fn a_namespace_that_permits_other_roles_only_gets_none() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let namespace = lab::fake::kubernetes::NamespaceRecord::new("shop");
    let permitted = "arn:aws:iam::[0-9]+:role/orders";
    lab.kubernetes.apply_namespace(&namespace.annotation("iam.amazonaws.com/permitted", permitted));
    let allowed = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let forbidden = lab.pod(PodSpec::new("shop", "reports").role("orders-and-more")).unwrap();
    lab.assert_served(&allowed, "orders");
    assert_refused(&forbidden.credentials().unwrap(), 404);
    let asked = forbidden.get(&format!("{CREDENTIALS}orders-and-more")).unwrap();
    assert_refused(&asked, 403);
    assert_eq!(lab.sts.requests_for(&role_arn("orders-and-more")), 0);
}

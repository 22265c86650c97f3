//! `--credential-source=web-identity`: the real binary on loopback, with a small Kubernetes API that signs tokens and a
//! small STS that checks them, over real HTTP. The node has no credentials, and nobody is asked for any.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{io::ErrorKind, net::TcpListener, process::Command, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use lab::{
    eventually,
    fake::{
        Injected, Place,
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord, ServiceAccountRecord, Store},
        sts::Sts,
    },
    loopback::{self, LoopbackAgent, LoopbackNode, NODE_NAME},
    pod_client::wire::Reply,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const READER: &str = "arn:aws:iam::123456789012:role/team/reader";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
const OTHER_UID: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
const TOKEN_PATH: &str = "/api/v1/namespaces/shop/serviceaccounts/orders/token";

/// The node and its neighbours.
struct Fixture {
    node: LoopbackNode,
    /// Takes the place of the node's own metadata service.
    imds: TcpListener,
}

/// Of ServiceAccount `orders`, without a role of its own, on the agent's own loopback address.
fn pod() -> PodRecord {
    let plain = PodRecord::scheduled("shop", "orders-1", UID, NODE_NAME);
    PodRecord { service_account: "orders".to_owned(), ..plain }
        .running(&["127.0.0.1".parse().unwrap()])
}

/// Another pod of ServiceAccount `account`.
fn other(account: &str) -> PodRecord {
    let plain = PodRecord::scheduled("shop", "orders-2", OTHER_UID, NODE_NAME);
    PodRecord { service_account: account.to_owned(), ..plain }
        .running(&["10.0.0.2".parse().unwrap()])
}

fn account(name: &str, role: &str) -> ServiceAccountRecord {
    ServiceAccountRecord::new("shop", name).annotation("eks.amazonaws.com/role-arn", role)
}

/// [`pod`] and its ServiceAccount, which may have the role.
fn furnish(store: &Store) {
    store.apply_namespace(&NamespaceRecord::new("shop"));
    store.apply_service_account(&account("orders", READER));
    store.apply_pod(&pod());
}

fn start(prepare: impl FnOnce(&Kubernetes, &Sts)) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let kubernetes = Kubernetes::start(Place::loopback()).unwrap();
    furnish(&kubernetes);
    // Nobody's signature counts here.
    let sts = Sts::start(Place::loopback(), "nobody").unwrap();
    prepare(&kubernetes, &sts);
    let kubeconfig = folder.path().join("kubeconfig");
    kubernetes.write_kubeconfig(&kubeconfig).unwrap();
    let imds = TcpListener::bind("127.0.0.1:0").unwrap();
    start_with(&[], (folder, kubernetes, sts, imds))
}

fn start_with(
    flags: &[String],
    (folder, kubernetes, sts, imds): (TempDir, Kubernetes, Sts, TcpListener),
) -> Fixture {
    let upstream = format!("--upstream=http://{}", imds.local_addr().unwrap());
    let own = ["--credential-source=web-identity", &upstream];
    let flags: Vec<&str> = own.into_iter().chain(flags.iter().map(String::as_str)).collect();
    let agent = LoopbackAgent::start(folder, &sts.url(), None, &flags).unwrap();
    Fixture { node: LoopbackNode { agent, kubernetes, sts }, imds }
}

impl std::ops::Deref for Fixture {
    type Target = LoopbackNode;

    fn deref(&self) -> &LoopbackNode {
        &self.node
    }
}

impl Fixture {
    /// Status and body.
    fn get(&self, path: &str) -> (u16, String) {
        let Reply { status, body, .. } = loopback::get(self.agent.pods(), path).unwrap();
        (status, body)
    }

    /// Asks as the pod until the answer, or why there is none, holds `part`.
    fn eventually_answers(&self, path: &str, part: &str) {
        eventually(part, || {
            let answer = loopback::get(self.agent.pods(), path).unwrap();
            answer.body.contains(part) || answer.reason().contains(part)
        });
    }
}

/// The UIDs that tokens were asked for, in order.
fn bound(store: &Store) -> Vec<String> {
    let asked = store.seen().into_iter().filter(|seen| seen.path.ends_with("/token"));
    asked
        .map(|seen| seen.body["spec"]["boundObjectRef"]["uid"].as_str().unwrap().to_owned())
        .collect()
}

fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
}

/// An answer of the API server's.
fn status(code: u16, message: &str) -> String {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message })
        .to_string()
}

#[test]
fn a_pod_has_its_service_accounts_role_for_a_token_of_its_own_and_the_node_needs_nothing() {
    let fixture = start(|_, sts| sts.trust(READER, "system:serviceaccount:shop:orders"));
    assert_eq!(fixture.get(LIST), (200, "reader".to_owned()));
    let (status, body) = fixture.get(&format!("{LIST}reader"));
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let issued = fixture.sts.owner(body["AccessKeyId"].as_str().unwrap()).unwrap();
    assert_eq!(issued.action, "AssumeRoleWithWebIdentity");
    assert_eq!(
        (issued.role.as_str(), issued.caller.as_str()),
        (READER, "system:serviceaccount:shop:orders")
    );
    let claims = claims(&issued.fields["WebIdentityToken"]);
    assert_eq!(claims["aud"], json!(["sts.amazonaws.com"]));
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 600);
    assert_eq!(claims["kubernetes.io"]["pod"], json!({ "name": "orders-1", "uid": UID }));
    assert_eq!(fixture.sts.requests(), 1);
    assert_eq!(bound(&fixture.kubernetes), [UID]);
    assert!(fixture.metrics().contains("kiam_cluster_tokens_total{outcome=\"Issued\"} 1"));
    // Nobody has come for the node's own credentials.
    fixture.imds.set_nonblocking(true).unwrap();
    let came = fixture.imds.accept().map(|(_, peer)| peer);
    assert_eq!(came.unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn pods_of_two_service_accounts_never_share_credentials() {
    let fixture = start(|kubernetes, _| {
        kubernetes.apply_service_account(&account("ci", READER));
        kubernetes.apply_pod(&other("ci"));
    });
    eventually("both", || fixture.sts.issued().len() == 2);
    let mut callers: Vec<String> =
        fixture.sts.issued().into_iter().map(|issued| issued.caller).collect();
    callers.sort();
    assert_eq!(callers, ["system:serviceaccount:shop:ci", "system:serviceaccount:shop:orders"]);
    let body: Value = serde_json::from_str(&fixture.get(&format!("{LIST}reader")).1).unwrap();
    let owner = fixture.sts.owner(body["AccessKeyId"].as_str().unwrap()).unwrap();
    assert_eq!(owner.caller, "system:serviceaccount:shop:orders");
}

#[test]
fn the_role_follows_the_annotations() {
    let fixture = start(|_, _| ());
    assert_eq!(fixture.get(LIST), (200, "reader".to_owned()));
    let writer = "arn:aws:iam::999999999999:role/writer";
    fixture.kubernetes.apply_service_account(&account("orders", writer));
    fixture.eventually_answers(LIST, "writer");
    assert_eq!(fixture.sts.requests_for(writer), 1);
    // The pod's own comes first.
    fixture.kubernetes.apply_pod(&pod().role(READER));
    fixture.eventually_answers(LIST, "reader");
    fixture.kubernetes.apply_pod(&pod().annotation("iam.amazonaws.com/external-id", "partner"));
    fixture.eventually_answers(LIST, "STS accepts none with --credential-source=web-identity");
    fixture.kubernetes.apply_pod(&pod());
    fixture.eventually_answers(LIST, "writer");
    // What the namespace forbids is not asked for. Its watch and the ServiceAccounts' have no common order.
    let shop = NamespaceRecord::new("shop").annotation("iam.amazonaws.com/permitted", "nothing");
    fixture.kubernetes.apply_namespace(&shop);
    fixture.eventually_answers(LIST, "does not match as a whole");
    let admin = "arn:aws:iam::123456789012:role/admin";
    fixture.kubernetes.apply_service_account(&account("orders", admin));
    fixture.eventually_answers(LIST, "role/admin does not match as a whole");
    fixture.kubernetes.apply_service_account(&ServiceAccountRecord::new("shop", "orders"));
    fixture.eventually_answers(LIST, "eks.amazonaws.com/role-arn");
    assert_eq!(fixture.sts.requests_for(admin), 0);
}

#[test]
fn only_pods_that_are_there_vouch_for_a_renewal() {
    let fixture = start(|kubernetes, sts| {
        sts.set_session_length(Some(Duration::from_secs(4)));
        kubernetes.apply_pod(&other("orders"));
    });
    assert_eq!(fixture.get(LIST).0, 200);
    // The first one in turn is about to go: its tokens are refused, and the other one takes the turn.
    let gone = status(404, "pods \"orders-1\" not found");
    let refused = Injected::body(404, &gone).path(TOKEN_PATH).times(1);
    let fault = fixture.kubernetes.faults().inject(refused);
    eventually("a refusal", || fault.met() == 1);
    eventually("the other one", || bound(&fixture.kubernetes).ends_with(&[OTHER_UID.to_owned()]));
    fixture.kubernetes.delete_pod("shop", "orders-1");
    let renewals = fixture.sts.issued().len();
    eventually("a renewal", || fixture.sts.issued().len() > renewals);
    let bound = bound(&fixture.kubernetes);
    assert_eq!(bound.last().unwrap(), OTHER_UID, "{bound:?}");
}

#[test]
fn a_right_that_is_missing_is_told_with_what_grants_it() {
    let message = "serviceaccounts \"orders\" is forbidden: User \"system:serviceaccount:kube-system:kiam-agent\" \
                   cannot create resource \"serviceaccounts/token\" in API group \"\" in the namespace \"shop\"";
    let denied = status(403, message);
    let fixture = start(|kubernetes, _| {
        kubernetes.faults().inject(Injected::body(403, &denied).path(TOKEN_PATH));
    });
    let answer = loopback::get(fixture.agent.pods(), LIST).unwrap();
    assert_eq!(answer.status, 404, "{answer:?}");
    assert!(answer.reason().contains("cannot create resource"), "{answer:?}");
    assert!(answer.reason().contains("apply deploy/web-identity"), "{answer:?}");
    assert!(fixture.metrics().contains("kiam_cluster_tokens_total{outcome=\"Denied\"} 1"));
    assert_eq!(fixture.sts.requests(), 0);
}

#[test]
fn what_the_api_server_says_wrong_passes() {
    // Whoever checks where the pod is may know that later than the agent.
    let faults = [
        status(
            403,
            "serviceaccounts \"orders\" is forbidden: User \"system:node:n1\" cannot create resource \"serviceaccounts/token\" in API group \"\" in the namespace \"shop\": no relationship found between node 'n1' and this object",
        ),
        status(
            403,
            "serviceaccounts \"orders\" is forbidden: ValidatingAdmissionPolicy 'kiam-agent-tokens' with binding 'kiam-agent-tokens' denied request",
        ),
    ];
    let fixture = start(|kubernetes, _| {
        for fault in &faults {
            kubernetes.faults().inject(Injected::body(403, fault).path(TOKEN_PATH).times(1));
        }
        let empty = json!({ "status": { "token": "" } }).to_string();
        kubernetes.faults().inject(Injected::body(201, &empty).path(TOKEN_PATH).times(1));
    });
    eventually("credentials", || fixture.get(LIST) == (200, "reader".to_owned()));
    for counted in ["{outcome=\"Denied\"} 2", "{outcome=\"Failed\"} 1"] {
        assert!(fixture.metrics().contains(&format!("kiam_cluster_tokens_total{counted}")));
    }
}

#[test]
fn tokens_can_be_asked_for_as_somebody_else() {
    let folder = tempfile::tempdir().unwrap();
    let [kubernetes, as_kubelet] = [0; 2].map(|_| Kubernetes::start(Place::loopback()).unwrap());
    furnish(&kubernetes);
    furnish(&as_kubelet);
    kubernetes.write_kubeconfig(&folder.path().join("kubeconfig")).unwrap();
    let kubelets = folder.path().join("kubelet.conf");
    as_kubelet.write_kubeconfig(&kubelets).unwrap();
    let sts = Sts::start(Place::loopback(), "nobody").unwrap();
    let imds = TcpListener::bind("127.0.0.1:0").unwrap();
    let flag = format!("--token-kubeconfig={}", kubelets.display());
    let fixture = start_with(&[flag], (folder, kubernetes, sts, imds));
    assert_eq!(fixture.get(LIST), (200, "reader".to_owned()));
    assert_eq!((bound(&fixture.kubernetes), bound(&as_kubelet)), (vec![], vec![UID.to_owned()]));
    assert!(as_kubelet.seen().iter().all(|seen| seen.path == TOKEN_PATH), "nothing else");
}

#[test]
fn an_operator_has_a_mended_role_asked_for_at_once_and_hears_what_came_of_it() {
    let fixture = start(|_, sts| sts.trust(READER, "nobody"));
    fixture.eventually_answers(&format!("{LIST}reader"), "AccessDenied");
    let refresh = |pod: &str| {
        let mut command = Command::new(AGENT);
        let state = fixture.agent.folder().join("state");
        command.env_clear().args(["refresh", pod, "--state-dir"]).arg(state);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let before = fixture.sts.requests();
    let (code, said) = refresh("shop/orders-1");
    assert!(
        code == Some(1) && said.starts_with(&format!("no credentials of {READER}: ")),
        "{said}"
    );
    assert!(said.contains("AccessDenied") && said.contains("trust policy"), "{said}");
    assert_eq!(fixture.sts.requests(), before + 1);
    fixture.sts.trust(READER, "system:serviceaccount:shop:orders");
    let (code, said) = refresh("shop/orders-1");
    assert_eq!((code, said), (Some(0), format!("AWS issued credentials of {READER}\n")));
    assert_eq!(fixture.get(&format!("{LIST}reader")).0, 200);
    let (code, said) = refresh("shop/other");
    assert!(code == Some(1) && said.contains("there is no pod shop/other"), "{said}");
    // Not where others than root could ask for it.
    let asked = b"POST /refresh/shop/orders-1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = loopback::ask(fixture.agent.admin(), asked).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert_eq!(fixture.sts.requests(), before + 2);
}

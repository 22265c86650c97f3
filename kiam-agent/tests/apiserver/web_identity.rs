//! Web identity: roles for tokens that the API server signs for pods, checked with the keys that it publishes.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::Method;
use lab::fake::sts::Issued;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use serde_json::{Value, json};
use tokio::time;

use super::{
    Cluster, MINUTES, PATIENCE, User,
    agent::{Agent, BASE},
    apply, comes, eventually, pod,
    server::{Body, ISSUER},
};

const WEB_IDENTITY: &str = "--credential-source=web-identity";
const SUBJECT: &str = "system:serviceaccount:shop:orders";
const TOKENS: &str = "/api/v1/namespaces/shop/serviceaccounts/orders/token";
const PODS: &str = "/api/v1/namespaces/shop/pods";
const ORDERS: &str = "/api/v1/namespaces/shop/pods/orders-1";

/// `kubectl apply -k deploy/web-identity`; not the rules that come first: this server is older than they are.
const OWN_TOKENS: [(&str, &str); 2] = [
    deployed!("/apis/rbac.authorization.k8s.io/v1/clusterroles", "web-identity/clusterrole.yaml"),
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "web-identity/clusterrolebinding.yaml"
    ),
];

/// `kubectl apply -k deploy/web-identity/kubelet`.
const KUBELETS_TOKENS: [(&str, &str); 2] = [
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        "web-identity/kubelet/clusterroles.yaml"
    ),
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "web-identity/kubelet/clusterrolebindings.yaml"
    ),
];

impl Cluster {
    /// Has the STS of `agent` take the server's tokens, by the keys that it publishes, and the role trust one subject.
    async fn be_trusted(&self, agent: &Agent) {
        let keys = self.keys().await;
        agent.sts.set_issuer(move |token| verified(&keys, token));
        agent.sts.trust(&format!("{BASE}reader"), SUBJECT);
    }

    /// What an OIDC provider finds at the issuer's `jwks_uri`.
    async fn keys(&self) -> Value {
        let keys = self.server.ask(User::Admin, Method::GET, "/openid/v1/jwks", None).await;
        keys.unwrap()
    }

    /// Runs a pod at the agent's own address that has its role by its ServiceAccount's annotation alone.
    async fn run_account(&self) -> Value {
        let annotations = json!({"eks.amazonaws.com/role-arn": format!("{BASE}reader")});
        let account = json!({"metadata": {"name": "orders", "annotations": annotations}});
        let path = "/api/v1/namespaces/shop/serviceaccounts";
        self.server.create(path, Body::Json(&account)).await;
        let pod = pod("orders-1", "orders", "n1", None);
        let pod = self.server.create(PODS, Body::Json(&pod)).await;
        self.publish("orders-1", &["127.0.0.1".parse().unwrap()]).await;
        pod
    }

    /// What the server itself says of a token for AWS.
    async fn review(&self, token: &str) -> Value {
        let review = json!({"spec": {"token": token, "audiences": ["sts.amazonaws.com"]}});
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        self.server.create(path, Body::Json(&review)).await["status"].take()
    }

    /// The status that the agent's own ServiceAccount is answered with when it asks for a token for `pod`.
    async fn ask_for_token(&self, pod: &Value) -> u16 {
        let metadata = &pod["metadata"];
        let bound = json!({
            "apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"],
        });
        let spec = json!({"audiences": ["sts.amazonaws.com"], "boundObjectRef": bound});
        let request = json!({"spec": spec});
        let token = self.token().await;
        let answer = self.server.ask_with(&token, TOKENS, Some(&request)).await;
        answer.map_or_else(|(status, _)| status, |_| 201)
    }

    /// A flag that names a kubelet's kubeconfig, and where that is.
    fn kubelet(&self, user: User) -> (String, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = self.server.kubeconfig(&json!({"token": user.token()})).to_string();
        std::fs::write(file.path(), text).unwrap();
        (format!("--token-kubeconfig={}", file.path().display()), file)
    }
}

/// The claims of `token` where one of `keys` signed it, as IAM reads tokens of an OIDC provider.
fn verified(keys: &Value, token: &str) -> Option<Value> {
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).ok();
    let (signed, signature) = token.rsplit_once('.')?;
    let (head, claims) = signed.split_once('.')?;
    let head: Value = serde_json::from_slice(&decode(head)?).ok()?;
    let key = keys["keys"].as_array()?.iter().find(|key| key["kid"] == head["kid"])?;
    let part = |name: &str| decode(key[name].as_str()?);
    let key = RsaPublicKeyComponents { n: part("n")?, e: part("e")? };
    key.verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &decode(signature)?).ok()?;
    let claims: Value = serde_json::from_slice(&decode(claims)?).ok()?;
    (claims["iss"] == ISSUER).then_some(claims)
}

/// What STS made the pod's credentials for, once there are any.
async fn issued(agent: &Agent) -> Issued {
    comes(agent, 200, "reader").await;
    let issued = agent.issued("reader").expect("a role that is named has credentials");
    assert_eq!((&*issued.action, &*issued.caller), ("AssumeRoleWithWebIdentity", SUBJECT));
    issued
}

/// Waits until the pod is told why there are no credentials.
async fn is_told(agent: &Agent, why: &str) {
    let told =
        || agent.refusal().is_some_and(|(status, reason)| status != 200 && reason.contains(why));
    eventually(why, PATIENCE, told).await;
    assert_eq!(agent.sts.requests(), 0, "there is nothing to ask STS with");
}

#[tokio::test]
async fn a_pod_has_its_service_accounts_role_for_a_token_that_ends_with_the_pod() {
    let Some(cluster) = Cluster::start().await else { return };
    apply(&cluster.server, &OWN_TOKENS).await;
    let agent = cluster.agent(&[WEB_IDENTITY]).await;
    cluster.be_trusted(&agent).await;
    let pod = cluster.run_account().await;
    let token = issued(&agent).await.fields["WebIdentityToken"].clone();
    let review = cluster.review(&token).await;
    assert_eq!(review["authenticated"], true, "{review}");
    assert_eq!(review["user"]["username"], SUBJECT, "{review}");
    let of_pod =
        |what: &str| &review["user"]["extra"][format!("authentication.kubernetes.io/pod-{what}")];
    assert_eq!(of_pod("name"), &json!(["orders-1"]), "{review}");
    assert_eq!(of_pod("uid"), &json!([pod["metadata"]["uid"]]), "{review}");

    let another = cluster.token().await;
    let (claims, signature) =
        (token.rsplit_once('.').unwrap().0, another.rsplit_once('.').unwrap().1);
    let forged = format!("{claims}.{signature}");
    assert_eq!(verified(&cluster.keys().await, &forged), None, "another token's signature");

    assert_eq!(cluster.ask_for_token(&pod).await, 201);
    cluster.delete(User::Kubelet, ORDERS).await;
    comes(&agent, 404, "").await;
    assert_eq!(cluster.ask_for_token(&pod).await, 404);
    let successor = super::pod("orders-1", "orders", "n2", None);
    cluster.server.create(PODS, Body::Json(&successor)).await;
    assert_eq!(cluster.ask_for_token(&pod).await, 409, "another pod of that name");
    let refused = time::timeout(PATIENCE, async {
        // The server remembers for some seconds what it has said.
        while cluster.review(&token).await["authenticated"] == true {
            time::sleep(Duration::from_millis(200)).await;
        }
    });
    assert!(refused.await.is_ok(), "the pod's token is still good");
}

#[tokio::test]
async fn rights_that_are_missing_are_told_and_taken_up_when_they_come() {
    let Some(cluster) = Cluster::start().await else { return };
    let agent = Agent::start(&cluster.server, &cluster.token().await, &[WEB_IDENTITY]);
    cluster.be_trusted(&agent).await;
    cluster.run_account().await;
    eventually("a list refused", PATIENCE, || agent.said("serviceaccounts is forbidden")).await;
    assert!(!agent.is_ready(), "it does not know the ServiceAccounts");

    // Those for a kubelet's tokens, which it is not told to use.
    apply(&cluster.server, &KUBELETS_TOKENS).await;
    eventually("ready", PATIENCE, || agent.is_ready()).await;
    is_told(&agent, "apply deploy/web-identity, which grants it: 403").await;
    let event = cluster.event("CredentialError").await;
    let note = event["note"].as_str().unwrap();
    assert!(note.contains(r#"cannot create resource "serviceaccounts/token""#), "{note}");
    assert_eq!(event["regarding"]["name"], "orders-1", "{event}");
    assert!(agent.metric(r#"kiam_cluster_tokens_total{outcome="Denied"}"#) > 0.5);

    apply(&cluster.server, &OWN_TOKENS).await;
    eventually("credentials", MINUTES, || agent.role() == (200, "reader".to_owned())).await;
    issued(&agent).await;
}

#[tokio::test]
async fn a_kubelets_identity_has_tokens_for_pods_of_its_node_alone() {
    let Some(cluster) = Cluster::start().await else { return };
    apply(&cluster.server, &KUBELETS_TOKENS).await;
    let pod = cluster.run_account().await;
    {
        let (flag, _file) = cluster.kubelet(User::OtherKubelet);
        let agent = cluster.agent(&[WEB_IDENTITY, &flag]).await;
        is_told(&agent, "--token-kubeconfig is of a node without the pod: 403: ").await;
        assert!(agent.said("no relationship found between node 'n2' and this object"));
        assert!(agent.metric(r#"kiam_cluster_tokens_total{outcome="Denied"}"#) > 0.5);
    }
    let (flag, _file) = cluster.kubelet(User::Kubelet);
    let agent = cluster.agent(&[WEB_IDENTITY, &flag]).await;
    cluster.be_trusted(&agent).await;
    let token = issued(&agent).await.fields["WebIdentityToken"].clone();
    let review = cluster.review(&token).await;
    let uid = &review["user"]["extra"]["authentication.kubernetes.io/pod-uid"];
    assert_eq!(uid, &json!([pod["metadata"]["uid"]]), "{review}");
    assert_eq!(
        cluster.ask_for_token(&pod).await,
        403,
        "the agent's own identity has no such right"
    );
}

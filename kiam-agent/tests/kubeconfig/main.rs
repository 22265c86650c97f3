//! What a kubeconfig and the environment of a process may hold: proxies, and certificates that change or that rustls does
//! not take. The real binary on loopback, with real TLS and a real proxy.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use kiam_agent::{
    cluster::{Cluster, Config},
    proxy::Proxies,
};
use kiam_core::lifecycle::Readiness;
use lab::{
    eventually,
    fake::{
        Place, Proxy, TlsFront,
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord, ServiceAccountRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackAgent},
};
use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const READER: &str = "arn:aws:iam::123456789012:role/team/reader";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

fn certificate(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kubeconfig/certificates").join(name)
}

fn front(certificate_name: &str, server: SocketAddr) -> TlsFront {
    let key = certificate("server.key.pem");
    TlsFront::start(&certificate(certificate_name), &key, server).unwrap()
}

/// Writes `kubeconfig`, of the server at `url`, into `folder`; `cluster` and `user` are further fields.
fn write_kubeconfig(folder: &TempDir, url: &str, cluster: &str, user: &str) -> PathBuf {
    let path = folder.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: \"{url}\"{cluster}}}}}]\n\
         users: [{{name: lab, user: {{{user}}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
    );
    fs::write(&path, text).unwrap();
    path
}

fn authority(path: &Path) -> String {
    format!(", certificate-authority: \"{}\"", path.display())
}

/// An API server with a pod of ServiceAccount `orders`, on the agent's own loopback address.
fn kubernetes() -> Kubernetes {
    let kubernetes = Kubernetes::start(Place::loopback()).unwrap();
    kubernetes.apply_namespace(&NamespaceRecord::new("shop"));
    let account = ServiceAccountRecord::new("shop", "orders");
    kubernetes.apply_service_account(&account.annotation("eks.amazonaws.com/role-arn", READER));
    let pod = PodRecord::scheduled("shop", "orders-1", UID, "n1");
    let pod = PodRecord { service_account: "orders".to_owned(), ..pod };
    kubernetes.apply_pod(&pod.running(&["127.0.0.1".parse().unwrap()]));
    kubernetes
}

fn sts() -> Sts {
    let sts = Sts::start(Place::loopback(), "nobody").unwrap();
    sts.trust(READER, "system:serviceaccount:shop:orders");
    sts
}

fn address(url: &str) -> SocketAddr {
    url.trim_start_matches("http://").parse().unwrap()
}

fn is_served(agent: &LoopbackAgent) -> bool {
    loopback::get(agent.pods(), &format!("{LIST}reader")).unwrap().status == 200
}

fn is_ready(agent: &LoopbackAgent) -> bool {
    loopback::get(agent.admin(), "/ready").unwrap().status == 200
}

#[test]
fn the_api_server_its_tokens_and_sts_are_asked_through_the_proxy_of_the_environment() {
    let (kubernetes, sts, proxy) = (kubernetes(), sts(), Proxy::start().unwrap());
    let (api, token_api, aws) = (
        front("server-of-old-ca.pem", kubernetes.address()),
        front("server-of-old-ca.pem", kubernetes.address()),
        front("server-of-old-ca.pem", address(&sts.url())),
    );
    // Names that only the proxy knows.
    proxy.leads("kubernetes.test", api.address());
    proxy.leads("sts.test", aws.address());
    let ca = certificate("old-ca.pem");
    let tokens = tempfile::tempdir().unwrap();
    // A server of its own, so that it is seen whether it is asked.
    let url = format!("https://{}", token_api.address());
    let own_proxy = format!(", proxy-url: \"http://{}\"", proxy.address());
    proxy.leads("127.0.0.1", token_api.address());
    let tokens =
        write_kubeconfig(&tokens, &url, &(authority(&ca) + &own_proxy), "").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    write_kubeconfig(&folder, "https://kubernetes.test:6443", &authority(&ca), "");
    let through = format!("http://agent:hunter2@{}", proxy.address());
    let environment = [
        ("https_proxy", through.as_str()),
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        // kube-rs reads it too, and fails for less.
        ("NO_PROXY", "elsewhere.test,,.internal, 10.0.0.0/8,"),
        ("SSL_CERT_FILE", ca.to_str().unwrap()),
    ];
    let flags = ["--credential-source=web-identity", &format!("--token-kubeconfig={tokens}")];
    let agent =
        LoopbackAgent::start_in(Path::new(AGENT), folder, "https://sts.test", &environment, &flags);
    let agent = agent.unwrap();
    eventually("credentials", || is_served(&agent));
    let seen = proxy.seen();
    let count = |target: &str| seen.iter().filter(|request| request.target == target).count();
    assert!(seen.iter().all(|request| request.method == "CONNECT"), "{seen:?}");
    // One for each of the watches and lists at least; and one, which is kept, for STS.
    assert!(count("kubernetes.test:6443") >= 2, "{seen:?}");
    assert_eq!(count("sts.test:443"), 1, "{seen:?}");
    // What a kubeconfig says about its own server counts whatever the server is, as with kubectl.
    assert_eq!(count(&token_api.address().to_string()), 1, "{seen:?}");
    let shown: Vec<_> = seen.iter().filter_map(|request| request.authorization.clone()).collect();
    assert_eq!(shown.len(), seen.len() - 1, "{seen:?}");
    // agent:hunter2
    assert!(shown.iter().all(|shown| shown == "Basic YWdlbnQ6aHVudGVyMg=="), "{shown:?}");
    assert!(!agent.log().contains("hunter2") && !agent.log().contains("YWdlbnQ6"));
    assert!(agent.log().contains("Using a proxy for the Kubernetes API"));
}

#[test]
fn what_no_proxy_names_is_asked_itself() {
    let (kubernetes, sts, proxy) = (kubernetes(), sts(), Proxy::start().unwrap());
    let folder = tempfile::tempdir().unwrap();
    // Which is this host, but no loopback address as far as names go.
    let url = format!("http://0.0.0.0:{}", kubernetes.address().port());
    write_kubeconfig(&folder, &url, "", "");
    let through = format!("http://{}", proxy.address());
    let leaves_out = format!("0.0.0.0:{}", kubernetes.address().port());
    let environment =
        [("HTTP_PROXY", &*through), ("HTTPS_PROXY", &*through), ("no_proxy", &*leaves_out)];
    proxy.leads("0.0.0.0", address(&sts.url()));
    let sts_url = format!("http://0.0.0.0:{}", address(&sts.url()).port());
    let flags = ["--credential-source=web-identity"];
    let agent = LoopbackAgent::start_in(Path::new(AGENT), folder, &sts_url, &environment, &flags);
    let agent = agent.unwrap();
    eventually("credentials", || is_served(&agent));
    // STS, at another port of the same host.
    let seen = proxy.seen();
    assert!(!seen.is_empty(), "STS is asked through the proxy");
    assert!(seen.iter().all(|request| request.target == format!("{sts_url}/")), "{seen:?}");
}

#[test]
fn without_ca_certificates_the_agent_runs_with_an_sts_that_needs_no_tls() {
    let (kubernetes, sts) = (kubernetes(), sts());
    let api = front("server-of-old-ca.pem", kubernetes.address());
    let start = |sts: &str| {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("https://{}", api.address());
        write_kubeconfig(&folder, &url, &authority(&certificate("old-ca.pem")), "");
        let environment = [("SSL_CERT_FILE", "/no/certificates.crt")];
        let flags = ["--credential-source=web-identity"];
        LoopbackAgent::start_in(Path::new(AGENT), folder, sts, &environment, &flags)
    };
    let agent = start(&sts.url()).unwrap();
    eventually("credentials", || is_served(&agent));
    let said = start("https://sts.test").unwrap_err().to_string();
    let wanted = ["no CA certificates were found", "/no/certificates.crt", "set SSL_CERT_FILE"];
    assert!(wanted.iter().all(|words| said.contains(words)), "{said}");
}

#[test]
fn a_proxy_that_is_none_is_told_without_its_password() {
    let output = std::process::Command::new(AGENT)
        .args(["--host=127.0.0.1", "--role-base-arn=arn:aws:iam::123456789012:role/"])
        .env_clear()
        .env("HTTPS_PROXY", "http://agent:hunter2@proxy.example:none")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(
        said.starts_with("HTTPS_PROXY: \"http://…@proxy.example:…\" is not an HTTP or HTTPS proxy"),
        "{said}"
    );
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn a_ca_that_is_replaced_on_the_disk_is_used_without_a_restart() {
    let (kubernetes, sts) = (kubernetes(), sts());
    let api = front("server-of-old-ca.pem", kubernetes.address());
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    fs::copy(certificate("old-ca.pem"), &ca).unwrap();
    write_kubeconfig(&folder, &format!("https://{}", api.address()), &authority(&ca), "");
    let flags = ["--credential-source=web-identity", "--sync-interval=1s"];
    let agent = LoopbackAgent::start(folder, &sts.url(), None, &flags).unwrap();
    eventually("ready", || is_ready(&agent));
    api.replace(&certificate("server-of-new-ca.pem"), &certificate("server.key.pem")).unwrap();
    // Ends the connections that are there.
    kubernetes.restart().unwrap();
    eventually("a remedy", || agent.log().contains("was the cluster's CA replaced?"));
    let later = PodRecord::scheduled("shop", "later", "7c9e6679-7425-40de-944b-e07fc1f90ae7", "n1");
    kubernetes.apply_pod(&later);
    fs::copy(certificate("new-ca.pem"), &ca).unwrap();
    eventually("the new CA", || {
        agent.log().contains("Reloaded the credentials for the Kubernetes API")
    });
    eventually("the server", || {
        agent.log().contains("Requests to the Kubernetes API succeed again")
    });
}

#[test]
fn a_certificate_that_signs_itself_is_refused_with_what_to_do() {
    let (kubernetes, sts) = (kubernetes(), sts());
    let api = front("self-signed.pem", kubernetes.address());
    let folder = tempfile::tempdir().unwrap();
    let ca = authority(&certificate("self-signed.pem"));
    write_kubeconfig(&folder, &format!("https://{}", api.address()), &ca, "");
    let flags = ["--credential-source=web-identity"];
    let agent = LoopbackAgent::start(folder, &sts.url(), None, &flags).unwrap();
    let remedy = "sign another one with it for the server, with CA:FALSE";
    assert!(agent.log().contains(remedy), "{}", agent.log());
}

#[tokio::test]
async fn a_client_certificate_of_version_1_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let [certificate, key] = ["version-1.pem", "server.key.pem"].map(certificate);
    let user = format!(
        "client-certificate: \"{}\", client-key: \"{}\"",
        certificate.display(),
        key.display()
    );
    let kubeconfig = write_kubeconfig(&folder, "https://127.0.0.1:1", "", &user);
    let hour = Duration::from_secs(3600);
    let config = Config {
        kubeconfig: Some(kubeconfig),
        node_name: None,
        sync_interval: hour,
        stall: hour,
        startup_taint: None,
        evict_older_pods: false,
        prove_after: hour,
        proxies: Proxies::default(),
    };
    let error = Cluster::new(config, &Readiness::default()).err().unwrap().to_string();
    assert!(error.contains("of X.509 version 1, and must be of version 3"), "{error}");
}

#[test]
fn a_token_file_may_end_in_a_newline() {
    let (kubernetes, sts) = (kubernetes(), sts());
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("token"), "abc.def\r\n").unwrap();
    let url = format!("http://{}", kubernetes.address());
    write_kubeconfig(&folder, &url, "", "tokenFile: token");
    let flags = ["--credential-source=web-identity"];
    let agent = LoopbackAgent::start(folder, &sts.url(), None, &flags).unwrap();
    eventually("ready", || is_ready(&agent));
}

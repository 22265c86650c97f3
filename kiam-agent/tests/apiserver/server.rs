//! etcd and kube-apiserver as processes on loopback, and requests to them as different users.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use lab::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time;

/// Who asks. Without a controller manager and kubelets the tests do their parts, each as who would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum User {
    /// In `system:masters`.
    Admin,
    /// The kubelet of `n1`, where the agent is.
    Kubelet,
    /// The kubelet of `n2`.
    OtherKubelet,
}

/// What the body of a request is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body<'a> {
    Json(&'a Value),
    /// As `kubectl apply` sends a file; the API reads YAML too.
    Yaml(&'a str),
    /// Changes some fields.
    Merge(&'a Value),
}

/// A cluster's control plane, as far as the agent sees any of it. It ends with this value.
pub(super) struct Server {
    binaries: PathBuf,
    folder: TempDir,
    etcd: Process,
    etcd_address: SocketAddr,
    apiserver: Option<Process>,
    port: u16,
}

/// The status of an answer that is no success, and what it says.
pub(super) type Refused = (u16, String);

const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const ISSUER: &str = "https://issuer.example";

// === impl User ===

impl User {
    const ALL: [Self; 3] = [Self::Admin, Self::Kubelet, Self::OtherKubelet];

    pub(super) fn token(self) -> &'static str {
        match self {
            Self::Admin => "admin-token",
            Self::Kubelet => "kubelet-token",
            Self::OtherKubelet => "other-kubelet-token",
        }
    }

    /// A line of `--token-auth-file`: token, name, UID, groups.
    fn line(self) -> String {
        let token = self.token();
        match self {
            Self::Admin => format!("{token},admin,1,\"system:masters\"\n"),
            Self::Kubelet => format!("{token},system:node:n1,2,\"system:nodes\"\n"),
            Self::OtherKubelet => format!("{token},system:node:n2,3,\"system:nodes\"\n"),
        }
    }
}

// === impl Server ===

impl Server {
    /// Starts both, of the programs in `binaries`, and waits until the API is ready.
    pub(super) async fn start(binaries: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens: String = User::ALL.map(User::line).concat();
        fs::write(folder.path().join("tokens.csv"), tokens).unwrap();
        let etcd_address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let (clients, data) = (format!("http://{etcd_address}"), folder.path().join("etcd"));
        let mut etcd = Command::new(binaries.join("etcd"));
        etcd.arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen-client-urls={clients}"))
            .arg(format!("--advertise-client-urls={clients}"))
            .args(["--listen-peer-urls=http://127.0.0.1:0", "--unsafe-no-fsync"]);
        let etcd = spawn(&mut etcd, &folder, "etcd");
        let (binaries, port) = (binaries.to_owned(), free_port());
        let mut server = Self { binaries, folder, etcd, etcd_address, apiserver: None, port };
        server.resume().await;
        server
    }

    /// Starts the API server, again after [`Self::kill`], over what etcd has.
    pub(super) async fn resume(&mut self) {
        let folder = self.folder.path();
        let key = self.binaries.join("service-account.key");
        let mut apiserver = Command::new(self.binaries.join("kube-apiserver"));
        apiserver
            .args(["--bind-address=127.0.0.1", "--insecure-port=0", "--anonymous-auth=false"])
            // Every cluster's, for agents of the node such as this one.
            .arg("--allow-privileged=true")
            .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
            // As is the default from 1.21 on: pods' own tokens are bound to them.
            .arg("--feature-gates=BoundServiceAccountTokenVolume=true")
            .args(["--service-cluster-ip-range=10.96.0.0/24", "--etcd-compaction-interval=0"])
            .arg(format!("--secure-port={}", self.port))
            .arg(format!("--cert-dir={}", folder.join("certs").display()))
            .arg(format!("--etcd-servers=http://{}", self.etcd_address))
            .arg(format!("--token-auth-file={}", folder.join("tokens.csv").display()))
            .args([
                format!("--service-account-issuer={ISSUER}"),
                format!("--api-audiences={ISSUER}"),
            ])
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!("--service-account-signing-key-file={}", key.display()));
        self.apiserver = Some(spawn(&mut apiserver, &self.folder, "kube-apiserver"));
        let ready = async {
            while !self.is_ready().await {
                time::sleep(Duration::from_millis(100)).await;
            }
        };
        let ready = time::timeout(PATIENCE, ready).await;
        assert!(ready.is_ok(), "kube-apiserver is not ready");
    }

    async fn is_ready(&self) -> bool {
        // The certificate is made at the first start.
        self.certificate().exists()
            && self.text(User::Admin, Method::GET, "/readyz", None).await.is_ok()
    }

    /// `kill -9` of the API server; etcd keeps what there is.
    pub(super) fn kill(&mut self) {
        self.apiserver.take().unwrap().kill().unwrap();
    }

    /// Has etcd hang, or go on.
    pub(super) fn freeze_etcd(&self, freeze: bool) {
        if freeze { self.etcd.freeze() } else { self.etcd.thaw() }.unwrap();
    }

    /// Makes etcd forget all versions but the newest.
    pub(super) fn compact(&self) {
        let status = self.etcd("/v3/maintenance/status", &json!({}));
        let revision = status["header"]["revision"].as_str().unwrap().to_owned();
        self.etcd("/v3/kv/compaction", &json!({"revision": revision, "physical": true}));
    }

    fn etcd(&self, path: &str, body: &Value) -> Value {
        let body = body.to_string();
        let mut stream = TcpStream::connect(self.etcd_address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(" 200 OK\r\n"), "{path}: {answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// Sends a request and reads the object that it is answered with.
    pub(super) async fn ask(
        &self,
        user: User,
        method: Method,
        path: &str,
        body: Option<Body<'_>>,
    ) -> Result<Value, Refused> {
        self.text(user, method, path, body).await.map(|text| serde_json::from_str(&text).unwrap())
    }

    /// As the user whose token it is: GETs, or POSTs `body`.
    pub(super) async fn ask_with(
        &self,
        token: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<String, Refused> {
        let auth = json!({"token": token});
        let method = if body.is_some() { Method::POST } else { Method::GET };
        send(&self.client(&auth).await, method, path, body.map(Body::Json)).await
    }

    /// POSTs as the administrator.
    pub(super) async fn create(&self, path: &str, body: Body<'_>) -> Value {
        let created = self.ask(User::Admin, Method::POST, path, Some(body)).await;
        created.unwrap_or_else(|refused| panic!("{path}: {refused:?}"))
    }

    /// A token of a service account for the API itself, bound to a pod so that it ends with it.
    pub(super) async fn token(&self, namespace: &str, account: &str, pod: &Value) -> String {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let bound = json!({
            "kind": "Pod", "apiVersion": "v1",
            "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"],
        });
        let request = json!({"spec": {"expirationSeconds": 3600, "boundObjectRef": bound}});
        let answer = self.create(&path, Body::Json(&request)).await;
        answer["status"]["token"].as_str().unwrap().to_owned()
    }

    async fn text(
        &self,
        user: User,
        method: Method,
        path: &str,
        body: Option<Body<'_>>,
    ) -> Result<String, Refused> {
        let auth = json!({"token": user.token()});
        send(&self.client(&auth).await, method, path, body).await
    }

    async fn client(&self, auth: &Value) -> kube::Client {
        let file: Kubeconfig = serde_json::from_value(self.kubeconfig(auth)).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = kube::Config::from_custom_kubeconfig(file, &options).await.unwrap();
        config.read_timeout = Some(PATIENCE);
        config.try_into().unwrap()
    }

    /// A kubeconfig for somebody who shows `auth`, a kubeconfig's `user`.
    pub(super) fn kubeconfig(&self, auth: &Value) -> Value {
        let server = format!("https://127.0.0.1:{}", self.port);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{
                "name": "c",
                "cluster": {"server": server, "certificate-authority": self.certificate()},
            }],
            "users": [{"name": "u", "user": auth}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    fn certificate(&self) -> PathBuf {
        self.folder.path().join("certs/apiserver.crt")
    }
}

async fn send(
    client: &kube::Client,
    method: Method,
    path: &str,
    body: Option<Body<'_>>,
) -> Result<String, Refused> {
    let request = Request::builder().method(method).uri(path);
    let request = match body {
        None => request.body(Vec::new()),
        Some(Body::Json(value)) => {
            request.header("content-type", "application/json").body(value.to_string().into_bytes())
        }
        Some(Body::Yaml(text)) => {
            request.header("content-type", "application/yaml").body(text.as_bytes().to_vec())
        }
        Some(Body::Merge(value)) => request
            .header("content-type", "application/merge-patch+json")
            .body(value.to_string().into_bytes()),
    };
    client.request_text(request.unwrap()).await.map_err(|error| match error {
        kube::Error::Api(status) => (status.code, status.message.clone()),
        error => (0, error.to_string()),
    })
}

fn spawn(command: &mut Command, folder: &TempDir, name: &'static str) -> Process {
    let log = folder.path().join(format!("{name}.log"));
    Process::start(name, command.current_dir(folder.path()).env_clear(), log).unwrap()
}

/// A port that was free a moment ago: neither program can be told to take any and say which.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

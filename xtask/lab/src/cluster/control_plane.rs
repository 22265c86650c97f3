//! etcd, the API server, the controllers and the scheduler, as processes of this machine.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use lab::NODE_NAME;
use serde_json::{Value, json};

use super::{
    kubectl::Kubectl,
    stage::{OUTSIDE, wait},
};

const ADMIN: &str = "admin-token";
const KUBELET: &str = "kubelet-token";
/// Of the Service `kubernetes`. The API server listens at it, so that the node needs no kube-proxy.
pub(super) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Who asked for what, and what came of it.
const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata}]\n\
    omitStages: [RequestReceived]\n";

/// The processes, which end with the process namespace.
#[derive(Debug)]
pub(super) struct ControlPlane {
    programs: PathBuf,
    folder: PathBuf,
    processes: Vec<(&'static str, Child)>,
}

// === impl ControlPlane ===

impl ControlPlane {
    /// Starts all of it, of the programs in a folder, and waits until the API is there.
    pub(super) fn start(programs: &Path, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).context("making a folder for the control plane")?;
        let tokens = format!(
            "{ADMIN},admin,1,\"system:masters\"\n\
             {KUBELET},system:node:{NODE_NAME},2,\"system:nodes\"\n"
        );
        fs::write(folder.join("tokens.csv"), tokens).context("writing tokens")?;
        fs::write(folder.join("audit.yaml"), AUDIT_POLICY).context("writing a policy")?;
        let (programs, folder) = (programs.to_owned(), folder.to_owned());
        let mut plane = Self { programs, folder, processes: Vec::new() };
        plane.etcd()?;
        plane.api_server()?;
        let certificate = plane.folder.join("certs/apiserver.crt");
        wait("the API server's certificate", || {
            (!certificate.exists()).then(|| "it is not made".to_owned())
        })?;
        let config = plane.folder.join("admin.kubeconfig");
        fs::write(&config, plane.kubeconfig(ADMIN)?.to_string()).context("writing kubeconfig")?;
        let kubectl = plane.kubectl();
        // The controllers give up where the API is not ready soon.
        wait("the API", || {
            kubectl.run("get --raw=/readyz").err().map(|error| format!("{error:#}"))
        })?;
        plane.controllers(&config)?;
        Ok(plane)
    }

    /// The administrator's.
    pub(super) fn kubectl(&self) -> Kubectl {
        let config = self.folder.join("admin.kubeconfig");
        Kubectl { program: self.programs.join("kubectl"), config }
    }

    /// What the node's kubelet reaches the API with.
    pub(super) fn kubelet_config(&self) -> Result<Value> {
        self.kubeconfig(KUBELET)
    }

    /// The requests that the API server has answered, one JSON object a line.
    pub(super) fn audit_log(&self) -> Result<String> {
        fs::read_to_string(self.folder.join("audit.log")).context("reading the audit log")
    }

    /// Fails if one of the processes has ended.
    pub(super) fn ensure_runs(&mut self) -> Result<()> {
        for (name, child) in &mut self.processes {
            if let Some(status) = child.try_wait().context("asking after a process")? {
                bail!("{name} ended with {status}: see {name}.log in {}", self.folder.display());
            }
        }
        Ok(())
    }

    fn etcd(&mut self) -> Result<()> {
        let data = self.folder.join("etcd").display().to_string();
        self.spawn(
            "etcd",
            &[
                format!("--data-dir={data}"),
                "--listen-client-urls=http://127.0.0.1:2379".into(),
                "--advertise-client-urls=http://127.0.0.1:2379".into(),
                "--listen-peer-urls=http://127.0.0.1:0".into(),
                "--unsafe-no-fsync".into(),
            ],
        )
    }

    fn api_server(&mut self) -> Result<()> {
        let file = |name: &str| self.folder.join(name).display().to_string();
        let key = self.key();
        self.spawn(
            "kube-apiserver",
            &[
                "--etcd-servers=http://127.0.0.1:2379".into(),
                format!("--advertise-address={OUTSIDE}"),
                "--secure-port=443".into(),
                "--insecure-port=0".into(),
                "--service-cluster-ip-range=10.96.0.0/24".into(),
                "--allow-privileged=true".into(),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                // As is the default from 1.21 on: pods' own tokens are bound to them.
                "--feature-gates=BoundServiceAccountTokenVolume=true".into(),
                "--kubelet-preferred-address-types=InternalIP".into(),
                format!("--cert-dir={}", file("certs")),
                format!("--token-auth-file={}", file("tokens.csv")),
                format!("--audit-policy-file={}", file("audit.yaml")),
                format!("--audit-log-path={}", file("audit.log")),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-key-file={key}"),
                format!("--service-account-signing-key-file={key}"),
            ],
        )
    }

    fn controllers(&mut self, config: &Path) -> Result<()> {
        let config = format!("--kubeconfig={}", config.display());
        let rest = [config, "--leader-elect=false".into(), "--secure-port=0".into()];
        let certificate = self.folder.join("certs/apiserver.crt");
        let mut manager = rest.to_vec();
        manager.push(format!("--service-account-private-key-file={}", self.key()));
        manager.push(format!("--root-ca-file={}", certificate.display()));
        self.spawn("kube-controller-manager", &manager)?;
        self.spawn("kube-scheduler", &rest)
    }

    fn key(&self) -> String {
        self.programs.join("service-account.key").display().to_string()
    }

    fn kubeconfig(&self, token: &str) -> Result<Value> {
        let certificate = fs::read(self.folder.join("certs/apiserver.crt"));
        let certificate = STANDARD.encode(certificate.context("reading a certificate")?);
        Ok(json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{
                "name": "c",
                "cluster": {
                    "server": format!("https://{OUTSIDE}:443"),
                    "certificate-authority-data": certificate,
                },
            }],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }))
    }

    fn spawn(&mut self, name: &'static str, arguments: &[String]) -> Result<()> {
        let log = File::create(self.folder.join(format!("{name}.log"))).context("making a log")?;
        let mut command = Command::new(self.programs.join(name));
        command.args(arguments).current_dir(&self.folder).env_clear().stdin(Stdio::null());
        command.stderr(log.try_clone().context("sharing a log")?).stdout(log);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        self.processes.push((name, child));
        Ok(())
    }
}

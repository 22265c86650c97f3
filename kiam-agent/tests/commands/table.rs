//! What runs each command of the documents.

/// A command, and what runs it.
pub(super) struct Row {
    /// As the page has it, without comments; one that ends in `…` only begins so.
    pub(super) command: &'static str,
    pub(super) run: Run,
}

/// What runs a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// The test of `main.rs` that plays this scene.
    Here(Scene),
    /// A step or test that runs it, or does what it does: this text of this source, by its path from the root.
    By(&'static str, &'static str),
    /// Nothing: every page that has it says so, and why.
    Nothing,
}

/// What stands for the reader's surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scene {
    /// This machine.
    Machine,
    /// A copy of `deploy/`.
    Checkout,
    /// A node on which an agent runs.
    Agent,
    /// A pod of that node.
    Pod,
    /// A node that the boot guard guards.
    Guarded,
}

use Run::{By, Here, Nothing};
use Scene::{Agent, Checkout, Guarded, Machine, Pod};

const fn row(command: &'static str, run: Run) -> Row {
    Row { command, run }
}

const STEPS: &str = "xtask/src/tasks/test.rs";
const DEMO: &str = "kiam-agent/tests/demo.rs";
const IMAGE: &str = "xtask/src/tasks/image/test.rs";
const CLUSTER: &str = "xtask/lab/src/cluster/rows.rs";
const REMOVAL: &str = "xtask/lab/src/cluster/life.rs";
const EXPLAIN: &str = "kiam-agent/src/explain/mod.rs";
const CTL: &str = "kiam-agent/tests/ctl/stage.rs";
const KERNELS: &str = "name: \"other kernels\"";
const ROLLOUT: &str = "rollout status daemonset/kiam-agent --namespace=kube-system";

/// All of them, in the order of the pages.
pub(super) const ROWS: &[Row] = &[
    // Of the repository.
    row("cargo xtask build-ebpf", By(STEPS, "build::ebpf()")),
    row(
        "cargo build --release -p kiam-agent",
        By("xtask/src/tasks/image/mod.rs", "\"build\", \"--release\""),
    ),
    row("cargo xtask demo", By(DEMO, "fn readme_shows_what_the_demo_prints")),
    row("cargo xtask demo --rootless", By(DEMO, "fn the_demo_without_root_needs_none")),
    row("cargo xtask tidy", By(STEPS, "tidy::run()")),
    row("cargo xtask test", By(".ci/run", "cargo xtask test --no-skip")),
    row("cargo xtask test hostile", By(STEPS, "name: \"hostile neighbours\"")),
    row("cargo xtask test kernel-load", By(STEPS, "name: \"kernels load\"")),
    row("cargo xtask test kernels", By(STEPS, KERNELS)),
    row("cargo xtask test kernels --checks demo,tests", By(STEPS, KERNELS)),
    row("cargo xtask test kernels --only 5.10", By(STEPS, KERNELS)),
    row("cargo xtask test kernels --checks tests --tests matrix,takeover", By(STEPS, KERNELS)),
    row(
        "cargo test -p kiam-agent --test matrix -- --nocapture",
        By("kiam-agent/tests/matrix/main.rs", "fn nothing_gets_past_from_a_pod"),
    ),
    // Each writes the page that it stands in.
    row(
        "cargo xtask bench path --rounds=30 --requests=300 --rules=0,1,10000,50000 --client-processor=0 --agent-processor=0",
        By("xtask/lab/src/bench/path.rs", "cargo xtask bench path --rounds={}"),
    ),
    row(
        "cargo xtask bench agent --page --rounds=5 --seconds=2",
        By("xtask/lab/src/bench/agent/mod.rs", "cargo xtask bench agent --page"),
    ),
    row(
        "cargo xtask bench restart --rounds=20 --pods=30 --sts-ms=50",
        By("xtask/lab/src/bench/restart.rs", "cargo xtask bench restart --rounds={}"),
    ),
    row(
        "cargo xtask bench programs --rounds=10 --repeat=5000",
        By("xtask/lab/src/bench/programs.rs", "cargo xtask bench programs --rounds={}"),
    ),
    row(
        "cargo xtask simulate scale --seed=1 --nodes=5000",
        By("xtask/simulation/src/document.rs", "cargo xtask simulate scale --seed={seed}"),
    ),
    // The image.
    row("cargo xtask image", By(IMAGE, "\"xtask\", \"--\", \"image\"")),
    row("cargo xtask image --arch amd64", By(IMAGE, "\"xtask\", \"--\", \"image\"")),
    row(
        "skopeo copy docker-archive:target/image/kiam-agent-0.1.0-amd64.tar docker://REGISTRY/kiam-agent:0.1.0",
        Nothing,
    ),
    row("skopeo copy --all oci:target/image/oci:0.1.0 docker://REGISTRY/kiam-agent:0.1.0", Nothing),
    row("docker build -f deploy/Dockerfile…", Nothing),
    row("docker run --rm kiam-agent:0.1.0 boot-guard user-data > kiam-boot-guard.sh", Nothing),
    // Helm. A test below has Helm's own code render what these install.
    row("helm install kiam-agent deploy/chart…", Nothing),
    row("helm upgrade kiam-agent deploy/chart…", Nothing),
    row("helm uninstall kiam-agent --namespace kube-system", Nothing),
    // The agent in a cluster.
    row("sed -i 's|image: kiam-agent|image: REGISTRY/kiam-agent|'…", Here(Checkout)),
    row("kubectl apply -k deploy/", By(CLUSTER, "apply --kustomize={folder}")),
    row("kubectl -n kube-system rollout status daemonset/kiam-agent", By(CLUSTER, ROLLOUT)),
    row(
        "kubectl -n kube-system get pods -l app.kubernetes.io/name=kiam-agent -o wide",
        By(CLUSTER, "pods {AGENT}"),
    ),
    row("kubectl -n kube-system get pods -l app.kubernetes.io/name=kiam-agent…", Nothing),
    row("kubectl -n kube-system logs -l app.kubernetes.io/name=kiam-agent…", Nothing),
    row("kubectl annotate namespace shop…", Nothing),
    row("kubectl -n shop run aws -it…", Nothing),
    row("kubectl delete -k deploy/", By(REMOVAL, "delete --kustomize={folder}")),
    row("kubectl apply -k deploy/uninstall/", By(REMOVAL, "apply --kustomize={removal}")),
    row(
        "kubectl -n kube-system rollout status daemonset/kiam-uninstall",
        By(REMOVAL, "rollout status daemonset/kiam-uninstall --namespace=kube-system"),
    ),
    row("kubectl delete -k deploy/uninstall/", By(REMOVAL, "delete --kustomize={removal}")),
    row("kubectl delete --ignore-not-found -k…", Nothing),
    // Parts of `deploy/`, and what goes with them.
    row("kubectl apply -k deploy/startup-taint/rules/", Nothing),
    row("kubectl auth can-i patch nodes…", Nothing),
    row("kubectl get validatingadmissionpolicybinding kiam-agent-nodes", Nothing),
    row(
        "kubectl apply -k deploy/startup-taint/",
        By("kiam-agent/tests/apiserver/taint.rs", "startup-taint/clusterrole.yaml"),
    ),
    row("kubectl taint node NODE kiam.example.com/agent-not-ready:NoSchedule-", Nothing),
    row(
        "kubectl apply -k deploy/evict-older-pods/",
        By("kiam-agent/tests/apiserver/chart.rs", "\"evictOlderPods\": true"),
    ),
    row("kubectl apply -k deploy/monitoring/", Nothing),
    row(
        "sed '1,/^spec:/d' deploy/monitoring/prometheusrule.yaml > rules.yaml",
        By("kiam-agent/tests/alerts/main.rs", "sed '1,/^spec:/d'"),
    ),
    row("kubectl get --raw /.well-known/openid-configuration", Nothing),
    row("kubectl get --raw /openid/v1/jwks", Nothing),
    row("kubectl apply -k deploy/web-identity/rules/", Nothing),
    row(
        "kubectl apply -k deploy/web-identity/",
        By("kiam-agent/tests/apiserver/web_identity.rs", "web-identity/clusterrole.yaml"),
    ),
    row("kubectl -n kube-system create token default…", Nothing),
    row("kubectl -n kube-system set env daemonset/kiam-agent…", Nothing),
    row(
        "kubectl apply -k deploy/web-identity/kubelet/",
        By("kiam-agent/tests/apiserver/web_identity.rs", "web-identity/kubelet/clusterroles.yaml"),
    ),
    row("kubectl -n kube-system patch daemonset kiam-agent --type=json…", Nothing),
    row("kubectl -n shop annotate serviceaccount orders…", Nothing),
    // From one agent to another.
    row(
        "kiam-agent migrate old.yaml",
        By("kiam-agent/tests/migrate/documents.rs", "fn the_page_shows_what_the_program_prints"),
    ),
    row("helm get manifest -n kube-system kiam | kiam-agent migrate…", Nothing),
    row("kubectl get daemonsets,deployments,namespaces,pods -A -o yaml…", Nothing),
    row(
        "kiam-agent migrate --kubeconfig=$HOME/.kube/config --output=helm",
        By("kiam-agent/tests/migrate/cluster.rs", "--kubeconfig"),
    ),
    row(
        "kubectl drain NODE --ignore-daemonsets --delete-emptydir-data",
        By(CLUSTER, "drain {NODE_NAME} --ignore-daemonsets --delete-emptydir-data"),
    ),
    row("kubectl label node NODE kiam.example.com/agent=ebpf", Nothing),
    row("kubectl uncordon NODE", By(CLUSTER, "uncordon {NODE_NAME}")),
    row("kubectl label --overwrite node NODE kiam.example.com/agent=back", Nothing),
    row("kubectl label nodes --all kiam.example.com/agent-", Nothing),
    // What operators ask.
    row(
        "kubectl exec -n kube-system kiam-agent-x7k2p -- kiam-agent explain shop/orders",
        By(EXPLAIN, "fn the_page_shows_what_explain_prints"),
    ),
    row(
        "kiam-agent preflight --host=10.0.0.1…",
        By("kiam-agent/tests/preflight/page.rs", "fn installing_page_shows_what_preflight_prints"),
    ),
    row(
        "jq --slurpfile event event.json…",
        By(
            "kiam-agent/tests/audit/join.rs",
            "fn an_access_key_id_of_cloudtrail_leads_to_the_process",
        ),
    ),
    row("kubectl logs --namespace=kube-system kiam-agent-abcde…", Nothing),
    // From the laptop.
    row(
        "cargo build --release -p kiam-agent --bin kubectl-kiam",
        By(CTL, "CARGO_BIN_EXE_kubectl-kiam"),
    ),
    row("cp target/release/kubectl-kiam…", Nothing),
    row("kubectl kiam status", By("kiam-agent/tests/ctl/nodes.rs", "&[\"status\"")),
    row("kubectl apply -k deploy/ctl/", By("xtask/tests/chart/parts.rs", "&[\"ctl\"]")),
    row("kubectl create clusterrolebinding kiam-ctl…", Nothing),
    row("kubectl create rolebinding kiam-ctl…", Nothing),
    row(
        "kiam-agent status",
        By("kiam-agent/tests/app.rs", "fn operators_see_the_state_of_the_node"),
    ),
    row("kiam-agent explain shop/order", By(EXPLAIN, "fn the_page_shows_what_explain_prints")),
    row("curl --unix-socket /run/kiam/admin.sock…", Here(Agent)),
    row("TOKEN=$(curl -sX PUT…", Here(Pod)),
    row("curl -si -H \"X-aws-ec2-metadata-token: $TOKEN\"…", Here(Pod)),
    row("uname -r", Here(Machine)),
    row("stat -fc %T /sys/fs/cgroup", Here(Machine)),
    row("findmnt -n -o FSTYPE /sys/fs/bpf", Here(Machine)),
    row("systemctl disable kiam-boot-guard.service", Nothing),
    row("rm -f /etc/systemd/system/kiam-boot-guard.*", Here(Guarded)),
    row("ip -4 rule flush protocol 107", Here(Guarded)),
    row("ip -6 rule flush protocol 107", Here(Guarded)),
    // AWS.
    row("aws ec2 modify-instance-metadata-options…", Nothing),
    row("ISSUER=$(aws eks describe-cluster…", Nothing),
    row("aws iam create-open-id-connect-provider…", Nothing),
    row("aws iam add-client-id-to-open-id-connect-provider…", Nothing),
];

//! What others than the operator write into a cluster: it must not count as the installation, break out of the report, or
//! fill the memory. Secrets stay where they are.

use std::{fs, process::Command};

use serde_json::{Value, json};

use super::{error, flags, printed};

/// Characters that end a line for one parser or another, and some that turn or hide what a terminal shows.
const HOSTILE: &str =
    "\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}\u{85}\u{2028}\u{2029}\u{202e}\u{2066}\u{200b}\u{1b}";

/// A workload of one container.
fn workload(kind: &str, namespace: &str, name: &str, container: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": {"spec": {"hostNetwork": true, "containers": [container]}}},
    })
}

fn kiam_agent(image: &str, args: &[&str]) -> Value {
    let container =
        json!({"name": "a", "image": image, "command": ["/kiam", "agent"], "args": args});
    workload("DaemonSet", "kube-system", "kiam-agent", container)
}

fn kiam_server() -> Value {
    let args = ["--bind=0.0.0.0:443", "--role-base-arn=arn:aws:iam::123456789012:role/"];
    let container = json!({
        "name": "a", "image": "quay.io/uswitch/kiam:v3.6", "command": ["/kiam", "server"], "args": args,
    });
    workload("Deployment", "kube-system", "kiam-server", container)
}

fn kube2iam(args: &[&str]) -> Value {
    let container = json!({"name": "a", "image": "jtblin/kube2iam:0.10.9", "args": args});
    workload("DaemonSet", "kube-system", "kube2iam", container)
}

fn namespace(name: &str, annotations: Value) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "annotations": annotations}})
}

fn pod(namespace: &str, name: &str, role: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": {"iam.amazonaws.com/role": role}},
        "spec": {"containers": [{"name": "a", "image": "x"}]},
    })
}

/// A file with `objects`.
struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn new(objects: &[Value]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let list = json!({"kind": "List", "items": objects});
        fs::write(folder.path().join("list.json"), list.to_string()).unwrap();
        Self { folder }
    }

    fn path(&self) -> String {
        self.folder.path().join("list.json").display().to_string()
    }

    fn print(&self, words: &[&str]) -> String {
        let path = self.path();
        printed(&[&[path.as_str()], words].concat()).0
    }

    fn error(&self, words: &[&str]) -> String {
        let path = self.path();
        error(&[&[path.as_str()], words].concat(), 1)
    }
}

const KIAM: &str = "quay.io/uswitch/kiam:v3.6";

#[test]
fn a_tenants_workload_is_no_part_of_the_installation() {
    let tenant = json!({
        "name": "a", "image": "busybox", "command": ["kiam"],
        "args": ["--role-base-arn=arn:aws:iam::666666666666:role/", "--allow-ip-query"],
    });
    let agent = kiam_agent(KIAM, &["--iptables", "--port=8181"]);
    let own = [agent, kiam_server()];
    let with = |other: Value| File::new(&[&own[..], &[other]].concat());
    let file = with(workload("Deployment", "tenant", "x", tenant.clone()));
    let message = file.error(&[]);
    for part in [
        "DaemonSet kube-system/kiam-agent (",
        "Deployment kube-system/kiam-server (",
        "Deployment tenant/x (",
        "--namespace",
        "--name=NAMESPACE/NAME",
    ] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    for words in [
        &["--namespace=kube-system", "--output=flags"][..],
        &["--name=kube-system/kiam-agent,kube-system/kiam-server", "--output=flags"],
    ] {
        let text = file.print(words);
        assert!(text.contains("# kiam v3, ") && !text.contains("666666666666"), "{text}");
        assert!(flags(&text).contains(&"--namespace-policy=required"), "{text}");
    }
    // Even by the names of the real ones.
    let words = ["--name=kiam-agent,kiam-server"];
    let message =
        with(workload("Deployment", "tenant", "kiam-server", tenant.clone())).error(&words);
    assert!(message.contains("are of several namespaces"), "{message}");
    // v1's program beside v3's, in one namespace.
    let message = with(workload("Deployment", "kube-system", "x", tenant.clone())).error(&[]);
    assert!(
        message.contains("Deployment kube-system/x (") && message.contains("is kiam v1"),
        "{message}"
    );
    // A bare pod is none.
    let bare = |namespace: &str| json!({"kind": "Pod", "metadata": {"name": "x", "namespace": namespace}, "spec": {"containers": [tenant]}});
    for namespace in ["tenant", "kube-system"] {
        let text = with(bare(namespace)).print(&["--output=flags"]);
        assert!(text.contains("# kiam v3, ") && !text.contains("666666666666"), "{text}");
    }
    let message = File::new(&[bare("kube-system")]).error(&[]);
    assert!(message.contains("no container of kiam or kube2iam"), "{message}");
}

/// Lines as any parser of YAML or terminal may see them.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split([
        '\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}',
        '\u{2029}',
    ])
    .filter(|line| !line.is_empty())
}

/// A text that would be a setting of its own, if it got out of its comment, and a command of a shell.
fn evil() -> String {
    format!("x{HOSTILE}namespacePolicy: optional # '; touch ran")
}

fn flag(name: &str) -> String {
    format!("--{name}={}", evil())
}

/// kiam with the text in every place of its manifests.
fn hostile_kiam() -> Vec<Value> {
    let evil = evil();
    let names = [
        "whitelist-route-regexp",
        "level",
        "host-interface",
        "metadata-addr",
        "region",
        "statsd",
        "statsd-prefix",
        "session",
        "prometheus-listen-addr",
        "unknown",
        "port",
        "assume-role-arn",
    ];
    let arguments: Vec<String> =
        names.into_iter().map(flag).chain([evil.clone(), "--iptables".to_owned()]).collect();
    let container = json!({
        "name": evil, "image": format!("quay.io/uswitch/kiam:v3{evil}"), "command": ["/kiam", "agent"],
        "args": arguments,
        "env": [
            {"name": evil, "value": evil}, {"name": "AWS_REGION", "value": evil},
            {"name": "HTTPS_PROXY", "value": evil},
            {"name": "NO_PROXY", "valueFrom": {"secretKeyRef": {"name": evil, "key": evil}}},
        ],
        "envFrom": [{"secretRef": {"name": evil}}],
        "livenessProbe": {"exec": {"command": [evil]}},
    });
    let mut server = kiam_server();
    server["spec"]["template"]["spec"]["containers"][0]["args"][1] = json!(flag("role-base-arn"));
    server["spec"]["template"]["spec"]["containers"][0]["env"] = json!([
        {"name": "AWS_REGION", "value": evil}, {"name": "HTTPS_PROXY", "value": evil},
        {"name": "NO_PROXY", "valueFrom": {"secretKeyRef": {"name": evil, "key": evil}}},
    ]);
    server["metadata"]["name"] = json!(evil);
    let script = format!("iptables 169.254.169.254 {evil}");
    let mut agent = workload("DaemonSet", "kube-system", &evil, container);
    agent["spec"]["template"]["spec"]["initContainers"] =
        json!([{"name": format!("i{evil}"), "command": ["sh", "-c", script]}]);
    vec![agent, server]
}

/// kube2iam with the text in its flags.
fn hostile_kube2iam() -> Vec<Value> {
    let names = [
        "host-interface",
        "default-role",
        "iam-role-key",
        "log-level",
        "base-role-arn",
        "iam-role-session-ttl",
        "host-ip",
        "eks-cluster-arn",
    ];
    let flags = names.map(flag);
    let mut args: Vec<&str> = flags.iter().map(String::as_str).collect();
    args.extend(["--iptables", "--iam-enable-pod-identity-tags"]);
    vec![kube2iam(&args)]
}

/// Namespaces and pods with the text in every place.
fn hostile_tenants() -> Vec<Value> {
    let evil = evil();
    let evil = evil.as_str();
    let annotations =
        json!({"iam.amazonaws.com/permitted": evil, "iam.amazonaws.com/allowed-roles": evil});
    let mut account = pod("shop", "a", "");
    account["spec"]["serviceAccountName"] = json!(evil);
    vec![
        namespace("shop", annotations.clone()),
        namespace(evil, annotations),
        namespace("silent", json!({})),
        pod("shop", evil, evil),
        pod(evil, evil, "reader"),
        pod("silent", evil, evil),
        pod("silent", "b", &format!("arn:aws:iam::123456789012:role/{evil}")),
        account,
    ]
}

/// The forms of the output, and how their own lines begin.
const FORMS: [(&str, &[&str]); 3] = [
    (
        "helm",
        &[
            "roleBaseArn:",
            "namespacePolicy: ",
            "mode:",
            "metrics:",
            "  enabled:",
            "  port:",
            "logLevel:",
            "region:",
            "jsonLog:",
            "extraArgs:",
            "extraEnv:",
            "- ",
        ],
    ),
    (
        "kustomize",
        &[
            "apiVersion:",
            "kind:",
            "resources:",
            "patches:",
            "- target:",
            "  patch:",
            "    - op:",
            "      path:",
            "      value:",
            "      - --",
        ],
    ),
    ("flags", &["--"]),
];

#[test]
fn no_text_of_others_gets_out_of_its_comment() {
    for own in [hostile_kiam(), hostile_kube2iam(), vec![kube2iam_with_node_role()]] {
        let file = File::new(&[own, hostile_tenants()].concat());
        for (form, ours) in FORMS {
            let text = file.print(&[&format!("--output={form}")]);
            let (arguments, report) = text.split_at(text.find("#\n").unwrap());
            for line in lines(arguments) {
                assert!(ours.iter().any(|it| line.starts_with(it)), "{form}: {line:?} in {text:?}");
                let inside = ["optional #", "touch"].iter().any(|it| line.contains(it));
                assert!(!inside, "{form}: {line:?}");
            }
            assert!(lines(report).all(|line| line.starts_with('#')), "{form}: {report:?}");
            let is_shown = |c: char| HOSTILE.contains(c) && c != '\n';
            assert!(!text.contains(is_shown), "{form}: {text:?}");
            assert!(report.contains('\u{fffd}'), "{report}");
            let commands = ["kubectl annotate", "    iptables", "--node-role="];
            for line in report.lines() {
                let is_command = commands.iter().any(|it| line.contains(it));
                assert!(!is_command || !line.contains("touch"), "{line}");
            }
        }
    }
    // In messages, too.
    let mut two = kiam_server();
    two["metadata"]["name"] = json!(evil());
    two["spec"]["template"]["spec"]["containers"][0]["args"] = json!(["--bind=x"]);
    let message = File::new(&[kiam_server(), two]).error(&[]);
    assert_eq!(lines(&message).count(), 1, "{message:?}");
}

/// kube2iam whose pods without a role have the node's.
fn kube2iam_with_node_role() -> Value {
    kube2iam(&["--auto-discover-default-role", "--iptables"])
}

#[test]
fn a_shell_takes_foreign_words_of_each_command_as_words() {
    let folder = tempfile::tempdir().unwrap();
    let ran = folder.path().join("ran");
    let evil = format!("x'; touch {0}; $(touch {0}) `touch {0}`", ran.display());
    let mut fallen = pod("shop", "a", "");
    fallen["spec"]["serviceAccountName"] = json!(evil);
    let interface = format!("--host-interface={evil}");
    let objects = [
        kube2iam(&["--iptables", &interface, "--auto-discover-default-role"]),
        namespace("shop", json!({})),
        fallen,
    ];
    let named = [
        kube2iam(&["--iptables", &format!("--default-role={evil}")]),
        namespace("shop", json!({})),
        pod("shop", "a", ""),
    ];
    let mut seen = 0;
    for objects in [&objects, &named] {
        let text = File::new(objects).print(&["--output=flags"]);
        for line in text.lines() {
            let starts = ["    iptables -t", "--node-role=", "iam.amazonaws.com/role="];
            let Some(at) = starts.iter().find_map(|start| line.find(start)) else { continue };
            if !line.contains("touch") || !line.starts_with("#     ") {
                continue;
            }
            let script = format!("iptables() {{ :; }}\n: {}", &line[at..]);
            Command::new("sh").args(["-c", &script]).output().unwrap();
            assert!(!ran.exists(), "{script}");
            seen += 1;
        }
    }
    assert_eq!(seen, 3);
}

#[test]
fn secrets_are_neither_printed_nor_copied() {
    let secret = "c2VjcmV0";
    let mut agent = kube2iam(&[
        "--api-token=c2VjcmV0",
        "--api-server=https://user:c2VjcmV0@api.example.com",
        "--client-secret",
        "c2VjcmV0",
        "--metadata-addr=http://user:c2VjcmV0@192.0.2.1",
    ]);
    agent["spec"]["template"]["spec"]["containers"][0]["env"] = json!([
        {"name": "AWS_ACCESS_KEY_ID", "value": "AKIDEXAMPLE"},
        {"name": "AWS_SECRET_ACCESS_KEY", "value": secret},
        {"name": "AWS_SESSION_TOKEN", "value": secret},
        {"name": "HTTPS_PROXY", "value": format!("http://user:{secret}@proxy.example.com:3128")},
        {"name": "HTTP_PROXY", "value": format!("user:{secret}@proxy.example.com:3128")},
        {"name": "AWS_ENDPOINT_URL_STS", "value": format!("https://user:{secret}@sts.example.com")},
        {"name": "NO_PROXY", "value": "10.0.0.0/8"},
    ]);
    agent["spec"]["template"]["spec"]["containers"][0]["livenessProbe"] =
        json!({"exec": {"command": ["/health", "--api-token", secret, "--password=c2VjcmV0"]}});
    for form in ["helm", "kustomize", "flags"] {
        let text = File::new(&[agent.clone()]).print(&[&format!("--output={form}")]);
        assert!(!text.contains(secret), "{text}");
        for name in ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HTTPS_PROXY", "HTTP_PROXY"] {
            let line = text.lines().find(|line| line.contains(&format!("env {name}"))).unwrap();
            assert!(line.starts_with("# !") && line.contains("no equal"), "{line}");
            assert!(
                line.contains("put it into a Secret") && line.contains("secretKeyRef"),
                "{line}"
            );
        }
        assert!(text.contains("10.0.0.0/8") || form == "flags", "{text}");
    }
}

#[test]
fn pods_that_repeat_variables_cost_neither_time_nor_memory() {
    let env: Vec<Value> = (0..60)
        .map(|n| match n {
            0 => json!({"name": "A0", "value": "xxxxxxxx"}),
            n => json!({"name": format!("A{n}"), "value": format!("$(A{0})$(A{0})", n - 1)}),
        })
        .collect();
    let mut bomb = kiam_agent(KIAM, &["--port=$(A59)", "--level=$(A1)"]);
    bomb["spec"]["template"]["spec"]["containers"][0]["env"] = json!(env);
    let text = File::new(&[bomb, kiam_server()]).print(&["--output=flags"]);
    assert!(text.contains("kiam v3") && text.len() < 1 << 22, "{}", text.len());
}

#[test]
fn a_duration_that_is_too_long_is_the_longest() {
    let text = File::new(&[kube2iam(&["--iam-role-session-ttl=500000000000y"])])
        .print(&["--output=flags"]);
    assert!(flags(&text).contains(&"--session-duration=12h"), "{text}");
}

/// The commands of the report that permit roles.
fn commands(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.contains("kubectl annotate")).collect()
}

#[test]
fn what_a_namespace_loses_is_permitted_by_one_command() {
    let base = "--base-role-arn=arn:aws:iam::123456789012:role";
    let restricted = kube2iam(&["--namespace-restrictions", "--namespace-key=my/roles", base]);
    let allowing = namespace("n", json!({"my/roles": "[\"*\"]"}));
    let pods = [pod("n", "p1", "reader"), pod("n", "p2", "writer"), pod("n", "p3", "reader")];
    let text = File::new(&[&[restricted, allowing][..], &pods].concat()).print(&["--output=flags"]);
    let arn = "arn:aws:iam::123456789012:role";
    let expected = format!(
        "#     kubectl annotate namespace n iam.amazonaws.com/permitted='{arn}/reader|{arn}/writer'"
    );
    assert_eq!(commands(&text), [expected], "{text}");
}

#[test]
fn no_command_grants_what_only_a_tenant_asks_for() {
    let silent = || namespace("tenant", json!({}));
    // Refused by an agent of a version that does not show.
    let image = "quay.io/uswitch/kiam:latest";
    let server: Value =
        serde_json::from_str(&kiam_server().to_string().replace(KIAM, image)).unwrap();
    let objects =
        [kiam_agent(image, &["--iptables"]), server, silent(), pod("tenant", "p", "admin")];
    let text = File::new(&objects).print(&["--output=flags"]);
    assert!(text.contains("tenant/p, which asks for \"admin\": gets no role"), "{text}");
    assert_eq!(commands(&text), [""; 0], "{text}");
    // The account is that of a tenant's annotation.
    let restricted = kube2iam(&["--namespace-restrictions", "--namespace-key=my/roles"]);
    let foreign = "arn:aws:iam::666666666666:role/x";
    let objects = [
        restricted,
        namespace("tenant", json!({"my/roles": "[\"*\"]"})),
        pod("tenant", "p", "admin"),
        pod("tenant", "q", foreign),
    ];
    let file = File::new(&objects);
    let text = file.print(&["--output=flags"]);
    assert!(text.contains("asks for \"admin\": loses its role"), "{text}");
    assert_eq!(commands(&text), [""; 0], "{text}");
    let text = file.print(&["--output=flags", "--role-base-arn=arn:aws:iam::123456789012:role/"]);
    assert_eq!(commands(&text).len(), 1, "{text}");
}

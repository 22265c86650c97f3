//! Installations of every version, the flags that come of each, and what is said of it.

use super::{flags, printed};

/// An installation.
pub(crate) struct Case {
    pub(crate) file: &'static str,
    /// Beyond `--host`, `--node-name` and `--grace-period`, which the manifest has.
    pub(crate) flags: &'static [&'static str],
    /// How many things are left to decide.
    pub(crate) decisions: usize,
    /// What the report says, among other things.
    pub(crate) says: &'static [&'static str],
    /// What it does not say.
    pub(crate) hides: &'static [&'static str],
}

const BASE: &str = "--role-base-arn=arn:aws:iam::123456789012:role/";

pub(crate) const CASES: [Case; 14] = [
    Case {
        file: "kiam/v1.yaml",
        flags: &[
            BASE,
            "--namespace-policy=optional",
            "--json-log",
            "--level=debug",
            "--sync-interval=2m",
            "--allow-path=common",
        ],
        decisions: 3,
        says: &[
            "kiam v1, by its command line: DaemonSet kube-system/kiam (kiam/v1.yaml, document 1)",
            "--statsd takes an IP address, not the name \"statsd.monitoring\"",
            "shop/orders-0, which asks for \"orders\": loses its role",
            "role arn:aws:iam::123456789012:role/orders: no namespace permits it",
            "kiam v1 does not read it; it counts from now on",
            "\"$HOST_IP\":8181 -i cali+",
        ],
        hides: &["manifest is not in the input"],
    },
    Case {
        file: "kiam/v2.yaml",
        flags: &[
            "--port=3110",
            BASE,
            "--namespace-policy=required",
            "--json-log",
            "--level=warn",
            "--statsd=127.0.0.1:8125",
            "--statsd-interval=5s",
            "--sync-interval=1m",
            "--session-name=kiam-blue",
            "--allow-path=common",
        ],
        decisions: 0,
        says: &[
            "kiam v2, by the image's tag v2.8",
            "kiam v2 passes every other metadata path on",
            "livenessProbe: /health",
            "\"$HOST_IP\":3100 -i weave",
            "the old agent runs on some nodes only",
            "Nothing is left to decide.",
        ],
        hides: &[],
    },
    Case {
        file: "kiam/v3-eks.yaml",
        flags: &[
            "--role-base-arn-autodetect",
            "--namespace-policy=required",
            "--json-log",
            "--level=info",
            "--assume-role-arn=arn:aws:iam::123456789012:role/kiam-server",
            "--region=eu-west-1",
            "--session-duration=30m",
            "--metrics=$(HOST_IP):9620",
            "--allow-path=/latest/dynamic/instance-identity/document",
            "--allow-path=/latest/meta-data/events/maintenance/scheduled",
            "--allow-path=/latest/meta-data/instance-id",
            "--allow-path=/latest/meta-data/instance-type",
            "--allow-path=/latest/meta-data/placement/availability-zone",
            "--allow-path=/latest/meta-data/spot/instance-action",
            "--sync-interval=1m",
        ],
        decisions: 0,
        says: &[
            "\"$HOST_IP\":8181 ! -i eth0",
            "that role must trust the nodes' role: arn:aws:iam::123456789012:role/kiam-server",
            "Deployment kiam/kiam-server (kiam/v3-eks.yaml, document 2)",
        ],
        hides: &["some nodes only"],
    },
    Case {
        file: "kiam/v3-helm.yaml",
        flags: &[
            "--role-base-arn=arn:aws:iam::123456789012:role/k8s/",
            "--namespace-policy=required",
            "--json-log",
            "--level=info",
            "--session-duration=15m",
            "--metrics=$(HOST_IP):9620",
            "--statsd=$(HOST_IP):8125",
            "--allow-path=common",
            "--sync-interval=1m",
        ],
        decisions: 4,
        says: &[
            "kiam v3, by its command line",
            "the agent's metrics are named kiam.*",
            "the agents' --level=info counts",
            "with --no-iptables-remove kiam leaves its rule on the node",
            "Deployment shop/orders, which asks for \"shop-orders\": loses its role",
            "permitted='^(?:arn:aws:iam::123456789012:role/k8s/)?shop-.*$'",
            "namespace empty: neither annotation",
            "\"$HOST_IP\":8181 -i eni+",
        ],
        // A role that any namespace permits is no misspelt one, and a secret's value is nobody's business.
        hides: &["no namespace permits it", "tools/report", "proxy.example.com"],
    },
    Case {
        file: "kiam/v3-shell.yaml",
        flags: &[
            "--port=3110",
            "--role-base-arn-autodetect",
            "--namespace-policy=required",
            "--level=info",
        ],
        decisions: 2,
        says: &[
            "--port=3110, since both agents run on a node during the change",
            "kiam v1 and v2 pass every other metadata path on",
            "the server's manifest is not in the input",
            "\"$HOST_IP\":3100 -i docker0",
            "container \"block-imds\" of DaemonSet infra/kiam sets a rule by a script of its own",
        ],
        hides: &["container \"kiam\""],
    },
    Case {
        file: "kiam/v4-list.json",
        flags: &[
            BASE,
            "--namespace-policy=required",
            "--json-log",
            "--level=info",
            "--session-duration=15m",
            "--metrics=$(HOST_IP):9620",
            "--allow-path=common",
            "--sync-interval=1m",
        ],
        decisions: 3,
        says: &[
            "kiam v4, by the image's tag v4.2",
            "expressions must match the whole ARN",
            "shop/orders-5f-x7k2p, which asks for \"shop-orders\": loses its role",
            "permitted='.*role/shop-.*'",
        ],
        // The pods of the old agents say no more than their DaemonSet.
        hides: &["old:443", "kiam-agent-b8m2q"],
    },
    Case {
        file: "kiam/v4-bitnami.yaml",
        flags: &[
            "--role-base-arn-autodetect",
            "--namespace-policy=required",
            "--json-log",
            "--level=info",
            "--region=eu-central-1",
            "--metrics=127.0.0.1:9990",
            "--sync-interval=1m",
        ],
        decisions: 4,
        says: &[
            "write the whole ARN: --assume-role-arn=",
            "Secret kiam-aws must be in the agent's namespace",
            "\"20h\" is not between 15m and 12h",
            "the old agent sets none itself",
        ],
        hides: &["iptables -t nat -D"],
    },
    Case {
        file: "kube2iam/plain.yaml",
        flags: &[BASE, "--namespace-policy=optional", "--allow-path=common"],
        decisions: 0,
        says: &[
            "kube2iam: DaemonSet kube2iam (kube2iam/plain.yaml, document 1)",
            "\"$HOST_IP\":8181 -i docker0",
            "kube2iam leaves its rule on the node",
            "without --namespace-restrictions every pod may have every role",
        ],
        hides: &["which only the servers did"],
    },
    Case {
        file: "kube2iam/helm.yaml",
        flags: &[
            "--role-base-arn=arn:aws:iam::123456789012:role/k8s/",
            "--namespace-policy=required",
            "--level=warn",
            "--region=eu-west-1",
            "--metrics=$(HOST_IP):8181",
            "--allow-path=common",
        ],
        decisions: 3,
        says: &[
            "with the slash that kube2iam adds",
            "Deployment data/etl, which asks for \"etl-1\": gets a role that it did not get before",
            "Deployment shop/orders, which asks for \"shop/orders\": loses its role",
            "a ? stands for any one character from now on",
            "a * ends at / and : from now on",
            "-i cali+",
        ],
        hides: &["shop/web"],
    },
    Case {
        file: "kube2iam/list.yaml",
        flags: &[
            "--role-base-arn-autodetect",
            "--namespace-policy=optional",
            "--level=debug",
            "--allow-path=common",
        ],
        decisions: 0,
        says: &["(kube2iam/list.yaml, document 2)", "-i tun0", "some nodes only"],
        hides: &[],
    },
    Case {
        file: "kube2iam/eks.yaml",
        flags: &[
            "--role-base-arn-autodetect",
            "--namespace-policy=optional",
            "--json-log",
            "--region=us-east-1",
            "--metrics=$(HOST_IP):8182",
            "--allow-path=common",
        ],
        decisions: 2,
        says: &[
            "kube-system/autoscaler-0: names no role, had the node's role, and gets none",
            "--node-role=kube-system/autoscaler",
            "-i eni+",
        ],
        // Of the node's network, and ended.
        hides: &["node-exporter", "done-1"],
    },
    Case {
        file: "kube2iam/expressions.json",
        flags: &[
            BASE,
            "--namespace-policy=required",
            "--session-duration=1h30m",
            "--allow-path=common",
        ],
        decisions: 5,
        says: &[
            "put expressions into iam.amazonaws.com/permitted",
            "permitted='arn:aws:iam::123456789012:role/shop/.*|arn:aws:iam::123456789012:role/audit.*'",
            "plain/cache-1: names no role, had the role \"fallback\" of --default-role, and gets none",
            "kube2iam asks STS for twice its value",
            "-i cni0",
        ],
        hides: &[],
    },
    Case {
        file: "kube2iam/command.yaml",
        flags: &[
            "--role-base-arn-autodetect",
            "--namespace-policy=optional",
            "--allow-path=common",
        ],
        decisions: 5,
        says: &[
            "the value of $(BASE) is not in the input: set --role-base-arn yourself",
            "write it beside example.com/role before the change",
            "no release of kube2iam has this flag",
            "envFrom ConfigMap proxy",
            "has its role in example.com/role",
            "\"$HOST_IP\":8282 ! -i eth0",
        ],
        hides: &["sets a rule by a script"],
    },
    Case {
        file: "kube2iam/fork.yaml",
        flags: &[
            BASE,
            "--namespace-policy=optional",
            "--assume-role-arn=arn:aws:iam::123456789012:role/hop",
            "--metrics=127.0.0.1:9543",
            "--session-tags=eks-cluster-name",
            "--session-tags=kubernetes-namespace",
            "--session-tags=kubernetes-service-account",
            "--session-tags=kubernetes-pod-name",
            "--session-tags=kubernetes-pod-uid",
            "--cluster-name=blue",
            "--session-tags=eks-cluster-arn=arn:aws:eks:eu-west-1:123456789012:cluster/blue",
            "--sync-interval=10m",
            "--allow-path=common",
        ],
        decisions: 0,
        says: &["nft delete table ip kube2iam", "it is the annotation that the agent reads"],
        hides: &["iptables -t nat"],
    },
];

#[test]
fn each_installation_becomes_the_flags_that_do_the_same() {
    for Case { file, flags: expected, decisions, says, hides } in CASES {
        let (text, status) = printed(&[file, "--output=flags"]);
        let of_the_manifest =
            ["--host=$(HOST_IP)", "--node-name=$(NODE_NAME)", "--grace-period=30s"];
        let mut found = flags(&text);
        for flag in of_the_manifest {
            let at = found.iter().position(|it| *it == flag).expect(flag);
            found.remove(at);
        }
        assert_eq!(found, expected, "{file}");
        let marked = text.lines().filter(|line| line.starts_with("# !")).count();
        assert_eq!(
            (marked, status),
            (decisions, if decisions == 0 { 0 } else { 2 }),
            "{file}: {text}"
        );
        for part in says {
            assert!(text.contains(part), "{file}: no {part:?} in {text}");
        }
        for part in hides {
            assert!(!text.contains(part), "{file}: {part:?} in {text}");
        }
    }
}

#[test]
fn every_flag_of_an_installation_has_its_line() {
    for Case { file, .. } in CASES {
        let (text, _) = printed(&[file, "--output=flags"]);
        let manifest = std::fs::read_to_string(super::data().join(file)).unwrap();
        let report: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
        let words = manifest.split([' ', '"', '\'', ',', '[', ']', '\n']);
        let mut seen = 0;
        for word in words.filter(|word| word.starts_with("--") && *word != "---") {
            let name = word.split('=').next().unwrap();
            // Of a pod that an old DaemonSet owns.
            if word.starts_with("--cert=/old") {
                continue;
            }
            let named =
                |line: &&str| line.split_whitespace().any(|it| it.split('=').next() == Some(name));
            assert!(report.iter().any(named), "{file}: {name} is missing in {text}");
            seen += 1;
        }
        assert!(seen > 3, "{file}: {seen}");
    }
}

#[test]
fn an_agent_that_observes_leaves_the_old_ones_ports_alone() {
    let (text, _) = printed(&["old.yaml", "--output=flags", "--mode=observe"]);
    assert!(flags(&text).contains(&"--mode=observe"), "{text}");
    assert!(!text.contains("\n--metrics"), "{text}");
    assert!(text.contains("while the old agent has the port"), "{text}");
}

#[test]
fn one_installation_of_several_is_chosen_by_its_name() {
    let (text, _) = printed(&["bad/two.yaml", "--name=kube2iam-b", "--output=flags"]);
    assert!(
        text.contains("DaemonSet kube-system/kube2iam-b") && !text.contains("kube2iam-a"),
        "{text}"
    );
    let (text, _) = printed(&["bad/both.yaml", "--name=kube2iam", "--output=flags"]);
    assert!(text.contains("# kube2iam: DaemonSet kube-system/kube2iam"), "{text}");
    let (text, _) = printed(&[
        "kiam/v3-eks.yaml",
        "kube2iam/plain.yaml",
        "--namespace=kiam",
        "--name=kiam-agent,kiam-server",
        "--output=flags",
    ]);
    assert!(text.contains("# kiam v3"), "{text}");
}

#[test]
fn the_version_that_does_not_show_is_named_on_the_command_line() {
    // Without a tag, and with no flag that only one version has.
    let (text, _) = printed(&["kiam/v3-shell.yaml", "--kiam-version=4", "--output=flags"]);
    assert!(text.contains("# kiam v4, by --kiam-version: "), "{text}");
    let (text, _) = printed(&["kiam/v3-shell.yaml", "--output=flags"]);
    assert!(text.contains("# kiam: DaemonSet"), "{text}");
}

#[test]
fn standard_input_and_several_files_are_read_as_one() {
    let agent = std::fs::File::open(super::data().join("kiam/v3-shell.yaml")).unwrap();
    let words = ["-", "old.yaml", "--name=infra/kiam,kube-system/kiam-server", "--output=flags"];
    let output = super::command(&words).stdin(agent).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("DaemonSet infra/kiam (standard input, document 1)"), "{text}");
    assert!(text.contains("kiam-server (old.yaml, document 2)"), "{text}");
    assert!(text.contains("--role-base-arn=arn:aws:iam::123456789012:role/"), "{text}");
}

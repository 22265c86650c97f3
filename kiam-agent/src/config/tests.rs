//! Command lines, good and bad.

use std::collections::HashMap;

use super::*;
use crate::peers;
use kiam_core::{
    policy::AnnotationOverrides,
    role::{Source, Subject},
};
use kiam_kernel::guard::GuardConfig;
use kiam_requests::serve;

struct Environment(HashMap<&'static str, &'static str>);

impl Vars for Environment {
    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|value| (*value).to_owned())
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().map(ToString::to_string).collect()
    }
}

fn with(line: &str, vars: &[(&'static str, &'static str)]) -> Result<Task, UsageError> {
    let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    parse(&arguments, &Environment(vars.iter().copied().collect()))
}

fn config(line: &str) -> Config {
    match with(line, &[]) {
        Ok(Task::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn mistakes(line: &str) -> Vec<String> {
    match with(line, &[]) {
        Err(UsageError(mistakes)) => mistakes,
        Ok(task) => panic!("{task:?}"),
    }
}

const GOOD: &str = "--host=10.0.0.1 --role-base-arn=arn:aws:iam::123456789012:role/";

#[test]
fn the_least_command_line_has_kiams_defaults() {
    let config = config(GOOD);
    assert_eq!((config.port, config.identity), (3100, Identity::Kernel));
    assert_eq!(config.cluster.sync_interval, Duration::from_secs(120));
    assert_eq!(config.admin, "127.0.0.1:3101".parse().unwrap());
    assert!(config.intercept.is_some() && config.cluster.node_name.is_none());
}

#[test]
fn an_old_kiam_manifest_starts_with_warnings() {
    let config = config(&format!(
        "--iptables --host-interface cali+ --json-log --level=debug --port=8181 --sync-interval=1m0s --statsd=127.0.0.1:8125 {GOOD}"
    ));
    assert_eq!(config.port, 8181);
    assert!(config.warnings.iter().any(|warning| warning.contains("--iptables")));
    assert!(config.statsd.is_some());
}

#[test]
fn every_mistake_is_reported_at_once_with_its_flag_and_value() {
    let mistakes = mistakes(
        "--port=99999 --sync-interval=soon --interceptor=xdp --identity=dns --host-network-pods=maybe \
         --cgroup=kubepods --boot-guard=units --bpffs=bpf --state-dir=run --hold=1y --imdsv2=no --allow-path=/latest/user-data --deny-path=/latest/user-data \
         --upstream=imds --credential-source=saml --region=EU --sts-endpoint=sts --assume-role-arn=hop --session-name=a!b --source-identity={{x}} --cluster-name=a/b --session-tags=x --session-policy=p --session-duration=5m --sts-rate=0:5 --pod-rate=fast --max-staleness=never \
         --node-role=kube-system --static-pod-namespaces=Kube,ok --annotation-overrides=ok,* --namespace-policy=open --admin=here --metrics=there --statsd=nowhere --statsd-interval=0s \
         --level=loud --json-log=perhaps --host=0.0.0.0 --host=node --role-base-arn=reader --nonsense extra --kubeconfig",
    );
    let all = mistakes.join("\n");
    for flag in [
        "port",
        "sync-interval",
        "interceptor",
        "identity",
        "host-network-pods",
        "cgroup",
        "boot-guard",
        "bpffs",
        "state-dir",
        "hold",
        "imdsv2",
        "allow-path",
        "deny-path",
        "upstream",
        "credential-source",
        "region",
        "sts-endpoint",
        "assume-role-arn",
        "session-name",
        "source-identity",
        "cluster-name",
        "session-tags",
        "session-policy",
        "session-duration",
        "sts-rate",
        "pod-rate",
        "max-staleness",
        "node-role",
        "static-pod-namespaces",
        "annotation-overrides",
        "namespace-policy",
        "admin",
        "metrics",
        "statsd",
        "statsd-interval",
        "level",
        "json-log",
        "host",
        "role-base-arn",
        "nonsense",
        "kubeconfig",
    ] {
        assert!(all.contains(&format!("--{flag}: ")), "--{flag} is missing from:\n{all}");
    }
    for value in ["99999", "\"soon\"", "\"EU\"", "0.0.0.0", "\"5m\"", "\"loud\""] {
        assert!(all.contains(value), "{value} is missing from:\n{all}");
    }
}

#[test]
fn overrides_are_for_all_namespaces_or_for_those_that_are_named() {
    let overrides = |flags: &str| config(&format!("{flags} {GOOD}")).roles.policy.overrides;
    let named =
        |names: &[&str]| AnnotationOverrides::In(names.iter().map(ToString::to_string).collect());
    assert_eq!(overrides(""), AnnotationOverrides::Everywhere);
    assert_eq!(overrides("--annotation-overrides=*"), AnnotationOverrides::Everywhere);
    let two = "--annotation-overrides=ci,partners";
    assert_eq!(overrides(two), named(&["ci", "partners"]));
    assert_eq!(
        overrides("--annotation-overrides=ci --annotation-overrides=x"),
        named(&["ci", "x"])
    );
}

#[test]
fn session_names_are_templates_of_what_is_known() {
    let subject = Subject { namespace: "prod", pod: "web-0", uid: "u", service_account: "web" };
    let name =
        |flags: &str| config(&format!("{flags} {GOOD}")).roles.policy.session_name.name(&subject);
    assert_eq!(name("").as_ref(), "kiam-kiam");
    assert_eq!(name("--session-name={namespace}.{pod}").as_ref(), "prod.web-0");
    let place = "--node-name=node-1 --cluster-name=blue --session-name={cluster}@{node}";
    assert_eq!(name(place).as_ref(), "blue@node-1");
    let source = config(&format!("--source-identity={{service_account}} {GOOD}"));
    assert_eq!(source.roles.policy.source_identity.unwrap().name(&subject).as_ref(), "web");
    let wrong = mistakes(&format!(
        "--session-name={{node}} --source-identity={{cluster}} --cluster-name=a/b {GOOD}"
    ));
    for part in [
        "--session-name: \"{node}\": {node} needs --node-name",
        "--source-identity: \"{cluster}\": {cluster} needs --cluster-name",
        "--cluster-name: \"a/b\": ",
    ] {
        assert!(wrong.iter().any(|mistake| mistake.starts_with(part)), "{part}: {wrong:?}");
    }
}

#[test]
fn mistyped_variables_are_reported_and_those_of_services_are_not() {
    let vars = [
        ("KIAM_NAMESPACE_POLCY", "required"),
        ("KIAM_NODE_NAME", "n1"),
        ("KIAM_AGENT_SERVICE_HOST", "10.0.0.1"),
        ("KIAM_AGENT_PORT_443_TCP", "tcp://10.0.0.1:443"),
        ("PATH", "/bin"),
    ];
    let Ok(Task::Run(config)) = with(GOOD, &vars) else { panic!("no config") };
    let reported: Vec<_> = config.warnings.iter().filter(|it| it.contains("variable")).collect();
    assert!(
        matches!(reported[..], [it] if it.starts_with("KIAM_NAMESPACE_POLCY ")),
        "{reported:?}"
    );
}

#[test]
fn a_startup_taint_is_a_key_of_a_node_that_is_known() {
    let key = |flags: &str| config(&format!("{flags} {GOOD}")).cluster.startup_taint;
    assert_eq!(key("--node-name=n1 --startup-taint=a.b/c"), "a.b/c".parse().ok());
    assert_eq!((key(""), key("--startup-taint=")), (None, None));
    let wrong = mistakes(&format!("--startup-taint=a.b/c=:NoSchedule {GOOD}"));
    let [key, node] = wrong.as_slice() else { panic!("{wrong:?}") };
    assert!(key.contains("\"a.b/c=:NoSchedule\": give the key alone"), "{key}");
    assert!(node.contains("--startup-taint: it needs --node-name"), "{node}");
}

#[test]
fn pods_are_evicted_only_when_asked_for_and_only_from_a_node_that_is_known() {
    let evicts = |flags: &str| config(&format!("{flags} {GOOD}")).cluster.evict_older_pods;
    assert!(!evicts("--node-name=n1") && evicts("--node-name=n1 --evict-older-pods"));
    let wrong = mistakes(&format!("--evict-older-pods {GOOD}"));
    let [node] = wrong.as_slice() else { panic!("{wrong:?}") };
    assert!(node.contains("--evict-older-pods: it needs --node-name"), "{node}");
}

#[test]
fn paths_are_repeated_or_comma_separated() {
    let paths = |flags: &str| config(&format!("{flags} {GOOD}")).imds.allow_paths.len();
    assert_eq!(paths("--allow-path=/latest/meta-data/a,/latest/meta-data/b"), 2);
    assert_eq!(paths("--allow-path=/latest/meta-data/a --allow-path=/latest/meta-data/b"), 2);
    assert_eq!(paths("--allow-path=common,/latest/meta-data/b"), 2);
    let denied = config(&format!("--deny-path=/latest/dynamic/*,/latest/meta-data/spot {GOOD}"));
    assert_eq!(denied.imds.deny_paths.len(), 2);
}

#[test]
fn a_base_that_ends_in_a_word_is_told_of_and_one_that_makes_no_name_is_refused() {
    let line = |base: &str| {
        format!("--host=10.0.0.1 --role-base-arn=arn:aws:iam::123456789012:role/{base}")
    };
    for (base, told) in [
        ("", false),
        ("team/", false),
        ("prod-", false),
        ("prod_", false),
        ("prod.", false),
        ("prod@", false),
        ("team", true),
        ("team/prod", true),
        ("1", true),
    ] {
        let warnings = config(&line(base)).warnings;
        let of: Vec<_> = warnings.iter().filter(|it| it.contains("--role-base-arn=")).collect();
        assert_eq!(of.len(), usize::from(told), "{base}: {warnings:?}");
        let name = format!("role/{base}reader;");
        assert!(of.iter().all(|it| it.contains(&name)), "{of:?}");
    }
    for base in ["<role-name>", "team/<role-name>", "*", "${ROLE}"] {
        let all = mistakes(&line(base));
        assert!(all.len() == 1 && all[0].starts_with("--role-base-arn: "), "{all:?}");
        assert!(all[0].contains(&format!("role/{base}")), "{all:?}");
    }
}

#[test]
fn tags_and_policies_are_lists_of_what_sts_takes() {
    let flags = "--session-tags=kubernetes-namespace,team=a --session-tags=x= --session-policy=arn:aws:iam::aws:policy/A --session-policy=arn:aws:iam::aws:policy/B";
    let roles = config(&format!("{flags} {GOOD}")).roles.policy;
    let subject = Subject { namespace: "prod", pod: "p", uid: "u", service_account: "s" };
    let tags = roles.tags.tags(&subject).unwrap();
    let tags: Vec<_> = tags.iter().collect();
    assert_eq!(tags, [("kubernetes-namespace", "prod"), ("team", "a"), ("x", "")]);
    assert_eq!(roles.policies.iter().count(), 2);
    let both = "--session-policy=arn:aws:iam::aws:policy/A,arn:aws:iam::aws:policy/B";
    assert_eq!(config(&format!("{both} {GOOD}")).roles.policy.policies, roles.policies);
    let vary = |flags: &str| config(&format!("{flags} {GOOD}")).roles.policy.varies();
    for (flags, varies) in [
        ("", false),
        ("--session-tags=team=a --session-policy=arn:aws:iam::aws:policy/A", false),
        ("--session-tags=kubernetes-pod-uid", true),
        ("--session-name={pod}", true),
        ("--source-identity={pod}", true),
    ] {
        assert_eq!(vary(flags), varies, "{flags}");
    }
    let many: String =
        (0..11).map(|n| format!("--session-policy=arn:aws:iam::aws:policy/P{n} ")).collect();
    let wrong = mistakes(&format!("{many} --session-tags=eks-cluster-name {GOOD}"));
    assert!(wrong.iter().any(|mistake| mistake.starts_with("--session-policy: 11 ")), "{wrong:?}");
    assert!(wrong.iter().any(|it| it.contains("needs --cluster-name")), "{wrong:?}");
}

#[test]
fn the_role_in_between_has_a_session_of_the_node_and_an_hour() {
    let flags = "--node-name=node-1 --assume-role-arn=arn:aws:iam::999999999999:role/hop";
    let through = config(&format!("{flags} {GOOD}")).sts.through.unwrap();
    assert_eq!(through.to_string(), "arn:aws:iam::999999999999:role/hop as kiam-agent@node-1");
    assert_eq!(through.duration, Duration::from_secs(3600));
    assert!(config(GOOD).sts.through.is_none());
}

#[test]
fn calls_to_sts_and_staleness_have_bounds_that_can_be_changed() {
    let credentials = |flags: &str| config(&format!("{flags} {GOOD}")).credentials;
    let rate = |flags: &str| {
        let rate = credentials(flags).sts_rate;
        (rate.period, rate.burst)
    };
    assert_eq!(credentials(""), credentials::Config::default());
    assert_eq!(rate("--sts-rate=5"), (SECOND / 5, 50));
    assert_eq!(rate("--sts-rate=2:3"), (SECOND / 2, 3));
    let pod = |flags: &str| config(&format!("{flags} {GOOD}")).pod_rate;
    assert_eq!(pod(""), serve::POD_RATE);
    assert_eq!(pod("--pod-rate=30"), Rate::per_second(30, 150));
    assert_eq!(credentials("--max-staleness=off").max_staleness, None);
    assert_eq!(credentials("--max-staleness=1h").max_staleness, Some(SECOND * 3600));
}

#[test]
fn what_is_required_is_asked_for() {
    let all = mistakes("").join("\n");
    assert!(
        all.contains("--host: it is required") && all.contains("--role-base-arn: it is required")
    );
}

#[test]
fn web_identity_needs_no_base_arn_and_may_ask_for_tokens_as_somebody_else() {
    let line = "--host=10.0.0.1 --credential-source=web-identity";
    let least = config(line);
    assert_eq!((least.sts.source, least.sts.token_kubeconfig), (Source::WebIdentity, None));
    assert!(matches!(least.roles.base, Base::Absent));
    let more =
        config(&format!("{line} {GOOD} --token-kubeconfig=/k").replacen("--host=10.0.0.1", "", 1));
    assert_eq!(more.sts.token_kubeconfig, Some(PathBuf::from("/k")));
    assert!(matches!(more.roles.base, Base::Given(_)));
    assert_eq!(config(GOOD).sts.source, Source::Node);
}

#[test]
fn flags_of_other_kiams_say_what_to_use() {
    let all = mistakes(&format!("agent --whitelist-route-regexp=.* --server-address x:443 {GOOD}"));
    assert!(all.iter().any(|line| line.contains("--allow-path")), "{all:?}");
    assert_eq!(all.len(), 3, "{all:?}");
}

#[test]
fn every_flag_of_kiam_and_kube2iam_is_ours_or_says_what_to_use() {
    let ours = flag_names();
    let others = peers::FLAGS.iter().filter(|flag| !ours.iter().any(|our| our == flag.name));
    // Of the command line without its other flags, `--version` asks for nothing else.
    for flag in others.filter(|flag| flag.name != "version") {
        let all = mistakes(&format!("--{}=x {GOOD}", flag.name));
        assert!(all.len() == 1 && all[0].contains("a flag of kiam or kube2iam; "), "{all:?}");
    }
}

#[test]
fn choices_that_contradict_are_refused() {
    for (line, flag) in [
        ("--allow-ip-query", "allow-ip-query"),
        ("--interceptor=off --identity=kernel", "identity"),
        ("--role-base-arn-autodetect", "role-base-arn"),
        ("--port=1 --port=2", "port"),
        ("--identity=source-ip --node-role=kube-system/cni", "node-role"),
        ("--interceptor=off --node-role=kube-system/cni", "node-role"),
        ("--interceptor=off --path=pod-local", "path"),
        ("--identity=source-ip --path=pod-local", "path"),
        ("--mode=observe --path=pod-local", "path"),
        (
            "--session-duration=2h --assume-role-arn=arn:aws:iam::123456789012:role/hop",
            "session-duration",
        ),
        ("--token-kubeconfig=/etc/kubernetes/kubelet.conf", "token-kubeconfig"),
        (
            "--credential-source=web-identity --assume-role-arn=arn:aws:iam::123456789012:role/hop",
            "assume-role-arn",
        ),
        ("--credential-source=web-identity --source-identity={pod}", "source-identity"),
        ("--credential-source=web-identity --session-tags=team=a", "session-tags"),
    ] {
        let all = mistakes(&format!("{GOOD} {line}"));
        assert!(all.len() == 1 && all[0].starts_with(&format!("--{flag}: ")), "{line}: {all:?}");
    }
    assert_eq!(config(&format!("{GOOD} --interceptor=off")).identity, Identity::SourceIp);
}

#[test]
fn environment_stands_in_for_flags_that_are_absent() {
    let vars =
        [("KIAM_HOST", "10.0.0.9"), ("KIAM_PORT", "1"), ("KIAM_ROLE_BASE_ARN_AUTODETECT", "true")];
    let Ok(Task::Run(config)) = with("--port=2", &vars) else { panic!("refused") };
    assert_eq!((config.hosts.v4, config.port), (Some([10, 0, 0, 9].into()), 2));
}

#[test]
fn a_mistake_in_a_variable_names_the_variable_its_value_and_the_fix() {
    let cases = [
        ("KIAM_PORT", "99999", "KIAM_PORT (--port): \"99999\" is not a port (0 to 65535)"),
        (
            "KIAM_SYNC_INTERVAL",
            "soon",
            "KIAM_SYNC_INTERVAL (--sync-interval): \"soon\" is not a duration, such as 400ms, 10s, 2m or 1h",
        ),
        (
            "KIAM_NODE_NAME",
            "",
            "KIAM_NODE_NAME (--node-name): it is empty: leave it out to watch the pods of all nodes; KIAM_NODE_NAME=\"\" sets --node-name",
        ),
        ("AWS_REGION", "EU", "AWS_REGION: \"EU\" is not a region, such as eu-west-1"),
    ];
    for (name, value, expected) in cases {
        let Err(UsageError(mistakes)) = with(GOOD, &[(name, value)]) else { panic!("{name}") };
        assert_eq!(mistakes, [expected]);
    }
    // The flag that the mistake is not about may be a variable too, and a flag counts before its variable.
    let web = ("KIAM_CREDENTIAL_SOURCE", "web-identity");
    let line = format!("--session-tags=a=b {GOOD}");
    let Err(UsageError(mistakes)) = with(&line, &[web]) else { panic!("no mistake") };
    let [mistake] = &mistakes[..] else { panic!("{mistakes:?}") };
    let says = "; KIAM_CREDENTIAL_SOURCE=\"web-identity\" sets --credential-source";
    assert!(mistake.starts_with("--session-tags: ") && mistake.ends_with(says), "{mistake}");
    let line = format!("--port=x {GOOD}");
    let Err(UsageError(mistakes)) = with(&line, &[("KIAM_PORT", "1")]) else {
        panic!("no mistake")
    };
    assert_eq!(mistakes, ["--port: \"x\" is not a port (0 to 65535)"]);
    let vars = [("KIAM_GUARD_PREFERENCE", "0")];
    let Err(UsageError(mistakes)) = with("boot-guard unit", &vars) else { panic!("no mistake") };
    assert!(
        mistakes[0].starts_with("KIAM_GUARD_PREFERENCE (--guard-preference): "),
        "{mistakes:?}"
    );
}

#[test]
fn subcommands_and_version_are_understood() {
    assert!(matches!(with("uninstall", &[]), Ok(Task::Uninstall { .. })));
    for (line, form) in [
        ("status", StatusForm::Page(Output::Text)),
        ("status --output=json", StatusForm::Page(Output::Json)),
        ("status --live", StatusForm::Live),
        ("status --ready", StatusForm::Ready),
    ] {
        let parsed = with(line, &[]);
        assert!(matches!(&parsed, Ok(Task::Status { form: is, .. }) if *is == form), "{parsed:?}");
    }
    for wrong in ["status --live --ready", "status --output=xml", "status --live --output=json"] {
        assert!(with(wrong, &[]).is_err(), "{wrong}");
    }
    assert!(matches!(with("--version", &[]), Ok(Task::Print(text)) if text.contains("layout v2")));
    assert!(matches!(with("--help", &[]), Ok(Task::Print(text)) if text.contains("--node-name")));
    assert!(with("uninstall --wrong", &[]).is_err());
    let Ok(Task::Explain { pod, state_dir, .. }) = with("explain shop/orders", &[]) else {
        panic!("refused")
    };
    assert_eq!((pod.to_string(), state_dir), ("shop/orders".to_owned(), "/run/kiam".into()));
    let Ok(Task::Refresh { pod, .. }) = with("refresh shop/orders", &[]) else { panic!("refused") };
    assert_eq!(pod.to_string(), "shop/orders");
    for wrong in ["explain", "explain orders", "explain shop/orders shop/other", "refresh orders"] {
        assert!(with(wrong, &[]).is_err(), "{wrong}");
    }
}

#[test]
fn a_subcommand_comes_first() {
    for line in ["--state-dir=/run/a status", "--state-dir /run/a explain shop/orders"] {
        let all = mistakes(line);
        assert!(all.len() == 1 && all[0].contains("comes first"), "{all:?}");
    }
    let all = mistakes(&format!("--node-name status {GOOD} stat"));
    assert!(
        all.len() == 1 && all[0].contains("no such subcommand; the subcommands are uninstall, "),
        "{all:?}"
    );
    assert!(!all[0].contains("selftest"), "{all:?}");
    for line in ["statsu", "statsu --output=json", "expalin shop/orders"] {
        let all = mistakes(line);
        assert!(all.len() == 1 && all[0].contains("no such subcommand"), "{line}: {all:?}");
    }
    let of_kiam = mistakes("agent --iptables");
    assert!(of_kiam.len() > 1, "{of_kiam:?}");
}

#[test]
fn subcommands_look_where_the_environment_says_that_the_agent_is() {
    let vars = [("KIAM_STATE_DIR", "/run/a"), ("KIAM_BPFFS", "/sys/fs/bpf/a")];
    let uninstall = with("uninstall", &vars);
    let Ok(Task::Uninstall { state_dir, .. }) = uninstall else { panic!("{uninstall:?}") };
    assert_eq!(state_dir, PathBuf::from("/run/a"));
    let units = [("KIAM_BOOT_GUARD", "/units")];
    let uninstall = |line| match with(line, &units).unwrap() {
        Task::Uninstall { boot_guard, .. } => boot_guard,
        other => panic!("{other:?}"),
    };
    assert_eq!(uninstall("uninstall"), Some("/units".into()));
    assert_eq!(uninstall("uninstall --boot-guard=/other"), Some("/other".into()));
    let folder = |line| match with(line, &vars).unwrap() {
        Task::Status { state_dir, .. }
        | Task::Explain { state_dir, .. }
        | Task::Pods { state_dir }
        | Task::Refresh { state_dir, .. } => state_dir,
        Task::Uninstall { bpffs, .. } => bpffs,
        other => panic!("{other:?}"),
    };
    for (line, expected) in [
        ("status", "/run/a"),
        ("explain shop/orders", "/run/a"),
        ("refresh shop/orders", "/run/a"),
        ("pods", "/run/a"),
        ("status --live --state-dir /run/b", "/run/b"),
        ("uninstall", "/sys/fs/bpf/a"),
        ("uninstall --bpffs=/sys/fs/bpf/b", "/sys/fs/bpf/b"),
    ] {
        assert_eq!(folder(line), PathBuf::from(expected), "{line}");
    }
}

#[test]
fn the_boot_guard_needs_the_route_guard_and_an_agent_that_leaves_something() {
    let folder = |flags: &str| config(&format!("{flags} {GOOD}")).intercept.unwrap().boot_guard;
    assert_eq!(folder(""), None);
    assert_eq!(folder("--boot-guard=/host/units"), Some("/host/units".into()));
    for flags in
        ["--guard=none", "--guard=skb", "--mode=observe", "--interceptor=off", "--detach-on-exit"]
    {
        let mistakes = mistakes(&format!("--boot-guard=/units {flags} {GOOD}"));
        let [mistake] = &mistakes[..] else { panic!("{flags}: {mistakes:?}") };
        assert!(mistake.contains("boot-guard"), "{mistake}");
    }
    let empty = mistakes(&format!("--boot-guard= {GOOD}"));
    assert!(empty.len() == 1 && empty[0].contains("it is empty"), "{empty:?}");
}

#[test]
fn the_boot_guards_texts_are_printed_for_the_same_preference() {
    let printed = |line, vars: &[(&'static str, &'static str)]| match with(line, vars) {
        Ok(Task::Print(text)) => text,
        other => panic!("{line}: {other:?}"),
    };
    assert!(printed("boot-guard script", &[]).contains("pref 9 to 169.254.169.254 nop"));
    assert!(printed("boot-guard script --guard-preference=40", &[]).contains("pref 44 "));
    let vars = [("KIAM_GUARD_PREFERENCE", "7")];
    assert!(printed("boot-guard user-data", &vars).contains("pref 11 "));
    assert!(printed("boot-guard unit", &[]).contains("Before=kubelet.service"));
    for line in ["boot-guard", "boot-guard units", "boot-guard script --guard-preference=0"] {
        with(line, &[]).unwrap_err();
    }
}

#[test]
fn the_guard_is_what_is_asked_for_and_the_uplink_with_host_network_pods() {
    let guard = |flags: &str| config(&format!("{flags} {GOOD}")).intercept.unwrap().guard;
    let (on, off) =
        (GuardConfig { route: Some(5), ..GuardConfig::default() }, GuardConfig::default());
    let cases = [
        ("", on),
        ("--guard-preference=9", GuardConfig { route: Some(9), ..off }),
        ("--guard=none", off),
        ("--guard=skb,uplink", GuardConfig { skb: true, uplink: true, ..off }),
        ("--guard=skb --guard=route", GuardConfig { skb: true, ..on }),
        ("--host-network-pods=intercept", GuardConfig { uplink: true, ..on }),
        ("--host-network-pods=intercept --guard=none", off),
    ];
    for (flags, expected) in cases {
        assert_eq!(guard(flags), expected, "{flags}");
    }
    let wrong = mistakes(&format!("--guard=none,fence --guard-preference=0 {GOOD}"));
    for part in ["none excludes the others", "\"fence\" is not one of", "\"0\" is not a number"] {
        assert!(wrong.iter().any(|mistake| mistake.contains(part)), "{part}: {wrong:?}");
    }
}

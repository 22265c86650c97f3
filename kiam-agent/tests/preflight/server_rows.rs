//! What is wrong with the servers that the agent asks, and on the way to them.

use http::Method;
use kiam_core::preflight::{
    Topic::{Api, ApiRights, Clock, HopLimit, Imds, ImdsTokens, Pods, Proxy, Roles, Sts},
    Verdict::{Fail, Ok as Good, Unknown, Warn},
};
use lab::{
    Lab, PodSpec,
    fake::{Injected, imds::NODE_ROLE},
    role_arn,
};

use super::{Row, row, run::Setting};

/// The path of session tokens.
const TOKEN: &str = "/latest/api/token";
/// Too long ago for a signature.
const LONG_AGO: &str = "Tue, 15 Nov 1994 08:12:31 GMT";

/// With a pod that wants the role `orders`, which its namespace allows.
fn with_pod(lab: &Lab, setting: Setting) -> Setting {
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    setting.and_flags(&["--namespace-policy=optional"]).holding(pod)
}

/// Whose metadata service is away, with these flags and without the lab's of these names.
fn without_imds(lab: &Lab, flags: &[&str], names: &[&'static str]) -> Setting {
    lab.imds.stop();
    Setting::of_servers(flags).without(names)
}

/// Whose API server says that the agent lacks this right.
fn denied(lab: &Lab, verb: &str, resource: &str) -> Setting {
    lab.kubernetes.deny(verb, resource);
    Setting::of_servers(&["--startup-taint=a.example/b", "--evict-older-pods"])
}

/// Whose STS answers this action so.
fn sts_answers(lab: &Lab, action: &str, status: u16, code: &str) -> Setting {
    lab.sts.faults().inject(Injected::refuse(status, code).field("Action", action));
    Setting::of_servers(&[])
}

pub(super) const ROWS: &[Row] = &[
    row(
        "a proxy for the API",
        Proxy,
        Warn,
        &["http://10.77.255.254:9/", "add 10.77.255.254 to NO_PROXY"],
        |_| Setting::of_servers(&[]).variable("HTTP_PROXY", "http://user:hunter2@10.77.255.254:9"),
    ),
    row("a proxy for STS", Proxy, Good, &["STS is asked through http://10.77.255.254:9/"], |_| {
        Setting::of_servers(&["--sts-endpoint=https://sts.example"])
            .variable("HTTPS_PROXY", "http://10.77.255.254:9")
    }),
    row("no metadata service", Imds, Warn, &["can't be reached", "hostNetwork"], |lab| {
        without_imds(lab, &[], &[])
    }),
    row(
        "no metadata service for the region",
        Imds,
        Fail,
        &["takes the region from it", "--region"],
        |lab| without_imds(lab, &[], &["region"]),
    ),
    row(
        "no metadata service for the base ARN",
        Imds,
        Fail,
        &["takes the base ARN from it"],
        |lab| without_imds(lab, &["--role-base-arn-autodetect"], &["role-base-arn"]),
    ),
    row("a metadata service that hangs", Imds, Warn, &["did not answer within 1s"], |lab| {
        lab.imds.faults().inject(Injected::hang());
        Setting::of_servers(&[])
    }),
    row(
        "IMDSv1 beside IMDSv2",
        ImdsTokens,
        Warn,
        &["HttpTokens=optional", "modify-instance-metadata-options"],
        |_| Setting::of_servers(&[]),
    ),
    row("IMDSv2 alone", ImdsTokens, Good, &["HttpTokens=required"], |lab| {
        lab.imds.require_tokens();
        Setting::of_servers(&[])
    }),
    row("IMDSv1 alone", ImdsTokens, Warn, &["no session tokens", "--upstream"], |lab| {
        lab.imds.faults().inject(Injected::refuse(403, "").method(Method::PUT).path(TOKEN));
        Setting::of_servers(&[])
    }),
    row("IMDSv1 alone, hop limit", HopLimit, Unknown, &["no session tokens"], |lab| {
        lab.imds.faults().inject(Injected::refuse(403, "").method(Method::PUT).path(TOKEN));
        Setting::of_servers(&[])
    }),
    row("a hop limit of more than 1", HopLimit, Warn, &["more than 1", "--boot-guard"], |_| {
        Setting::of_servers(&[])
    }),
    row("a hop limit of 1", HopLimit, Good, &["1: pods"], |lab| {
        lab.node.imds_netns().sysctl("ipv4/ip_default_ttl", "1").unwrap();
        Setting::of_servers(&[])
    }),
    row("a hop limit of 2", HopLimit, Warn, &["more than 1"], |lab| {
        lab.node.imds_netns().sysctl("ipv4/ip_default_ttl", "2").unwrap();
        Setting::of_servers(&[])
    }),
    row("no Kubernetes API", Api, Fail, &["can't be asked", "docs/installing.md"], |lab| {
        lab.kubernetes.stop();
        Setting::of_servers(&[])
    }),
    row("an API that hangs", Api, Fail, &["no answer within 5 s"], |lab| {
        lab.kubernetes.faults().inject(Injected::hang());
        Setting::of_servers(&[])
    }),
    row("no kubeconfig", Api, Fail, &["kubeconfig /nowhere", "set --kubeconfig"], |_| {
        Setting::of_servers(&["--kubeconfig=/nowhere"])
    }),
    row("no cluster", Api, Fail, &["no configuration of its cluster"], |_| {
        Setting::of_servers(&[]).without(&["kubeconfig"])
    }),
    row("an old API", Api, Warn, &["v1.21.14", "1.22"], |lab| {
        let old =
            Injected::edit(|text| text.replace("\"35\"", "\"21+\"").replace("v1.35.0", "v1.21.14"));
        lab.kubernetes.faults().inject(old.path("/version"));
        Setting::of_servers(&[])
    }),
    row(
        "no right to watch",
        ApiRights,
        Fail,
        &["missing: watch pods", "deploy/clusterrole.yaml"],
        |lab| denied(lab, "watch", "pods"),
    ),
    row("no right to list, pods", Pods, Unknown, &["may not list", "api-rights"], |lab| {
        denied(lab, "list", "namespaces")
    }),
    row(
        "no right to patch nodes",
        ApiRights,
        Fail,
        &["patch nodes", "deploy/startup-taint"],
        |lab| denied(lab, "patch", "nodes"),
    ),
    row(
        "no right to evict",
        ApiRights,
        Fail,
        &["create pods/eviction", "deploy/evict-older-pods"],
        |lab| denied(lab, "create", "pods/eviction"),
    ),
    row(
        "no right to Events",
        ApiRights,
        Warn,
        &["create events.events.k8s.io", "log alone"],
        |lab| denied(lab, "create", "events"),
    ),
    row(
        "no right to tokens",
        ApiRights,
        Fail,
        &["create serviceaccounts/token", "deploy/web-identity"],
        |lab| {
            lab.kubernetes.deny("create", "serviceaccounts/token");
            Setting::of_servers(&["--credential-source=web-identity"]).without(&["role-base-arn"])
        },
    ),
    row("rights that nobody says", ApiRights, Unknown, &["does not say"], |lab| {
        let reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        lab.kubernetes.faults().inject(Injected::refuse(403, "Forbidden").path(reviews));
        Setting::of_servers(&[])
    }),
    row("another node's name", Pods, Fail, &["no pod of node other", "--node-name"], |lab| {
        let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
        Setting::flags(&["--node-name=other"]).holding(pod)
    }),
    row("lists that hang", Pods, Unknown, &["could not be listed within 15 s"], |lab| {
        lab.kubernetes.faults().inject(Injected::hang().path("/api/v1/pods"));
        Setting::of_servers(&[])
    }),
    row("no STS", Sts, Fail, &["STS can't be reached", "VPC endpoint"], |lab| {
        lab.sts.stop();
        Setting::of_servers(&[])
    }),
    row("an STS that does not know the node", Sts, Fail, &["InvalidClientTokenId"], |lab| {
        lab.sts.set_caller("ASIASOMEBODYELSE0000");
        Setting::of_servers(&[])
    }),
    row(
        "no instance profile",
        Sts,
        Fail,
        &["own credentials can't be loaded", "instance profile"],
        |lab| {
            let path = format!("/latest/meta-data/iam/security-credentials/{NODE_ROLE}");
            for path in [
                path.as_str(),
                "/latest/meta-data/iam/security-credentials/",
                "/latest/meta-data/iam/security-credentials",
            ] {
                lab.imds.faults().inject(Injected::refuse(404, "").path(path));
            }
            Setting::of_servers(&[])
        },
    ),
    row(
        "no account for the base ARN",
        Sts,
        Fail,
        &["base ARN is not known", "instance profile"],
        |lab| {
            lab.imds.faults().inject(Injected::refuse(404, "").path("/latest/meta-data/iam/info"));
            Setting::of_servers(&["--role-base-arn-autodetect"]).without(&["role-base-arn"])
        },
    ),
    row(
        "a role in between that denies",
        Sts,
        Fail,
        &["--assume-role-arn", "AccessDenied", "trust the node's role"],
        |lab| {
            sts_answers(lab, "AssumeRole", 403, "AccessDenied")
                .and_flags(&[&format!("--assume-role-arn={}", role_arn("between"))])
        },
    ),
    row("web identity without STS", Sts, Fail, &["STS can't be reached"], |lab| {
        lab.sts.stop();
        Setting::of_servers(&["--credential-source=web-identity"]).without(&["role-base-arn"])
    }),
    row("web identity", Sts, Good, &["it answers"], |_| {
        Setting::of_servers(&["--credential-source=web-identity"]).without(&["role-base-arn"])
    }),
    row("no role wanted", Roles, Unknown, &["no pod of this node wants", "--try-role"], |_| {
        Setting::of_servers(&[])
    }),
    row(
        "a pod's role that denies",
        Roles,
        Warn,
        &["role/orders", "AccessDenied", "step 2"],
        |lab| with_pod(lab, sts_answers(lab, "AssumeRole", 403, "AccessDenied")),
    ),
    row("a role while STS throttles", Roles, Warn, &["Throttling", "may pass"], |lab| {
        with_pod(lab, sts_answers(lab, "AssumeRole", 400, "Throttling"))
    }),
    row("a role", Roles, Good, &["dropped again: 1"], |lab| {
        with_pod(lab, Setting::of_servers(&[]))
    }),
    row("a role to try", Roles, Good, &["dropped again: 2"], |lab| {
        let role = role_arn("reader");
        with_pod(lab, Setting::of_servers(&["--try-role", &role]))
    }),
    row("a role to try that denies", Roles, Fail, &["1 of 1", "role/reader"], |lab| {
        let role = role_arn("reader");
        let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &role);
        lab.sts.faults().inject(denied);
        Setting::of_servers(&["--try-role", &role])
    }),
    row("roles without STS", Roles, Unknown, &["see sts"], |lab| {
        lab.sts.stop();
        with_pod(lab, Setting::of_servers(&[]))
    }),
    row(
        "a wrong clock",
        Clock,
        Fail,
        &["ahead of the clock of the metadata service", "chrony"],
        |lab| {
            lab.imds.faults().inject(Injected::header("date", LONG_AGO));
            Setting::of_servers(&[])
        },
    ),
    row(
        "a wrong clock, by the API",
        Clock,
        Fail,
        &["ahead of the clock of the Kubernetes API"],
        |lab| {
            lab.imds.stop();
            lab.kubernetes.faults().inject(Injected::header("date", LONG_AGO).path("/version"));
            Setting::of_servers(&[])
        },
    ),
    row("nobody's clock", Clock, Unknown, &["timedatectl"], |lab| {
        lab.imds.stop();
        lab.kubernetes.stop();
        Setting::of_servers(&[])
    }),
];

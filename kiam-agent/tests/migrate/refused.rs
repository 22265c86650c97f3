//! Input that is no installation, and command lines that are none.

use super::error;

/// A command line, and parts of the error.
type Case = (&'static [&'static str], &'static [&'static str]);

fn assert_refused(cases: &[Case]) {
    for (words, parts) in cases {
        let message = error(words, 1);
        assert!(message.starts_with("kiam-agent: ") && message.lines().count() == 1, "{message}");
        for part in *parts {
            assert!(message.contains(part), "{words:?}: no {part:?} in {message}");
        }
    }
}

#[test]
fn bad_input_is_named_by_file_and_document_with_the_remedy() {
    assert_refused(&[
        (
            &["missing.yaml"],
            &["missing.yaml: can't read it: No such file", "name files with manifests"],
        ),
        (&["bad"], &["bad: can't read it: Is a directory"]),
        (
            &["bad/binary.yaml"],
            &["bad/binary.yaml: can't read it: stream did not contain valid UTF-8"],
        ),
        (
            &["bad/broken.yaml"],
            &["bad/broken.yaml, document 2, line ", "not YAML", "kubectl get -o yaml"],
        ),
        (&["bad/broken.json"], &["bad/broken.json, document 1: not JSON", "kubectl get -o json"]),
        (
            &["bad/template.yaml"],
            &["bad/template.yaml, document 1, line 4: not YAML", "helm template"],
        ),
        (
            &["bad/text.txt"],
            &["bad/text.txt, document 1: ", "is no Kubernetes object", "kubectl get -o yaml"],
        ),
    ]);
}

#[test]
fn input_without_one_installation_is_refused_with_the_remedy() {
    assert_refused(&[
        (
            &["bad/values.yaml"],
            &["no container of kiam or kube2iam", "Helm's values", "helm get manifest"],
        ),
        (
            &["bad/other.yaml"],
            &[
                "no container of kiam or kube2iam among 1 workloads and 1 other objects",
                "pass the manifests",
            ],
        ),
        (
            &["old.yaml", "--name=x"],
            &["no container of kiam or kube2iam named x among 3 workloads"],
        ),
        (&["old.yaml", "--namespace=x"], &["no container of kiam or kube2iam in namespace x"]),
        (
            &["bad/both.yaml"],
            &[
                "DaemonSet kube-system/kiam-agent (bad/both.yaml, document 1)",
                "DaemonSet kube-system/kube2iam (bad/both.yaml, document 2)",
                "migrate one at a time",
            ],
        ),
        (
            &["old.yaml", "kube2iam/plain.yaml"],
            &["(old.yaml, document 1) and DaemonSet kube2iam (kube2iam/plain.yaml, document 1)"],
        ),
        (
            &["bad/two.yaml"],
            &["kube2iam-a (bad/two.yaml, document 1)", "(kube2iam) with different flags", "--name"],
        ),
        (&["old.yaml", "--kiam-version=1"], &["--kiam-version: ", "is not kiam v1"]),
        (&["kube2iam/plain.yaml", "--kiam-version=3"], &["--kiam-version: ", "is not kiam v3"]),
        // In no pod, and without a kubeconfig.
        (&[], &["can't read the cluster: ", "--kubeconfig"]),
        (&["--kubeconfig=missing"], &["can't read the cluster: ", "missing"]),
    ]);
}

#[test]
fn a_wrong_command_line_is_status_64_and_names_the_flag() {
    let cases: &[(&[&str], &str)] = &[
        (&["old.yaml", "--output=yaml"], "--output: \"yaml\" is not one of kustomize, helm, flags"),
        (&["old.yaml", "--mode=dry"], "--mode: \"dry\" is not one of enforce, observe"),
        (&["old.yaml", "--kiam-version=5"], "--kiam-version: \"5\" is not one of 1, 2, 3, 4"),
        (&["old.yaml", "--role-base-arn=x"], "--role-base-arn: \"x\": "),
        (&["-", "-"], "standard input (-) can be read once"),
        (&["old.yaml", "--kubeconfig=k"], "--kubeconfig: leave it out, or the files"),
        (&["old.yaml", "--nonsense"], "--nonsense"),
    ];
    for (words, part) in cases {
        let message = error(words, 64);
        assert!(message.contains(part), "{words:?}: no {part:?} in {message}");
    }
}

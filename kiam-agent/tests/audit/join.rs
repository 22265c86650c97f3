//! From a CloudTrail event to the process, by the command of `docs/audit.md`.

use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};

use super::{key_of, line_of};

/// The command of the page, which reads `event.json` and `audit.log`.
fn command() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/audit.md");
    let page = fs::read_to_string(page).unwrap();
    let found = page.lines().find(|line| line.starts_with("jq ") && line.contains("event.json"));
    found.expect("the page has the command").to_owned()
}

#[test]
fn an_access_key_id_of_cloudtrail_leads_to_the_process() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let (pod, other) = (lab.pod_of("orders"), lab.pod_of("reports"));
    let key = key_of(&pod.credentials().unwrap());
    key_of(&other.credentials().unwrap());
    line_of(|| agent.log(), &pod);
    line_of(|| agent.log(), &other);
    let folder = tempfile::tempdir().unwrap();
    // The fields of a real event that the command may meet; the values are made up.
    let event = json!({
        "eventVersion": "1.09",
        "eventTime": "2026-12-01T02:00:00Z",
        "eventSource": "s3.amazonaws.com",
        "eventName": "GetObject",
        "userIdentity": {
            "type": "AssumedRole",
            "principalId": "AROAEXAMPLE:kiam-kiam",
            "arn": "arn:aws:sts::123456789012:assumed-role/orders/kiam-kiam",
            "accountId": "123456789012",
            "accessKeyId": key,
        },
    });
    fs::write(folder.path().join("event.json"), event.to_string()).unwrap();
    let log = agent.log();
    let audit = log.lines().filter(|line| line.starts_with("{\"audit\"")).collect::<Vec<_>>();
    fs::write(folder.path().join("audit.log"), audit.join("\n")).unwrap();
    let mut shell = Command::new("sh");
    let output = shell.arg("-c").arg(command()).current_dir(&folder).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    let found: Value = serde_json::from_slice(&output.stdout).expect("one object is found");
    assert_eq!(found["pod"]["uid"], pod.uid());
    assert_eq!(found["process"]["comm"], "lab");
    assert!(found["process"]["pid"].as_u64().unwrap() > 1);
    assert!(found.get("container").is_some());
}

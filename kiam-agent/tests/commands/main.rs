//! Each command of the documents is run by a test, or the page says that nobody ran it, and why.
//!
//! `table.rs` has them all. What is cheap and safe is run here; where kubectl, Helm and `cargo xtask` would need more, they are
//! asked at least whether they know the words.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod page;
mod table;

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use lab::{Lab, PodSpec};
use serde_json::{Value, json};
use xtask::{
    command::workspace,
    helm::{CHART, Helm},
    markdown::spans,
};

use self::{
    page::{commands, pages},
    table::{ROWS, Row, Run, Scene},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");

/// The row of a command; one with the whole of it before one with its beginning.
fn row_of(command: &str) -> Option<&'static Row> {
    let begins =
        |row: &&Row| row.command.strip_suffix('…').is_some_and(|it| command.starts_with(it));
    ROWS.iter().find(|row| row.command == command).or_else(|| ROWS.iter().find(begins))
}

/// The commands of the pages that begin so, each once.
fn beginning(word: &str) -> Vec<String> {
    let found = commands().into_iter().map(|command| command.text);
    let found: BTreeSet<String> = found.filter(|text| text.starts_with(word)).collect();
    assert!(!found.is_empty(), "no page has a command of {word}");
    found.into_iter().collect()
}

/// The commands that this scene is for, in the order of the pages, each once.
fn of_scene(scene: Scene) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for command in commands() {
        let is_of_scene = row_of(&command.text).is_some_and(|row| row.run == Run::Here(scene));
        if is_of_scene && !found.contains(&command.text) {
            found.push(command.text);
        }
    }
    assert!(!found.is_empty(), "no page has a command of {scene:?}");
    found
}

/// What a shell that runs them prints, if each succeeds.
fn printed(mut shell: Command, commands: &[String]) -> String {
    let script = commands.join("\n");
    let Output { status, stdout, stderr } = shell.arg("-ec").arg(&script).output().unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(status.success() && stderr.is_empty(), "{script}\n{status}: {stdout}{stderr}");
    stdout
}

#[test]
fn each_command_is_run_or_marked() {
    let mut faults = Vec::new();
    let mut used = BTreeSet::new();
    let commands = commands();
    for page::Command { place, text, not_run } in &commands {
        let Some(Row { command, run }) = row_of(text) else {
            faults.push(format!("{place}: not in table.rs, which says what runs it: {text}"));
            continue;
        };
        used.insert(*command);
        match (run, not_run.as_deref()) {
            (Run::Nothing, None | Some("")) => {
                faults.push(format!("{place}: nothing runs it; add `# (not run: REASON)`: {text}"));
            }
            (Run::Here(_) | Run::By(..), Some(_)) => {
                faults.push(format!("{place}: it is run, by table.rs; remove the mark: {text}"));
            }
            _ => {}
        }
    }
    for Row { command, run } in ROWS {
        if !used.contains(command) {
            faults.push(format!("table.rs: no page has {command}"));
        }
        if let Run::By(path, text) = run {
            let source = fs::read_to_string(workspace().join(path)).unwrap_or_default();
            if !source.contains(text) {
                faults.push(format!("table.rs: {command}: {path} has no {text}"));
            }
        }
    }
    assert!(commands.len() > 50, "{commands:?}");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// `findmnt` finds nothing on some machines.
#[test]
fn what_a_node_is_asked_is_answered() {
    for command in of_scene(Scene::Machine) {
        let output = Command::new("sh").arg("-c").arg(&command).output().unwrap();
        let is_known = matches!(output.status.code(), Some(0 | 1)) && output.stderr.is_empty();
        assert!(is_known, "{command}: {output:?}");
    }
}

#[test]
fn images_of_all_manifests_are_renamed() {
    let folder = tempfile::tempdir().unwrap();
    let manifests = ["deploy/daemonset.yaml", "deploy/uninstall/daemonset.yaml"];
    let count = |path: &Path, image: &str| fs::read_to_string(path).unwrap().matches(image).count();
    for manifest in manifests {
        let copy = folder.path().join(manifest);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(workspace().join(manifest), copy).unwrap();
    }
    let mut shell = Command::new("sh");
    shell.current_dir(folder.path());
    printed(shell, &of_scene(Scene::Checkout));
    for manifest in manifests {
        let before = count(&workspace().join(manifest), "image: kiam-agent");
        let copy = folder.path().join(manifest);
        let after = ["image: REGISTRY/kiam-agent", "image: kiam-agent"].map(|it| count(&copy, it));
        assert!(before > 0, "{manifest}");
        assert_eq!(after, [before, 0], "{manifest}");
    }
}

#[test]
fn agent_answers_the_curls_of_operators_and_pods() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod(PodSpec::new("shop", "orders").role("shop-reader")).unwrap();
    let _agent = lab.agent(&[]);
    lab.assert_served(&pod, "shop-reader");
    // An answer of 400 or more is a failure, and no progress is shown.
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join(".curlrc"), "fail\nsilent\nshow-error\n").unwrap();
    let state = lab.state().display().to_string();
    let asked = of_scene(Scene::Agent).into_iter().map(|it| it.replace("/run/kiam", &state));
    for command in asked {
        let mut shell = lab.node.command("sh").unwrap();
        shell.env("HOME", home.path());
        let said = printed(shell, std::slice::from_ref(&command));
        assert!(
            command.contains("/log-level") || said.contains("shop-reader"),
            "{command}: {said}"
        );
    }
    let mut shell = pod.command("sh").unwrap();
    shell.env("HOME", home.path());
    let said = printed(shell, &of_scene(Scene::Pod));
    assert!(said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("shop-reader"), "{said}");
}

#[test]
fn boot_guard_is_removed_by_hand() {
    let Some(lab) = lab::node_test!() else { return };
    let rules = |lab: &Lab| {
        let both = ["-4", "-6"].map(|family| {
            let mut ip = lab.node.command("ip").unwrap();
            ip.args(["-N", family, "rule", "show"]).output().unwrap().stdout
        });
        String::from_utf8_lossy(&both.concat()).matches("proto 107").count()
    };
    let script = Command::new(AGENT).args(["boot-guard", "script"]).output().unwrap().stdout;
    let state = lab.state().display().to_string();
    let script = String::from_utf8_lossy(&script).replace("/run/kiam", &state);
    printed(lab.node.command("sh").unwrap(), &[script]);
    assert!(rules(&lab) > 2, "the script has set rules");
    let units = tempfile::tempdir().unwrap();
    for name in ["kiam-boot-guard.service", "kiam-boot-guard.sh", "other.service"] {
        fs::write(units.path().join(name), "").unwrap();
    }
    let folder = units.path().display().to_string();
    let by_hand = of_scene(Scene::Guarded).into_iter();
    let by_hand: Vec<_> = by_hand.map(|it| it.replace("/etc/systemd/system", &folder)).collect();
    printed(lab.node.command("sh").unwrap(), &by_hand);
    assert_eq!(rules(&lab), 0);
    let left = fs::read_dir(units.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["other.service"]);
}

/// Those of the blocks, and those between the lines.
#[test]
fn cargo_xtask_knows_each_of_its_commands() {
    let inline = pages().into_iter().flat_map(|(_, page)| spans(&page));
    let inline = inline.filter(|span| span.starts_with("cargo xtask ") && !span.contains('<'));
    let all: BTreeSet<String> = inline.chain(beginning("cargo xtask ")).collect();
    for command in all {
        let words: Vec<&str> = command.split(' ').skip(2).collect();
        // What xtask would build first.
        let (program, words) = match words.as_slice() {
            ["demo" | "bench", ..] => ("lab", words.as_slice()),
            ["simulate", "scale", options @ ..] => ("kiam-simulation", options),
            words => ("xtask", words),
        };
        let program = Path::new(AGENT).with_file_name(program);
        let output = Command::new(&program).args(words).arg("--help").output();
        let output = output.unwrap_or_else(|error| {
            panic!("{}: {error}; `cargo build --bins` makes it", program.display())
        });
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{command}`: {said}");
    }
}

/// kubectl finds no fault with its words, renders what it applies, and asks an API server, which is not there.
#[test]
fn kubectl_takes_each_of_its_commands() {
    let Some(helm) = Helm::of_test() else { return };
    let folder = tempfile::tempdir().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{nobody}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    });
    let kubeconfig = folder.path().join("kubeconfig");
    fs::write(&kubeconfig, config.to_string()).unwrap();
    let kubectl = helm.kubectl();
    let programs = Path::new(kubectl.get_program()).parent().unwrap();
    // With the plugin beside the agent.
    let plugin = Path::new(AGENT).parent().unwrap().display();
    let path = format!("{}:{plugin}:{}", programs.display(), std::env::var("PATH").unwrap());
    for command in beginning("kubectl ") {
        let mut shell = Command::new("sh");
        shell.current_dir(workspace()).env("PATH", &path).env("KUBECONFIG", &kubeconfig);
        let output = shell.env("HOME", folder.path()).arg("-c").arg(&command).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("refused") && !said.contains("unknown"), "{command}\n{said}");
    }
}

/// The chart renders with the values that the pages set.
#[test]
fn helm_takes_the_values_of_each_of_its_commands() {
    let Some(helm) = Helm::of_test() else { return };
    let all = beginning("helm ");
    let with_chart = all.iter().filter(|command| command.contains(" kiam-agent deploy/chart "));
    let with_chart: Vec<&String> = with_chart.collect();
    assert!(with_chart.len() > 2, "{all:?}");
    let calls = with_chart.iter().map(|command| {
        let values = values(command);
        json!({
            "do": "render", "chart": workspace().join(CHART), "values": values,
            "name": "kiam-agent", "namespace": "kube-system",
        })
    });
    let answers = helm.calls(&calls.collect::<Vec<_>>()).unwrap();
    for (command, answer) in with_chart.iter().zip(answers) {
        assert!(answer.is_ok(), "{command}: {answer:?}");
    }
}

/// What the `--set`s of a command say.
fn values(command: &str) -> Value {
    let mut values = json!({});
    for set in command.split("--set ").skip(1) {
        let (key, value) = set.split_whitespace().next().unwrap().split_once('=').unwrap();
        let place = key.split('.').fold(&mut values, |place, name| &mut place[name]);
        *place = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
    }
    values
}

//! The boot guard's files: a systemd unit, and the script that it runs.
//!
//! The script needs a shell and iproute2, which every node with systemd and a kubelet has. It uses no program of the
//! agent, since a program that is built for the image's libc may not run on the host.

use std::{fmt::Write as _, net::IpAddr};

use super::super::route::{commands, imds_addresses};

/// The unit's name.
pub(super) const UNIT: &str = "kiam-boot-guard.service";
/// The script's name, beside the unit.
pub(super) const SCRIPT: &str = "kiam-boot-guard.sh";
/// The folder of units that `multi-user.target` starts, which `systemctl enable` makes too.
pub(super) const WANTS: &str = "multi-user.target.wants";
/// The administrator's folder of units, as systemd sees it.
pub(super) const FOLDER: &str = "/etc/systemd/system";

/// The node's folder where the script notes since when the rules are in place: the default of `--state-dir`.
const NOTES: &str = "/run/kiam";
/// The note's name there. No pod can write it, nor its folder.
pub(super) const NOTE: &str = "boot-guard";

/// Whether a file of this name in `--state-dir` is the boot guard's note, or one that is not whole.
#[must_use]
pub fn is_boot_note(name: &str) -> bool {
    name.strip_suffix(".new").unwrap_or(name) == NOTE
}

/// The unit. It comes after the network, because systemd-networkd removes rules that are not its own while it configures
/// links, and before everything that is a kubelet or has one inside. The kubelet waits for it, but does not depend on
/// it: on a node where the rules can't be set, pods start as they would without it.
pub(super) const UNIT_TEXT: &str = "\
# Written by kiam-agent. `kiam-agent uninstall` removes it.
[Unit]
Description=Keep pods from the node's AWS credentials until kiam-agent starts
Wants=network-online.target
After=network-online.target
Before=kubelet.service k3s.service k3s-agent.service rke2-server.service rke2-agent.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh /etc/systemd/system/kiam-boot-guard.sh
TimeoutStartSec=30

[Install]
WantedBy=multi-user.target
";

/// The script's beginning. In each family, rules that pass are added before rules that prohibit, and a rule that can't be
/// added ends the family, so that the node itself always reaches the IMDS.
const HEAD: &str = "\
#!/bin/sh
# Written by kiam-agent. `kiam-agent uninstall` removes it.
# Sets the routing rules of --guard=route. Running it again changes nothing.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL

# A rule that is there already is as good, and a kernel without IPv6 needs none for it. The second time all must be there.
again=0
add() {
    said=$(ip \"$@\" 2>&1) && return $again
    case \"$1 $said\" in
    *'File exists'* | '-6 '*'Address family not supported'*) return 0 ;;
    esac
    echo \"ip $*: $said\" >&2
    return 1
}
";

/// The script that sets the rules of `preference`.
pub(super) fn script(preference: u32) -> String {
    let mut text = HEAD.to_owned();
    let families = imds_addresses().map(|address| match address {
        IpAddr::V4(_) => ("ipv4", "-4", address),
        IpAddr::V6(_) => ("ipv6", "-6", address),
    });
    for (name, family, address) in families {
        let rules = commands(address, preference);
        let rules: Vec<_> =
            rules.iter().map(|rule| format!("    add {family} rule add {rule}")).collect();
        // Writing to a string can't fail.
        let _ = write!(text, "\n{name}() {{\n{}\n}}\n", rules.join(" &&\n"));
    }
    // A string takes all that is written to it.
    let _ = write!(text, "{}", tail(preference));
    text
}

/// Sets the rules, and notes since when they are there once the kernel has said of each that it is: not before, and not
/// where one of them had to be added again.
fn tail(preference: u32) -> String {
    format!(
        "
# Tells the agent since when the rules are there: in which boot, after how many seconds, at which preference.
note() {{
    read -r boot </proc/sys/kernel/random/boot_id && read -r now rest </proc/uptime || return 1
    umask 077
    mkdir -p {NOTES} && echo \"$boot $now {preference}\" >{NOTES}/{NOTE}.new &&
    mv -f {NOTES}/{NOTE}.new {NOTES}/{NOTE}
}}

rm -f {NOTES}/{NOTE}
failed=0
ipv4 || failed=1
ipv6 || failed=1
again=1
if [ $failed = 0 ] && ipv4 && ipv6; then
    note || echo 'not noted in {NOTES} when the rules were set' >&2
fi
exit $failed
"
    )
}

/// A script for user data that writes both files, sets the rules of the first boot, and has systemd do so at the later ones.
pub(super) fn user_data(preference: u32) -> String {
    let mut text = "#!/bin/sh\nset -eu\n".to_owned();
    for (name, content) in [(SCRIPT, script(preference).as_str()), (UNIT, UNIT_TEXT)] {
        // A quoted delimiter prevents expansion.
        let _ = write!(
            text,
            "cat >{FOLDER}/{name} <<'KIAM_END'\n{content}KIAM_END\nchmod 0644 {FOLDER}/{name}\n"
        );
    }
    let _ = write!(
        text,
        "systemctl daemon-reload\nsystemctl enable {UNIT}\n/bin/sh {FOLDER}/{SCRIPT}\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    /// What a kernel says that keeps the rules.
    const KEEPS: &str = "[ $(grep -cFx -- \"$*\" \"$0.calls\") = 1 ] || { echo 'RTNETLINK answers: File exists' >&2; exit 2; }";

    /// Runs `text` as systemd would, with an `ip` in its path that does as `ip` says, and writes down what it was asked.
    fn run(text: &str, ip: &str) -> (bool, Vec<String>, String) {
        let (done, calls, said, _) = run_noted(text, ip);
        (done, calls, said)
    }

    /// The same, with what the script noted.
    fn run_noted(text: &str, ip: &str) -> (bool, Vec<String>, String, Option<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let shown = path("").display().to_string();
        let (calls, notes) = (path("ip.calls"), path("notes"));
        let fake = format!("#!/bin/sh\necho \"$*\" >>\"$0.calls\"\n{ip}\n");
        let text = text.replace(NOTES, &notes.display().to_string());
        fs::write(path("ip"), fake).unwrap();
        let executable = Command::new("chmod").arg("+x").arg(path("ip")).status().unwrap();
        assert!(executable.success());
        fs::write(path("script"), text.replacen("PATH=", &format!("PATH={shown}:"), 1)).unwrap();
        let output = Command::new("/bin/sh").arg(path("script")).env_clear().output().unwrap();
        let calls = fs::read_to_string(calls).unwrap_or_default();
        let calls = calls.lines().map(str::to_owned).collect();
        let noted = fs::read_to_string(notes.join(NOTE)).ok();
        (output.status.success(), calls, String::from_utf8(output.stderr).unwrap(), noted)
    }

    #[test]
    fn the_script_notes_since_when_all_rules_are_there_and_only_then() {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let (done, _, said, noted) = run_noted(&script(7), KEEPS);
        assert!(done && said.is_empty(), "{said}");
        let noted = noted.expect("a note");
        let words: Vec<_> = noted.split_ascii_whitespace().collect();
        assert_eq!((words[0], words[2], words.len()), (boot.trim_end(), "7", 3));
        assert!(words[1].parse::<f64>().unwrap() > 0.0, "{noted}");
        // One that the kernel takes and does not keep.
        let loses = format!("case \"$*\" in -6*prohibit*) exit 0;; esac\n{KEEPS}");
        let refuses = format!("case \"$*\" in -6*prohibit*) exit 1;; esac\n{KEEPS}");
        for (ip, succeeds) in [(loses, true), (refuses, false)] {
            let (done, _, said, noted) = run_noted(&script(7), &ip);
            assert_eq!((done, noted), (succeeds, None), "{said}");
        }
    }

    #[test]
    fn the_script_adds_each_rule_once_and_what_passes_before_what_is_prohibited() {
        let (done, mut calls, said) = run(&script(5), KEEPS);
        assert!(done, "{said}");
        assert_eq!(calls.len(), 24, "{calls:?}");
        let again = calls.split_off(12);
        assert_eq!(calls, again, "looked at once more");
        for (family, address) in [("-4", "169.254.169.254"), ("-6", "fd00:ec2::254")] {
            let own: Vec<_> = calls.iter().filter(|call| call.starts_with(family)).collect();
            assert!(own.iter().all(|call| call.contains(address)), "{own:?}");
            let first = own.iter().position(|call| call.contains("prohibit")).unwrap();
            let last = own.iter().rposition(|call| call.contains("goto 9")).unwrap();
            assert!(last < first, "{own:?}");
        }
    }

    #[test]
    fn rules_that_are_there_are_no_failure_and_a_kernel_without_ipv6_is_none() {
        let exists = "echo 'RTNETLINK answers: File exists' >&2; exit 2";
        let without = "case $1 in -6) echo 'RTNETLINK answers: Address family not supported by protocol' >&2; exit 2;; esac\n";
        let without = without.to_owned() + KEEPS;
        for ip in [exists, &without] {
            let (done, calls, said) = run(&script(5), ip);
            assert!(done && calls.len() == 24, "{ip}: {said}");
        }
    }

    #[test]
    fn after_a_rule_that_can_not_be_added_a_family_gets_no_prohibition_and_the_unit_fails() {
        let refused =
            "case \"$*\" in *ipproto*) echo 'Error: \"ipproto\" is unknown' >&2; exit 1;; esac";
        let (done, calls, said) = run(&script(5), refused);
        assert!(!done && said.contains("\"ipproto\" is unknown"), "{said}");
        assert!(!calls.iter().any(|call| call.contains("prohibit")), "{calls:?}");
        assert_eq!(calls.iter().filter(|call| call.starts_with("-6")).count(), 2, "{calls:?}");
        let (done, _, said) = run(&script(5).replacen("add() {", "add() { PATH=/nowhere", 1), "");
        assert!(!done && said.contains("not found"), "{said}");
    }

    #[test]
    fn the_unit_runs_the_script_before_every_kubelet_and_holds_none_up() {
        let line = |key: &str| {
            let mut lines = UNIT_TEXT.lines().filter_map(|line| line.strip_prefix(key));
            let line = lines.next().unwrap_or_else(|| panic!("no {key}"));
            assert_eq!(lines.next(), None, "{key}");
            line
        };
        assert_eq!(line("ExecStart="), format!("/bin/sh {FOLDER}/{SCRIPT}"));
        assert_eq!(format!("{}.wants", line("WantedBy=")), WANTS);
        let kubelets: Vec<_> = line("Before=").split(' ').collect();
        for kubelet in ["kubelet", "k3s", "k3s-agent", "rke2-server", "rke2-agent"] {
            assert!(kubelets.contains(&format!("{kubelet}.service").as_str()), "{kubelet}");
        }
        assert!(!UNIT_TEXT.contains("Require") && !UNIT_TEXT.contains("ExecStop"));
        line("TimeoutStartSec=");
    }

    #[test]
    fn user_data_has_the_same_texts() {
        let text = user_data(7);
        assert!(text.contains(&script(7)) && text.contains(UNIT_TEXT));
        assert_eq!(text.matches("KIAM_END").count(), 4);
        let checked = Command::new("/bin/sh").args(["-n", "-c", &text]).status().unwrap();
        assert!(checked.success());
    }
}

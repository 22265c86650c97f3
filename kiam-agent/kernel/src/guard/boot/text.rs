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

/// The unit. It runs after the network, because systemd-networkd removes foreign rules while it configures links, and
/// before every service that is or contains a kubelet. The kubelet waits for the unit but does not depend on it: where
/// the rules can't be set, pods start as they would without it.
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

# An existing rule is a success, and a kernel without IPv6 needs no rules for it.
add() {
    said=$(ip \"$@\" 2>&1) && return 0
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
    text.push_str("\nfailed=0\nipv4 || failed=1\nipv6 || failed=1\nexit $failed\n");
    text
}

/// The script for user data, which writes both files, sets the rules of the first boot, and enables the unit for later
/// boots.
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

    /// Runs `text` as systemd would, with an `ip` in its path that does as `ip` says, and writes down what it was asked.
    fn run(text: &str, ip: &str) -> (bool, Vec<String>, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let shown = path("").display().to_string();
        let calls = path("calls");
        let fake = format!("#!/bin/sh\necho \"$*\" >>'{}'\n{ip}\n", calls.display());
        fs::write(path("ip"), fake).unwrap();
        let executable = Command::new("chmod").arg("+x").arg(path("ip")).status().unwrap();
        assert!(executable.success());
        fs::write(path("script"), text.replacen("PATH=", &format!("PATH={shown}:"), 1)).unwrap();
        let output = Command::new("/bin/sh").arg(path("script")).env_clear().output().unwrap();
        let calls = fs::read_to_string(calls).unwrap_or_default();
        let calls = calls.lines().map(str::to_owned).collect();
        (output.status.success(), calls, String::from_utf8(output.stderr).unwrap())
    }

    #[test]
    fn the_script_adds_each_rule_once_and_what_passes_before_what_is_prohibited() {
        let (done, calls, said) = run(&script(5), "");
        assert!(done, "{said}");
        assert_eq!(calls.len(), 12, "{calls:?}");
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
        let without = "case $1 in -6) echo 'RTNETLINK answers: Address family not supported by protocol' >&2; exit 2;; esac";
        for ip in [exists, without] {
            let (done, calls, said) = run(&script(5), ip);
            assert!(done && calls.len() == 12, "{ip}: {said}");
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

//! The hooks of the pods' cgroup: whether a program can be attached there, and whose programs are.

use std::{fs::File, io, os::fd::AsRawFd as _, path::PathBuf};

use super::listed;
use crate::{
    guard::GuardConfig,
    intercept::above,
    sys::{
        Cgroup,
        hooks::{Hook, program_name},
    },
};
use kiam_core::preflight::{Check, Topic::Hooks};

/// The beginning of the names of the agent's own programs.
const OWN: &str = "kiam";
/// The beginnings of the names of Cilium's socket load balancer, in newer and older releases.
const CILIUM: [&str; 3] = ["cil_sock", "sock4_", "sock6_"];
/// `BPF_F_ALLOW_OVERRIDE` and `BPF_F_ALLOW_MULTI`: a program that was attached with neither allows no other below.
const ALLOWS_OTHERS: u32 = 3;

/// A program of somebody else.
#[derive(Debug)]
struct Foreign {
    hook: Hook,
    name: String,
    cgroup: PathBuf,
    /// Whether it lets nobody attach a program below.
    exclusive: bool,
}

/// Attaches a program that does nothing at each hook, for a moment, and reads who else has some there.
pub(super) fn check(cgroup: &Cgroup, guard: GuardConfig) -> Check {
    let others = match others(cgroup) {
        Ok(others) => others,
        Err(error) => {
            let finding = format!("the attached programs can't be listed: {error}");
            return Check::unknown(Hooks, finding, "see capabilities and seccomp");
        }
    };
    let target = cgroup.directory().as_raw_fd().unsigned_abs();
    for hook in Hook::OF_CGROUPS {
        if let Err(error) = hook.try_at(target) {
            return refused(hook, &error, &others);
        }
    }
    judge(&others, guard)
}

/// The programs of others at the agent's hooks, at the pods' cgroup and above.
fn others(cgroup: &Cgroup) -> io::Result<Vec<Foreign>> {
    let above = above(cgroup).map_err(io::Error::other)?;
    let mut others = Vec::new();
    for path in std::iter::once(cgroup.path().to_owned()).chain(above) {
        let directory = File::open(&path)?;
        for hook in Hook::OF_CGROUPS {
            let attached = match hook.attached(&directory) {
                Ok(attached) => attached,
                // An older kernel has no such hook, which the try shows.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(error) => return Err(error),
            };
            let exclusive = attached.flags & ALLOWS_OTHERS == 0;
            for id in attached.ids {
                let name = program_name(id).unwrap_or_else(|_| format!("program {id}"));
                if !name.starts_with(OWN) {
                    let name = if name.is_empty() { format!("program {id}") } else { name };
                    others.push(Foreign { hook, name, cgroup: path.clone(), exclusive });
                }
            }
        }
    }
    Ok(others)
}

fn refused(hook: Hook, error: &io::Error, others: &[Foreign]) -> Check {
    let finding = format!("no program can be attached at {}: {error}", hook.name);
    match others.iter().find(|other| other.exclusive && other.hook == hook) {
        Some(other) => Check::fail(
            Hooks,
            format!(
                "{finding}: {} at {} allows no other program there or below",
                other.name,
                other.cgroup.display()
            ),
            format!(
                "have its owner attach it with BPF_F_ALLOW_MULTI, or remove it: bpftool cgroup show {}",
                other.cgroup.display()
            ),
        ),
        None => Check::fail(
            Hooks,
            finding,
            "see kernel, capabilities and seccomp; docs/kernels.md has the kernel that each hook needs",
        ),
    }
}

fn judge(others: &[Foreign], guard: GuardConfig) -> Check {
    let rewriting = others.iter().filter(|other| other.hook.rewrites);
    let mut named: Vec<String> = rewriting
        .map(|Foreign { hook, name, cgroup, .. }| {
            format!("{name} ({}) at {}", hook.name, cgroup.display())
        })
        .collect();
    named.dedup();
    if named.is_empty() {
        return Check::ok(Hooks, "programs can be attached, and nobody else rewrites addresses");
    }
    let is_cilium =
        others.iter().any(|other| CILIUM.iter().any(|name| other.name.starts_with(name)));
    let finding = format!("other programs may rewrite what pods connect to: {}", listed(&named, 4));
    match (is_cilium, guard.uplink) {
        (true, true) => Check::ok(Hooks, format!("{finding}: Cilium, with --guard=uplink")),
        (true, false) => Check::warn(
            Hooks,
            finding,
            "these are Cilium's: add uplink to --guard, as pods' packets may bypass the node's routing (docs/guard.md)",
        ),
        (false, _) => Check::warn(
            Hooks,
            finding,
            "the agent drops packets to the metadata service, too, where these are above the pods' cgroup; find out whose they are, and that they leave 169.254.169.254 alone",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict;

    use super::*;

    fn foreign(hook: usize, name: &str) -> Foreign {
        let hook = Hook::OF_CGROUPS[hook];
        Foreign { hook, name: name.to_owned(), cgroup: "/sys/fs/cgroup".into(), exclusive: false }
    }

    #[test]
    fn programs_that_rewrite_are_named_and_ciliums_have_their_own_remedy() {
        let guard = |uplink| GuardConfig { uplink, ..GuardConfig::default() };
        assert_eq!(judge(&[], guard(false)).verdict, Verdict::Ok);
        // At bind.
        assert_eq!(judge(&[foreign(0, "somebody")], guard(false)).verdict, Verdict::Ok);
        for (name, with_uplink) in [("somebody", Verdict::Warn), ("sock4_connect", Verdict::Ok)] {
            assert_eq!(judge(&[foreign(2, name)], guard(true)).verdict, with_uplink, "{name}");
        }
        for (name, remedy) in [("somebody", "whose they are"), ("cil_sock4_conne", "Cilium")] {
            let check = judge(&[foreign(2, name), foreign(3, name)], guard(false));
            assert_eq!(check.verdict, Verdict::Warn);
            assert!(check.finding.contains(&format!("{name} (connect4)")), "{check:?}");
            assert!(check.finding.contains(&format!("{name} (connect6)")), "{check:?}");
            assert!(check.remedy.as_deref().unwrap().contains(remedy), "{check:?}");
        }
    }

    #[test]
    fn what_keeps_others_out_is_named() {
        let error = io::Error::from_raw_os_error(libc::EPERM);
        let exclusive = Foreign { exclusive: true, ..foreign(2, "alone") };
        let check = refused(Hook::OF_CGROUPS[2], &error, &[exclusive]);
        assert!(check.finding.contains("alone at /sys/fs/cgroup allows no other"), "{check:?}");
        let check = refused(Hook::OF_CGROUPS[2], &error, &[foreign(2, "others")]);
        assert!(!check.finding.contains("others"), "{check:?}");
        assert_eq!(check.verdict, Verdict::Fail);
    }
}

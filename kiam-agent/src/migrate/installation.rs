//! Finds the installation: which containers are kiam's or kube2iam's, and of which version.

use super::{
    Error, Selection,
    objects::{Container, Inventory, Workload},
    printable::printable,
    words::{Setting, base_name, command_line, settings, written_line},
};
use crate::peers::{self, Program, Releases};

/// An installation of kiam or kube2iam.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    /// The parts, each program once: the agent's or kube2iam's first.
    pub(super) parts: Vec<Part>,
    /// The version of kiam, if it is known, and how.
    pub(super) version: Option<(u8, Evidence)>,
    /// The image's tag, for the report.
    pub(super) tag: Option<String>,
}

/// A program of the installation.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) program: Program,
    pub(super) workload: Workload,
    pub(super) container: Container,
    pub(super) settings: Vec<Setting>,
    /// Words that are neither flags nor values.
    pub(super) strays: Vec<String>,
}

/// What says which version it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    CommandLine,
    Tag,
    Flags,
}

// === impl Installation ===

impl Installation {
    /// The installation that `inventory` has.
    pub(super) fn find(
        inventory: &Inventory,
        selection: &Selection,
        given: Option<u8>,
    ) -> Result<Self, Error> {
        // Whoever may create pods could pass for a part by one, and an installation has controllers.
        let is_candidate = |it: &&Workload| it.kind != "Pod" && !it.is_owned && selection.has(it);
        let workloads = inventory.workloads.iter().filter(is_candidate);
        let found: Vec<Part> = workloads.flat_map(parts_of).collect();
        are_of_one_installation(&found, selection)?;
        let mut parts: Vec<Part> = Vec::new();
        for part in found {
            match parts.iter().find(|other| other.program == part.program) {
                None => parts.push(part),
                Some(other) if other.settings == part.settings => {}
                Some(other) => {
                    let (one, other) = (other.source(), part.source());
                    return Err(Error::SeveralAlike { program: part.program, one, other });
                }
            }
        }
        parts.sort_by_key(|part| part.program);
        if parts.is_empty() {
            return Err(Error::NothingFound {
                workloads: inventory.workloads.len(),
                others: inventory.others,
                without_kind: inventory.without_kind,
                selected: selection.to_string(),
            });
        }
        let tag = parts.iter().find_map(|part| tag(&part.container.image)).map(str::to_owned);
        let version = version(&parts, tag.as_deref(), given)?;
        Ok(Self { parts, version, tag })
    }

    /// The part that runs `program`.
    pub(super) fn part(&self, program: Program) -> Option<&Part> {
        self.parts.iter().find(|part| part.program == program)
    }

    /// The part on every node, which intercepts.
    pub(super) fn agent(&self) -> Option<&Part> {
        self.parts.iter().find(|part| part.program != Program::Server)
    }

    pub(super) fn is_kube2iam(&self) -> bool {
        self.part(Program::Kube2iam).is_some()
    }

    /// The value of a flag that the programs take, if it is set.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        let mut settings = self.parts.iter().flat_map(|part| &part.settings);
        settings.find(|setting| setting.name == name).map(|setting| setting.value.as_str())
    }

    /// Whether a switch is on.
    pub(super) fn has(&self, name: &str) -> bool {
        let mut settings = self.parts.iter().flat_map(|part| &part.settings);
        settings.any(|setting| setting.name == name && setting.is_on())
    }
}

// === impl Part ===

impl Part {
    /// The workload and where it was read, for messages.
    fn source(&self) -> String {
        printable(&format!("{} ({})", self.workload.title(), self.workload.place))
    }

    fn is_of_another_peer(&self, other: &Self) -> bool {
        (self.program == Program::Kube2iam) != (other.program == Program::Kube2iam)
    }
}

/// Whether `parts` can be one installation. Any tenant may run a program by kiam's name, and its flags must not count.
fn are_of_one_installation(parts: &[Part], selection: &Selection) -> Result<(), Error> {
    let Some(one) = parts.first() else { return Ok(()) };
    if let Some(other) = parts.iter().find(|part| part.is_of_another_peer(one)) {
        return Err(Error::BothPeers { one: one.source(), other: other.source() });
    }
    let is_of_one = parts.iter().all(|part| part.workload.namespace == one.workload.namespace);
    if !is_of_one && !parts.iter().all(|part| selection.names_exactly(&part.workload)) {
        return Err(Error::SeveralNamespaces { parts: parts.iter().map(Part::source).collect() });
    }
    let (first, later): (Vec<_>, Vec<_>) =
        parts.iter().partition(|part| part.program == Program::Kiam);
    match (first.first(), later.first()) {
        (Some(first), Some(later)) => {
            Err(Error::SeveralVersions { first: first.source(), later: later.source() })
        }
        _ => Ok(()),
    }
}

/// The parts of the installation that `workload` runs.
fn parts_of(workload: &Workload) -> Vec<Part> {
    let part = |container: &Container| {
        // By what is written: variables of all pods of a cluster need no expansion.
        identify(container, &written_line(container))?;
        let words = command_line(container);
        let (program, rest) = identify(container, &words)?;
        let (settings, strays) = settings(rest, Releases::of(program, None));
        let (workload, container) = (workload.clone(), container.clone());
        Some(Part { program, workload, container, settings, strays })
    };
    workload.containers.iter().filter_map(part).collect()
}

/// The program that `container` runs with `words`, and the words after its name.
fn identify<'a>(container: &Container, words: &'a [String]) -> Option<(Program, &'a [String])> {
    let first = words.first().map_or("", |word| match word.starts_with('-') {
        // Its value may have slashes.
        true => word.as_str(),
        false => base_name(word),
    });
    let second = words.get(1).map(String::as_str);
    match (first, second) {
        ("kube2iam", _) => return Some((Program::Kube2iam, &words[1..])),
        ("kiam", Some("agent")) => return Some((Program::Agent, &words[2..])),
        ("kiam", Some("server")) => return Some((Program::Server, &words[2..])),
        // What it is for is not a part of the installation.
        ("kiam", Some("health")) => return None,
        ("kiam", _) => return Some((Program::Kiam, &words[1..])),
        _ => {}
    }
    let image = repository(&container.image);
    let flags = if first.starts_with('-') { words } else { words.get(1..).unwrap_or_default() };
    let is_kiam = image == "kiam" || image.starts_with("kiam-") || has_all(flags, &["cert", "ca"]);
    match first {
        "agent" if is_kiam => Some((Program::Agent, flags)),
        "server" if is_kiam => Some((Program::Server, flags)),
        _ if image.contains("kube2iam") && (first.is_empty() || first.starts_with('-')) => {
            Some((Program::Kube2iam, flags))
        }
        _ if first.starts_with('-') => by_flags(flags).map(|program| (program, flags)),
        _ => None,
    }
}

/// The program that alone has such flags. An image may have any name.
fn by_flags(words: &[String]) -> Option<Program> {
    let candidates: [(Program, &[&[&str]]); 4] = [
        (
            Program::Kube2iam,
            &[
                &["base-role-arn"],
                &["auto-discover-base-arn"],
                &["auto-discover-default-role"],
                &["app-port", "host-interface"],
            ],
        ),
        (Program::Agent, &[&["server-address", "cert", "ca"]]),
        (Program::Server, &[&["bind", "cert", "ca"]]),
        (Program::Kiam, &[&["role-base-arn", "iptables"], &["role-base-arn", "host-interface"]]),
    ];
    // The agent's own flags that none of theirs has: another run of this agent, not an installation of theirs.
    if ["node-name", "namespace-policy", "grace-period"].iter().any(|flag| has_all(words, &[flag]))
    {
        return None;
    }
    let found = candidates.into_iter().find(|(_, sets)| sets.iter().any(|set| has_all(words, set)));
    found.map(|(program, _)| program)
}

fn has_all(words: &[String], flags: &[&str]) -> bool {
    let has = |flag: &&str| {
        words.iter().any(|word| {
            let name = word.strip_prefix("--").map(|it| it.split('=').next().unwrap_or(it));
            name == Some(flag)
        })
    };
    flags.iter().all(has)
}

/// The image's name, without registry, tag and digest.
fn repository(image: &str) -> &str {
    let name = base_name(image.split('@').next().unwrap_or(image));
    name.split(':').next().unwrap_or(name)
}

/// The image's tag.
fn tag(image: &str) -> Option<&str> {
    base_name(image.split('@').next().unwrap_or(image)).split_once(':').map(|(_, tag)| tag)
}

/// The version of kiam, by the command line of this program, the image's tag, or flags that only some versions have.
fn version(
    parts: &[Part],
    tag: Option<&str>,
    given: Option<u8>,
) -> Result<Option<(u8, Evidence)>, Error> {
    let is_kube2iam = parts.iter().any(|part| part.program == Program::Kube2iam);
    let is_first = parts.iter().any(|part| part.program == Program::Kiam);
    if let Some(major) = given {
        if is_kube2iam || is_first != (major == 1) {
            let found = parts.iter().map(Part::source).next().unwrap_or_default();
            return Err(Error::OtherVersion { given: major, found });
        }
        return Ok(Some((major, Evidence::CommandLine)));
    }
    if is_kube2iam {
        return Ok(None);
    }
    if is_first {
        return Ok(Some((1, Evidence::Flags)));
    }
    let tagged = tag.and_then(|tag| {
        let number = tag.trim_start_matches('v').split(['.', '-']).next()?;
        number.parse().ok().filter(|major| (2..=4).contains(major))
    });
    if let Some(major) = tagged {
        return Ok(Some((major, Evidence::Tag)));
    }
    let of_flags: Vec<u8> = (2..=4).filter(|major| has_the_flags(parts, *major)).collect();
    Ok(match of_flags[..] {
        [major] => Some((major, Evidence::Flags)),
        _ => None,
    })
}

/// Whether version `major` has all flags that are set and known.
fn has_the_flags(parts: &[Part], major: u8) -> bool {
    parts.iter().all(|part| {
        // v2 had a program for each; later ones have words.
        let first = part.container.command.first().map_or("", |word| base_name(word));
        let is_own_program = first == "agent" || first == "server";
        let release = Releases::of(part.program, Some(major));
        let mut known = part.settings.iter().filter(|setting| setting.is_known);
        is_own_program == (major == 2)
            && known.all(|setting| peers::flag(&setting.name, release).is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(image: &str, line: &str) -> Option<Program> {
        let args = line.split_whitespace().map(str::to_owned).collect();
        let container = Container { image: image.to_owned(), args, ..Container::default() };
        identify(&container, &command_line(&container)).map(|(program, _)| program)
    }

    #[test]
    fn containers_are_known_by_their_words_their_image_or_their_flags() {
        let cases = [
            ("quay.io/uswitch/kiam:v3.6", "/kiam agent --port=8181", Some(Program::Agent)),
            ("mirror/x@sha256:00", "kiam server --sync=1m", Some(Program::Server)),
            ("quay.io/uswitch/kiam:v3.6", "agent --port=8181", Some(Program::Agent)),
            ("registry:5000/infra/kiam-agent", "agent --port=8181", Some(Program::Agent)),
            ("quay.io/uswitch/kiam:v2.8", "/agent --port=8181", Some(Program::Agent)),
            ("quay.io/uswitch/kiam:v2.8", "/server --sync=1m", Some(Program::Server)),
            ("uswitch/kiam:latest", "/kiam --role-base-arn=x", Some(Program::Kiam)),
            ("jtblin/kube2iam:0.10.9", "", Some(Program::Kube2iam)),
            ("jtblin/kube2iam:0.10.9", "--verbose", Some(Program::Kube2iam)),
            ("mirror/iam-proxy:1", "kube2iam --verbose", Some(Program::Kube2iam)),
            ("mirror/iam-proxy:1", "--auto-discover-base-arn", Some(Program::Kube2iam)),
            ("x", "--server-address=a --cert=b --key=c --ca=d", Some(Program::Agent)),
            ("x", "--bind=a --cert=b --key=c --ca=d", Some(Program::Server)),
            ("x", "server --bind=a --cert=b --key=c --ca=d", Some(Program::Server)),
            ("x", "--role-base-arn=a --iptables", Some(Program::Kiam)),
            // This agent, a probe, and programs of others.
            ("kiam-agent:0.1.0", "--host=$(HOST_IP) --node-name=$(NODE_NAME)", None),
            ("x", "--role-base-arn=a --iptables --namespace-policy=required", None),
            ("quay.io/uswitch/kiam:v3.6", "/kiam health --cert=x", None),
            ("hashicorp/consul", "agent --server", None),
            ("nginx", "", None),
        ];
        for (image, line, expected) in cases {
            assert_eq!(program(image, line), expected, "{image} {line}");
        }
    }

    #[test]
    fn images_have_a_name_and_maybe_a_tag() {
        for (image, name, its_tag) in [
            ("quay.io/uswitch/kiam:v3.6", "kiam", Some("v3.6")),
            ("registry:5000/kiam", "kiam", None),
            ("registry:5000/a/kiam:4@sha256:00", "kiam", Some("4")),
            ("kube2iam@sha256:00", "kube2iam", None),
        ] {
            assert_eq!((repository(image), tag(image)), (name, its_tag), "{image}");
        }
    }
}

//! The software bill of materials, in CycloneDX 1.5: every crate that is compiled into the agent and into the kernel programs,
//! and what is linked or copied from Debian.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask::command::{command, output_of, workspace};
use xtask::oci::digest;

use super::Release;
use crate::tasks::kernels::Architecture;

const REGISTRY_FIELDS: [&str; 3] = ["name", "version", "checksum"];

/// A crate, as `cargo tree` lists it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
    licence: String,
}

/// The document of the agent for that architecture.
pub(super) fn of(architecture: Architecture, release: &Release) -> Result<String> {
    let lock = fs::read_to_string(workspace().join("Cargo.lock")).context("reading Cargo.lock")?;
    let checksums = checksums(&lock);
    let mut crates = BTreeSet::new();
    for (package, target) in [("kiam-agent", Some(architecture.triple())), ("kiam-ebpf", None)] {
        crates.extend(tree(package, target)?);
    }
    let mut components: Vec<Value> =
        crates.iter().map(|found| component(found, &checksums)).collect();
    components.extend(debian(architecture));
    let serial = uuid(&Value::from(components.clone()).to_string());
    let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(release.created);
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": format!("urn:uuid:{serial}"),
        "version": 1,
        "metadata": {
            "timestamp": humantime::format_rfc3339_seconds(created).to_string(),
            "component": {
                "type": "application",
                "bom-ref": "kiam-agent",
                "name": "kiam-agent",
                "version": release.version,
                "purl": format!("pkg:github/kiam-ebpf/kiam-ebpf@{}", release.commit),
                "licenses": [{ "expression": "Apache-2.0" }],
            },
        },
        "components": components,
    });
    Ok(format!("{document:#}\n"))
}

/// What is compiled into `package`: not what its tests and build scripts use.
fn tree(package: &str, target: Option<&str>) -> Result<BTreeSet<Crate>> {
    let mut tree = command("cargo");
    tree.args(["tree", "--locked", "--package", package, "--edges", "normal,no-proc-macro"]);
    tree.args(["--prefix", "none", "--format", "{p}|{l}"]);
    tree.args(target.iter().flat_map(|target| ["--target", target]));
    let listed = output_of(&mut tree).with_context(|| format!("cargo tree lists no {package}"))?;
    Ok(listed.lines().filter_map(parsed).collect())
}

/// `serde v1.0.0|MIT OR Apache-2.0`, or `kiam-core v0.1.0 (/a/path)|Apache-2.0 (*)`.
fn parsed(line: &str) -> Option<Crate> {
    let (package, licence) = line.split_once('|')?;
    let mut words = package.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    // Older crates write a slash for "or".
    let licence = licence.trim_end_matches(" (*)").replace('/', " OR ");
    Some(Crate { name: name.to_owned(), version: version.to_owned(), licence })
}

/// The registry's SHA-256 of each crate, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let entry = |entry: &str| {
        let [name, version, checksum] = REGISTRY_FIELDS.map(|field| {
            let value =
                |line: &str| Some(line.strip_prefix(field)?.strip_prefix(" = ")?.to_owned());
            entry.lines().find_map(value).map(|value| value.trim_matches('"').to_owned())
        });
        Some(((name?, version?), checksum?))
    };
    lock.split("[[package]]").filter_map(entry).collect()
}

fn component(found: &Crate, checksums: &BTreeMap<(String, String), String>) -> Value {
    let Crate { name, version, licence } = found;
    let purl = format!("pkg:cargo/{name}@{version}");
    let mut component = json!({ "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl });
    if !licence.is_empty() {
        component["licenses"] = json!([{ "expression": licence }]);
    }
    if let Some(checksum) = checksums.get(&(name.clone(), version.clone())) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    component
}

/// Debian's packages whose files are in the image: the C library is linked in, the CA bundle is copied.
fn debian(architecture: Architecture) -> Vec<Value> {
    let libc = match architecture {
        Architecture::Amd64 => "libc6-dev",
        Architecture::Arm64 => "libc6-dev-arm64-cross",
    };
    let component = |package: &str| {
        let mut query = command("dpkg-query");
        let version = output_of(query.args(["-W", "-f", "${Version}", package]))?;
        let purl = format!("pkg:deb/debian/{package}@{version}");
        Some(json!({
            "type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl,
        }))
    };
    [libc, "ca-certificates"].into_iter().filter_map(component).collect()
}

/// A UUID (version 8, of RFC 9562: made by a rule of our own) that is the same for the same text.
fn uuid(text: &str) -> String {
    let digest = digest(text.as_bytes());
    let hex = digest.trim_start_matches("sha256:");
    format!("{}-{}-8{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_read_with_their_licences_and_without_paths() {
        let known = |line| parsed(line).unwrap();
        let serde = known("serde v1.0.1|MIT/Apache-2.0");
        assert_eq!(
            (serde.version.as_str(), serde.licence.as_str()),
            ("1.0.1", "MIT OR Apache-2.0")
        );
        let core = known("kiam-core v0.1.0 (/somewhere/core)|Apache-2.0 (*)");
        assert_eq!((core.name.as_str(), core.licence.as_str()), ("kiam-core", "Apache-2.0"));
        assert_eq!(parsed(""), None);
    }

    #[test]
    fn registry_crates_have_their_checksum_and_workspace_members_none() {
        let lock = fs::read_to_string(workspace().join("Cargo.lock")).unwrap();
        let checksums = checksums(&lock);
        let of = |name: &str| checksums.iter().find(|((found, _), _)| found == name);
        assert_eq!(of("serde").unwrap().1.len(), 64);
        assert_eq!(of("kiam-agent"), None);
    }

    #[test]
    fn document_names_what_the_agent_is_made_of_and_not_what_its_tests_use() {
        let release =
            Release { version: "1".to_owned(), commit: "c".to_owned(), created: 1_700_000_000 };
        let document = of(Architecture::Amd64, &release).unwrap();
        let document: Value = serde_json::from_str(&document).unwrap();
        let names: BTreeSet<&str> = document["components"]
            .as_array()
            .unwrap()
            .iter()
            .map(|component| component["name"].as_str().unwrap())
            .collect();
        for wanted in ["aya", "aya-ebpf", "hyper", "kiam-common", "ring", "rustls"] {
            assert!(names.contains(wanted), "no {wanted} in {names:?}");
        }
        for unwanted in ["tempfile", "prost", "serde_derive"] {
            assert!(!names.contains(unwanted), "{unwanted} is not in the agent");
        }
        assert_eq!(document["metadata"]["timestamp"], "2023-11-14T22:13:20Z");
    }
}

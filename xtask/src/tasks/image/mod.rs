//! The container image: a static agent and the CA bundle. Neither a path nor a time of the machine goes into it, so that the
//! same commit and compilers make the same bytes, which [`test`] compares.

mod sbom;
pub(crate) mod test;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;
use xtask::{
    build,
    command::{command, output_of, run, say, workspace},
    oci::{Layout, Root, Settings},
};

use super::kernels::{Architecture, Debian, compiler_for_arm64, cross};

/// Whom the agent trusts when it asks STS: Debian's package `ca-certificates`.
const TRUST: &str = "/etc/ssl/certs/ca-certificates.crt";
const SOURCE: &str = "https://github.com/kiam-ebpf/kiam-ebpf";

/// What to build, and where.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The processors to build for, separated by commas. Compiling for arm64 on x86_64 needs Debian.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "amd64,arm64")]
    arch: Vec<Processor>,
    /// The folder that becomes `oci/`, `root-<arch>/`, `kiam-agent-<version>-<arch>.tar` and the SBOMs. What it has of
    /// these is replaced.
    #[arg(long, default_value = "target/image")]
    output: PathBuf,
}

/// A processor, by Go's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Processor {
    Amd64,
    Arm64,
}

/// What of a commit every build of it shares.
struct Release {
    version: String,
    /// The full hash, with `-dirty` where files differ from it.
    commit: String,
    /// The time of the commit, or `SOURCE_DATE_EPOCH`, in seconds since 1970.
    created: u64,
}

/// Builds the image for each processor.
pub(crate) fn build(options: &Options) -> Result<()> {
    let release = Release::read()?;
    let output = workspace().join(&options.output);
    build::ebpf()?;
    fs::create_dir_all(&output).with_context(|| format!("making {}", output.display()))?;
    let name = format!("kiam-agent:{}", release.version);
    let mut layout = Layout::new(&name, release.created);
    for processor in &options.arch {
        let bill = sbom::of(processor.architecture(), &release)?;
        let root = root(*processor, &release, &bill)?;
        let stem = format!("kiam-agent-{}-{}", release.version, processor.name());
        write(&output.join(format!("{stem}.cdx.json")), bill.as_bytes())?;
        root.unpack(&emptied(output.join(format!("root-{}", processor.name())))?)?;
        let mut alone = Layout::new(&name, release.created);
        let digest = alone.add(&root, &settings(*processor, &release))?;
        layout.extend(&alone);
        let archive = output.join(format!("{stem}.tar"));
        alone.write_archive(&archive)?;
        say(format!("{stem}.tar, {}, {digest}", megabytes(&archive)?));
    }
    let digest = layout.write_folder(&emptied(output.join("oci"))?)?;
    say(format!("{name} is in {}, {digest}", output.display()));
    Ok(())
}

/// A folder that does not exist any more.
pub(super) fn emptied(folder: PathBuf) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    Ok(folder)
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("writing {}", path.display()))
}

fn megabytes(path: &Path) -> Result<String> {
    let size = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.len();
    Ok(format!("{}.{} MB", size / 1_000_000, size / 100_000 % 10))
}

fn root(processor: Processor, release: &Release, bill: &str) -> Result<Root> {
    let agent = fs::read(processor.agent(release)?).context("reading the agent")?;
    let trust = fs::read(TRUST)
        .with_context(|| format!("reading {TRUST}: apt-get install ca-certificates"))?;
    let mut root = Root::default();
    root.file("usr/local/bin/kiam-agent", 0o755, agent)
        .file(TRUST.trim_start_matches('/'), 0o644, trust)
        .file("usr/share/sbom/kiam-agent.cdx.json", 0o644, bill.as_bytes().to_vec());
    Ok(root)
}

/// There is no `User`: to load BPF programs and to enter pods' network namespaces takes root and the capabilities that the
/// DaemonSet's `privileged` gives.
fn settings(processor: Processor, release: &Release) -> Settings {
    let labels = BTreeMap::from([
        ("org.opencontainers.image.title", "kiam-agent"),
        ("org.opencontainers.image.description", "AWS credentials for Kubernetes pods, by eBPF"),
        ("org.opencontainers.image.source", SOURCE),
        ("org.opencontainers.image.licenses", "Apache-2.0"),
        ("org.opencontainers.image.version", &release.version),
        ("org.opencontainers.image.revision", &release.commit),
    ]);
    let annotations =
        labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Settings {
        architecture: processor.name().to_owned(),
        created: release.created,
        config: json!({
            "Entrypoint": ["kiam-agent"],
            "Env": ["PATH=/usr/local/bin"],
            "Labels": labels,
        }),
        annotations,
    }
}

// === impl Processor ===

impl Processor {
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    fn architecture(self) -> Architecture {
        match self {
            Self::Amd64 => Architecture::Amd64,
            Self::Arm64 => Architecture::Arm64,
        }
    }

    /// Compiles the agent. It is static, so that the image needs no C library; glibc's resolver reads `/etc/resolv.conf` in
    /// static programs, too.
    fn agent(self, release: &Release) -> Result<PathBuf> {
        let triple = self.architecture().triple();
        let mut cargo = command("cargo");
        cargo.args(["build", "--release", "--locked", "--package", "kiam-agent"]);
        cargo.env("KIAM_COMMIT", short(&release.commit));
        // Relocations that take bits instead of 24 bytes each, where the linker knows them.
        let packed = "-C link-arg=-Wl,-z,pack-relative-relocs";
        let flags = format!("-C target-feature=+crt-static {packed} {}", build::remapped());
        if has_std(triple) {
            cargo.args(["--target", triple, "--target-dir", "target/static"]);
            let variable = triple.replace('-', "_").to_uppercase();
            cargo.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), flags);
            run(&mut cargo)?;
            return Ok(built("static", triple));
        }
        ensure!(
            self == Self::Arm64 && Path::new("/usr/bin/apt-get").exists(),
            "this machine's Rust has no standard library for {triple}: rustup target add {triple}"
        );
        let folder = workspace().join("target/tools/kernels");
        let sysroot = folder.join("arm64");
        compiler_for_arm64(&Debian::open(&folder)?, &sysroot)?;
        cross(&mut cargo, &sysroot, &flags);
        run(&mut cargo)?;
        Ok(built("arm64", triple))
    }
}

fn built(folder: &str, triple: &str) -> PathBuf {
    workspace().join("target").join(folder).join(triple).join("release/kiam-agent")
}

/// Whether the compiler that cargo takes by itself can compile for `triple`.
fn has_std(triple: &str) -> bool {
    let mut rustc = command("rustc");
    let folder = output_of(rustc.args(["--print", "target-libdir", "--target", triple]));
    folder.is_some_and(|folder| Path::new(folder.trim()).exists())
}

fn short(commit: &str) -> String {
    let (hash, dirty) = commit.split_once('-').unwrap_or((commit, ""));
    let hash: String = hash.chars().take(12).collect();
    if dirty.is_empty() { hash } else { format!("{hash}-{dirty}") }
}

// === impl Release ===

impl Release {
    fn read() -> Result<Self> {
        let git = |arguments: &[&str]| output_of(command("git").args(arguments));
        let commit = env::var("KIAM_COMMIT").ok().or_else(|| {
            let commit = git(&["rev-parse", "HEAD"])?.trim().to_owned();
            let changed = git(&["status", "--porcelain"])?;
            Some(if changed.trim().is_empty() { commit } else { format!("{commit}-dirty") })
        });
        let created = env::var("SOURCE_DATE_EPOCH").ok();
        let created = created.or_else(|| git(&["show", "--no-patch", "--format=%ct", "HEAD"]));
        let created = created.unwrap_or_else(|| "0".to_owned());
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit.unwrap_or_else(|| "unknown".to_owned()),
            created: created.trim().parse().with_context(|| {
                format!("SOURCE_DATE_EPOCH is {:?}, not seconds since 1970", created.trim())
            })?,
        })
    }
}

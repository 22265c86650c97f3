//! QEMU and kernels from Debian's packages, by an apt of our own: its lists, sources and downloads are in one folder, and
//! nothing of the machine's changes.

use std::{
    cmp::Reverse,
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{architecture::Architecture, fresh};
use xtask::{
    command::{command, output_of, run, say},
    toolchain,
};

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where QEMU and the kernels are: what the security team has, and the rest.
const SECURITY: [&str; 2] = ["bullseye-security", "bookworm-security"];
const MAIN: [&str; 3] = ["bookworm", "bookworm-backports", "trixie-backports"];
const QEMU_SUITE: &str = "bookworm-backports";
const QEMU: [&str; 2] = ["qemu-system-x86", "qemu-system-arm"];
/// The modules that the tests need, in the order they are loaded; a kernel may have them built in.
const MODULES: [&str; 32] = [
    "veth",
    "dummy",
    "llc",
    "stp",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "unix_diag",
    "libcrc32c",
    "nfnetlink",
    "nf_defrag_ipv4",
    "nf_defrag_ipv6",
    "nf_conntrack",
    "nf_nat",
    "nf_tables",
    "nft_ct",
    "nft_counter",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_redir",
    "nft_fib",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_fib_inet",
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_sh",
];
/// Names the modules that were looked for, of a kernel that was unpacked.
const LOOKED_FOR: &str = "modules";
/// Versions of one series that are tried: an index may be ahead of the archive.
const TRIES: usize = 3;

const IMAGE: &str = "linux-image-";
/// From 6.19 the image is in a package of its own, and the modules in another.
const BINARY: &str = "linux-binary-";
const SPLIT_MODULES: &str = "linux-modules-";

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Series {
    /// The newest of a series.
    Named(u32, u32),
    /// The newest of all.
    Newest,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(major, minor) => write!(f, "{major}.{minor}"),
            Self::Newest => f.write_str("newest"),
        }
    }
}

/// A kernel, unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` has it.
    pub(super) name: String,
    pub(super) architecture: Architecture,
    /// The image.
    pub(super) image: PathBuf,
    /// Modules, in the order to load them.
    pub(super) modules: Vec<PathBuf>,
}

/// QEMU, unpacked or the machine's own.
#[derive(Debug)]
pub(super) struct Qemu {
    /// The folder that has `usr`; `/` for the machine's own.
    pub(super) root: PathBuf,
}

/// An apt of our own.
#[derive(Debug)]
pub(crate) struct Debian {
    folder: PathBuf,
    /// Names of packages that kernels are among, one a line.
    names: String,
}

// === impl Debian ===

impl Debian {
    /// Sets it up in `folder`, and updates its lists.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let apt = folder.join("apt");
        for needed in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.join(needed)).context("making apt's folders")?;
        }
        let (main, security) = mirrors()?;
        let suites = MAIN.map(|suite| (&main, suite)).into_iter();
        let suites = suites.chain(SECURITY.map(|suite| (&security, suite)));
        let source = |(mirror, suite)| format!("deb [signed-by={KEYS}] {mirror} {suite} main\n");
        let sources: String = suites.map(source).collect();
        fs::write(apt.join("sources.list"), sources).context("apt's sources")?;
        let shown = apt.display();
        // The machine's packages count as installed: only the libraries that it lacks are downloaded with QEMU.
        let settings = format!(
            "Dir::State \"{shown}\";\nDir::State::status \"/var/lib/dpkg/status\";\nDir::Cache \"{shown}/cache\";\n\
             Dir::Etc::sourcelist \"{shown}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\nDebug::NoLocking \"true\";\nAcquire::Languages \"none\";\n\
             APT::Sandbox::User \"root\";\nAPT::Architectures {{ \"amd64\"; \"arm64\"; }};\n"
        );
        fs::write(apt.join("apt.conf"), settings).context("apt's settings")?;
        let mut debian = Self { folder: folder.to_owned(), names: String::new() };
        let mut update = debian.apt("apt-get");
        // A list that can't be had is an error, and the old one is not taken for it.
        update.args(["update", "--quiet", "--option", "APT::Update::Error-Mode=any"]);
        run(&mut update).context("apt has no lists of Debian's kernels: is there a network?")?;
        let names = output_of(debian.apt("apt-cache").args(["pkgnames", "linux-"]));
        debian.names = names.context("apt has no list of packages")?;
        Ok(debian)
    }

    fn apt(&self, program: &str) -> Command {
        let mut apt = command(program);
        apt.env("APT_CONFIG", self.folder.join("apt/apt.conf"));
        apt
    }

    /// The machine's QEMU, or Debian's.
    pub(super) fn qemu(&self) -> Result<Qemu> {
        let whole = |root: &Path| {
            let programs = [Architecture::Amd64, Architecture::Arm64].map(Architecture::qemu);
            programs.iter().all(|program| root.join("usr/bin").join(program).exists())
        };
        if whole(Path::new("/")) {
            return Ok(Qemu { root: PathBuf::from("/") });
        }
        let root = self.folder.join("qemu");
        if !whole(&root) {
            let mut download = self.apt("apt-get");
            download.args(["install", "--quiet", "--yes", "--download-only"]);
            download.args(["--no-install-recommends", "-t", QEMU_SUITE]).args(QEMU);
            run(&mut download)?;
            fresh(&root)?;
            for package in files(&self.folder.join("apt/cache/archives"), ".deb") {
                unpack(&package, &root)?;
            }
        }
        Ok(Qemu { root })
    }

    /// QEMU's program that runs other processors' programs on this machine's kernel.
    pub(crate) fn qemu_user(&self, architecture: Architecture) -> Result<PathBuf> {
        let root = self.folder.join("qemu-user");
        let program = root.join("usr/bin").join(architecture.qemu_user());
        if !program.exists() {
            fs::create_dir_all(&root).context("making a folder for QEMU")?;
            self.unpack_one(&format!("qemu-user/{QEMU_SUITE}"), &root)?;
        }
        Ok(program)
    }

    /// Unpacks the newest of `packages` of another architecture, with all that they depend on, in `root`.
    pub(super) fn unpack_all(
        &self,
        architecture: Architecture,
        packages: &[&str],
        root: &Path,
    ) -> Result<()> {
        let cache = self.folder.join(format!("cache-{architecture}"));
        fs::create_dir_all(cache.join("archives/partial")).context("making apt's folders")?;
        let mut download = self.apt("apt-get");
        // As on a machine of that architecture where nothing is installed.
        download.arg("--option").arg(format!("APT::Architecture={architecture}"));
        download.arg("--option").arg(format!("Dir::Cache={}", cache.display()));
        download.args(["--option", "Dir::State::status=/dev/null"]);
        download.args(["install", "--quiet", "--yes", "--download-only"]);
        run(download.arg("--no-install-recommends").args(packages))?;
        for package in files(&cache.join("archives"), ".deb") {
            unpack(&package, root)?;
        }
        Ok(())
    }

    /// Unpacks one package, as apt names it, in `root`, without what it depends on.
    pub(super) fn unpack_one(&self, package: &str, root: &Path) -> Result<()> {
        let folder = self.folder.join("download");
        fresh(&folder)?;
        let mut download = self.apt("apt-get");
        run(download.args(["download", "--quiet", package]).current_dir(&folder))?;
        files(&folder, ".deb").iter().try_for_each(|package| unpack(package, root))
    }

    /// The kernel, from an earlier run or downloaded.
    pub(super) fn kernel(&self, architecture: Architecture, series: Series) -> Result<Kernel> {
        let names: Vec<&str> = self.names.lines().collect();
        let mut failure = None;
        for version in versions(&names, architecture, series).into_iter().take(TRIES) {
            let folder = self.folder.join(&version);
            let looked_for = fs::read_to_string(folder.join(LOOKED_FOR)).unwrap_or_default();
            let kept = looked_for == MODULES.join("\n");
            let packages = packages(&names, architecture, &version);
            let fetched = if kept { Ok(()) } else { self.fetch(&packages, &folder) };
            if fetched.is_ok() {
                let module = |name| folder.join(format!("{name}.ko"));
                let modules =
                    MODULES.map(module).into_iter().filter(|path| path.exists()).collect();
                let image = folder.join("vmlinuz");
                return Ok(Kernel { name: version, architecture, image, modules });
            }
            say(format!("{version} is not to be had; trying the one before it"));
            failure = fetched.err();
        }
        match failure {
            Some(error) => Err(error.context(format!("kernel {series} for {architecture}"))),
            None => bail!("Debian's archive has no kernel {series} for {architecture}"),
        }
    }

    fn fetch(&self, packages: &[String], folder: &Path) -> Result<()> {
        if output_of(command("xz").arg("--version")).is_none() {
            say("installing Debian packages: xz-utils");
            toolchain::install_packages(&["xz-utils"])?;
        }
        let whole = self.folder.join("download");
        fresh(&whole)?;
        run(self.apt("apt-get").args(["download", "--quiet"]).args(packages).current_dir(&whole))?;
        for package in files(&whole, ".deb") {
            unpack(&package, &whole)?;
        }
        let part = self.folder.join("part");
        fresh(&part)?;
        for module in MODULES {
            if let Some(found) =
                find(&whole, &|name| name.split_once(".ko").is_some_and(|(stem, _)| stem == module))
            {
                let content = decompressed(&found)?;
                fs::write(part.join(format!("{module}.ko")), content)
                    .context("keeping a module")?;
            }
        }
        let image = find(&whole, &|name| name.starts_with("vmlinuz"))
            .context("no image is in the package")?;
        fs::copy(image, part.join("vmlinuz")).context("keeping the image")?;
        fs::write(part.join(LOOKED_FOR), MODULES.join("\n")).context("keeping modules' names")?;
        fresh(folder)?;
        fs::rename(&part, folder).context("keeping the kernel")?;
        fs::remove_dir_all(&whole).context("removing the rest")
    }
}

/// The mirrors that the machine's own apt uses: of Debian, and of its security team.
fn mirrors() -> Result<(String, String)> {
    let mut targets = command("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(SITE) $(ORIGIN) $(RELEASE)",
        "Created-By: Packages",
    ]);
    let listed = output_of(&mut targets).unwrap_or_default();
    let site = |security: bool| {
        listed.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let [site, "Debian", release] = words.as_slice() else { return None };
            (release.contains("security") == security).then(|| (*site).to_owned())
        })
    };
    let main = site(false).context("apt knows no Debian mirror: apt-get update is needed")?;
    let security = site(true).unwrap_or_else(|| format!("{}-security", main.trim_end_matches('/')));
    Ok((main, security))
}

/// Versions of the series, newest first, as `uname -r` has them.
fn versions(names: &[&str], architecture: Architecture, series: Series) -> Vec<String> {
    let flavour = architecture.flavour();
    let version = |name: &&str| {
        let name = name.strip_prefix(IMAGE).or_else(|| name.strip_prefix(BINARY))?;
        // Some names go on with `unsigned`.
        let is_version = name.starts_with(|c: char| c.is_ascii_digit());
        (is_version && name.ends_with(&flavour)).then(|| name.to_owned())
    };
    let numbers = |version: &String| {
        let digits = version.trim_end_matches(&flavour).split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|part| part.parse().ok()).collect::<Vec<u32>>()
    };
    let wanted = |version: &String| match (series, numbers(version).as_slice()) {
        // A name of two numbers is a package that only depends on the newest.
        (_, [] | [_] | [_, _]) => false,
        (Series::Newest, _) => true,
        (Series::Named(major, minor), [first, second, ..]) => (major, minor) == (*first, *second),
    };
    let mut versions: Vec<String> = names.iter().filter_map(version).filter(wanted).collect();
    versions.sort_by_cached_key(|version| Reverse(numbers(version)));
    versions.dedup();
    versions
}

/// What has the image and the modules of one version.
fn packages(names: &[&str], architecture: Architecture, version: &str) -> Vec<String> {
    let binary = format!("{BINARY}{version}");
    let parts = match names.contains(&binary.as_str()) {
        true => vec![binary, format!("{SPLIT_MODULES}{version}")],
        false => vec![format!("{IMAGE}{version}")],
    };
    parts.into_iter().map(|package| format!("{package}:{architecture}")).collect()
}

fn unpack(package: &Path, root: &Path) -> Result<()> {
    run(command("dpkg-deb").arg("-x").arg(package).arg(root))
}

fn decompressed(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(module).context("reading a module"),
    };
    let output = command(program).arg("-dc").arg(module).output();
    let output = output.with_context(|| format!("{program} is needed for {}", module.display()))?;
    ensure!(output.status.success(), "{program} can't unpack {}", module.display());
    Ok(output.stdout)
}

/// The files directly in `folder` that end so.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(end)).collect()
}

/// The first file below `folder` whose name is wanted.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.into_iter().find_map(|entry| {
        let path = entry.path();
        match entry.file_type().ok()? {
            kind if kind.is_dir() => find(&path, wanted),
            kind if kind.is_file() && wanted(entry.file_name().to_str()?) => Some(path),
            _ => None,
        }
    })
}

// === impl Qemu ===

impl Qemu {
    /// QEMU for a machine of that architecture.
    pub(super) fn command(&self, architecture: Architecture) -> Command {
        let mut qemu = command(self.root.join("usr/bin").join(architecture.qemu()));
        let share = self.root.join("usr/share");
        if self.root != Path::new("/") {
            let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
            let path = env::join_paths(libraries.map(|folder| self.root.join(folder)));
            qemu.env("LD_LIBRARY_PATH", path.expect("the workspace's path has no colon"));
            qemu.arg("-L").arg(share.join("qemu")).arg("-L").arg(share.join("seabios"));
        }
        qemu.args(architecture.machine());
        qemu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_of_a_series_is_first_and_brings_its_packages() {
        let names = [
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-unsigned",
            "linux-image-6.1.0-0.deb11.52-cloud-amd64",
            "linux-image-6.12.90+deb12.1-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-binary-unsigned-7.3.5+deb13-cloud-amd64",
            "linux-image-7.3.4+deb13-amd64",
            "linux-image-cloud-amd64",
            "linux-image-6.1.0-58-cloud-arm64",
            "linux-binary-7.3.5+deb13-cloud-arm64",
        ];
        let (amd64, arm64) = (Architecture::Amd64, Architecture::Arm64);
        let cases = [
            (amd64, Series::Named(6, 1), 3, "6.1.0-57-cloud-amd64", "linux-image-*:amd64"),
            (amd64, Series::Named(6, 12), 2, "6.12.117+deb12-cloud-amd64", "linux-image-*:amd64"),
            (
                amd64,
                Series::Newest,
                6,
                "7.3.4+deb13-cloud-amd64",
                "linux-binary-*:amd64 linux-modules-*:amd64",
            ),
            (arm64, Series::Named(6, 1), 1, "6.1.0-58-cloud-arm64", "linux-image-*:arm64"),
            (
                arm64,
                Series::Newest,
                2,
                "7.3.5+deb13-cloud-arm64",
                "linux-binary-*:arm64 linux-modules-*:arm64",
            ),
        ];
        for (architecture, series, count, newest, wanted) in cases {
            let found = versions(&names, architecture, series);
            assert_eq!((found.len(), found[0].as_str()), (count, newest), "{found:?}");
            let packages = packages(&names, architecture, newest).join(" ");
            assert_eq!(packages, wanted.replace('*', newest));
        }
    }
}

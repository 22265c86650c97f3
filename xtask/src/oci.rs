//! Container images in the OCI layout, the same bytes for the same content.
//!
//! The formats are those of the OCI image specification 1.1, and for [`Layout::write_archive`] also what `docker load` of
//! releases before 25 reads (`manifest.json`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The files of an image. Folders above them are made; everything belongs to root.
#[derive(Debug, Default)]
pub struct Root {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug)]
enum Entry {
    File { content: Vec<u8>, mode: u32 },
    Link(PathBuf),
    Folder { mode: u32 },
}

/// What an image says about itself, beside its files.
#[derive(Debug)]
pub struct Settings {
    /// Go's name of the processor, such as `amd64`.
    pub architecture: String,
    /// The time of everything in the image, in seconds since 1970 (UTC).
    pub created: u64,
    /// The `config` object of the image's configuration: `Entrypoint`, `Cmd`, `Env`, `Labels`.
    pub config: Value,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

/// Images under one name, one for each architecture.
#[derive(Debug)]
pub struct Layout {
    name: String,
    created: u64,
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Value>,
    legacy: Vec<Value>,
}

// === impl Root ===

impl Root {
    /// Adds a file, at a path relative to the root.
    pub fn file(&mut self, path: impl Into<PathBuf>, mode: u32, content: Vec<u8>) -> &mut Self {
        self.entries.insert(path.into(), Entry::File { content, mode });
        self
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: impl Into<PathBuf>, target: impl Into<PathBuf>) -> &mut Self {
        self.entries.insert(path.into(), Entry::Link(target.into()));
        self
    }

    /// Adds a folder, which may stay empty.
    pub fn folder(&mut self, path: impl Into<PathBuf>, mode: u32) -> &mut Self {
        self.entries.insert(path.into(), Entry::Folder { mode });
        self
    }

    /// Writes the files below `folder`, which must not exist.
    ///
    /// # Errors
    ///
    /// When something cannot be written.
    pub fn unpack(&self, folder: &Path) -> Result<()> {
        for (path, entry) in &self.entries {
            let path = folder.join(path);
            let parent = path.parent().expect("it is below a folder");
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
            let written = match entry {
                Entry::File { content, .. } => fs::write(&path, content),
                Entry::Link(target) => symlink(target, &path),
                Entry::Folder { .. } => fs::create_dir_all(&path),
            };
            let mode = match entry {
                Entry::File { mode, .. } | Entry::Folder { mode } => Some(*mode),
                Entry::Link(_) => None,
            };
            written
                .and_then(|()| {
                    mode.map_or(Ok(()), |mode| {
                        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
                    })
                })
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    fn layer(&self, created: u64) -> Result<Vec<u8>> {
        let mut archive = Archive::new(created);
        let mut folders = BTreeSet::new();
        for (path, entry) in &self.entries {
            for above in path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
                if !self.entries.contains_key(above) {
                    folders.insert(above);
                }
            }
            // Folders first, from the root down, which is their order.
            while let Some(folder) = folders.pop_first() {
                if archive.folders.insert(folder.to_owned()) {
                    archive.add(folder, EntryType::Directory, 0o755, &[])?;
                }
            }
            match entry {
                Entry::File { content, mode } => {
                    archive.add(path, EntryType::Regular, *mode, content)?;
                }
                Entry::Link(target) => archive.link(path, target)?,
                Entry::Folder { mode } => archive.add(path, EntryType::Directory, *mode, &[])?,
            }
        }
        archive.finish()
    }
}

// === impl Layout ===

impl Layout {
    /// One without images, to be known as `name` (such as `kiam-agent:0.1.0`), made at `created` (seconds since 1970).
    #[must_use]
    pub fn new(name: &str, created: u64) -> Self {
        let blobs = BTreeMap::new();
        Self { name: name.to_owned(), created, blobs, manifests: Vec::new(), legacy: Vec::new() }
    }

    /// Adds an image of one layer. Returns the digest of its manifest, by which registries know it.
    ///
    /// # Errors
    ///
    /// When the layer cannot be packed.
    pub fn add(&mut self, root: &Root, settings: &Settings) -> Result<String> {
        let layer = root.layer(settings.created)?;
        let packed = gzip(&layer)?;
        let created = SystemTime::UNIX_EPOCH + Duration::from_secs(settings.created);
        let created = humantime::format_rfc3339_seconds(created).to_string();
        let config = json!({
            "created": created,
            "architecture": settings.architecture,
            "os": "linux",
            "config": settings.config,
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
            "history": [{ "created": created, "created_by": "cargo xtask image" }],
        });
        let config = self.blob(CONFIG, config.to_string().into_bytes());
        let layer = self.blob(LAYER, packed);
        self.legacy.push(json!({
            "Config": blob_path(&config),
            "RepoTags": [self.name],
            "Layers": [blob_path(&layer)],
        }));
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer],
            "annotations": settings.annotations,
        });
        let mut manifest = self.blob(MANIFEST, manifest.to_string().into_bytes());
        manifest["platform"] = json!({ "architecture": settings.architecture, "os": "linux" });
        let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
        self.manifests.push(manifest);
        Ok(digest)
    }

    /// Adds the images of another layout, which were packed there.
    pub fn extend(&mut self, other: &Self) {
        self.blobs.extend(other.blobs.clone());
        self.manifests.extend_from_slice(&other.manifests);
        self.legacy.extend_from_slice(&other.legacy);
    }

    fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let (digest, size) = (digest(&bytes), bytes.len());
        self.blobs.insert(digest.clone(), bytes);
        json!({ "mediaType": media_type, "digest": digest, "size": size })
    }

    /// Writes an OCI layout into `folder`, which must not exist. Returns the digest of the index over all architectures.
    ///
    /// # Errors
    ///
    /// When something cannot be written.
    pub fn write_folder(&mut self, folder: &Path) -> Result<String> {
        let (digest, files) = self.files();
        for (path, content) in files {
            let path = folder.join(path);
            let parent = path.parent().expect("it is below a folder");
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(digest)
    }

    /// Writes the layout as one archive, for `docker load` and `ctr images import`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write_archive(&mut self, path: &Path) -> Result<()> {
        let legacy = Value::from(self.legacy.clone()).to_string().into_bytes();
        let created = self.created;
        let (_, mut files) = self.files();
        files.insert("manifest.json".to_owned(), legacy);
        let mut archive = Archive::new(created);
        for (name, content) in files {
            archive.add(Path::new(&name), EntryType::Regular, 0o644, &content)?;
        }
        let archive = archive.finish()?;
        fs::write(path, archive).with_context(|| format!("writing {}", path.display()))
    }

    /// The digest of the index, and the layout's files by their paths.
    fn files(&mut self) -> (String, BTreeMap<String, Vec<u8>>) {
        let inner = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests });
        let mut inner = self.blob(INDEX, inner.to_string().into_bytes());
        let digest = inner["digest"].as_str().unwrap_or_default().to_owned();
        let tag = self.name.rsplit(':').next().unwrap_or_default();
        inner["annotations"] = json!({
            "io.containerd.image.name": full(&self.name),
            "org.opencontainers.image.ref.name": tag,
        });
        let outer = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [inner] });
        let mut files = BTreeMap::from([
            ("index.json".to_owned(), outer.to_string().into_bytes()),
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ]);
        for (digest, content) in &self.blobs {
            files.insert(format!("blobs/{}", digest.replace(':', "/")), content.clone());
        }
        (digest, files)
    }
}

/// The name as container runtimes know it: with its registry.
fn full(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("docker.io/library/{name}") }
}

fn blob_path(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    // The header has no name and no time.
    let mut packer = GzBuilder::new().write(Vec::new(), Compression::best());
    packer.write_all(bytes).context("packing a layer")?;
    packer.finish().context("packing a layer")
}

/// The digest as registries write it: `sha256:` and hexadecimal digits.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let mut text = "sha256:".to_owned();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").expect("a string takes everything");
    }
    text
}

/// A tar archive whose entries differ in name, mode and content alone.
struct Archive {
    builder: tar::Builder<Vec<u8>>,
    folders: BTreeSet<PathBuf>,
    created: u64,
}

impl Archive {
    fn new(created: u64) -> Self {
        Self { builder: tar::Builder::new(Vec::new()), folders: BTreeSet::new(), created }
    }

    fn header(&self, kind: EntryType, mode: u32, size: usize) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(self.created);
        header.set_size(u64::try_from(size).unwrap_or(u64::MAX));
        header
    }

    fn add(&mut self, path: &Path, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = self.header(kind, mode, content.len());
        self.builder
            .append_data(&mut header, path, content)
            .with_context(|| format!("packing {}", path.display()))
    }

    fn link(&mut self, path: &Path, target: &Path) -> Result<()> {
        let mut header = self.header(EntryType::Symlink, 0o777, 0);
        self.builder
            .append_link(&mut header, path, target)
            .with_context(|| format!("packing {}", path.display()))
    }

    fn finish(self) -> Result<Vec<u8>> {
        self.builder.into_inner().context("packing an archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Root {
        let mut root = Root::default();
        root.file("usr/local/bin/agent", 0o755, b"program".to_vec())
            .file("etc/ssl/trust", 0o644, b"roots".to_vec())
            .link("bin/sh", "busybox")
            .folder("tmp", 0o1777);
        root
    }

    fn settings(architecture: &str) -> Settings {
        Settings {
            architecture: architecture.to_owned(),
            created: 1_700_000_000,
            config: json!({ "Entrypoint": ["agent"] }),
            annotations: BTreeMap::new(),
        }
    }

    #[test]
    fn layer_has_every_folder_once_and_before_its_files() {
        let layer = root().layer(7).unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 7);
            let path = entry.path().unwrap().to_string_lossy().trim_end_matches('/').to_owned();
            seen.push(format!("{path} {:o}", header.mode().unwrap()));
        }
        let wanted = [
            "bin 755",
            "bin/sh 777",
            "etc 755",
            "etc/ssl 755",
            "etc/ssl/trust 644",
            "tmp 1777",
            "usr 755",
            "usr/local 755",
            "usr/local/bin 755",
            "usr/local/bin/agent 755",
        ];
        assert_eq!(seen, wanted);
    }

    #[test]
    fn index_leads_to_each_architectures_manifest_config_and_layer() {
        let mut layout = Layout::new("agent:1", 7);
        let amd64 = layout.add(&root(), &settings("amd64")).unwrap();
        let mut alone = Layout::new("agent:1", 7);
        let arm64 = alone.add(&root(), &settings("arm64")).unwrap();
        layout.extend(&alone);
        let (_, files) = layout.files();
        let read = |descriptor: &Value| -> Value {
            let bytes = &files[&blob_path(descriptor)];
            assert_eq!(descriptor["size"], bytes.len());
            assert_eq!(descriptor["digest"], digest(bytes).as_str());
            serde_json::from_slice(bytes).unwrap()
        };
        let outer: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let name = &outer["manifests"][0]["annotations"]["io.containerd.image.name"];
        assert_eq!(name, "docker.io/library/agent:1");
        let index = read(&outer["manifests"][0]);
        for (descriptor, (known, architecture)) in
            index["manifests"].as_array().unwrap().iter().zip([(amd64, "amd64"), (arm64, "arm64")])
        {
            assert_eq!(descriptor["digest"], known.as_str());
            assert_eq!(descriptor["platform"]["architecture"], architecture);
            let manifest = read(descriptor);
            let config = read(&manifest["config"]);
            assert_eq!(config["created"], "2023-11-14T22:13:20Z");
            let mut layer = Vec::new();
            let packed = files[&blob_path(&manifest["layers"][0])].as_slice();
            std::io::copy(&mut flate2::read::GzDecoder::new(packed), &mut layer).unwrap();
            assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer).as_str());
        }
        assert!(files.keys().all(|path| !path.contains(':')));
    }

    #[test]
    fn archive_is_the_same_bytes_each_time_and_names_what_docker_load_reads() {
        let folder = tempfile::tempdir().unwrap();
        let archives = ["one", "two"].map(|name| {
            let mut layout = Layout::new("agent:1", 7);
            layout.add(&root(), &settings("amd64")).unwrap();
            let path = folder.path().join(name);
            layout.write_archive(&path).unwrap();
            fs::read(path).unwrap()
        });
        assert_eq!(archives[0], archives[1]);
        let mut archive = tar::Archive::new(archives[0].as_slice());
        archive.unpack(folder.path().join("out")).unwrap();
        let read = |path: &str| fs::read(folder.path().join("out").join(path)).unwrap();
        let legacy: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
        assert_eq!(legacy[0]["RepoTags"][0], "agent:1");
        let config: Value =
            serde_json::from_slice(&read(legacy[0]["Config"].as_str().unwrap())).unwrap();
        assert_eq!(config["config"]["Entrypoint"][0], "agent");
        assert!(!read(legacy[0]["Layers"][0].as_str().unwrap()).is_empty());
    }
}

//! Reads the files that describe a cluster's API server, all of which may be replaced while the agent runs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use kube::config::{Cluster, Kubeconfig, KubeconfigError};
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};

use super::Error;
use crate::proxy::{Proxies, Proxy};
use kiam_core::secret::Secret;

/// A proxy that keeps kube from reading the environment, which it does differently from kubectl.
const NO_SUCH_PROXY: &str = "http://proxy.invalid";
/// The folder of a pod's ServiceAccount files.
const IN_CLUSTER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What an error names where no file was named.
const KUBECTLS: &str = "of KUBECONFIG or ~/.kube/config";

/// The source of a cluster's description.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// A kubeconfig file, and the files that it names.
    Kubeconfig(PathBuf),
    /// This pod's environment, and its ServiceAccount's files.
    InCluster,
    /// The files that kubectl reads, for a user's own command: of `KUBECONFIG`, or in the user's home.
    User {
        /// `--kubeconfig`, instead of those.
        path: Option<PathBuf>,
        /// `--context`, instead of the current one.
        context: Option<String>,
    },
}

/// A cluster's description.
pub(super) struct Description {
    pub(super) config: kube::Config,
    pub(super) proxy: Option<Proxy>,
    /// The digest of all files, taken before they were read.
    pub(super) digest: Digest,
}

/// A digest of files, to find changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest([u8; 32]);

// === impl Origin ===

impl Origin {
    /// The kubeconfig file at `path`, else the cluster that this process runs in.
    pub(super) fn new(path: Option<&Path>) -> Self {
        path.map_or(Self::InCluster, |path| Self::Kubeconfig(path.to_owned()))
    }

    /// Reads everything.
    pub(super) fn read(&self, proxies: &Proxies) -> Result<Description, Error> {
        let (mut config, own_proxy, digest) = match self {
            Self::Kubeconfig(path) => {
                let failed =
                    |source| Error::Kubeconfig { path: path.clone(), source: Box::new(source) };
                kubeconfig(path).map_err(failed)?
            }
            Self::User { path, context } => {
                let failed = |source| Error::Kubeconfig {
                    path: path.clone().unwrap_or_else(|| KUBECTLS.into()),
                    source: Box::new(source),
                };
                users(path.as_deref(), context.as_deref()).map_err(failed)?
            }
            Self::InCluster => {
                let digest = Digest::in_cluster();
                let mut config = kube::Config::incluster().map_err(Error::InCluster)?;
                // Read by `read_token` and below, as of a kubeconfig.
                config.root_cert_file = None;
                (config, None, digest)
            }
        };
        read_token(&mut config).map_err(|source| Error::Client(Box::new(source)))?;
        // As with kubectl, the file takes precedence over the environment.
        let proxy = match own_proxy {
            Some(text) => Some(Proxy::parse("proxy-url", &text)?),
            None => proxies.of(&config.cluster_url).cloned(),
        };
        config.proxy_url = None;
        Ok(Description { config, proxy, digest })
    }

    /// Whether a file has changed since `digest`.
    pub(super) fn is_changed(&self, digest: &Digest) -> bool {
        let now = match self {
            Self::Kubeconfig(path) => Kubeconfig::read_from(path).ok().map(|file| {
                let named = named(&file);
                Digest::of([&**path].into_iter().chain(named.iter().map(Path::new)))
            }),
            Self::InCluster => Some(Digest::in_cluster()),
            // A command is over soon.
            Self::User { .. } => return false,
        };
        now.as_ref() != Some(digest)
    }
}

// === impl Digest ===

impl Digest {
    /// The digest of the ServiceAccount's files.
    fn in_cluster() -> Self {
        let files = ["ca.crt", "token"].map(|name| Path::new(IN_CLUSTER).join(name));
        Self::of(files.iter().map(PathBuf::as_path))
    }

    /// The digest of the files at `paths`, including which of them are missing.
    fn of<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut digest = Sha256::new();
        for path in paths {
            let contents = fs::read(path).ok();
            digest.update([u8::from(contents.is_some())]);
            let contents = Sha256::digest(contents.unwrap_or_default());
            digest.update(contents);
        }
        Self(digest.finalize().into())
    }
}

/// The current context of a file, with the proxy that it names. The files in the user's home are never read: an agent
/// without a required flag must fail, not watch some other cluster.
fn kubeconfig(path: &Path) -> Result<(kube::Config, Option<String>, Digest), KubeconfigError> {
    let file = Kubeconfig::read_from(path)?;
    let files = named(&file);
    let files = [path].into_iter().chain(files.iter().map(Path::new));
    let digest = Digest::of(files);
    let (config, own) = described(file)?;
    Ok((config, own, digest))
}

/// The context that a user's own command means, with the proxy that its cluster names.
fn users(
    path: Option<&Path>,
    context: Option<&str>,
) -> Result<(kube::Config, Option<String>, Digest), KubeconfigError> {
    let mut file = path.map_or_else(Kubeconfig::read, Kubeconfig::read_from)?;
    if let Some(context) = context {
        file.current_context = Some(context.to_owned());
    }
    let (config, own) = described(file)?;
    Ok((config, own, Digest::of([])))
}

/// The current context of a file.
fn described(mut file: Kubeconfig) -> Result<(kube::Config, Option<String>), KubeconfigError> {
    let own = current(&mut file).and_then(|cluster| {
        cluster.proxy_url.replace(NO_SUCH_PROXY.to_owned()).filter(|url| !url.is_empty())
    });
    let mut config = kube::Config::try_from(file)?;
    // The cluster as an exec plugin sees it.
    if let Some(cluster) = config.auth_info.exec.as_mut().and_then(|exec| exec.cluster.as_mut()) {
        cluster.proxy_url.clone_from(&own);
    }
    Ok((config, own))
}

/// The cluster of the current context.
fn current(file: &mut Kubeconfig) -> Option<&mut Cluster> {
    let context = file.current_context.as_ref()?;
    let context = file.contexts.iter().find(|it| it.name == *context)?.context.as_ref()?;
    let named = file.clusters.iter_mut().find(|it| it.name == context.cluster)?;
    named.cluster.as_mut()
}

/// The files that a kubeconfig file names, of all contexts.
fn named(file: &Kubeconfig) -> Vec<String> {
    let clusters = file.clusters.iter().filter_map(|it| it.cluster.as_ref());
    let users = file.auth_infos.iter().filter_map(|it| it.auth_info.as_ref());
    let of_clusters = clusters.filter_map(|it| it.certificate_authority.clone());
    let of_users = users.flat_map(|user| {
        [&user.client_certificate, &user.client_key, &user.token_file].map(Clone::clone)
    });
    of_clusters.chain(of_users.flatten()).collect()
}

/// Replaces the token's file by the token, trimmed as client-go does: editors leave a newline at the end of a file. A token
/// that no header may hold is an error here; in the client it would be a panic.
fn read_token(config: &mut kube::Config) -> kube::Result<()> {
    let user = &mut config.auth_info;
    let (text, path) = match (&user.token, user.token_file.take()) {
        (Some(token), _) => (Ok(token.expose_secret().to_owned()), "token".to_owned()),
        (None, Some(path)) => (fs::read_to_string(&path), path),
        (None, None) => return Ok(()),
    };
    let token = text.and_then(|text| {
        let text = Secret::new(text);
        let token = text.expose().trim();
        let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "it holds no token");
        is_token.then(|| token.to_owned().into()).ok_or_else(invalid)
    });
    let failed = |source| kube::client::AuthError::ReadTokenFile(source, path.into());
    user.token = Some(token.map_err(|source| kube::Error::Auth(failed(source)))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The token that is sent where a file has `text`, or the kubeconfig itself.
    fn token(text: &str, inline: bool) -> kube::Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, text).unwrap();
        let mut config = kube::Config::new("https://127.0.0.1".parse().unwrap());
        config.auth_info.token = inline.then(|| text.to_owned().into());
        config.auth_info.token_file = Some(path.display().to_string());
        read_token(&mut config)?;
        assert!(config.auth_info.token_file.is_none());
        Ok(config.auth_info.token.unwrap().expose_secret().to_owned())
    }

    #[test]
    fn a_token_is_what_is_left_without_what_is_around_it() {
        for inline in [false, true] {
            for text in ["a.b-c_d", "a.b-c_d\n", " a.b-c_d\r\n\r\n"] {
                assert_eq!(token(text, inline).unwrap(), "a.b-c_d");
            }
            for text in ["", "\n", "secret\nsecret", "secret\u{0}", "sécret"] {
                let error = super::super::describe(&token(text, inline).unwrap_err());
                assert!(error.contains("holds no token") && !error.contains("cret"), "{error}");
            }
        }
    }
}

//! What `deploy/` says about the agent's containers, for a node that has no Kubernetes.

use anyhow::{Context, Result};
use lab::runtime::Bind;
use serde_json::Value;

/// How the agent is started.
const AGENT: &str = include_str!("../../../../deploy/daemonset.yaml");
/// How it is removed.
const UNINSTALL: &str = include_str!("../../../../deploy/uninstall/daemonset.yaml");

/// One container's settings, as far as they differ by container.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    /// `args`.
    pub(super) args: Vec<String>,
    /// The rest of its readiness probe's command, after the program.
    pub(super) probe: Vec<String>,
    /// `volumeMounts`, all of the node's own folders.
    pub(super) binds: Vec<Bind>,
}

// === impl Manifest ===

impl Manifest {
    /// The agent's.
    pub(super) fn agent(node_name: &str, host_ip: &str) -> Result<Self> {
        let mut manifest = Self::read(AGENT, "containers")?;
        for arg in &mut manifest.args {
            *arg = arg.replace("$(NODE_NAME)", node_name).replace("$(HOST_IP)", host_ip);
        }
        Ok(manifest)
    }

    /// That of what removes it.
    pub(super) fn uninstall() -> Result<Self> {
        Self::read(UNINSTALL, "initContainers")
    }

    fn read(text: &str, containers: &str) -> Result<Self> {
        let manifest: Value = serde_saphyr::from_str(text).context("reading a manifest")?;
        let spec = &manifest["spec"]["template"]["spec"];
        let container = &spec[containers][0];
        let binds = container["volumeMounts"].as_array().into_iter().flatten();
        let binds = binds.map(|mount| bind(spec, mount).context("a volume that is no hostPath"));
        let probe = words(&container["readinessProbe"]["exec"]["command"]);
        Ok(Self {
            args: words(&container["args"]),
            probe: probe.into_iter().skip(1).collect(),
            binds: binds.collect::<Result<_>>()?,
        })
    }
}

fn words(list: &Value) -> Vec<String> {
    let words = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    words.map(ToOwned::to_owned).collect()
}

fn bind(spec: &Value, mount: &Value) -> Option<Bind> {
    let volumes = spec["volumes"].as_array()?;
    let volume = volumes.iter().find(|volume| volume["name"] == mount["name"])?;
    Some(Bind {
        node: volume["hostPath"]["path"].as_str()?.to_owned(),
        container: mount["mountPath"].as_str()?.to_owned(),
        follows: mount["mountPropagation"] == "HostToContainer",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_settings_are_those_of_deploy() {
        let agent = Manifest::agent("n1", "192.0.2.1").unwrap();
        assert!(agent.args.contains(&"--host=192.0.2.1".to_owned()), "{agent:?}");
        assert!(agent.args.contains(&"--node-name=n1".to_owned()), "{agent:?}");
        assert_eq!(agent.probe, ["status", "--ready"]);
        let bpffs = agent.binds.iter().find(|bind| bind.container == "/sys/fs/bpf").unwrap();
        assert!(bpffs.follows && bpffs.node == "/sys/fs/bpf");
        let uninstall = Manifest::uninstall().unwrap();
        assert_eq!(uninstall.args[0], "uninstall");
        assert!(!uninstall.binds.is_empty());
    }
}

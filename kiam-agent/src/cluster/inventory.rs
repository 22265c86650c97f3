//! Lists workloads, pods and namespaces once, for `kiam-agent migrate`. Only reads.

use std::{path::Path, time::Duration};

use kube::{api::ListParams, core::Request};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Error, client, describe, files::Origin, tls::Health};
use crate::proxy::Proxies;
use kiam_core::lifecycle::Readiness;

/// The lists, with the kind of their items, which a list does not repeat.
const LISTS: [(&str, &str, &str); 4] = [
    ("/apis/apps/v1/daemonsets", "apps/v1", "DaemonSet"),
    ("/apis/apps/v1/deployments", "apps/v1", "Deployment"),
    ("/api/v1/namespaces", "v1", "Namespace"),
    ("/api/v1/pods", "v1", "Pod"),
];
/// The objects in a page.
const PAGE: u32 = 500;
/// The deadline of a page.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why the objects can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// There is no client.
    #[error(transparent)]
    Client(#[from] Error),
    /// A list fails.
    #[error("{path}: {problem}")]
    List {
        /// The list.
        path: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// All DaemonSets, Deployments, namespaces and pods of the cluster.
///
/// # Errors
///
/// [`InventoryError`] when there is no client, or a list fails.
pub async fn inventory(
    kubeconfig: Option<&Path>,
    proxies: &Proxies,
) -> Result<Vec<Value>, InventoryError> {
    let health = Health::new("TLS with the Kubernetes API", &Readiness::default());
    let client = client::connect(Origin::new(kubeconfig), proxies, health)?;
    let mut objects = Vec::new();
    for (path, version, kind) in LISTS {
        let failed = |problem| InventoryError::List { path, problem };
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let request = Request::new(path).list(&params);
            let request = request.map_err(|error| failed(error.to_string()))?;
            let answer = timeout(DEADLINE, client.request::<Value>(request)).await;
            let mut page = answer
                .map_err(|_| failed(format!("no answer within {} s", DEADLINE.as_secs())))?
                .map_err(|error| failed(describe(&error)))?;
            let Value::Array(items) = page["items"].take() else {
                return Err(failed("the answer is no list".to_owned()));
            };
            objects.extend(items.into_iter().map(|mut item| {
                item["apiVersion"] = json!(version);
                item["kind"] = json!(kind);
                item
            }));
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token.to_owned()),
                None => break,
            }
        }
    }
    Ok(objects)
}

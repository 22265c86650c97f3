//! A Kubernetes API server of pods and namespaces: list, watch, bookmarks, history that can be too old, and faults.

mod api;
mod record;
mod store;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use http::StatusCode;

use super::http::{Place, Server};

pub use record::{NamespaceRecord, PodRecord};
pub use store::{Gone, Resource, Seen, Store};

/// The server. Derefs to its [`Store`], which says what is in it; the store outlives stop and start.
#[derive(Debug)]
pub struct Kubernetes {
    server: Server<api::Api>,
    store: Arc<Store>,
}

// === impl Kubernetes ===

impl Kubernetes {
    /// Starts it, empty.
    ///
    /// # Errors
    ///
    /// When the place can't be bound.
    pub fn start(place: Place) -> Result<Self> {
        let store = Arc::new(Store::default());
        let server = Server::start(vec![place], Arc::new(api::Api::new(Arc::clone(&store))))?;
        Ok(Self { server, store })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Goes away: connections are cut, new ones refused.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Comes back on the same port with the same records.
    ///
    /// # Errors
    ///
    /// When somebody else has the port by now.
    pub fn restart(&self) -> Result<()> {
        self.server.restart()
    }

    /// Writes a kubeconfig that names this server, over plain HTTP and without credentials.
    ///
    /// # Errors
    ///
    /// When the file can't be written.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: lab, user: {{}}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
            self.address()
        );
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

impl std::ops::Deref for Kubernetes {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

/// Faults; each holds until it is changed.
#[derive(Clone, Copy, Debug)]
struct Conduct {
    /// Open watches say nothing, not even bookmarks, and stay open.
    stalled: bool,
    /// Every request is answered with this.
    refusing: Option<StatusCode>,
    /// How a watch from before the history is told so.
    gone: Gone,
    /// How often a quiet watch gets a bookmark.
    bookmarks: Duration,
}

impl Default for Conduct {
    fn default() -> Self {
        let bookmarks = Duration::from_secs(1);
        Self { stalled: false, refusing: None, gone: Gone::Event, bookmarks }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufReader, Write},
        net::TcpStream,
    };

    use serde_json::Value;

    use super::*;
    use crate::pod_client::wire::{self, Reply};

    struct WatchStream(BufReader<TcpStream>);

    impl WatchStream {
        fn next(&mut self) -> Option<Value> {
            let line = wire::chunk(&mut self.0).unwrap()?;
            Some(serde_json::from_slice(&line).unwrap())
        }

        /// Type, name, resource version.
        fn facts(&mut self) -> (String, String, String) {
            let event = self.next().unwrap();
            let metadata = &event["object"]["metadata"];
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (text(&event["type"]), text(&metadata["name"]), text(&metadata["resourceVersion"]))
        }
    }

    fn server() -> Kubernetes {
        let api = Kubernetes::start(Place::loopback()).unwrap();
        api.bookmark_every(Duration::from_secs(600));
        api
    }

    fn get(api: &Kubernetes, path: &str, accept: &str) -> Reply {
        let mut stream = TcpStream::connect(api.address()).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: api\r\nAccept: {accept}\r\n\r\n");
        wire::exchange(&mut stream, &request).unwrap()
    }

    fn list(api: &Kubernetes, path: &str) -> Value {
        serde_json::from_str(&get(api, path, "application/json").body).unwrap()
    }

    fn watch(api: &Kubernetes, path: &str) -> (Reply, WatchStream) {
        let mut stream = TcpStream::connect(api.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: api\r\n\r\n").unwrap();
        let mut reader = BufReader::new(stream);
        (wire::head(&mut reader).unwrap(), WatchStream(reader))
    }

    fn pod(name: &str, node: &str) -> PodRecord {
        PodRecord::scheduled("shop", name, &format!("uid-{name}"), node)
    }

    #[test]
    fn a_list_shows_only_what_is_selected_and_its_version() {
        let api = server();
        api.apply_pod(&pod("a", "n1").running(&["10.0.0.1".parse().unwrap()]));
        let version = api.apply_pod(&pod("b", "n2"));
        let path = "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&resourceVersion=0";
        let listed = list(&api, path);
        assert_eq!(listed["items"].as_array().unwrap().len(), 1);
        assert_eq!(listed["items"][0]["status"]["podIPs"][0]["ip"], "10.0.0.1");
        assert_eq!(listed["metadata"]["resourceVersion"], version.to_string());
        assert_eq!((api.lists(Resource::Pods), api.watches(Resource::Pods)), (1, 0));
        let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
        api.apply_namespace(&NamespaceRecord::new("shop").annotation("k", "v"));
        let body = get(&api, "/api/v1/namespaces", accept).body;
        let listed: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(listed["kind"], "PartialObjectMetadataList");
        assert_eq!(listed["items"][0]["metadata"]["annotations"]["k"], "v");
        assert_eq!(listed["items"][0]["spec"], Value::Null);
    }

    #[test]
    fn a_watch_goes_on_from_its_version_and_follows_its_selector() {
        let api = server();
        let from = api.apply_pod(&pod("a", "n1"));
        let added = api.apply_pod(&pod("b", "n1"));
        let path = format!(
            "/api/v1/pods?watch=true&fieldSelector=spec.nodeName=n1&resourceVersion={from}"
        );
        let (_, mut events) = watch(&api, &path);
        let fact = |kind: &str, name: &str, version: u64| {
            (kind.to_owned(), name.to_owned(), version.to_string())
        };
        assert_eq!(events.facts(), fact("ADDED", "b", added));
        let modified = api.apply_pod(&pod("b", "n1"));
        assert_eq!(events.facts(), fact("MODIFIED", "b", modified));
        let moved = api.apply_pod(&pod("b", "n2"));
        assert_eq!(events.facts(), fact("DELETED", "b", moved));
        let deleted = api.delete_pod("shop", "a");
        assert_eq!(events.facts(), fact("DELETED", "a", deleted));
        api.inject("{\"odd\":1}");
        assert_eq!(events.next().unwrap()["odd"], 1);
        api.close_watches();
        assert_eq!(events.next(), None);
    }

    #[test]
    fn quiet_watches_get_bookmarks_and_stalled_ones_nothing() {
        let api = server();
        api.bookmark_every(Duration::from_millis(20));
        let path = "/api/v1/pods?watch=1&allowWatchBookmarks=true&resourceVersion=1000";
        let (_, mut events) = watch(&api, path);
        assert_eq!(events.facts().0, "BOOKMARK");
        api.stall_watches(true);
        api.apply_pod(&pod("a", "n1"));
        let timeout = Some(Duration::from_millis(300));
        events.0.get_ref().set_read_timeout(timeout).unwrap();
        let heard = std::iter::from_fn(|| wire::chunk(&mut events.0).ok().flatten());
        assert!(
            heard
                .map(|line| String::from_utf8(line).unwrap())
                .all(|line| line.contains("BOOKMARK"))
        );
    }

    #[test]
    fn a_version_from_before_the_history_is_gone_either_way() {
        let api = server();
        let old = api.apply_pod(&pod("a", "n1"));
        api.skip_version();
        api.compact();
        let path = format!("/api/v1/pods?watch=true&resourceVersion={old}");
        let (head, mut events) = watch(&api, &path);
        assert_eq!(head.status, 200);
        let event = events.next().unwrap();
        assert_eq!((&event["type"], &event["object"]["code"]), (&"ERROR".into(), &410.into()));
        assert_eq!(events.next(), None);
        api.say_gone_as(Gone::Status);
        assert_eq!(watch(&api, &path).0.status, 410);
    }

    #[test]
    fn a_restart_keeps_the_port_and_the_records() {
        let api = server();
        api.apply_pod(&pod("a", "n1"));
        api.stop();
        TcpStream::connect(api.address()).expect_err("nobody listens");
        api.restart().unwrap();
        assert_eq!(list(&api, "/api/v1/pods")["items"].as_array().unwrap().len(), 1);
        api.refuse_all(Some(StatusCode::TOO_MANY_REQUESTS));
        assert_eq!(get(&api, "/api/v1/pods", "").status, 429);
    }
}

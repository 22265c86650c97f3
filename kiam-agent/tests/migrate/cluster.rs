//! The installation is read from a cluster: a server of four lists, which it gives page by page.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};

use super::{command, data, flags};

/// A server that answers lists, two items a page.
struct Server {
    address: std::net::SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

// === impl Server ===

impl Server {
    fn start(objects: Vec<Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (objects, log) = (Arc::new(objects), Arc::clone(&asked));
        // It ends with the test's process.
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (objects, log) = (Arc::clone(&objects), Arc::clone(&log));
                thread::spawn(move || serve(connection, &objects, &log));
            }
        });
        Self { address, asked }
    }

    fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: lab, user: {{}}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
            self.address
        )
    }
}

fn serve(connection: TcpStream, objects: &[Value], log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    let mut writer = connection;
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap_or(0) > 2 {
            line.clear();
        }
        log.lock().unwrap().push(first.trim_end().to_owned());
        let target = first.split(' ').nth(1).unwrap();
        let (status, body) = answer(target, objects);
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        writer.write_all(format!("{head}{body}").as_bytes()).unwrap();
    }
}

fn answer(target: &str, objects: &[Value]) -> (&'static str, String) {
    let (path, query) = target.split_once('?').unwrap();
    let kind = match path {
        "/apis/apps/v1/daemonsets" => "DaemonSet",
        "/apis/apps/v1/deployments" => "Deployment",
        "/api/v1/namespaces" => "Namespace",
        "/api/v1/pods" => "Pod",
        _ => return ("404 Not Found", json!({"kind": "Status", "code": 404}).to_string()),
    };
    let matching: Vec<Value> = objects
        .iter()
        .filter(|object| object["kind"] == kind)
        .cloned()
        .map(|mut object| {
            // As lists are.
            object.as_object_mut().unwrap().remove("kind");
            object.as_object_mut().unwrap().remove("apiVersion");
            object
        })
        .collect();
    let token = query.split('&').find_map(|it| it.strip_prefix("continue="));
    let from: usize = token.map_or(0, |token| token.parse().unwrap());
    let page: Vec<&Value> = matching.iter().skip(from).take(2).collect();
    let mut metadata = json!({"resourceVersion": "1"});
    if from + 2 < matching.len() {
        metadata["continue"] = json!((from + 2).to_string());
    }
    ("200 OK", json!({"kind": "List", "metadata": metadata, "items": page}).to_string())
}

/// The objects of `old.yaml`, with pods besides.
fn objects() -> Vec<Value> {
    let text = fs::read_to_string(data().join("old.yaml")).unwrap();
    let mut objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    for number in 0..5 {
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": format!("orders-{number}"),
                "namespace": "shop",
                "annotations": {"iam.amazonaws.com/role": "shop-orders"},
            },
            "spec": {"containers": []},
        }));
    }
    objects
}

#[test]
fn a_cluster_is_read_and_nothing_in_it_is_changed() {
    let server = Server::start(objects());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    fs::write(&path, server.kubeconfig()).unwrap();
    let flag = format!("--kubeconfig={}", path.display());
    let output = command(&[&flag, "--output=flags"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let (of_file, _) = super::printed(&["old.yaml", "--output=flags"]);
    assert_eq!(flags(&text), flags(&of_file));
    assert!(text.contains("DaemonSet kube-system/kiam-agent (the cluster)"), "{text}");
    // All pages of pods, of which a few are named.
    assert!(
        text.contains("Deployment shop/orders, shop/orders-0, shop/orders-1 and 3 more"),
        "{text}"
    );
    let asked = server.asked.lock().unwrap();
    assert!(asked.iter().all(|line| line.starts_with("GET ")), "{asked:?}");
    assert!(asked.iter().filter(|line| line.contains("/api/v1/pods?")).count() == 3, "{asked:?}");
    assert!(asked.iter().all(|line| line.contains("limit=500")), "{asked:?}");
    drop(asked);
    // The variable of the agent's own flag.
    let output = command(&["--output=flags"]).env("KIAM_KUBECONFIG", &path).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
    // With it, files are read all the same.
    let words = ["old.yaml", "--output=flags"];
    let output = command(&words).env("KIAM_KUBECONFIG", &path).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), of_file);
}

#[test]
fn a_list_that_is_denied_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let body = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"daemonsets.apps is forbidden","reason":"Forbidden","code":403}"#;
            let head = format!(
                "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let mut request = String::new();
            let mut reader = BufReader::new(connection.try_clone().unwrap());
            while reader.read_line(&mut request).unwrap_or(0) > 2 {}
            let _ = connection.write_all(format!("{head}{body}").as_bytes());
        }
    });
    let server = Server { address, asked: Arc::default() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    fs::write(&path, server.kubeconfig()).unwrap();
    let message = super::error(&[&format!("--kubeconfig={}", path.display())], 1);
    let expected = "can't read the cluster: /apis/apps/v1/daemonsets: the server answers 403 Forbidden: daemonsets.apps is forbidden";
    assert!(message.contains(expected), "{message}");
}

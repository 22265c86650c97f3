//! The same with the kernel's part: pods that the real API server named, on a lab node.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
};

use lab::{Lab, LabPod, PodSpec, role_arn};
use serde_json::json;

use super::{Cluster, ORDERS, PATIENCE, PERMITTED, User, eventually};

/// What the pod gets credentials of, and the status else.
fn role(lab: &Lab, pod: &LabPod) -> Result<String, Option<u16>> {
    let attempt = pod.credentials().unwrap();
    lab.role_of(&attempt).ok_or(attempt.status)
}

/// Makes `server`, on this host's loopback, reachable at the same address on the node's.
fn bridge(lab: &Lab, server: SocketAddr) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, server.port()));
    let listener: TcpListener = lab.node.netns().listen(address).unwrap();
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // The server may be down; its clients see that as they would.
            let Ok(far) = TcpStream::connect(server) else { continue };
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
}

#[tokio::test]
async fn pods_of_the_real_api_server_are_told_apart_by_the_kernel() {
    let Some(cluster) = Cluster::start().await else { return };
    let Some(lab) = lab::node_test!() else { return };
    bridge(&lab, cluster.server.address());
    let token = lab.node.folder().join("token");
    fs::write(&token, cluster.token().await).unwrap();
    let kubeconfig = lab.node.folder().join("real.kubeconfig");
    let text = cluster.server.kubeconfig(&json!({"tokenFile": token})).to_string();
    fs::write(&kubeconfig, text).unwrap();
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let flags = [kubeconfig.as_str(), "--node-name=n1", "--namespace-policy=required"];
    let mut agent = lab.begin_agent(&flags);
    agent.wait_ready(PATIENCE).unwrap();

    let mut pods = Vec::new();
    for (name, role) in [("orders", "reader"), ("invoices", "writer")] {
        let mut spec = PodSpec::new("shop", name);
        spec.uid = Some(cluster.schedule(name, role).await);
        let pod = lab.node.pod(spec).unwrap();
        cluster.publish(name, &pod.ips()).await;
        pods.push(pod);
    }
    for (pod, wanted) in pods.iter().zip(["reader", "writer"]) {
        eventually(wanted, PATIENCE, || role(&lab, pod) == Ok(role_arn(wanted))).await;
    }
    cluster.annotate("/api/v1/namespaces/shop", PERMITTED, "arn:.*/writer").await;
    eventually("a refusal", PATIENCE, || role(&lab, &pods[0]) == Err(Some(404))).await;
    assert_eq!(role(&lab, &pods[1]), Ok(role_arn("writer")));

    // A pod of the same name is another: the sandbox of the old one keeps nothing.
    cluster.annotate("/api/v1/namespaces/shop", PERMITTED, ".*").await;
    eventually("the role again", PATIENCE, || role(&lab, &pods[0]) == Ok(role_arn("reader"))).await;
    cluster.delete(User::Kubelet, ORDERS).await;
    cluster.schedule("orders", "writer").await;
    eventually("a refusal", PATIENCE, || role(&lab, &pods[0]).is_err()).await;
    assert_eq!(role(&lab, &pods[1]), Ok(role_arn("writer")));
}

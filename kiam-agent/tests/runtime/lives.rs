//! What becomes of a pod after its first container: others, restarts, probes, sandboxes made anew, its end.

use lab::{
    NODE_V4,
    fake::imds::{NODE_ACCESS_KEY, NODE_ROLE},
};

use super::*;

/// Starts a container whose first process asks, and waits for its end.
fn asks(kubelet: &Kubelet, sandbox: &Sandbox, container: (&str, u32), role: &str) -> Exited {
    let command = ask(role);
    let command = command.each_ref().map(|word| &**word);
    let container = kubelet.start(sandbox, container, &command).unwrap();
    kubelet.wait(&container).unwrap()
}

/// Asserts that the pod's next container gets the credentials of `role` inside.
fn assert_asks_inside(
    stage: &Stage,
    kubelet: &Kubelet,
    sandbox: &Sandbox,
    attempt: u32,
    role: &str,
) {
    let (node, inside) = stage.ways();
    stage.assert_served(&asks(kubelet, sandbox, ("main", attempt), role), role);
    assert_eq!(stage.ways(), (node, inside + 1));
}

#[test]
fn every_container_of_a_pod_asks_inside_until_the_pod_is_gone() {
    let test = "every_container_of_a_pod_asks_inside_until_the_pod_is_gone";
    let Some(stage) = Stage::set(test, &[]) else { return };
    let kubelet = stage.kubelet();
    let spec = stage.schedule("orders", "orders");
    let (held, (node, inside)) = (stage.agent.descriptors().unwrap(), stage.ways());
    assert_eq!((stage.inside(), stage.namespaces()), (0, 0));

    let mut sandbox = kubelet.run_sandbox(&spec, Handler::Runc).unwrap();
    for sandboxes in 1..=2 {
        // An init container, one that stays, one beside it, and its next life.
        stage.assert_served(&asks(&kubelet, &sandbox, ("init", sandboxes), "orders"), "orders");
        let sleep = ["/bin/busybox", "sleep", "60"];
        let main = kubelet.start(&sandbox, ("main", sandboxes), &sleep).unwrap();
        stage.publish(&kubelet, &spec, &sandbox);
        stage.assert_served(
            &asks(&kubelet, &sandbox, ("beside", 2 * sandboxes), "orders"),
            "orders",
        );
        stage.assert_served(
            &asks(&kubelet, &sandbox, ("beside", 2 * sandboxes + 1), "orders"),
            "orders",
        );
        let command = ask("orders");
        let command = command.each_ref().map(|word| &**word);
        stage.assert_served(&kubelet.execute(&main, &command).unwrap(), "orders");
        assert_eq!((stage.inside(), stage.namespaces()), (1, 1));
        if sandboxes == 1 {
            kubelet.stop(&sandbox).unwrap();
            // As the kubelet tells of a pod whose sandbox has ended, before it makes another.
            stage.lab.publish_of(&spec, &[]);
            sandbox = kubelet.run_again(sandbox).unwrap();
        }
    }
    let (node_after, inside_after) = stage.ways();
    assert_eq!((node_after - node, inside_after - inside), (0, 8));

    // While the API still has the pod.
    kubelet.remove(sandbox).unwrap();
    // A namespace takes three; connections to the API and STS may be more by now.
    let gone =
        || (stage.inside(), stage.namespaces(), stage.agent.descriptors().unwrap() <= held + 2);
    eventually_is("nothing is left", &(0, 0, true), gone);
}

#[test]
fn a_pod_on_the_nodes_network_asks_as_before_and_never_inside() {
    let test = "a_pod_on_the_nodes_network_asks_as_before_and_never_inside";
    let Some(mut stage) = Stage::set(test, &[]) else { return };
    let kubelet = stage.kubelet();
    let spec = PodSpec::new("kube-system", "cni").role("cni").host_network();
    let spec = stage.lab.schedule(spec).unwrap();
    let sandbox = kubelet.run_sandbox(&spec, Handler::Runc).unwrap();
    assert_eq!(kubelet.address(&sandbox).unwrap(), None);
    let run = |attempt, role| asks(&kubelet, &sandbox, ("main", attempt), role);
    let before = stage.ways();
    let exited = run(0, NODE_ROLE);
    assert!(exited.output.contains(NODE_ACCESS_KEY), "{exited:?}");
    assert_eq!((stage.ways(), stage.namespaces()), (before, 0));

    // The next agent treats it as any pod.
    let next = start(&stage.lab, &["--host-network-pods=intercept"]);
    let mut before = std::mem::replace(&mut stage.agent, next);
    before.wait_said("A newer agent serves", READY_LIMIT).unwrap();
    before.terminate().unwrap();
    stage.lab.publish_of(&spec, &[NODE_V4.into()]);
    let (node, inside) = stage.ways();
    stage.assert_served(&run(1, "cni"), "cni");
    assert_eq!((stage.ways(), stage.namespaces()), ((node + 1, inside), 0));
    kubelet.remove(sandbox).unwrap();
}

#[test]
fn pods_that_run_when_an_agent_comes_ask_inside() {
    let Some(mut stage) = Stage::set("pods_that_run_when_an_agent_comes_ask_inside", &[]) else {
        return;
    };
    let kubelet = stage.kubelet();
    let old = stage.schedule("orders", "orders");
    let old = (kubelet.run_sandbox(&old, Handler::Runc).unwrap(), "orders");
    assert_asks_inside(&stage, &kubelet, &old.0, 0, "orders");
    stage.agent.kill().unwrap();
    let new = stage.schedule("reports", "reports");
    let new = (kubelet.run_sandbox(&new, Handler::Runc).unwrap(), "reports");
    let exited = asks(&kubelet, &new.0, ("main", 0), "reports");
    assert!(exited.code != 0 && exited.output.starts_with("wget: can't connect"), "{exited:?}");
    stage.agent = start(&stage.lab, &[]);
    eventually_is("listeners", &(2, 2), || (stage.inside(), stage.namespaces()));
    for (sandbox, role) in [old, new] {
        assert_asks_inside(&stage, &kubelet, &sandbox, 1, role);
        kubelet.remove(sandbox).unwrap();
    }
}

#[test]
fn a_sandbox_made_anew_is_listened_in_when_the_api_has_its_address() {
    let test = "a_sandbox_made_anew_is_listened_in_when_the_api_has_its_address";
    let Some(stage) = Stage::set(test, &[]) else { return };
    let kubelet = stage.kubelet();
    let spec = stage.schedule("orders", "orders");
    let sandbox = kubelet.run_sandbox(&spec, Handler::Runc).unwrap();
    let before = stage.publish(&kubelet, &spec, &sandbox);
    assert_asks_inside(&stage, &kubelet, &sandbox, 0, "orders");
    // The API has the address of the one before, as when it is down or the node has started anew.
    let sandbox = kubelet.run_again(sandbox).unwrap();
    assert_ne!(stage.publish(&kubelet, &spec, &sandbox), before);
    eventually_is("listeners", &(1, 1), || (stage.inside(), stage.namespaces()));
    assert_asks_inside(&stage, &kubelet, &sandbox, 1, "orders");
    kubelet.remove(sandbox).unwrap();
}

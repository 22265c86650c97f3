//! The attack matrix: what hostile pods try, by the moments of the agent's life. Of each cell, how many packets came to
//! the metadata service and whose credentials were given. `cargo test --test matrix -- --nocapture` prints the table.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod judge;
mod rows;
mod scenes;
mod stage;
mod table;

use std::thread;

use lab::{Agent, Lab, NODE_V6, eventually};

use crate::{
    judge::{Outcome, State},
    stage::{Cast, Stage},
    table::Table,
};

/// How many agents take over from each other while the rows are played, and how often these are at most.
const TAKEOVERS: usize = 8;
const PASSES: usize = 50;

/// What ordinary pods try, with what the agent has by default: a listener inside each of them.
#[test]
fn nothing_gets_past_from_a_pod() {
    if lab::skip!() {
        return;
    }
    let v6 = NODE_V6.to_string();
    run("pods", &["--host", &v6], rows::of_a_pod_with_a_listener_inside);
}

/// The same where connections go to the node's address.
#[test]
fn nothing_gets_past_from_a_pod_by_way_of_the_node() {
    if lab::skip!() {
        return;
    }
    let v6 = NODE_V6.to_string();
    run("pods, --path=node", &["--path=node", "--host", &v6], rows::of_a_pod);
}

/// What pods on the host's network try, where they are intercepted, with all guards.
#[test]
fn nothing_gets_past_from_a_pod_on_the_hosts_network() {
    if lab::skip!() {
        return;
    }
    let flags = ["--host-network-pods=intercept", "--guard=route,skb,uplink"];
    run("hostNetwork pods", &flags, rows::of_a_host_network_pod);
}

/// Plays all rows in every state of one agent's life, prints the table, and fails for every cell that is not as it must be.
fn run(title: &str, flags: &[&str], rows: fn(&Cast) -> Vec<rows::Row>) {
    let lab = Lab::start().unwrap();
    let cast = Cast::assemble(&lab);
    let rows = rows(&cast);
    let mut stage = Stage::new(&lab, &cast, &rows);
    let mut table = Table::new(title, &rows);

    table.add(State::NoAgent, stage.play(State::NoAgent));
    stage.connect_early();
    let mut agent = lab.agent(flags);
    stage.await_credentials();
    table.add(State::Running, stage.play(State::Running));

    stage.freeze(&agent);
    table.add(State::Hung, stage.play_hung(&agent));
    stage.await_end_of_lease();
    table.add(State::HungLapsed, stage.play(State::HungLapsed));
    agent.thaw().unwrap();
    stage.await_credentials();

    let cells;
    (agent, cells) = taking_over(agent, &lab, flags, &mut stage);
    table.add(State::Takeover, cells);

    agent.kill().unwrap();
    table.add(State::Killed, stage.play(State::Killed));

    lab.uninstall().unwrap();
    stage.connect_early();
    let _agent = lab.agent(flags);
    stage.await_credentials();
    table.add(State::Reinstalled, stage.play(State::Reinstalled));
    stage.assert_nothing_came();

    println!("{table}");
    let wrong = table.wrong();
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Plays the rows again and again while one agent after the other takes over; of each row, the worst that came of it.
fn taking_over(
    mut agent: Agent,
    lab: &Lab,
    flags: &[&str],
    stage: &mut Stage<'_>,
) -> (Agent, Vec<Option<Outcome>>) {
    thread::scope(|scope| {
        let taking_over = scope.spawn(|| {
            for _ in 0..TAKEOVERS {
                let next = lab.agent(flags);
                agent.terminate().unwrap();
                agent = next;
            }
            agent
        });
        let mut cells = stage.play(State::Takeover);
        for _ in 1..PASSES {
            if taking_over.is_finished() {
                break;
            }
            cells = stage.worst(cells, State::Takeover);
        }
        (taking_over.join().unwrap(), cells)
    })
}

//! `docs/scale.md`, made from what was found. What it concludes is computed, so that it can't be kinder than the numbers.

mod api;
mod text;

use self::text::{bullet, clock, count, emphasised, share, span, wait};
use crate::{
    fleet::{Fleet, Policy, SessionName},
    kubernetes::Load,
    scenario::{Found, Run, Scenario},
};
use xtask::page::table;

/// The document's text.
pub(crate) fn render(fleet: &Fleet, seed: u64, runs: &[Run], load: &Load) -> String {
    let days: Vec<&Run> = of(runs, |scenario| matches!(scenario, Scenario::Day(_)));
    let outages: Vec<&Run> = of(runs, |scenario| matches!(scenario, Scenario::Outage(_)));
    let restarts: Vec<&Run> =
        of(runs, |scenario| !matches!(scenario, Scenario::Day(_) | Scenario::Outage(_)));
    [
        head(fleet, seed),
        METHOD.to_owned(),
        day_table(fleet, &days),
        restart_table(&restarts),
        outage_table(fleet, &outages),
        conclusions(fleet, &days, &restarts, &outages),
        api::section(fleet, load),
        LIMITS.to_owned(),
    ]
    .join("\n")
}

const METHOD: &str = "\
## Method

The simulation runs in virtual time, with one queue of events. These are the agent's own functions,
called with a seeded random source: when a session is renewed, how long an agent waits after an
error, the spread of both, what a node may ask (`--sts-rate`, by its default), and how it slows down
while STS throttles. A test compares the model's renewals with those of a real prefetcher. These
belong to the model: at most 16 calls of a node in flight, a node's queue first come first served,
unrequested sessions kept for a minute, answers after 50 to 150 ms.

**STS** is one token bucket for the account in its region. It holds a second's calls and is refilled
evenly. A call that finds it empty is throttled, and takes nothing. AWS documents [600 calls a
second for an account and
region](https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html), which all
callers share. It also says that [STS throttles by a token
bucket](https://aws.amazon.com/blogs/security/how-to-monitor-and-query-iam-resources-at-scale-part-2/)
and that [the quota can't be raised](https://repost.aws/knowledge-center/iam-sts-throttling-error);
others [meet it](https://github.com/awslabs/mountpoint-s3/issues/1358). How much the bucket holds is
not published: a second's worth is assumed. Nobody else calls STS here; on a real account somebody
does.

**Session names** decide how many sessions there are ([sessions.md](sessions.md)):

- *Role*: one name for all (`--session-name`, by its default), so the pods of a role on a node share
  a session.
- *Service account*: pods of a service account share a session (`{namespace}.{service_account}`);
  two service accounts use each role.
- *Pod*: each pod has its own (`{pod}` in the name or the source identity, or tags of the pod).
- *Chained*: the pods' roles are assumed from another role (`--assume-role-arn`), of which each node
  keeps a session too. AWS gives such sessions an hour at most.

**On a day** each pod lives eight hours on average (exponentially distributed), and a rollout at
each full hour replaces a tenth of all pods within ten minutes. A pod is followed at once by another
on the same node, of a random role. Sessions are of any age when the simulation begins, and the
first hour is not counted.

Restarts and outages have no churn:

- *All agents restart*: within one second, and nothing is handed over.
- *All nodes boot*: within two minutes, a node's pods within a minute each.
- *Rollout*: a tenth of the nodes at a time. Each node is followed by the next after 15 s on
  average, once all its sessions are there. *Warm* agents receive the old agent's cached
  credentials; *cold* agents fetch them while the old agent serves.
- *Outages*: STS refuses at once for so long.
";

const ADVICE: &str = "\
**What to set.** A fleet's calls a second are its sessions divided by half their duration, or by a
quarter of it if that is a quarter of an hour. Keep them below half of the quota, as rollouts come
on top and others use the account too.

- Fewer sessions help: a name that the pods of a role share, without the pod's name in it.
- A longer `--session-duration` helps too, if roles allow it. With twelve hours even a session per
  pod is little, and nothing expires in an outage of hours.
- Sessions of fifteen minutes need eight times the calls of an hour's, and outlast no outage. At
  this size they fit only if the pods of a role share them, and leave little for anybody else.

After a restart or an outage of the whole fleet, STS's quota decides how long it takes, and
`--sts-rate` does little. 5,000 nodes are above the quota with one call a second each, and a node
that is throttled slows down by itself, to a call in half a minute at the slowest. `--sts-rate` does
help a rollout where sessions are per pod and nothing is handed over. A rate below the quota,
divided by the nodes that restart at once, has hardly any call throttled, and takes no longer. A
smaller `maxSurge` does the same.
";

const LIMITS: &str = "\
## What this does not say

- Nothing was measured on AWS or on a cluster of this size. The bucket's depth, the answers' times
  and the sizes of objects are assumptions.
- The model leaves out the shares of a pod and a namespace (which limit new sessions) and the turns
  in a node's queue. With 100 pods of several namespaces a node they delay nothing.
- Chained sessions are counted without waiting for the session that they come from.
- In an outage STS refuses at once. An STS that hangs gets fewer calls while that lasts, and the
  same ones after it.
- The old agent's own renewals during its last seconds of a cold rollout are left out.
- Events on pods are not counted: there are none while nothing is refused and nothing fails.
- Pods are spread evenly. Nodes of few pods have fewer sessions, and roles that are everywhere cost
  a session per node.
";

fn of(runs: &[Run], wanted: impl Fn(&Scenario) -> bool) -> Vec<&Run> {
    runs.iter().filter(|run| wanted(&run.scenario)).collect()
}

fn head(fleet: &Fleet, seed: u64) -> String {
    let nodes = count(f64::from(fleet.nodes));
    let Fleet { pods, roles, .. } = fleet;
    format!(
        "# Scale\n\n\
         For operators of large clusters: what a fleet of {nodes} nodes, each of {pods} pods and {roles} roles,\n\
         asks of STS and of the Kubernetes API. Written by\n\n\
         ```sh\ncargo xtask simulate scale --seed={seed} --nodes={}\n```\n\n\
         Do not edit this page; run the command again. The same seed gives the same page.\n",
        fleet.nodes
    )
}

fn name(policy: &Policy) -> String {
    let name = match policy.name {
        SessionName::Role => "role",
        SessionName::ServiceAccount => "service account",
        SessionName::Pod => "pod",
    };
    if policy.chained { format!("{name}, chained") } else { name.to_owned() }
}

fn day_table(fleet: &Fleet, runs: &[&Run]) -> String {
    let row = |run: &&Run| {
        let calls = &run.found.calls;
        let quota = f64::from(fleet.quota);
        let sessions = fleet.nodes * fleet.sessions(&run.policy);
        vec![
            name(&run.policy),
            span(run.policy.duration),
            count(f64::from(sessions)),
            emphasised(count(calls.mean), calls.mean > quota),
            share(calls.mean / quota),
            count(f64::from(calls.p50)),
            count(f64::from(calls.p99)),
            count(f64::from(calls.second)),
            count(calls.minute),
            emphasised(share(calls.throttled), calls.throttled > 0.0),
            emphasised(count(run.found.lapsed as f64), run.found.lapsed > 0),
            run.found.least_left.map_or(String::new(), clock),
        ]
    };
    let head = [
        "session per",
        "lasts",
        "sessions",
        "mean",
        "of the quota",
        "p50",
        "p99",
        "worst second",
        "worst minute",
        "throttled",
        "expired",
        "least life left",
    ];
    format!(
        "## AssumeRole calls a second on a day\n\n\
         All calls, answered or throttled. Quantiles are of seconds, and *worst minute* is the mean of its\n\
         seconds. *Expired* sessions ended before they were renewed. *Least life left* is what the latest of\n\
         the other renewals found. Sessions of 15 minutes are counted for an hour instead of a day.\n\n{}",
        table(&head, 0..2, runs.iter().map(row))
    )
}

/// What comes after a restart or an outage: calls, waits, and what is left of it hours later.
fn aftermath(run: &Run) -> Vec<String> {
    let (calls, waits) = (&run.found.calls, &run.found.waits);
    vec![
        count(calls.total as f64),
        emphasised(share(calls.throttled), calls.throttled > 0.0),
        count(f64::from(calls.second)),
        count(calls.minute),
        wait(waits.count, waits.p50),
        wait(waits.count, waits.p99),
        wait(waits.count, waits.max),
        count(f64::from(run.found.echo.second)),
        count(run.found.echo.minute),
    ]
}

const AFTERMATH: [&str; 9] = [
    "calls",
    "throttled",
    "worst second",
    "worst minute",
    "cached after, p50",
    "p99",
    "all",
    "later: worst second",
    "worst minute",
];

fn restart_table(runs: &[&Run]) -> String {
    let row = |run: &&Run| {
        let what = restart(run.scenario);
        let first = [what, name(&run.policy), span(run.policy.duration)];
        [first.to_vec(), aftermath(run)].concat()
    };
    let head = [&["", "session per", "lasts"][..], &AFTERMATH].concat();
    format!(
        "## Restarts\n\n\
         Calls until every session is cached, or of half an hour where none was missing, ordinary renewals\n\
         included. *Cached after* counts from when a pod needed the session; in a rollout pods have the old\n\
         agent's meanwhile. *Later* is the time after that, until every session has been renewed at least\n\
         once: sessions that were fetched together are not renewed together.\n\n{}",
        table(&head, 0..3, runs.iter().map(row))
    )
}

fn outage_table(fleet: &Fleet, runs: &[&Run]) -> String {
    let row = |run: &&Run| {
        let Scenario::Outage(lasts) = run.scenario else { return Vec::new() };
        let sessions = fleet.nodes * fleet.sessions(&run.policy);
        let lapsed = run.found.lapsed as f64 / f64::from(sessions);
        let first = [
            span(lasts),
            name(&run.policy),
            span(run.policy.duration),
            emphasised(share(lapsed), run.found.lapsed > 0),
        ];
        [first.to_vec(), aftermath(run)].concat()
    };
    let head =
        [&["STS is unreachable", "session per", "lasts", "expired"][..], &AFTERMATH].concat();
    format!(
        "## The end of an outage of STS\n\n\
         *Expired* is the share of sessions that ended before they were renewed. *Cached after* is about\n\
         those, from the end of the outage. Calls and *later* are as above, from there.\n\n{}",
        table(&head, 0..3, runs.iter().map(row))
    )
}

fn conclusions(fleet: &Fleet, days: &[&Run], restarts: &[&Run], outages: &[&Run]) -> String {
    let said = days.iter().map(|run| on_a_day(fleet, run));
    let said = said.chain(restarts.iter().map(|run| after_a_restart(run)));
    let said = said.chain(outages.iter().filter_map(|run| after_an_outage(run)));
    let lines: String = said.map(|line| bullet(&line)).collect();
    format!("## What this says\n\n{lines}\n{ADVICE}")
}

/// The restart in words.
fn restart(scenario: Scenario) -> String {
    let what = match scenario {
        Scenario::MassRestart { .. } => "all agents restart",
        Scenario::ColdStart => "all nodes boot",
        Scenario::Rolling { warm: true, .. } => "rollout, warm",
        Scenario::Rolling { warm: false, .. } => "rollout, cold",
        Scenario::Day(_) | Scenario::Outage(_) => "",
    };
    if scenario.is_slow() { format!("{what}, `--sts-rate=1:1`") } else { what.to_owned() }
}

fn on_a_day(fleet: &Fleet, run: &Run) -> String {
    let (calls, quota) = (&run.found.calls, f64::from(fleet.quota));
    let found = if calls.throttled > 0.0 || run.found.lapsed > 0 {
        format!(
            "**over the quota**; {} of the calls are throttled, and {} sessions expired before they were renewed",
            share(calls.throttled),
            count(run.found.lapsed as f64)
        )
    } else {
        let (mean, worst) = (share(calls.mean / quota), share(f64::from(calls.second) / quota));
        format!("{mean} of the quota, {worst} in the worst second")
    };
    format!("{}, a day: {found}.", what(&run.policy))
}

fn after_a_restart(run: &Run) -> String {
    let Found { calls, waits, echo, .. } = &run.found;
    let found = match run.scenario {
        Scenario::Rolling { .. } => {
            let took = run.found.restarted_at.map_or("never over".to_owned(), clock);
            let fetched = count(waits.count as f64);
            format!(
                "{took}; {fetched} sessions are fetched, {} of the calls throttled",
                share(calls.throttled)
            )
        }
        _ => format!(
            "all sessions are cached after {}, {} of the calls are throttled; later {} calls a second in the worst minute, {} on average",
            wait(waits.count, waits.max),
            share(calls.throttled),
            count(echo.minute),
            count(echo.mean)
        ),
    };
    format!("{}, {}: {found}.", what(&run.policy), restart(run.scenario))
}

fn after_an_outage(run: &Run) -> Option<String> {
    let Scenario::Outage(lasts) = run.scenario else { return None };
    let Found { waits, lapsed, bare, .. } = &run.found;
    let found = match (bare, lapsed) {
        (0, 0) => "nothing expires".to_owned(),
        (0, _) => {
            let (lapsed, held) = (count(*lapsed as f64), wait(waits.count, waits.max));
            format!("{lapsed} sessions expire, and all are cached again {held} after its end")
        }
        _ => format!(
            "{} sessions are **still not cached** hours after its end",
            count(f64::from(*bare))
        ),
    };
    Some(format!("{}, STS is unreachable for {}: {found}.", what(&run.policy), span(lasts)))
}

/// The policy in a few words.
fn what(policy: &Policy) -> String {
    format!("Sessions of {}, one per {}", span(policy.duration), name(policy))
}

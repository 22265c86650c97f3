//! The part about the Kubernetes API.

use super::text::{count, rate, table};
use crate::{fleet::Fleet, kubernetes::Load};

pub(super) fn section(fleet: &Fleet, load: &Load) -> String {
    [head(fleet, load), steady(load), lists(load), ADVICE.to_owned()].join("\n")
}

fn head(fleet: &Fleet, load: &Load) -> String {
    let sizes = &load.sizes;
    format!(
        "## The Kubernetes API\n\n\
         Arithmetic, not a simulation. An agent watches the pods of its node (`spec.nodeName`) and the metadata of all\n\
         namespaces. It lists the pods every `--sync-interval`, and the namespaces every hour (or as seldom as that), a tenth\n\
         sooner or later, from the API server's own cache. Before a list of pods one namespace is read from etcd: that tells\n\
         which version the cache must have, so that a server that is cut off from etcd is found out. A watch is kept for 300\n\
         to 600 s, by chance, and goes on where the last one ended. Assumed: {} kB of JSON a pod and {} events from its binding to its end, {} namespaces of {} kB of metadata,\n\
         {} changes of namespaces an hour, a bookmark a minute for each watch; the day's churn; {} nodes. Sums over all API\n\
         servers; JSON before compression.\n",
        count(sizes.pod_bytes / 1000.0),
        count(sizes.events_a_pod),
        count(sizes.namespaces),
        count(sizes.namespace_bytes / 1000.0),
        count(sizes.namespace_changes),
        count(f64::from(fleet.nodes)),
    )
}

fn steady(load: &Load) -> String {
    let row = |what: &str, each: f64, bytes: Option<f64>| {
        vec![what.to_owned(), count(each), bytes.map_or(String::new(), rate)]
    };
    let rows = [
        row("watches opened anew", load.opened, None),
        row("bookmarks", load.bookmarks, Some(load.bookmark_bytes)),
        row("events of pods, each to one node", load.pod_events, Some(load.pod_event_bytes)),
        row(
            "events of namespaces, each to all nodes",
            load.namespace_events,
            Some(load.namespace_event_bytes),
        ),
        row("reads of one namespace from etcd, before lists of pods", load.proofs, None),
        row("the same with `--identity=source-ip`, at worst", load.silence_proofs, None),
        row(
            "lists of namespaces after a silence, at worst",
            load.silence_lists,
            Some(load.silence_list_bytes),
        ),
    ];
    format!(
        "{} watches are open.\n\n{}",
        count(load.watches),
        table(&["", "a second", "bytes"], 1, rows.into_iter())
    )
}

fn lists(load: &Load) -> String {
    let rows = [(120.0, "`2m`, the default"), (600.0, "`10m`"), (1800.0, "`30m`")].map(
        |(seconds, name)| {
            let lists = load.lists(seconds);
            vec![
                name.to_owned(),
                count(lists.requests),
                rate(lists.pod_bytes),
                rate(lists.namespace_bytes),
                rate(lists.pod_bytes + lists.namespace_bytes),
            ]
        },
    );
    table(
        &["`--sync-interval`", "lists a second", "pods", "namespaces", "together"],
        1,
        rows.into_iter(),
    )
}

const ADVICE: &str = "\
Lists of pods are most of it. They heal what a watch lost, which is rare, and a pod that is not known is asked for at once
whatever the interval: at this size set `--sync-interval=30m`.

With `--identity=source-ip` a watch of pods that tells nothing new for a minute has them listed, each time after such a read: 60
an hour and node at worst. Servers since 1.31 answer at once; the cache of an older one waits for the next change of any pod,
three seconds at most, and then the pods are read from etcd.

That does not lessen the lists after a silence. An API server sends no bookmark while nothing has changed since the watch
began, so where namespaces hardly ever change, each agent lists all of them after 75 s, and again. The table has what
that comes to at worst; pods change all the time in a fleet like this one.

One namespace that is annotated anew costs an event for each node; a controller that touches all namespaces every minute
costs that for each of them. The agent can't prevent it: it needs the annotations of all namespaces that its pods may come
from. When all agents start at once each lists twice; what fails is tried again after a second, doubling up to half a
minute, by chance half as long.
";

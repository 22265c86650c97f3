//! The part about the Kubernetes API.

use super::text::{count, rate};
use crate::{fleet::Fleet, kubernetes::Load};
use xtask::page::table;

pub(super) fn section(fleet: &Fleet, load: &Load) -> String {
    [head(fleet, load), steady(load), lists(load), ADVICE.to_owned()].join("\n")
}

fn head(fleet: &Fleet, load: &Load) -> String {
    let sizes = &load.sizes;
    format!(
        "## The Kubernetes API\n\n\
         Arithmetic, not a simulation. An agent watches the pods of its node (`spec.nodeName`) and the\n\
         metadata of all namespaces. It lists the pods every `--sync-interval`, and the namespaces every hour\n\
         (or less often, if that is longer), a tenth sooner or later, from the API server's own cache. Before\n\
         a list of pods it reads one namespace from etcd. That tells which version the cache must have, so\n\
         that a server that is cut off from etcd is detected. A watch is kept for 300 to 600 s, by chance,\n\
         and continues where the last one ended.\n\
         \n\
         These sizes are assumed: {} kB of JSON a pod and {} events from its binding to its end, {}\n\
         namespaces of {} kB of metadata, {} changes of namespaces an hour, a bookmark a minute for each\n\
         watch, the day's churn, and {} nodes. The numbers are sums over all API servers, of JSON before\n\
         compression.\n",
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
        row("reopened watches", load.opened, None),
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
        table(&["", "a second", "bytes"], 0..1, rows)
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
    table(&["`--sync-interval`", "lists a second", "pods", "namespaces", "together"], 0..1, rows)
}

const ADVICE: &str = "\
Lists of pods are most of it. They repair what a watch lost, which is rare. A pod that is not known
is requested at once whatever the interval. So at this size set `--sync-interval=30m`.

With `--identity=source-ip`, a watch of pods without news for a minute has the pods listed, each
time after such a read: 60 an hour and node at worst. Servers since 1.31 answer at once. The cache
of an older one waits for the next change of any pod, three seconds at most, and then the pods are
read from etcd.

That does not lessen the lists after a silence. An API server sends no bookmark while nothing has
changed since the watch began. So where namespaces hardly ever change, each agent lists all of them
after 75 s, and again. The table has the worst case of that. Pods change all the time in a fleet
like this one.

A changed annotation of one namespace costs an event for each node. A controller that touches all
namespaces every minute costs that for each of them. The agent can't prevent it: it needs the
annotations of all namespaces that its pods may come from. When all agents start at once, each lists
twice. A failed list is retried after a second, doubling up to half a minute, by chance half as
long.
";

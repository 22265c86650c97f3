//! What the documents say of defaults and limits is what the program has.

use std::{fs, path::Path};

use kiam_agent::config;

/// A number that stands in a document.
struct Claim {
    page: &'static str,
    /// As the page has it, but for line ends.
    says: &'static str,
    of: Of,
}

/// What it is a claim of.
enum Of {
    /// A flag's default.
    Flag(&'static str, &'static str),
    /// This text of the source at this path, from the root.
    Source(&'static str, &'static str),
    /// Nothing that is compared here, and why not.
    Elsewhere(&'static str),
}

const fn claim(page: &'static str, says: &'static str, of: Of) -> Claim {
    Claim { page, says, of }
}

use Of::{Elsewhere, Flag, Source};

const CLAIMS: &[Claim] = &[
    claim(
        "README.md",
        "Before it is ready, and every minute, the agent tries",
        Flag("selftest-interval", "1m"),
    ),
    claim(
        "ARCHITECTURE.md",
        "renewed its lease within 10 s",
        Source("kiam-common/src/lib.rs", "LEASE_NS: u64 = 10_000_000_000;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "a sweep: every 30 s",
        Source("kiam-agent/src/app/serving.rs", "SWEEP: Duration = Duration::from_secs(30);"),
    ),
    claim(
        "ARCHITECTURE.md",
        "every 2 s for cgroups that the kernel refuses",
        Source(
            "kiam-agent/kernel/src/sandboxes/follow.rs",
            "CATCH_UP: Duration = Duration::from_secs(2);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "older than 10 s, or have listeners",
        Source(
            "kiam-agent/kernel/src/sandboxes/sandbox.rs",
            "HURRY: Duration = Duration::from_secs(10);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "sees 64 processes at most",
        Source("kiam-agent/kernel/src/sandboxes/processes.rs", "FEW: usize = 64;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "200 requests per second, 1,000 at once",
        Flag("pod-rate", "200:1000"),
    ),
    claim(
        "ARCHITECTURE.md",
        "192 open connections",
        Source("kiam-agent/requests/src/serve/config.rs", "connections_per_pod: 192,"),
    ),
    claim(
        "ARCHITECTURE.md",
        "16 kB of unread bytes each way in the kernel",
        Source("kiam-agent/requests/src/serve/mod.rs", "SOCKET_BUFFER: usize = 8 * 1024;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "At most 16,384 callers",
        Source("kiam-agent/requests/src/serve/limits.rs", "OWNERS: usize = 16_384;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "renews the lease every two seconds",
        Source(
            "kiam-agent/kernel/src/intercept/lease.rs",
            "RENEWAL: Duration = Duration::from_secs(2);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "runtime has run no task for 30 s",
        Source(
            "kiam-agent/kernel/src/intercept/renewal.rs",
            "HUNG: Duration = Duration::from_secs(30);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "One call per key is in flight, 16 in all",
        Source("kiam-agent/core/src/credentials/prefetch.rs", "IN_FLIGHT: usize = 16;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "forgotten a minute after the last pod wanted them",
        Source(
            "kiam-agent/core/src/credentials/prefetch.rs",
            "LINGER: Duration = Duration::from_secs(60);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "3 s before the grace period is over",
        Source(
            "kiam-agent/src/handover/departure.rs",
            "MARGIN: Duration = Duration::from_secs(3);",
        ),
    ),
    claim(
        "docs/operating.md",
        "3 s before `--grace-period` is over",
        Source(
            "kiam-agent/src/handover/departure.rs",
            "MARGIN: Duration = Duration::from_secs(3);",
        ),
    ),
    claim(
        "docs/operating.md",
        "has not renewed its lease for 5 s",
        Source(
            "kiam-agent/kernel/src/intercept/uninstall.rs",
            "HUNG: Duration = Duration::from_secs(5);",
        ),
    ),
    claim(
        "docs/operating.md",
        "stuck for half a minute",
        Source(
            "kiam-agent/kernel/src/intercept/renewal.rs",
            "HUNG: Duration = Duration::from_secs(30);",
        ),
    ),
    claim(
        "docs/operating.md",
        "take 64 connections each, 8 from one source",
        Source("kiam-agent/src/admin/connections.rs", "CONNECTIONS: usize = 64;"),
    ),
    claim(
        "docs/operating.md",
        "take 64 connections each, 8 from one source",
        Source("kiam-agent/src/admin/connections.rs", "SHARE: usize = 8;"),
    ),
    claim(
        "docs/operating.md",
        "(6 h at most)",
        Source("kiam-agent/requests/src/imds/token.rs", "MAX_TOKEN_TTL: u32 = 21_600;"),
    ),
    claim(
        "docs/operating.md",
        "at most once per second for each kind and pod",
        Source(
            "kiam-agent/requests/src/imds/service.rs",
            "LOG_PERIOD: Duration = Duration::from_secs(1);",
        ),
    ),
    claim(
        "docs/operating.md",
        "must be below the CNI's own rules. The default is",
        Flag("guard-preference", "5"),
    ),
    claim(
        "docs/operating.md",
        "The defaults use a tenth of STS's quota",
        Elsewhere("simulated: docs/scale.md"),
    ),
    claim(
        "docs/security.md",
        "under `--host-network-pods=pass`, the default",
        Flag("host-network-pods", "pass"),
    ),
    claim(
        "docs/security.md",
        "After 90 s without news from etcd",
        Source(
            "kiam-agent/core/src/pods/reader.rs",
            "STALE_AFTER: Duration = Duration::from_secs(90);",
        ),
    ),
    claim(
        "docs/security.md",
        "the lease ends it within 10 s",
        Source("kiam-common/src/lib.rs", "LEASE_NS: u64 = 10_000_000_000;"),
    ),
    claim(
        "docs/runbook.md",
        "the node's 8,192 connections",
        Source("kiam-agent/requests/src/serve/config.rs", "connections: 8192,"),
    ),
    claim("docs/runbook.md", "for 27 s at most", Flag("grace-period", "30s")),
    claim(
        "docs/runbook.md",
        "`--identity=source-ip`, and no news from etcd for 90 s",
        Source(
            "kiam-agent/core/src/pods/reader.rs",
            "STALE_AFTER: Duration = Duration::from_secs(90);",
        ),
    ),
    claim("docs/guard.md", "With `--guard=route` (the default)", Flag("guard", "route")),
    claim(
        "docs/guard.md",
        "`P` is `--guard-preference` (default 5)",
        Flag("guard-preference", "5"),
    ),
    claim(
        "docs/sessions.md",
        "With the defaults that is one session per role on each node, named `kiam-kiam`",
        Flag("session-name", "kiam-kiam"),
    ),
    claim(
        "docs/sessions.md",
        "names managed policies, ten at most",
        Source("kiam-agent/core/src/role/policies.rs", "MOST: usize = 10;"),
    ),
    claim(
        "docs/sessions.md",
        "remembers it for a day",
        Source(
            "kiam-agent/src/sts/durations.rs",
            "FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);",
        ),
    ),
    claim(
        "docs/sessions.md",
        "with 15 minutes left where that is sooner",
        Source(
            "kiam-agent/core/src/credentials/schedule.rs",
            "FLOOR: Duration = Duration::from_secs(15 * 60);",
        ),
    ),
    claim(
        "docs/annotations.md",
        "at most ten, comma separated",
        Source("kiam-agent/core/src/role/policies.rs", "MOST: usize = 10;"),
    ),
    claim(
        "docs/policy.md",
        "is longer than 16 KiB",
        Source("kiam-agent/core/src/policy/expression.rs", "MAX_LENGTH: usize = 16 * 1024;"),
    ),
    claim(
        "docs/policy.md",
        "takes more than 256 KiB once compiled",
        Source(
            "kiam-agent/core/src/policy/expression.rs",
            "MAX_COMPILED_BYTES: usize = 256 * 1024;",
        ),
    ),
    claim(
        "docs/policy.md",
        "has more than 256 classes",
        Source("kiam-agent/core/src/policy/expression.rs", "MAX_CLASSES: usize = 256;"),
    ),
    claim(
        "docs/policy.md",
        "with more than 16 sets",
        Source("kiam-agent/core/src/policy/expression.rs", "MAX_FOLDED: usize = 16;"),
    ),
    claim(
        "docs/policy.md",
        "a list longer than 64 KiB",
        Source("kiam-agent/core/src/policy/allowed.rs", "MAX_LENGTH: usize = 64 * 1024;"),
    ),
    claim(
        "docs/policy.md",
        "of more than 1,000 globs",
        Source("kiam-agent/core/src/policy/allowed.rs", "MAX_GLOBS: usize = 1_000;"),
    ),
    claim(
        "docs/policy.md",
        "| `session-policies` | 24 KiB |",
        Source("kiam-agent/src/cluster/filters.rs", "annotations::SESSION_POLICIES, 24 * 1024)"),
    ),
    claim(
        "docs/policy.md",
        "| `permitted` | 16 KiB |",
        Source("kiam-agent/src/cluster/filters.rs", "annotations::PERMITTED, 16 * 1024)"),
    ),
    claim(
        "docs/policy.md",
        "| `allowed-roles` | 64 KiB |",
        Source("kiam-agent/src/cluster/filters.rs", "annotations::ALLOWED_ROLES, 64 * 1024)"),
    ),
    claim(
        "docs/policy.md",
        "it is written again each half hour",
        Source(
            "kiam-agent/src/cluster/events/ledger.rs",
            "REPEAT_INTERVAL: Duration = Duration::from_secs(30 * 60);",
        ),
    ),
    claim(
        "docs/policy.md",
        "after five minutes at the soonest",
        Source(
            "kiam-agent/src/cluster/events/ledger.rs",
            "RETURN_INTERVAL: Duration = Duration::from_secs(5 * 60);",
        ),
    ),
    claim(
        "docs/paths.md",
        "eight at a time",
        Source("kiam-agent/requests/src/imds/upstream.rs", "SLOTS: usize = 8;"),
    ),
    claim(
        "docs/paths.md",
        "two of one pod",
        Source("kiam-agent/requests/src/imds/upstream.rs", "SHARE: usize = 2;"),
    ),
    claim(
        "docs/paths.md",
        "four of one namespace",
        Source("kiam-agent/requests/src/imds/upstream.rs", "NAMESPACE_SHARE: usize = SLOTS / 2;"),
    ),
    claim(
        "docs/paths.md",
        "16 of each kind are kept for a pod",
        Source("kiam-agent/requests/src/imds/journal.rs", "REQUESTS: usize = 16;"),
    ),
    claim(
        "docs/faults.md",
        "`Retry-After: 1` is sent",
        Source(
            "kiam-agent/requests/src/imds/response.rs",
            "RETRY_AFTER: Duration = Duration::from_secs(1);",
        ),
    ),
    claim(
        "docs/faults.md",
        "10 s, when the call times out",
        Source("kiam-agent/src/sts/mod.rs", "CALL_DEADLINE: Duration = Duration::from_secs(10);"),
    ),
    claim(
        "docs/faults.md",
        "it times out after 30 s",
        Source("kiam-agent/src/cluster/body.rs", "IDLE: Duration = Duration::from_secs(30);"),
    ),
    claim(
        "docs/installing.md",
        "seven hours after the programs were attached",
        Source(
            "kiam-agent/src/older_pods.rs",
            "LIFETIME: Duration = Duration::from_secs(7 * 3600);",
        ),
    ),
    claim(
        "docs/installing.md",
        "at most one every ten seconds on a node",
        Source("kiam-agent/src/app/knowledge.rs", "EVICTIONS: Duration = Duration::from_secs(10);"),
    ),
    claim(
        "docs/installing.md",
        "again within ten seconds of a change",
        Source(
            "kiam-agent/src/cluster/client.rs",
            "CHECK_INTERVAL: Duration = Duration::from_secs(10);",
        ),
    ),
    claim(
        "docs/installing.md",
        "has failed for more than a minute",
        Source("kiam-agent/src/cluster/tls.rs", "LASTING: Duration = Duration::from_secs(60);"),
    ),
    claim(
        "docs/metrics.md",
        "After a minute `/ready` shows why",
        Source("kiam-agent/src/cluster/outage.rs", "LASTING: Duration = Duration::from_secs(60);"),
    ),
    claim(
        "docs/metrics.md",
        "served at `--admin`, which is the node's loopback by default",
        Flag("admin", "127.0.0.1:3101"),
    ),
    claim(
        "docs/scale.md",
        "what a node may ask (`--sts-rate`, by its default)",
        Flag("sts-rate", "10:250"),
    ),
    claim(
        "docs/scale.md",
        "one name for all (`--session-name`, by its default)",
        Flag("session-name", "kiam-kiam"),
    ),
    claim("docs/scale.md", "| `2m`, the default |", Flag("sync-interval", "2m")),
    claim("docs/audit.md", "| `log` (default) |", Flag("audit", "log")),
    claim("docs/audit.md", "The default is `log`", Flag("audit", "log")),
    claim(
        "docs/audit.md",
        "`--audit-file` (default `/var/log/kiam/audit.log`)",
        Flag("audit-file", "/var/log/kiam/audit.log"),
    ),
    claim("docs/audit.md", "`--audit-file-size` (default `64Mi`)", Flag("audit-file-size", "64Mi")),
    claim(
        "docs/audit.md",
        "A pod may have 60 lines at once and one a second after that",
        Source(
            "kiam-agent/requests/src/audit/shares.rs",
            "LINES: Rate = Rate { burst: 60, period: Duration::from_secs(1) };",
        ),
    ),
    claim(
        "docs/audit.md",
        "16 of them each 30 s",
        Source(
            "kiam-agent/requests/src/audit/mod.rs",
            "FLUSH: Duration = Duration::from_secs(30);",
        ),
    ),
    claim(
        "docs/audit.md",
        "64 lines that wait to be written",
        Source("kiam-agent/requests/src/audit/shares.rs", "QUEUED: usize = 64;"),
    ),
    claim(
        "docs/audit.md",
        "it has run for ten minutes without",
        Source(
            "kiam-agent/requests/src/audit/unusual.rs",
            "LATE: Duration = Duration::from_secs(600);",
        ),
    ),
    claim(
        "docs/web-identity.md",
        "The token lives 600 s at most",
        Source("kiam-agent/src/cluster/tokens.rs", "LIFE: u32 = 600;"),
    ),
    claim("docs/paths.md", "Open by default", Elsewhere("imds::route has a test for each path")),
    claim(
        "docs/flags.md",
        "`--deny-path` closes paths that are open by default",
        Elsewhere("imds::route has a test for each path"),
    ),
    claim("docs/flags.md", "every flag, its default and what it does", Elsewhere("below")),
    claim(
        "docs/first-connects.md",
        "CRI-O by default keeps no process for a sandbox",
        Elsewhere("of CRI-O"),
    ),
    claim(
        "ARCHITECTURE.md",
        "Each second `keeper`'s sentry compares the links' programs",
        Source(
            "kiam-agent/kernel/src/keeper/sentry.rs",
            "LOOK: Duration = Duration::from_secs(1);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "the keeper looks every 200 ms",
        Source("kiam-agent/kernel/src/keeper.rs", "SCAN: Duration = Duration::from_millis(200);"),
    ),
    claim(
        "ARCHITECTURE.md",
        "and a twentieth of the others",
        Source("kiam-agent/kernel/src/sandboxes/follow/sweep.rs", "TURNS: u64 = 20;"),
    ),
    claim(
        "ARCHITECTURE.md",
        "while another agent attaches, for two seconds at most",
        Source(
            "kiam-agent/kernel/src/pins/locks.rs",
            "PATIENCE: Duration = Duration::from_secs(2);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "after five minutes without the roles that are missing",
        Source(
            "kiam-agent/src/handover/first_pass.rs",
            "STRAGGLERS: Duration = Duration::from_secs(300);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "10 s before that, it tells successors",
        Source(
            "kiam-agent/src/handover/departure.rs",
            "HURRY: Duration = Duration::from_secs(10);",
        ),
    ),
    claim(
        "ARCHITECTURE.md",
        "an age drawn between 40 and 60 % of their life",
        Source("kiam-agent/core/src/credentials/schedule.rs", "(life * 3 / 5)"),
    ),
    claim(
        "ARCHITECTURE.md",
        "an age drawn between 40 and 60 % of their life",
        Source("kiam-agent/core/src/credentials/schedule.rs", "latest * 2 / 3;"),
    ),
    claim(
        "docs/faults.md",
        "up to one minute; up to two when STS throttles, and up to ten when it denies",
        Source(
            "kiam-agent/core/src/credentials/schedule.rs",
            "Retryable | ErrorClass::TooLong => (1, 60),",
        ),
    ),
    claim(
        "docs/faults.md",
        "up to one minute; up to two when STS throttles, and up to ten when it denies",
        Source("kiam-agent/core/src/credentials/schedule.rs", "Throttled => (5, 120),"),
    ),
    claim(
        "docs/faults.md",
        "up to one minute; up to two when STS throttles, and up to ten when it denies",
        Source("kiam-agent/core/src/credentials/schedule.rs", "Denied => (15, 600),"),
    ),
    claim(
        "docs/policy.md",
        "A node writes ten at once and then one per ten seconds",
        Source(
            "kiam-agent/src/cluster/events/ledger.rs",
            "NODE: Rate = Rate { burst: 10, period: Duration::from_secs(10) };",
        ),
    ),
    claim(
        "docs/policy.md",
        "three and then one per five minutes",
        Source(
            "kiam-agent/src/cluster/events/ledger.rs",
            "SUBJECT: Rate = Rate { burst: 3, period: Duration::from_secs(5 * 60) };",
        ),
    ),
];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A page's paragraphs, each on one line, without blocks of code.
fn prose(page: &str) -> String {
    let text = fs::read_to_string(root().join(page)).expect("the page can be read");
    let (mut prose, mut code) = (String::new(), false);
    for line in text.lines().map(str::trim) {
        if line.starts_with("```") {
            code = !code;
        } else if line.is_empty() || line.starts_with(['#', '|', '-', '*']) {
            prose += &format!("\n{}{line}", if code { "`" } else { "" });
        } else if !code {
            prose += &format!(" {line}");
        }
    }
    prose
}

fn pages() -> Vec<String> {
    let docs = fs::read_dir(root().join("docs")).expect("the folder can be read").flatten();
    let docs = docs.filter_map(|entry| entry.file_name().into_string().ok());
    let mut pages: Vec<_> =
        docs.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
    pages.extend(["README.md", "ARCHITECTURE.md"].map(str::to_owned));
    pages
}

#[test]
fn numbers_of_the_pages_are_the_programs() {
    for Claim { page, says, of } in CLAIMS {
        assert!(prose(page).contains(says), "{page} does not say {says:?}");
        match of {
            Flag(name, value) => {
                assert_eq!(config::flag_default(name).as_deref(), Some(*value), "{page}: {says:?}");
            }
            Source(file, text) => {
                let source = fs::read_to_string(root().join(file));
                let source = source.unwrap_or_else(|error| panic!("{file}: {error}"));
                assert!(source.contains(text), "{page}: {says:?}: no {text} in {file}");
            }
            Elsewhere(why) => assert!(!why.is_empty()),
        }
    }
}

/// Whoever writes that something is a default adds the claim above, so that it is compared from then on.
#[test]
fn each_default_that_a_page_speaks_of_is_compared() {
    let (mut found, mut unknown) = (0, Vec::new());
    for page in pages().iter().filter(|page| *page != "docs/style.md") {
        for sentence in prose(page).lines().flat_map(|line| line.split_inclusive(". ")) {
            let words = sentence.split('`').step_by(2).collect::<String>().to_lowercase();
            if !words.contains("default") || words.starts_with("| flag | default") {
                continue;
            }
            found += 1;
            let known = CLAIMS.iter().filter(|claim| claim.page == page);
            let whole = sentence.trim_matches([' ', '.', '#']);
            let of_it = |says: &str| sentence.contains(says) || says.contains(whole);
            let is_compared =
                known.map(|claim| claim.says).any(|it| it.contains("default") && of_it(it));
            if !is_compared {
                unknown.push(format!("{page}: {whole}"));
            }
        }
    }
    assert!(found > 10, "{found}");
    assert!(unknown.is_empty(), "not compared:\n{}", unknown.join("\n"));
}

/// Words that stand for a flag without a default; a switch may have none either.
const ABSENT: [&str; 10] = [
    "required",
    "all nodes",
    "found",
    "service account",
    "none",
    "this or the next",
    "as for all else",
    "`AWS_REGION`, else upstream's",
    "the region's",
    "",
];

#[test]
fn flags_page_has_the_programs_defaults() {
    let page = fs::read_to_string(root().join("docs/flags.md")).expect("the page can be read");
    let mut compared = 0;
    for row in page.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let flag = cells[0].trim_matches('`').trim_start_matches("--");
        let shown = cells[1];
        match config::flag_default(flag) {
            Some(value) if shown == format!("`{value}`") => compared += 1,
            Some(value) => assert!(value == "false" && shown.is_empty(), "{row}: it is {value}"),
            // It depends on the interceptor.
            None if flag == "identity" => {}
            None => assert!(ABSENT.contains(&shown), "{row}: it has none"),
        }
    }
    assert!(compared > 20, "{compared}");
}

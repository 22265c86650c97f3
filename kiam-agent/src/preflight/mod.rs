//! `kiam-agent preflight`: checks what a node lacks, before an agent runs there, and changes nothing.
//!
//! Checks run beside each other, and each ends at its deadline: one that can't be made is reported as unknown.

mod api;
mod clock;
mod imds;
mod limits;
mod output;
mod proxy;
mod roles;
mod sts;

use std::{io, net::SocketAddr, process::ExitCode, time::Duration};

use futures::future::{BoxFuture, join_all};
use tokio::{runtime::Builder, time::timeout};

use self::{api::ApiReport, clock::ServerClock, output::Report};
use crate::{
    admin,
    config::{Config, Preflight},
};
use kiam_core::{
    blocking,
    preflight::{Check, Topic, Verdict},
};
use kiam_kernel::preflight::{self as kernel, GROUPS, Group};

/// The longest time of a group of checks that ask the kernel: the verifier takes most of it.
const KERNEL_LIMIT: Duration = Duration::from_secs(60);
/// The longest time of a group of checks that ask servers, which have shorter deadlines for each request.
const NETWORK_LIMIT: Duration = Duration::from_secs(45);

/// Makes all checks and prints them. The status is a failure if a check fails.
///
/// # Errors
///
/// The system's, if it gives no runtime.
pub fn preflight(preflight: Preflight) -> io::Result<ExitCode> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let output = preflight.output;
    let node = preflight.config.cluster.node_name.clone();
    let mut checks = runtime.block_on(all(preflight));
    // A check that has not ended by its deadline holds up nothing.
    runtime.shutdown_background();
    checks.sort_by_key(|check| check.topic);
    let fails = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Report { node, checks }.print(output);
    Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn all(preflight: Preflight) -> Vec<Check> {
    let Preflight { config, roles, .. } = preflight;
    let facts = facts(&config).await;
    let asked = facts.clone();
    let intercepted = blocking::spawn(move |token| asked.may_be_intercepted(token)).await;
    let intercepted = intercepted.unwrap_or_default();
    let mut groups: Vec<BoxFuture<'_, Vec<Check>>> =
        GROUPS.iter().map(|group| in_kernel(group, facts.clone())).collect();
    groups.push(Box::pin(async { vec![flags(&config), limits::open_files(&config)] }));
    groups.push(Box::pin(servers(&config, &facts, intercepted, roles)));
    join_all(groups).await.concat()
}

/// What the kernel's part has to know.
async fn facts(config: &Config) -> kernel::Config {
    let hosts = config.hosts.addresses();
    let hosts = hosts.map(|host| ("--host", SocketAddr::new(host, config.port)));
    let metrics = config.metrics.map(|address| ("--metrics", address));
    kernel::Config {
        intercept: config.intercept.clone(),
        bpffs: config.bpffs.clone(),
        state_dir: config.state_dir.clone(),
        addresses: hosts.chain([("--admin", config.admin)]).chain(metrics).collect(),
        is_served: admin::is_served(&config.state_dir).await,
    }
}

/// Makes the checks of `group` on a thread of their own.
fn in_kernel(group: &'static Group, facts: kernel::Config) -> BoxFuture<'static, Vec<Check>> {
    let checks = blocking::spawn(move |token| (group.run)(token, &facts));
    Box::pin(bounded(group.topics, KERNEL_LIMIT, async {
        checks.await.unwrap_or_else(|_| {
            let panicked = |topic: &Topic| {
                Check::unknown(*topic, "the check panicked", "report this bug of kiam-agent")
            };
            group.topics.iter().map(panicked).collect()
        })
    }))
}

/// The checks that ask servers: those of AWS and Kubernetes beside each other, and then what needs both.
async fn servers(
    config: &Config,
    facts: &kernel::Config,
    intercepted: bool,
    tried: Vec<kiam_core::role::RoleArn>,
) -> Vec<Check> {
    let service = async {
        let mut clock = None;
        let checks = imds::checks(config, intercepted, &mut clock);
        (bounded(imds::TOPICS, NETWORK_LIMIT, checks).await, clock)
    };
    let kubernetes = async {
        let mut report = ApiReport::default();
        let checks = api::checks(config, facts, &mut report);
        (bounded(api::TOPICS, NETWORK_LIMIT, checks).await, report)
    };
    let mut caller = None;
    let sts = bounded(sts::TOPICS, NETWORK_LIMIT, sts::checks(config, intercepted, &mut caller));
    let ((mut checks, service_clock), (api, mut report), sts) =
        tokio::join!(service, kubernetes, sts);
    checks.extend(api);
    checks.extend(sts);
    let clocks: Vec<ServerClock> = service_clock.into_iter().chain(report.clock.take()).collect();
    checks.push(clock::check(&clocks));
    let region = caller.as_ref().map(|caller| caller.sts.region.as_str());
    checks.push(proxy::check(config, region));
    let assumed = roles::checks(config, report, caller, tried);
    checks.extend(bounded(&[Topic::Roles], NETWORK_LIMIT, assumed).await);
    checks
}

/// Ends `checks` after `limit`; then all `topics` are unknown.
async fn bounded(
    topics: &'static [Topic],
    limit: Duration,
    checks: impl Future<Output = Vec<Check>>,
) -> Vec<Check> {
    timeout(limit, checks).await.unwrap_or_else(|_| {
        let finding = format!("the check did not end within {} s", limit.as_secs());
        let late = |topic: &Topic| {
            Check::unknown(*topic, finding.as_str(), "repeat it when the node is less busy")
        };
        topics.iter().map(late).collect()
    })
}

/// The warnings that the agent logs at its start.
fn flags(config: &Config) -> Check {
    match config.warnings.is_empty() {
        true => Check::ok(Topic::Flags, "no risky flag, and no unknown variable"),
        false => Check::warn(
            Topic::Flags,
            config.warnings.join("; "),
            "change the flags, unless that is what you want: docs/flags.md",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_check_that_does_not_end_is_unknown() {
        let never = bounded(&[Topic::Sts, Topic::Roles], NETWORK_LIMIT, std::future::pending());
        let checks = never.await;
        let topics: Vec<_> = checks.iter().map(|check| check.topic).collect();
        assert_eq!(topics, [Topic::Sts, Topic::Roles]);
        assert!(checks.iter().all(|check| check.verdict == Verdict::Unknown), "{checks:?}");
        assert!(checks[0].finding.contains("within 45 s"), "{checks:?}");
    }

    #[tokio::test]
    async fn a_check_that_panics_is_unknown() {
        const GROUP: &Group =
            &Group { topics: &[Topic::Kernel], run: |_, _| std::panic::panic_any(()) };
        let facts = kernel::Config {
            intercept: None,
            bpffs: "/a".into(),
            state_dir: "/b".into(),
            addresses: Vec::new(),
            is_served: false,
        };
        let checks = in_kernel(GROUP, facts).await;
        assert_eq!(checks[0].verdict, Verdict::Unknown);
        assert!(checks[0].finding.contains("panicked"), "{checks:?}");
    }
}

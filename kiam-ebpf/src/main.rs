//! The kernel programs, which redirect pods' IMDS traffic to the agent and record its callers.
//!
//! The entry points convert the kernel's context into plain values, get a verdict from `kiam_common::redirect`, and apply
//! it. They need kernel 5.10 and cgroup v2, and no privilege of the pods.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod callers;
mod flows;
mod guard;
mod listener;
mod maps;
mod processes;
mod sock_addr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE,
    },
    helpers::{bpf_get_current_cgroup_id, generated::bpf_get_socket_cookie},
    macros::{cgroup_skb, cgroup_sock_addr, classifier, sock_ops, socket_filter},
    programs::{SkBuffContext, SockAddrContext, SockOpsContext, TcContext},
};
use aya_log_ebpf::debug;
use kiam_common::{
    client::{ClientRecord, mapped},
    counters::VerdictReason,
    denial::{RedirectedSocket, bind_denial, has_pod_listener},
    redirect::{self, Destination, IMDS_PORT, ImdsV6, Target, Verdict},
};

use crate::{
    callers::{caller, is_agent, is_selftest},
    flows::Redirection,
    maps::{
        AGENT_PORTS, CLIENTS, NAMESPACES_ARE_KNOWN, OBSERVES, PATH, PROBE_NETNS, PROBE_SOCKET,
        SANDBOXES, TARGET, count,
    },
    sock_addr::{
        ipv4, ipv6, is_bound_to_interface, is_on_host_network, is_stream, netns, port, rewrite,
    },
};

/// The result of cgroup hooks that lets the call pass.
const ALLOW: i32 = 1;
/// The result of cgroup hooks that fails the call with `EPERM`.
const DENY: i32 = 0;
/// The result of tc programs that continues with the next program: `TC_ACT_UNSPEC`, and `TCX_NEXT`.
const NEXT: i32 = -1;
/// The result of tc programs that drops the packet: `TC_ACT_SHOT`.
const SHOT: i32 = 2;

/// The choice among the agent's listeners for a caller.
#[derive(Clone, Copy)]
struct ListenerChoice {
    target: Target,
    /// Whether these are pod listeners.
    pod_listener: bool,
    /// The cgroup of the pod that the caller's network namespace belongs to; 0, which no cgroup has, if none is known.
    pod: u64,
}

impl ListenerChoice {
    /// Chooses the listeners. Only traffic to the IMDS has pod listeners.
    #[inline(always)]
    fn of(ctx: &SockAddrContext, node: Target, for_imds: bool) -> Self {
        if for_imds {
            // SAFETY: the entry is not freed while the program runs (RCU).
            if let Some(sandbox) = unsafe { SANDBOXES.get(netns(ctx)) } {
                let (sandbox, pod) = (*sandbox, sandbox.pod);
                if has_pod_listener(sandbox, PATH.load(), || is_bound_to_interface(ctx)) {
                    return Self {
                        target: Target::pod_listeners(sandbox),
                        pod_listener: true,
                        pod,
                    };
                }
                return Self { target: node, pod_listener: false, pod };
            }
        }
        Self { target: node, pod_listener: false, pod: 0 }
    }

    /// The cgroup of the caller's pod, whose quota has its connections. 0, for unknown, unless the caller is in the node's
    /// network namespace, or in that of a pod as one of its processes: any user can create namespaces with any address.
    #[inline(always)]
    fn pod(&self, on_host: bool) -> u64 {
        if !on_host && self.pod != 0 && callers::is_in(self.pod) {
            return self.pod;
        }
        if on_host || NAMESPACES_ARE_KNOWN.load() == 0 {
            return callers::pod();
        }
        0
    }
}

/// connect(2) of IPv4 sockets. Kernel 4.17.
#[cgroup_sock_addr(connect4)]
fn kiam_connect4(ctx: SockAddrContext) -> i32 {
    judge_v4(&ctx)
}

/// connect(2) of IPv6 sockets; v4-mapped destinations run only this one. Kernel 4.17.
#[cgroup_sock_addr(connect6)]
fn kiam_connect6(ctx: SockAddrContext) -> i32 {
    judge_v6(&ctx)
}

/// sendto(2) and sendmsg(2) of unconnected IPv4 datagram sockets. Kernel 4.18.
#[cgroup_sock_addr(sendmsg4)]
fn kiam_sendmsg4(ctx: SockAddrContext) -> i32 {
    judge_v4(&ctx)
}

/// sendto(2) and sendmsg(2) of unconnected IPv6 datagram sockets. Kernel 4.18.
#[cgroup_sock_addr(sendmsg6)]
fn kiam_sendmsg6(ctx: SockAddrContext) -> i32 {
    judge_v6(&ctx)
}

/// bind(2) of IPv4 sockets: on the node's network, only the agent binds its ports. Kernel 4.17.
#[cgroup_sock_addr(bind4)]
fn kiam_bind4(ctx: SockAddrContext) -> i32 {
    bind(&ctx)
}

/// bind(2) of IPv6 sockets, which may accept IPv4 connections, too. Kernel 4.17.
#[cgroup_sock_addr(bind6)]
fn kiam_bind6(ctx: SockAddrContext) -> i32 {
    bind(&ctx)
}

/// Rewrites addresses like a socket load balancer above the pods' cgroup, for the self-test. It is attached during the
/// self-test, after the other programs, and acts only on the self-test's cgroup. Kernel 4.17.
#[cgroup_sock_addr(connect4)]
fn kiam_rewrite(ctx: SockAddrContext) -> i32 {
    if ipv4(&ctx).octets() == redirect::REWRITTEN.octets() && is_selftest() {
        sock_addr::set_ipv4(&ctx, redirect::IMDS_V4.octets());
    }
    ALLOW
}

/// bind(2) of one socket of the agent: records its network namespace, for kernels without another way to read it. Attached
/// only while the agent starts. Kernel 5.7.
#[cgroup_sock_addr(bind4)]
fn kiam_namespace(ctx: SockAddrContext) -> i32 {
    // SAFETY: the helper takes the program's own context (kernel 4.18).
    let socket = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if socket == PROBE_SOCKET.load()
        && let Some(noted) = PROBE_NETNS.get_ptr_mut(0)
    {
        // SAFETY: the map's own value, which one bind of one socket writes.
        unsafe { *noted = netns(&ctx) }
    }
    ALLOW
}

/// getpeername(2) of IPv4 sockets: returns the original destination. Kernel 5.8.
#[cgroup_sock_addr(getpeername4)]
fn kiam_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some([.., a, b, c, d]) = asked(&ctx) {
        sock_addr::set_ipv4(&ctx, [a, b, c, d]);
        sock_addr::set_port(&ctx, IMDS_PORT);
    }
    ALLOW
}

/// getpeername(2) of IPv6 sockets. Kernel 5.8.
#[cgroup_sock_addr(getpeername6)]
fn kiam_getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(asked) = asked(&ctx) {
        sock_addr::set_ipv6(&ctx, asked);
        sock_addr::set_port(&ctx, IMDS_PORT);
    }
    ALLOW
}

/// Publishes redirected connections, and removes them when they close. Kernel 5.2.
#[sock_ops]
fn kiam_sock_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => flows::begin(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => flows::publish(&ctx),
        // The arguments are the old state and the new state.
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => flows::close(&ctx),
        _ => {}
    }
    1
}

/// Filters packets to the agent's listener, and to connections accepted from it. Kernel 4.18.
#[socket_filter]
fn kiam_listener(ctx: SkBuffContext) -> i64 {
    listener::filter(&ctx)
}

/// Filters packets of sockets in the pods' cgroup (`--guard=skb`). Kernel 5.2.
#[cgroup_skb(egress)]
fn kiam_guard(ctx: SkBuffContext) -> i32 {
    let skb = ctx.as_ptr().cast();
    if !guard::is_for_imds(skb) {
        return ALLOW;
    }
    let Some(reason) = guard::sender(skb).guard_denial() else { return ALLOW };
    count(reason);
    DENY
}

/// Filters packets that leave the node (`--guard=uplink`). Kernel 5.2.
#[classifier]
fn kiam_uplink(ctx: TcContext) -> i32 {
    let skb = ctx.as_ptr().cast();
    if !guard::is_for_imds(skb) && !guard::is_frame_for_imds(skb) {
        return NEXT;
    }
    let denial = guard::sender(skb).uplink_denial(|| guard::was_forwarded(skb));
    let Some(reason) = denial else { return NEXT };
    count(reason);
    SHOT
}

#[inline(always)]
fn judge_v4(ctx: &SockAddrContext) -> i32 {
    let (address, port, node) = (ipv4(ctx), port(ctx), TARGET.load());
    if !redirect::concerns_v4(address, port, &node) {
        return ALLOW;
    }
    let choice = ListenerChoice::of(ctx, node, redirect::is_imds_v4(address));
    let verdict = redirect::decide_v4(address, port, &choice.target, caller(ctx));
    apply(ctx, verdict, mapped(address.octets()), choice)
}

#[inline(always)]
fn judge_v6(ctx: &SockAddrContext) -> i32 {
    let (address, port, node) = (ipv6(ctx), port(ctx), TARGET.load());
    if !redirect::concerns_v6(address, port, &node) {
        return ALLOW;
    }
    let choice = ListenerChoice::of(ctx, node, redirect::imds_v6(address) != ImdsV6::No);
    let verdict = redirect::decide_v6(address, port, &choice.target, caller(ctx));
    apply(ctx, verdict, address.octets(), choice)
}

/// Applies a verdict.
#[inline(always)]
fn apply(ctx: &SockAddrContext, verdict: Verdict, asked: [u8; 16], choice: ListenerChoice) -> i32 {
    if OBSERVES.load() != 0 {
        flows::observe(verdict);
        return ALLOW;
    }
    let (reason, answer) = match verdict {
        Verdict::Pass(VerdictReason::Unrelated) => return ALLOW,
        Verdict::Pass(reason) => {
            guard::let_through(ctx);
            (reason, ALLOW)
        }
        Verdict::Deny(reason) => (reason, DENY),
        Verdict::Redirect(destination) => match send_to_agent(ctx, destination, asked, choice) {
            Ok(reason) => (reason, ALLOW),
            Err(reason) => (reason, DENY),
        },
    };
    count(reason);
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    debug!(ctx, "IMDS traffic of cgroup {}: reason {}", cgroup, reason as u32);
    answer
}

/// Redirects the connect to the agent's listener, and records the caller.
#[inline(always)]
fn send_to_agent(
    ctx: &SockAddrContext,
    destination: Destination,
    asked: [u8; 16],
    choice: ListenerChoice,
) -> Result<VerdictReason, VerdictReason> {
    let on_host = is_on_host_network(ctx);
    let bound = is_bound_to_interface(ctx);
    let socket = RedirectedSocket { pod_listener: choice.pod_listener, on_host, bound };
    if let Some(reason) = socket.path_denial(PATH.load()) {
        return Err(reason);
    }
    let pod = choice.pod(on_host);
    if let Some(reason) = socket.listener_denial(pod, || listener::is_agents(ctx, destination)) {
        return Err(reason);
    }
    flows::record(
        ctx,
        Redirection { pod, asked, destination, pod_listener: choice.pod_listener, on_host },
    )?;
    rewrite(ctx, destination);
    Ok(if choice.pod_listener {
        VerdictReason::RedirectedToPodListener
    } else {
        VerdictReason::Redirected
    })
}

#[inline(always)]
fn bind(ctx: &SockAddrContext) -> i32 {
    let takes = is_stream(ctx) && redirect::is_agent_port(port(ctx), &AGENT_PORTS.load());
    let Some(reason) = bind_denial(takes, || is_on_host_network(ctx), is_agent) else {
        return ALLOW;
    };
    count(reason);
    DENY
}

/// The original destination of a redirected socket that is connected to the agent.
#[inline(always)]
fn asked(ctx: &SockAddrContext) -> Option<[u8; 16]> {
    // SAFETY: the context's socket is the one of the call.
    let client = unsafe { CLIENTS.get_ptr_mut(ctx) };
    // SAFETY: null, or this socket's own record.
    let client = unsafe { client.as_ref() }?;
    (client.state == ClientRecord::PUBLISHED && client.port == port(ctx)).then_some(client.asked)
}

/// Never reached: the verifier proves that BPF programs don't panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The licence: helpers such as `bpf_sk_storage_get` require a GPL-compatible one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! The kernel's interfaces: cgroups, namespaces, netlink, socket options, `bpf(2)`.

pub(crate) mod batch;
mod cgroup;
mod defer;
pub(crate) mod features;
mod heap;
pub(crate) mod hooks;
mod hops;
pub(crate) mod links;
pub(crate) mod membership;
pub(crate) mod namespaces;
pub(crate) mod netlink;
pub(crate) mod netns;
pub mod ports;
pub(crate) mod rejection;
pub(crate) mod sock_diag;
mod unfilter;
pub(crate) mod uptime;
mod walk;

pub use self::{
    cgroup::Cgroup,
    defer::defer_accept,
    heap::give_memory_back,
    hops::drop_last_hop,
    namespaces::{inside, loopback_is_up},
    netns::{cookie_of, is_elsewhere},
    rejection::ProgramRejection,
    unfilter::unfilter,
    uptime::since_boot,
    walk::Walk,
};

//! Speaks EC2 instance metadata v1 and v2 to pods.
//!
//! A request is parsed into a [`route::Route`] by pure code, checked, and answered from the cache. Every failure is an
//! [`Error`], which gets its status in one place. No byte of a request ever reaches the real service.

mod activity;
mod allow;
mod checks;
mod error;
mod exchange;
mod first_requests;
mod host;
mod journal;
mod key;
mod metrics;
mod node_role;
mod paths;
pub mod probe;
mod request_record;
mod response;
mod roles;
pub mod route;
mod service;
mod session;
pub mod token;
mod upstream;
mod version1;
pub mod wire;

pub use self::{
    activity::RequestCounts,
    allow::{AllowPath, DenyPath, InvalidPath},
    error::{Error, ErrorKind, PathKind},
    first_requests::ready,
    journal::{Journal, Page, RecordedRequest},
    key::is_key_file,
    metrics::Metrics,
    node_role::{InvalidNodeRole, NodeRole},
    service::{Config, Imdsv2, Service, ServiceParts},
    session::Session,
    token::{KeyError, TokenAuthority},
    upstream::{InvalidUpstream, Upstream, UpstreamError, UpstreamUrl},
};

//! One accept loop over all listeners: deadlines, connection limits, peer address, drain.

use std::{future::Future, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;

use crate::pods::{Client, Unattested};

/// Answers pods' requests; `imds` provides it.
pub trait PodService: Send + Sync + 'static {
    /// Answers one request of `client`, whose identity was resolved when it connected.
    fn call(
        &self,
        client: Arc<Result<Client, Unattested>>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;
}

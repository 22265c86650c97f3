//! The second step: the sockets that pods and operators connect to, from the agent that serves, or new ones.

use super::{
    error::Error,
    prepared::{Core, Interceptor, Prepared, Service},
};
use crate::handover::{Listeners, Takeover};

/// An agent that has its sockets and, until it has taken over, the attach lock.
pub(super) struct Bound {
    pub(super) core: Core,
    pub(super) interceptor: Option<Interceptor>,
    pub(super) service: Service,
    pub(super) listeners: Listeners,
    pub(super) takeover: Takeover,
}

// === impl Prepared ===

impl Prepared {
    /// Takes the attach lock, and the sockets of the agent that serves, or opens new ones.
    pub(super) async fn bind(self) -> Result<Bound, Error> {
        let Self { core, addresses, interceptor, service } = self;
        let config = interceptor.as_ref().map(|interceptor| &interceptor.config);
        let begun = Takeover::begin(&core.peers, &addresses, config, &core.first_pass);
        let (listeners, takeover) = begun.await?;
        Ok(Bound { core, interceptor, service, listeners, takeover })
    }
}

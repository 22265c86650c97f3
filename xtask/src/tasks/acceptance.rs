//! Real AWS clients against the agent.

use anyhow::{Result, bail};

/// Runs the clients; without root there is no node to run them on.
pub(crate) fn run(_no_skip: bool) -> Result<()> {
    bail!("not yet")
}

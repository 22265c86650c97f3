//! What operators see and change in an agent that runs.

use std::sync::Arc;

use super::{Operations, PodRefresher, StatusSources};
use kiam_core::{
    lifecycle::Readiness,
    telemetry::{Level, LogLevel},
};

// === impl Operations ===

impl Operations {
    /// Operations on the parts of one agent.
    #[must_use]
    pub fn new(
        readiness: Readiness,
        status: StatusSources,
        refresher: PodRefresher,
        log_level: LogLevel,
    ) -> Self {
        let explainer = status.explainer.clone();
        let (pods, why) = (explainer.clone(), explainer.clone());
        let changed = log_level.clone();
        Self {
            readiness,
            status: Box::new(move || status.read()),
            registry: Arc::default(),
            pods: Box::new(move || pods.all()),
            explain: Box::new(move |namespace, name| explainer.explanation(namespace, name)),
            refresh: Box::new(move |namespace, name| {
                let (refresher, why) = (refresher.clone(), why.clone());
                let (namespace, name) = (namespace.to_owned(), name.to_owned());
                Box::pin(async move {
                    match refresher.refresh(&namespace, &name).await {
                        Some(outcome) => outcome,
                        None => Err(why.explain(&namespace, &name).unwrap_or_else(|text| text)),
                    }
                })
            }),
            log_level: Box::new(move || log_level.get()),
            set_log_level: Box::new(move |text| {
                let level: Level = text.parse().map_err(|error| format!("{error}"))?;
                changed.set(level);
                Ok(())
            }),
        }
    }
}

//! What operators see and change.

use std::sync::{Arc, OnceLock};

use super::{build::Common, explanation::Explainer, knowledge::Knowledge, refresh::refresh};
use crate::{admin::Operations, config::Config};
use kiam_core::telemetry::{Level, LogLevel};

/// A process logs once.
static LOG_LEVEL: OnceLock<LogLevel> = OnceLock::new();

/// Makes the level changeable.
pub(super) fn remember(level: LogLevel) {
    // Set before by an earlier call: the same level.
    let _ = LOG_LEVEL.set(level);
}

pub(super) fn operations(config: &Config, common: &Common, knowledge: &Knowledge) -> Operations {
    let explainer = Explainer::new(config, knowledge, &common.clock);
    let (pods, why) = (explainer.clone(), explainer.clone());
    let knowledge = knowledge.clone();
    Operations {
        readiness: common.readiness.clone(),
        registry: Arc::default(),
        pods: Box::new(move || pods.all()),
        explain: Box::new(move |namespace, name| explainer.explain(namespace, name)),
        refresh: Box::new(move |namespace, name| {
            let (knowledge, why) = (knowledge.clone(), why.clone());
            let (namespace, name) = (namespace.to_owned(), name.to_owned());
            Box::pin(async move {
                match refresh(&knowledge, &namespace, &name).await {
                    Some(came) => came,
                    None => Err(why.explain(&namespace, &name).unwrap_or_else(|text| text)),
                }
            })
        }),
        log_level: Box::new(|| LOG_LEVEL.get().map(LogLevel::get).unwrap_or_default()),
        set_log_level: Box::new(|text| {
            let level: Level = text.parse().map_err(|error| format!("{error}"))?;
            LOG_LEVEL.get().ok_or("the process does not log")?.set(level);
            Ok(())
        }),
    }
}

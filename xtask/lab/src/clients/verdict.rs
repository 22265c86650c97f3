//! Whether what a client saw is what its pod is to have.

use std::collections::BTreeMap;
use std::process::Output;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::account::Record;

/// Who a client turned out to be. Both are absent when it found no credentials; the AWS CLI shows no access key.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Seen {
    pub(super) access_key: Option<String>,
    /// As `GetCallerIdentity` says it.
    pub(super) arn: Option<String>,
}

// === impl Seen ===

impl Seen {
    /// What a client printed. The AWS CLI says by its status that it found no credentials.
    pub(super) fn read(ended: &Output) -> Result<Self> {
        let [stdout, stderr] = [&ended.stdout, &ended.stderr].map(|it| String::from_utf8_lossy(it));
        if !ended.status.success() {
            if stderr.contains("Unable to locate credentials") {
                return Ok(Self::default());
            }
            bail!("{}: {}", ended.status, stderr.trim());
        }
        serde_json::from_str(&stdout).with_context(|| format!("it printed {stdout:?}"))
    }
}

/// `role` is the ARN of the only role that the client may be, `records` what each access key was issued for.
pub(super) fn verdict(
    role: Option<&str>,
    seen: &Seen,
    records: &BTreeMap<String, Record>,
) -> Result<(), String> {
    let Some(role) = role else {
        return match seen {
            Seen { access_key: None, arn: None } => Ok(()),
            _ => Err(format!("it has credentials and must have none: {seen:?}")),
        };
    };
    let Some(arn) = &seen.arn else {
        return Err(format!("it has no credentials and must be {role}"));
    };
    let record = match &seen.access_key {
        Some(key) => records.get(key),
        None => records.values().find(|record| record.arn == *arn),
    };
    match record {
        None => Err(format!("it says it is {arn}, which was never issued: {seen:?}")),
        Some(record) if record.role != role => {
            Err(format!("it is {} and must be {role}", record.role))
        }
        Some(record) if record.arn != *arn => {
            Err(format!("its key is of {}, STS says {arn}", record.arn))
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: &str = "arn:aws:iam::1:role/reader";

    fn records() -> BTreeMap<String, Record> {
        ["reader", "node"]
            .map(|name| {
                let role = format!("arn:aws:iam::1:role/{name}");
                (name.to_uppercase(), Record { role, arn: format!("assumed-role/{name}/x") })
            })
            .into()
    }

    #[test]
    fn only_ones_own_role_passes() {
        let cases = [
            (Some(READER), Some("READER"), Some("assumed-role/reader/x"), true),
            (Some(READER), None, Some("assumed-role/reader/x"), true),
            (None, None, None, true),
            (Some(READER), None, None, false),
            (Some(READER), Some("NODE"), Some("assumed-role/node/x"), false),
            (Some(READER), None, Some("assumed-role/node/x"), false),
            (Some(READER), Some("READER"), Some("assumed-role/node/x"), false),
            (Some(READER), Some("OTHER"), Some("assumed-role/reader/x"), false),
            (Some(READER), None, Some("arn:aws:sts::1:user/moto"), false),
            (None, Some("READER"), Some("assumed-role/reader/x"), false),
            (None, None, Some("assumed-role/reader/x"), false),
        ];
        for (role, key, arn, passes) in cases {
            let seen = Seen { access_key: key.map(Into::into), arn: arn.map(Into::into) };
            assert_eq!(verdict(role, &seen, &records()).is_ok(), passes, "{role:?}: {seen:?}");
        }
    }
}

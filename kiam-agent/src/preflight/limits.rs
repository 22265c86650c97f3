//! The limit of open files.

use crate::config::Config;
use kiam_core::preflight::{Check, Topic::OpenFiles};
use kiam_requests::serve;

/// Judges the limit that the agent can give itself.
pub(super) fn open_files(config: &Config) -> Check {
    let wanted = config.serve();
    let (limit, room) = serve::open_files(&wanted);
    judge(limit, room, wanted.connections)
}

fn judge(limit: Option<u64>, room: usize, wanted: usize) -> Check {
    let limit = limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    match room < wanted {
        true => Check::warn(
            OpenFiles,
            format!(
                "the limit is {limit}, room for {room} connections of pods instead of {wanted}"
            ),
            "raise the container runtime's limit of open files: LimitNOFILE of its unit",
        ),
        false => {
            Check::ok(OpenFiles, format!("the limit is {limit}, enough for {wanted} connections"))
        }
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Ok as Good, Warn};

    use super::*;

    #[test]
    fn a_low_limit_is_a_warning_with_what_it_leaves() {
        for (limit, room, verdict) in
            [(Some(1024), 256, Warn), (Some(65_536), 30_000, Good), (None, 9000, Good)]
        {
            let check = judge(limit, room, 8192);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
        assert!(judge(Some(1024), 256, 8192).finding.contains("256 connections"));
    }
}

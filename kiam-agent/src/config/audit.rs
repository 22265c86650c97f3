//! The flags of the audit.

use std::time::Duration;

use super::{flags::Flags, values::Mistakes};
use kiam_requests::audit::{Config, Destination};

const MEBIBYTE: u64 = 1024 * 1024;
/// The sizes that the files may have together.
const LEAST: u64 = MEBIBYTE;
const MOST: u64 = 1024 * 1024 * MEBIBYTE;

/// The words of `--audit`.
#[derive(Clone, Copy)]
enum Word {
    Off,
    Log,
    File,
}

/// The [`Config`]. Containers that use sessions of `session_duration` have asked for one within that time.
pub(super) fn audit(
    flags: &Flags,
    session_duration: Option<Duration>,
    mistakes: &mut Mistakes,
) -> Option<Config> {
    let words = [("log", Word::Log), ("file", Word::File), ("off", Word::Off)];
    let word = mistakes.one_of("audit", &flags.audit, &words);
    let path = mistakes.folder("audit-file", &flags.audit_file);
    let path = path.filter(|path| {
        let names_file = path.file_name().is_some();
        if !names_file {
            mistakes.add("audit-file", format!("{:?} is not the path of a file", flags.audit_file));
        }
        names_file
    });
    let size = size(&flags.audit_file_size);
    if size.is_none() {
        let problem = "is not a size from 1Mi to 1Ti, such as 64Mi or 1Gi";
        mistakes.add("audit-file-size", format!("{:?} {problem}", flags.audit_file_size));
    }
    let (path, size) = (path?, size?);
    let destination = match word? {
        Word::Off => Destination::Off,
        Word::Log => Destination::Log,
        Word::File => Destination::File { path, size },
    };
    Some(Config { destination, settled: session_duration? })
}

/// The bytes of a size, in the binary units of Kubernetes' quantities.
fn size(text: &str) -> Option<u64> {
    let units = [("Mi", MEBIBYTE), ("Gi", 1024 * MEBIBYTE), ("Ti", MOST)];
    let (number, unit) =
        units.into_iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let bytes = number.parse::<u64>().ok()?.checked_mul(unit)?;
    (LEAST..=MOST).contains(&bytes).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_kubernetes_units_and_bounds() {
        let cases = [
            ("1Mi", Some(MEBIBYTE)),
            ("64Mi", Some(64 * MEBIBYTE)),
            ("2Gi", Some(2048 * MEBIBYTE)),
            ("1Ti", Some(MOST)),
            ("0Mi", None),
            ("2Ti", None),
            ("64", None),
            ("64MB", None),
            ("-1Mi", None),
            ("Mi", None),
            ("99999999999999999999Mi", None),
            ("18446744073709551615Ti", None),
        ];
        for (text, expected) in cases {
            assert_eq!(size(text), expected, "{text}");
        }
    }
}

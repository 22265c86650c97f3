//! An error together with its causes.

use std::{error::Error, fmt, iter};

/// Displays an error and each cause that the text does not show already. It uses `Display` alone, since a `Debug` may
/// show secrets.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        for cause in iter::successors(self.0.source(), |cause| (*cause).source()) {
            let text = cause.to_string();
            if !shown.contains(&text) {
                shown = format!("{shown}: {text}");
            }
        }
        f.write_str(&shown)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("map LISTENERS")]
        Hides(#[source] Box<Failure>),
        #[error("bpf_map_update_elem failed")]
        Silent(#[source] io::Error),
        #[error("pin /sys/fs/bpf/kiam: {0}")]
        Tells(#[source] io::Error),
    }

    #[test]
    fn every_cause_is_shown_once() {
        let cause = || io::Error::from_raw_os_error(libc::ENOMEM);
        let hides = Failure::Hides(Box::new(Failure::Silent(cause())));
        let shown =
            "map LISTENERS: bpf_map_update_elem failed: Cannot allocate memory (os error 12)";
        assert_eq!(Chain(&hides).to_string(), shown);
        let shown = "pin /sys/fs/bpf/kiam: Cannot allocate memory (os error 12)";
        assert_eq!(Chain(&Failure::Tells(cause())).to_string(), shown);
    }
}

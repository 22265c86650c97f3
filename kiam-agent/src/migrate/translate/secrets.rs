//! Literal secrets in flags and variables. They are neither printed nor copied: a report is pasted into tickets.

use crate::migrate::words::Setting;

/// What stands for a secret.
const HIDDEN: &str = "(hidden)";
/// Parts of the names of flags and variables whose values are secrets.
const NAMES: [&str; 5] = ["token", "secret", "passw", "credential", "api-key"];

/// A flag as it is set, without a secret.
pub(super) fn shown(setting: &Setting) -> String {
    let Setting { name, value, written, .. } = setting;
    match names_secret(name) && !value.is_empty() && written.ends_with(value.as_str()) {
        true => format!("{}{HIDDEN}", &written[..written.len() - value.len()]),
        false => without_password(written),
    }
}

/// The words of a command, without secrets.
pub(super) fn shown_words(words: &[String]) -> String {
    let mut shown: Vec<String> = Vec::new();
    let mut hides = false;
    for word in words {
        let name = word.split('=').next().unwrap_or(word);
        let is_secret = word.starts_with('-') && names_secret(name);
        shown.push(match word.contains('=') {
            _ if hides => HIDDEN.to_owned(),
            true if is_secret => format!("{name}={HIDDEN}"),
            _ => without_password(word),
        });
        hides = is_secret && !word.contains('=');
    }
    shown.join(" ")
}

/// Whether the variable `name` with this literal value holds a secret.
pub(super) fn is_secret(name: &str, value: &str) -> bool {
    // The name of a file, such as that of a web identity token, is none.
    let is_file = name.to_ascii_lowercase().ends_with("_file");
    !value.is_empty() && ((names_secret(name) && !is_file) || has_password(value))
}

/// Whether `text` is an address with a user or a password.
pub(super) fn has_password(text: &str) -> bool {
    let authority = text.split_once("://").map_or(text, |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
    // A password may have a slash that is not escaped.
    authority.contains('@') || (text.contains("://") && text.contains('@'))
}

/// `text` with the user and the password of an address hidden.
pub(super) fn without_password(text: &str) -> String {
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((before, after))) if before.len() > scheme.len() => {
            format!("{scheme}://{HIDDEN}@{after}")
        }
        _ => text.to_owned(),
    }
}

fn names_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    // kube2iam's annotation is named by `--iam-role-key`, and kiam's key of TLS by the file in `--key`.
    NAMES.iter().any(|part| name.contains(part)) && !name.ends_with("-file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_a_password_are_told_from_others() {
        for (text, has) in [
            ("http://user:pass@proxy:3128", true),
            ("user:pass@proxy:3128", true),
            ("http://user:pa/ss@proxy:3128", true),
            ("http://proxy:3128", false),
            ("10.0.0.0/8,.example.com", false),
            ("", false),
        ] {
            assert_eq!(has_password(text), has, "{text}");
        }
        assert_eq!(without_password("--a=http://u:p@x/y"), "--a=http://(hidden)@x/y");
        assert_eq!(without_password("--session=a@b"), "--session=a@b");
    }

    #[test]
    fn variables_are_secret_by_name_or_value() {
        for (name, value, is) in [
            ("AWS_SECRET_ACCESS_KEY", "x", true),
            ("AWS_SESSION_TOKEN", "x", true),
            ("AWS_SESSION_TOKEN", "", false),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/token", false),
            ("AWS_ACCESS_KEY_ID", "x", false),
            ("HTTPS_PROXY", "http://u:p@x", true),
            ("HTTPS_PROXY", "http://x", false),
        ] {
            assert_eq!(is_secret(name, value), is, "{name} {value}");
        }
    }

    #[test]
    fn words_of_a_probe_are_shown_without_secrets() {
        let words = ["/health", "--api-token", "x", "--password=x", "--cert=/c", "http://u:p@h"];
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let expected =
            "/health --api-token (hidden) --password=(hidden) --cert=/c http://(hidden)@h";
        assert_eq!(shown_words(&words), expected);
    }
}

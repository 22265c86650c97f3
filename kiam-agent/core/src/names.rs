//! Validates the names of Kubernetes objects
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>).

/// Whether `text` is an RFC 1123 label, such as the name of a namespace.
#[must_use]
pub fn is_label(text: &str) -> bool {
    is_name(text, 63, "-")
}

/// Whether `text` has the characters and the length of an RFC 1123 subdomain, such as the name of a pod.
#[must_use]
pub fn is_subdomain(text: &str) -> bool {
    is_name(text, 253, "-.")
}

fn is_name(text: &str, longest: usize, marks: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=longest).contains(&text.len())
        && text.chars().all(|c| plain(c) || marks.contains(c))
        && text.starts_with(plain)
        && text.ends_with(plain)
}

//! The names of Kubernetes objects, and whether a text is one
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>).

use std::{fmt, str::FromStr};

/// The namespace and the name of a pod, which may be valid names: `<namespace>/<pod>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    namespace: String,
    name: String,
}

// === impl PodName ===

impl PodName {
    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name of the pod.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for PodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text.split_once('/').unwrap_or_default();
        if !is_label(namespace) || !is_subdomain(name) {
            return Err(format!("{text:?}: it takes a namespace and a pod, such as shop/orders-0"));
        }
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_nothing_else_is() {
        let pod: PodName = "shop/orders-0.a".parse().unwrap();
        assert_eq!((pod.namespace(), pod.name()), ("shop", "orders-0.a"));
        assert_eq!(pod.to_string(), "shop/orders-0.a");
        for text in ["", "shop", "shop/", "/orders", "a/b/c", "shop/Orders", "a/b c", "a/..%2f"] {
            assert!(text.parse::<PodName>().is_err(), "{text:?}");
        }
    }
}

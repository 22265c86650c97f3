//! The name of a pod on the command line: `<namespace>/<pod>`.

use std::{fmt, str::FromStr};

use kiam_core::names;

/// The namespace and the name of a pod, which may be valid names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    namespace: String,
    name: String,
}

// === impl PodName ===

impl FromStr for PodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text.split_once('/').unwrap_or_default();
        if !names::is_label(namespace) || !names::is_subdomain(name) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_nothing_else_is() {
        assert_eq!("shop/orders-0.a".parse::<PodName>().unwrap().to_string(), "shop/orders-0.a");
        for text in ["", "shop", "shop/", "/orders", "a/b/c", "shop/Orders", "a/b c", "a/..%2f"] {
            assert!(text.parse::<PodName>().is_err(), "{text:?}");
        }
    }
}

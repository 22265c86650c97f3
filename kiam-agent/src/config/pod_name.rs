//! The name of a pod on the command line: `<namespace>/<pod>`.

use std::{fmt, str::FromStr};

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
        // <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>
        let allowed = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || [b'-', b'.'].contains(&byte)
        };
        let is_name = |name: &&str| (1..=253).contains(&name.len()) && name.bytes().all(allowed);
        let (namespace, name) = text.split_once('/').unwrap_or_default();
        match (Some(namespace).filter(is_name), Some(name).filter(is_name)) {
            (Some(namespace), Some(name)) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?}: it takes a namespace and a pod, such as shop/orders-0")),
        }
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

//! Session tags.
//!
//! Limits: <https://docs.aws.amazon.com/STS/latest/APIReference/API_Tag.html> and
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_session-tags.html>

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use regex::Regex;

use super::{Location, QuotedText, Subject};

const MOST: usize = 50;
const KEY_LENGTH: std::ops::RangeInclusive<usize> = 1..=128;
const MAX_VALUE: usize = 256;
/// STS's expression, except that of `\p{Z}` only the space is allowed.
const TAG_CHARACTERS: &str = r"\A[\p{L}\p{N} _.:/=+\-@]*\z";

/// The tags of a session, by key, as STS accepts them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionTags(Arc<BTreeMap<String, String>>);

/// The template of sessions' tags (`--session-tags`), some of which differ from pod to pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagTemplate(Vec<(String, Value)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Literal(String),
    Namespace,
    ServiceAccount,
    PodName,
    PodUid,
}

/// Text that STS does not accept as tags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTags {
    /// The key's length or characters are invalid.
    #[error(
        "tag key {0} is invalid: it takes 1 to 128 letters, digits, spaces and _ . : / = + - @"
    )]
    Key(QuotedText),
    /// AWS reserves keys with this prefix.
    #[error("tag key {0} is invalid: AWS reserves the prefix aws:")]
    Reserved(QuotedText),
    /// The value's length or characters are invalid.
    #[error(
        "tag {key} has an invalid value: it takes at most 256 letters, digits, spaces and _ . : / = + - @"
    )]
    Value {
        /// The value's key.
        key: QuotedText,
    },
    /// Two keys are the same to STS.
    #[error("tag {0} is there twice: STS ignores the case of keys")]
    Twice(QuotedText),
    /// The name has no value, and is not one of those that have one by default.
    #[error(
        "there is no tag {0}: they are eks-cluster-name, kubernetes-namespace, kubernetes-service-account, kubernetes-pod-name, kubernetes-pod-uid, and <key>=<value>"
    )]
    Unknown(QuotedText),
    /// `eks-cluster-name` without `--cluster-name`.
    #[error("eks-cluster-name needs --cluster-name")]
    NoCluster,
    /// There are too many tags.
    #[error("{0} tags are too many: a session takes at most {MOST}")]
    Count(usize),
}

// === impl SessionTags ===

impl SessionTags {
    /// A set of these keys and values.
    ///
    /// # Errors
    ///
    /// [`InvalidTags`].
    pub fn new(tags: impl IntoIterator<Item = (String, String)>) -> Result<Self, InvalidTags> {
        let mut held = BTreeMap::new();
        for (key, value) in tags {
            check(&key, &value)?;
            if held.keys().any(|other: &String| other.to_lowercase() == key.to_lowercase()) {
                return Err(InvalidTags::Twice(QuotedText::new(&key)));
            }
            held.insert(key, value);
        }
        if held.len() > MOST {
            return Err(InvalidTags::Count(held.len()));
        }
        Ok(Self(Arc::new(held)))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each key and value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

// === impl TagTemplate ===

impl TagTemplate {
    /// Parses EKS Pod Identity's names of tags, and `<key>=<value>`.
    /// <https://docs.aws.amazon.com/eks/latest/userguide/pod-id-abac.html>
    ///
    /// # Errors
    ///
    /// [`InvalidTags`].
    pub fn parse(texts: &[String], location: &Location) -> Result<Self, InvalidTags> {
        let tags: Result<Vec<_>, _> = texts.iter().map(|text| tag(text, location)).collect();
        let template = Self(tags?);
        let nobody = Subject { namespace: "", pod: "", uid: "", service_account: "" };
        template.tags(&nobody)?;
        Ok(template)
    }

    /// Whether different pods may have different tags.
    #[must_use]
    pub fn varies(&self) -> bool {
        self.0.iter().any(|(_, value)| !matches!(value, Value::Literal(_)))
    }

    /// The tags of `subject`.
    ///
    /// # Errors
    ///
    /// [`InvalidTags::Value`] for a subject with names that Kubernetes does not allow.
    pub fn tags(&self, subject: &Subject<'_>) -> Result<SessionTags, InvalidTags> {
        SessionTags::new(self.0.iter().map(|(key, value)| {
            let value = match value {
                Value::Literal(text) => text,
                Value::Namespace => subject.namespace,
                Value::ServiceAccount => subject.service_account,
                Value::PodName => subject.pod,
                Value::PodUid => subject.uid,
            };
            (key.clone(), value.to_owned())
        }))
    }
}

fn tag(text: &str, location: &Location) -> Result<(String, Value), InvalidTags> {
    if let Some((key, value)) = text.split_once('=') {
        return Ok((key.to_owned(), Value::Literal(value.to_owned())));
    }
    let value = match text {
        "eks-cluster-name" => {
            let cluster = location.cluster.as_ref().ok_or(InvalidTags::NoCluster)?;
            Value::Literal(cluster.to_string())
        }
        "kubernetes-namespace" => Value::Namespace,
        "kubernetes-service-account" => Value::ServiceAccount,
        "kubernetes-pod-name" => Value::PodName,
        "kubernetes-pod-uid" => Value::PodUid,
        _ => return Err(InvalidTags::Unknown(QuotedText::new(text))),
    };
    Ok((text.to_owned(), value))
}

fn check(key: &str, value: &str) -> Result<(), InvalidTags> {
    if !KEY_LENGTH.contains(&key.chars().count()) || !is_made_of_tag_characters(key) {
        return Err(InvalidTags::Key(QuotedText::new(key)));
    }
    if key.to_lowercase().starts_with("aws:") {
        return Err(InvalidTags::Reserved(QuotedText::new(key)));
    }
    if value.chars().count() > MAX_VALUE || !is_made_of_tag_characters(value) {
        return Err(InvalidTags::Value { key: QuotedText::new(key) });
    }
    Ok(())
}

fn is_made_of_tag_characters(text: &str) -> bool {
    static TAG: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(TAG_CHARACTERS).expect("the expression is well formed"));
    TAG.is_match(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(pairs: &[(&str, &str)]) -> Result<SessionTags, InvalidTags> {
        SessionTags::new(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn tags_are_the_same_in_any_order() {
        let held =
            tags(&[("team", "a b"), ("Équipe", ""), ("kubernetes-pod-name", "x.y-0")]).unwrap();
        assert_eq!(
            Ok(&held),
            tags(&[("kubernetes-pod-name", "x.y-0"), ("team", "a b"), ("Équipe", "")]).as_ref()
        );
        assert_eq!(held.iter().next(), Some(("kubernetes-pod-name", "x.y-0")));
    }

    #[test]
    fn what_sts_does_not_take_is_refused() {
        let quoted = QuotedText::new;
        let (long, wide) = ("k".repeat(129), "v".repeat(257));
        let cases = [
            ("", "x", InvalidTags::Key(quoted(""))),
            ("a,b", "x", InvalidTags::Key(quoted("a,b"))),
            ("a\n", "x", InvalidTags::Key(quoted("a\n"))),
            (long.as_str(), "x", InvalidTags::Key(quoted(&long))),
            ("AWS:x", "x", InvalidTags::Reserved(quoted("AWS:x"))),
            ("a", "x*", InvalidTags::Value { key: quoted("a") }),
            ("a", wide.as_str(), InvalidTags::Value { key: quoted("a") }),
        ];
        for (key, value, error) in cases {
            assert_eq!(tags(&[(key, value)]), Err(error));
        }
        let twice = tags(&[("Team", "x"), ("team", "y")]);
        assert_eq!(twice, Err(InvalidTags::Twice(quoted("team"))));
        let many =
            |count: usize| SessionTags::new((0..count).map(|n| (n.to_string(), String::new())));
        assert!(many(50).is_ok());
        assert_eq!(many(51), Err(InvalidTags::Count(51)));
    }

    fn template(texts: &[&str], cluster: Option<&str>) -> Result<TagTemplate, InvalidTags> {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let cluster = cluster.map(|name| name.parse().unwrap());
        TagTemplate::parse(&texts, &Location { node: None, cluster })
    }

    #[test]
    fn templates_have_eks_names_and_any_others_with_a_value() {
        let names = [
            "kubernetes-pod-uid",
            "kubernetes-pod-name",
            "kubernetes-service-account",
            "kubernetes-namespace",
            "eks-cluster-name",
            "eks-cluster-arn=arn:aws:eks:eu-west-1:1:cluster/blue",
            "expression=a=b",
        ];
        let subject = Subject { namespace: "n", pod: "p.x", uid: "u-1", service_account: "s" };
        let held = template(&names, Some("blue")).unwrap().tags(&subject).unwrap();
        let held: Vec<_> = held.iter().collect();
        assert_eq!(
            held,
            [
                ("eks-cluster-arn", "arn:aws:eks:eu-west-1:1:cluster/blue"),
                ("eks-cluster-name", "blue"),
                ("expression", "a=b"),
                ("kubernetes-namespace", "n"),
                ("kubernetes-pod-name", "p.x"),
                ("kubernetes-pod-uid", "u-1"),
                ("kubernetes-service-account", "s"),
            ]
        );
        assert!(template(&["kubernetes-namespace"], None).unwrap().varies());
        assert!(!template(&["team=a", "eks-cluster-name"], Some("blue")).unwrap().varies());
    }

    #[test]
    fn mistakes_in_templates_are_found_at_the_start() {
        let unknown = InvalidTags::Unknown(QuotedText::new("kubernetes-node"));
        let twice = InvalidTags::Twice(QuotedText::new("Kubernetes-Namespace"));
        let cases = [
            (vec!["kubernetes-node"], unknown),
            (vec!["eks-cluster-name"], InvalidTags::NoCluster),
            (vec!["aws:x=1"], InvalidTags::Reserved(QuotedText::new("aws:x"))),
            (vec!["x=a*"], InvalidTags::Value { key: QuotedText::new("x") }),
            (vec!["kubernetes-namespace", "Kubernetes-Namespace=x"], twice),
        ];
        for (texts, error) in cases {
            assert_eq!(template(&texts, None), Err(error));
        }
    }
}

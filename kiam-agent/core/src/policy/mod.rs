//! Decides whether a pod may have a role, and explains itself.
//!
//! The same decision is made before credentials are fetched and at every request, from the records of that moment.

mod allowed;
mod expression;
mod memo;
mod namespace;
mod publish;
mod refusal;
mod standing;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

pub use self::{
    allowed::{AllowedRoles, InvalidAllowedRoles},
    expression::{InvalidExpression, PermittedRoles},
    namespace::{Mistake, Ruling, Rulings},
    publish::{publish_wanted, report_sessions},
    refusal::Refusal,
    standing::Standing,
};
use self::{
    namespace::Lists,
    standing::{Grounds, Standings},
};
use crate::{
    pods::{
        Annotation, Namespace, Pod, PodReader, ServiceAccount,
        annotations::{EXTERNAL_ID, ROLE, SESSION_NAME, SESSION_POLICIES},
    },
    role::{
        AccountName, Claimant, ExternalId, NameTemplate, QuotedText, RoleArn, RoleIdentity,
        RoleResolver, SessionName, SessionPolicies, Source, Subject, TagTemplate, WantedRoles,
    },
};

/// The roles that a namespace allows with neither `iam.amazonaws.com/permitted` nor `iam.amazonaws.com/allowed-roles`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamespacePolicy {
    /// Every role, as kiam v1.
    Optional,
    /// No role, as kiam v4.
    Required,
}

/// The pods that may set `iam.amazonaws.com/session-name` and `iam.amazonaws.com/external-id`. A role's trust policy may
/// check either, so that choosing them may defeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnnotationOverrides {
    /// All pods, as with kiam.
    Everywhere,
    /// Pods of these namespaces.
    In(BTreeSet<String>),
}

/// The policy's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Completes short role names.
    pub resolver: RoleResolver,
    /// The roles that a namespace without annotations allows.
    pub namespaces: NamespacePolicy,
    /// The sessions' names, also of pods that set one.
    pub session_name: NameTemplate,
    /// The sessions' source identities, if they have any.
    pub source_identity: Option<NameTemplate>,
    /// The sessions' tags.
    pub tags: TagTemplate,
    /// Policies that bound all sessions.
    pub policies: SessionPolicies,
    /// The pods that may set a session name or an external id.
    pub overrides: AnnotationOverrides,
    /// The proof of identity that STS gets.
    pub source: Source,
    /// The requested duration of sessions.
    pub session_duration: Duration,
}

/// The policy, which decides by the annotations of the pod and its namespace.
#[derive(Clone, Debug)]
pub struct RolePolicy {
    config: Arc<Config>,
    lists: Arc<Lists>,
    standings: Arc<Standings>,
    reader: PodReader,
}

/// A decision of the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The pod may have this identity.
    Allow(Arc<RoleIdentity>),
    /// The pod may have no role, for this reason.
    Refuse(Refusal),
}

// === impl Config ===

impl Config {
    /// The defaults of the flags: kiam v1's policy, and its name for all sessions.
    #[must_use]
    pub fn new(resolver: RoleResolver) -> Self {
        Self {
            resolver,
            namespaces: NamespacePolicy::Optional,
            session_name: SessionName::sanitised("kiam-kiam").into(),
            source_identity: None,
            tags: TagTemplate::default(),
            policies: SessionPolicies::default(),
            overrides: AnnotationOverrides::Everywhere,
            source: Source::Node,
            session_duration: Duration::from_secs(3600),
        }
    }

    /// Whether two pods with the same role can have different sessions without an annotation.
    #[must_use]
    pub fn varies(&self) -> bool {
        self.session_name.varies()
            || self.source_identity.as_ref().is_some_and(NameTemplate::varies)
            || self.tags.varies()
    }
}

// === impl RolePolicy ===

impl RolePolicy {
    /// A policy over the namespaces that `reader` knows.
    #[must_use]
    pub fn new(config: Config, reader: PodReader) -> Self {
        let (lists, standings) = (Arc::default(), Arc::default());
        Self { config: Arc::new(config), lists, standings, reader }
    }

    /// The current decision about `pod`, which is a record of the pod table. It is made where a record that it depends on
    /// has changed since the last one, and otherwise only compared with the records.
    #[must_use]
    pub fn standing(&self, pod: &Arc<Pod>) -> Arc<Standing> {
        let grounds = Grounds {
            pod: pod.clone(),
            namespace: self.reader.namespace(&pod.namespace),
            account: self.account(pod),
        };
        self.standings.get(&grounds).unwrap_or_else(|| {
            let (namespace, account) = (grounds.namespace.as_deref(), grounds.account.as_deref());
            let decision = self.decide_by(pod, namespace, account);
            let standing = Arc::new(Standing::new(decision, grounds));
            self.standings.keep(&standing);
            // Those of a pod that is gone by now may have been forgotten before.
            if self.reader.record(&pod.uid).is_none() {
                self.standings.forget(&pod.uid);
            }
            standing
        })
    }

    /// Decides whether `pod` may have the role that it requests.
    #[must_use]
    pub fn decide(&self, pod: &Pod) -> Decision {
        let (namespace, account) = (self.reader.namespace(&pod.namespace), self.account(pod));
        self.decide_by(pod, namespace.as_deref(), account.as_deref())
    }

    /// The role that `pod` requests, or with web identity else its ServiceAccount; `None` where neither names one. Whether
    /// the pod may have the role is decided elsewhere.
    #[must_use]
    pub fn role(&self, pod: &Pod) -> Option<Result<RoleArn, Refusal>> {
        self.role_by(pod, self.account(pod).as_deref())
    }

    fn role_by(
        &self,
        pod: &Pod,
        account: Option<&ServiceAccount>,
    ) -> Option<Result<RoleArn, Refusal>> {
        if let Some(annotation) = &pod.role {
            let role = text(ROLE, annotation)
                .and_then(|text| self.config.resolver.resolve(text).map_err(Refusal::InvalidRole));
            return Some(role);
        }
        if self.config.source == Source::Node {
            return None;
        }
        let Some(record) = account else {
            return Some(Err(Refusal::AccountUnknown(pod.account())));
        };
        let account = record.name.clone();
        Some(match record.role.as_ref()?.text() {
            Ok(role) => {
                role.parse().map_err(|error| Refusal::InvalidAccountRole { account, error })
            }
            Err(error) => Err(Refusal::AccountTooLong { account, error }),
        })
    }

    /// The pod's ServiceAccount, where that may name the role.
    fn account(&self, pod: &Pod) -> Option<Arc<ServiceAccount>> {
        let named = self.config.source == Source::WebIdentity && pod.role.is_none();
        named.then(|| self.reader.service_account(&pod.account())).flatten()
    }

    /// The ruling of each annotation of `namespace` about `role`.
    #[must_use]
    pub fn rulings(&self, namespace: &Namespace, role: &RoleArn) -> Rulings {
        self.lists.rulings(namespace, role, &self.config.resolver)
    }

    /// The mistakes in the annotations of `namespace`.
    #[must_use]
    pub fn mistakes(&self, namespace: &Namespace) -> Vec<Mistake> {
        self.lists.mistakes(namespace, &self.config.resolver)
    }

    /// The roles that the live pods selected by `serves` request and are allowed.
    #[must_use]
    pub fn wanted(&self, serves: &impl Fn(&Pod) -> bool) -> WantedRoles {
        let pods = self.reader.all();
        let mut wanted: BTreeMap<RoleIdentity, BTreeSet<Claimant>> = BTreeMap::new();
        for pod in pods.iter().filter(|pod| pod.live && serves(pod)) {
            if let Decision::Allow(identity) = self.decide(pod) {
                let identity = RoleIdentity::clone(&identity);
                let claimant = Claimant::new(&pod.namespace, &pod.uid.to_string());
                wanted.entry(identity).or_default().insert(claimant);
            }
        }
        Arc::new(wanted)
    }

    /// Decides by these records of the pod's namespace and ServiceAccount.
    fn decide_by(
        &self,
        pod: &Pod,
        namespace: Option<&Namespace>,
        account: Option<&ServiceAccount>,
    ) -> Decision {
        match self.identity(pod, namespace, account) {
            Ok(identity) => Decision::Allow(Arc::new(identity)),
            Err(refusal) => Decision::Refuse(refusal),
        }
    }

    fn identity(
        &self,
        pod: &Pod,
        namespace: Option<&Namespace>,
        account: Option<&ServiceAccount>,
    ) -> Result<RoleIdentity, Refusal> {
        let asked = || (self.config.source == Source::WebIdentity).then(|| pod.account());
        let role = self.role_by(pod, account).unwrap_or_else(|| Err(Refusal::NoRole(asked())))?;
        self.permit(&pod.namespace, namespace, &role)?;
        self.permit_overrides(pod)?;
        let uid = pod.uid.to_string();
        let subject = Subject {
            namespace: &pod.namespace,
            pod: &pod.name,
            uid: &uid,
            service_account: &pod.service_account,
        };
        let session_name = match &pod.session_name {
            Some(name) => self.config.session_name.chosen(text(SESSION_NAME, name)?),
            None => self.config.session_name.name(&subject),
        };
        let source_identity = self.config.source_identity.as_ref().map(|it| it.name(&subject));
        let external_id: Option<ExternalId> = match &pod.external_id {
            Some(id) => Some(text(EXTERNAL_ID, id)?.parse().map_err(Refusal::InvalidExternalId)?),
            None => None,
        };
        let tags = self.config.tags.tags(&subject).map_err(Refusal::InvalidTags)?;
        let policies = self.policies(pod)?;
        let service_account = self.voucher(pod)?;
        let plain = RoleIdentity::new(role, session_name, self.config.session_duration);
        Ok(RoleIdentity { external_id, tags, source_identity, policies, service_account, ..plain })
    }

    /// The ServiceAccount whose token vouches for the pod, with web identity.
    fn voucher(&self, pod: &Pod) -> Result<Option<AccountName>, Refusal> {
        match self.config.source {
            Source::Node => Ok(None),
            Source::WebIdentity if pod.config_hash.is_some() => Err(Refusal::StaticPod),
            Source::WebIdentity if pod.external_id.is_some() => Err(Refusal::ExternalIdUnused),
            Source::WebIdentity => Ok(Some(pod.account())),
        }
    }

    fn policies(&self, pod: &Pod) -> Result<SessionPolicies, Refusal> {
        match &pod.session_policies {
            None => Ok(self.config.policies.clone()),
            Some(_) if !self.config.policies.is_empty() => Err(Refusal::PoliciesBound),
            Some(list) => text(SESSION_POLICIES, list)?.parse().map_err(Refusal::InvalidPolicies),
        }
    }

    fn permit_overrides(&self, pod: &Pod) -> Result<(), Refusal> {
        let AnnotationOverrides::In(namespaces) = &self.config.overrides else { return Ok(()) };
        let set = [(SESSION_NAME, &pod.session_name), (EXTERNAL_ID, &pod.external_id)];
        let found = set.iter().find(|(_, value)| value.is_some());
        match found {
            Some((annotation, _)) if !namespaces.contains(&pod.namespace) => {
                let namespace = QuotedText::new(&pod.namespace);
                Err(Refusal::OverrideForbidden { annotation, namespace })
            }
            _ => Ok(()),
        }
    }

    fn permit(
        &self,
        name: &str,
        namespace: Option<&Namespace>,
        role: &RoleArn,
    ) -> Result<(), Refusal> {
        let namespace =
            namespace.ok_or_else(|| Refusal::NamespaceUnknown(QuotedText::new(name)))?;
        self.rulings(namespace, role).permit(name, role, self.config.namespaces)
    }
}

fn text<'a>(annotation: &'static str, value: &'a Annotation) -> Result<&'a str, Refusal> {
    value.text().map_err(|error| Refusal::TooLong { annotation, error })
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::{
        pods::{Namespace, PodIndex, PodUid, ServiceAccount},
        role::Location,
    };

    const ROLE: &str = "arn:aws:iam::123456789012:role/reader";

    fn pod(role: Option<&str>) -> Pod {
        Pod {
            resource_version: Some(1),
            role: role.map(Annotation::from),
            ..Pod::new(PodUid::new("a"), "default", "a")
        }
    }

    fn policy(namespaces: NamespacePolicy) -> (PodIndex, RolePolicy) {
        let (index, reader) = PodIndex::new();
        let base = "arn:aws:iam::123456789012:role/".parse().unwrap();
        let config = Config {
            namespaces,
            overrides: AnnotationOverrides::In(BTreeSet::from(["default".to_owned()])),
            ..Config::new(RoleResolver::new(Some(base)))
        };
        (index, RolePolicy::new(config, reader))
    }

    fn permit(index: &PodIndex, permitted: Option<&str>) {
        permit_in("default", index, permitted);
    }

    fn permit_in(name: &str, index: &PodIndex, permitted: Option<&str>) {
        let permitted = permitted.map(Annotation::from);
        index.apply(Namespace { permitted, ..Namespace::new(name) });
    }

    #[test]
    fn namespaces_decide() {
        use NamespacePolicy::{Optional, Required};
        let cases = [
            (Optional, None, true),
            (Required, None, false),
            (Required, Some(".*"), true),
            (Optional, Some("arn:aws:iam::123456789012:role/reader"), true),
            (Optional, Some("reader"), false),
            (Optional, Some("nothing|.*reader"), true),
            (Optional, Some("arn:aws:iam::123456789012:role/read|x"), false),
            (Optional, Some("("), false),
        ];
        for (namespaces, permitted, allowed) in cases {
            let (index, policy) = policy(namespaces);
            permit(&index, permitted);
            let decision = policy.decide(&pod(Some("reader")));
            assert_eq!(
                matches!(decision, Decision::Allow(_)),
                allowed,
                "{permitted:?}: {decision:?}"
            );
        }
    }

    #[test]
    fn both_annotations_must_allow_and_either_speaks() {
        use NamespacePolicy::{Optional, Required};
        let cases = [
            (Optional, None, None, Ok(())),
            (Required, None, None, Err("neither annotation")),
            (Required, None, Some(r#"["reader"]"#), Ok(())),
            (Required, Some(".*reader"), Some(r#"["r*"]"#), Ok(())),
            (Optional, None, Some(r#"["writer"]"#), Err("none of which matches")),
            (Optional, Some(".*"), Some(r#"["writer"]"#), Err("none of which matches")),
            (Optional, Some(".*writer"), Some(r#"["*"]"#), Err("as a whole")),
            (Optional, Some(".*"), Some("[]"), Err("the list is empty")),
            (Optional, Some(".*"), Some(""), Err("is no JSON list")),
            (Optional, Some("("), Some(r#"["*"]"#), Err("no regular expression")),
        ];
        for (namespaces, permitted, list, expected) in cases {
            let (index, policy) = policy(namespaces);
            let (permitted, allowed_roles) =
                (permitted.map(Annotation::from), list.map(Annotation::from));
            let name = "default".to_owned();
            let namespace =
                Namespace { name, resource_version: None, permitted, allowed_roles, imdsv2: None };
            index.apply(namespace.clone());
            let found = match policy.decide(&pod(Some("reader"))) {
                Decision::Allow(_) => Ok(()),
                Decision::Refuse(refusal) => Err(refusal.to_string()),
            };
            match (&found, expected) {
                (Ok(()), Ok(())) => {}
                (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
                _ => panic!("{namespace:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn mistakes_are_found_whatever_pods_ask_for() {
        let (_index, policy) = policy(NamespacePolicy::Optional);
        let reasons = |permitted: &str, list: &str, imdsv2: &str| {
            let namespace = Namespace {
                name: "default".to_owned(),
                resource_version: None,
                permitted: Some(permitted.into()),
                allowed_roles: Some(list.into()),
                imdsv2: Some(imdsv2.into()),
            };
            let mistakes = policy.mistakes(&namespace);
            mistakes.iter().map(Mistake::reason).collect::<Vec<_>>()
        };
        assert_eq!(reasons(".*", r#"["*"]"#, " required "), Vec::<&str>::new());
        assert_eq!(
            reasons("(", "reader", "yes"),
            ["InvalidPermitted", "InvalidAllowedRoles", "InvalidImdsv2"]
        );
    }

    #[test]
    fn refusals_say_why_and_nothing_panics() {
        let (index, policy) = policy(NamespacePolicy::Optional);
        let reason = |pod: &Pod| match policy.decide(pod) {
            Decision::Refuse(refusal) => refusal.to_string(),
            Decision::Allow(identity) => panic!("{identity}"),
        };
        assert!(reason(&pod(Some("reader"))).contains("\"default\" is not known"));
        permit(&index, None);
        assert!(reason(&pod(None)).contains("iam.amazonaws.com/role"));
        assert!(reason(&pod(Some("arn:aws:iam"))).contains("arn:aws:iam"));
        let id = Pod { external_id: Some("a b".into()), ..pod(Some("reader")) };
        assert!(reason(&id).contains("external-id") && !reason(&id).contains("a b"));
    }

    /// [`policy`] with web identity; its ServiceAccount `default/default` has this annotation.
    fn web_identity(account_role: Option<&str>) -> (PodIndex, RolePolicy) {
        let (index, by_node) = policy(NamespacePolicy::Optional);
        permit(&index, Some(".*/reader"));
        index.apply(ServiceAccount {
            name: AccountName::new("default", "default"),
            resource_version: None,
            role: account_role.map(Annotation::from),
        });
        let config = Config { source: Source::WebIdentity, ..Config::clone(&by_node.config) };
        (index, RolePolicy::new(config, by_node.reader))
    }

    #[test]
    fn with_web_identity_a_role_is_the_pods_or_else_its_service_accounts() {
        let writer = "arn:aws:iam::123456789012:role/writer";
        let cases = [
            (Some("reader"), None, "reader as"),
            (Some("reader"), Some(writer), "reader as"),
            (None, Some(ROLE), "reader as"),
            (
                None,
                None,
                "/role, nor has its ServiceAccount default/default eks.amazonaws.com/role-arn",
            ),
            (None, Some("reader"), "default/default: annotation eks.amazonaws.com/role-arn"),
            (None, Some(writer), "permits"),
        ];
        for (pods, accounts, expected) in cases {
            let (_index, policy) = web_identity(accounts);
            let said = match policy.decide(&pod(pods)) {
                Decision::Allow(identity) => identity.to_string(),
                Decision::Refuse(refusal) => refusal.to_string(),
            };
            assert!(said.contains(expected), "{pods:?} {accounts:?}: {said}");
        }
        let (_index, by_node) = policy(NamespacePolicy::Optional);
        let Decision::Refuse(refusal) = by_node.decide(&pod(None)) else { panic!("allowed") };
        assert_eq!(refusal.to_string(), "the pod has no annotation iam.amazonaws.com/role");
    }

    #[test]
    fn with_web_identity_pods_share_only_with_pods_of_their_service_account() {
        let (index, policy) = web_identity(Some(ROLE));
        index.apply(pod(None));
        index.apply(Pod { uid: PodUid::new("b"), ..pod(Some("reader")) });
        let other =
            Pod { uid: PodUid::new("c"), service_account: "ci".to_owned(), ..pod(Some("reader")) };
        index.apply(other);
        let wanted = policy.wanted(&|_| true);
        let shown = wanted.iter().map(|(identity, claimants)| {
            let account = identity.service_account.as_ref().unwrap().to_string();
            (account, claimants.iter().map(|it| it.pod.to_string()).collect::<Vec<_>>())
        });
        let expected = [("default/ci", vec!["c"]), ("default/default", vec!["a", "b"])];
        let expected = expected.map(|(account, pods)| {
            (account.to_owned(), pods.into_iter().map(str::to_owned).collect::<Vec<_>>())
        });
        assert_eq!(shown.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn with_web_identity_what_no_token_can_say_is_refused() {
        let (_index, policy) = web_identity(Some(ROLE));
        let stranger = Pod { service_account: "ci".to_owned(), ..pod(None) };
        let cases = [
            (Pod { external_id: Some("id".into()), ..pod(None) }, Refusal::ExternalIdUnused),
            (Pod { config_hash: Some(PodUid::new("h")), ..pod(None) }, Refusal::StaticPod),
            (stranger, Refusal::AccountUnknown(AccountName::new("default", "ci"))),
        ];
        for (pod, refusal) in cases {
            assert_eq!(policy.decide(&pod), Decision::Refuse(refusal));
        }
    }

    #[test]
    fn annotated_session_name_has_kiams_prefix_and_stss_characters() {
        let (index, policy) = policy(NamespacePolicy::Optional);
        permit(&index, None);
        let named = Pod { session_name: Some("my app!".into()), ..pod(Some("reader")) };
        let Decision::Allow(identity) = policy.decide(&named) else { panic!("refused") };
        assert_eq!(identity.role.to_string(), ROLE);
        assert!(identity.session_name.to_string().starts_with("kiam-my"), "{identity}");
        assert!(!identity.session_name.to_string().contains([' ', '!']), "{identity}");
    }

    #[test]
    fn no_session_name_pushes_the_prefix_out() {
        let (index, policy) = policy(NamespacePolicy::Optional);
        permit(&index, None);
        let long = "x".repeat(100_000);
        let odd = ["", "admin", "kiam-admin", "\u{8}\u{8}\u{8}\u{8}\u{8}admin", "/../admin", &long];
        for name in odd {
            let named = Pod { session_name: Some(name.into()), ..pod(Some("reader")) };
            let Decision::Allow(identity) = policy.decide(&named) else {
                panic!("refused {name:?}")
            };
            let sent = identity.session_name.as_ref();
            assert!(sent.starts_with("kiam-") && (5..=64).contains(&sent.len()), "{sent}");
            assert!(name.len() < 5 || sent.len() > 5, "{sent}: nothing is left of {name:?}");
        }
    }

    #[test]
    fn templates_name_each_pods_session_and_no_annotation_makes_anothers_name() {
        let (index, plain) = policy(NamespacePolicy::Optional);
        permit(&index, None);
        permit_in("kiam-prod", &index, None);
        let template = |text| Some(NameTemplate::parse(text, &Location::default()).unwrap());
        let config = Config {
            session_name: template("{namespace}.{pod}").unwrap(),
            source_identity: template("{service_account}"),
            overrides: AnnotationOverrides::Everywhere,
            ..Config::clone(&plain.config)
        };
        let policy = RolePolicy::new(config, plain.reader.clone());
        let sent = |namespace: &str, name: &str, asked: Option<&str>| {
            let (namespace, name) = (namespace.to_owned(), name.to_owned());
            let session_name = asked.map(Annotation::from);
            let pod = Pod { namespace, name, session_name, ..pod(Some("reader")) };
            let Decision::Allow(identity) = policy.decide(&pod) else { panic!("refused") };
            let source = identity.source_identity.clone().unwrap().to_string();
            (identity.session_name.to_string(), source)
        };
        let victim = sent("kiam-prod", "web-0", None);
        assert_eq!(victim, ("kiam-prod.web-0".to_owned(), "default".to_owned()));
        for asked in ["prod.web-0", "kiam-prod.web-0", "-prod.web-0", "=prod.web-0"] {
            let (name, source) = sent("default", "evil", Some(asked));
            assert!(name.starts_with("kiam-=") && name.ends_with("prod.web-0="), "{name}");
            assert_eq!(source, "default", "an annotation changes no source identity");
        }
    }

    #[test]
    fn tags_are_the_pods_own_and_policies_only_narrow() {
        let (index, plain) = policy(NamespacePolicy::Optional);
        permit(&index, None);
        let own = "arn:aws:iam::123456789012:policy/own";
        let bounds: SessionPolicies = "arn:aws:iam::aws:policy/ReadOnlyAccess".parse().unwrap();
        let names = ["kubernetes-pod-name".to_owned(), "team=a".to_owned()];
        let tags = TagTemplate::parse(&names, &Location::default()).unwrap();
        let decide = |policies: &SessionPolicies, asked: Option<&str>| {
            let (tags, policies) = (tags.clone(), policies.clone());
            let config = Config { tags, policies, ..Config::clone(&plain.config) };
            let session_policies = asked.map(Annotation::from);
            let pod = Pod { session_policies, ..pod(Some("reader")) };
            RolePolicy::new(config, plain.reader.clone()).decide(&pod)
        };
        let allowed = |decision| match decision {
            Decision::Allow(identity) => RoleIdentity::clone(&identity),
            Decision::Refuse(refusal) => panic!("{refusal}"),
        };
        let identity = allowed(decide(&bounds, None));
        assert_eq!(identity.policies, bounds);
        let tags: Vec<_> = identity.tags.iter().collect();
        assert_eq!(tags, [("kubernetes-pod-name", "a"), ("team", "a")]);
        let none = SessionPolicies::default();
        assert_eq!(allowed(decide(&none, Some(own))).policies, own.parse().unwrap());
        assert_eq!(decide(&bounds, Some(own)), Decision::Refuse(Refusal::PoliciesBound));
        for wrong in ["", "own", &format!("{own},")] {
            let decision = decide(&none, Some(wrong));
            assert!(matches!(decision, Decision::Refuse(Refusal::InvalidPolicies(_))), "{wrong}");
        }
    }

    #[test]
    fn session_names_and_external_ids_are_refused_where_they_may_not_be_set() {
        let (index, named) = policy(NamespacePolicy::Optional);
        permit(&index, None);
        permit_in("tenant", &index, None);
        let set = |namespace: &str, session_name: Option<&str>, external_id: Option<&str>| Pod {
            namespace: namespace.to_owned(),
            session_name: session_name.map(Annotation::from),
            external_id: external_id.map(Annotation::from),
            ..pod(Some("reader"))
        };
        let cases = [
            (set("default", Some("ci"), Some("partner")), None),
            (set("tenant", None, None), None),
            (set("tenant", Some("ci"), None), Some(SESSION_NAME)),
            (set("tenant", Some(""), None), Some(SESSION_NAME)),
            (set("tenant", None, Some("partner")), Some(EXTERNAL_ID)),
            (set("tenant", None, Some("not valid")), Some(EXTERNAL_ID)),
        ];
        for (pod, forbidden) in &cases {
            match (named.decide(pod), forbidden) {
                (Decision::Allow(_), None) => {}
                (Decision::Refuse(refusal), Some(annotation)) => {
                    let text = refusal.to_string();
                    assert!(matches!(refusal, Refusal::OverrideForbidden { .. }), "{text}");
                    assert!(text.contains(annotation) && text.contains("\"tenant\""), "{text}");
                    assert!(!text.contains("partner"), "{text}");
                }
                (decision, _) => panic!("{pod:?}: {decision:?}"),
            }
        }
        let reader = named.reader.clone();
        let overrides = AnnotationOverrides::Everywhere;
        let config = Config { overrides, ..Config::clone(&named.config) };
        let anybody = RolePolicy::new(config, reader);
        let tenant = set("tenant", Some("ci"), Some("partner"));
        assert!(matches!(anybody.decide(&tenant), Decision::Allow(_)));
    }

    #[tokio::test]
    async fn wanted_follows_the_records_and_holds_only_what_is_allowed() {
        let (index, policy) = policy(NamespacePolicy::Optional);
        permit(&index, Some(".*reader"));
        index.apply(pod(Some("reader")));
        index.apply(Pod { uid: PodUid::new("b"), ..pod(Some("writer")) });
        index.apply(Pod { uid: PodUid::new("c"), ..pod(Some("reader")) });
        let (sender, mut wanted) = watch::channel(WantedRoles::default());
        let (signal, drain) = crate::lifecycle::drain();
        let task = tokio::spawn(publish_wanted(policy, |_| true, sender, drain));
        let one = wanted.wait_for(|set| !set.is_empty()).await.unwrap().clone();
        assert_eq!(one.keys().map(|id| id.role.to_string()).collect::<Vec<_>>(), [ROLE]);
        let pods: Vec<_> = one.values().flatten().map(|pod| pod.pod.to_string()).collect();
        assert_eq!(pods, ["a", "c"]);
        index.delete(&pod(None));
        index.delete(&Pod { uid: PodUid::new("c"), ..pod(None) });
        wanted.wait_for(|set| set.is_empty()).await.unwrap();
        signal.start();
        task.await.unwrap();
    }
}

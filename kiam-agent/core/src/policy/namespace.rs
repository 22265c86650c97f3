//! The rulings of a namespace's annotations about a role, and mistakes in them.

use super::{
    InvalidAllowedRoles, InvalidExpression, NamespacePolicy, PermittedRoles, Refusal,
    allowed::AllowedRoles, memo::Memo,
};
use crate::{
    pods::{Annotation, Namespace},
    role::{QuotedText, RoleArn, RoleResolver},
};

/// Bytes that all parsed lists take. Hundreds of usual ones fit, and dozens of the longest.
const ROOM: usize = 8 * 1024 * 1024;

/// The ruling of one annotation about a role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling<E> {
    /// Allowed, by this expression or glob.
    Allows(QuotedText),
    /// Not allowed by this expression or list.
    Forbids(QuotedText),
    /// The annotation is invalid, so that it allows nothing.
    Invalid(E),
}

/// The rulings of a namespace's annotations about a role; `None` for a missing annotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rulings {
    /// `iam.amazonaws.com/permitted`.
    pub permitted: Option<Ruling<InvalidExpression>>,
    /// `iam.amazonaws.com/allowed-roles`.
    pub allowed_roles: Option<Ruling<InvalidAllowedRoles>>,
}

/// A mistake in a namespace's annotations, whatever roles its pods request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// The expression is invalid.
    #[error("annotation iam.amazonaws.com/permitted: {0}; the namespace's pods get no role")]
    Permitted(InvalidExpression),
    /// The list of globs is invalid.
    #[error("annotation iam.amazonaws.com/allowed-roles: {0}; the namespace's pods get no role")]
    AllowedRoles(InvalidAllowedRoles),
    /// The value is not a known word.
    #[error(
        "annotation iam.amazonaws.com/imdsv2: {0} is neither optional nor required, and is treated as required"
    )]
    Imdsv2(QuotedText),
}

/// The parsed lists of globs.
#[derive(Debug)]
pub(super) struct Lists(Memo<Result<AllowedRoles, InvalidAllowedRoles>>);

// === impl Lists ===

impl Lists {
    fn parse(
        &self,
        annotation: &Annotation,
        resolver: &RoleResolver,
    ) -> Result<AllowedRoles, InvalidAllowedRoles> {
        let text = annotation.text()?;
        self.0.get(text, || AllowedRoles::parse(text, resolver))
    }

    /// The rulings of `namespace` about `role`.
    pub(super) fn rulings(
        &self,
        namespace: &Namespace,
        role: &RoleArn,
        resolver: &RoleResolver,
    ) -> Rulings {
        let permitted = namespace.permitted.as_ref().map(|text| match expression(text) {
            Ok(permitted) if permitted.matches(role) => Ruling::Allows(shown(text)),
            Ok(_) => Ruling::Forbids(shown(text)),
            Err(error) => Ruling::Invalid(error),
        });
        let allowed_roles = namespace.allowed_roles.as_ref().map(|text| {
            match self.parse(text, resolver).map(|list| list.matched(role).map(QuotedText::new)) {
                Ok(Some(glob)) => Ruling::Allows(glob),
                Ok(None) => Ruling::Forbids(shown(text)),
                Err(error) => Ruling::Invalid(error),
            }
        });
        Rulings { permitted, allowed_roles }
    }

    /// The mistakes in the annotations of `namespace`.
    pub(super) fn mistakes(&self, namespace: &Namespace, resolver: &RoleResolver) -> Vec<Mistake> {
        let permitted = namespace.permitted.as_ref().map(expression);
        let list = namespace.allowed_roles.as_ref().map(|text| self.parse(text, resolver));
        let imdsv2 = namespace.imdsv2.as_ref().filter(|_| !namespace.imdsv2_is_understood());
        let mistakes = [
            permitted.and_then(Result::err).map(Mistake::Permitted),
            list.and_then(Result::err).map(Mistake::AllowedRoles),
            imdsv2.map(|text| Mistake::Imdsv2(shown(text))),
        ];
        mistakes.into_iter().flatten().collect()
    }
}

impl Default for Lists {
    fn default() -> Self {
        Self(Memo::new(ROOM))
    }
}

fn expression(annotation: &Annotation) -> Result<PermittedRoles, InvalidExpression> {
    PermittedRoles::parse(annotation.text()?)
}

fn shown(annotation: &Annotation) -> QuotedText {
    match annotation.text() {
        Ok(text) => QuotedText::new(text),
        Err(too_long) => QuotedText::new(&too_long.to_string()),
    }
}

// === impl Rulings ===

impl Rulings {
    /// Whether they allow `role` together: each annotation that is set must. If one of two were enough, a list left over
    /// from kube2iam would allow roles that the expression forbids.
    pub(super) fn permit(
        self,
        namespace: &str,
        role: &RoleArn,
        policy: NamespacePolicy,
    ) -> Result<(), Refusal> {
        let (namespace, role) = (QuotedText::new(namespace), role.clone());
        if self.permitted.is_none() && self.allowed_roles.is_none() {
            return match policy {
                NamespacePolicy::Optional => Ok(()),
                NamespacePolicy::Required => Err(Refusal::NamespaceSilent(namespace)),
            };
        }
        match self.permitted {
            None | Some(Ruling::Allows(_)) => {}
            Some(Ruling::Forbids(permitted)) => {
                return Err(Refusal::NamespaceForbids { namespace, permitted, role });
            }
            Some(Ruling::Invalid(error)) => {
                return Err(Refusal::NamespaceInvalid { namespace, error });
            }
        }
        match self.allowed_roles {
            None | Some(Ruling::Allows(_)) => Ok(()),
            Some(Ruling::Forbids(allowed)) => {
                Err(Refusal::NamespaceDisallows { namespace, allowed, role })
            }
            Some(Ruling::Invalid(error)) => Err(Refusal::NamespaceListInvalid { namespace, error }),
        }
    }
}

// === impl Mistake ===

impl Mistake {
    /// The reason of its Event.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Permitted(_) => "InvalidPermitted",
            Self::AllowedRoles(_) => "InvalidAllowedRoles",
            Self::Imdsv2(_) => "InvalidImdsv2",
        }
    }
}

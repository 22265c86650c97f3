//! What a namespace's annotations say about a role, and what is wrong with them.

use super::{
    InvalidAllowedRoles, InvalidExpression, NamespacePolicy, PermittedRoles, Refusal,
    allowed::AllowedRoles, memo::Memo,
};
use crate::{
    pods::{Annotation, Namespace},
    role::{QuotedText, RoleArn, RoleResolver},
};

/// How much memory all lists take once they are read. Hundreds of usual ones fit, dozens of the longest.
const ROOM: usize = 8 * 1024 * 1024;

/// What one annotation of a namespace says about a role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling<E> {
    /// Allowed, by this expression or glob.
    Allows(QuotedText),
    /// Not allowed; what the annotation says.
    Forbids(QuotedText),
    /// It can't be used, so that it allows nothing.
    Invalid(E),
}

/// What a namespace's annotations say about a role; `None` for one that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rulings {
    /// `iam.amazonaws.com/permitted`.
    pub permitted: Option<Ruling<InvalidExpression>>,
    /// `iam.amazonaws.com/allowed-roles`.
    pub allowed_roles: Option<Ruling<InvalidAllowedRoles>>,
}

/// What is wrong with a namespace's annotations, whatever its pods ask for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// No expression.
    #[error("annotation iam.amazonaws.com/permitted: {0}; the namespace's pods get no role")]
    Permitted(InvalidExpression),
    /// No list of globs.
    #[error("annotation iam.amazonaws.com/allowed-roles: {0}; the namespace's pods get no role")]
    AllowedRoles(InvalidAllowedRoles),
    /// No word that is known.
    #[error(
        "annotation iam.amazonaws.com/imdsv2: {0} is neither optional nor required, and taken for required"
    )]
    Imdsv2(QuotedText),
}

/// Lists of globs, made once.
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

    /// What `namespace` says about `role`.
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

    /// What is wrong with `namespace`.
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
    /// Whether they allow `role` together: each that is there must. Were one of two enough, a list that was left over from
    /// kube2iam, or put beside the expression by somebody else, would open what the other was to keep shut.
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
    /// Its kind, as Events have it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Permitted(_) => "InvalidPermitted",
            Self::AllowedRoles(_) => "InvalidAllowedRoles",
            Self::Imdsv2(_) => "InvalidImdsv2",
        }
    }
}

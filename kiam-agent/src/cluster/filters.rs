//! The fields of Kubernetes objects that the agent reads. The rest is dropped while an object arrives.

use kiam_core::pods::annotations;

use super::sieve::Filter;

/// The name and the size limit of an annotation.
#[derive(Clone, Copy, Debug)]
pub(super) struct AnnotationSpec {
    pub(super) name: &'static str,
    /// The longest valid value, in bytes.
    pub(super) most: usize,
}

pub(super) const ROLE: AnnotationSpec = AnnotationSpec::new(annotations::ROLE, 2048);
pub(super) const SESSION_NAME: AnnotationSpec =
    AnnotationSpec::new(annotations::SESSION_NAME, 2048);
pub(super) const EXTERNAL_ID: AnnotationSpec = AnnotationSpec::new(annotations::EXTERNAL_ID, 2048);
pub(super) const SESSION_POLICIES: AnnotationSpec =
    AnnotationSpec::new(annotations::SESSION_POLICIES, 24 * 1024);
pub(super) const PERMITTED: AnnotationSpec = AnnotationSpec::new(annotations::PERMITTED, 16 * 1024);
pub(super) const ALLOWED_ROLES: AnnotationSpec =
    AnnotationSpec::new(annotations::ALLOWED_ROLES, 64 * 1024);
pub(super) const IMDSV2: AnnotationSpec = AnnotationSpec::new(annotations::IMDSV2, 64);
pub(super) const ROLE_ARN: AnnotationSpec = AnnotationSpec::new(annotations::ROLE_ARN, 2048);
/// Set only by the kubelet, on the mirror pod of a static pod
/// (<https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-config-mirror>).
pub(super) const CONFIG_MIRROR: AnnotationSpec =
    AnnotationSpec::new("kubernetes.io/config.mirror", 128);
pub(super) const CONFIG_HASH: AnnotationSpec =
    AnnotationSpec::new("kubernetes.io/config.hash", 128);

/// The name and the filter of a field.
type Field = (&'static str, Filter);

const WORD: Filter = Filter::Text(1024);
const LONG: Filter = Filter::Text(64 * 1024);
const KIND: Field = ("kind", WORD);
const API_VERSION: Field = ("apiVersion", WORD);
const NAME: Field = ("name", WORD);
const NAMESPACE: Field = ("namespace", WORD);
const UID: Field = ("uid", WORD);
const VERSION: Field = ("resourceVersion", WORD);
// Of an error, which may come instead of an object.
const CODE: Field = ("code", WORD);
const REASON: Field = ("reason", WORD);
const STATUS: Field = ("status", WORD);
const TEXT: Field = ("message", LONG);

/// The filter of a pod.
pub(super) const POD: Filter = Filter::Fields(&[
    KIND,
    API_VERSION,
    CODE,
    REASON,
    TEXT,
    (
        "metadata",
        Filter::Fields(&[
            NAME,
            NAMESPACE,
            UID,
            VERSION,
            ("deletionTimestamp", WORD),
            ("annotations", POD_ANNOTATIONS),
            ("ownerReferences", OWNERS),
        ]),
    ),
    (
        "spec",
        Filter::Fields(&[("nodeName", WORD), ("hostNetwork", WORD), ("serviceAccountName", WORD)]),
    ),
    (
        "status",
        Filter::Fields(&[
            ("phase", WORD),
            ("hostIP", WORD),
            ("podIP", WORD),
            ("podIPs", Filter::Each(&Filter::Fields(&[("ip", WORD)]))),
        ]),
    ),
]);

const OWNERS: Filter = Filter::Each(&Filter::Fields(&[("controller", WORD), ("kind", WORD)]));

const POD_ANNOTATIONS: Filter = Filter::Fields(&[
    ROLE.field(),
    SESSION_NAME.field(),
    EXTERNAL_ID.field(),
    SESSION_POLICIES.field(),
    CONFIG_MIRROR.field(),
    CONFIG_HASH.field(),
]);

/// The filter of a namespace.
pub(super) const NAMESPACE_OBJECT: Filter = Filter::Fields(&[
    KIND,
    API_VERSION,
    CODE,
    REASON,
    TEXT,
    STATUS,
    (
        "metadata",
        Filter::Fields(&[
            NAME,
            VERSION,
            (
                "annotations",
                Filter::Fields(&[PERMITTED.field(), ALLOWED_ROLES.field(), IMDSV2.field()]),
            ),
        ]),
    ),
]);

/// The filter of a ServiceAccount.
pub(super) const ACCOUNT_OBJECT: Filter = Filter::Fields(&[
    KIND,
    API_VERSION,
    CODE,
    REASON,
    TEXT,
    STATUS,
    (
        "metadata",
        Filter::Fields(&[
            NAME,
            NAMESPACE,
            VERSION,
            ("annotations", Filter::Fields(&[ROLE_ARN.field()])),
        ]),
    ),
]);

/// The filter of a list's metadata.
const LIST_METADATA: Field = ("metadata", Filter::Fields(&[VERSION, ("continue", LONG)]));

/// The filters of objects, their lists and their events.
pub(super) trait ObjectFilters {
    const OBJECT: Filter;
    const LIST: Filter = Filter::Fields(&[LIST_METADATA, ("items", Filter::Items(&Self::OBJECT))]);
    /// The filter of a watch's event, or of an error instead of one.
    const EVENT: Filter = Filter::Fields(&[
        ("type", WORD),
        ("object", Self::OBJECT),
        KIND,
        CODE,
        REASON,
        TEXT,
        STATUS,
    ]);
}

// === impl AnnotationSpec ===

impl AnnotationSpec {
    const fn new(name: &'static str, most: usize) -> Self {
        Self { name, most }
    }

    const fn field(self) -> Field {
        (self.name, Filter::Text(self.most))
    }
}

//! The base of short names, for the comparison alone.

use crate::migrate::{installation::Installation, objects::Inventory, settings::Settings};
use kiam_core::{
    pods::annotations::{ALLOWED_ROLES, PERMITTED},
    role::BaseArn,
};

/// A base with no account of anybody's.
const NOBODYS: &str = "arn:aws:iam::000000000000:role/";

/// The base of the comparison.
pub(super) struct Base {
    pub(super) base: BaseArn,
    /// What to say of it where it is a guess.
    pub(super) note: Option<String>,
    /// Whether the operator or the installation names its account. A tenant's annotation may name any.
    pub(super) is_certain: bool,
}

/// The base, which may be a guess.
pub(super) fn of(
    settings: &Settings,
    installation: &Installation,
    inventory: &Inventory,
    given: Option<&BaseArn>,
) -> Base {
    if let Some(base) = given {
        return Base { base: base.clone(), note: None, is_certain: true };
    }
    if let Some(base) = settings.value("role-base-arn").and_then(|base| base.parse().ok()) {
        return Base { base, note: None, is_certain: true };
    }
    let of_parts = of_parts(installation).find_map(account_of);
    let is_certain = of_parts.is_some();
    let guess = of_parts.or_else(|| of_annotations(inventory).find_map(account_of));
    let base = guess.as_deref().unwrap_or(NOBODYS);
    let base: BaseArn = base.parse().expect("an ARN of digits is a base");
    let note = format!(
        "the nodes' own base is not in the input; short names are compared as {base}…, and --role-base-arn names another"
    );
    Base { base, note: Some(note), is_certain }
}

/// The installation's own texts that may hold an ARN.
fn of_parts(installation: &Installation) -> impl Iterator<Item = &str> {
    let settings = installation.parts.iter().flat_map(|part| &part.settings);
    settings.map(|setting| setting.value.as_str())
}

/// Texts of others that may hold an ARN.
fn of_annotations(inventory: &Inventory) -> impl Iterator<Item = &str> {
    let annotations = inventory.namespaces.iter().flat_map(|namespace| {
        [PERMITTED, ALLOWED_ROLES].into_iter().filter_map(|it| namespace.annotations.get(it))
    });
    let roles = inventory.workloads.iter().flat_map(|workload| workload.annotations.values());
    annotations.chain(roles).map(String::as_str)
}

/// The base of the account of the first role's ARN in `text`.
fn account_of(text: &str) -> Option<String> {
    let start = text.find("arn:")?;
    let mut fields = text[start..].splitn(6, ':').skip(1);
    let (partition, service, region, account) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let is_partition = partition.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
    (service == "iam" && region.is_empty() && is_partition && is_account)
        .then(|| format!("arn:{partition}:iam::{account}:role/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read_from_the_arn_of_a_role() {
        for (text, expected) in [
            ("arn:aws:iam::123456789012:role/x", Some("arn:aws:iam::123456789012:role/")),
            (
                r#"["arn:aws-cn:iam::123456789012:role/a/*"]"#,
                Some("arn:aws-cn:iam::123456789012:role/"),
            ),
            ("arn:aws:iam::.*:role/x", None),
            ("arn:aws:s3:::bucket", None),
            ("reader", None),
        ] {
            assert_eq!(account_of(text).as_deref(), expected, "{text}");
        }
    }
}

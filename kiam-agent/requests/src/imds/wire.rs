//! The bodies of answers, byte by byte as SDKs expect them.
//!
//! Times are UTC in whole seconds, `2026-01-01T00:00:00Z`: botocore accepts only that form. Bodies have no trailing
//! newline, because several SDKs put a list's line into the next path unchanged.

use std::time::SystemTime;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use kiam_core::{
    credentials::{Credentials, RenderedAnswers},
    role::RoleArn,
};

/// The body of `…/security-credentials/<role>`, in EC2's order.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SecurityCredentials<'a> {
    code: &'static str,
    last_updated: String,
    #[serde(rename = "Type")]
    kind: &'static str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<&'a str>,
}

/// The body of `…/iam/info`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct InstanceProfile<'a> {
    code: &'static str,
    last_updated: String,
    instance_profile_arn: String,
    instance_profile_id: &'a str,
}

/// Renders the bodies of `credentials`: a [`kiam_core::credentials::Render`].
#[must_use]
pub fn render(credentials: &Credentials) -> RenderedAnswers {
    let body = |account_id| SecurityCredentials {
        code: "Success",
        last_updated: time(credentials.issued),
        kind: "AWS-HMAC",
        access_key_id: &credentials.access_key_id,
        secret_access_key: credentials.secret_access_key.expose(),
        token: credentials.session_token.expose(),
        expiration: time(credentials.expires),
        account_id,
    };
    RenderedAnswers {
        role_name: Bytes::copy_from_slice(credentials.role.name().as_bytes()),
        plain: json(&body(None)),
        extended: json(&body(Some(credentials.role.account()))),
    }
}

/// The body of `…/iam/info` for a pod of `role`: an instance profile of the same name, since pods must not learn the
/// node's.
pub(super) fn instance_profile(role: &RoleArn, now: SystemTime) -> Bytes {
    json(&InstanceProfile {
        code: "Success",
        last_updated: time(now),
        instance_profile_arn: format!(
            "arn:{}:iam::{}:instance-profile/{}",
            role.partition(),
            role.account(),
            role.path_and_name()
        ),
        // A well-formed id of no existing profile.
        instance_profile_id: "AIPAKIAM0000000000000",
    })
}

fn json(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).expect("strings are always JSON").into()
}

/// Formats a time as `2026-01-01T00:00:00Z`. Fractions of a second are dropped, so that nothing seems to live longer.
fn time(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let whole = i64::try_from(seconds).ok().and_then(|at| Timestamp::from_second(at).ok());
    whole.unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use kiam_core::secret::Secret;

    #[test]
    fn bodies_are_ec2s_byte_for_byte() {
        let issued = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_225_600_999);
        let rendered = render(&Credentials {
            role: "arn:aws:iam::123456789012:role/team/reader".parse().unwrap(),
            access_key_id: "ASIAEXAMPLE".to_owned(),
            secret_access_key: Secret::new("s/e+c\"r"),
            session_token: Secret::new("t//o=="),
            issued,
            expires: issued + Duration::from_secs(3600),
        });
        let plain = concat!(
            r#"{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","Type":"AWS-HMAC","#,
            r#""AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"s/e+c\"r","Token":"t//o==","#,
            r#""Expiration":"2026-01-01T01:00:00Z"}"#
        );
        assert_eq!(rendered.plain, plain);
        let extended = plain.replace('}', r#","AccountId":"123456789012"}"#);
        assert_eq!(rendered.extended, extended);
        assert_eq!(format!("{rendered:?}"), "RenderedAnswers", "all of it is secret");
    }

    #[test]
    fn instance_profile_is_named_after_the_pods_role() {
        let role = "arn:aws-cn:iam::123456789012:role/team/reader".parse().unwrap();
        assert_eq!(
            instance_profile(&role, SystemTime::UNIX_EPOCH),
            concat!(
                r#"{"Code":"Success","LastUpdated":"1970-01-01T00:00:00Z","#,
                r#""InstanceProfileArn":"arn:aws-cn:iam::123456789012:instance-profile/team/reader","#,
                r#""InstanceProfileId":"AIPAKIAM0000000000000"}"#
            )
        );
    }
}

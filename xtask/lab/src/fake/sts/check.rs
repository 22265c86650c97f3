//! What STS refuses, in its own codes and words.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde_json::Value;

use super::{State, access_key, token_of};
use crate::fake::fault::Call;

/// Status, code and message.
pub(super) type Refusal = (u16, &'static str, String);

/// The longest `MaxSessionDuration` that a role can have.
pub(super) const LONGEST: Duration = Duration::from_secs(12 * 3600);
/// Of a session that a session asks for.
const LONGEST_CHAINED: Duration = Duration::from_secs(3600);
/// What a role's trust in an OIDC issuer names as the audience.
const AUDIENCE: &str = "sts.amazonaws.com";

/// What is asked for, whoever asks.
pub(super) struct Asked<'a> {
    pub(super) role: &'a str,
    pub(super) account: &'a str,
    /// The role's, without its path.
    pub(super) name: &'a str,
    pub(super) session: &'a str,
    pub(super) duration: Duration,
}

/// Who asks.
pub(super) struct Subject {
    pub(super) name: String,
    /// Itself a role's session: what it asks for is chained.
    pub(super) is_session: bool,
    /// Of a web identity token.
    pub(super) audience: Option<String>,
}

/// The fields that every action has.
pub(super) fn asked(fields: &BTreeMap<String, String>) -> Result<Asked<'_>, Refusal> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    let (Some(role), Some(session)) = (field("RoleArn"), field("RoleSessionName")) else {
        return Err(invalid("RoleArn and RoleSessionName are required"));
    };
    let Some((account, name)) = account_and_name(role) else {
        return Err(invalid("RoleArn is not the ARN of a role"));
    };
    for (name, range, further) in [
        ("RoleSessionName", 2..=64, "=,.@-"),
        ("SourceIdentity", 2..=64, "=,.@-"),
        ("ExternalId", 2..=1224, "=,.@:/-"),
    ] {
        let fits = |value: &str| {
            let word = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == '+';
            range.contains(&value.len())
                && value.chars().all(|char| word(char) || further.contains(char))
        };
        if field(name).is_some_and(|value| !fits(value)) {
            return Err(invalid(&format!("{name} failed to satisfy its constraint")));
        }
    }
    let count = |start: &str, end: &str| {
        fields.keys().filter(|key| key.starts_with(start) && key.ends_with(end)).count()
    };
    if count("Tags.member.", ".Key") > 50 || count("PolicyArns.member.", ".arn") > 10 {
        return Err(invalid("at most 50 tags and 10 policy ARNs"));
    }
    let seconds = field("DurationSeconds").map_or(Ok(3600), str::parse);
    let seconds = seconds.map_err(|_| invalid("DurationSeconds is no number"))?;
    Ok(Asked { role, account, name, session, duration: Duration::from_secs(seconds) })
}

/// Whether a session of `asked` is allowed, of a role whose maximum is `longest`.
pub(super) fn duration(asked: Duration, longest: Duration, chained: bool) -> Result<(), Refusal> {
    if !(Duration::from_secs(900)..=LONGEST).contains(&asked) {
        return Err(invalid("DurationSeconds must be 900 to 43200"));
    }
    if chained && asked > LONGEST_CHAINED {
        return Err(invalid(
            "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining.",
        ));
    }
    if asked > longest {
        let message =
            "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
        return Err(invalid(message));
    }
    Ok(())
}

impl Subject {
    /// Whose access key signed `call`. The signature itself is not checked: the lab's secrets are no secrets.
    pub(super) fn key(state: &State, call: &Call) -> Result<Self, Refusal> {
        let stranger = || {
            let message = "The security token included in the request is invalid.";
            (403, "InvalidClientTokenId", message.to_owned())
        };
        let key = access_key(call).ok_or_else(stranger)?;
        let subject = |is_session| Self { name: key.to_owned(), is_session, audience: None };
        if key == state.caller {
            return Ok(subject(false));
        }
        let session = state.issued.iter().find(|issued| issued.access_key == key);
        let session = session.ok_or_else(stranger)?;
        if call.header("x-amz-security-token") != Some(&token_of(key)) {
            return Err(stranger());
        }
        if session.expiration <= Timestamp::now() {
            let message = "The security token included in the request is expired";
            return Err((403, "ExpiredToken", message.to_owned()));
        }
        Ok(subject(true))
    }

    /// Whose web identity token `fields` hold, if `role` trusts it.
    pub(super) fn token(
        state: &State,
        fields: &BTreeMap<String, String>,
        role: &str,
    ) -> Result<Self, Refusal> {
        let bad = |message: &str| (400, "InvalidIdentityToken", message.to_owned());
        let token = fields.get("WebIdentityToken").map(String::as_str).unwrap_or_default();
        let claims = (state.issuer.0)(token).ok_or_else(|| {
            bad("Couldn't retrieve verification key from your identity provider, or the token is no JWT of it")
        })?;
        let audience = claims["aud"].as_array().into_iter().flatten().find(|aud| *aud == AUDIENCE);
        if audience.is_none() {
            return Err(bad("Incorrect token audience"));
        }
        if claims["exp"].as_i64().is_none_or(|expires| expires <= Timestamp::now().as_second()) {
            return Err((400, "ExpiredTokenException", "Token expired".to_owned()));
        }
        let name = claims["sub"].as_str().unwrap_or_default().to_owned();
        if state.trusted.get(role).is_some_and(|trusted| !trusted.contains(&name)) {
            let message = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
            return Err((403, "AccessDenied", message.to_owned()));
        }
        let audience = audience.and_then(Value::as_str).map(str::to_owned);
        Ok(Self { name, is_session: false, audience })
    }
}

fn account_and_name(role: &str) -> Option<(&str, &str)> {
    let mut parts = role.strip_prefix("arn:aws")?.splitn(5, ':').skip(3);
    let (account, resource) = (parts.next()?, parts.next()?);
    let path = resource.strip_prefix("role/")?;
    Some((account, path.rsplit('/').next().unwrap_or(path)))
}

fn invalid(message: &str) -> Refusal {
    (400, "ValidationError", message.to_owned())
}

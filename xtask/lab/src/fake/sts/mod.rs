//! AWS STS: AssumeRole and AssumeRoleWithWebIdentity over its query protocol, with a record of whose the issued
//! credentials are.
//!
//! <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>

mod check;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Result;
use http::{Response, StatusCode, header::AUTHORIZATION};
use jiff::Timestamp;
use serde_json::Value;

use self::check::{Refusal, Subject};
use super::{
    fault::{Call, Faults, Injected},
    http::{Answer, Body, Place, Server, full},
    imds::{ACCOUNT, INSTANCE_ID, NODE_ROLE},
    web_token,
};

/// One answered request.
#[derive(Clone, Debug)]
pub struct Issued {
    /// `AssumeRole` or `AssumeRoleWithWebIdentity`.
    pub action: String,
    /// What was issued: `ASIA…`, never twice the same.
    pub access_key: String,
    /// `RoleArn`.
    pub role: String,
    /// `RoleSessionName`.
    pub session: String,
    /// `ExternalId`.
    pub external_id: Option<String>,
    /// `DurationSeconds`.
    pub duration: Duration,
    /// The access key that signed the request, or the `sub` of its web identity token.
    pub caller: String,
    /// When the credentials expire.
    pub expiration: Timestamp,
    /// Everything that was sent, as it was sent: `Tags.member.1.Key`, `SourceIdentity`, `Policy`, …
    pub fields: BTreeMap<String, String>,
}

/// The server.
#[derive(Debug)]
pub struct Sts {
    server: Server<Service>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct Service(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whose signature counts, besides those of what was issued here.
    caller: String,
    issued: Vec<Issued>,
    /// By action and role.
    requests: BTreeMap<(String, String), u64>,
    session_length: Option<Duration>,
    /// `MaxSessionDuration` by role, where it is not 12 hours.
    longest: BTreeMap<String, Duration>,
    /// The `sub`s that may have a role, by role.
    trusted: BTreeMap<String, BTreeSet<String>>,
    issuer: Issuer,
}

/// The claims of a token, if it is good.
type Claims = Box<dyn Fn(&str) -> Option<Value> + Send>;

/// The one OIDC provider that roles trust: the claims of a token that it signed.
struct Issuer(Claims);

impl Default for Issuer {
    fn default() -> Self {
        Self(Box::new(web_token::claims))
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Issuer")
    }
}

// === impl Sts ===

impl Sts {
    /// Starts it; only requests signed with the access key `caller`, or with one issued here, are heard.
    pub fn start(place: Place, caller: &str) -> Result<Self> {
        let state = State { caller: caller.to_owned(), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let server = Server::start(vec![place], Arc::new(Service(Arc::clone(&state))))?;
        Ok(Self { server, state })
    }

    /// What `--sts-endpoint` names.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// The faults of its answers.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        self.server.faults()
    }

    /// Everything issued so far, oldest first.
    #[must_use]
    pub fn issued(&self) -> Vec<Issued> {
        self.state().issued.clone()
    }

    /// Whose credentials `access_key` names.
    #[must_use]
    pub fn owner(&self, access_key: &str) -> Option<Issued> {
        self.state().issued.iter().find(|issued| issued.access_key == access_key).cloned()
    }

    /// How many requests named `role`, those included that met a fault or were refused.
    #[must_use]
    pub fn requests_for(&self, role: &str) -> u64 {
        self.count(|(_, asked)| asked == role)
    }

    /// How many requests came, those included that met a fault or were refused.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.count(|_| true)
    }

    /// How many requests came, by action and role.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<(String, String), u64> {
        self.state().requests.clone()
    }

    /// Issues sessions of this length, whatever is asked for.
    pub fn set_session_length(&self, length: Option<Duration>) {
        self.state().session_length = length;
    }

    /// Hears the signature of another access key from now on, in place of the one it was started with.
    pub fn set_caller(&self, caller: &str) {
        caller.clone_into(&mut self.state().caller);
    }

    /// Refuses sessions of `role` that are longer, as its `MaxSessionDuration` does; at first 12 hours.
    pub fn set_longest_session(&self, role: &str, longest: Duration) {
        self.state().longest.insert(role.to_owned(), longest);
    }

    /// Has `role` trust this `sub` of a web identity token, and from now on none but those named so.
    pub fn trust(&self, role: &str, subject: &str) {
        self.state().trusted.entry(role.to_owned()).or_default().insert(subject.to_owned());
    }

    /// Takes web identity tokens of another issuer than the lab's: `claims` has those of a token that it signed, and none
    /// of any other. Audience, time and subject are checked here, as of every token.
    pub fn set_issuer(&self, claims: impl Fn(&str) -> Option<Value> + Send + 'static) {
        self.state().issuer = Issuer(Box::new(claims));
    }

    /// Goes away: connections are cut, new ones refused.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Comes back on the same port.
    pub fn restart(&self) -> Result<()> {
        self.server.restart()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn count(&self, which: impl Fn(&(String, String)) -> bool) -> u64 {
        self.state().requests.iter().filter(|(key, _)| which(key)).map(|(_, count)| count).sum()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Faults that only STS has.
impl Injected {
    /// The usual answer without this element, such as `SessionToken`.
    #[must_use]
    pub fn without(element: &'static str) -> Self {
        Self::edit(move |text| replaced(text, element, None))
    }

    /// Credentials that expired an hour ago.
    #[must_use]
    pub fn expired() -> Self {
        Self::edit(|text| {
            let past = Timestamp::now() - Duration::from_secs(3600);
            replaced(text, "Expiration", Some(&time(past)))
        })
    }

    /// An answer that names the session of another role, such as `arn:aws:sts::1:assumed-role/other/session`.
    #[must_use]
    pub fn for_session(arn: &str) -> Self {
        let arn = arn.to_owned();
        Self::edit(move |text| replaced(text, "Arn", Some(&arn)))
    }
}

/// `xml` with another text in its first `element`, or without it.
fn replaced(xml: &str, element: &str, text: Option<&str>) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let parts = xml.split_once(&open).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&close)?;
        Some((before, after))
    });
    let Some((before, after)) = parts else { return xml.to_owned() };
    let new = text.map(|text| format!("{open}{text}{close}")).unwrap_or_default();
    format!("{before}{new}{after}")
}

// === impl Service ===

impl Answer for Service {
    fn note(&self, _peer: SocketAddr, call: &Call) {
        let field = |name: &str| call.fields.get(name).cloned().unwrap_or_default();
        let key = (field("Action"), field("RoleArn"));
        *lock(&self.0).requests.entry(key).or_default() += 1;
    }

    fn answer(&self, call: &Call) -> Response<Body> {
        let mut state = lock(&self.0);
        if call.fields.get("Action").is_some_and(|action| action == "GetCallerIdentity") {
            return match Subject::key(&state, call) {
                Ok(_) => full(StatusCode::OK, "text/xml", identity()),
                Err((status, code, message)) => failure(status, code, &message),
            };
        }
        match state.issue(call) {
            Ok((issued, answer)) => {
                state.issued.push(issued);
                full(StatusCode::OK, "text/xml", answer)
            }
            Err((status, code, message)) => failure(status, code, &message),
        }
    }

    fn refusal(&self, status: StatusCode, code: &str) -> Response<Body> {
        failure(status.as_u16(), code, "refused by the lab")
    }
}

// === impl State ===

impl State {
    /// What is issued for `call`, and the answer's body.
    fn issue(&self, call: &Call) -> Result<(Issued, String), Refusal> {
        let fields = &call.fields;
        let field = |name: &str| fields.get(name).map(String::as_str);
        let action = field("Action").unwrap_or_default();
        let asked = check::asked(fields)?;
        let subject = match action {
            "AssumeRole" => Subject::key(self, call)?,
            "AssumeRoleWithWebIdentity" => Subject::token(self, fields, asked.role)?,
            other => return Err((400, "InvalidAction", format!("no action {other:?} here"))),
        };
        let longest = self.longest.get(asked.role).copied().unwrap_or(check::LONGEST);
        check::duration(asked.duration, longest, subject.is_session)?;
        let length = self.session_length.unwrap_or(asked.duration);
        let issued = Issued {
            action: action.to_owned(),
            access_key: format!("ASIA{:016X}", self.issued.len() + 1),
            role: asked.role.to_owned(),
            session: asked.session.to_owned(),
            external_id: field("ExternalId").map(str::to_owned),
            duration: asked.duration,
            caller: subject.name.clone(),
            expiration: Timestamp::now() + length,
            fields: fields.clone(),
        };
        let answer = success(&issued, &asked, &subject);
        Ok((issued, answer))
    }
}

fn success(issued: &Issued, asked: &check::Asked<'_>, subject: &Subject) -> String {
    let Issued { action, access_key, session, .. } = issued;
    let check::Asked { account, name, role, .. } = asked;
    let partition = role.split(':').nth(1).unwrap_or("aws");
    let expiration = time(issued.expiration);
    let (secret, token) = (secret_of(access_key), token_of(access_key));
    let mut further = String::new();
    if let Some(identity) = issued.fields.get("SourceIdentity") {
        further = format!("<SourceIdentity>{identity}</SourceIdentity>");
    }
    if let Some(audience) = &subject.audience {
        let subject = &subject.name;
        further += &format!(
            "<SubjectFromWebIdentityToken>{subject}</SubjectFromWebIdentityToken><Audience>{audience}</Audience>"
        );
    }
    format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <{action}Result>\
         <AssumedRoleUser><AssumedRoleId>AROALAB:{session}</AssumedRoleId>\
         <Arn>arn:{partition}:sts::{account}:assumed-role/{name}/{session}</Arn></AssumedRoleUser>\
         <Credentials><AccessKeyId>{access_key}</AccessKeyId>\
         <SecretAccessKey>{secret}</SecretAccessKey>\
         <SessionToken>{token}</SessionToken>\
         <Expiration>{expiration}</Expiration></Credentials>{further}\
         </{action}Result>\
         <ResponseMetadata><RequestId>lab</RequestId></ResponseMetadata>\
         </{action}Response>"
    )
}

/// Who the node is: a session of its role, named after the instance.
fn identity() -> String {
    format!(
        "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <GetCallerIdentityResult>\
         <Arn>arn:aws:sts::{ACCOUNT}:assumed-role/{NODE_ROLE}/{INSTANCE_ID}</Arn>\
         <UserId>AROALAB:{INSTANCE_ID}</UserId><Account>{ACCOUNT}</Account>\
         </GetCallerIdentityResult>\
         <ResponseMetadata><RequestId>lab</RequestId></ResponseMetadata>\
         </GetCallerIdentityResponse>"
    )
}

/// The secret that is issued with `access_key`.
pub(super) fn secret_of(access_key: &str) -> String {
    format!("secret-of-{access_key}")
}

/// The session token that is issued with `access_key`.
pub(super) fn token_of(access_key: &str) -> String {
    format!("token-of-{access_key}")
}

fn failure(status: u16, code: &str, message: &str) -> Response<Body> {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let blame = if status.is_server_error() { "Receiver" } else { "Sender" };
    let body = format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <Error><Type>{blame}</Type><Code>{code}</Code><Message>{message}</Message></Error>\
         <RequestId>lab</RequestId></ErrorResponse>"
    );
    full(status, "text/xml", body)
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Who signed `call`: from `AWS4-HMAC-SHA256 Credential=AKIA…/20260101/eu-west-1/sts/aws4_request, …`.
fn access_key(call: &Call) -> Option<&str> {
    Some(call.header(AUTHORIZATION)?.split_once("Credential=")?.1.split_once('/')?.0)
}

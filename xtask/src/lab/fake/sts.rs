//! AWS STS: AssumeRole over its query protocol, with a record of whose the issued credentials are.
//!
//! <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use jiff::Timestamp;

use super::{
    form,
    http::{Answer, Body, Place, Server, full},
};

/// One answered AssumeRole.
#[derive(Clone, Debug)]
pub struct Issued {
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
    /// Who signed the request.
    pub caller: String,
    /// When the credentials expire.
    pub expiration: Timestamp,
}

/// An error answer, such as `("AccessDenied", 403)` or `("Throttling", 400)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `Error.Code`.
    pub code: &'static str,
    /// The HTTP status.
    pub status: u16,
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
    /// Whose signature counts.
    caller: String,
    issued: Vec<Issued>,
    requests: BTreeMap<String, u64>,
    latency: Duration,
    fault: Option<Fault>,
    faults: BTreeMap<String, Fault>,
    session_length: Option<Duration>,
}

// === impl Sts ===

impl Sts {
    /// Starts it; only requests signed with the access key `caller` are heard.
    ///
    /// # Errors
    ///
    /// When the place can't be bound.
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

    /// How many AssumeRole requests named `role`, refused ones included.
    #[must_use]
    pub fn requests_for(&self, role: &str) -> u64 {
        self.state().requests.get(role).copied().unwrap_or(0)
    }

    /// How many AssumeRole requests came, refused ones included.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state().requests.values().sum()
    }

    /// Waits this long before each answer.
    pub fn set_latency(&self, latency: Duration) {
        self.state().latency = latency;
    }

    /// Answers everything with `fault`, or as usual again.
    pub fn fail(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// Answers requests for `role` with `fault`, or as usual again.
    pub fn fail_role(&self, role: &str, fault: Option<Fault>) {
        let mut state = self.state();
        match fault {
            Some(fault) => state.faults.insert(role.to_owned(), fault),
            None => state.faults.remove(role),
        };
    }

    /// Issues sessions of this length, whatever is asked for.
    pub fn set_session_length(&self, length: Option<Duration>) {
        self.state().session_length = length;
    }

    /// Goes away: connections are cut, new ones refused.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Comes back on the same port.
    ///
    /// # Errors
    ///
    /// When somebody else has the port by now.
    pub fn restart(&self) -> Result<()> {
        self.server.restart()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Service ===

impl Service {
    fn assume_role(&self, caller: &str, fields: &BTreeMap<String, String>) -> Response<Body> {
        let field = |name: &str| fields.get(name).map(String::as_str);
        let (Some(role), Some(session)) = (field("RoleArn"), field("RoleSessionName")) else {
            return failure("ValidationError", 400, "RoleArn and RoleSessionName are required");
        };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state.requests.entry(role.to_owned()).or_default() += 1;
        if caller != state.caller {
            let message = "The security token included in the request is invalid.";
            return failure("InvalidClientTokenId", 403, message);
        }
        if let Some(fault) = state.fault.or_else(|| state.faults.get(role).copied()) {
            return failure(fault.code, fault.status, "refused by the lab");
        }
        let asked = field("DurationSeconds").map_or(Ok(3600), str::parse);
        let Ok(seconds @ 900..=43200) = asked else {
            return failure("ValidationError", 400, "DurationSeconds must be 900 to 43200");
        };
        let Some((account, name)) = account_and_name(role) else {
            return failure("ValidationError", 400, "RoleArn is not the ARN of a role");
        };
        let duration = Duration::from_secs(seconds);
        let length = state.session_length.unwrap_or(duration);
        let issued = Issued {
            access_key: format!("ASIA{:016X}", state.issued.len() + 1),
            role: role.to_owned(),
            session: session.to_owned(),
            external_id: field("ExternalId").map(str::to_owned),
            duration,
            caller: caller.to_owned(),
            expiration: Timestamp::now() + length,
        };
        let answer = success(&issued, account, name);
        state.issued.push(issued);
        answer
    }
}

impl Answer for Service {
    async fn answer(&self, _peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        let latency = self.0.lock().unwrap_or_else(PoisonError::into_inner).latency;
        tokio::time::sleep(latency).await;
        let fields = form::parse(&String::from_utf8_lossy(request.body()));
        let authorization = request.headers().get(AUTHORIZATION);
        let caller = authorization.and_then(|value| access_key(value.to_str().ok()?));
        match fields.get("Action").map(String::as_str) {
            Some("AssumeRole") => self.assume_role(caller.unwrap_or_default(), &fields),
            action => failure("InvalidAction", 400, &format!("no action {action:?} here")),
        }
    }
}

/// From `AWS4-HMAC-SHA256 Credential=AKIA…/20260101/eu-west-1/sts/aws4_request, …`.
fn access_key(authorization: &str) -> Option<&str> {
    Some(authorization.split_once("Credential=")?.1.split_once('/')?.0)
}

fn account_and_name(role: &str) -> Option<(&str, &str)> {
    let mut parts = role.strip_prefix("arn:aws")?.splitn(5, ':').skip(3);
    let (account, resource) = (parts.next()?, parts.next()?);
    let path = resource.strip_prefix("role/")?;
    Some((account, path.rsplit('/').next().unwrap_or(path)))
}

fn success(issued: &Issued, account: &str, name: &str) -> Response<Body> {
    let Issued { access_key, session, .. } = issued;
    let expiration = issued.expiration.strftime("%Y-%m-%dT%H:%M:%SZ");
    let body = format!(
        "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <AssumeRoleResult>\
         <AssumedRoleUser><AssumedRoleId>AROALAB:{session}</AssumedRoleId>\
         <Arn>arn:aws:sts::{account}:assumed-role/{name}/{session}</Arn></AssumedRoleUser>\
         <Credentials><AccessKeyId>{access_key}</AccessKeyId>\
         <SecretAccessKey>secret-of-{access_key}</SecretAccessKey>\
         <SessionToken>token-of-{access_key}</SessionToken>\
         <Expiration>{expiration}</Expiration></Credentials>\
         </AssumeRoleResult>\
         <ResponseMetadata><RequestId>lab</RequestId></ResponseMetadata>\
         </AssumeRoleResponse>"
    );
    full(StatusCode::OK, "text/xml", body)
}

fn failure(code: &str, status: u16, message: &str) -> Response<Body> {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let blame = if status.is_server_error() { "Receiver" } else { "Sender" };
    let body = format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <Error><Type>{blame}</Type><Code>{code}</Code><Message>{message}</Message></Error>\
         <RequestId>lab</RequestId></ErrorResponse>"
    );
    full(status, "text/xml", body)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;
    use crate::pod_client::wire::{Reply, exchange};

    const ROLE: &str = "arn:aws:iam::123456789012:role/team/reader";

    fn ask(sts: &Sts, caller: &str, role: &str) -> Reply {
        let body = format!(
            "Action=AssumeRole&Version=2011-06-15&RoleSessionName=kiam&ExternalId=x&DurationSeconds=900&RoleArn={}",
            role.replace(':', "%3A").replace('/', "%2F")
        );
        let request = format!(
            "POST / HTTP/1.1\r\nHost: sts\r\nContent-Length: {}\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential={caller}/20260101/eu-west-1/sts/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(sts.server.address()).unwrap();
        exchange(&mut stream, &request).unwrap()
    }

    #[test]
    fn each_issue_has_its_own_key_and_is_on_record() {
        let sts = Sts::start(Place::loopback(), "AKIANODE").unwrap();
        let bodies = [ask(&sts, "AKIANODE", ROLE).body, ask(&sts, "AKIANODE", ROLE).body];
        let issued = sts.issued();
        assert_eq!((issued.len(), sts.requests_for(ROLE)), (2, 2));
        for (body, issued) in bodies.iter().zip(&issued) {
            assert!(body.contains(&format!("<AccessKeyId>{}<", issued.access_key)), "{body}");
            assert!(body.contains(":assumed-role/reader/kiam<"), "{body}");
            assert_eq!(sts.owner(&issued.access_key).unwrap().role, ROLE);
            assert_eq!(issued.external_id.as_deref(), Some("x"));
            assert_eq!(issued.duration, Duration::from_secs(900));
        }
        assert_ne!(issued[0].access_key, issued[1].access_key);
    }

    #[test]
    fn strangers_and_faults_get_errors_and_no_credentials() {
        let sts = Sts::start(Place::loopback(), "AKIANODE").unwrap();
        let stranger = ask(&sts, "AKIAOTHER", ROLE);
        assert_eq!(stranger.status, 403);
        assert!(stranger.body.contains("<Code>InvalidClientTokenId<"), "{}", stranger.body);
        sts.fail_role(ROLE, Some(Fault { code: "Throttling", status: 400 }));
        let throttled = ask(&sts, "AKIANODE", ROLE);
        assert_eq!(throttled.status, 400);
        assert!(throttled.body.contains("<Code>Throttling<"), "{}", throttled.body);
        assert!(sts.issued().is_empty());
        assert_eq!(sts.requests(), 2);
    }
}

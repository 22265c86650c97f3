//! `AssumeRole` against a server that says what each test scripts, over real HTTP.

mod web_identity;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use aws_credential_types::{Credentials as NodeCredentials, provider::ProvideCredentials as _};
use aws_smithy_runtime_api::{
    client::{
        http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn},
        orchestrator::HttpRequest,
        result::ConnectorError,
    },
    shared::IntoShared as _,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;
use kiam_core::{
    credentials::ErrorClass,
    role::{SessionName, SessionTags},
};

const ROLE: &str = "arn:aws:iam::123456789012:role/team/reader";
const HOP: &str = "arn:aws:iam::999999999999:role/kiam-hop";
const SECRET: &str = "wJalrXUtnFEMISECRET";
const SESSION_TOKEN: &str = "FwoGZXIvYXdzEJr-TOKEN";
const NODE_SECRET: &str = "NODESECRETNODESECRET";
const NODE_TOKEN: &str = "NODETOKENNODETOKEN";
const HOUR: Duration = Duration::from_secs(3600);

/// Answers connections in turn with what is scripted, and keeps what it was asked.
struct Scripted {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

/// A whole answer; none: the request is read and never answered.
type Reply = Option<String>;

impl Scripted {
    async fn new(replies: impl IntoIterator<Item = Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let (kept, mut replies) = (requests.clone(), replies.into_iter().collect::<VecDeque<_>>());
        tokio::spawn(async move {
            let mut silent = Vec::new();
            while let Some(reply) = replies.pop_front() {
                let (mut stream, _) = listener.accept().await.unwrap();
                let request = read_request(&mut stream).await;
                kept.lock().unwrap().push(request);
                match reply {
                    Some(reply) => stream.write_all(reply.as_bytes()).await.unwrap(),
                    None => silent.push(stream),
                }
            }
            std::future::pending::<()>().await;
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    fn config(&self) -> Config {
        Config {
            region: "eu-west-1".to_owned(),
            endpoint: Some(format!("http://{}", self.address)),
            through: None,
            upstream: "http://127.0.0.1:9".to_owned(),
            proxies: Proxies::default(),
        }
    }

    /// A client of this server, with credentials of the node that are there already.
    async fn client(&self) -> AssumeRole {
        client(&self.config()).await
    }

    /// The same, by way of [`HOP`].
    async fn chained(&self) -> AssumeRole {
        let name = SessionName::sanitised("kiam-agent");
        let hop = RoleIdentity::new(HOP.parse().unwrap(), name, CHAINED);
        client(&Config { through: Some(hop), ..self.config() }).await
    }

    /// The value of a field in each request.
    fn fields(&self, name: &str) -> Vec<String> {
        let field = |request: &String| {
            let body = request.split_once("\r\n\r\n").unwrap().1;
            let value = body.split('&').find_map(|field| field.strip_prefix(&format!("{name}=")));
            value.unwrap_or_default().to_owned()
        };
        self.requests().iter().map(field).collect()
    }
}

async fn client(config: &Config) -> AssumeRole {
    let token = Some(NODE_TOKEN.to_owned());
    let node = NodeCredentials::new("AKIANODE", NODE_SECRET, token, None, "test");
    AssumeRole::with_node(config, Clock::system(), SharedCredentialsProvider::new(node)).await
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.split("content-length: ").nth(1);
            let length: usize =
                length.map_or(0, |rest| rest.lines().next().unwrap().trim().parse().unwrap());
            if body.len() >= length {
                return String::from_utf8(bytes).unwrap();
            }
        }
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        assert_ne!(read, 0, "the request ended early");
        bytes.extend_from_slice(&buffer[..read]);
    }
}

fn reply(status: u16, body: &str) -> Reply {
    let length = body.len();
    Some(format!(
        "HTTP/1.1 {status} Scripted\r\nContent-Type: text/xml\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    ))
}

fn success_body(arn: &str, expiration: &str) -> String {
    format!(
        "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult>\
         <AssumedRoleUser><AssumedRoleId>AROA:x</AssumedRoleId><Arn>{arn}</Arn></AssumedRoleUser>\
         <Credentials><AccessKeyId>ASIAPOD</AccessKeyId><SecretAccessKey>{SECRET}</SecretAccessKey>\
         <SessionToken>{SESSION_TOKEN}</SessionToken><Expiration>{expiration}</Expiration>\
         </Credentials></AssumeRoleResult></AssumeRoleResponse>"
    )
}

fn success() -> String {
    success_body("arn:aws:sts::123456789012:assumed-role/reader/kiam-kiam", "2036-01-01T00:00:00Z")
}

fn failure(code: &str, message: &str) -> String {
    format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
         <Code>{code}</Code><Message>{message}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
    )
}

/// The address is no loopback address as far as `NO_PROXY` goes, but this host's.
#[tokio::test]
async fn the_metadata_service_is_never_asked_through_a_proxy_and_sts_is() {
    let plain = |body: &str| {
        let length = body.len();
        Some(format!(
            "HTTP/1.1 200 OK\r\nx-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        ))
    };
    let keys = format!(
        "{{\"Code\": \"Success\", \"LastUpdated\": \"2035-01-01T00:00:00Z\", \"Type\": \"AWS-HMAC\", \
         \"AccessKeyId\": \"ASIANODE\", \"SecretAccessKey\": \"{NODE_SECRET}\", \"Token\": \"t\", \
         \"Expiration\": \"2036-01-01T00:00:00Z\"}}"
    );
    let imds = Scripted::new([plain("token"), plain("node"), plain(&keys)]).await;
    let sts = Scripted::new([reply(200, &success())]).await;
    // It takes what it is sent for the request itself, and answers as STS does.
    let proxy = format!("http://{}", sts.address);
    let proxies = Proxies::from_vars(|name| (name == "HTTP_PROXY").then(|| proxy.clone()));
    let config = Config {
        endpoint: Some("http://sts.test".to_owned()),
        upstream: format!("http://0.0.0.0:{}", imds.address.port()),
        proxies: proxies.unwrap(),
        ..sts.config()
    };
    let asked = AssumeRole::new(&config, Clock::system()).await.unwrap();
    let claimant = Claimant::new("kiam", "kiam");
    let issued = asked.issue(&identity(), &claimant).await.unwrap();
    assert_eq!(issued.access_key_id, "ASIAPOD");
    assert_eq!(imds.requests().len(), 3);
    let requests = sts.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].starts_with("POST http://sts.test/ HTTP/1.1\r\n"), "{requests:?}");
}

#[tokio::test]
async fn a_proxy_is_shown_its_password_whether_it_forwards_or_tunnels() {
    let closed = "HTTP/1.1 503 Scripted\r\nContent-Length: 0\r\n\r\n".to_owned();
    let proxy = Scripted::new([reply(200, &success()), Some(closed)]).await;
    // It is no loopback address as far as `NO_PROXY` goes, but this host's.
    let url = format!("http://agent:word@0.0.0.0:{}", proxy.address.port());
    let of = |name: &str| name.ends_with("_PROXY") && name != "NO_PROXY";
    let proxies = Proxies::from_vars(|name| of(name).then(|| url.clone())).unwrap();
    let mut outcomes = Vec::new();
    for endpoint in ["http://sts.test", "https://sts.test"] {
        let endpoint = Some(endpoint.to_owned());
        let config = Config { endpoint, proxies: proxies.clone(), ..proxy.config() };
        outcomes.push(client(&config).await.issue(&identity(), &claimant()).await);
    }
    assert!(outcomes[0].is_ok(), "{outcomes:?}");
    let error = outcomes[1].as_ref().unwrap_err();
    assert_eq!(error.class, ErrorClass::Retryable);
    assert!(error.message.contains("STS can't be reached"), "{error}");
    let requests = proxy.requests();
    assert!(requests[0].starts_with("POST http://sts.test/ HTTP/1.1\r\n"), "{requests:?}");
    assert!(requests[1].starts_with("CONNECT sts.test:443 HTTP/1.1\r\n"), "{requests:?}");
    for request in requests {
        // agent:word
        let shown = request.to_lowercase().matches("proxy-authorization: basic ").count();
        assert!(shown == 1 && request.contains("Basic YWdlbnQ6d29yZA=="), "{request}");
    }
}

fn identity() -> RoleIdentity {
    let name = SessionName::sanitised("kiam-kiam");
    let external_id = Some("id:42/x".parse().unwrap());
    let plain = RoleIdentity::new(ROLE.parse().unwrap(), name, Duration::from_secs(3600));
    let tags = [("team", "a b"), ("kubernetes-namespace", "prod")];
    let tags = tags.map(|(key, value)| (key.to_owned(), value.to_owned()));
    RoleIdentity {
        external_id,
        tags: SessionTags::new(tags).unwrap(),
        source_identity: Some("prod.web-0".parse().unwrap()),
        policies: "arn:aws:iam::aws:policy/ReadOnlyAccess".parse().unwrap(),
        ..plain
    }
}

fn claimant() -> Claimant {
    Claimant::new("shop", "0f8fad5b-d9cb-469f-a165-70867728950e")
}

/// What `AssumeRole` makes of one scripted answer.
async fn outcome(reply: Reply) -> Result<Credentials, SourceError> {
    let server = Scripted::new([reply]).await;
    let result = server.client().await.issue(&identity(), &claimant()).await;
    assert_eq!(server.requests().len(), 1, "the SDK tried again by itself");
    result
}

fn assert_no_secret(text: &str) {
    for secret in [SECRET, SESSION_TOKEN, NODE_SECRET, NODE_TOKEN, "id:42"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[tokio::test]
async fn request_carries_the_whole_identity_and_answer_becomes_credentials() {
    let server = Scripted::new([reply(200, &success())]).await;
    let client = server.client().await;
    let credentials = client.issue(&identity(), &claimant()).await.unwrap();
    assert_eq!(credentials.role.as_ref(), ROLE);
    assert_eq!(credentials.access_key_id, "ASIAPOD");
    assert_eq!(credentials.secret_access_key.expose(), SECRET);
    assert_eq!(credentials.session_token.expose(), SESSION_TOKEN);
    let expires = humantime::parse_rfc3339("2036-01-01T00:00:00Z").unwrap();
    assert_eq!(credentials.expires, expires);

    let request = server.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST / HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("Credential=AKIANODE/") && head.contains("/eu-west-1/sts/"), "{head}");
    let mut fields: Vec<&str> = body.split('&').collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            "Action=AssumeRole",
            "DurationSeconds=3600",
            "ExternalId=id%3A42%2Fx",
            "PolicyArns.member.1.arn=arn%3Aaws%3Aiam%3A%3Aaws%3Apolicy%2FReadOnlyAccess",
            "RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fteam%2Freader",
            "RoleSessionName=kiam-kiam",
            "SourceIdentity=prod.web-0",
            "Tags.member.1.Key=kubernetes-namespace",
            "Tags.member.1.Value=prod",
            "Tags.member.2.Key=team",
            "Tags.member.2.Value=a%20b",
            "TransitiveTagKeys.member.1=kubernetes-namespace",
            "TransitiveTagKeys.member.2=team",
            "Version=2011-06-15",
        ]
    );
    assert_no_secret(&format!("{client:?} {credentials:?} {:?}", identity()));
}

#[tokio::test]
async fn errors_are_classed_by_what_can_be_done_about_them() {
    use ErrorClass::{Denied, Retryable, Throttled};
    let cases = [
        (403, "AccessDenied", Denied),
        (400, "MalformedPolicyDocument", Denied),
        (400, "PackedPolicyTooLarge", Denied),
        (403, "RegionDisabledException", Denied),
        (400, "ValidationError", Denied),
        (400, "Throttling", Throttled),
        (400, "ThrottlingException", Throttled),
        (503, "RequestLimitExceeded", Throttled),
        (429, "Whatever", Throttled),
        (403, "ExpiredToken", Retryable),
        (403, "ExpiredTokenException", Retryable),
        (400, "IDPCommunicationError", Retryable),
        (403, "InvalidClientTokenId", Retryable),
        (403, "SignatureDoesNotMatch", Retryable),
        (500, "InternalFailure", Retryable),
        (503, "ServiceUnavailable", Retryable),
        (400, "SomethingNew", Retryable),
    ];
    for (status, code, class) in cases {
        let error = outcome(reply(status, &failure(code, "told by AWS"))).await.unwrap_err();
        assert_eq!(error.class, class, "{status} {code}");
        assert!(error.message.contains(code), "{error}");
        assert!(error.message.contains("told by AWS"), "{error}");
    }
}

const TOO_LONG: &str =
    "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
const CHAINED_TOO_LONG: &str = "The requested DurationSeconds exceeds the 1 hour session limit for \
     roles assumed by role chaining.";

#[tokio::test]
async fn sessions_are_as_long_as_the_role_allows() {
    let refused = |message| reply(400, &failure("ValidationError", message));
    let long = RoleIdentity { duration: Duration::from_secs(43_200), ..identity() };
    let cases =
        [(TOO_LONG, vec!["43200", "28800", "14400"]), (CHAINED_TOO_LONG, vec!["43200", "3600"])];
    for (message, asked) in cases {
        let refusals = (1..asked.len()).map(|_| refused(message));
        let granted = (0..2).map(|_| reply(200, &success()));
        let server = Scripted::new(refusals.chain(granted)).await;
        let client = server.client().await;
        for refused in 1..asked.len() {
            let error = client.issue(&long, &claimant()).await.unwrap_err();
            assert_eq!(error.class, ErrorClass::TooLong, "{message}");
            assert_eq!(server.requests().len(), refused, "each call is asked for");
        }
        client.issue(&long, &claimant()).await.unwrap();
        assert_eq!(server.fields("DurationSeconds"), asked, "{message}");
        client.issue(&long, &claimant()).await.unwrap();
        assert_eq!(
            server.fields("DurationSeconds").last(),
            asked.last().map(|it| (*it).to_owned()).as_ref()
        );
        assert_eq!(server.requests().len(), asked.len() + 1, "{message}: it was not remembered");
    }
}

#[tokio::test]
async fn session_is_never_believed_to_last_longer_than_the_role_let_it_be_asked_for() {
    let refused = reply(400, &failure("ValidationError", TOO_LONG));
    let server = Scripted::new([refused, reply(200, &success())]).await;
    let long = RoleIdentity { duration: HOUR * 2, ..identity() };
    // To the node's clock, which is years slow, the session seems to last for years.
    let client = server.client().await;
    client.issue(&long, &claimant()).await.unwrap_err();
    let issued = client.issue(&long, &claimant()).await.unwrap();
    assert_eq!(issued.expires.duration_since(issued.issued).unwrap(), HOUR);

    let right = humantime::format_rfc3339_millis(Clock::system().now() + HOUR / 2);
    let arn = "arn:aws:sts::123456789012:assumed-role/reader/kiam-kiam";
    let body = success_body(arn, &right.to_string());
    let issued = outcome(reply(200, &body)).await.unwrap();
    assert!(issued.issued <= Clock::system().now(), "{:?}", issued.issued);
}

#[tokio::test]
async fn an_hour_that_is_too_long_names_the_flag() {
    for message in [TOO_LONG, CHAINED_TOO_LONG] {
        let error = outcome(reply(400, &failure("ValidationError", message))).await.unwrap_err();
        assert_eq!(error.class, ErrorClass::Denied);
        assert!(error.message.contains("--session-duration"), "{error}");
    }
}

#[tokio::test]
async fn denials_that_flags_have_to_do_with_name_them() {
    let not = |action| format!("User: x is not authorized to perform: {action} on resource: y");
    let cases = [
        ("AccessDenied", not("sts:TagSession"), "for --session-tags"),
        ("AccessDenied", not("sts:SetSourceIdentity"), "for --source-identity"),
        ("PackedPolicyTooLarge", "112% of the limit".to_owned(), "--session-tags"),
    ];
    for (code, message, hint) in cases {
        let error = outcome(reply(403, &failure(code, &message))).await.unwrap_err();
        assert!(error.class == ErrorClass::Denied && error.message.contains(hint), "{error}");
    }
    let plain = failure("AccessDenied", &not("sts:AssumeRole"));
    assert!(!outcome(reply(403, &plain)).await.unwrap_err().message.contains("--"));
}

fn hop_success() -> Reply {
    let arn = "arn:aws:sts::999999999999:assumed-role/kiam-hop/kiam-agent";
    reply(200, &success_body(arn, "2036-01-01T00:00:00Z").replace("ASIAPOD", "ASIAHOP"))
}

#[tokio::test]
async fn chained_sessions_are_asked_for_with_one_session_of_the_role_in_between() {
    let server =
        Scripted::new([hop_success(), reply(200, &success()), reply(200, &success())]).await;
    let client = server.chained().await;
    for _ in 0..2 {
        assert_eq!(client.issue(&identity(), &claimant()).await.unwrap().access_key_id, "ASIAPOD");
    }
    let signers = server.requests().into_iter().map(|request| {
        request
            .split("Credential=")
            .nth(1)
            .and_then(|rest| rest.split('/').next())
            .map(str::to_owned)
            .unwrap()
    });
    assert_eq!(signers.collect::<Vec<_>>(), ["AKIANODE", "ASIAHOP", "ASIAHOP"]);
    assert_eq!(server.fields("RoleSessionName"), ["kiam-agent", "kiam-kiam", "kiam-kiam"]);
    assert_eq!(server.fields("SourceIdentity"), ["", "prod.web-0", "prod.web-0"]);
}

#[tokio::test]
async fn errors_tell_which_of_two_roles_could_not_be_assumed() {
    use ErrorClass::{Denied, Retryable, Throttled};
    let denied = || reply(403, &failure("AccessDenied", "told by AWS"));
    let throttled = || reply(400, &failure("Throttling", "told by AWS"));
    let first = format!("--assume-role-arn {HOP}: STS: ");
    let second = format!("STS, called as {HOP}: ");
    let cases = [
        (vec![denied()], Retryable, &first),
        (vec![throttled()], Throttled, &first),
        (vec![reply(200, "")], Retryable, &format!("--assume-role-arn {HOP}: ")),
        (vec![hop_success(), denied()], Denied, &second),
        (vec![hop_success(), throttled()], Throttled, &second),
    ];
    for (replies, class, begin) in cases {
        let server = Scripted::new(replies).await;
        let error = server.chained().await.issue(&identity(), &claimant()).await.unwrap_err();
        assert_eq!(error.class, class, "{error}");
        assert!(error.message.starts_with(begin), "{begin}: {error}");
        assert_no_secret(&format!("{error:?}"));
    }
}

#[tokio::test]
async fn what_is_no_answer_is_retryable_and_shows_no_secret() {
    let whole = success();
    let truncated = &whole[..whole.find("<SessionToken>").unwrap()];
    let no_token = whole.replace(&format!("<SessionToken>{SESSION_TOKEN}</SessionToken>"), "");
    let no_credentials = "<AssumeRoleResponse><AssumeRoleResult/></AssumeRoleResponse>";
    let bad_date = whole.replace("2036-01-01T00:00:00Z", SESSION_TOKEN);
    let cases = [
        (200, ""),
        (200, "<html>captive portal</html>"),
        (200, "\u{0}\u{1}not xml"),
        (200, truncated),
        (200, &no_token),
        (200, no_credentials),
        (200, &bad_date),
        (400, "<html>a proxy's page</html>"),
        (403, ""),
        (502, "bad gateway"),
        (302, ""),
    ];
    for (status, body) in cases {
        let error = match outcome(reply(status, body)).await {
            Err(error) => error,
            // The SDK takes a missing field for an empty one, which the prefetcher refuses.
            Ok(credentials) => {
                assert!(credentials.session_token.expose().is_empty(), "{body}");
                continue;
            }
        };
        assert_eq!(error.class, ErrorClass::Retryable, "{status} {body:?}: {error}");
        assert_no_secret(&format!("{error} {error:?}"));
        assert!(!error.message.contains(['\n', '\r']) && error.message.len() < 600, "{error}");
    }
}

#[tokio::test]
async fn credentials_of_another_role_are_an_error() {
    let others = [
        "arn:aws:sts::123456789012:assumed-role/admin/kiam-kiam",
        "arn:aws:sts::999999999999:assumed-role/reader/kiam-kiam",
        "arn:aws:iam::123456789012:role/team/reader",
        "",
    ];
    for arn in others {
        let body = success_body(arn, "2036-01-01T00:00:00Z");
        let error = outcome(reply(200, &body)).await.unwrap_err();
        assert_eq!(error.class, ErrorClass::Retryable);
        assert!(error.message.contains("another role"), "{arn}: {error}");
    }
}

#[tokio::test]
async fn unreachable_sts_is_retryable() {
    let server = Scripted::new([]).await;
    let mut config = server.config();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    config.endpoint = Some(format!("http://{closed}"));
    let node = NodeCredentials::new("AKIANODE", NODE_SECRET, None, None, "test");
    let node = SharedCredentialsProvider::new(node);
    let client = AssumeRole::with_node(&config, Clock::system(), node).await;
    let error = client.issue(&identity(), &claimant()).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::Retryable);
    assert!(error.message.contains("STS can't be reached"), "{error}");
    assert_no_secret(&format!("{error:?}"));
}

#[tokio::test(start_paused = true)]
async fn silent_sts_is_given_up_at_the_deadline() {
    let server = Scripted::new([None]).await;
    let begun = tokio::time::Instant::now();
    let error = server.client().await.issue(&identity(), &claimant()).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::Retryable);
    assert!(begun.elapsed() <= CALL_DEADLINE + Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_no_secret(&format!("{error:?}"));
}

/// What the real IMDS answers in turn: a token, the profile's name, its credentials.
fn imds_replies() -> [Reply; 3] {
    let plain = |body: &str| {
        let length = body.len();
        Some(format!(
            "HTTP/1.1 200 OK\r\nx-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        ))
    };
    let credentials = format!(
        "{{\"Code\":\"Success\",\"Type\":\"AWS-HMAC\",\"AccessKeyId\":\"ASIAFROMIMDS\",\
         \"SecretAccessKey\":\"{NODE_SECRET}\",\"Token\":\"{NODE_TOKEN}\",\
         \"LastUpdated\":\"2026-01-01T00:00:00Z\",\"Expiration\":\"2036-01-01T00:00:00Z\"}}"
    );
    [plain("imds-token"), plain("node"), plain(&credentials)]
}

#[tokio::test]
async fn node_credentials_come_from_the_upstream_metadata_service() {
    let imds = Scripted::new(imds_replies()).await;
    let sts = Scripted::new([reply(200, &success())]).await;
    let config = Config { upstream: format!("http://{}", imds.address), ..sts.config() };
    // Nothing of the environment or the home of who runs the tests.
    let bare = ProviderConfig::empty().with_region(Some(Region::new("eu-west-1")));
    let node = node::credentials(&config, bare.with_http_client(http::direct())).await.unwrap();
    let client = AssumeRole::with_node(&config, Clock::system(), node).await;
    client.issue(&identity(), &claimant()).await.unwrap();
    assert!(sts.requests()[0].contains("Credential=ASIAFROMIMDS/"), "{:?}", sts.requests());
    assert!(imds.requests()[1].contains("x-aws-ec2-metadata-token: imds-token"));
}

#[tokio::test]
async fn missing_node_credentials_are_retryable_and_say_so() {
    let sts = Scripted::new([]).await;
    let unauthorised = || Some("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_owned());
    let imds = Scripted::new((0..8).map(|_| unauthorised())).await;
    let config = Config { upstream: format!("http://{}", imds.address), ..sts.config() };
    let bare = ProviderConfig::empty().with_region(Some(Region::new("eu-west-1")));
    let node = node::credentials(&config, bare.with_http_client(http::direct())).await.unwrap();
    let client = AssumeRole::with_node(&config, Clock::system(), node).await;
    let error = client.issue(&identity(), &claimant()).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::Retryable);
    assert!(error.message.contains("the node's own credentials"), "{error}");
    assert!(sts.requests().is_empty());
}

#[tokio::test]
async fn expired_node_credentials_are_read_again_soon_though_the_sdk_takes_them_for_good() {
    let bare = ProviderConfig::empty().with_region(Some(Region::new("eu-west-1")));
    let in_an_hour = humantime::format_rfc3339_seconds(Clock::system().now() + HOUR).to_string();
    for (expires, soon) in [("2020-01-01T00:00:00Z", true), (&in_an_hour, false)] {
        let replies = imds_replies()
            .map(|reply| Some(reply.unwrap().replace("2036-01-01T00:00:00Z", expires)));
        let imds = Scripted::new(replies).await;
        let upstream = format!("http://{}", imds.address);
        let config = Config { upstream, ..Scripted::new([]).await.config() };
        let node = node::credentials(&config, bare.clone().with_http_client(http::direct()))
            .await
            .unwrap();
        let credentials = node.provide_credentials().await.unwrap();
        assert_eq!(credentials.access_key_id(), "ASIAFROMIMDS");
        let left = credentials.expiry().unwrap().duration_since(Clock::system().now()).unwrap();
        assert_eq!(left <= Duration::from_secs(15), soon, "{expires}: {left:?}");
    }
}

/// Keeps where it is asked to connect, and does not.
#[derive(Clone, Debug, Default)]
struct Unconnected(Arc<Mutex<Vec<String>>>);

impl HttpConnector for Unconnected {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        self.0.lock().unwrap().push(request.uri().to_owned());
        HttpConnectorFuture::ready(Err(ConnectorError::io("not connected".into())))
    }
}

/// Where a call goes, of an agent that the environment tells to use such endpoints.
async fn endpoint(region: &str, given: Option<&str>, (fips, dual_stack): (bool, bool)) -> String {
    let config = Config {
        region: region.to_owned(),
        endpoint: given.map(str::to_owned),
        through: None,
        upstream: "http://127.0.0.1:9".to_owned(),
        proxies: Proxies::default(),
    };
    let asked = Unconnected::default();
    let connector: SharedHttpConnector = asked.clone().into_shared();
    let node = NodeCredentials::new("AKIANODE", NODE_SECRET, None, None, "test");
    let loader = aws_config::defaults(BehaviorVersion::latest())
        .empty_test_environment()
        .credentials_provider(node)
        .http_client(http_client_fn(move |_, _| connector.clone()))
        .use_fips(fips)
        .use_dual_stack(dual_stack);
    let client = Client::from_conf(settings(&config, loader).await.build());
    let asker = StsClient { client, clock: Clock::system(), through: None };
    asker.ask(&identity(), CHAINED).await.unwrap_err();
    asked.0.lock().unwrap().join(" ")
}

#[tokio::test]
async fn every_region_has_its_own_sts_in_its_partition() {
    let (plain, fips, dual) = ((false, false), (true, false), (false, true));
    let cases = [
        ("eu-west-1", "aws", plain, "sts.eu-west-1.amazonaws.com"),
        ("us-east-1", "aws", plain, "sts.us-east-1.amazonaws.com"),
        ("ap-southeast-99", "aws", plain, "sts.ap-southeast-99.amazonaws.com"),
        ("cn-north-1", "aws-cn", plain, "sts.cn-north-1.amazonaws.com.cn"),
        ("us-gov-west-1", "aws-us-gov", plain, "sts.us-gov-west-1.amazonaws.com"),
        ("us-iso-east-1", "aws-iso", plain, "sts.us-iso-east-1.c2s.ic.gov"),
        ("us-isob-east-1", "aws-iso-b", plain, "sts.us-isob-east-1.sc2s.sgov.gov"),
        ("eu-isoe-west-1", "aws-iso-e", plain, "sts.eu-isoe-west-1.cloud.adc-e.uk"),
        ("us-isof-south-1", "aws-iso-f", plain, "sts.us-isof-south-1.csp.hci.ic.gov"),
        ("eusc-de-east-1", "aws-eusc", plain, "sts.eusc-de-east-1.amazonaws.eu"),
        ("us-east-2", "aws", fips, "sts-fips.us-east-2.amazonaws.com"),
        ("us-gov-east-1", "aws-us-gov", fips, "sts.us-gov-east-1.amazonaws.com"),
        ("eu-west-1", "aws", dual, "sts.eu-west-1.api.aws"),
        ("cn-north-1", "aws-cn", dual, "sts.cn-north-1.api.amazonwebservices.com.cn"),
    ];
    for (region, its, endpoints, host) in cases {
        assert_eq!(endpoint(region, None, endpoints).await, format!("https://{host}/"));
        assert_eq!(partition(region), its, "{region}");
    }
    let given = Some("http://127.0.0.1:9");
    assert_eq!(endpoint("eu-west-1", given, (true, true)).await, "http://127.0.0.1:9/");
}

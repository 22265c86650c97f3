//! The fake STS, asked over real HTTP.

use std::net::TcpStream;

use serde_json::json;

use super::*;
use crate::{
    fake::web_token,
    pod_client::wire::{Reply, exchange},
};

const NODE: &str = "AKIANODE";
const ROLE: &str = "arn:aws:iam::123456789012:role/team/reader";

fn server() -> Sts {
    Sts::start(Place::loopback(), NODE).unwrap()
}

fn post(sts: &Sts, headers: &str, fields: &str) -> std::io::Result<Reply> {
    let body = format!(
        "Version=2011-06-15&RoleSessionName=kiam&RoleArn={}&{fields}",
        ROLE.replace(':', "%3A").replace('/', "%2F")
    );
    let request = format!(
        "POST / HTTP/1.1\r\nHost: sts\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(sts.server.address())?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    exchange(&mut stream, &request)
}

fn signed(caller: &str) -> String {
    format!(
        "Authorization: AWS4-HMAC-SHA256 Credential={caller}/20260101/eu-west-1/sts/aws4_request, \
         SignedHeaders=host, Signature=0\r\nX-Amz-Security-Token: token-of-{caller}\r\n"
    )
}

fn ask(sts: &Sts, caller: &str, further: &str) -> Reply {
    post(sts, &signed(caller), &format!("Action=AssumeRole&{further}")).unwrap()
}

fn with_token(sts: &Sts, token: &str) -> Reply {
    post(sts, "", &format!("Action=AssumeRoleWithWebIdentity&WebIdentityToken={token}")).unwrap()
}

#[track_caller]
fn assert_refused(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.status, status, "{}", reply.body);
    assert!(reply.body.contains(&format!("<Code>{code}<")), "{}", reply.body);
}

#[test]
fn each_issue_has_its_own_key_and_is_on_record() {
    let sts = server();
    let fields = "ExternalId=x1&DurationSeconds=900&Tags.member.1.Key=a&Tags.member.1.Value=b";
    let bodies = [ask(&sts, NODE, fields).body, ask(&sts, NODE, fields).body];
    let issued = sts.issued();
    assert_eq!((issued.len(), sts.requests_for(ROLE)), (2, 2));
    for (body, issued) in bodies.iter().zip(&issued) {
        assert!(body.contains(&format!("<AccessKeyId>{}<", issued.access_key)), "{body}");
        assert!(body.contains(":assumed-role/reader/kiam<"), "{body}");
        assert_eq!(sts.owner(&issued.access_key).unwrap().role, ROLE);
        assert_eq!(issued.external_id.as_deref(), Some("x1"));
        assert_eq!(issued.duration, Duration::from_secs(900));
        assert_eq!(issued.fields["Tags.member.1.Value"], "b");
    }
    assert_ne!(issued[0].access_key, issued[1].access_key);
    let key = ("AssumeRole".to_owned(), ROLE.to_owned());
    assert_eq!(sts.counts(), BTreeMap::from([(key, 2)]));
}

#[test]
fn strangers_and_nonsense_get_errors_and_no_credentials() {
    let sts = server();
    sts.set_longest_session(ROLE, Duration::from_secs(7200));
    assert_refused(&ask(&sts, "AKIAOTHER", ""), 403, "InvalidClientTokenId");
    for fields in [
        "DurationSeconds=899",
        "DurationSeconds=7201",
        "ExternalId=x",
        "SourceIdentity=a%20b",
        "RoleSessionName=%2F%2F",
    ] {
        assert_refused(&ask(&sts, NODE, fields), 400, "ValidationError");
    }
    assert!(sts.issued().is_empty());
    assert_eq!(sts.requests(), 6);
}

#[test]
fn a_session_asks_for_an_hour_at_most_and_only_with_its_own_token() {
    let sts = server();
    ask(&sts, NODE, "");
    let first = sts.issued()[0].access_key.clone();
    assert_eq!(ask(&sts, &first, "DurationSeconds=3600").status, 200);
    assert_eq!(sts.issued()[1].caller, first);
    assert_refused(&ask(&sts, &first, "DurationSeconds=3601"), 400, "ValidationError");
    let stolen = signed(&first).replace("token-of", "token-like");
    assert_refused(&post(&sts, &stolen, "Action=AssumeRole").unwrap(), 403, "InvalidClientTokenId");
}

#[test]
fn web_identity_tokens_are_checked_and_their_subject_is_the_caller() {
    let sts = server();
    let token = |audience: &str, lives: i64| {
        let expires = Timestamp::now().as_second() + lives;
        let subject = "system:serviceaccount:shop:orders";
        web_token::sign(&json!({ "aud": [audience], "exp": expires, "sub": subject }))
    };
    let good = token("sts.amazonaws.com", 60);
    let body = with_token(&sts, &good).body;
    assert!(body.contains("<AssumeRoleWithWebIdentityResult>"), "{body}");
    let issued = sts.issued().remove(0);
    assert_eq!(issued.caller, "system:serviceaccount:shop:orders");
    assert_refused(&with_token(&sts, &token("other", 60)), 400, "InvalidIdentityToken");
    assert_refused(&with_token(&sts, &format!("{good}x")), 400, "InvalidIdentityToken");
    assert_refused(
        &with_token(&sts, &token("sts.amazonaws.com", -1)),
        400,
        "ExpiredTokenException",
    );
    sts.trust(ROLE, "system:serviceaccount:shop:other");
    assert_refused(&with_token(&sts, &good), 403, "AccessDenied");
    sts.trust(ROLE, "system:serviceaccount:shop:orders");
    assert_eq!(with_token(&sts, &good).status, 200);
    assert_eq!(sts.issued().len(), 2);
    // Another issuer's tokens count in place of the lab's, and are checked like them.
    let other = |audience: &str| json!({ "aud": [audience], "exp": i64::MAX, "sub": "system:serviceaccount:shop:other" });
    let (fine, wrong) = (other("sts.amazonaws.com"), other("another"));
    sts.set_issuer(move |token| match token {
        "fine" => Some(fine.clone()),
        "wrong" => Some(wrong.clone()),
        _ => None,
    });
    assert_refused(&with_token(&sts, &good), 400, "InvalidIdentityToken");
    assert_refused(&with_token(&sts, "wrong"), 400, "InvalidIdentityToken");
    assert_eq!(with_token(&sts, "fine").status, 200);
    assert_eq!(sts.issued()[2].caller, "system:serviceaccount:shop:other");
}

#[test]
fn faults_meet_what_they_match_in_turn_and_as_often_as_said() {
    let sts = server();
    let faults = sts.faults();
    let throttled = faults.inject(Injected::refuse(400, "Throttling").times(2));
    let denied = faults.inject(Injected::refuse(403, "AccessDenied").field("ExternalId", "x1"));
    faults.inject(Injected::refuse(500, "Other").field("RoleArn", "another"));
    for _ in 0..2 {
        assert_refused(&ask(&sts, NODE, ""), 400, "Throttling");
    }
    assert_refused(&ask(&sts, NODE, "ExternalId=x1"), 403, "AccessDenied");
    assert_eq!(ask(&sts, NODE, "").status, 200);
    assert_eq!((throttled.met(), denied.met()), (2, 1));
    denied.lift();
    assert_eq!(ask(&sts, NODE, "ExternalId=x1").status, 200);
    faults.inject(Injected::refuse(500, "Other"));
    faults.lift();
    assert_eq!(ask(&sts, NODE, "").status, 200);
    assert_eq!((sts.requests(), sts.issued().len()), (6, 3));
}

#[test]
fn answers_are_changed_cut_and_late() {
    let sts = server();
    let once = |injected: Injected| {
        sts.faults().inject(injected.times(1));
        post(&sts, &signed(NODE), "Action=AssumeRole")
    };
    let body = once(Injected::without("SessionToken")).unwrap().body;
    assert!(body.contains("<SecretAccessKey>") && !body.contains("SessionToken"), "{body}");
    let other = "arn:aws:sts::1:assumed-role/other/s";
    let body = once(Injected::for_session(other)).unwrap().body;
    assert!(body.contains(&format!("<Arn>{other}</Arn>")), "{body}");
    let body = once(Injected::expired()).unwrap().body;
    let expires = body.split_once("<Expiration>").unwrap().1.split_once('<').unwrap().0;
    assert!(expires.parse::<Timestamp>().unwrap() < Timestamp::now(), "{expires}");
    assert_eq!(once(Injected::body(200, "\0garbage")).unwrap().body, "\0garbage");
    let error = once(Injected::cut()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    let begun = tokio::time::Instant::now();
    let latency = Duration::from_millis(200);
    assert_eq!(once(Injected::slow(latency)).unwrap().status, 200);
    assert!(begun.elapsed() >= latency);
}

#[test]
fn what_hangs_is_answered_when_the_fault_is_lifted() {
    let sts = server();
    let fault = sts.faults().inject(Injected::hang());
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(&sts, NODE, ""));
        while fault.met() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(sts.issued().is_empty() && !asking.is_finished());
        fault.lift();
        assert_eq!(asking.join().unwrap().status, 200);
    });
}

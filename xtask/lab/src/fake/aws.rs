//! The services of AWS that programs call once they have credentials. It takes whatever is signed, by every action that a
//! program begins with, and keeps by whom it was signed: that, and not what the program says, is who the program was.
//!
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>

use std::{
    fmt::Write,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use hmac::{Hmac, KeyInit, Mac};
use http::{Method, Response, StatusCode, header::AUTHORIZATION};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::{
    fault::{Call, form_fields},
    http::{Answer, Body, Place, Server, full},
    imds::{ACCOUNT, REGION},
    sts::{secret_of, token_of},
};

/// The only bucket.
pub const BUCKET: &str = "lab-bucket";

/// One signed request.
#[derive(Clone, Debug)]
pub struct Signed {
    /// Who sent it.
    pub from: IpAddr,
    /// When it had come.
    pub at: Instant,
    /// The access key that it names.
    pub access_key: String,
    /// The region that it is signed for; signatures of version 2 name none.
    pub region: Option<String>,
    /// Why the signature or the session token is not that key's, if so.
    pub fault: Option<String>,
}

/// The server.
#[derive(Debug)]
pub struct Aws {
    server: Server<Service>,
    signed: Arc<Mutex<Vec<Signed>>>,
}

#[derive(Debug)]
struct Service(Arc<Mutex<Vec<Signed>>>);

// === impl Aws ===

impl Aws {
    /// Starts it.
    pub fn start(place: Place) -> Result<Self> {
        let signed = Arc::default();
        let server = Server::start(vec![place], Arc::new(Service(Arc::clone(&signed))))?;
        Ok(Self { server, signed })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The signed requests so far, oldest first.
    #[must_use]
    pub fn signed(&self) -> Vec<Signed> {
        lock(&self.signed).clone()
    }
}

fn lock(signed: &Mutex<Vec<Signed>>) -> MutexGuard<'_, Vec<Signed>> {
    signed.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Service ===

impl Answer for Service {
    fn note(&self, peer: SocketAddr, call: &Call) {
        let Some(signature) = Signature::of(call) else { return };
        lock(&self.0).push(Signed {
            from: peer.ip().to_canonical(),
            at: Instant::now(),
            access_key: signature.access_key.to_owned(),
            region: signature.scope.map(|scope| scope.region.to_owned()),
            fault: signature.fault(call),
        });
    }

    fn answer(&self, call: &Call) -> Response<Body> {
        if Signature::of(call).is_none() {
            return self.refusal(StatusCode::FORBIDDEN, "AccessDenied");
        }
        match call.fields.get("Action").map(String::as_str) {
            Some("GetCallerIdentity") => xml(&caller_identity()),
            Some(action) => {
                xml(&format!("<{action}Response><requestId>lab</requestId></{action}Response>"))
            }
            None => object(call),
        }
    }

    fn refusal(&self, status: StatusCode, code: &str) -> Response<Body> {
        full(status, "application/xml", format!("<Error><Code>{code}</Code></Error>"))
    }
}

/// What S3 says of its only bucket, which is empty.
fn object(call: &Call) -> Response<Body> {
    let path = call.path.trim_matches('/');
    match call.method {
        _ if path.is_empty() => xml(&format!(
            "<ListAllMyBucketsResult><Owner><ID>lab</ID></Owner><Buckets><Bucket><Name>{BUCKET}</Name>\
             <CreationDate>2026-01-01T00:00:00.000Z</CreationDate></Bucket></Buckets></ListAllMyBucketsResult>"
        )),
        Method::GET if call.fields.contains_key("location") => xml(&format!(
            "<LocationConstraint xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{REGION}</LocationConstraint>"
        )),
        Method::GET if path == BUCKET => xml(&format!(
            "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>{BUCKET}</Name>\
             <Prefix></Prefix><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>\
             </ListBucketResult>"
        )),
        Method::HEAD if path == BUCKET => xml(""),
        _ => {
            full(StatusCode::NOT_FOUND, "application/xml", "<Error><Code>NoSuchKey</Code></Error>")
        }
    }
}

fn caller_identity() -> String {
    format!(
        "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult>\
         <Arn>arn:aws:sts::{ACCOUNT}:assumed-role/lab/lab</Arn><UserId>AROALAB:lab</UserId>\
         <Account>{ACCOUNT}</Account></GetCallerIdentityResult><ResponseMetadata><RequestId>lab</RequestId>\
         </ResponseMetadata></GetCallerIdentityResponse>"
    )
}

fn xml(body: &str) -> Response<Body> {
    full(StatusCode::OK, "text/xml", body.to_owned())
}

/// What the `Authorization` header says.
struct Signature<'a> {
    access_key: &'a str,
    /// Absent in version 2, which old programs use for S3.
    scope: Option<Scope<'a>>,
}

/// The parts of a version 4 signature.
#[derive(Clone, Copy)]
struct Scope<'a> {
    date: &'a str,
    region: &'a str,
    service: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

// === impl Signature ===

impl<'a> Signature<'a> {
    fn of(call: &'a Call) -> Option<Self> {
        let header = call.header(AUTHORIZATION)?;
        if let Some(version_2) = header.strip_prefix("AWS ") {
            let (access_key, _) = version_2.split_once(':')?;
            return Some(Self { access_key, scope: None });
        }
        let field = |name: &str| {
            let (_, rest) = header.split_once(name)?;
            Some(rest.split([',', ' ']).next().unwrap_or(rest))
        };
        let mut credential = field("Credential=")?.split('/');
        let mut next = || credential.next();
        let (access_key, date, region, service) = (next()?, next()?, next()?, next()?);
        let (signed_headers, signature) = (field("SignedHeaders=")?, field("Signature=")?);
        let scope = Scope { date, region, service, signed_headers, signature };
        Some(Self { access_key, scope: Some(scope) })
    }

    /// What is wrong with it, as AWS would see it. Of version 2 only the token is looked at.
    fn fault(&self, call: &Call) -> Option<String> {
        let token = call.header("x-amz-security-token");
        if token != Some(&token_of(self.access_key)) {
            return Some(format!("its session token is {token:?}"));
        }
        let scope = self.scope?;
        let computed = scope.computed(call, &secret_of(self.access_key));
        (computed != scope.signature).then(|| {
            format!("it is signed {}, and would be {computed} with its own secret", scope.signature)
        })
    }
}

// === impl Scope ===

impl Scope<'_> {
    fn computed(self, call: &Call, secret: &str) -> String {
        let Self { date, region, service, .. } = self;
        let time = call.header("x-amz-date").unwrap_or_default();
        let text = format!(
            "AWS4-HMAC-SHA256\n{time}\n{date}/{region}/{service}/aws4_request\n{}",
            hex(&Sha256::digest(self.canonical(call)))
        );
        let key = [date, region, service, "aws4_request"]
            .iter()
            .fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
        hex(&mac(&key, &text))
    }

    /// The request as it is signed. Paths here have nothing that needs an escape.
    fn canonical(self, call: &Call) -> String {
        let query: Vec<String> = form_fields(call.query.as_bytes())
            .iter()
            .map(|(name, value)| format!("{}={}", escaped(name), escaped(value)))
            .collect();
        let mut headers = String::new();
        for name in self.signed_headers.split(';') {
            let values: Vec<&str> =
                call.headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
            let words = values.join(",");
            let words: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
            // Writing to a string can't fail.
            let _ = writeln!(headers, "{name}:{}", words.join(" "));
        }
        let payload = call
            .header("x-amz-content-sha256")
            .map_or_else(|| hex(&Sha256::digest(&call.body)), str::to_owned);
        format!(
            "{}\n{}\n{}\n{headers}\n{}\n{payload}",
            call.method,
            call.path,
            query.join("&"),
            self.signed_headers
        )
    }
}

/// As a signature wants it, however it was sent.
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |text, byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            text + &char::from(byte).to_string()
        }
        _ => format!("{text}%{byte:02X}"),
    })
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::Request;

    use super::*;

    const SIGNED: &str = "host;x-amz-date;x-amz-security-token";

    /// A request as an SDK sends it, signed with `secret`.
    fn call(secret: &str, token: &str) -> Call {
        let unsigned = |signature: &str| {
            let authorization = format!(
                "AWS4-HMAC-SHA256 Credential=ASIA1/20260101/eu-west-1/s3/aws4_request, \
                 SignedHeaders={SIGNED}, Signature={signature}"
            );
            let request = Request::get("/lab-bucket?prefix=&list-type=2&delimiter=/")
                .header("host", "10.77.255.254:1")
                .header("x-amz-date", "20260101T000000Z")
                .header("x-amz-security-token", token)
                .header("authorization", authorization);
            Call::new(request.body(Bytes::new()).unwrap())
        };
        let first = unsigned("none");
        let computed = Signature::of(&first).unwrap().scope.unwrap().computed(&first, secret);
        unsigned(&computed)
    }

    #[test]
    fn only_the_keys_own_secret_and_token_pass() {
        let (secret, token) = (secret_of("ASIA1"), token_of("ASIA1"));
        let fault = |call: &Call| Signature::of(call).unwrap().fault(call);
        assert_eq!(fault(&call(&secret, &token)), None);
        assert!(fault(&call("another", &token)).unwrap().contains("with its own secret"));
        assert!(fault(&call(&secret, "another")).unwrap().contains("session token"));
    }

    /// The example of AWS's own documentation of signatures of version 4.
    #[test]
    fn signatures_are_those_of_awss_own_example() {
        let request = Request::get("/?Action=ListUsers&Version=2010-05-08")
            .header("content-type", "application/x-www-form-urlencoded; charset=utf-8")
            .header("host", "iam.amazonaws.com")
            .header("x-amz-date", "20150830T123600Z");
        let call = Call::new(request.body(Bytes::new()).unwrap());
        let scope = Scope {
            date: "20150830",
            region: "us-east-1",
            service: "iam",
            signed_headers: "content-type;host;x-amz-date",
            signature: "",
        };
        assert_eq!(
            scope.computed(&call, "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
        );
    }
}

//! `AssumeRoleWithWebIdentity`.

use super::*;
use kiam_core::{credentials::PodTokens, role::AccountName, secret::Secret};

const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.TOKEN-OF-THE-POD.c2ln";

/// Gives every pod the same token, or none; keeps who asked.
#[derive(Default)]
struct Tokens {
    refused: Option<ErrorClass>,
    asked: Mutex<Vec<(AccountName, Claimant)>>,
}

impl PodTokens for Tokens {
    fn token<'a>(
        &'a self,
        account: &'a AccountName,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Secret, SourceError>> {
        self.asked.lock().unwrap().push((account.clone(), claimant.clone()));
        let result = match self.refused {
            None => Ok(Secret::new(TOKEN)),
            Some(class) => Err(SourceError::new(class, "no token")),
        };
        Box::pin(async { result })
    }
}

fn identity() -> RoleIdentity {
    let name = SessionName::sanitised("kiam-kiam");
    let plain = RoleIdentity::new(ROLE.parse().unwrap(), name, Duration::from_secs(3600));
    let policies = "arn:aws:iam::aws:policy/ReadOnlyAccess".parse().unwrap();
    let service_account = Some(AccountName::new("shop", "orders"));
    let policies = kiam_core::role::SessionPolicies::new([policies]).unwrap();
    RoleIdentity { service_account, policies, ..plain }
}

async fn source(server: &Scripted, tokens: Tokens) -> (WebIdentity, Arc<Tokens>) {
    let tokens = Arc::new(tokens);
    let source = WebIdentity::new(&server.config(), Clock::system(), tokens.clone()).await;
    (source, tokens)
}

/// What the source makes of one scripted answer.
async fn outcome(reply: Reply) -> Result<Credentials, SourceError> {
    let server = Scripted::new([reply]).await;
    let (source, _) = source(&server, Tokens::default()).await;
    let result = source.issue(&identity(), &claimant()).await;
    assert_eq!(server.requests().len(), 1, "the SDK tried again by itself");
    result
}

fn answer() -> String {
    success().replace("AssumeRole", "AssumeRoleWithWebIdentity")
}

fn assert_no_token(text: &str) {
    assert_no_secret(text);
    assert!(!text.contains("TOKEN-OF-THE-POD"), "the pod's token in {text}");
}

#[tokio::test]
async fn request_carries_the_pods_token_and_nobody_signs_it() {
    let server = Scripted::new([reply(200, &answer())]).await;
    let (source, tokens) = source(&server, Tokens::default()).await;
    let credentials = source.issue(&identity(), &claimant()).await.unwrap();
    assert_eq!(credentials.role.as_ref(), ROLE);
    assert_eq!(credentials.session_token.expose(), SESSION_TOKEN);
    let asked = tokens.asked.lock().unwrap().clone();
    assert_eq!(asked, [(AccountName::new("shop", "orders"), claimant())]);

    let request = server.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(!head.to_lowercase().contains("authorization"), "{head}");
    let mut fields: Vec<&str> = body.split('&').collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            "Action=AssumeRoleWithWebIdentity",
            "DurationSeconds=3600",
            "PolicyArns.member.1.arn=arn%3Aaws%3Aiam%3A%3Aaws%3Apolicy%2FReadOnlyAccess",
            "RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fteam%2Freader",
            "RoleSessionName=kiam-kiam",
            "Version=2011-06-15",
            &format!("WebIdentityToken={TOKEN}"),
        ]
    );
    assert_no_token(&format!("{source:?} {credentials:?} {:?}", identity()));
}

#[tokio::test]
async fn errors_say_what_has_to_be_changed_in_iam() {
    use ErrorClass::{Denied, Retryable, Throttled};
    let not_authorised = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
    let no_provider = "No OpenIDConnect provider found in your account for https://issuer.example";
    let cases = [
        (403, "AccessDenied", not_authorised, Denied, "system:serviceaccount:shop:orders"),
        (
            400,
            "InvalidIdentityToken",
            no_provider,
            Denied,
            "account 123456789012 needs an IAM OIDC",
        ),
        (
            400,
            "InvalidIdentityToken",
            "Incorrect token audience",
            Denied,
            "client ID sts.amazonaws",
        ),
        (400, "InvalidIdentityToken", "Couldn't retrieve verification key", Retryable, "Couldn't"),
        (400, "ExpiredTokenException", "Token expired", Retryable, "Token expired"),
        (403, "IDPRejectedClaim", "The claim is revoked", Denied, "revoked"),
        (400, "IDPCommunicationError", "Error communicating with IDP", Retryable, "with IDP"),
        (400, "Throttling", "Rate exceeded", Throttled, "Rate exceeded"),
        (503, "ServiceUnavailable", "again", Retryable, "again"),
    ];
    for (status, code, message, class, told) in cases {
        let error = outcome(reply(status, &failure(code, message))).await.unwrap_err();
        assert_eq!(error.class, class, "{status} {code} {message}");
        assert!(error.message.contains(code) && error.message.contains(told), "{error}");
        assert_no_token(&format!("{error:?}"));
    }
}

#[tokio::test]
async fn credentials_of_another_role_are_an_error() {
    let other = "arn:aws:sts::123456789012:assumed-role/admin/kiam-kiam";
    let body = success_body(other, "2036-01-01T00:00:00Z");
    let body = body.replace("AssumeRole", "AssumeRoleWithWebIdentity");
    let error = outcome(reply(200, &body)).await.unwrap_err();
    assert!(error.message.contains("another role"), "{error}");
    let garbage = outcome(reply(200, "<html>captive portal</html>")).await.unwrap_err();
    assert_eq!(garbage.class, ErrorClass::Retryable);
    assert_no_token(&format!("{garbage:?}"));
}

#[tokio::test]
async fn sessions_are_as_long_as_the_role_allows_each_for_a_token_of_its_own() {
    let message = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
    let refused = reply(400, &failure("ValidationError", message));
    let server = Scripted::new([refused, reply(200, &answer())]).await;
    let (source, tokens) = source(&server, Tokens::default()).await;
    let long = RoleIdentity { duration: Duration::from_secs(7200), ..identity() };
    let error = source.issue(&long, &claimant()).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::TooLong);
    source.issue(&long, &claimant()).await.unwrap();
    let requests = server.requests();
    let asked: Vec<bool> = ["7200", "3600"]
        .iter()
        .zip(&requests)
        .map(|(seconds, request)| request.contains(&format!("DurationSeconds={seconds}")))
        .collect();
    assert_eq!((asked, tokens.asked.lock().unwrap().len()), (vec![true, true], 2));
}

#[tokio::test]
async fn without_a_token_sts_is_not_asked() {
    let server = Scripted::new([]).await;
    for class in [ErrorClass::Denied, ErrorClass::Retryable, ErrorClass::Throttled] {
        let refusing = Tokens { refused: Some(class), ..Tokens::default() };
        let (source, _) = source(&server, refusing).await;
        let error = source.issue(&identity(), &claimant()).await.unwrap_err();
        assert_eq!(error.class, class);
    }
    let (source, tokens) = source(&server, Tokens::default()).await;
    let nobodys = RoleIdentity { service_account: None, ..identity() };
    assert!(source.issue(&nobodys, &claimant()).await.is_err());
    assert!(tokens.asked.lock().unwrap().is_empty() && server.requests().is_empty());
}

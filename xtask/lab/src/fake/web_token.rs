//! Tokens of ServiceAccounts as the fake API server signs them and the fake STS reads them: JWTs, signed (HS256)
//! with a key that both of them have here, where a real issuer publishes a public one.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

pub(super) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const KEY: &[u8] = b"the lab's issuer and nobody else";

/// A token with these claims.
pub(super) fn sign(claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({ "alg": "HS256", "kid": "lab" })), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(mac(&signed).finalize().into_bytes());
    format!("{signed}.{signature}")
}

/// The claims of `token`; none when it was not signed here.
pub(super) fn claims(token: &str) -> Option<Value> {
    let (signed, signature) = token.rsplit_once('.')?;
    mac(signed).verify_slice(&URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
    let (_, claims) = signed.split_once('.')?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
}

fn mac(signed: &str) -> Hmac<Sha256> {
    let mac = Hmac::<Sha256>::new_from_slice(KEY).expect("HMAC takes a key of any length");
    mac.chain_update(signed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_here_has_claims() {
        let token = sign(&json!({ "sub": "system:serviceaccount:shop:default" }));
        assert_eq!(claims(&token).unwrap()["sub"], "system:serviceaccount:shop:default");
        let (head, rest) = token.split_once('.').unwrap();
        let (_, signature) = rest.split_once('.').unwrap();
        let other = URL_SAFE_NO_PAD.encode("{\"sub\":\"system:serviceaccount:kube-system:admin\"}");
        for forged in [format!("{head}.{other}.{signature}"), format!("{token}A"), "a.b".to_owned()]
        {
            assert_eq!(claims(&forged), None, "{forged}");
        }
    }
}

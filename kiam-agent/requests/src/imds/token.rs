//! IMDSv2 session tokens.
//!
//! Some SDKs keep a token for six hours and do not renew it when it is rejected, so a token must survive restarts and
//! upgrades of the agent. So only the key that signs tokens is kept. A token has its expiry, and a MAC over the expiry and
//! the client that it was issued to. Another pod's token is rejected.

use std::{
    io,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use rustix::time::{ClockId, clock_gettime};
use sha2::Sha256;
use tokio::time::Instant;

use super::key;
pub use super::key::KeyError;
use kiam_core::pods::Client;

/// The header with a token's lifetime in seconds, in the request and the answer.
pub const X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS: &str = "x-aws-ec2-metadata-token-ttl-seconds";
/// The header with a token.
pub const X_AWS_EC2_METADATA_TOKEN: &str = "x-aws-ec2-metadata-token";
/// The longest lifetime of a token, in seconds.
pub const MAX_TOKEN_TTL: u32 = 21_600;

/// The first byte of a token: the version of its format.
const FORM: u8 = 1;
const EXPIRY_BYTES: usize = 8;
const MAC_BYTES: usize = 32;
/// The length of a token's text.
const TEXT_BYTES: usize = (1 + EXPIRY_BYTES + MAC_BYTES) * 4 / 3 + 1;

/// The requested lifetime of a token: 1 to 21,600 seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenTtl(u32);

/// The issuer and verifier of tokens.
#[derive(Clone)]
pub struct TokenAuthority {
    mac: Hmac<Sha256>,
    uptime: Uptime,
}

/// The last token that was found authentic on one connection, so that its MAC is computed once for all requests of the
/// connection. It is for one client alone.
#[derive(Default)]
pub struct VerifiedToken(Mutex<Option<([u8; TEXT_BYTES], u64)>>);

/// The time since the machine started, which is independent of the wall clock and of restarts of the agent.
#[derive(Clone, Debug)]
enum Uptime {
    /// `CLOCK_BOOTTIME`, see clock_gettime(2).
    Boot,
    /// Tokio's time, which may be paused.
    #[cfg_attr(not(test), expect(dead_code, reason = "made by tests"))]
    Simulated(Instant),
}

// === impl TokenTtl ===

impl TokenTtl {
    /// Parses the lifetime in a header's value, which must be digits alone.
    #[must_use]
    pub fn parse(value: &[u8]) -> Option<Self> {
        if !value.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let seconds = std::str::from_utf8(value).ok()?.parse().ok()?;
        (1..=MAX_TOKEN_TTL).contains(&seconds).then_some(Self(seconds))
    }

    /// The number of seconds.
    #[must_use]
    pub fn as_secs(self) -> u32 {
        self.0
    }
}

// === impl TokenAuthority ===

impl TokenAuthority {
    /// Reads the key from `token.key` in `state_dir`, and creates both (0600, 0700) if they are missing.
    ///
    /// # Errors
    ///
    /// [`KeyError`], which names the file. It is never replaced, since that would invalidate the clients' tokens.
    pub fn open(state_dir: &Path) -> Result<Self, KeyError> {
        let key = key::open(state_dir)?;
        // The uptime restarts with each boot, so tokens must not survive a boot, wherever the key is kept.
        let boot = boot_id().map_err(KeyError::BootId)?;
        Ok(Self::new(&*key, &boot, Uptime::Boot))
    }

    fn new(key: &[u8], boot: &[u8], uptime: Uptime) -> Self {
        let mac = Hmac::new_from_slice(key).expect("HMAC takes keys of any length");
        Self { mac: mac.chain_update(boot), uptime }
    }

    /// Issues a token for `client` with lifetime `ttl`.
    #[must_use]
    pub fn issue(&self, client: &Client, ttl: TokenTtl) -> String {
        // Rounded up: a token lives at least as long as promised.
        let expires = self.uptime.now().as_secs() + 1 + u64::from(ttl.0);
        let mut token = Vec::with_capacity(1 + EXPIRY_BYTES + MAC_BYTES);
        token.push(FORM);
        token.extend(expires.to_be_bytes());
        token.extend(self.mac(client, expires).finalize().into_bytes());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Whether `token` was issued to `client` and has not expired. The MAC is compared in constant time.
    #[must_use]
    pub fn verify(&self, client: &Client, token: &[u8]) -> bool {
        self.expiry(client, token).is_some_and(|expires| self.uptime.now().as_secs() < expires)
    }

    /// As [`TokenAuthority::verify`], for a client that may have shown the same token before on the connection of
    /// `verified`.
    #[must_use]
    pub fn verify_again(&self, client: &Client, token: &[u8], verified: &VerifiedToken) -> bool {
        let expires = verified.expiry(token).or_else(|| {
            let expires = self.expiry(client, token)?;
            verified.remember(token, expires);
            Some(expires)
        });
        expires.is_some_and(|expires| self.uptime.now().as_secs() < expires)
    }

    /// The expiry of `token`, if it is authentic.
    fn expiry(&self, client: &Client, token: &[u8]) -> Option<u64> {
        let mut bytes = [0; 1 + EXPIRY_BYTES + MAC_BYTES];
        let length = URL_SAFE_NO_PAD.decode_slice(token, &mut bytes).ok()?;
        let (form, rest) = bytes.split_first()?;
        if length != bytes.len() || *form != FORM {
            return None;
        }
        let (expires, mac) = rest.split_first_chunk::<EXPIRY_BYTES>()?;
        let expires = u64::from_be_bytes(*expires);
        self.mac(client, expires).verify_slice(mac).ok()?;
        Some(expires)
    }

    fn mac(&self, client: &Client, expires: u64) -> Hmac<Sha256> {
        // The kind is part of the MAC, so that a UID never stands for an address.
        let (kind, name) = match client {
            Client::Pod { uid, .. } | Client::PodListener { uid, .. } => (b"p", uid.to_string()),
            Client::Address(address) => (b"a", address.to_canonical().to_string()),
        };
        self.mac
            .clone()
            .chain_update([FORM])
            .chain_update(expires.to_be_bytes())
            .chain_update(kind)
            .chain_update(name)
    }
}

impl std::fmt::Debug for TokenAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenAuthority(…)")
    }
}

// === impl VerifiedToken ===

impl VerifiedToken {
    /// The expiry of `token`, if it is this one. As with the MAC, the time that this takes does not depend on the bytes.
    fn expiry(&self, token: &[u8]) -> Option<u64> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (text, expires) = known.as_ref()?;
        let token: &[u8; TEXT_BYTES] = token.try_into().ok()?;
        let differences = text.iter().zip(token).fold(0, |all, (one, other)| all | (one ^ other));
        (differences == 0).then_some(*expires)
    }

    fn remember(&self, token: &[u8], expires: u64) {
        if let Ok(token) = token.try_into() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((token, expires));
        }
    }
}

// === impl Uptime ===

impl Uptime {
    fn now(&self) -> Duration {
        match self {
            Self::Boot => {
                let now = clock_gettime(ClockId::Boottime);
                Duration::from_secs(u64::try_from(now.tv_sec).unwrap_or_default())
            }
            Self::Simulated(start) => start.elapsed(),
        }
    }
}

/// The id of this boot, see proc_sys_kernel(5).
fn boot_id() -> io::Result<Vec<u8>> {
    std::fs::read("/proc/sys/kernel/random/boot_id")
}

#[cfg(test)]
impl TokenAuthority {
    /// One whose tokens age with tokio's time.
    pub(super) fn simulated(key: &[u8]) -> Self {
        Self::new(key, b"boot", Uptime::Simulated(Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(ip: &str) -> Client {
        Client::Address(ip.parse().unwrap())
    }

    fn ttl(seconds: &str) -> TokenTtl {
        TokenTtl::parse(seconds.as_bytes()).unwrap()
    }

    #[test]
    fn ttl_is_1_to_21600_in_digits() {
        for good in ["1", "60", "300", "21600", "0060"] {
            assert!(TokenTtl::parse(good.as_bytes()).is_some(), "{good}");
        }
        for bad in [
            "",
            "0",
            "21601",
            "-1",
            "+60",
            " 60",
            "60 ",
            "6e1",
            "60.0",
            "4294967297",
            "sixty",
            "\u{ff}",
        ] {
            assert!(TokenTtl::parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn token_lives_as_long_as_was_asked_and_is_one_clients_alone() {
        let authority = TokenAuthority::simulated(b"key");
        let token = authority.issue(&client("10.0.0.5"), ttl("60"));
        assert!(authority.verify(&client("10.0.0.5"), token.as_bytes()));
        assert!(authority.verify(&client("::ffff:10.0.0.5"), token.as_bytes()));
        assert!(!authority.verify(&client("10.0.0.50"), token.as_bytes()));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(authority.verify(&client("10.0.0.5"), token.as_bytes()));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!authority.verify(&client("10.0.0.5"), token.as_bytes()));
    }

    #[tokio::test(start_paused = true)]
    async fn no_change_of_a_token_is_accepted() {
        let authority = TokenAuthority::simulated(b"key");
        let client = client("10.0.0.5");
        let token = authority.issue(&client, ttl("60"));
        for at in 0..token.len() {
            for replacement in [b'A', b'Z', b'_', b'=', b' ', 0, 0xff] {
                let mut forged = token.clone().into_bytes();
                if std::mem::replace(&mut forged[at], replacement) != replacement {
                    assert!(!authority.verify(&client, &forged), "{at} {replacement}");
                }
            }
            assert!(!authority.verify(&client, &token.as_bytes()[..at]));
        }
        let longer = [token.as_bytes(), b"A"].concat();
        for forged in [&b""[..], b"=", &longer, &[b'A'; 10_000], token.to_lowercase().as_bytes()] {
            assert!(!authority.verify(&client, forged));
        }
        assert!(!TokenAuthority::simulated(b"other").verify(&client, token.as_bytes()));
    }

    #[test]
    fn token_outlives_the_agent_but_not_the_boot() {
        let state = tempfile::tempdir().unwrap();
        let client = client("fd00::5");
        let token = TokenAuthority::open(state.path()).unwrap().issue(&client, ttl("60"));
        assert!(TokenAuthority::open(state.path()).unwrap().verify(&client, token.as_bytes()));
        let key = std::fs::read(state.path().join("token.key")).unwrap();
        let next_boot = TokenAuthority::new(&key, b"another", Uptime::Boot);
        assert!(!next_boot.verify(&client, token.as_bytes()));
    }
}

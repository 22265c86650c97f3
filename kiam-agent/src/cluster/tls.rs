//! Explains TLS errors with their remedies, and ends readiness when they last.

use std::{
    error::Error as StdError,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{AlertDescription, CertificateError, Error as TlsError};
use tokio::time::Instant;

use super::describe;
use kiam_core::lifecycle::{Detail, Latch, Readiness};

/// How long TLS may fail while a CA and its certificates are replaced one after the other.
const LASTING: Duration = Duration::from_secs(60);

/// The state of TLS with one server. It is part of readiness: unlike an outage, failing TLS does not end by itself.
#[derive(Clone, Debug)]
pub(super) struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    works: Latch,
    problem: Detail,
    failing_since: Mutex<Option<Instant>>,
}

// === impl Health ===

impl Health {
    /// A state that is shown by this name, and good until the first answer.
    pub(super) fn new(name: &'static str, readiness: &Readiness) -> Self {
        let (works, problem) = (readiness.latch(name), readiness.detail(name));
        works.set();
        Self(Arc::new(Inner { works, problem, failing_since: Mutex::default() }))
    }

    /// Records the result of a request. Errors other than TLS's are ignored.
    pub(super) fn heard<T>(&self, answer: &kube::Result<T>) {
        let Inner { works, problem, failing_since } = &*self.0;
        let mut failing_since = failing_since.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Ok(_) => {
                if failing_since.take().is_some() {
                    works.set();
                    problem.clear();
                }
            }
            Err(error) if cause(error).is_some() => {
                let since = failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= LASTING {
                    works.clear();
                    problem.set(describe(error));
                }
            }
            Err(_) => {}
        }
    }
}

/// The error of rustls that caused `error`, if one did.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a TlsError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = match error.downcast_ref::<io::Error>() {
            // The source of an I/O error skips the inner error itself.
            Some(error) => error.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

/// The remedy of a TLS error, where rustls is stricter than OpenSSL and Go, or where its message is terse.
pub(super) fn remedy(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    let certificate = match cause(error)? {
        TlsError::InvalidCertificate(certificate) => certificate,
        TlsError::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRequired
            | AlertDescription::UnsupportedCertificate,
        ) => {
            return Some("the server rejects the client certificate of the kubeconfig");
        }
        _ => return None,
    };
    let text = format!("{certificate:?}");
    Some(match certificate {
        CertificateError::UnknownIssuer => {
            "none of the certificates in the kubeconfig's certificate-authority has signed the server's: was the cluster's CA replaced? The file is read again as soon as it changes"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "the certificate must name the host of the kubeconfig's server among its subjectAltNames (a CN does not count), or the kubeconfig that name as tls-server-name"
        }
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            "renew the certificate, or correct the node's clock"
        }
        _ if text.contains("CaUsedAsEndEntity") => {
            "the server's certificate is that of a CA (basicConstraints CA:TRUE), as openssl req -x509 makes them: sign another one with it for the server, with CA:FALSE"
        }
        _ if text.contains("UnsupportedCertVersion") => {
            "the certificate is of X.509 version 1, and must be of version 3: recreate it with extensions, such as basicConstraints=CA:FALSE and a subjectAltName"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(error: impl Into<Box<dyn StdError + Send + Sync>>) -> kube::Result<()> {
        Err(kube::Error::Service(error.into()))
    }

    fn untrusted() -> kube::Result<()> {
        let tls = TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        answer(io::Error::other(tls))
    }

    #[tokio::test(start_paused = true)]
    async fn only_tls_that_fails_for_long_takes_readiness_away_and_says_why() {
        let readiness = Readiness::default();
        let health = Health::new("TLS", &readiness);
        assert!(readiness.is_ready(), "nothing is known yet");
        health.heard(&untrusted());
        tokio::time::advance(LASTING - Duration::from_secs(1)).await;
        health.heard(&untrusted());
        assert!(readiness.is_ready() && readiness.details().is_empty());
        tokio::time::advance(Duration::from_secs(1)).await;
        health.heard(&answer("connection refused"));
        assert!(readiness.is_ready(), "an outage");
        health.heard(&untrusted());
        assert_eq!(readiness.pending(), ["TLS"]);
        let [(name, why)] = &readiness.details()[..] else { panic!("{:?}", readiness.details()) };
        assert!(*name == "TLS" && why.contains("UnknownIssuer") && why.contains("replaced?"));
        // As it does when it answers that the agent may not.
        health.heard(&Ok(()));
        assert!(readiness.is_ready() && readiness.details().is_empty());
        health.heard(&untrusted());
        assert!(readiness.is_ready(), "a new failure begins anew");
    }
}

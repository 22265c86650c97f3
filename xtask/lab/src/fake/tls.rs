//! TLS before a server that speaks plain HTTP.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use anyhow::{Context, Result};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

/// Listens on loopback with a certificate. Drop ends it and cuts its connections.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    config: Arc<Mutex<Arc<ServerConfig>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

// === impl TlsFront ===

impl TlsFront {
    /// Starts it before `server`, with the certificate chain and the key of these PEM files.
    pub fn start(certificate: &Path, key: &Path, server: SocketAddr) -> Result<Self> {
        let config = Arc::new(Mutex::new(config(certificate, key)?));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("building a runtime")?;
        let listener = runtime
            .block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .context("listening on loopback")?;
        let address = listener.local_addr().context("asking for the address")?;
        let (stop, stopped) = oneshot::channel();
        let shown = config.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::spawn(accept(listener, shown, server));
                let _ = stopped.await;
            });
        });
        Ok(Self { address, config, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shows new connections another certificate.
    pub fn replace(&self, certificate: &Path, key: &Path) -> Result<()> {
        let config = config(certificate, key)?;
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn config(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)
        .with_context(|| format!("reading {}", certificate.display()))?
        .collect();
    let chain = chain.with_context(|| format!("reading {}", certificate.display()))?;
    let key =
        PrivateKeyDer::from_pem_file(key).with_context(|| format!("reading {}", key.display()))?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key);
    Ok(Arc::new(config.context("using the certificate")?))
}

async fn accept(listener: TcpListener, config: Arc<Mutex<Arc<ServerConfig>>>, server: SocketAddr) {
    while let Ok((stream, _)) = listener.accept().await {
        let config = config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tokio::spawn(async move {
            let mut client = TlsAcceptor::from(config).accept(stream).await?;
            let mut server = TcpStream::connect(server).await?;
            copy_bidirectional(&mut client, &mut server).await
        });
    }
}

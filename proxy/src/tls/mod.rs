//! TLS for NBD and for replication: configurations from PEM files, and what a peer's certificate
//! says about who it is.
//!
//! Always holds: TLS 1.3 only, the `ring` provider only, no session resumption, no tickets, no
//! 0-RTT. Which groups a peer may touch is decided by its certificate's subject alternative names
//! alone ([`Identity`]).

mod identity;
#[cfg(test)]
pub(crate) mod test_certificates;
#[cfg(test)]
mod tests;

pub use identity::{Identity, IdentityError};

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a configuration could not be built. Each names the file to look at.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read, or is not PEM.
    #[error("cannot read {what} from {}: {source}", path.display())]
    Pem {
        /// Certificate, key or CA.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::pki_types::pem::Error,
    },
    /// The file holds no certificate.
    #[error("{} holds no certificate (PEM block \"CERTIFICATE\")", .0.display())]
    NoCertificate(PathBuf),
    /// A certificate of the CA is unusable.
    #[error("a certificate in {} cannot serve as an authority: {source}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::Error,
    },
    /// Client certificates cannot be checked against the CA.
    #[error("client certificates cannot be checked against {}: {source}", path.display())]
    Verifier {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::server::VerifierBuilderError,
    },
    /// Certificate and key do not make an endpoint, e.g. they do not belong together.
    #[error("certificate {} and key {} cannot be used: {source}", cert.display(), key.display())]
    Endpoint {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The cause.
        source: rustls::Error,
    },
    /// Our own certificate cannot be parsed.
    #[error("the certificate in {}: {source}", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: IdentityError,
    },
}

/// Where an endpoint's PEM files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointFiles {
    /// The certificate, then the intermediate ones.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// A server's configuration. With `client_ca`, a client must show a certificate of that CA;
/// without, any client is let in and has no [`Identity`].
///
/// # Errors
/// Names the file that is missing or unusable.
pub fn server_config(
    files: &EndpointFiles,
    client_ca: Option<&Path>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|source| endpoint_error(files, source))?;
    let builder = match client_ca {
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|source| TlsError::Verifier {
                    path: path.into(),
                    source,
                })?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(certificates(&files.cert)?, key(&files.key)?)
        .map_err(|source| endpoint_error(files, source))?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// A client's configuration: trusts servers of `server_ca`, and shows its certificate.
///
/// # Errors
/// Names the file that is missing or unusable.
pub fn client_config(
    files: &EndpointFiles,
    server_ca: &Path,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|source| endpoint_error(files, source))?
        .with_root_certificates(authorities(server_ca)?)
        .with_client_auth_cert(certificates(&files.cert)?, key(&files.key)?)
        .map_err(|source| endpoint_error(files, source))?;
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// What the certificate in a file says: for its expiry, and for `config check`.
///
/// # Errors
/// When there is none, or it cannot be parsed.
pub fn identity_in(path: &Path) -> Result<Identity, TlsError> {
    let chain = certificates(path)?;
    Identity::of(&chain).map_err(|source| TlsError::Identity {
        path: path.into(),
        source,
    })
}

fn endpoint_error(files: &EndpointFiles, source: rustls::Error) -> TlsError {
    TlsError::Endpoint {
        cert: files.cert.clone(),
        key: files.key.clone(),
        source,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |source| TlsError::Pem {
        what: "certificates",
        path: path.into(),
        source,
    };
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(error)?
        .collect::<Result<_, _>>()
        .map_err(error)?;
    if all.is_empty() {
        return Err(TlsError::NoCertificate(path.into()));
    }
    Ok(all)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::Pem {
        what: "a private key",
        path: path.into(),
        source,
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority {
                path: path.into(),
                source,
            })?;
    }
    Ok(roots)
}

//! Who a peer is: the subject alternative names of its certificate.
//!
//! A certificate gives access to a group by one of:
//! - a URI `afterimage://GROUP`, compared exactly; `afterimage://*` stands for every group;
//! - a DNS name equal to the group's name, compared exactly, if the certificate has no
//!   `afterimage:` URI at all. This is for authorities whose tools only make DNS names.
//!
//! Subject and common name mean nothing.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Scheme of the URIs that name groups.
const SCHEME: &str = "afterimage://";

/// Why a certificate says nothing.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The chain is empty.
    #[error("the peer showed no certificate")]
    Missing,
    /// It is not X.509.
    #[error("the certificate cannot be parsed: {0}")]
    Parse(#[from] x509_parser::nom::Err<x509_parser::error::X509Error>),
    /// The names in it cannot be read.
    #[error("the subject alternative names cannot be parsed: {0}")]
    Names(#[from] x509_parser::error::X509Error),
}

/// What a verified certificate says about its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// SANs that can name groups, as `URI:…` and `DNS:…`.
    names: Vec<String>,
    subject: String,
    not_after: i64,
}

impl Identity {
    /// The identity in the first certificate of a chain that rustls has verified.
    ///
    /// # Errors
    /// When there is no certificate or it cannot be parsed.
    pub fn of(chain: &[CertificateDer<'_>]) -> Result<Self, IdentityError> {
        let first = chain.first().ok_or(IdentityError::Missing)?;
        let (_, certificate) = X509Certificate::from_der(first)?;
        let mut names = Vec::new();
        if let Some(extension) = certificate.subject_alternative_name()? {
            for name in &extension.value.general_names {
                match name {
                    GeneralName::URI(uri) => names.push(format!("URI:{uri}")),
                    GeneralName::DNSName(dns) => names.push(format!("DNS:{dns}")),
                    _ => {}
                }
            }
        }
        Ok(Self {
            names,
            subject: certificate.subject().to_string(),
            not_after: certificate.validity().not_after.timestamp(),
        })
    }

    /// The SAN that lets the holder use `group`, in the form `URI:…` or `DNS:…`; `None` if it may
    /// not.
    #[must_use]
    pub fn grant(&self, group: &str) -> Option<&str> {
        let uri_of = |name: &str| {
            name.strip_prefix("URI:")?
                .strip_prefix(SCHEME)
                .map(str::to_owned)
        };
        let any_uri = self.names.iter().any(|name| uri_of(name).is_some());
        self.names
            .iter()
            .find(|name| match uri_of(name) {
                Some(named) => named == group || named == "*",
                None => !any_uri && name.strip_prefix("DNS:") == Some(group),
            })
            .map(String::as_str)
    }

    /// The SANs that can name groups, as `URI:…` and `DNS:…`.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The subject, for people.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// When the certificate expires, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.not_after
    }
}

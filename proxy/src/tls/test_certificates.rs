//! Throw-away authorities and certificates for tests.

use super::EndpointFiles;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use std::path::{Path, PathBuf};

/// A CA in a folder.
pub(crate) struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    pub(crate) file: PathBuf,
}

impl Authority {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("a CA");
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, certificate.pem()).expect("written");
        Self {
            folder: folder.into(),
            issuer: Issuer::new(params, key),
            file,
        }
    }

    /// A certificate for DNS names and URIs; `expired` ones ended in 2001.
    pub(crate) fn issue(
        &self,
        name: &str,
        dns: &[&str],
        uris: &[&str],
        expired: bool,
    ) -> EndpointFiles {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        let ia5 = |text: &&str| (*text).try_into().expect("ASCII");
        params.subject_alt_names = dns
            .iter()
            .map(|dns| SanType::DnsName(ia5(dns)))
            .chain(uris.iter().map(|uri| SanType::URI(ia5(uri))))
            .collect();
        if expired {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let files = EndpointFiles {
            cert: self.folder.join(format!("{name}.pem")),
            key: self.folder.join(format!("{name}.key")),
        };
        std::fs::write(&files.cert, certificate.pem()).expect("written");
        std::fs::write(&files.key, key.serialize_pem()).expect("written");
        files
    }
}

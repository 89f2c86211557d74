//! `afterimage cert`: a development authority and certificates that it signs.
//!
//! Keys are written with mode 0600 and never over an existing file. A real site may use its own
//! authority: all that matters are the SANs (hosts for servers, group names for primaries).

use anyhow::{Context as _, bail};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde::Serialize;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::cli::output::Output;
use crate::cli::{CertCommand, CertFiles};

/// Days that an authority is valid.
const CA_DAYS: i64 = 3650;
/// Clocks of other machines may lag so much.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// The files that were written.
#[derive(Debug, Serialize)]
pub struct Written {
    /// PEM file of the certificate.
    pub cert: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When a file exists or cannot be written, or the authority cannot be read.
pub fn run(command: &CertCommand, output: Output) -> anyhow::Result<()> {
    let written = match command {
        CertCommand::Ca { out } => authority(out)?,
        CertCommand::Server { hosts, files } => server(hosts, files)?,
        CertCommand::Client { groups, files } => {
            let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
            client(&groups, files)?
        }
    };
    output.result(&written, |written| {
        format!("{}\n{}", written.cert.display(), written.key.display())
    })?;
    Ok(())
}

/// Makes `ca.pem` and `ca.key` in `out`.
///
/// # Errors
/// When a file exists or cannot be written.
pub fn authority(out: &Path) -> anyhow::Result<Written> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "Afterimage development authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, CA_DAYS);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    store(out, "ca", &issuer.pem(), &issuer.key().serialize_pem())
}

/// Makes a server's certificate for `hosts`.
///
/// # Errors
/// As [`authority`], and when the authority cannot be read.
pub fn server(hosts: &[String], files: &CertFiles) -> anyhow::Result<Written> {
    let params = CertificateParams::new(hosts.to_vec())
        .with_context(|| format!("a name among {hosts:?} cannot stand in a certificate"))?;
    leaf(
        "server",
        params,
        hosts,
        ExtendedKeyUsagePurpose::ServerAuth,
        files,
    )
}

/// Makes a primary's certificate for `groups`.
///
/// # Errors
/// As [`authority`], and when the authority cannot be read.
pub fn client(groups: &[String], files: &CertFiles) -> anyhow::Result<Written> {
    let mut params = CertificateParams::default();
    for group in groups {
        let uri = format!("afterimage://{group}").try_into()?;
        params.subject_alt_names.push(SanType::URI(uri));
    }
    leaf(
        "client",
        params,
        groups,
        ExtendedKeyUsagePurpose::ClientAuth,
        files,
    )
}

fn leaf(
    kind: &str,
    mut params: CertificateParams,
    names: &[String],
    purpose: ExtendedKeyUsagePurpose,
    files: &CertFiles,
) -> anyhow::Result<Written> {
    let read = |name: &str| {
        let path = files.ca.join(name);
        fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}: make an authority with 'afterimage cert ca --out {}' first",
                path.display(),
                files.ca.display()
            )
        })
    };
    let (ca_cert, ca_key) = (read("ca.pem")?, read("ca.key")?);
    let ca_key = KeyPair::from_pem(&ca_key).context("ca.key holds no usable key")?;
    let issuer =
        Issuer::from_ca_cert_pem(&ca_cert, ca_key).context("ca.pem holds no usable certificate")?;
    if let Some(first) = names.first() {
        params.distinguished_name.push(DnType::CommonName, first);
    }
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    valid_for(&mut params, files.days);
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, &issuer)?;
    let name = files.name.as_ref().map_or(kind, |name| name.as_str());
    store(&files.out, name, &cert.pem(), &key.serialize_pem())
}

/// Valid from a little before now for `days`; with negative `days` it ended so long ago.
fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = SystemTime::now();
    let day = Duration::from_secs(86_400);
    let span = day * u32::try_from(days.unsigned_abs()).unwrap_or(u32::MAX / 86_400);
    let (from, to) = if days < 0 {
        (now - span - day, now - span)
    } else {
        (now - CLOCK_SLACK, now + span)
    };
    params.not_before = from.into();
    params.not_after = to.into();
}

fn store(folder: &Path, name: &str, cert: &str, key: &str) -> anyhow::Result<Written> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let written = Written {
        cert: folder.join(format!("{name}.pem")),
        key: folder.join(format!("{name}.key")),
    };
    for path in [&written.cert, &written.key] {
        if path.exists() {
            bail!(
                "{} is already there; move it away or choose another --out or --name",
                path.display()
            );
        }
    }
    write_new(&written.key, key, 0o600)?;
    write_new(&written.cert, cert, 0o644)?;
    Ok(written)
}

fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

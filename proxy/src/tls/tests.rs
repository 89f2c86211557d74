//! Who gets through TLS, and what certificates grant.

use super::test_certificates::Authority;
use super::{EndpointFiles, Identity, TlsError, client_config, identity_in, server_config};
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::version::TLS12;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection};
use std::sync::Arc;

/// A handshake in memory: the server's view of the client, or the server's or client's error.
fn meet(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> Result<Option<Identity>, rustls::Error> {
    let mut server = ServerConnection::new(server)?;
    let name = ServerName::try_from("replica.test").expect("a name");
    let mut client = ClientConnection::new(client, name)?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).expect("memory");
        server.read_tls(&mut &wire[..]).expect("memory");
        server.process_new_packets()?;
        wire.clear();
        server.write_tls(&mut wire).expect("memory");
        client.read_tls(&mut &wire[..]).expect("memory");
        client.process_new_packets()?;
    }
    assert_eq!(
        server.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    Ok(server
        .peer_certificates()
        .map(|chain| Identity::of(chain).expect("an identity")))
}

#[test]
fn both_sides_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = Authority::new(folder.path(), "ours");
    let theirs = Authority::new(folder.path(), "theirs");
    let server = ours.issue("server", &["replica.test"], &[], false);
    let client = ours.issue("client", &[], &["afterimage://vm1"], false);
    let expired = ours.issue("expired", &[], &["afterimage://vm1"], true);
    let foreign = theirs.issue("foreign", &[], &["afterimage://vm1"], false);

    let strict = server_config(&server, Some(&ours.file)).expect("a configuration");
    let connect = |files: &EndpointFiles, ca: &Authority| {
        let client = client_config(files, &ca.file).expect("a configuration");
        meet(strict.clone(), client)
    };
    let identity = connect(&client, &ours).expect("accepted").expect("known");
    assert_eq!(identity.grant("vm1"), Some("URI:afterimage://vm1"));
    for (files, ca, why) in [
        (&expired, &ours, "expired"),
        (&foreign, &ours, "another CA's client"),
        (&client, &theirs, "another CA's server"),
    ] {
        let error = connect(files, ca).expect_err(why);
        assert!(
            matches!(error, rustls::Error::InvalidCertificate(_)),
            "{why}: {error}"
        );
    }
    let open = server_config(&server, None).expect("a configuration");
    let client = client_config(&client, &ours.file).expect("a configuration");
    assert_eq!(meet(open, client), Ok(None));
}

#[test]
fn tls_1_2_is_not_spoken() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let files = ca.issue("server", &["replica.test"], &[], false);
    let roots = super::authorities(&ca.file).expect("an authority");
    let old_client = ClientConfig::builder_with_provider(super::provider())
        .with_protocol_versions(&[&TLS12])
        .expect("a version")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let old_client = Arc::new(old_client);
    for client_ca in [None, Some(&*ca.file)] {
        let server = server_config(&files, client_ca).expect("a configuration");
        let refused = meet(server, old_client.clone());
        let incompatible = matches!(refused, Err(rustls::Error::PeerIncompatible(_)));
        assert!(incompatible, "{refused:?}");
    }
    let chain = super::certificates(&files.cert).expect("a certificate");
    let old_server = ServerConfig::builder_with_provider(super::provider())
        .with_protocol_versions(&[&TLS12])
        .expect("a version")
        .with_no_client_auth()
        .with_single_cert(chain, super::key(&files.key).expect("a key"))
        .expect("a configuration");
    let client = client_config(&files, &ca.file).expect("a configuration");
    let refused = meet(Arc::new(old_server), client);
    let incompatible = matches!(refused, Err(rustls::Error::PeerIncompatible(_)));
    assert!(incompatible, "{refused:?}");
}

/// A client that would resume and send early data if it were let.
#[test]
fn nothing_is_resumed_and_no_data_comes_early() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let files = ca.issue("server", &["replica.test"], &[], false);
    let ours = client_config(&files, &ca.file).expect("a configuration");
    assert!(!ours.enable_early_data);
    let mut eager = (*ours).clone();
    eager.resumption = Resumption::in_memory_sessions(4);
    eager.enable_early_data = true;
    let eager = Arc::new(eager);
    let server = server_config(&files, Some(&ca.file)).expect("a configuration");
    assert_eq!(
        (server.send_tls13_tickets, server.max_early_data_size),
        (0, 0)
    );
    for _ in 0..2 {
        let mut ours = ServerConnection::new(server.clone()).expect("a connection");
        let name = ServerName::try_from("replica.test").expect("a name");
        let mut client = ClientConnection::new(eager.clone(), name).expect("a connection");
        assert!(client.early_data().is_none());
        // Beyond the handshake, too: that is when tickets come.
        for _ in 0..6 {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).expect("memory");
            ours.read_tls(&mut &wire[..]).expect("memory");
            ours.process_new_packets().expect("accepted");
            wire.clear();
            ours.write_tls(&mut wire).expect("memory");
            client.read_tls(&mut &wire[..]).expect("memory");
            client.process_new_packets().expect("accepted");
        }
        assert!(!client.is_handshaking() && !ours.is_handshaking());
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
    }
}

#[test]
fn a_certificate_grants_exactly_what_it_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let identity = |name: &str, dns: &[&str], uris: &[&str]| {
        let files = ca.issue(name, dns, uris, false);
        identity_in(&files.cert).expect("an identity")
    };
    let by_uri = identity(
        "a",
        &["host.test", "vm9"],
        &["afterimage://vm1", "https://vm2"],
    );
    assert!(by_uri.grant("vm1").is_some());
    for group in ["VM1", "vm", "vm11", "vm2", "vm9", "host.test", "*", ""] {
        assert_eq!(by_uri.grant(group), None, "{group:?}");
    }
    let by_dns = identity("b", &["vm1", "web.prod"], &["https://vm2"]);
    assert_eq!(by_dns.grant("vm1"), Some("DNS:vm1"));
    assert_eq!(by_dns.grant("web.prod"), Some("DNS:web.prod"));
    for group in ["VM1", "prod", "vm2", ""] {
        assert_eq!(by_dns.grant(group), None, "{group:?}");
    }
    let operator = identity("c", &[], &["afterimage://*"]);
    assert!(operator.grant("anything").is_some());
    let nobody = identity("d", &[], &[]);
    assert_eq!(nobody.grant("vm1"), None);
    assert!(nobody.not_after() > 1_700_000_000);
}

#[test]
fn unusable_files_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let good = ca.issue("good", &["x"], &[], false);
    let other = ca.issue("other", &["x"], &[], false);
    let missing = EndpointFiles {
        cert: folder.path().join("missing.pem"),
        ..good.clone()
    };
    let swapped = EndpointFiles {
        key: other.key.clone(),
        ..good.clone()
    };
    let key_only = EndpointFiles {
        cert: good.key.clone(),
        ..good.clone()
    };
    let error = |files| server_config(files, None).expect_err("refused");
    assert!(matches!(error(&missing), TlsError::Pem { .. }));
    assert!(error(&missing).to_string().contains("missing.pem"));
    assert!(matches!(error(&swapped), TlsError::Endpoint { .. }));
    assert!(matches!(error(&key_only), TlsError::NoCertificate(_)));
    let no_ca = server_config(&good, Some(&good.key)).expect_err("no CA");
    assert!(matches!(no_ca, TlsError::NoCertificate(_)), "{no_ca}");
}

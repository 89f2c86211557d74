//! Over real TLS on loopback: who gets in, and what they may write.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_format::wire::{ErrorCode, Message};
use afterimage_proxy::ship::codec::{read_message, write_message};
use afterimage_proxy::tls::{EndpointFiles, client_config, server_config};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::super::{Receiver, Server, ServerLimits};
use crate::repository::Repository;
use crate::testing::primary::Primary;

const SILENCE: Duration = Duration::from_secs(60);

struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a CA");
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, certificate.pem()).expect("written");
        Self {
            folder: folder.into(),
            issuer: Issuer::new(params, key),
            file,
        }
    }

    fn issue(&self, name: &str, san: &str, expired: bool) -> EndpointFiles {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.subject_alt_names = vec![SanType::DnsName(san.try_into().expect("ASCII"))];
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

struct Site {
    _folder: tempfile::TempDir,
    ours: Authority,
    theirs: Authority,
    address: std::net::SocketAddr,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

async fn site() -> Site {
    site_with(ServerLimits::default()).await
}

async fn site_with(limits: ServerLimits) -> Site {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = Authority::new(folder.path(), "ours");
    let theirs = Authority::new(folder.path(), "theirs");
    let files = ours.issue("server", "replica.test", false);
    let tls = server_config(&files, Some(&ours.file)).expect("a configuration");
    let receiver = Receiver::new(Repository::in_memory());
    let server = Server::new(receiver, tls, limits, Arc::new(|| 1));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let stop = CancellationToken::new();
    let running = tokio::spawn(server.run(listener, stop.clone()));
    Site {
        _folder: folder,
        ours,
        theirs,
        address,
        stop,
        running,
    }
}

impl Site {
    async fn connect(&self, files: &EndpointFiles) -> std::io::Result<TlsStream<TcpStream>> {
        let config = client_config(files, &self.ours.file).expect("a configuration");
        let stream = TcpStream::connect(self.address).await?;
        let name = "replica.test".try_into().expect("a name");
        TlsConnector::from(config).connect(name, stream).await
    }

    /// The answer to a first hello; `None` if the connection is refused.
    async fn hello(&self, files: &EndpointFiles, primary: &Primary) -> Option<Message> {
        let mut stream = self.connect(files).await.ok()?;
        write_message(&mut stream, &Message::Hello(primary.hello()), SILENCE)
            .await
            .ok()?;
        read_message(&mut stream, SILENCE).await.ok()
    }
}

fn code(message: Option<Message>) -> Option<ErrorCode> {
    match message {
        Some(Message::Error(error)) => Some(error.code),
        _ => None,
    }
}

#[tokio::test]
async fn certificates_decide() {
    let site = site().await;
    let primary = Primary::new(1);
    let good = site.ours.issue("good", "vm1", false);
    let reply = site.hello(&good, &primary).await;
    assert!(matches!(reply, Some(Message::HelloReply(_))), "{reply:?}");
    // Expired, or of another authority: TLS itself refuses.
    let expired = site.ours.issue("expired", "vm1", true);
    assert_eq!(site.hello(&expired, &primary).await, None);
    let foreign = site.theirs.issue("foreign", "vm1", false);
    assert_eq!(site.hello(&foreign, &primary).await, None);
    // A SAN for another group.
    let other = site.ours.issue("other", "vm2", false);
    assert_eq!(
        code(site.hello(&other, &primary).await),
        Some(ErrorCode::NotPermitted)
    );
    // The permitted name with another UUID.
    let mut thief = Primary::new(3);
    thief.name.clone_from(&primary.name);
    assert_eq!(
        code(site.hello(&good, &thief).await),
        Some(ErrorCode::Identity)
    );
    site.stop.cancel();
    site.running.await.expect("stopped");
}

#[tokio::test]
async fn a_session_over_tls() {
    let site = site().await;
    let files = site.ours.issue("good", "vm1", false);
    let mut primary = Primary::new(1);
    let mut stream = site.connect(&files).await.expect("connected");
    for _ in 0..2 {
        write_message(&mut stream, &Message::Hello(primary.hello()), SILENCE)
            .await
            .expect("sent");
        match read_message(&mut stream, SILENCE).await.expect("an answer") {
            Message::HelloReply(afterimage_format::wire::HelloReply::NewEpoch(epoch)) => {
                primary.epoch = epoch;
            }
            Message::HelloReply(afterimage_format::wire::HelloReply::Resume(resume)) => {
                assert_eq!(resume.cursor.lsn.0, 0);
            }
            other => panic!("{other:?}"),
        }
    }
    let begin = primary.pass_begin(true);
    let segment = Message::Segment(primary.segment(begin, begin));
    write_message(&mut stream, &segment, SILENCE)
        .await
        .expect("sent");
    match read_message(&mut stream, SILENCE).await.expect("an answer") {
        Message::Ack(ack) => assert_eq!((ack.segments, ack.cursor.lsn.0), (1, begin)),
        other => panic!("{other:?}"),
    }
    // A newer connection takes over; the older one is told.
    let reply = site.hello(&files, &primary).await;
    assert!(matches!(reply, Some(Message::HelloReply(_))), "{reply:?}");
    let last = read_message(&mut stream, SILENCE).await.ok();
    assert_eq!(code(last), Some(ErrorCode::Superseded));
    // A damaged segment is refused with the reason.
    let mut stream = site.connect(&files).await.expect("connected");
    write_message(&mut stream, &Message::Hello(primary.hello()), SILENCE)
        .await
        .expect("sent");
    read_message(&mut stream, SILENCE).await.expect("an answer");
    let mut bad = primary.segment(begin, begin).to_vec();
    bad[300] ^= 1;
    write_message(&mut stream, &Message::Segment(bad.into()), SILENCE)
        .await
        .expect("sent");
    let last = read_message(&mut stream, SILENCE).await.ok();
    assert_eq!(code(last), Some(ErrorCode::BadSegment));
    site.stop.cancel();
    site.running.await.expect("stopped");
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let site = site_with(ServerLimits {
        connections_max: 1,
        ..ServerLimits::default()
    })
    .await;
    let files = site.ours.issue("good", "vm1", false);
    let primary = Primary::new(1);
    let mut first = site.connect(&files).await.expect("connected");
    write_message(&mut first, &Message::Hello(primary.hello()), SILENCE)
        .await
        .expect("sent");
    read_message(&mut first, SILENCE).await.expect("an answer");
    for _ in 0..3 {
        let reply = site.hello(&files, &primary).await;
        assert_eq!(code(reply), Some(ErrorCode::Busy));
    }
    drop(first);
    // The replica notices in its own time.
    let mut reply = site.hello(&files, &primary).await;
    while code(reply.clone()) == Some(ErrorCode::Busy) {
        reply = site.hello(&files, &primary).await;
    }
    assert!(matches!(reply, Some(Message::HelloReply(_))), "{reply:?}");
    site.stop.cancel();
    site.running.await.expect("stopped");
}

#[tokio::test]
async fn a_length_beyond_the_limit_is_refused_before_it_is_read() {
    use tokio::io::AsyncWriteExt;
    let site = site().await;
    let files = site.ours.issue("good", "vm1", false);
    let mut stream = site.connect(&files).await.expect("connected");
    let mut header = [3, 0, 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&u32::MAX.to_le_bytes());
    stream.write_all(&header).await.expect("sent");
    stream.flush().await.expect("sent");
    let last = read_message(&mut stream, SILENCE).await.ok();
    assert_eq!(code(last), Some(ErrorCode::Protocol));
    site.stop.cancel();
    site.running.await.expect("stopped");
}

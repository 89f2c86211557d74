//! Connections from the socket to where they are served.

use super::{Attach, Connection, ListenAddress, Listener, ListenerConfig};
use crate::nbd::handshake::TlsPolicy;
use crate::nbd::test_support::{Client, TestExports, info};
use crate::tls::test_certificates::Authority;
use crate::tls::{client_config, server_config};
use afterimage_format::nbd::constants::{cmd, opt, rep};
use afterimage_format::nbd::reply::{ReplyForm, decode_header};
use afterimage_format::nbd::request::RequestHeader;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

struct Attached {
    sender: mpsc::UnboundedSender<Connection>,
    /// Sends the handshake's last answer, as whoever serves a connection does.
    answers: bool,
}

impl Attach for Attached {
    fn attach(&self, mut connection: Connection) {
        let answer = std::mem::take(&mut connection.negotiated.answer);
        if self.answers {
            let socket = connection.socket.try_clone().expect("a socket");
            let mut socket = std::fs::File::from(socket);
            match &mut connection.tls {
                Some(tls) => {
                    tls.writer().write_all(&answer).expect("encrypted");
                    while tls.wants_write() {
                        tls.write_tls(&mut socket).expect("sent");
                    }
                }
                None => socket.write_all(&answer).expect("sent"),
            }
        } else {
            connection.negotiated.answer = answer;
        }
        self.sender.send(connection).expect("the test listens");
    }
}

struct Running {
    folder: tempfile::TempDir,
    attached: mpsc::UnboundedReceiver<Connection>,
    stop: CancellationToken,
}

fn unix(path: PathBuf) -> ListenAddress {
    ListenAddress::Unix {
        path,
        owner: None,
        group: None,
        mode: 0o600,
    }
}

fn start(change: impl FnOnce(&mut ListenerConfig)) -> Running {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = ListenerConfig::at(unix(folder.path().join("nbd.sock")));
    change(&mut config);
    let listener = Listener::bind(config).expect("bound");
    run(listener, folder, true)
}

fn run(listener: Listener, folder: tempfile::TempDir, answers: bool) -> Running {
    let (sender, attached) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let attach = Arc::new(Attached { sender, answers });
    tokio::spawn(listener.run(TestExports::new(), attach, stop.clone()));
    Running {
        folder,
        attached,
        stop,
    }
}

async fn connect(folder: &Path) -> UnixStream {
    UnixStream::connect(folder.join("nbd.sock"))
        .await
        .expect("connected")
}

async fn greeted(folder: &Path) -> Client<UnixStream> {
    Client::greet(connect(folder).await, 3)
        .await
        .expect("greeted")
}

fn request(command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let header = RequestHeader {
        flags: 0,
        command,
        cookie,
        offset,
        length,
    };
    header.encode(false, &mut out);
    out
}

#[tokio::test]
async fn a_connection_to_a_disk_is_handed_over_at_its_first_request() {
    let mut running = start(|config| config.ack_durable = true);
    let mut client = greeted(running.folder.path()).await;
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    client.stream.write_all(b"first bytes").await.expect("sent");
    let connection = running.attached.recv().await.expect("attached");
    assert!(connection.negotiated.ack_durable && connection.tls.is_none());
    let mut socket = std::os::unix::net::UnixStream::from(connection.socket);
    let mut bytes = [0; 11];
    // Blocking: it would fail otherwise.
    socket.read_exact(&mut bytes).expect("received");
    assert_eq!(&bytes, b"first bytes");
}

/// A quiesce sees the connections that are being served. A client that had its answer before that
/// could leave a write behind which takes effect after the answer to the next client.
#[tokio::test]
async fn nobody_is_answered_before_his_connection_is_handed_over() {
    for option in [opt::GO, opt::EXPORT_NAME] {
        let folder = tempfile::tempdir().expect("a folder");
        let address = unix(folder.path().join("nbd.sock"));
        let listener = Listener::bind(ListenerConfig::at(address)).expect("bound");
        let mut running = run(listener, folder, false);
        let mut client = greeted(running.folder.path()).await;
        let data = match option {
            opt::GO => info("vm1/vda", &[]),
            _ => b"vm1/vda".to_vec(),
        };
        let said = client.say(option, data.len() as u32, &data).await;
        said.expect("sent");
        let connection = running.attached.recv().await.expect("attached");
        let mut socket = client.stream.into_std().expect("a socket");
        let heard = socket.read(&mut [0; 1]);
        let nothing = heard.expect_err("nothing to read");
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
        assert!(!connection.negotiated.answer.is_empty(), "option {option}");
    }
}

#[tokio::test]
async fn a_device_is_served_and_its_connection_ends_properly() {
    let running = start(|_| {});
    let mut client = greeted(running.folder.path()).await;
    assert_eq!(
        client.go("vm2@latest/vda").await.expect("answered"),
        rep::ACK
    );
    let mut said = request(cmd::WRITE, 1, 0, 3);
    said.extend(b"abc");
    said.extend(request(cmd::READ, 2, 0, 5));
    said.extend(request(cmd::DISC, 3, 0, 0));
    client.stream.write_all(&said).await.expect("sent");
    let mut heard = Vec::new();
    client.stream.read_to_end(&mut heard).await.expect("an end");
    let (refused, at) = decode_header(&heard).expect("a reply");
    assert_eq!(
        (refused.form, refused.cookie, refused.errno),
        (ReplyForm::Simple, 1, 1)
    );
    let (read, head) = decode_header(&heard[at..]).expect("a reply");
    assert_eq!((read.cookie, read.errno), (2, 0));
    assert_eq!(heard[at + head..], [0; 5]);
    running.stop.cancel();
}

#[tokio::test]
async fn a_new_client_takes_the_place_of_the_oldest_half_open_handshake() {
    let mut running = start(|config| config.handshakes_max = 2);
    let mut idle = greeted(running.folder.path()).await;
    let mut second = greeted(running.folder.path()).await;
    let mut third = greeted(running.folder.path()).await;
    assert!(idle.is_closed().await, "the oldest made room");
    for client in [&mut second, &mut third] {
        assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
        running.attached.recv().await.expect("attached");
    }
}

#[tokio::test]
async fn connections_are_limited_until_one_ends() {
    let mut running = start(|config| config.connections_max = 1);
    let mut client = greeted(running.folder.path()).await;
    client.go("vm1/vda").await.expect("answered");
    let connection = running.attached.recv().await.expect("attached");
    let mut turned_away = Client {
        stream: connect(running.folder.path()).await,
    };
    assert!(turned_away.is_closed().await);
    drop(connection);
    assert_eq!(
        greeted(running.folder.path())
            .await
            .last(opt::ABORT, b"")
            .await
            .expect("answered"),
        rep::ACK
    );
}

#[tokio::test]
async fn tls_is_handed_over_with_what_it_has_decrypted() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let server = ca.issue("server", &["nbd.test"], &[], false);
    let client = ca.issue("client", &["vm1"], &[], false);
    let server = server_config(&server, Some(&ca.file)).expect("a configuration");
    let client = client_config(&client, &ca.file).expect("a configuration");
    let address = ListenAddress::Tcp("127.0.0.1:0".parse().expect("an address"));
    let listener = Listener::bind(ListenerConfig {
        tls: TlsPolicy::Forced(server),
        ..ListenerConfig::at(address)
    })
    .expect("bound");
    let address = listener.local_address().expect("TCP");
    let mut running = run(listener, folder, true);

    let stream = TcpStream::connect(address).await.expect("connected");
    let mut plain = Client::greet(stream, 3).await.expect("greeted");
    assert_eq!(
        plain.last(opt::STARTTLS, b"").await.expect("answered"),
        rep::ACK
    );
    let name = "nbd.test".try_into().expect("a name");
    let stream = TlsConnector::from(client)
        .connect(name, plain.stream)
        .await
        .expect("TLS");
    let mut client = Client { stream };
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    client.stream.write_all(b"hello").await.expect("sent");
    client.stream.flush().await.expect("sent");

    let connection = running.attached.recv().await.expect("attached");
    let mut tls = connection.tls.expect("TLS");
    let mut socket = std::net::TcpStream::from(connection.socket);
    let mut stream = rustls::Stream::new(&mut *tls, &mut socket);
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("received");
    assert_eq!(&bytes, b"hello");
    stream.write_all(b"world").expect("sent");
    client
        .stream
        .read_exact(&mut bytes)
        .await
        .expect("received");
    assert_eq!(&bytes, b"world");
}

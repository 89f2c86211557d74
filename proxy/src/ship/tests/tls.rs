//! The TLS sink against real sockets.

use super::group::{FakeGroup, MemorySource, block};
use super::replica::{Peer, Replica};
use super::{config, flow};
use crate::ship::port::GroupPort;
use crate::ship::remote::{RemoteSink, RemoteTimes, RemoteUrlError};
use crate::ship::sink::{Sink, SinkError};
use crate::ship::status::StatusCell;
use crate::ship::task::ShipTask;
use crate::tls::test_certificates::Authority;
use crate::tls::{EndpointFiles, client_config, server_config};
use afterimage_format::ids::Lsn;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

struct Site {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Site {
    async fn new(server: &EndpointFiles, ca: &Authority) -> Self {
        let tls = server_config(server, Some(&ca.file)).unwrap();
        Self {
            listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            acceptor: TlsAcceptor::from(tls),
        }
    }

    fn url(&self, host: &str) -> String {
        let port = self.listener.local_addr().unwrap().port();
        format!("afterimage://{host}:{port}")
    }

    async fn accept(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let (tcp, _) = self.listener.accept().await?;
        self.acceptor.accept(tcp).await
    }
}

fn sink(url: &str, files: &EndpointFiles, ca: &Authority, times: RemoteTimes) -> RemoteSink {
    let tls = client_config(files, &ca.file).unwrap();
    RemoteSink::new(url, tls, times).unwrap()
}

#[tokio::test]
async fn a_group_ships_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let site = Site::new(&ca.issue("server", &["localhost"], &[], false), &ca).await;
    let client = ca.issue("client", &[], &["afterimage://vm1"], false);
    let group = FakeGroup::new(&[512]);
    for at in 0..300 {
        group.preload(0, at, &block(at));
    }
    let status = StatusCell::new("tls");
    let task = ShipTask {
        port: group.clone() as Arc<dyn GroupPort>,
        sink: Arc::new(sink(
            &site.url("localhost"),
            &client,
            &ca,
            RemoteTimes::default(),
        )),
        source: Box::new(MemorySource::new(group.clone())),
        config: config(),
        status: status.clone(),
        jitter_seed: 1,
    };
    let task = tokio::spawn(task.run());
    let mut replica = Replica {
        url: Some(site.url("localhost")),
        ..Replica::default()
    };
    let mut peer = Peer::new(site.accept().await.unwrap());
    peer.greet(&mut replica).await;
    peer.serve(&mut replica, |r| r.completed != Lsn::ZERO).await;
    // Cut, and once more from where it was.
    drop(peer);
    group.write(0, 400, &block(1));
    let mut peer = Peer::new(site.accept().await.unwrap());
    peer.greet(&mut replica).await;
    let last = group.last();
    peer.serve(&mut replica, |r| r.cursor.lsn == last).await;
    flow::assert_same(&group, &replica);
    task.abort();
}

#[tokio::test]
async fn wrong_certificates_and_names_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let other = Authority::new(folder.path(), "other");
    let site = Site::new(&ca.issue("server", &["localhost"], &[], false), &ca).await;
    let client = ca.issue("client", &[], &["afterimage://vm1"], false);
    let stranger = other.issue("stranger", &[], &["afterimage://vm1"], false);
    let cases = [
        ("localhost", &client, &other, "a server of another CA"),
        ("127.0.0.1", &client, &ca, "a certificate for another name"),
        ("localhost", &stranger, &ca, "a client of another CA"),
    ];
    for (host, files, trusted, what) in cases {
        let sink = sink(&site.url(host), files, trusted, RemoteTimes::default());
        let accept = async { site.accept().await.map(drop) };
        let connect = async {
            // The server's refusal of a client certificate comes after the handshake.
            sink.connect().await?.ack().await.map(drop)
        };
        let (_, result) = tokio::join!(accept, connect);
        let error = result.unwrap_err();
        assert!(matches!(error, SinkError::Tls { .. }), "{what}: {error}");
    }
}

#[tokio::test]
async fn a_peer_that_never_answers_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let site = Site::new(&ca.issue("server", &["localhost"], &[], false), &ca).await;
    let client = ca.issue("client", &[], &["afterimage://vm1"], false);
    let times = RemoteTimes {
        connect: Duration::from_secs(60),
        silence: Duration::from_millis(300),
        keep_alive: Duration::from_millis(100),
    };
    let patient = sink(&site.url("localhost"), &client, &ca, times);
    let (connection, server) = tokio::join!(patient.connect(), site.accept());
    let mut connection = connection.unwrap();
    let error = connection.ack().await.unwrap_err();
    assert!(matches!(error, SinkError::Silent { .. }), "{error}");
    drop(server);
    // A TCP listener that never shakes hands.
    let hasty = RemoteTimes {
        connect: Duration::from_millis(200),
        ..times
    };
    let error = sink(&site.url("localhost"), &client, &ca, hasty)
        .connect()
        .await;
    let error = error.err().unwrap();
    assert!(
        matches!(
            error,
            SinkError::Silent {
                during: "connecting",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn urls_are_read_strictly() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let tls = client_config(&ca.issue("c", &["c"], &[], false), &ca.file).unwrap();
    let make = |url: &str| RemoteSink::new(url, tls.clone(), RemoteTimes::default());
    for (url, canonical) in [
        ("afterimage://dr.example", "afterimage://dr.example:9471"),
        ("afterimage://dr.example:1/", "afterimage://dr.example:1"),
        ("afterimage://[::1]:9", "afterimage://[::1]:9"),
        ("afterimage://10.0.0.1", "afterimage://10.0.0.1:9471"),
    ] {
        assert_eq!(make(url).unwrap().url(), canonical);
    }
    for url in [
        "dr.example",
        "http://x",
        "afterimage://",
        "afterimage://x:0",
        "afterimage://x:y",
        "afterimage://[::1",
    ] {
        assert!(matches!(make(url), Err(RemoteUrlError::Form(_))), "{url}");
    }
    assert!(matches!(
        make("afterimage://a b"),
        Err(RemoteUrlError::Host(_))
    ));
}

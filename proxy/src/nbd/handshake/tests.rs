//! What servers commonly get wrong in the handshake.

use super::{Connected, HandshakeError, OPTIONS_MAX, TlsPolicy, Watch, negotiate};
use crate::nbd::export::{Exports, Peer};
use crate::nbd::session::{ContextKind, MetaContext};
use crate::nbd::test_support::{Client, SIZE, TestExports, anybody, info, meta};
use crate::tls::test_certificates::Authority;
use crate::tls::{client_config, server_config};
use afterimage_format::nbd::constants::{info as item, opt, rep, transmission_flag as flag};
use afterimage_format::nbd::option::OptionHeader;
use afterimage_format::nbd::reply::ReplyForm;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

type Outcome = Result<Option<Connected<DuplexStream>>, HandshakeError>;

fn serve(
    exports: Arc<dyn Exports>,
    tls: TlsPolicy,
    peer: Peer,
) -> (DuplexStream, JoinHandle<Outcome>) {
    let (ours, theirs) = duplex(1 << 20);
    let server = tokio::spawn(async move {
        let mut outcome = negotiate(ours, peer, &tls, &Watch::default(), &*exports).await;
        if let Ok(Some(connected)) = &mut outcome {
            // As whoever serves it would.
            let answer = std::mem::take(&mut connected.negotiated.answer);
            connected.stream.write_all(&answer).await?;
            connected.stream.flush().await?;
        }
        outcome
    });
    (theirs, server)
}

async fn start() -> (Client<DuplexStream>, JoinHandle<Outcome>) {
    start_as(anybody()).await
}

async fn start_as(peer: Peer) -> (Client<DuplexStream>, JoinHandle<Outcome>) {
    let (stream, server) = serve(TestExports::new(), TlsPolicy::Off, peer);
    let client = Client::greet(stream, 3).await.expect("greeted");
    (client, server)
}

async fn opened(server: JoinHandle<Outcome>) -> Connected<DuplexStream> {
    let outcome = server.await.expect("no panic").expect("no error");
    outcome.expect("an export")
}

async fn failed(server: JoinHandle<Outcome>) -> HandshakeError {
    server.await.expect("no panic").expect_err("an error")
}

#[tokio::test]
async fn an_unknown_client_flag_closes_the_connection() {
    for flags in [4, 0x8000_0003, u32::MAX] {
        let (stream, server) = serve(TestExports::new(), TlsPolicy::Off, anybody());
        let mut client = Client::greet(stream, flags).await.expect("greeted");
        assert!(client.is_closed().await);
        let error = failed(server).await;
        assert!(matches!(error, HandshakeError::ClientFlags(_)), "{error}");
    }
}

#[tokio::test]
async fn a_malformed_option_gets_an_error_and_the_stream_stays_in_step() {
    let (mut client, server) = start().await;
    let mut long_name = info(&"x".repeat(5000), &[]);
    let nul = info("vm1/vda\0", &[]);
    let many = [&[0, 0, 0, 1, b'a'][..], &u32::MAX.to_be_bytes()].concat();
    let cases: &[(&str, u32, &[u8], u32)] = &[
        ("list with data", opt::LIST, b"x", rep::ERR_INVALID),
        ("STARTTLS with data", opt::STARTTLS, b"x", rep::ERR_INVALID),
        (
            "structured with data",
            opt::STRUCTURED_REPLY,
            b"xyz",
            rep::ERR_INVALID,
        ),
        (
            "extended with data",
            opt::EXTENDED_HEADERS,
            b"x",
            rep::ERR_INVALID,
        ),
        ("no data for GO", opt::GO, b"", rep::ERR_INVALID),
        (
            "a name beyond the end",
            opt::GO,
            &[0, 0, 1, 0, b'a'],
            rep::ERR_INVALID,
        ),
        (
            "too few items",
            opt::INFO,
            &[0, 0, 0, 0, 0, 9],
            rep::ERR_INVALID,
        ),
        (
            "left over",
            opt::INFO,
            &[0, 0, 0, 0, 0, 0, 7],
            rep::ERR_INVALID,
        ),
        ("an over-long name", opt::GO, &long_name, rep::ERR_INVALID),
        ("a NUL", opt::GO, &nul, rep::ERR_INVALID),
        (
            "queries that lie",
            opt::LIST_META_CONTEXT,
            &many,
            rep::ERR_INVALID,
        ),
        (
            "no data for meta",
            opt::SET_META_CONTEXT,
            b"",
            rep::ERR_INVALID,
        ),
        ("70 KiB", opt::INFO, &[0; 70 << 10], rep::ERR_TOO_BIG),
        ("an unknown option", 77, b"whatever", rep::ERR_UNSUP),
        ("PEEK_EXPORT", 4, b"", rep::ERR_UNSUP),
    ];
    for (what, option, data, kind) in cases {
        let last = client.last(*option, data).await.expect(what);
        assert_eq!(last, *kind, "{what}");
    }
    long_name.clear();
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    assert_eq!(opened(server).await.negotiated.export.name, "vm1/vda");
}

#[tokio::test]
async fn any_number_of_options_up_to_the_bound() {
    let (mut client, server) = start().await;
    for _ in 0..OPTIONS_MAX {
        assert_eq!(
            client.last(77, b"").await.expect("answered"),
            rep::ERR_UNSUP
        );
    }
    assert!(client.ask(77, b"").await.is_err());
    assert!(matches!(
        failed(server).await,
        HandshakeError::TooManyOptions
    ));
}

#[tokio::test]
async fn abort_gets_its_ack() {
    for data in [&b""[..], b"odd"] {
        let (mut client, server) = start().await;
        assert_eq!(
            client.last(opt::ABORT, data).await.expect("answered"),
            rep::ACK
        );
        assert!(client.is_closed().await);
        assert!(server.await.expect("no panic").expect("no error").is_none());
    }
}

#[tokio::test]
async fn a_stream_out_of_step_is_dropped() {
    let (mut client, server) = start().await;
    client.stream.write_all(&[7; 16]).await.expect("sent");
    assert!(client.is_closed().await);
    assert!(matches!(failed(server).await, HandshakeError::Option(_)));
}

#[tokio::test]
async fn information_is_complete_and_the_same_for_every_connection() {
    let mut all = Vec::new();
    for _ in 0..2 {
        let (mut client, server) = start().await;
        let items = [item::NAME, item::DESCRIPTION, item::BLOCK_SIZE, 99];
        let query = info("vm1/vda", &items);
        let told = client.ask(opt::INFO, &query).await.expect("answered");
        assert_eq!(told, client.ask(opt::GO, &query).await.expect("answered"));
        all.push(told);
        opened(server).await;
    }
    assert_eq!(all[0], all[1]);
    let told: Vec<&[u8]> = all[0].iter().map(|(_, data)| &data[..]).collect();
    let flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE
        | flag::SEND_FAST_ZERO;
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
    assert_eq!(told[0], export);
    assert_eq!(told[1], b"\0\x01vm1/vda");
    assert_eq!(told[2], b"\0\x02a disk");
    assert_eq!(told[3], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!((all[0][4].0, told[4]), (rep::ACK, &b""[..]));
}

#[tokio::test]
async fn flags_say_what_is_true() {
    let (mut client, server) = start().await;
    assert_eq!(
        client
            .last(opt::STRUCTURED_REPLY, b"")
            .await
            .expect("answered"),
        rep::ACK
    );
    assert_eq!(
        client.go("vm2@latest/vda").await.expect("answered"),
        rep::ACK
    );
    let negotiated = opened(server).await.negotiated;
    assert_eq!(negotiated.form, ReplyForm::Structured);
    let flags = negotiated.export.flags(negotiated.form);
    assert_ne!(flags & flag::READ_ONLY, 0);
    assert_ne!(flags & flag::SEND_DF, 0);
    let writes = flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::ROTATIONAL;
    assert_eq!(flags & writes, 0);
}

#[tokio::test]
async fn export_name_is_answered_with_and_without_padding() {
    for (flags, bytes) in [(0, 134), (1, 134), (2, 10), (3, 10)] {
        let (stream, server) = serve(TestExports::new(), TlsPolicy::Off, anybody());
        let mut client = Client::greet(stream, flags).await.expect("greeted");
        client
            .say(opt::EXPORT_NAME, 7, b"vm1/vda")
            .await
            .expect("sent");
        let mut answer = vec![0; bytes];
        client
            .stream
            .read_exact(&mut answer)
            .await
            .expect("answered");
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        assert!(answer[10..].iter().all(|b| *b == 0));
        drop(client);
        let mut connected = opened(server).await;
        let mut rest = Vec::new();
        connected
            .stream
            .read_to_end(&mut rest)
            .await
            .expect("closed");
        assert!(rest.is_empty());
    }
}

#[tokio::test]
async fn without_fixed_newstyle_there_is_only_export_name() {
    let (stream, server) = serve(TestExports::new(), TlsPolicy::Off, anybody());
    let mut client = Client::greet(stream, 0).await.expect("greeted");
    assert!(client.ask(opt::LIST, b"").await.is_err());
    assert!(matches!(failed(server).await, HandshakeError::NotFixed(_)));
}

#[tokio::test]
async fn names_that_lead_nowhere() {
    let (mut client, server) = start().await;
    for (name, kind) in [
        ("vm9/vda", rep::ERR_UNKNOWN),
        ("../../etc/passwd", rep::ERR_UNKNOWN),
        ("", rep::ERR_UNKNOWN),
        ("vm1/broken", rep::ERR_SHUTDOWN),
    ] {
        assert_eq!(client.go(name).await.expect("answered"), kind, "{name:?}");
    }
    client
        .say(opt::EXPORT_NAME, 4, b"vm9/")
        .await
        .expect("sent");
    assert!(client.is_closed().await);
    assert!(matches!(
        failed(server).await,
        HandshakeError::ExportName { .. }
    ));
    let (mut client, server) = start().await;
    client
        .say(opt::EXPORT_NAME, 1 << 30, b"")
        .await
        .expect("sent");
    assert!(client.is_closed().await);
    assert!(matches!(failed(server).await, HandshakeError::Option(_)));
}

#[tokio::test]
async fn a_listener_for_one_group_hides_the_others() {
    let limited = Peer {
        groups: Some(Arc::new(["vm2".into()])),
        ..anybody()
    };
    let (mut client, server) = start_as(limited.clone()).await;
    let listed = client.ask(opt::LIST, b"").await.expect("answered");
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].1, b"\0\0\0\x0evm2@latest/vdaa disk");
    for name in ["vm1/vda", "vm1/no-such-disk", "vm22/vda"] {
        assert_eq!(client.go(name).await.expect("answered"), rep::ERR_POLICY);
    }
    // The empty name is the only export there is for this client, under its real name.
    let told = client.ask(opt::GO, &info("", &[])).await.expect("answered");
    assert_eq!(told[1].1, b"\0\x01vm2@latest/vda");
    opened(server).await;
    let (mut client, server) = start_as(limited).await;
    client
        .say(opt::EXPORT_NAME, 7, b"vm1/vda")
        .await
        .expect("sent");
    assert!(client.is_closed().await);
    assert!(matches!(
        failed(server).await,
        HandshakeError::ExportName { .. }
    ));
}

#[tokio::test(start_paused = true)]
async fn go_and_export_name_wait_for_what_dead_connections_left() {
    let exports = TestExports::new();
    exports.quiet.forget_permits(1000);
    let (stream, server) = serve(exports.clone(), TlsPolicy::Off, anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    client
        .last(opt::INFO, &info("vm1/vda", &[]))
        .await
        .expect("INFO does not wait");
    let query = info("vm1/vda", &[]);
    client
        .say(opt::GO, query.len() as u32, &query)
        .await
        .expect("sent");
    tokio::task::yield_now().await;
    let early = tokio::time::timeout(Duration::from_millis(20), client.stream.read_u8()).await;
    assert!(
        early.is_err(),
        "no answer before the old requests are done with"
    );
    exports.quiet.add_permits(1);
    opened(server).await;
    assert_eq!(
        *exports.calls.lock().expect("no panic"),
        ["open vm1/vda", "open vm1/vda", "quiesce vm1/vda"]
    );
}

#[tokio::test(start_paused = true)]
async fn half_open_handshakes_end_at_the_deadline_and_waiting_for_the_server_does_not_count() {
    let steps: [&[u8]; 4] = [b"", &[0, 0], &[0, 0, 0, 3, b'I'], &[0, 0, 0, 3]];
    for said in steps {
        let (mut stream, server) = serve(TestExports::new(), TlsPolicy::Off, anybody());
        stream.write_all(said).await.expect("sent");
        assert!(matches!(failed(server).await, HandshakeError::Deadline));
    }
    let exports = TestExports::new();
    exports.quiet.forget_permits(1000);
    let (stream, server) = serve(exports.clone(), TlsPolicy::Off, anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    let release = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        exports.quiet.add_permits(1);
    });
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    opened(server).await;
    release.await.expect("no panic");
    // A client that never stops asking runs out of time, too.
    let (mut client, server) = start().await;
    while client.ask(77, b"").await.is_ok() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(matches!(failed(server).await, HandshakeError::Deadline));
}

#[tokio::test]
async fn structured_replies_and_extended_headers_are_agreed_once() {
    let (mut client, server) = start().await;
    let mut last = async |option| client.last(option, b"").await.expect("answered");
    assert_eq!(last(opt::STRUCTURED_REPLY).await, rep::ACK);
    assert_eq!(last(opt::STRUCTURED_REPLY).await, rep::ERR_INVALID);
    assert_eq!(last(opt::EXTENDED_HEADERS).await, rep::ACK);
    assert_eq!(last(opt::EXTENDED_HEADERS).await, rep::ERR_INVALID);
    assert_eq!(last(opt::STRUCTURED_REPLY).await, rep::ERR_EXT_HEADER_REQD);
    client.go("vm1/vda").await.expect("answered");
    assert_eq!(opened(server).await.negotiated.form, ReplyForm::Extended);
}

#[tokio::test]
async fn metadata_contexts_are_listed_selected_and_bound_to_their_export() {
    let allocation = "base:allocation";
    let (mut client, server) = start().await;
    for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        let query = meta("vm1/vda", &[allocation]);
        let last = client.last(option, &query).await.expect("answered");
        assert_eq!(last, rep::ERR_INVALID, "structured replies first");
    }
    client
        .last(opt::STRUCTURED_REPLY, b"")
        .await
        .expect("answered");
    let mut names = async |option, name, queries: &[&str]| {
        let told = client
            .ask(option, &meta(name, queries))
            .await
            .expect("answered");
        told.iter()
            .map(|(_, data)| {
                String::from_utf8_lossy(data.get(4..).unwrap_or_default()).into_owned()
            })
            .filter(|name| !name.is_empty())
            .collect::<Vec<_>>()
    };
    let (list, set) = (opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT);
    let both = ["base:allocation", "afterimage:dirty"];
    assert_eq!(names(list, "vm1/vda", &[]).await, both);
    assert_eq!(names(list, "vm2@latest/vda", &[]).await, both[..1]);
    assert_eq!(names(list, "vm1/vda", &["base:"]).await, both[..1]);
    assert_eq!(names(list, "vm1/vda", &["other:x", "odd"]).await, [""; 0]);
    assert_eq!(names(set, "vm1/vda", &[]).await, [""; 0]);
    assert_eq!(names(set, "vm1/vda", &["base:", "qemu:x"]).await, [""; 0]);
    assert_eq!(names(set, "vm1/vda", &[both[1], both[0]]).await, both);
    client.go("vm1/vda").await.expect("answered");
    let context = |id, kind| MetaContext { id, kind };
    assert_eq!(
        opened(server).await.negotiated.contexts,
        [
            context(1, ContextKind::Allocation),
            context(2, ContextKind::Dirty)
        ]
    );
    // For another export, or after a selection that failed, there are none.
    for (name, spoil) in [("vm1/vdb", false), ("vm1/vda", true)] {
        let (mut client, server) = start().await;
        client
            .last(opt::STRUCTURED_REPLY, b"")
            .await
            .expect("answered");
        client
            .last(set, &meta("vm1/vda", &both))
            .await
            .expect("answered");
        if spoil {
            client.last(set, b"x").await.expect("answered");
        }
        client.go(name).await.expect("answered");
        assert_eq!(opened(server).await.negotiated.contexts, []);
    }
}

struct Certificates {
    _folder: tempfile::TempDir,
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

/// A server that demands certificates, and a client for group vm1.
fn certificates() -> Certificates {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    let server = ca.issue("server", &["nbd.test"], &[], false);
    let client = ca.issue("client", &[], &["afterimage://vm1"], false);
    Certificates {
        server: server_config(&server, Some(&ca.file)).expect("a configuration"),
        client: client_config(&client, &ca.file).expect("a configuration"),
        _folder: folder,
    }
}

#[tokio::test]
async fn forced_tls_answers_everything_else_with_tls_reqd() {
    let certificates = certificates();
    let forced = || TlsPolicy::Forced(certificates.server.clone());
    let (stream, server) = serve(TestExports::new(), forced(), anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    for (option, data) in [
        (opt::LIST, Vec::new()),
        (opt::LIST, b"bad".to_vec()),
        (opt::INFO, info("vm1/vda", &[])),
        (opt::GO, info("vm1/vda", &[])),
        (opt::STRUCTURED_REPLY, Vec::new()),
        (opt::SET_META_CONTEXT, meta("vm1/vda", &[])),
        (opt::EXTENDED_HEADERS, Vec::new()),
        (77, vec![0; 100_000]),
    ] {
        let last = client.last(option, &data).await.expect("answered");
        assert_eq!(last, rep::ERR_TLS_REQD, "option {option}");
    }
    let last = client.last(opt::STARTTLS, b"data").await.expect("answered");
    assert_eq!(last, rep::ERR_INVALID);
    assert_eq!(
        client.last(opt::ABORT, b"").await.expect("answered"),
        rep::ACK
    );
    assert!(server.await.expect("no panic").expect("no error").is_none());

    let (stream, server) = serve(TestExports::new(), forced(), anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    client
        .say(opt::EXPORT_NAME, 7, b"vm1/vda")
        .await
        .expect("sent");
    assert!(client.is_closed().await);
    assert!(matches!(failed(server).await, HandshakeError::TlsRequired));
}

#[tokio::test]
async fn no_choice_survives_starttls_and_the_certificate_decides() {
    let certificates = certificates();
    let offered = TlsPolicy::Offered(certificates.server.clone());
    let (stream, server) = serve(TestExports::new(), offered, anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    client
        .last(opt::STRUCTURED_REPLY, b"")
        .await
        .expect("answered");
    let query = meta("vm1/vda", &["base:allocation"]);
    client
        .last(opt::SET_META_CONTEXT, &query)
        .await
        .expect("answered");
    assert_eq!(
        client.last(opt::STARTTLS, b"").await.expect("answered"),
        rep::ACK
    );
    let connector = TlsConnector::from(certificates.client.clone());
    let name = "nbd.test".try_into().expect("a name");
    let stream = connector.connect(name, client.stream).await.expect("TLS");
    let mut client = Client { stream };
    assert_eq!(
        client.last(opt::STARTTLS, b"").await.expect("answered"),
        rep::ERR_INVALID
    );
    let last = client
        .last(opt::SET_META_CONTEXT, &query)
        .await
        .expect("answered");
    assert_eq!(last, rep::ERR_INVALID, "structured replies are forgotten");
    assert_eq!(
        client.go("vm2@latest/vda").await.expect("answered"),
        rep::ERR_POLICY
    );
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    let connected = opened(server).await;
    assert_eq!(connected.negotiated.form, ReplyForm::Simple);
    assert!(connected.negotiated.contexts.is_empty());
    assert!(connected.peer.tls && connected.peer.identity.is_some());
}

#[tokio::test]
async fn what_comes_in_the_clear_after_starttls_is_never_obeyed() {
    let certificates = certificates();
    let offered = TlsPolicy::Offered(certificates.server.clone());
    let (stream, server) = serve(TestExports::new(), offered, anybody());
    let mut client = Client::greet(stream, 3).await.expect("greeted");
    let mut injected = Vec::new();
    for option in [opt::STARTTLS, opt::STRUCTURED_REPLY] {
        OptionHeader { option, length: 0 }.encode(&mut injected);
    }
    client.stream.write_all(&injected).await.expect("sent");
    assert!(matches!(failed(server).await, HandshakeError::Tls(_)));
    // Without TLS configured STARTTLS is refused, and the connection goes on.
    let (mut client, server) = start().await;
    assert_eq!(
        client.last(opt::STARTTLS, b"").await.expect("answered"),
        rep::ERR_POLICY
    );
    assert_eq!(client.go("vm1/vda").await.expect("answered"), rep::ACK);
    opened(server).await;
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(info("vm1/vda", &[0, 3])),
        Just(meta("vm1/vda", &["base:allocation"])),
    ];
    (0u32..14, data, proptest::option::weighted(0.1, 0u32..100)).prop_map(|(option, data, lie)| {
        let mut out = Vec::new();
        let length = lie.unwrap_or(data.len() as u32);
        OptionHeader { option, length }.encode(&mut out);
        out.extend_from_slice(&data);
        out
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a client says, the server ends without a panic and answers no more options than
    /// there were.
    #[test]
    fn noise_is_survived(
        flags in prop_oneof![Just(3u32), Just(1), any::<u32>()],
        options in proptest::collection::vec(any_option(), 0..20),
        noise in proptest::collection::vec(any::<u8>(), 0..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(async {
            let (mut stream, server) = serve(TestExports::new(), TlsPolicy::Off, anybody());
            let said = [&flags.to_be_bytes()[..], &options.concat(), &noise].concat();
            stream.write_all(&said).await.expect("room");
            stream.shutdown().await.expect("closed");
            drop(server.await.expect("no panic"));
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await.expect("an end");
            assert!(heard.len() < 18 + 4000 * 20);
        });
    }
}

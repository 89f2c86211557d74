//! One peer that stalls or trickles, and the others; over streams in memory.

use std::sync::Arc;
use std::time::Duration;

use afterimage_format::wire::{Ack, ErrorCode, HelloReply, Message, MessageKind};
use afterimage_proxy::ship::codec::{CodecError, read_message, write_message};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio_util::sync::CancellationToken;

use super::super::room::OWN_BYTES;
use super::super::{Conversation, Peer, Receiver, ServerLimits};
use crate::repository::Repository;
use crate::testing::primary::Primary;

const LONG: Duration = Duration::from_secs(600);

/// Room for one segment of those that need some.
fn limits() -> ServerLimits {
    ServerLimits {
        pending_bytes_max: 2 * OWN_BYTES,
        handshake: LONG,
        silence: LONG,
        keep_alive: LONG,
        patience: LONG,
        ..ServerLimits::default()
    }
}

fn replica(limits: ServerLimits) -> Conversation {
    Conversation::new(
        Receiver::new(Repository::in_memory()),
        limits,
        Arc::new(|| 1),
    )
}

fn connect(replica: &Conversation) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    let replica = replica.clone();
    tokio::spawn(async move {
        let stop = CancellationToken::new();
        replica.run(theirs, &Peer::Direct, stop).await;
    });
    ours
}

async fn send(stream: &mut DuplexStream, message: &Message) {
    write_message(stream, message, LONG).await.expect("sent");
}

async fn next(stream: &mut DuplexStream) -> Result<Message, CodecError> {
    read_message(stream, LONG).await
}

/// An open session in which nothing has been sent yet.
async fn session(replica: &Conversation, primary: &mut Primary) -> DuplexStream {
    let mut stream = connect(replica);
    loop {
        send(&mut stream, &Message::Hello(primary.hello())).await;
        match next(&mut stream).await.expect("an answer") {
            Message::HelloReply(HelloReply::NewEpoch(epoch)) => primary.epoch = epoch,
            Message::HelloReply(HelloReply::Resume(_)) => return stream,
            other => panic!("{other:?}"),
        }
    }
}

/// The first segment of a primary, one that needs room.
fn large_segment(primary: &mut Primary) -> Message {
    let begin = primary.pass_begin(true);
    for _ in 0..10 {
        primary.write(0, 0, 30);
    }
    let segment = primary.segment(begin, primary.last());
    assert!(segment.len() > OWN_BYTES, "{} bytes", segment.len());
    Message::Segment(segment)
}

async fn acknowledged(stream: &mut DuplexStream) -> Ack {
    loop {
        match next(stream).await.expect("an answer") {
            Message::KeepAlive => {}
            Message::Ack(ack) => return ack,
            other => panic!("{other:?}"),
        }
    }
}

/// Header of a segment that takes up all the room, and a byte of it.
async fn announce(stream: &mut DuplexStream) {
    let mut bytes = [MessageKind::Segment as u8, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[4..8].copy_from_slice(&(2 * OWN_BYTES as u32).to_le_bytes());
    stream.write_all(&bytes).await.expect("sent");
}

#[tokio::test]
async fn a_peer_that_trickles_keeps_no_other_waiting() {
    let replica = replica(ServerLimits {
        patience: Duration::from_millis(20),
        ..limits()
    });
    let (mut slow, mut good) = (Primary::new(1), Primary::new(2));
    let mut trickling = session(&replica, &mut slow).await;
    announce(&mut trickling).await;
    let mut stream = session(&replica, &mut good).await;
    let segment = large_segment(&mut good);
    let works = async {
        send(&mut stream, &segment).await;
        acknowledged(&mut stream).await
    };
    // Never enough to complete what it announced.
    let trickles = async {
        for _ in 0..OWN_BYTES / 2 {
            if trickling.write_all(&[0]).await.is_err() {
                return next(&mut trickling).await;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("nobody cuts it off");
    };
    let (ack, told) = tokio::join!(works, trickles);
    assert_eq!(ack.cursor.lsn.0, good.last());
    let busy = matches!(&told, Ok(Message::Error(error)) if error.code == ErrorCode::Busy);
    assert!(busy, "{told:?}");
}

#[tokio::test]
async fn segments_wait_for_room_and_small_ones_do_not() {
    let replica = replica(ServerLimits {
        keep_alive: Duration::from_millis(5),
        ..limits()
    });
    let (mut slow, mut large, mut small) = (Primary::new(1), Primary::new(2), Primary::new(3));
    let mut holding = session(&replica, &mut slow).await;
    announce(&mut holding).await;
    let mut waiting = session(&replica, &mut large).await;
    let segment = large_segment(&mut large);
    send(&mut waiting, &segment).await;
    let mut stream = session(&replica, &mut small).await;
    let begin = small.pass_begin(true);
    send(&mut stream, &Message::Segment(small.segment(begin, begin))).await;
    assert_eq!(acknowledged(&mut stream).await.cursor.lsn.0, begin);
    for _ in 0..20 {
        let sign = next(&mut waiting).await.expect("a sign of life");
        assert_eq!(sign, Message::KeepAlive);
    }
    drop(holding);
    assert_eq!(acknowledged(&mut waiting).await.cursor.lsn.0, large.last());
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_dropped() {
    let brief = Duration::from_millis(20);
    // Before its hello.
    let hasty = replica(ServerLimits {
        handshake: brief,
        ..limits()
    });
    let mut stream = connect(&hasty);
    let told = next(&mut stream).await;
    let late = matches!(&told, Ok(Message::Error(error)) if error.code == ErrorCode::Protocol);
    assert!(late, "{told:?}");
    assert!(matches!(next(&mut stream).await, Err(CodecError::Closed)));
    // In a session, and within a segment.
    let strict = replica(ServerLimits {
        silence: brief,
        ..limits()
    });
    for within in [false, true] {
        let mut stream = session(&strict, &mut Primary::new(1)).await;
        if within {
            announce(&mut stream).await;
        }
        let told = next(&mut stream).await;
        assert!(matches!(told, Err(CodecError::Closed)), "{told:?}");
    }
}

#[tokio::test]
async fn a_segment_before_the_hello_is_not_read() {
    let replica = replica(limits());
    let mut stream = connect(&replica);
    announce(&mut stream).await;
    let told = next(&mut stream).await;
    let refused = matches!(&told, Ok(Message::Error(error)) if error.code == ErrorCode::Protocol);
    assert!(refused, "{told:?}");
}

//! Round trips, every cut, leftovers, limits.

use super::*;
use crate::chain::RecordChain;
use crate::ids::{DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::manifest::DiskEntry;
use crate::segment::{SEGMENT_BYTES_MAX, SinkId};
use bytes::Bytes;
use proptest::prelude::*;

pub(super) fn hello() -> Hello {
    Hello {
        group: GroupId::from_bytes([0x11; 16]),
        name: "vm1".to_owned(),
        sink: SinkId([0x55; 16]),
        epoch: Epoch(3),
        log: LogId::from_bytes([0x22; 16]),
        demands_epoch: true,
        acked: cursor(),
        disks: vec![DiskEntry {
            disk: DiskId::from_bytes([0x77; 16]),
            name: "vda".to_owned(),
            size_bytes: 10 << 30,
        }],
    }
}

fn cursor() -> Cursor {
    Cursor {
        lsn: Lsn(0x0102),
        chain: RecordChain([0x33; 32]),
    }
}

pub(super) fn pass() -> ActivePass {
    ActivePass {
        begin: Lsn(7),
        next_disk: DiskIndex(1),
        next_block: 0x0304,
        blocks: 0x0506,
        chain: RecordChain([0x44; 32]),
    }
}

pub(super) fn messages() -> Vec<Message> {
    let resume = Resume {
        epoch: Epoch(3),
        cursor: cursor(),
        completed_pass: Lsn(5),
        active_pass: None,
    };
    let ack = Ack {
        segments: 9,
        cursor: cursor(),
        completed_pass: Lsn::ZERO,
        active_pass: Some(pass()),
        comparisons: Comparisons {
            finished: Compared {
                run: 8,
                ranges: 3,
                blocks: 700,
                mismatched_blocks: 2,
                skipped: 1,
                total: 4,
            },
            current: Compared {
                run: 9,
                ranges: 1,
                blocks: 256,
                ..Compared::default()
            },
            looked: Lsn(0x0708),
        },
    };
    vec![
        Message::Hello(hello()),
        Message::HelloReply(HelloReply::Resume(resume)),
        Message::HelloReply(HelloReply::Resume(Resume {
            active_pass: Some(pass()),
            ..resume
        })),
        Message::HelloReply(HelloReply::NewEpoch(Epoch(4))),
        Message::Ack(ack),
        Message::Ack(Ack {
            active_pass: None,
            comparisons: Comparisons::default(),
            ..ack
        }),
        Message::KeepAlive,
        Message::Error(RemoteError {
            code: ErrorCode::Fenced,
            text: "epoch 4 exists".to_owned(),
        }),
        Message::Error(RemoteError {
            code: ErrorCode::Other(900),
            text: String::new(),
        }),
        Message::Segment(Bytes::from_static(b"opaque here")),
    ]
}

#[test]
fn messages_come_back() {
    for message in messages() {
        let (header, body) = message.encode();
        assert_eq!(FrameHeader::decode(header.encode()), Ok(header));
        assert_eq!(header.body_len as usize, body.len());
        assert_eq!(Message::decode(header.kind, body), Ok(message));
    }
}

/// What comes after the highest would begin again at zero.
#[test]
fn numbers_that_have_none_after_them_are_refused() {
    let cursor = |lsn| Cursor { lsn, ..cursor() };
    let hello = |epoch, acked| {
        Message::Hello(Hello {
            epoch,
            acked,
            ..hello()
        })
    };
    let reply = |epoch| Message::HelloReply(HelloReply::NewEpoch(epoch));
    let ack = |lsn| {
        Message::Ack(Ack {
            segments: 1,
            cursor: cursor(lsn),
            completed_pass: Lsn(1),
            active_pass: None,
            comparisons: Comparisons::default(),
        })
    };
    let comes_back = |message: Message| {
        let (header, body) = message.encode();
        Message::decode(header.kind, body).is_ok()
    };
    let (epoch, lsn) = (Epoch(Epoch::MAX.0 + 1), Lsn(u64::MAX));
    assert!(comes_back(hello(Epoch::MAX, cursor(Lsn::MAX))));
    assert!(!comes_back(hello(epoch, cursor(Lsn::MAX))));
    assert!(!comes_back(hello(Epoch::MAX, cursor(lsn))));
    assert!(comes_back(reply(Epoch::MAX)) && !comes_back(reply(epoch)));
    assert!(comes_back(ack(Lsn::MAX)) && !comes_back(ack(lsn)));
}

#[test]
fn every_cut_and_every_leftover_is_refused() {
    for message in messages() {
        let (header, body) = message.encode();
        if header.kind == MessageKind::Segment {
            continue;
        }
        for len in 0..body.len() {
            let cut = Message::decode(header.kind, body.slice(..len));
            assert!(cut.is_err(), "{message:?} cut at {len}: {cut:?}");
        }
        let longer = Bytes::from([&body[..], &[0]].concat());
        assert!(Message::decode(header.kind, longer).is_err(), "{message:?}");
    }
}

#[test]
fn lengths_are_checked_before_the_body() {
    for message in messages() {
        let (header, _) = message.encode();
        let limit = header.kind.body_bytes_max() as u32;
        let frame = |body_len| FrameHeader { body_len, ..header }.encode();
        assert!(FrameHeader::decode(frame(limit)).is_ok());
        let error = FrameHeader::decode(frame(limit + 1)).unwrap_err();
        assert!(matches!(error, WireError::TooLong { .. }), "{error}");
    }
    let too_long = Bytes::from(vec![0; SEGMENT_BYTES_MAX + 1]);
    assert!(Message::decode(MessageKind::Segment, too_long).is_err());
}

#[test]
fn strangers_are_named() {
    assert_eq!(FrameHeader::decode([0; 8]), Err(WireError::Kind(0)));
    assert_eq!(
        FrameHeader::decode(*b"GET / HT"),
        Err(WireError::Kind(b'G'))
    );
    assert_eq!(
        FrameHeader::decode([5, 0, 1, 0, 0, 0, 0, 0]),
        Err(WireError::Reserved)
    );
    let (_, body) = Message::Hello(hello()).encode();
    let with = |at: usize, value: u8| {
        let mut bytes = body.to_vec();
        bytes[at] = value;
        Message::decode(MessageKind::Hello, bytes.into())
    };
    assert_eq!(with(0, b'X'), Err(WireError::Magic));
    assert_eq!(with(8, 2), Err(WireError::Version(2)));
    assert_eq!(with(10, 3), Err(WireError::Reserved));
}

#[test]
fn names_that_leave_a_folder_are_refused() {
    for name in ["../x", "a/b", "a\0b", "", "-x"] {
        let evil = Message::Hello(Hello {
            name: name.to_owned(),
            ..hello()
        });
        let (header, body) = evil.encode();
        assert!(Message::decode(header.kind, body).is_err(), "{name:?}");
    }
}

#[test]
fn long_error_texts_are_cut_at_a_character() {
    let text = "ä".repeat(2000);
    let (header, body) = Message::Error(RemoteError {
        code: ErrorCode::Busy,
        text,
    })
    .encode();
    let Ok(Message::Error(error)) = Message::decode(header.kind, body) else {
        panic!("an error")
    };
    assert_eq!(error.text, "ä".repeat(512));
}

#[test]
fn error_codes_are_fixed() {
    let codes = [
        (1, ErrorCode::Protocol),
        (2, ErrorCode::Version),
        (3, ErrorCode::NotPermitted),
        (4, ErrorCode::Identity),
        (5, ErrorCode::Fenced),
        (6, ErrorCode::Gap),
        (7, ErrorCode::Diverged),
        (8, ErrorCode::BadSegment),
        (9, ErrorCode::PassMismatch),
        (10, ErrorCode::Storage),
        (11, ErrorCode::Superseded),
        (12, ErrorCode::ShuttingDown),
        (13, ErrorCode::Disks),
        (14, ErrorCode::Busy),
    ];
    for (number, code) in codes {
        assert_eq!(code.number(), number);
    }
}

proptest! {
    #[test]
    fn noise_does_no_harm(kind in 0u8..8, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Ok(header) = FrameHeader::decode([kind, 0, 0, 0, 0, 0, 0, 0])
            && let Ok(message) = Message::decode(header.kind, bytes.into())
        {
            // What is accepted is said again with the same bytes or fewer: nothing is made up.
            let (header, body) = message.encode();
            prop_assert_eq!(Message::decode(header.kind, body), Ok(message));
        }
    }

    #[test]
    fn changed_messages_do_no_harm(
        which in 0usize..10,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (header, body) = messages().swap_remove(which).encode();
        let mut bytes = body.to_vec();
        for (at, value) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        if let Ok(message) = Message::decode(header.kind, bytes.into()) {
            let (header, body) = message.encode();
            prop_assert_eq!(Message::decode(header.kind, body), Ok(message));
        }
    }
}

/// The bytes of protocol version 1: the other side may run another release.
#[test]
fn golden_bytes() {
    let files = [
        include_str!("../../golden/wire-hello-v1.hex"),
        include_str!("../../golden/wire-reply-resume-v1.hex"),
        include_str!("../../golden/wire-reply-resume-pass-v1.hex"),
        include_str!("../../golden/wire-reply-epoch-v1.hex"),
        include_str!("../../golden/wire-ack-pass-v1.hex"),
        include_str!("../../golden/wire-ack-v1.hex"),
        include_str!("../../golden/wire-keep-alive-v1.hex"),
        include_str!("../../golden/wire-error-v1.hex"),
    ];
    for (message, file) in messages().into_iter().zip(files) {
        let bytes = crate::golden::golden(file);
        let (header, body) = message.encode();
        assert_eq!(
            [&header.encode()[..], &body[..]].concat(),
            bytes,
            "{message:?}"
        );
        let (head, body) = bytes.split_first_chunk().unwrap();
        let header = FrameHeader::decode(*head).unwrap();
        let body = Bytes::copy_from_slice(body);
        assert_eq!(Message::decode(header.kind, body), Ok(message));
    }
}

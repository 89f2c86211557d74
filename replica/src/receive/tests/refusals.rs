//! What must be refused, and that nothing of it is stored.

use afterimage_format::chain::RecordChain;
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{GroupId, Lsn};
use afterimage_format::manifest::NameBinding;
use afterimage_format::op::Op;
use afterimage_format::segment::{SegmentError, SegmentKind};
use afterimage_proxy::tls::Identity;
use bytes::Bytes;
use futures::executor::block_on;

use super::super::{IngestError, Peer, Receiver, Verified};
use super::{base, compare};
use crate::group::{Group, GroupError};
use crate::history::Refusal;
use crate::repository::{Repository, keys};
use crate::testing::primary::{BLOCKS, Primary};

#[test]
fn every_flipped_byte_is_noticed() {
    let mut primary = Primary::new(1);
    primary.epoch = afterimage_format::ids::Epoch(1);
    // Six chunks: only the one with the checkpoint is read for more than its checksum.
    for (disk, first) in [(0, 0), (1, 0), (0, 5)] {
        primary.write(disk, first, 30);
    }
    primary.checkpoint("x");
    let good = primary.segment(1, 4);
    let chunks = Verified::check(good.clone())
        .expect("good")
        .index()
        .chunks
        .len();
    assert_eq!(chunks, 6);
    let step = (good.len() / 997).max(1);
    for at in (0..good.len())
        .step_by(step)
        .chain(0..256)
        .chain(good.len() - 600..good.len())
    {
        let mut bad = good.to_vec();
        bad[at] ^= 0x10;
        let checked = Verified::check(Bytes::from(bad));
        assert!(matches!(checked, Err(IngestError::Segment(_))), "byte {at}");
    }
    for len in (0..good.len()).step_by(step) {
        assert!(Verified::check(good.slice(..len)).is_err(), "{len} bytes");
    }
    let mut longer = good.to_vec();
    longer.push(0);
    assert!(Verified::check(longer.into()).is_err());
}

/// The segment with its first chunk replaced by one of the same stored length that unpacks to far more
/// than its table says. All checksums and hashes are right.
fn with_a_bomb(good: &[u8]) -> Bytes {
    const FOOTER: usize = 128;
    const ZSTD: u8 = 1;
    const UNPACKED: usize = 16 << 20;
    let number = |bytes: &[u8], at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
    };
    let mut bad = good.to_vec();
    let footer = bad.len() - FOOTER;
    let (index, table) = (number(&bad, footer + 16), number(&bad, footer + 24));
    let (start, len) = (number(&bad, table), number(&bad, table + 8));
    let mut bomb = zstd::bulk::compress(&vec![0; UNPACKED], 19).expect("compressed");
    // A frame that decoders skip fills what is left.
    let left = len.checked_sub(bomb.len() + 8).expect("the bomb fits");
    bomb.extend(0x184D_2A50_u32.to_le_bytes());
    bomb.extend((left as u32).to_le_bytes());
    bomb.resize(len, 0);
    bad[start..start + len].copy_from_slice(&bomb);
    bad[table + 16..table + 20].copy_from_slice(&crc32c(&bomb).to_le_bytes());
    bad[table + 20] = ZSTD;
    let index_hash = *blake3::hash(&bad[index..footer]).as_bytes();
    bad[footer + 48..footer + 80].copy_from_slice(&index_hash);
    let content_hash = *blake3::hash(&bad[..footer]).as_bytes();
    bad[footer + 80..footer + 112].copy_from_slice(&content_hash);
    let crc = crc32c(&bad[footer..footer + FOOTER - 4]).to_le_bytes();
    bad[footer + FOOTER - 4..].copy_from_slice(&crc);
    bad.into()
}

#[test]
fn a_zstd_bomb_is_refused_and_nothing_of_it_is_stored() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (mut primary, mut session) = base(&receiver, 1).await;
        let lsn = primary.write(0, 0, 20);
        let good = primary.segment(lsn, lsn);
        let below = keys::group(primary.group);
        let before = repository.names_below(&below).await.expect("listed");
        let refused = session.give(with_a_bomb(&good)).await;
        assert!(
            matches!(
                refused,
                Err(IngestError::Segment(SegmentError::ChunkContent(0)))
            ),
            "{refused:?}"
        );
        let after = repository.names_below(&below).await.expect("listed");
        assert_eq!(before, after);
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        session.give(good).await.expect("the good one is taken");
        assert!(compare(&repository, &primary) >= 1);
    });
}

#[test]
fn gaps_must_be_declared_and_begin_with_a_pass() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (mut primary, mut session) = base(&receiver, 1).await;
        let before = primary.last();
        primary.write(0, 0, 1);
        let lost = primary.write(0, 1, 1);
        let gap = session.give(primary.segment(lost, lost)).await;
        let expected = Refusal::Gap {
            first: Lsn(lost),
            cursor: Lsn(before),
        };
        assert!(matches!(gap, Err(IngestError::Refused(refusal)) if refusal == expected));
        // Declared, yet without a pass.
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        let mut liar = primary.clone();
        liar.gap_at = Some(lost);
        let built = liar.try_segment(lost, lost);
        if let Some(bytes) = built {
            let refused = session.give(bytes).await;
            assert!(refused.is_err(), "{refused:?}");
        }
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        let begin = primary.pass_begin(true);
        session
            .give(primary.segment(begin, begin))
            .await
            .expect("declared");
        // Earlier points stay, and the gap is shown.
        let list = crate::points::PointList::of(&session.group().history());
        assert_eq!(list.gaps.len(), 1);
        assert_eq!(list.gaps[0].cause, crate::points::GapCause::RecordsMissing);
        assert_eq!(list.gaps[0].before, None);
        assert_eq!(list.ranges[0].last_lsn, before);
        assert!(compare(&repository, &primary) >= 1);
    });
}

#[test]
fn the_same_identity_with_other_content_is_kept_and_alarmed() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (primary, mut session) = base(&receiver, 1).await;
        let last = primary.last();
        // A twin that went another way: at the end, before the end, and beyond it.
        for (from, to) in [(last, last), (last - 1, last - 1), (last - 1, last + 1)] {
            let mut twin = primary.clone();
            let _ = twin.records.split_off(&(last - 1));
            while twin.last() < last + 1 {
                twin.write(1, 3, 1);
            }
            let refused = session.give(twin.segment(from, to)).await;
            assert!(
                matches!(refused, Err(IngestError::Refused(Refusal::Diverged { .. }))),
                "{from}..{to}: {refused:?}"
            );
            (session, _) = primary.clone().connect(&receiver).await.expect("a session");
        }
        let status = session.group().status();
        assert_eq!(status.diverged, 3);
        assert!(status.alarm.is_some_and(|alarm| alarm.contains("kept as")));
        let folder = format!("{}/conflicts", keys::group(primary.group));
        assert_eq!(
            repository.names_below(&folder).await.expect("listed").len(),
            3
        );
        assert!(compare(&repository, &primary) >= 1);
    });
}

#[test]
fn records_beyond_the_disk_are_refused() {
    block_on(async {
        for (disk, first, count) in [(0, BLOCKS as u64, 1), (0, BLOCKS as u64 - 1, 2), (7, 0, 1)] {
            let receiver = Receiver::new(Repository::in_memory());
            let (mut primary, mut session) = base(&receiver, 1).await;
            let lsn = primary.append(disk, Op::Trim, first, count, Vec::new());
            let refused = session.give(primary.segment(lsn, lsn)).await;
            assert!(
                matches!(
                    refused,
                    Err(IngestError::Refused(Refusal::OutOfDisk { .. }))
                ),
                "{refused:?}"
            );
        }
    });
}

#[test]
fn segments_of_others_are_refused() {
    let receiver = Receiver::new(Repository::in_memory());
    block_on(async {
        let (mut primary, mut session) = base(&receiver, 1).await;
        let lsn = primary.write(0, 0, 1);
        let mut other = primary.clone();
        other.group = GroupId::from_bytes([9; 16]);
        let refused = session.give(other.segment(lsn, lsn)).await;
        assert!(matches!(
            refused,
            Err(IngestError::Refused(Refusal::Foreign { .. }))
        ));
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        let (bytes, _) = primary.pass_segment(1, RecordChain::BASE, &[(0, 0, 1, lsn)]);
        let refused = session.give(bytes).await;
        assert!(matches!(
            refused,
            Err(IngestError::Refused(Refusal::NoSuchPass { .. }))
        ));
        assert_eq!(primary.spec(SegmentKind::Pass).pass, Lsn::ZERO);
    });
}

#[test]
fn name_and_uuid_are_bound_to_each_other() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (primary, _session) = base(&receiver, 1).await;
        // A permitted name with another UUID, in this process and in a new one.
        let mut thief = Primary::new(2);
        thief.name.clone_from(&primary.name);
        for receiver in [&receiver, &Receiver::new(repository.clone())] {
            let refused = receiver.hello(&thief.hello(), &Peer::Direct, 1).await;
            assert!(
                matches!(refused, Err(IngestError::Identity { .. })),
                "{refused:?}"
            );
        }
        let manifest = keys::manifest(thief.group, keys::FIRST);
        assert!(
            repository.get(&manifest).await.is_err(),
            "nothing was created"
        );
        // The UUID under another name.
        let mut renamed = primary.clone();
        renamed.name = "other".into();
        for receiver in [&receiver, &Receiver::new(repository.clone())] {
            let refused = receiver.hello(&renamed.hello(), &Peer::Direct, 1).await;
            assert!(
                matches!(refused, Err(IngestError::Renamed { .. })),
                "{refused:?}"
            );
        }
    });
}

/// The holder of a certificate with this SAN.
fn holder(san: rcgen::SanType) -> Peer {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    params.subject_alt_names = vec![san];
    let certificate = params.self_signed(&key).expect("a certificate");
    Peer::Certificate {
        identity: Identity::of(&[certificate.der().clone()]).expect("an identity"),
        address: "192.0.2.1:7".into(),
    }
}

#[test]
fn a_group_keeps_the_san_that_it_was_created_with() {
    let repository = Repository::in_memory();
    let here = Receiver::new(repository.clone());
    let primary = Primary::new(1);
    let uri = |text: &str| rcgen::SanType::URI(text.try_into().expect("ASCII"));
    let dns = rcgen::SanType::DnsName(primary.name.as_str().try_into().expect("ASCII"));
    let own = holder(uri(&format!("afterimage://{}", primary.name)));
    let others = [holder(uri("afterimage://*")), holder(dns)];
    block_on(async {
        let hello = primary.hello();
        here.hello(&hello, &own, 1).await.expect("created");
        for receiver in [&here, &Receiver::new(repository.clone())] {
            for other in &others {
                assert!(other.grant(&primary.name).is_some(), "permitted as such");
                let error = receiver.hello(&hello, other, 1).await.expect_err("refused");
                let is_identity = matches!(error, IngestError::Identity { .. });
                assert!(is_identity, "{error}");
                let text = error.to_string();
                assert!(text.contains("\"URI:afterimage://vm1\""), "{text}");
                assert!(text.contains("with the SAN it is bound to"), "{text}");
            }
            receiver.hello(&hello, &own, 1).await.expect("as before");
        }
    });
}

#[test]
fn names_never_leave_the_repository() {
    let receiver = Receiver::new(Repository::in_memory());
    for name in ["../x", "a/b", "a\0b", "", ".hidden", "-rf", "..", "a\nb"] {
        let mut primary = Primary::new(1);
        primary.name = name.into();
        let refused = block_on(receiver.hello(&primary.hello(), &Peer::Direct, 1));
        assert!(refused.is_err(), "{name:?}");
        assert!(keys::name(name).is_err(), "{name:?}");
        if name == "a/b" {
            continue;
        }
        let raw = format!("names/{name}");
        assert!(block_on(receiver.repository().get(&raw)).is_err_and(|e| !e.is_not_found()));
    }
    let binding = NameBinding {
        group: GroupId::from_bytes([1; 16]),
        name: "../x".into(),
        peer: String::new(),
        created_ns: 0,
    };
    assert!(NameBinding::decode(&binding.encode()).is_err());
}

#[test]
fn disks_keep_their_place_and_never_shrink() {
    let receiver = Receiver::new(Repository::in_memory());
    block_on(async {
        let (primary, _session) = base(&receiver, 1).await;
        let mut hello = primary.hello();
        hello.disks[1].size_bytes -= 4096;
        let refused = receiver.hello(&hello, &Peer::Direct, 1).await;
        assert!(
            matches!(refused, Err(IngestError::Disks { place: 1, .. })),
            "{refused:?}"
        );
        hello = primary.hello();
        hello.disks.swap(0, 1);
        let refused = receiver.hello(&hello, &Peer::Direct, 1).await;
        assert!(
            matches!(refused, Err(IngestError::Disks { place: 0, .. })),
            "{refused:?}"
        );
        hello = primary.hello();
        hello.disks[1].size_bytes += 4096;
        receiver
            .hello(&hello, &Peer::Direct, 1)
            .await
            .expect("a disk may grow");
    });
}

#[test]
fn a_name_that_is_bound_and_has_no_manifest_yet_is_no_unknown_group() {
    let (repository, primary) = (Repository::in_memory(), Primary::new(1));
    let binding = NameBinding {
        group: primary.group,
        created_ns: 1,
        name: primary.name.clone(),
        peer: String::new(),
    };
    let key = keys::name(&primary.name).expect("a name");
    block_on(repository.create(&key, binding.encode().into())).expect("created");
    let receiver = Receiver::new(repository.clone());
    for found in [
        block_on(Group::find(&repository, &primary.name)).map(drop),
        block_on(receiver.group_by_name(&primary.name)).map(drop),
    ] {
        let error = found.expect_err("nothing is there");
        assert!(error.to_string().contains(&primary.name), "{error}");
        assert!(matches!(error, GroupError::NotBegun { .. }), "{error}");
    }
}

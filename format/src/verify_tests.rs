//! Golden bytes, cuts and comparisons of verify bodies.

use super::*;

fn blocks(fills: &[u8]) -> Vec<u8> {
    fills.iter().flat_map(|fill| [*fill; BLOCK_SIZE]).collect()
}

fn body(content: Content) -> VerifyBody {
    VerifyBody {
        run: 0x0102,
        number: 7,
        last: true,
        at: Lsn(0x0304),
        content,
    }
}

fn with_data() -> VerifyBody {
    body(Content::Data(BlockHashes {
        all: [0xaa; 32],
        tags: vec![[0x11; 8], [0x22; 8]],
    }))
}

#[test]
fn bytes_are_fixed() {
    let mut expected = vec![0; BLOCK_SIZE];
    expected[0..4].copy_from_slice(b"VRFY"); // magic
    expected[4..6].copy_from_slice(&[1, 0]); // version
    expected[6] = 1; // flags: last of its run
    expected[8..10].copy_from_slice(&[2, 1]); // run
    expected[16..18].copy_from_slice(&[4, 3]); // the content's LSN
    expected[24] = 7; // number in the run
    // 28..30: scheme 0
    expected[30] = 2; // blocks
    expected[32..64].fill(0xaa); // hash of all
    expected[64..72].fill(0x11); // beginning of the first block's hash
    expected[72..80].fill(0x22); // and of the second's
    assert_eq!(with_data().encode(), expected);
    assert_eq!(VerifyBody::decode(&expected), Ok(with_data()));

    expected[6] = 3; // last, zeroes
    expected[30..80].fill(0);
    assert_eq!(body(Content::Zero).encode(), expected);
    assert_eq!(VerifyBody::decode(&expected), Ok(body(Content::Zero)));
}

#[test]
fn nothing_else_is_accepted() {
    let good = with_data().encode();
    for len in 0..good.len() {
        assert!(VerifyBody::decode(&good[..len]).is_err());
    }
    let longer = [&good[..], &[0]].concat();
    assert!(VerifyBody::decode(&longer).is_err());
    // All but numbers, counts and hashes, which may be any.
    let fixed = (0..8)
        .chain([28, 29, 31])
        .chain(80..82)
        .chain([BLOCK_SIZE - 1]);
    for at in fixed {
        let mut bad = good.clone();
        bad[at] ^= 0x80;
        assert!(VerifyBody::decode(&bad).is_err(), "byte {at}");
    }
    // Zeroes with a hash, or with blocks; data without.
    let mut bad = body(Content::Zero).encode();
    bad[32] = 1;
    assert_eq!(VerifyBody::decode(&bad), Err(VerifyBodyError::Reserved));
    let mut bad = good.clone();
    bad[6] |= FLAG_ZERO as u8;
    assert_eq!(VerifyBody::decode(&bad), Err(VerifyBodyError::Count(2)));
    let mut bad = good.clone();
    bad[8..10].fill(0);
    assert_eq!(VerifyBody::decode(&bad), Err(VerifyBodyError::Run));
    let mut bad = good;
    bad[30] = 0;
    assert_eq!(VerifyBody::decode(&bad), Err(VerifyBodyError::Count(0)));
}

#[test]
fn the_largest_run_fits() {
    let hashes = BlockHashes::of(&vec![5; VERIFY_BLOCKS_MAX * BLOCK_SIZE]);
    let body = body(Content::Data(hashes));
    assert_eq!(VerifyBody::decode(&body.encode()), Ok(body));
}

/// An independent reader can form the hashes as the documentation says.
#[test]
fn hashes_are_those_of_the_blocks() {
    let data = blocks(&[1, 2]);
    let first = blake3::hash(&data[..BLOCK_SIZE]);
    let second = blake3::hash(&data[BLOCK_SIZE..]);
    let hashes = BlockHashes::of(&data);
    let both = [*first.as_bytes(), *second.as_bytes()].concat();
    assert_eq!(hashes.all, *blake3::hash(&both).as_bytes());
    assert_eq!(hashes.tags[1], second.as_bytes()[..8]);
}

#[test]
fn the_blocks_that_differ_are_told() {
    let ours = BlockHashes::of(&blocks(&[1, 2, 3, 4]));
    assert_eq!(ours.differing(&ours), [0; 0]);
    let theirs = BlockHashes::of(&blocks(&[1, 9, 3, 0]));
    assert_eq!(ours.differing(&theirs), [1, 3]);
    // The hash of all decides, whatever the beginnings say.
    let mut forged = ours.clone();
    forged.all[0] ^= 1;
    assert_eq!(ours.differing(&forged), [0, 1, 2, 3]);
}

//! Golden bytes, cuts at every length, and arbitrary input for the NBD wire.

use super::constants::{Errno, cmd, cmd_flag, info, opt, rep};
use super::option::{
    InfoQuery, MetaQuery, OPTION_REPLY_BYTES, OptionError, OptionHeader, decode_reply,
    export_name_answer, greeting, info_block_size, info_export, meta_context_data, push_reply,
    server_data,
};
use super::reply::{
    Answered, Descriptor, ReplyForm, decode_header, push_block_status, push_data_header, push_done,
    push_error,
};
use super::request::{RequestError, RequestHeader};
use proptest::prelude::*;

const TO: Answered = Answered {
    cookie: 0x0102_0304_0506_0708,
    offset: 0x1000,
};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(u8::is_ascii_hexdigit)
        .map(|b| (b as char).to_digit(16).expect("a hex digit") as u8)
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

#[test]
fn a_compact_request_has_these_bytes() {
    let header = RequestHeader {
        flags: cmd_flag::FUA,
        command: cmd::WRITE,
        cookie: TO.cookie,
        offset: 0x1000,
        length: 0x200,
    };
    let golden = hex("25609513  0001 0001  0102030405060708  0000000000001000  00000200");
    let mut bytes = Vec::new();
    header.encode(false, &mut bytes);
    assert_eq!(bytes, golden);
    assert_eq!(RequestHeader::decode(&golden, false), Ok(header));
}

#[test]
fn an_extended_request_has_these_bytes() {
    let header = RequestHeader {
        flags: cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
        command: cmd::WRITE_ZEROES,
        cookie: TO.cookie,
        offset: 0x1000,
        length: 0x1_0000_0000,
    };
    let golden = hex("21e41c71  0012 0006  0102030405060708  0000000000001000  0000000100000000");
    let mut bytes = Vec::new();
    header.encode(true, &mut bytes);
    assert_eq!(bytes, golden);
    assert_eq!(RequestHeader::decode(&golden, true), Ok(header));
}

#[test]
fn a_request_cut_anywhere_is_short_and_a_wrong_magic_is_named() {
    for extended in [false, true] {
        let mut bytes = Vec::new();
        let header = RequestHeader {
            flags: 0,
            command: cmd::READ,
            cookie: 1,
            offset: 2,
            length: 3,
        };
        header.encode(extended, &mut bytes);
        for cut in 0..bytes.len() {
            let error = RequestHeader::decode(&bytes[..cut], extended);
            let needed = bytes.len();
            assert_eq!(error, Err(RequestError::Short { needed, have: cut }));
        }
        bytes.extend_from_slice(&[0; 8]);
        let other = RequestHeader::decode(&bytes, !extended);
        assert!(
            matches!(other, Err(RequestError::Magic { .. })),
            "{other:?}"
        );
    }
}

#[test]
fn replies_have_these_bytes() {
    let encode = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        f(&mut out);
        out
    };
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "simple success",
            encode(&|o| push_done(o, ReplyForm::Simple, TO)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "simple error",
            encode(&|o| push_error(o, ReplyForm::Simple, TO, Errno::NoSpace, "x")),
            "67446698 0000001c 0102030405060708",
        ),
        (
            "simple data",
            encode(&|o| push_data_header(o, ReplyForm::Simple, TO, 512)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "structured success",
            encode(&|o| push_done(o, ReplyForm::Structured, TO)),
            "668e33ef 0001 0000 0102030405060708 00000000",
        ),
        (
            "structured error with a text",
            encode(&|o| push_error(o, ReplyForm::Structured, TO, Errno::Invalid, "no")),
            "668e33ef 0001 8001 0102030405060708 00000008  00000016 0002 6e6f",
        ),
        (
            "structured data",
            encode(&|o| push_data_header(o, ReplyForm::Structured, TO, 512)),
            "668e33ef 0001 0001 0102030405060708 00000208  0000000000001000",
        ),
        (
            "extended success",
            encode(&|o| push_done(o, ReplyForm::Extended, TO)),
            "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000",
        ),
        (
            "extended data",
            encode(&|o| push_data_header(o, ReplyForm::Extended, TO, 512)),
            "6e8a278c 0001 0001 0102030405060708 0000000000001000 0000000000000208
             0000000000001000",
        ),
    ];
    for (what, bytes, golden) in cases {
        assert_eq!(bytes, &hex(golden), "{what}");
    }
}

#[test]
fn block_status_has_these_bytes() {
    let extents = [
        Descriptor {
            length: 0x1000,
            flags: 3,
        },
        Descriptor {
            length: 0x2_0000_0000,
            flags: 0,
        },
    ];
    let mut out = Vec::new();
    push_block_status(&mut out, ReplyForm::Structured, TO, 7, &extents, false);
    let golden = "668e33ef 0000 0005 0102030405060708 00000014
                  00000007  00001000 00000003  ffff0000 00000000";
    assert_eq!(out, hex(golden));
    out.clear();
    push_block_status(&mut out, ReplyForm::Extended, TO, 7, &extents, true);
    let golden = "6e8a278c 0001 0006 0102030405060708 0000000000001000 0000000000000028
                  00000007 00000002
                  0000000000001000 0000000000000003
                  0000000200000000 0000000000000000";
    assert_eq!(out, hex(golden));
}

#[test]
fn a_long_message_is_cut_between_characters() {
    let mut out = Vec::new();
    let message = "ä".repeat(200);
    push_error(&mut out, ReplyForm::Structured, TO, Errno::Io, &message);
    let (header, at) = decode_header(&out).expect("a reply");
    assert_eq!(header.length as usize, out.len() - at);
    let text = std::str::from_utf8(&out[at + 6..]).expect("whole characters");
    assert_eq!(text.len(), 254);
}

#[test]
fn the_handshake_has_these_bytes() {
    assert_eq!(
        greeting().to_vec(),
        hex("4e42444d41474943 49484156454f5054 0003")
    );
    let header = OptionHeader {
        option: opt::GO,
        length: 9,
    };
    let mut out = Vec::new();
    header.encode(&mut out);
    assert_eq!(out, hex("49484156454f5054 00000007 00000009"));
    let bytes = out.first_chunk().expect("16 bytes");
    assert_eq!(OptionHeader::decode(bytes), Ok(header));

    let query = InfoQuery {
        name: "a/b",
        items: vec![info::BLOCK_SIZE],
    };
    out.clear();
    query.encode(&mut out);
    assert_eq!(out, hex("00000003 612f62 0001 0003"));

    out.clear();
    push_reply(&mut out, opt::INFO, rep::INFO, &info_export(0x1000, 0x0d));
    let golden = "0003e889045565a9 00000006 00000003 0000000c  0000 0000000000001000 000d";
    assert_eq!(out, hex(golden));
    let header: &[u8; OPTION_REPLY_BYTES] = out.first_chunk().expect("20 bytes");
    assert_eq!(decode_reply(header), Some((opt::INFO, rep::INFO, 12)));

    assert_eq!(
        info_block_size(1, 4096, 32 << 20),
        hex("0003 00000001 00001000 02000000")
    );
    assert_eq!(server_data("a", "bc"), hex("00000001 61 6263"));
    assert_eq!(meta_context_data(5, "q"), hex("00000005 71"));
    assert_eq!(
        export_name_answer(512, 1, true),
        hex("0000000000000200 0001")
    );
    assert_eq!(export_name_answer(512, 1, false).len(), 134);
}

#[test]
fn option_data_cut_anywhere_is_refused() {
    let info = InfoQuery {
        name: "vm1/vda",
        items: vec![0, 3],
    };
    let meta = MetaQuery {
        name: "vm1/vda",
        queries: vec!["base:allocation", "x:"],
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    info.encode(&mut a);
    meta.encode(&mut b);
    assert_eq!(InfoQuery::decode(&a), Ok(info));
    assert_eq!(MetaQuery::decode(&b), Ok(meta));
    for cut in 0..a.len() {
        assert_eq!(InfoQuery::decode(&a[..cut]), Err(OptionError::Truncated));
    }
    for cut in 0..b.len() {
        assert_eq!(MetaQuery::decode(&b[..cut]), Err(OptionError::Truncated));
    }
    a.push(0);
    b.push(0);
    assert_eq!(InfoQuery::decode(&a), Err(OptionError::TrailingBytes));
    assert_eq!(MetaQuery::decode(&b), Err(OptionError::TrailingBytes));
}

#[test]
fn strings_are_short_text_without_nul() {
    let decode = |name: &[u8]| {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&[0, 0]);
        InfoQuery::decode(&data).map(|_| ())
    };
    assert_eq!(decode(&[b'x'; 4096]), Ok(()));
    assert_eq!(decode(&[b'x'; 4097]), Err(OptionError::StringTooLong(4097)));
    assert_eq!(decode(b"a\0b"), Err(OptionError::NotText));
    assert_eq!(decode(&[0xff]), Err(OptionError::NotText));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_and_what_decodes_encodes_to_itself(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        extended: bool,
    ) {
        if let Ok(header) = RequestHeader::decode(&bytes, extended) {
            let mut out = Vec::new();
            header.encode(extended, &mut out);
            prop_assert_eq!(&out[..], &bytes[..out.len()]);
        }
        if let Ok(query) = InfoQuery::decode(&bytes) {
            let mut out = Vec::new();
            query.encode(&mut out);
            prop_assert_eq!(&out, &bytes);
        }
        if let Ok(query) = MetaQuery::decode(&bytes) {
            let mut out = Vec::new();
            query.encode(&mut out);
            prop_assert_eq!(&out, &bytes);
        }
        let _ = decode_header(&bytes);
    }
}

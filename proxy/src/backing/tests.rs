use super::*;
use std::os::unix::fs::FileExt;

fn options() -> BackingOptions {
    BackingOptions {
        patience: Duration::ZERO,
        ..BackingOptions::default()
    }
}

fn file(folder: &tempfile::TempDir, len: u64, head: &[u8]) -> PathBuf {
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).expect("a new file");
    file.set_len(len).expect("grows");
    file.write_all_at(head, 0).expect("written");
    path
}

#[test]
fn a_raw_file_is_taken_as_long_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(&folder, 8192 + 512, b"\x55\xaa");
    let backing = Backing::open(&path, &options()).expect("opens");
    assert_eq!(backing.size, 8704);
}

#[test]
fn an_image_format_is_refused_unless_raw_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    for (head, format) in [
        (&b"QFI\xfb\0\0\0\x03"[..], ImageFormat::Qcow2),
        (b"KDMV\x01", ImageFormat::Vmdk),
        (b"vhdxfile", ImageFormat::Vhdx),
    ] {
        let path = file(&folder, 65536, head);
        let refused = Backing::open(&path, &options());
        let Err(BackingError::Formatted { format: found, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(found, format);
        let raw = BackingOptions {
            raw: true,
            ..options()
        };
        assert!(Backing::open(&path, &raw).is_ok());
    }
}

#[test]
fn sizes_that_no_disk_has_are_refused() {
    // A tmpfs has files of any size.
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    for good in [512, DISK_BYTES_MAX] {
        let path = file(&folder, good, b"");
        assert_eq!(Backing::open(&path, &options()).expect("opens").size, good);
    }
    for odd in [0, 100, 513, DISK_BYTES_MAX + SECTOR_BYTES] {
        let path = file(&folder, odd, b"");
        let refused = Backing::open(&path, &options());
        assert!(
            matches!(refused, Err(BackingError::BadSize { .. })),
            "{odd}: {refused:?}"
        );
    }
}

#[test]
fn what_is_missing_or_in_use_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = Backing::open(&folder.path().join("no"), &options());
    let text = missing.expect_err("missing").to_string();
    assert!(text.contains("/no does not exist"), "{text}");
    let path = file(&folder, 8192, b"");
    let _first = Backing::open(&path, &options()).expect("opens");
    let text = Backing::open(&path, &options())
        .expect_err("in use")
        .to_string();
    assert!(text.contains("in use by") && text.contains("pid"), "{text}");
}

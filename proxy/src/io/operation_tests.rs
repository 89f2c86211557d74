//! What results of the kernel mean, without a kernel: short transfers, transfers of nothing, errors.

use super::*;
use afterimage_format::ids::DiskIndex;

const FILE: FileId = FileId::backing(DiskIndex(0));
const LEN: usize = 8192;

/// How an operation goes on after a result.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Again, from this byte on.
    From(u64),
    Done(usize),
    Failed(io::ErrorKind),
}

use Next::{Done, Failed, From};

/// Feeds results to an operation; each with what must follow. None may follow an end.
fn feed(what: &str, kind: Kind, steps: &[(i32, Next)]) {
    let mut slot = Slot::of_client(0, Token(1), kind);
    for (at, (result, expected)) in steps.iter().enumerate() {
        let next = match slot.advance(*result, &[]) {
            Step::Continue => From(slot.done),
            Step::Done(Ok(len)) => Done(len),
            Step::Done(Err(error)) => Failed(error.kind()),
        };
        assert_eq!(next, *expected, "{what}, result {at}");
        let last = at + 1 == steps.len();
        assert_eq!(last, !matches!(next, From(_)), "{what}, result {at}");
    }
}

fn read(len: usize) -> Kind {
    Kind::Read {
        file: FILE,
        offset: 4096,
        buffer: AlignedBuffer::new(len),
    }
}

fn write() -> Kind {
    Kind::WriteOwned {
        file: FILE,
        offset: 4096,
        buffer: AlignedBuffer::new(LEN),
        dsync: false,
    }
}

#[test]
fn a_short_read_goes_on_until_the_file_ends() {
    feed("whole", read(LEN), &[(8192, Done(8192))]);
    feed(
        "halves",
        read(LEN),
        &[(4096, From(4096)), (4096, Done(8192))],
    );
    feed(
        "sectors",
        read(LEN),
        &[(512, From(512)), (1024, From(1536)), (6656, Done(8192))],
    );
    feed("an empty file", read(LEN), &[(0, Done(0))]);
    feed(
        "the end of the file",
        read(LEN),
        &[(4096, From(4096)), (0, Done(4096))],
    );
    // Within a sector only the end of the file stops a read.
    feed("an odd end", read(LEN), &[(5000, Done(5000))]);
    feed(
        "an odd end, later",
        read(LEN),
        &[(4096, From(4096)), (904, Done(5000))],
    );
    // Whole sectors are asked for where fewer bytes are wanted.
    feed("more than wanted", read(5000), &[(5120, Done(5000))]);
}

#[test]
fn a_short_write_goes_on_at_a_sector_and_never_without_progress() {
    let gather = || Kind::WriteGather {
        file: FILE,
        offset: 0,
        spans: Vec::new(),
        vectors: Vec::new(),
        total: LEN,
        dsync: true,
    };
    let ring = || Kind::WriteRing {
        file: FILE,
        offset: 0,
        span: RingSpan {
            offset: 0,
            len: LEN as u32,
        },
        dsync: false,
    };
    let nothing = || Failed(io::ErrorKind::WriteZero);
    for kind in [write as fn() -> Kind, gather, ring] {
        feed("whole", kind(), &[(8192, Done(8192))]);
        feed("halves", kind(), &[(4096, From(4096)), (4096, Done(8192))]);
        // What was written of a sector is written again.
        feed("odd", kind(), &[(5000, From(4608)), (3584, Done(8192))]);
        feed(
            "odd twice",
            kind(),
            &[(5000, From(4608)), (1000, From(5120)), (3072, Done(8192))],
        );
        feed("nothing", kind(), &[(0, nothing())]);
        feed("less than a sector", kind(), &[(511, nothing())]);
        feed(
            "nothing more",
            kind(),
            &[(4096, From(4096)), (0, nothing())],
        );
        feed(
            "no sector more",
            kind(),
            &[(5000, From(4608)), (511, nothing())],
        );
    }
}

#[test]
fn zeroes_are_written_step_by_step() {
    let zero = |len| Kind::Zero {
        file: FILE,
        offset: 0,
        len,
        method: ZeroMethod::Write,
    };
    let step = ZEROES_LEN as i32;
    let at = ZEROES_LEN as u64;
    feed(
        "steps",
        zero(2 * at + 4096),
        &[(step, From(at)), (step, From(2 * at)), (4096, Done(0))],
    );
    feed(
        "a short one",
        zero(at + 512),
        &[(1000, From(512)), (step - 512, From(at)), (512, Done(0))],
    );
    let nothing = || Failed(io::ErrorKind::WriteZero);
    feed("nothing", zero(at), &[(0, nothing())]);
    feed(
        "nothing more",
        zero(2 * at),
        &[(step, From(at)), (0, nothing())],
    );
}

#[test]
fn streams_go_on_at_any_byte_and_end_with_nothing() {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    let socket = Rc::new(OwnedFd::from(ours));
    let send = || Kind::Send {
        socket: Rc::clone(&socket),
        pieces: vec![Piece::Small(vec![1; 60]), Piece::Small(vec![2; 40])],
        header: SendHeader::default(),
        total: 100,
    };
    feed("whole", send(), &[(100, Done(100))]);
    feed(
        "bytes",
        send(),
        &[(1, From(1)), (98, From(99)), (1, Done(100))],
    );
    feed(
        "nothing",
        send(),
        &[(7, From(7)), (0, Failed(io::ErrorKind::WriteZero))],
    );
    let receive = || Kind::Receive {
        socket: Rc::clone(&socket),
        buffer: AlignedBuffer::new(LEN),
        start: 0,
    };
    feed("some", receive(), &[(3, Done(3))]);
    feed("the end", receive(), &[(0, Done(0))]);
}

#[test]
fn interruptions_are_tried_again_and_errors_are_not() {
    let failed = |errno| Failed(io::Error::from_raw_os_error(errno).kind());
    feed(
        "interrupted",
        write(),
        &[
            (4096, From(4096)),
            (-libc::EINTR, From(4096)),
            (4096, Done(8192)),
        ],
    );
    feed("no room", write(), &[(-libc::ENOSPC, failed(libc::ENOSPC))]);
    let mut busy: Vec<_> = (0..RETRIES_MAX).map(|_| (-libc::EAGAIN, From(0))).collect();
    busy.push((-libc::EAGAIN, failed(libc::EAGAIN)));
    feed("busy for ever", write(), &busy);
    // The kernel reports the failure of a sync once; to ask again would be told a lie.
    for errno in [libc::EIO, libc::EINTR, libc::EAGAIN] {
        feed(
            "a sync",
            Kind::Sync { file: FILE },
            &[(-errno, failed(errno))],
        );
    }
}

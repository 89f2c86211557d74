//! How long a client may keep others, or us, waiting: whom to cut off, without I/O and clock.
//!
//! Owns the windows in which a client must move bytes. Always holds: a client that owes the rest of
//! a payload brings [`WINDOW_BYTES`] or the end of it in every [`PAYLOAD_WINDOW_NS`], however it
//! spreads them; a client that holds memory of the budget while others wait for some moves
//! [`WANTED_WINDOW_BYTES`] in every [`WANTED_WINDOW_NS`]. Time in which it is not the client's turn
//! does not count. So nobody waits for another's memory for ever, and no deadline can be put off by
//! a byte now and then.

/// A window for a payload, nanoseconds.
pub(crate) const PAYLOAD_WINDOW_NS: u64 = 30_000_000_000;
/// What must come in within a window, unless the payload ends.
pub(crate) const WINDOW_BYTES: u64 = 256 << 10;
/// A window while others wait for memory, nanoseconds.
pub(crate) const WANTED_WINDOW_NS: u64 = 3_000_000_000;
/// What a client that holds memory must move within that window.
pub(crate) const WANTED_WINDOW_BYTES: u64 = 64 << 10;

/// What a connection waits for from its client at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Owed {
    /// The number of the payload that it is in the middle of, if it is its turn.
    pub(crate) payload: Option<u64>,
    /// It holds memory of the budget and it is its turn: to send, or to read its replies.
    pub(crate) memory: bool,
}

/// Why a client is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CutOff {
    #[error("it stalled within a payload")]
    Payload,
    #[error("it made no progress with memory that others wait for")]
    Memory,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    of: u64,
    since_ns: u64,
    moved_before: u64,
}

/// A client's windows.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    moved: u64,
    payload: Option<Window>,
    memory: Option<Window>,
}

impl Patience {
    /// The client has sent, or taken, so many bytes.
    pub(crate) fn moved(&mut self, bytes: usize) {
        self.moved += bytes as u64;
    }

    /// Judges the client as of `now_ns`; `wanted` is whether others wait for memory. When to look
    /// again, at the latest; `None` while it owes nothing.
    ///
    /// # Errors
    /// It is to be cut off.
    pub(crate) fn look(
        &mut self,
        now_ns: u64,
        owed: Owed,
        wanted: bool,
    ) -> Result<Option<u64>, CutOff> {
        let moved = self.moved;
        let (length, bytes) = (PAYLOAD_WINDOW_NS, WINDOW_BYTES);
        let payload = judge(
            &mut self.payload,
            owed.payload,
            now_ns,
            moved,
            length,
            bytes,
        );
        let payload = payload.ok_or(CutOff::Payload)?;
        let memory = (owed.memory && wanted).then_some(0);
        let (length, bytes) = (WANTED_WINDOW_NS, WANTED_WINDOW_BYTES);
        let memory = judge(&mut self.memory, memory, now_ns, moved, length, bytes);
        let memory = memory.ok_or(CutOff::Memory)?;
        Ok([payload, memory].into_iter().flatten().min())
    }
}

/// When the window for `of` ends, if there is one; `None` if it has ended with too little.
#[expect(clippy::option_option, reason = "the outer one is the verdict")]
fn judge(
    window: &mut Option<Window>,
    of: Option<u64>,
    now_ns: u64,
    moved: u64,
    length_ns: u64,
    bytes: u64,
) -> Option<Option<u64>> {
    let Some(of) = of else {
        *window = None;
        return Some(None);
    };
    let begun = match *window {
        Some(begun) if begun.of == of => begun,
        _ => Window {
            of,
            since_ns: now_ns,
            moved_before: moved,
        },
    };
    let ended = now_ns >= begun.since_ns + length_ns;
    if ended && moved < begun.moved_before + bytes {
        return None;
    }
    let begun = match ended {
        true => Window {
            of,
            since_ns: now_ns,
            moved_before: moved,
        },
        false => begun,
    };
    *window = Some(begun);
    Some(Some(begun.since_ns + length_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: Owed = Owed {
        payload: Some(1),
        memory: true,
    };

    #[test]
    fn a_byte_now_and_then_does_not_put_the_end_off() {
        let mut patience = Patience::default();
        patience.moved(31 << 20);
        let due = patience.look(5, PAYLOAD, false).expect("in time");
        assert_eq!(due, Some(5 + PAYLOAD_WINDOW_NS));
        for second in 1..30 {
            patience.moved(1);
            let looked = patience.look(second * 1_000_000_000, PAYLOAD, false);
            assert_eq!(looked, Ok(due), "second {second}");
        }
        let cut = patience.look(5 + PAYLOAD_WINDOW_NS, PAYLOAD, false);
        assert_eq!(cut, Err(CutOff::Payload));
    }

    #[test]
    fn a_slow_client_goes_on_and_the_next_payload_has_its_own_time() {
        let mut patience = Patience::default();
        patience.look(0, PAYLOAD, false).expect("in time");
        for window in 1..10 {
            patience.moved(256 << 10);
            let now = window * PAYLOAD_WINDOW_NS;
            let due = patience.look(now, PAYLOAD, false).expect("slow but fine");
            assert_eq!(due, Some(now + PAYLOAD_WINDOW_NS));
        }
        let next = Owed {
            payload: Some(2),
            memory: false,
        };
        let now = 10 * PAYLOAD_WINDOW_NS - 1;
        let due = patience.look(now, next, false).expect("a new one");
        assert_eq!(due, Some(now + PAYLOAD_WINDOW_NS));
        assert_eq!(patience.look(now, Owed::default(), true), Ok(None));
        let later = now + 2 * PAYLOAD_WINDOW_NS;
        let due = patience.look(later, next, false);
        assert_eq!(due, Ok(Some(later + PAYLOAD_WINDOW_NS)), "our time");
    }

    #[test]
    fn memory_that_others_wait_for_must_move() {
        let mut patience = Patience::default();
        let reads_slowly = Owed {
            payload: None,
            memory: true,
        };
        assert_eq!(
            patience.look(0, reads_slowly, false),
            Ok(None),
            "nobody waits"
        );
        let due = patience.look(1, reads_slowly, true).expect("in time");
        assert_eq!(due, Some(1 + WANTED_WINDOW_NS));
        patience.moved(64 << 10);
        let due = patience.look(1 + WANTED_WINDOW_NS, reads_slowly, true);
        let due = due.expect("it moves").expect("and goes on being watched");
        patience.moved(1);
        assert_eq!(patience.look(due, reads_slowly, true), Err(CutOff::Memory));
    }
}

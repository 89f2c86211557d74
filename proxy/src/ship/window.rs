//! Segments sent and not acknowledged: bounds what is on its way and checks what comes back.

use afterimage_format::wire::{Ack, Cursor};
use std::collections::VecDeque;

/// A segment on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    /// Stored bytes.
    pub(super) bytes: usize,
    /// What a log segment holds; none for one of a pass.
    pub(super) log: Option<LogPart>,
}

/// Records that travel together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LogPart {
    /// Where they end.
    pub(super) end: Cursor,
    /// Wall clock of the first.
    pub(super) first_wall_ns: u64,
    /// Wall clock of the last.
    pub(super) last_wall_ns: u64,
}

/// The window of one session.
#[derive(Debug)]
pub(super) struct Window {
    limit: usize,
    bytes: usize,
    sent: VecDeque<Sent>,
    pass_segments: usize,
    acked_count: u64,
    /// What the sink has according to the last acknowledgement.
    acked: Cursor,
}

/// An acknowledgement that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// For segments never sent, or fewer than before.
    #[error("acknowledges {0} segments, between {1} and {2} are possible")]
    Count(u64, u64, u64),
    /// The sink's place in the record chain is not where the acknowledged segments end.
    #[error("acknowledges up to record {} where {} was sent", .0.lsn, .1.lsn)]
    Cursor(Cursor, Cursor),
}

impl Window {
    /// An empty window; the sink's cursor is as its hello reply said.
    pub(super) fn new(limit: usize, acked: Cursor) -> Self {
        Self {
            limit,
            bytes: 0,
            sent: VecDeque::new(),
            pass_segments: 0,
            acked_count: 0,
            acked,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.bytes < self.limit
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Segments of a pass that are not acknowledged.
    pub(super) fn pass_segments(&self) -> usize {
        self.pass_segments
    }

    /// Segments that were acknowledged.
    pub(super) fn acked_segments(&self) -> u64 {
        self.acked_count
    }

    /// What the sink has according to the last acknowledgement.
    pub(super) fn acked(&self) -> Cursor {
        self.acked
    }

    /// Wall clock of the first record on its way.
    pub(super) fn first_wall_ns(&self) -> Option<u64> {
        let mut parts = self.sent.iter().filter_map(|sent| sent.log);
        parts.next().map(|part| part.first_wall_ns)
    }

    pub(super) fn push(&mut self, sent: Sent) {
        self.bytes += sent.bytes;
        self.pass_segments += usize::from(sent.log.is_none());
        self.sent.push_back(sent);
    }

    /// Takes an acknowledgement. Returns the wall clock of the last record that is new by it.
    pub(super) fn ack(&mut self, ack: &Ack) -> Result<Option<u64>, AckError> {
        let possible = self.acked_count + self.sent.len() as u64;
        if ack.segments < self.acked_count || ack.segments > possible {
            return Err(AckError::Count(ack.segments, self.acked_count, possible));
        }
        let mut wall_ns = None;
        while self.acked_count < ack.segments
            && let Some(sent) = self.sent.pop_front()
        {
            self.acked_count += 1;
            self.bytes -= sent.bytes;
            match sent.log {
                Some(part) => {
                    self.acked = part.end;
                    wall_ns = Some(part.last_wall_ns);
                }
                None => self.pass_segments -= 1,
            }
        }
        if ack.cursor != self.acked {
            return Err(AckError::Cursor(ack.cursor, self.acked));
        }
        Ok(wall_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_format::chain::RecordChain;
    use afterimage_format::ids::Lsn;
    use afterimage_format::wire::Comparisons;

    fn cursor(lsn: u64) -> Cursor {
        Cursor {
            lsn: Lsn(lsn),
            chain: RecordChain([lsn as u8; 32]),
        }
    }

    /// Three records, the last with this LSN, written at ten times their LSN.
    fn part(last: u64) -> LogPart {
        LogPart {
            end: cursor(last),
            first_wall_ns: (last - 2) * 10,
            last_wall_ns: last * 10,
        }
    }

    fn ack(segments: u64, lsn: u64) -> Ack {
        Ack {
            segments,
            cursor: cursor(lsn),
            completed_pass: Lsn::ZERO,
            active_pass: None,
            comparisons: Comparisons::default(),
        }
    }

    fn window() -> Window {
        let mut window = Window::new(100, cursor(5));
        window.push(Sent {
            bytes: 60,
            log: Some(part(9)),
        });
        window.push(Sent {
            bytes: 60,
            log: None,
        });
        window.push(Sent {
            bytes: 10,
            log: Some(part(12)),
        });
        window
    }

    #[test]
    fn acknowledgements_are_cumulative() {
        let mut window = window();
        assert!(!window.has_room());
        assert_eq!(window.pass_segments(), 1);
        assert_eq!(window.first_wall_ns(), Some(70));
        assert_eq!(window.ack(&ack(0, 5)), Ok(None));
        assert_eq!(window.ack(&ack(2, 9)), Ok(Some(90)));
        assert!(window.has_room());
        assert_eq!(window.bytes(), 10);
        assert_eq!(window.first_wall_ns(), Some(100));
        assert_eq!(window.ack(&ack(3, 12)), Ok(Some(120)));
        assert_eq!((window.bytes(), window.pass_segments()), (0, 0));
        assert_eq!(window.first_wall_ns(), None);
    }

    #[test]
    fn impossible_acknowledgements_are_refused() {
        assert_eq!(window().ack(&ack(4, 12)), Err(AckError::Count(4, 0, 3)));
        assert!(matches!(
            window().ack(&ack(1, 8)),
            Err(AckError::Cursor(..))
        ));
        let mut other = ack(1, 9);
        other.cursor.chain = RecordChain([1; 32]);
        assert!(matches!(window().ack(&other), Err(AckError::Cursor(..))));
        let mut window = window();
        window.ack(&ack(2, 9)).unwrap();
        assert_eq!(window.ack(&ack(1, 9)), Err(AckError::Count(1, 2, 3)));
    }
}

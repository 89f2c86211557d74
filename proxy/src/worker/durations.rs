//! How long requests took, by operation: from the turn in which the engine got them to the turn
//! that has their answer.
//!
//! Counted where the requests pass, without a lock or a clock of its own; copied out on demand.

use crate::engine::request::{Request, RequestId};
use crate::nbd::session::Session;

/// Upper bounds of the histogram's buckets, in nanoseconds.
pub const DURATION_BOUNDS_NS: [u64; 14] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    1_000_000_000,
    5_000_000_000,
];

/// Operations that are told apart, as metrics name them.
pub const DURATION_OPS: [&str; 6] = [
    "read",
    "write",
    "flush",
    "trim",
    "write_zeroes",
    "block_status",
];

/// Requests of one operation by duration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurationHistogram {
    /// Requests within each of [`DURATION_BOUNDS_NS`] and above the bound before it; longer ones
    /// are in `count` alone.
    pub buckets: [u64; DURATION_BOUNDS_NS.len()],
    /// All requests.
    pub count: u64,
    /// Sum of their durations in nanoseconds.
    pub sum_ns: u64,
}

impl DurationHistogram {
    fn add(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns += ns;
        let bucket = DURATION_BOUNDS_NS.partition_point(|bound| *bound < ns);
        if let Some(bucket) = self.buckets.get_mut(bucket) {
            *bucket += 1;
        }
    }
}

/// The histograms of one group, and when its open requests began.
#[derive(Debug, Default)]
pub(super) struct Durations {
    histograms: [DurationHistogram; DURATION_OPS.len()],
    /// By connection, then by slot of the request.
    begun: Vec<Vec<(u64, u8)>>,
}

impl Durations {
    /// A request goes to the engine.
    pub(super) fn begin(&mut self, id: RequestId, request: &Request<'_>, now_ns: u64) {
        let op = match request {
            Request::Read { .. } => 0,
            Request::Write { .. } => 1,
            Request::Flush => 2,
            Request::Trim { .. } => 3,
            Request::WriteZeroes { .. } => 4,
            Request::BlockStatus { .. } => 5,
        };
        let (connection, slot) = place(id);
        if self.begun.len() <= connection {
            self.begun.resize_with(connection + 1, Vec::new);
        }
        let slots = &mut self.begun[connection];
        if slots.len() <= slot {
            slots.resize(slot + 1, (0, 0));
        }
        slots[slot] = (now_ns, op);
    }

    /// Its answer is there.
    pub(super) fn end(&mut self, id: RequestId, now_ns: u64) {
        let (connection, slot) = place(id);
        let begun = self.begun.get(connection).and_then(|slots| slots.get(slot));
        if let Some((begun_ns, op)) = begun {
            self.histograms[usize::from(*op)].add(now_ns.saturating_sub(*begun_ns));
        }
    }

    /// A copy, in the order of [`DURATION_OPS`].
    pub(super) fn histograms(&self) -> [DurationHistogram; DURATION_OPS.len()] {
        self.histograms
    }
}

fn place(id: RequestId) -> (usize, usize) {
    let connection = Session::connection_of(id) as usize;
    (connection, (id.0 & u64::from(u32::MAX)) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_counts_once_in_the_bucket_of_its_duration() {
        let mut durations = Durations::default();
        let id = RequestId((3 << 32) | 7);
        durations.begin(id, &Request::Flush, 1_000);
        durations.end(id, 1_000 + 100_000);
        durations.begin(id, &Request::Read { offset: 0, len: 1 }, 0);
        durations.end(id, 6_000_000_000);
        let [read, write, flush, ..] = durations.histograms();
        assert_eq!(
            (flush.count, flush.buckets[1], flush.sum_ns),
            (1, 1, 100_000)
        );
        assert_eq!((read.count, read.buckets.iter().sum::<u64>()), (1, 0));
        assert_eq!(write.count, 0);
    }
}

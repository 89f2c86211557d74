//! Memory for what clients have under way, shared by the connections of a group: payloads too large
//! for a receive buffer, and replies beyond what each connection may have for itself.
//!
//! Owns nothing but the counts. Always holds: at most `limit` bytes are taken, plus what one
//! connection took beyond it: when the budget is used up, the first that asks may finish all the
//! same, so that connections which each wait for the others' memory cannot block for ever. It knows
//! whether somebody waits: whoever drives a connection then cuts off a client that holds memory and
//! makes no progress ([`super::patience`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of a [`PayloadBudget`] unless configured.
pub const PAYLOAD_BUDGET_DEFAULT: usize = 64 << 20;

/// Counts memory. Clones count together.
#[derive(Clone, Debug)]
pub struct PayloadBudget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: usize,
    used: AtomicUsize,
    /// Connection + 1 that may go beyond the limit; 0 for none.
    beyond: AtomicU64,
    /// Connections that wait.
    waiting: AtomicUsize,
}

/// Somebody waits for memory, until this is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    shared: Arc<Shared>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PayloadBudget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit,
                used: AtomicUsize::new(0),
                beyond: AtomicU64::new(0),
                waiting: AtomicUsize::new(0),
            }),
        }
    }

    /// Bytes taken at present.
    #[must_use]
    pub fn used(&self) -> usize {
        self.shared.used.load(Ordering::Relaxed)
    }

    /// Whether anybody waits for memory at present.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// Notes that somebody waits.
    pub(crate) fn wait(&self) -> Waiting {
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting {
            shared: self.shared.clone(),
        }
    }

    /// Takes `bytes` for `connection`. False: wait until others have given back.
    pub(crate) fn take(&self, connection: u32, bytes: usize) -> bool {
        let shared = &*self.shared;
        let within = |used: usize| {
            let after = used.checked_add(bytes)?;
            (after <= shared.limit).then_some(after)
        };
        let taken = shared
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        if taken.is_ok() {
            return true;
        }
        let me = u64::from(connection) + 1;
        let holder = shared
            .beyond
            .compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed);
        if holder.is_ok() || holder == Err(me) {
            shared.used.fetch_add(bytes, Ordering::Relaxed);
            return true;
        }
        false
    }

    /// Gives back `bytes` of `connection`, which still holds `rest`.
    pub(crate) fn give_back(&self, connection: u32, bytes: usize, rest: usize) {
        let me = u64::from(connection) + 1;
        self.shared.used.fetch_sub(bytes, Ordering::Relaxed);
        if rest == 0 {
            let _ =
                self.shared
                    .beyond
                    .compare_exchange(me, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl Default for PayloadBudget {
    fn default() -> Self {
        Self::new(PAYLOAD_BUDGET_DEFAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_at_a_time_may_finish_beyond_the_limit() {
        let budget = PayloadBudget::new(100);
        assert!(budget.take(0, 60));
        assert!(budget.take(1, 40));
        assert!(budget.take(1, 40), "the first beyond the limit");
        assert!(budget.take(1, 40), "and it goes on");
        assert!(!budget.take(0, 1), "the second waits");
        budget.give_back(1, 20, 100);
        assert!(!budget.take(0, 1), "as long as the first has any of it");
        budget.give_back(1, 100, 0);
        assert!(budget.take(0, 40));
        budget.give_back(0, 100, 0);
        assert_eq!(budget.used(), 0);
    }
}

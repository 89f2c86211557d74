//! Who waits for the log to be durable up to some LSN: FLUSH, FUA, `ack = "durable"`, events.
//!
//! Always holds: LSNs come in the order in which they were given, so the first waiter is the first
//! to be released.

use super::event::Ticket;
use super::request::RequestId;
use afterimage_format::ids::Lsn;
use std::collections::VecDeque;

/// Who is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiter {
    Request(RequestId),
    Event(Ticket, Lsn),
}

#[derive(Debug, Default)]
pub(super) struct Waiters {
    queue: VecDeque<(Lsn, Waiter)>,
}

impl Waiters {
    pub(super) fn push(&mut self, lsn: Lsn, waiter: Waiter) {
        debug_assert!(self.queue.back().is_none_or(|(last, _)| *last <= lsn));
        self.queue.push_back((lsn, waiter));
    }

    /// The LSN that the first one waits for.
    pub(super) fn first(&self) -> Option<Lsn> {
        self.queue.front().map(|(lsn, _)| *lsn)
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// The first one, if it waits for nothing beyond `durable`.
    pub(super) fn pop_up_to(&mut self, durable: Lsn) -> Option<Waiter> {
        if self.first()? > durable {
            return None;
        }
        self.queue.pop_front().map(|(_, waiter)| waiter)
    }

    /// The first one, whatever it waits for.
    pub(super) fn pop(&mut self) -> Option<Waiter> {
        self.queue.pop_front().map(|(_, waiter)| waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiters_go_in_order_and_not_early() {
        let mut waiters = Waiters::default();
        waiters.push(Lsn(3), Waiter::Request(RequestId(1)));
        waiters.push(Lsn(3), Waiter::Request(RequestId(2)));
        waiters.push(Lsn(7), Waiter::Request(RequestId(3)));
        assert_eq!(waiters.pop_up_to(Lsn(2)), None);
        assert_eq!(
            waiters.pop_up_to(Lsn(6)),
            Some(Waiter::Request(RequestId(1)))
        );
        assert_eq!(
            waiters.pop_up_to(Lsn(6)),
            Some(Waiter::Request(RequestId(2)))
        );
        assert_eq!(waiters.pop_up_to(Lsn(6)), None);
        assert_eq!(waiters.len(), 1);
    }
}

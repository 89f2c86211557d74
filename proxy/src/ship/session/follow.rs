//! When to read on at the log's head.
//!
//! A guest that syncs after each write makes the log durable thousands of times a second. What has
//! just become durable waits a moment for what comes behind it, so that reading costs the guest's
//! processors little. Time is an input.

/// Most that records wait before they are read.
const PAUSE_MAX_NS: u64 = 10_000_000;
/// Of the longest wait of a record for its segment.
const PAUSE_PART: u64 = 10;

#[derive(Clone, Copy)]
enum Place {
    /// There is more.
    Behind,
    /// Nothing more was durable.
    AtHead,
    /// More is durable since then.
    Pausing { since_ns: u64, until_ns: u64 },
}

pub(super) struct Follow {
    place: Place,
    pause_ns: u64,
}

impl Follow {
    pub(super) fn new(ship_interval_ns: u64) -> Self {
        let mut follow = Self {
            place: Place::Behind,
            pause_ns: 0,
        };
        follow.set_interval(ship_interval_ns);
        follow
    }

    pub(super) fn set_interval(&mut self, ship_interval_ns: u64) {
        self.pause_ns = (ship_interval_ns / PAUSE_PART).min(PAUSE_MAX_NS);
    }

    /// Something to read is there. Since when, if it is to be read now. `hurry`: without a pause.
    pub(super) fn read_since(&mut self, now_ns: u64, hurry: bool) -> Option<u64> {
        if let Place::AtHead = self.place {
            self.place = Place::Pausing {
                since_ns: now_ns,
                until_ns: now_ns + self.pause_ns,
            };
        }
        match self.place {
            Place::Pausing { until_ns, .. } if now_ns < until_ns && !hurry => None,
            Place::Pausing { since_ns, .. } => Some(since_ns),
            Place::Behind | Place::AtHead => Some(now_ns),
        }
    }

    /// It was read; whether that was all.
    pub(super) fn done(&mut self, all: bool) {
        self.place = if all { Place::AtHead } else { Place::Behind };
    }

    /// When to read on; until then news make no difference.
    pub(super) fn pauses_until_ns(&self) -> Option<u64> {
        match self.place {
            Place::Pausing { until_ns, .. } => Some(until_ns),
            Place::Behind | Place::AtHead => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_at_the_head_wait_a_tenth_of_the_interval_and_ten_milliseconds_at_most() {
        for (interval, pause) in [
            (0, 0),
            (50_000_000, 5_000_000),
            (500_000_000, 10_000_000),
            (u64::MAX, 10_000_000),
        ] {
            let mut follow = Follow::new(interval);
            assert_eq!(
                follow.read_since(7, false),
                Some(7),
                "what was there before"
            );
            follow.done(false);
            assert_eq!(follow.read_since(9, false), Some(9), "there is more");
            follow.done(true);
            if pause > 0 {
                assert_eq!(follow.read_since(100, false), None);
                assert_eq!(follow.read_since(100 + pause - 1, false), None);
                assert_eq!(follow.pauses_until_ns(), Some(100 + pause));
                assert_eq!(follow.read_since(101, true), Some(100), "in a hurry");
            } else {
                assert_eq!(follow.read_since(100, false), Some(100));
            }
            assert_eq!(follow.read_since(100 + pause, false), Some(100));
        }
    }
}

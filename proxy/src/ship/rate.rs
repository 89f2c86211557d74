//! A rate limit for passes. Time is an input.
#![deny(clippy::disallowed_methods)]

/// How much may be taken ahead of the rate, in nanoseconds of it.
const BURST_NS: u64 = 250_000_000;
const SECOND_NS: u128 = 1_000_000_000;

/// A token bucket that holds a quarter of a second's worth of bytes.
#[derive(Clone, Copy, Debug)]
pub struct RateLimit {
    bytes_per_second: Option<u64>,
    /// When the bytes taken so far would be through at the rate.
    through_ns: u64,
}

impl RateLimit {
    /// `None` or 0 for no limit.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            through_ns: 0,
        }
    }

    /// Another rate from now on. What was taken at the old one is forgotten.
    pub fn set(&mut self, bytes_per_second: Option<u64>) {
        *self = Self::new(bytes_per_second);
    }

    /// When the next bytes may be taken; in the past or `now_ns` for at once.
    #[must_use]
    pub fn ready_at_ns(&self) -> u64 {
        self.through_ns.saturating_sub(BURST_NS)
    }

    /// Takes bytes. May be called before its time: then it is waited longer afterwards.
    pub fn take(&mut self, now_ns: u64, bytes: u64) {
        let Some(rate) = self.bytes_per_second else {
            return;
        };
        let cost = u128::from(bytes) * SECOND_NS / u128::from(rate);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        self.through_ns = self.through_ns.max(now_ns).saturating_add(cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        const SECOND: u64 = 1_000_000_000;
        let mut limit = RateLimit::new(Some(10 << 20));
        let (mut now, mut taken) = (0, 0u64);
        while now < 10 * SECOND {
            now = now.max(limit.ready_at_ns());
            limit.take(now, 1 << 20);
            taken += 1 << 20;
        }
        let allowed = 10 * (10 << 20);
        assert!((allowed..allowed + (5 << 20)).contains(&taken), "{taken}");
    }

    #[test]
    fn another_rate_does_not_wait_for_the_old_one() {
        let mut limit = RateLimit::new(Some(1));
        limit.take(0, 1 << 20);
        assert!(limit.ready_at_ns() > 1 << 40);
        limit.set(Some(1 << 20));
        assert_eq!(limit.ready_at_ns(), 0);
        limit.take(0, 10 << 20);
        assert_eq!(limit.ready_at_ns(), 10_000_000_000 - BURST_NS);
    }

    #[test]
    fn no_limit_never_waits() {
        let mut limit = RateLimit::new(None);
        limit.take(5, u64::MAX);
        assert_eq!(limit.ready_at_ns(), 0);
    }
}

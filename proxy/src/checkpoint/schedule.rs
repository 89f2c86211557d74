//! Times at which a group's checkpoints are due.
//!
//! Pure: the time goes in, the next due time comes out. A run that was missed (the process was
//! down, the machine asleep) is not made up for: the next due time is always after `now`, so runs
//! never pile up. Groups with the same schedule are spread by their identity over a part of the time
//! between two runs, so that a host with many groups does not checkpoint all of them in the same
//! instant.

use afterimage_format::ids::GroupId;
use jiff::{SignedDuration, Timestamp, Zoned};
use std::time::Duration;

/// Longest time by which a group's runs are shifted: at most a tenth of the time between two.
const JITTER_MAX: Duration = Duration::from_secs(60);

/// Most due times that are left out between two attempts.
const SKIPPED_MAX: u32 = 15;

/// Due times to leave out after so many failures in a row: none after the first, then 1, 3, 7, at
/// most 15. A guest that cannot be frozen is not stressed with every run.
#[must_use]
pub fn runs_to_skip(failures_in_a_row: u32) -> u32 {
    let doublings = failures_in_a_row.saturating_sub(1).min(4);
    ((1 << doublings) - 1).min(SKIPPED_MAX)
}

/// Why a schedule was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// An interval of zero.
    #[error("a checkpoint interval must be longer than nothing")]
    ZeroInterval,
    /// Not a cron pattern.
    #[error("'{pattern}' is not a cron schedule; write five fields like \"0 * * * *\"")]
    Cron {
        /// As given.
        pattern: String,
        /// What the parser says.
        #[source]
        source: croner::errors::CronError,
    },
}

/// When checkpoints of one group are due.
#[derive(Debug, Clone)]
pub enum Schedule {
    /// At every multiple of `interval` since 1970, plus `phase`.
    Every {
        /// Time between two runs; above zero.
        interval: Duration,
        /// Shift against the multiples; below the interval.
        phase: Duration,
    },
    /// As a cron pattern says, in the time zone of the `now` that is passed in, shifted.
    Cron {
        /// The pattern.
        cron: Box<croner::Cron>,
        /// Who it is for.
        group: GroupId,
    },
}

impl Schedule {
    /// A schedule of one run per `interval`, shifted by up to a tenth of the interval (at most
    /// one minute) that depends on the group alone: the same over restarts.
    ///
    /// # Errors
    /// An interval of zero.
    pub fn every(interval: Duration, group: GroupId) -> Result<Self, ScheduleError> {
        if interval.is_zero() {
            return Err(ScheduleError::ZeroInterval);
        }
        let phase = shift(interval, group);
        Ok(Self::Every { interval, phase })
    }

    /// A schedule as cron writes it: five fields, or six with seconds first. Shifted by up to a
    /// tenth of the time to the run behind it (at most one minute), as [`Self::every`] is.
    ///
    /// # Errors
    /// A pattern that cron would not take.
    pub fn cron(pattern: &str, group: GroupId) -> Result<Self, ScheduleError> {
        match pattern.parse() {
            Ok(cron) => Ok(Self::Cron {
                cron: Box::new(cron),
                group,
            }),
            Err(source) => Err(ScheduleError::Cron {
                pattern: pattern.to_owned(),
                source,
            }),
        }
    }

    /// The first due time after `now`, or `None` if the schedule has no more (a cron pattern that
    /// names a year gone by).
    #[must_use]
    pub fn next_after(&self, now: &Zoned) -> Option<Timestamp> {
        match self {
            Self::Every { interval, phase } => {
                let interval_ns = i128::try_from(interval.as_nanos()).ok()?;
                let phase_ns = i128::try_from(phase.as_nanos()).ok()?;
                let since = now.timestamp().as_nanosecond() - phase_ns;
                let due = (since.div_euclid(interval_ns) + 1) * interval_ns + phase_ns;
                Timestamp::from_nanosecond(due).ok()
            }
            Self::Cron { cron, group } => {
                // What is due by the pattern up to a minute ago may still be to come, shifted.
                let mut from = now.checked_sub(JITTER_MAX).ok()?;
                loop {
                    let due = cron.find_next_occurrence(&from, false).ok()?;
                    let behind = cron.find_next_occurrence(&due, false).ok();
                    let gap = behind.and_then(|behind| behind.duration_since(&due).try_into().ok());
                    let shifted = due.timestamp() + shift(gap.unwrap_or(JITTER_MAX * 10), *group);
                    if shifted > now.timestamp() {
                        return Some(shifted);
                    }
                    from = due;
                }
            }
        }
    }

    /// How long from `now` to the next due time.
    #[must_use]
    pub fn wait_from(&self, now: &Zoned) -> Option<Duration> {
        let due = self.next_after(now)?;
        let wait: SignedDuration = due.duration_since(now.timestamp());
        Some(wait.try_into().unwrap_or(Duration::ZERO))
    }
}

/// What a group's runs are shifted by, `gap` apart: always the same.
fn shift(gap: Duration, group: GroupId) -> Duration {
    let spread_ns = (gap / 10).min(JITTER_MAX).as_nanos().max(1);
    let shift_ns = group.0.as_u128() % spread_ns;
    Duration::from_nanos(u64::try_from(shift_ns).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Zoned {
        text.parse().expect("a time with a zone")
    }

    fn group(last: u8) -> GroupId {
        let mut bytes = [0; 16];
        bytes[15] = last;
        GroupId::from_bytes(bytes)
    }

    #[test]
    fn an_interval_is_due_once_per_multiple_and_never_in_the_past() {
        let schedule = Schedule::every(Duration::from_secs(300), group(0)).expect("valid");
        let now = at("2026-03-01T10:02:00+00:00[UTC]");
        let due = schedule.next_after(&now).expect("has a next");
        assert_eq!(due.to_string(), "2026-03-01T10:05:00Z");
        let exactly = due.to_zoned(jiff::tz::TimeZone::UTC);
        let after = schedule.next_after(&exactly).expect("has a next");
        assert_eq!(after.to_string(), "2026-03-01T10:10:00Z");
        // Asleep for a day: one run is due next, not the 288 that were missed.
        let woke = at("2026-03-02T10:07:31+00:00[UTC]");
        let due = schedule.next_after(&woke).expect("has a next");
        assert_eq!(due.to_string(), "2026-03-02T10:10:00Z");
    }

    #[test]
    fn groups_are_spread_and_each_keeps_its_place() {
        let every = |g| Schedule::every(Duration::from_secs(1), g).expect("valid");
        let now = at("2026-03-01T10:00:00.5+00:00[UTC]");
        let first = every(group(1)).next_after(&now);
        assert_ne!(first, every(group(2)).next_after(&now));
        assert_eq!(first, every(group(1)).next_after(&now));
    }

    #[test]
    fn cron_runs_at_local_time() {
        let schedule = Schedule::cron("30 2 * * *", group(0)).expect("valid");
        let now = at("2026-06-01T01:00:00+02:00[Europe/Berlin]");
        let due = schedule.next_after(&now).expect("has a next");
        assert_eq!(due.to_string(), "2026-06-01T00:30:00Z");
        assert_eq!(schedule.wait_from(&now), Some(Duration::from_secs(90 * 60)));
    }

    #[test]
    fn cron_is_spread_over_groups_and_no_run_is_doubled_or_lost() {
        let schedule = |of: u64| {
            // 20 s per step: within the minute for three groups.
            let id = GroupId::from_bytes(u128::from(of * 20_000_000_000).to_be_bytes());
            Schedule::cron("0 2 * * *", id).expect("valid")
        };
        let mut now = at("2026-06-01T01:59:00+00:00[UTC]");
        for of in [0, 1, 2] {
            let due = schedule(of).next_after(&now).expect("has a next");
            assert_eq!(
                due,
                at("2026-06-01T02:00:00+00:00[UTC]").timestamp() + Duration::from_secs(20 * of)
            );
        }
        let one = schedule(1);
        // Behind the pattern's time and before its own: still to come.
        now = at("2026-06-01T02:00:19+00:00[UTC]");
        assert_eq!(one.wait_from(&now), Some(Duration::from_secs(1)));
        now = at("2026-06-01T02:00:20+00:00[UTC]");
        assert_eq!(one.wait_from(&now), Some(Duration::from_secs(86_400)));
        // Each second: at most a tenth of it.
        let each = Schedule::cron("* * * * * *", group(7)).expect("valid");
        for _ in 0..3 {
            let due = each.next_after(&now).expect("has a next");
            assert_eq!(
                due.duration_since(now.timestamp()).as_secs(),
                i64::from(now.subsec_nanosecond() > 0)
            );
            now = due.to_zoned(jiff::tz::TimeZone::UTC);
        }
    }

    #[test]
    fn a_guest_that_fails_again_and_again_is_asked_less_often() {
        let skipped: Vec<u32> = (0..8).map(runs_to_skip).collect();
        assert_eq!(skipped, [0, 0, 1, 3, 7, 15, 15, 15]);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(
            Schedule::every(Duration::ZERO, group(0)),
            Err(ScheduleError::ZeroInterval)
        ));
        assert!(matches!(
            Schedule::cron("every day at noon", group(0)),
            Err(ScheduleError::Cron { .. })
        ));
    }
}

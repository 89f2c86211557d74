//! What people write for a point: `latest`, `lsn:123`, `lsn:2/123`, a time, or a label.
//!
//! Times are RFC 3339 (`2026-11-22T14:03:07Z`), a local date and time (`2026-11-22 14:03:07`), a
//! local time of day (`14:03:07`, `14:03`: the last time that clocks showed it), or relative to
//! now (`-90s`, `-5m`, `-2h`, `-1d`, also joined: `-1h30m`). No label can be mistaken for one of
//! them: labels have no colon and do not begin with a dash, and `latest` and whatever reads as a time are
//! refused as labels.

use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::names;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned, civil};

/// A point as somebody wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointSpec {
    /// The newest point.
    Latest,
    /// A record; the epoch may be left out while only one has it.
    Lsn(Option<Epoch>, Lsn),
    /// The last record at or before this moment, nanoseconds since 1970.
    Time(u64),
    /// The checkpoint with this label.
    Label(String),
}

/// Why a text is no point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Nothing fits.
    #[error(
        "{0:?} is no recovery point: use latest, lsn:123, a time (2026-11-22T14:03:07Z, 14:03:07, -90s) or a label"
    )]
    NotAPoint(String),
    /// A moment that has not come.
    #[error("{0:?} lies in the future")]
    Future(String),
}

/// Whether a checkpoint may carry this label: it is a name, and no other kind of point. (A time can
/// be written without a colon: `2026-11-22T140307Z`.)
#[must_use]
pub fn label_is_usable(label: &str) -> bool {
    names::validate(label).is_ok()
        && !label.eq_ignore_ascii_case("latest")
        && label.parse::<Timestamp>().is_err()
}

impl PointSpec {
    /// Understands a text; `now` and the time zone are those of whoever wrote it.
    ///
    /// # Errors
    /// It is none of the forms, or lies in the future.
    pub fn parse(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Self, SpecError> {
        let wrong = || SpecError::NotAPoint(text.to_owned());
        if text.eq_ignore_ascii_case("latest") {
            return Ok(Self::Latest);
        }
        if let Some(rest) = text.strip_prefix("lsn:") {
            return parse_lsn(rest).ok_or_else(wrong);
        }
        let moment = if let Some(rest) = text.strip_prefix('-') {
            let back = parse_duration(rest).ok_or_else(wrong)?;
            let now = now.as_nanosecond();
            return u64::try_from(now - back)
                .map(Self::Time)
                .map_err(|_| wrong());
        } else if let Ok(moment) = text.parse::<Timestamp>() {
            moment
        } else if let Some(moment) = parse_local(text, now, zone) {
            moment
        } else if label_is_usable(text) {
            return Ok(Self::Label(text.to_owned()));
        } else {
            return Err(wrong());
        };
        if moment > now {
            return Err(SpecError::Future(text.to_owned()));
        }
        u64::try_from(moment.as_nanosecond())
            .map(Self::Time)
            .map_err(|_| wrong())
    }
}

fn parse_lsn(text: &str) -> Option<PointSpec> {
    let number = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse::<u64>().ok()).flatten()
    };
    match text.split_once('/') {
        Some((epoch, lsn)) => Some(PointSpec::Lsn(
            Some(Epoch(number(epoch)?)),
            Lsn(number(lsn)?),
        )),
        None => Some(PointSpec::Lsn(None, Lsn(number(text)?))),
    }
}

/// `1h30m`, `90s`, `2d`: nanoseconds.
fn parse_duration(text: &str) -> Option<i128> {
    let mut rest = text;
    let mut total = 0i128;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .filter(|digits| *digits > 0)?;
        let number: i128 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit: i128 = match &rest[..letters] {
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" | "min" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[letters..];
    }
    (!text.is_empty()).then_some(total)
}

fn parse_local(text: &str, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let here: Zoned = now.to_zoned(zone.clone());
    // A date has dashes; without them it is a time of day.
    if text.contains(':')
        && !text.contains('-')
        && let Ok(time) = text.parse::<civil::Time>()
    {
        let today = here.date().to_datetime(time).to_zoned(zone.clone()).ok()?;
        if today.timestamp() <= now {
            return Some(today.timestamp());
        }
        let yesterday = here.date().yesterday().ok()?;
        return Some(
            yesterday
                .to_datetime(time)
                .to_zoned(zone.clone())
                .ok()?
                .timestamp(),
        );
    }
    if !text.contains(':') {
        return None;
    }
    let moment = text.parse::<civil::DateTime>().ok()?;
    Some(moment.to_zoned(zone.clone()).ok()?.timestamp())
}

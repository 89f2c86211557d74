//! Arguments with a shape: names, disks, moments.

use afterimage_format::names::{self, NameError};
use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};
use std::fmt;
use std::str::FromStr;

use crate::config::units::Interval;

/// Why an argument was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// A name that cannot be.
    #[error("{0}")]
    Name(#[from] NameError),
    /// Not GROUP/DISK.
    #[error("name a disk as GROUP/DISK")]
    Disk,
    /// A label that would be taken for something else.
    #[error("a label must not read like a time, an LSN or 'latest'")]
    AmbiguousLabel,
    /// A moment that cannot be read.
    #[error(
        "'{0}' is not a moment: give latest, lsn:123, a time (2026-01-31T14:03:07Z, 14:03:07 or -90s) or a checkpoint's label"
    )]
    Point(String),
}

macro_rules! name_value {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_value! {
    /// A valid name of a group.
    GroupName
}

impl FromStr for GroupName {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        names::validate(text)?;
        Ok(Self(text.to_owned()))
    }
}

name_value! {
    /// A valid label of a checkpoint: a name that reads like no other way to say a moment.
    Label
}

impl FromStr for Label {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        names::validate(text)?;
        match text.parse()? {
            Point::Label(label) => Ok(Self(label)),
            _ => Err(ValueError::AmbiguousLabel),
        }
    }
}

/// One disk of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRef {
    /// Name of the group.
    pub group: String,
    /// Name of the disk within it.
    pub disk: String,
}

impl FromStr for DiskRef {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (group, disk) = text.split_once('/').ok_or(ValueError::Disk)?;
        names::validate(group)?;
        names::validate(disk)?;
        Ok(Self {
            group: group.to_owned(),
            disk: disk.to_owned(),
        })
    }
}

impl fmt::Display for DiskRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.disk)
    }
}

/// A moment of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Point {
    /// The newest that the replica has.
    Latest,
    /// After exactly this record.
    Lsn(u64),
    /// The last record up to this time.
    Time(Timestamp),
    /// The newest checkpoint of this label.
    Label(String),
}

impl FromStr for Point {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        Self::parse(text, &Zoned::now())
    }
}

impl Point {
    /// Reads a moment; `now` gives today's date, the zone, and the start of relative times.
    ///
    /// # Errors
    /// When the text is no moment and could not be a label.
    pub fn parse(text: &str, now: &Zoned) -> Result<Self, ValueError> {
        let wrong = || ValueError::Point(text.to_owned());
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(number) = text.strip_prefix("lsn:") {
            return number.parse().map(Self::Lsn).map_err(|_| wrong());
        }
        if let Some(ago) = text.strip_prefix('-') {
            let ago: Interval = ago.parse().map_err(|_| wrong())?;
            let ago = SignedDuration::try_from(ago.0).map_err(|_| wrong())?;
            let time = now.timestamp().checked_sub(ago).map_err(|_| wrong())?;
            return Ok(Self::Time(time));
        }
        if let Some(time) = absolute_time(text, now) {
            return Ok(Self::Time(time));
        }
        names::validate(text).map_err(|_| wrong())?;
        Ok(Self::Label(text.to_owned()))
    }
}

/// RFC 3339; or, in the local zone, a date with a time, or a time of today (of yesterday if today's
/// is still to come).
fn absolute_time(text: &str, now: &Zoned) -> Option<Timestamp> {
    if !text.starts_with(|c: char| c.is_ascii_digit()) || !text.contains(':') {
        return None;
    }
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Some(timestamp);
    }
    let zone: TimeZone = now.time_zone().clone();
    if let Ok(time) = text.parse::<Time>()
        && !text.contains('-')
    {
        let today = now.date().to_datetime(time).to_zoned(zone.clone()).ok()?;
        if today <= *now {
            return Some(today.timestamp());
        }
        let yesterday = now.date().yesterday().ok()?.to_datetime(time);
        return Some(yesterday.to_zoned(zone).ok()?.timestamp());
    }
    let local: DateTime = text.parse().ok()?;
    Some(local.to_zoned(zone).ok()?.timestamp())
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Self::Time(time) => write!(f, "{time}"),
            Self::Label(label) => f.write_str(label),
        }
    }
}

/// A group, and a moment of it: `GROUP` or `GROUP@POINT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPoint {
    /// Name of the group.
    pub group: String,
    /// The moment; `latest` when none was named.
    pub point: Point,
}

impl FromStr for GroupPoint {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (group, point) = match text.split_once('@') {
            Some((group, point)) => (group, point.parse()?),
            None => (text, Point::Latest),
        };
        names::validate(group)?;
        Ok(Self {
            group: group.to_owned(),
            point,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noon() -> Zoned {
        "2026-01-31T12:00:00+01:00[+01:00]".parse().expect("a time")
    }

    fn time(text: &str) -> Point {
        Point::Time(text.parse().expect("a time"))
    }

    #[test]
    fn moments_are_read_as_people_write_them() {
        let now = noon();
        let parse = |text| Point::parse(text, &now);
        assert_eq!(parse("latest"), Ok(Point::Latest));
        assert_eq!(parse("lsn:123"), Ok(Point::Lsn(123)));
        assert_eq!(parse("-90s"), Ok(time("2026-01-31T10:58:30Z")));
        assert_eq!(parse("10:30:01"), Ok(time("2026-01-31T09:30:01Z")));
        assert_eq!(parse("14:03:07"), Ok(time("2026-01-30T13:03:07Z")));
        assert_eq!(
            parse("2026-01-31T14:03:07Z"),
            Ok(time("2026-01-31T14:03:07Z"))
        );
        assert_eq!(
            parse("2026-01-30T10:00:00"),
            Ok(time("2026-01-30T09:00:00Z"))
        );
        assert_eq!(
            parse("before-upgrade"),
            Ok(Point::Label("before-upgrade".into()))
        );
        for wrong in ["", "lsn:", "lsn:x", "-90", "-x", "../x", "a\0", "a b"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn labels_read_like_nothing_else() {
        for wrong in ["latest", "lsn:1", "-5s", "10:30:00", "a/b", ""] {
            assert!(wrong.parse::<Label>().is_err(), "{wrong}");
        }
        assert!("2026-upgrade".parse::<Label>().is_ok());
    }

    #[test]
    fn names_that_leave_a_folder_are_refused() {
        for wrong in ["../a", "a/../b", "a\0/b", "/b", "a/", "a"] {
            assert!(wrong.parse::<DiskRef>().is_err(), "{wrong}");
        }
        assert!("../a@latest".parse::<GroupPoint>().is_err());
        let parsed: GroupPoint = "vm1@lsn:7".parse().expect("valid");
        assert_eq!(
            (parsed.group.as_str(), parsed.point),
            ("vm1", Point::Lsn(7))
        );
    }
}

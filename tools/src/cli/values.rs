//! Arguments with a shape: names, disks, moments.

use afterimage_format::names::{self, NameError};
use afterimage_replica::points::{PointSpec, SpecError, label_is_usable};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::fmt;
use std::str::FromStr;

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
    #[error("{0}")]
    Point(#[from] SpecError),
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
        if !label_is_usable(text) {
            return Err(ValueError::AmbiguousLabel);
        }
        Ok(Self(text.to_owned()))
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

/// A moment of a group, in the clock and zone of whoever asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point(pub PointSpec);

impl FromStr for Point {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let spec = PointSpec::parse(text, Timestamp::now(), &TimeZone::system())?;
        Ok(Self(spec))
    }
}

/// As [`Point::from_str`] reads it; a time absolute, so that it means the same elsewhere and later.
impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            PointSpec::Latest => f.write_str("latest"),
            PointSpec::Lsn(None, lsn) => write!(f, "lsn:{lsn}"),
            PointSpec::Lsn(Some(epoch), lsn) => write!(f, "lsn:{epoch}/{lsn}"),
            PointSpec::Time(ns) => match Timestamp::from_nanosecond(i128::from(*ns)) {
                Ok(time) => write!(f, "{time}"),
                Err(_) => write!(f, "{ns} ns"),
            },
            PointSpec::Label(label) => f.write_str(label),
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
            None => (text, Point(PointSpec::Latest)),
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

    #[test]
    fn a_moment_is_the_same_elsewhere() {
        for text in [
            "latest",
            "lsn:123",
            "lsn:2/123",
            "before-upgrade",
            "2026-01-31T14:03:07Z",
        ] {
            let point: Point = text.parse().expect(text);
            assert_eq!(point.to_string(), text);
        }
        let point: Point = "-90s".parse().expect("valid");
        assert_eq!(point.to_string().parse(), Ok(point));
        for wrong in ["", "lsn:", "lsn:x", "-90", "-x", "../x", "a\0", "a b"] {
            assert!(wrong.parse::<Point>().is_err(), "{wrong}");
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
        assert_eq!(parsed.group, "vm1");
        assert_eq!(parsed.point.to_string(), "lsn:7");
    }
}

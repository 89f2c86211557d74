//! A time past all that was received.

use std::fmt;

use super::resolve::describe;
use super::spec::PointSpec;
use crate::history::{History, Position};

/// A time was asked for that lies past the last record that was received. It resolves to that record:
/// right if the primary wrote nothing in between, which only the primary knows. So whoever gets the
/// content must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beyond {
    /// What was asked for, nanoseconds since 1970.
    pub asked_ns: u64,
    /// Primary's clock at the last record received, likewise.
    pub received_ns: u64,
    /// That record.
    pub last: Position,
}

impl Beyond {
    /// Whether a point lies past all that was received.
    #[must_use]
    pub fn of(history: &History, spec: &PointSpec) -> Option<Self> {
        let PointSpec::Time(asked_ns) = *spec else {
            return None;
        };
        let mut eras = history.epochs.iter().flat_map(|epoch| {
            let number = epoch.number;
            epoch.eras().iter().map(move |era| (number, era))
        });
        let (epoch, era) = eras.next_back()?;
        (asked_ns > era.last_ns).then_some(Self {
            asked_ns,
            received_ns: era.last_ns,
            last: Position {
                epoch,
                lsn: era.last_lsn,
            },
        })
    }
}

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "nothing was received after {} ({}): what the primary wrote between then and {} is not in this image",
            describe(self.received_ns),
            self.last,
            describe(self.asked_ns)
        )
    }
}

//! Clock eras: stretches of records within which the primary's clock did not jump.
//!
//! A time is resolved within eras; order is by LSN alone. A new era begins where the wall clock
//! goes back by more than [`JUMP_NS`], where it drifts from the boot clock by more than that
//! between two segments of one boot, and with each epoch.

use afterimage_format::ids::Lsn;
pub use afterimage_format::layer::ClockEra;
use afterimage_format::segment::ClockAnchor;

/// A change of the clock by more than this is a jump. Slewing stays below it.
pub(super) const JUMP_NS: u64 = 2_000_000_000;

/// The eras of an epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock {
    pub(super) eras: Vec<ClockEra>,
    anchor: Option<ClockAnchor>,
}

impl Clock {
    /// A segment with this anchor begins: has the clock jumped since the last?
    pub(super) fn anchor(&mut self, anchor: ClockAnchor) -> bool {
        let before = self.anchor.replace(anchor);
        before.is_some_and(|before| {
            before.boot_id == anchor.boot_id
                && offset(anchor).abs_diff(offset(before)) > JUMP_NS.into()
        })
    }

    /// The anchor of the last segment.
    pub(super) const fn last_anchor(&self) -> Option<ClockAnchor> {
        self.anchor
    }

    /// The last segment had this anchor.
    pub(super) const fn set_anchor(&mut self, anchor: Option<ClockAnchor>) {
        self.anchor = anchor;
    }

    /// One more record.
    pub(super) fn record(&mut self, lsn: Lsn, wall_ns: u64, jumped: bool) {
        if let Some(era) = self.eras.last_mut()
            && !jumped
            && wall_ns.saturating_add(JUMP_NS) >= era.last_ns
        {
            era.last_lsn = lsn;
            era.last_ns = era.last_ns.max(wall_ns);
            return;
        }
        self.eras.push(ClockEra {
            first_lsn: lsn,
            last_lsn: lsn,
            first_ns: wall_ns,
            last_ns: wall_ns,
        });
    }
}

fn offset(anchor: ClockAnchor) -> i128 {
    i128::from(anchor.wall_ns) - i128::from(anchor.boottime_ns)
}

//! Listing what there is.

use serde::Serialize;

use afterimage_format::checkpoint::{CheckpointKind, CheckpointTrigger};
use afterimage_format::ids::Lsn;

use crate::history::{Base, Checkpoint, Epoch, History, Position};

/// A named recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Point {
    /// What to write for it: its label if no other has it, else `lsn:EPOCH/LSN`.
    pub point: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its LSN.
    pub lsn: u64,
    /// Primary's clock, nanoseconds since 1970.
    pub time_ns: u64,
    /// `crash` or `application`: the latter only if the guest confirmed the thaw.
    pub kind: &'static str,
    /// How the guest's freeze went, if one was wanted.
    pub freeze: Option<Freeze>,
    /// `request` or `schedule`.
    pub trigger: &'static str,
    /// Its label; empty for none.
    pub label: String,
    /// Bytes written since the checkpoint before it (or the first readable moment).
    pub changed_bytes: u64,
}

/// How a guest's freeze went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Freeze {
    /// What was frozen, separated by spaces.
    pub frozen: String,
    /// What could not be frozen, separated by spaces.
    pub skipped: String,
    /// From the freeze asked to the thaw answered; 0 if it did not come to that.
    pub window_ns: u64,
    /// The primary's share of it.
    pub own_ns: u64,
    /// Why the point stayed crash-consistent; none if it did not.
    pub reason: Option<String>,
}

/// Every record from the first to the last is a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Range {
    /// Epoch.
    pub epoch: u64,
    /// First LSN.
    pub first_lsn: u64,
    /// Last LSN.
    pub last_lsn: u64,
    /// Primary's clock at the first, nanoseconds since 1970.
    pub first_ns: u64,
    /// Primary's clock at the last, nanoseconds since 1970.
    pub last_ns: u64,
}

/// Why nothing is restorable between two ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GapCause {
    /// The log overflowed while the replica was away: records are missing.
    RecordsMissing,
    /// No records are missing, but the copy was made anew.
    Resync,
    /// Another log took over.
    NewEpoch,
}

impl GapCause {
    /// Its name in lists.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RecordsMissing => "records-missing",
            Self::Resync => "resync",
            Self::NewEpoch => "new-epoch",
        }
    }
}

/// Where the list has a hole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// Last point before it, `lsn:EPOCH/LSN`.
    pub after: String,
    /// Its time.
    pub after_ns: u64,
    /// First point behind it; none while the pass that ends it is under way.
    pub before: Option<String>,
    /// Its time.
    pub before_ns: Option<u64>,
    /// Why.
    pub cause: GapCause,
}

/// A pass that is under way: no points from its begin on, until it is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PendingPass {
    /// Epoch.
    pub epoch: u64,
    /// LSN of its `PassBegin`.
    pub begin_lsn: u64,
    /// Primary's clock at its begin, nanoseconds since 1970.
    pub begin_ns: u64,
    /// Blocks that have come.
    pub blocks: u64,
}

/// What a group can be restored to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PointList {
    /// The group's name.
    pub group: String,
    /// Its UUID.
    pub uuid: String,
    /// The newest point, `lsn:EPOCH/LSN`; none before the first pass is complete.
    pub latest: Option<String>,
    /// Named points, oldest first.
    pub checkpoints: Vec<Point>,
    /// Where every record is a point, oldest first.
    pub ranges: Vec<Range>,
    /// The holes between and behind them.
    pub gaps: Vec<Gap>,
    /// The pass under way.
    pub pending_pass: Option<PendingPass>,
}

impl PointList {
    /// Lists a history.
    #[must_use]
    pub fn of(history: &History) -> Self {
        let mut list = Self {
            group: history.manifest.name.clone(),
            uuid: history.manifest.group.to_string(),
            latest: history.latest().map(|at| at.to_string()),
            checkpoints: Vec::new(),
            ranges: Vec::new(),
            gaps: Vec::new(),
            pending_pass: None,
        };
        let mut open: Option<Gap> = None;
        for epoch in &history.epochs {
            for base in &epoch.bases {
                list.add_base(epoch, base, &mut open);
            }
        }
        list.gaps.extend(open);
        list.name_points();
        list
    }

    fn add_base(&mut self, epoch: &Epoch, base: &Base, open: &mut Option<Gap>) {
        // A base that cannot be read makes a hole behind the last range, if there was one.
        if let (None, Some(last)) = (&open, self.ranges.last()) {
            *open = Some(Gap {
                after: text(last.epoch, last.last_lsn),
                after_ns: last.last_ns,
                before: None,
                before_ns: None,
                cause: match (last.epoch == epoch.number.0, base.after_gap) {
                    (false, _) => GapCause::NewEpoch,
                    (true, true) => GapCause::RecordsMissing,
                    (true, false) => GapCause::Resync,
                },
            });
        } else if let Some(gap) = open
            && base.after_gap
            && gap.cause == GapCause::Resync
        {
            gap.cause = GapCause::RecordsMissing;
        }
        let Some((first, last)) = base.readable(epoch.cursor.lsn) else {
            self.pending_pass = base.active_pass().map(|pass| PendingPass {
                epoch: epoch.number.0,
                begin_lsn: pass.begin.0,
                begin_ns: base.begin_wall_ns,
                blocks: pass.blocks,
            });
            return;
        };
        if let Some(mut gap) = open.take() {
            gap.before = Some(text(epoch.number.0, first.0));
            gap.before_ns = Some(base.readable_wall_ns);
            self.gaps.push(gap);
        }
        self.ranges.push(Range {
            epoch: epoch.number.0,
            first_lsn: first.0,
            last_lsn: last.0,
            first_ns: base.readable_wall_ns,
            last_ns: base.last_wall_ns,
        });
        self.add_checkpoints(epoch, base, first, last);
    }

    fn add_checkpoints(&mut self, epoch: &Epoch, base: &Base, first: Lsn, last: Lsn) {
        for point in base
            .checkpoints
            .iter()
            .filter(|p| first <= p.lsn && p.lsn <= last)
        {
            self.checkpoints.push(Point {
                point: Position {
                    epoch: epoch.number,
                    lsn: point.lsn,
                }
                .to_string(),
                epoch: epoch.number.0,
                lsn: point.lsn.0,
                time_ns: point.wall_ns,
                kind: kind_name(point),
                freeze: freeze(point),
                trigger: trigger_name(point.trigger),
                label: point.label.clone(),
                changed_bytes: point.changed_bytes,
            });
        }
    }

    /// A label that stands alone is the shortest way to say which point is meant.
    fn name_points(&mut self) {
        let mut labels = std::collections::HashMap::<&str, usize>::new();
        for point in &self.checkpoints {
            *labels.entry(&point.label).or_default() += 1;
        }
        let alone = |point: &Point| !point.label.is_empty() && labels[point.label.as_str()] == 1;
        let alone: Vec<bool> = self.checkpoints.iter().map(alone).collect();
        for (point, alone) in self.checkpoints.iter_mut().zip(alone) {
            if alone {
                point.point.clone_from(&point.label);
            }
        }
    }
}

fn text(epoch: u64, lsn: u64) -> String {
    format!("lsn:{epoch}/{lsn}")
}

/// Name of a kind in lists. An application checkpoint counts as one only once it is confirmed.
fn kind_name(point: &Checkpoint) -> &'static str {
    let confirmed = point.confirm.as_ref().is_some_and(|body| body.confirmed);
    match point.kind {
        CheckpointKind::Application if confirmed => "application",
        CheckpointKind::Application | CheckpointKind::Crash => "crash",
    }
}

fn freeze(point: &Checkpoint) -> Option<Freeze> {
    if point.kind == CheckpointKind::Crash {
        return None;
    }
    let Some(body) = &point.confirm else {
        return Some(Freeze {
            frozen: String::new(),
            skipped: String::new(),
            window_ns: 0,
            own_ns: 0,
            reason: Some("no confirmation has come".to_owned()),
        });
    };
    Some(Freeze {
        frozen: body.frozen.clone(),
        skipped: body.skipped.clone(),
        window_ns: body.window_ns,
        own_ns: body.own_ns,
        reason: (!body.confirmed).then(|| body.reason.clone()),
    })
}

const fn trigger_name(trigger: CheckpointTrigger) -> &'static str {
    match trigger {
        CheckpointTrigger::Request => "request",
        CheckpointTrigger::Schedule => "schedule",
    }
}

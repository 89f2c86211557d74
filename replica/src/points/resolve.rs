//! From what somebody wrote to a position that can be opened.

use std::fmt;

use afterimage_format::ids::{Epoch as EpochNumber, Lsn};
use afterimage_format::segment::SegmentKind;

use super::spec::PointSpec;
use crate::group::{Group, GroupError, read_index_checked};
use crate::history::{ClockEra, Epoch, History, Position, SegmentEntry};
use crate::repository::keys;

/// Why a point cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// Nothing has been received whole yet.
    #[error("group {group:?} has no recovery point yet: its first pass is not complete")]
    None {
        /// The group.
        group: String,
    },
    /// No checkpoint has this label.
    #[error("no checkpoint is labelled {label:?}; 'points' lists those there are")]
    NoLabel {
        /// The label.
        label: String,
    },
    /// Several things are meant.
    #[error("{what} is ambiguous, it may mean {choices}: name one of them")]
    Ambiguous {
        /// What was asked for.
        what: String,
        /// The choices.
        choices: Choices,
    },
    /// Nothing is restorable there.
    #[error(
        "{what} is no recovery point: it lies in a gap, in an unfinished pass, or was never received{}",
        Nearest(before, after)
    )]
    NotThere {
        /// What was asked for.
        what: String,
        /// Last point before it.
        before: Option<Position>,
        /// First point after it.
        after: Option<Position>,
    },
    /// The history cannot be read.
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// Positions to choose from.
#[derive(Debug, Clone)]
pub struct Choices(pub Vec<Position>);

impl fmt::Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, position) in self.0.iter().enumerate() {
            write!(f, "{}{position}", if at == 0 { "" } else { " or " })?;
        }
        Ok(())
    }
}

struct Nearest<'a>(&'a Option<Position>, &'a Option<Position>);

impl fmt::Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(before) = self.0 {
            write!(f, "; the last one before it is {before}")?;
        }
        if let Some(after) = self.1 {
            write!(f, "; the first one after it is {after}")?;
        }
        Ok(())
    }
}

/// Where in the history a moment is.
enum Moment {
    /// At this record exactly.
    At(Position),
    /// Within this segment of the epoch: its records say where.
    Within(EpochNumber, SegmentEntry, ClockEra),
}

/// The position that a point means. Whatever is returned can be opened.
///
/// # Errors
/// It means nothing, or several things.
pub async fn resolve(group: &Group, spec: &PointSpec) -> Result<Position, PointError> {
    let time = match spec {
        PointSpec::Time(time) => *time,
        other => {
            let history = group.history();
            return match other {
                PointSpec::Lsn(epoch, lsn) => resolve_lsn(&history, *epoch, *lsn),
                PointSpec::Label(label) => resolve_label(&history, label),
                PointSpec::Latest | PointSpec::Time(_) => {
                    let group = history.manifest.name.clone();
                    history.latest().ok_or(PointError::None { group })
                }
            };
        }
    };
    let what = describe(time);
    let moment = moment_of(&group.history(), time, &what)?;
    let at = match moment {
        Moment::At(at) => at,
        Moment::Within(epoch, segment, era) => {
            let key = keys::segment(group.id(), epoch, segment.sequence);
            let index = read_index_checked(group.repository(), &key, &segment).await?;
            let within = |lsn: Lsn| era.first_lsn <= lsn && lsn <= era.last_lsn;
            let records = index.entries.iter().map(|entry| &entry.record);
            let last = records.rev().find(|r| within(r.lsn) && r.wall_ns <= time);
            Position {
                epoch,
                lsn: last.map_or(era.first_lsn, |record| record.lsn),
            }
        }
    };
    check(&group.history(), at, what)
}

/// When the record of this position was written, by the primary's clock. None where no log segment has
/// it.
///
/// # Errors
/// The segment that has it cannot be read.
pub async fn time_of(group: &Group, at: Position) -> Result<Option<u64>, GroupError> {
    let segment = {
        let history = group.history();
        let epoch = history.epoch(at.epoch);
        let segments = epoch.into_iter().flat_map(|epoch| &epoch.segments);
        let mut holding = segments.filter(|segment| {
            segment.kind == SegmentKind::Log
                && segment.first_lsn <= at.lsn
                && at.lsn <= segment.last_lsn
        });
        holding.next().copied()
    };
    let Some(segment) = segment else {
        return Ok(None);
    };
    let key = keys::segment(group.id(), at.epoch, segment.sequence);
    let index = read_index_checked(group.repository(), &key, &segment).await?;
    let mut records = index.entries.iter().map(|entry| &entry.record);
    let found = records.find(|record| record.lsn == at.lsn);
    Ok(found.map(|record| record.wall_ns))
}

pub(super) fn describe(time_ns: u64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time_ns))
        .map_or_else(|_| time_ns.to_string(), |moment| moment.to_string())
}

fn check(history: &History, at: Position, what: String) -> Result<Position, PointError> {
    if history.base_at(at).is_some() {
        return Ok(at);
    }
    let of = |epoch: &Epoch, lsn| Position {
        epoch: epoch.number,
        lsn,
    };
    let ranges: Vec<_> = history
        .readable()
        .map(|(epoch, _, from, to)| (of(epoch, from), of(epoch, to)))
        .collect();
    if ranges.is_empty() {
        return Err(PointError::None {
            group: history.manifest.name.clone(),
        });
    }
    let before = ranges.iter().rev().map(|(_, to)| *to).find(|to| *to < at);
    let after = ranges.iter().map(|(from, _)| *from).find(|from| *from > at);
    Err(PointError::NotThere {
        what,
        before,
        after,
    })
}

fn resolve_lsn(
    history: &History,
    epoch: Option<EpochNumber>,
    lsn: Lsn,
) -> Result<Position, PointError> {
    if let Some(epoch) = epoch {
        let at = Position { epoch, lsn };
        return check(history, at, at.to_string());
    }
    let what = format!("lsn:{lsn}");
    let found: Vec<Position> = history
        .readable()
        .filter(|(_, _, first, last)| *first <= lsn && lsn <= *last)
        .map(|(epoch, ..)| Position {
            epoch: epoch.number,
            lsn,
        })
        .collect();
    match found[..] {
        [at] => Ok(at),
        [] => {
            let epoch = history
                .newest()
                .map_or(EpochNumber(0), |epoch| epoch.number);
            check(history, Position { epoch, lsn }, what)
        }
        _ => Err(PointError::Ambiguous {
            what,
            choices: Choices(found),
        }),
    }
}

fn resolve_label(history: &History, label: &str) -> Result<Position, PointError> {
    let mut found = Vec::new();
    for (epoch, base, first, last) in history.readable() {
        let here = base
            .checkpoints
            .iter()
            .filter(|point| point.label == label && first <= point.lsn && point.lsn <= last);
        found.extend(here.map(|point| Position {
            epoch: epoch.number,
            lsn: point.lsn,
        }));
    }
    match found[..] {
        [at] => Ok(at),
        [] => Err(PointError::NoLabel {
            label: label.to_owned(),
        }),
        _ => {
            let what = format!("label {label:?}");
            Err(PointError::Ambiguous {
                what,
                choices: Choices(found),
            })
        }
    }
}

/// Finds the moment among the eras of all epochs.
fn moment_of(history: &History, time: u64, what: &str) -> Result<Moment, PointError> {
    let eras: Vec<(&Epoch, &ClockEra)> = history
        .epochs
        .iter()
        .flat_map(|epoch| epoch.eras().iter().map(move |era| (epoch, era)))
        .collect();
    let inside: Vec<_> = eras
        .iter()
        .filter(|(_, era)| era.first_ns <= time && time < era.last_ns)
        .collect();
    // At or after the end of one era and before the beginning of the next: the state in between.
    let between = eras.iter().enumerate().filter(|(at, (_, era))| {
        era.last_ns <= time
            && eras
                .get(at + 1)
                .is_none_or(|(_, next)| time < next.first_ns)
    });
    let between: Vec<_> = between.map(|(_, era)| era).collect();
    let position = |(epoch, era): &(&Epoch, &ClockEra), lsn: Lsn| {
        debug_assert!(era.first_lsn <= lsn);
        Position {
            epoch: epoch.number,
            lsn,
        }
    };
    match (&inside[..], &between[..]) {
        ([(epoch, era)], []) => Ok(within(epoch, era, time)),
        ([], [era]) => Ok(Moment::At(position(era, era.1.last_lsn))),
        ([], []) => Err(match eras.first() {
            None => PointError::None {
                group: history.manifest.name.clone(),
            },
            Some(_) => {
                let first = history.readable().next();
                let after = first.map(|(epoch, _, lsn, _)| Position {
                    epoch: epoch.number,
                    lsn,
                });
                PointError::NotThere {
                    what: what.to_owned(),
                    before: None,
                    after,
                }
            }
        }),
        _ => {
            let ends = inside.iter().copied().chain(between.iter().copied());
            let choices = ends.map(|era| position(era, era.1.last_lsn)).collect();
            Err(PointError::Ambiguous {
                what: what.to_owned(),
                choices: Choices(choices),
            })
        }
    }
}

/// The last log segment of the era that has a record at or before the time.
fn within(epoch: &Epoch, era: &ClockEra, time: u64) -> Moment {
    let candidates = epoch.segments.iter().rev().filter(|segment| {
        segment.kind == SegmentKind::Log
            && segment.first_lsn <= era.last_lsn
            && segment.last_lsn >= era.first_lsn
    });
    for segment in candidates {
        if segment.wall_min_ns <= time {
            return Moment::Within(epoch.number, *segment, *era);
        }
    }
    Moment::At(Position {
        epoch: epoch.number,
        lsn: era.first_lsn,
    })
}

//! `afterimage points`: what a group can be restored to, gaps included.

use afterimage_replica::group::Group;
use afterimage_replica::repository::Repository;
use jiff::Timestamp;

use super::history;
use crate::api::types::{PointInfo, PointList};
use crate::cli::output::{Output, age, bytes, local_time, table, table_text};

/// Runs the command.
///
/// # Errors
/// The group does not exist or cannot be read.
pub async fn run(repository: &Repository, group: &str, output: Output) -> anyhow::Result<()> {
    let group = Group::find(repository, group).await?;
    let now = Timestamp::now();
    output.result(&history::list(&group), |list| text(list, now))?;
    Ok(())
}

fn text(list: &PointList, now: Timestamp) -> String {
    let mut rows = table(&["TIME", "POINT", "LSN", "KIND", "AGE", "CHANGED"]);
    let mut gaps = list.gaps.iter().peekable();
    let mut before = None;
    let mut notes = String::new();
    let mut points = list.points.iter().peekable();
    for span in &list.spans {
        if let Some(last) = before {
            let why = gaps.next().map_or("gap", |gap| why(&gap.cause));
            let length = gap(last, span.first_wall_ns);
            rows.add_row(["", "--- gap ---", "", why, "", &length]);
        }
        rows.add_row([
            local_time(span.first_wall_ns),
            format!("lsn:{}/{}", span.epoch, span.first_lsn),
            lsn(span.epoch, span.first_lsn),
            "first".to_owned(),
            age(span.first_wall_ns, now),
            String::new(),
        ]);
        while let Some(point) = points.next_if(|p| p.epoch == span.epoch && p.lsn <= span.last_lsn)
        {
            notes.extend(freeze_note(point));
            rows.add_row([
                local_time(point.wall_ns),
                point.point.clone(),
                lsn(point.epoch, point.lsn),
                format!("{} ({})", point.kind, point.trigger),
                age(point.wall_ns, now),
                bytes(point.changed_bytes),
            ]);
        }
        rows.add_row([
            local_time(span.last_wall_ns),
            format!("lsn:{}/{}", span.epoch, span.last_lsn),
            lsn(span.epoch, span.last_lsn),
            "last".to_owned(),
            age(span.last_wall_ns, now),
            String::new(),
        ]);
        before = Some(span.last_wall_ns);
    }
    if gaps.next().is_some_and(|gap| gap.before_wall_ns.is_none()) {
        rows.add_row(["", "--- gap ---", "", "open", "", ""]);
    }
    let mut text = table_text(&rows);
    if list.spans.is_empty() {
        text = format!("{} has no recovery point yet\n", list.group);
    } else {
        text += "\nBetween 'first' and 'last' every single write is a point: name it as lsn:…, or by time.\n";
    }
    if !notes.is_empty() {
        text += &format!("\nGuests that were to be frozen:\n{notes}");
    }
    if let Some(since) = list.pass_since_wall_ns {
        text += &format!(
            "A copy has been under way for {}; points from its begin on exist once it is complete.\n",
            age(since, now)
        );
    }
    text
}

/// An LSN as it is written for a point.
fn lsn(epoch: u64, lsn: u64) -> String {
    format!("{epoch}/{lsn}")
}

/// What is known about the freeze for a point: its window, or why it stayed crash-consistent.
fn freeze_note(point: &PointInfo) -> Option<String> {
    let freeze = point.freeze.as_ref()?;
    let mut note = format!("  {}: ", point.point);
    note += &match &freeze.reason {
        Some(why) => format!("crash-consistent only: {why}"),
        None => format!(
            "frozen for {} (ours {}): {}",
            milliseconds(freeze.window_ns),
            milliseconds(freeze.own_ns),
            freeze.frozen
        ),
    };
    if !freeze.skipped.is_empty() {
        note += &format!("; cannot freeze {}", freeze.skipped);
    }
    Some(note + "\n")
}

fn milliseconds(ns: u64) -> String {
    format!("{:.2} ms", ns as f64 / 1e6)
}

/// A gap's cause for people.
fn why(cause: &str) -> &'static str {
    match cause {
        "records-missing" => "records are missing",
        "resync" => "copied anew",
        "new-epoch" => "another log took over",
        _ => "gap",
    }
}

fn gap(from_ns: u64, to_ns: u64) -> String {
    let length = std::time::Duration::from_nanos(to_ns.saturating_sub(from_ns));
    format!("{} missing", crate::cli::output::duration(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{FreezeInfo, GapInfo, SpanInfo};

    #[test]
    fn gaps_stand_between_spans() {
        let span = |first, last| SpanInfo {
            epoch: 1,
            first_lsn: first,
            last_lsn: last,
            first_wall_ns: first * 1_000_000_000,
            last_wall_ns: last * 1_000_000_000,
        };
        let point = PointInfo {
            point: "noon".into(),
            lsn: 25,
            epoch: 1,
            wall_ns: 25_000_000_000,
            ..PointInfo::default()
        };
        let list = PointList {
            spans: vec![span(1, 10), span(20, 30)],
            points: vec![point],
            gaps: vec![
                GapInfo {
                    before_wall_ns: Some(20_000_000_000),
                    cause: "records-missing".into(),
                    ..GapInfo::default()
                },
                GapInfo::default(),
            ],
            ..PointList::default()
        };
        let text = text(&list, Timestamp::from_second(60).expect("a time"));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].contains("lsn:1/10"), "{text}");
        assert!(
            lines[3].contains("gap") && lines[3].contains("10.0 s missing"),
            "{text}"
        );
        assert!(lines[3].contains("records are missing"), "{text}");
        assert!(
            lines[5].contains("noon") && lines[5].contains(" 1/25 "),
            "{text}"
        );
        assert!(
            lines[7].contains("gap") && lines[7].contains("open"),
            "{text}"
        );
    }

    #[test]
    fn a_point_says_how_long_the_guest_was_frozen_or_why_it_was_not() {
        let point = |freeze| PointInfo {
            point: "noon".into(),
            freeze: Some(freeze),
            ..PointInfo::default()
        };
        let good = FreezeInfo {
            frozen: "/ /srv".into(),
            skipped: "/boot".into(),
            window_ns: 12_340_000,
            own_ns: 210_000,
            reason: None,
        };
        let note = freeze_note(&point(good.clone())).expect("a note");
        assert_eq!(
            note,
            "  noon: frozen for 12.34 ms (ours 0.21 ms): / /srv; cannot freeze /boot\n"
        );
        let bad = FreezeInfo {
            reason: Some("agent0 froze nothing".into()),
            ..good
        };
        let note = freeze_note(&point(bad)).expect("a note");
        assert!(
            note.contains("crash-consistent only: agent0 froze nothing"),
            "{note}"
        );
        assert_eq!(freeze_note(&PointInfo::default()), None);
    }

    #[test]
    fn nothing_yet_is_said() {
        let list = PointList {
            group: "vm1".into(),
            pass_since_wall_ns: Some(0),
            ..PointList::default()
        };
        let text = text(&list, Timestamp::from_second(60).expect("a time"));
        assert!(
            text.contains("no recovery point yet") && text.contains("under way for 1 min"),
            "{text}"
        );
    }
}

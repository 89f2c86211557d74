//! What people write, and what it means.

use afterimage_format::ids::{Epoch, Lsn};
use futures::executor::block_on;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{
    Beyond, PointError, PointList, PointSpec, SpecError, label_is_usable, resolve, time_of,
};
use crate::receive::Receiver;
use crate::repository::Repository;
use crate::testing::primary::Primary;

fn parse(text: &str) -> Result<PointSpec, SpecError> {
    let now: Timestamp = "2026-11-22T14:00:00Z".parse().expect("a time");
    let zone = TimeZone::fixed(jiff::tz::offset(1));
    PointSpec::parse(text, now, &zone)
}

fn time(text: &str) -> PointSpec {
    let moment: Timestamp = text.parse().expect("a time");
    PointSpec::Time(u64::try_from(moment.as_nanosecond()).expect("after 1970"))
}

#[test]
fn every_form_is_understood() {
    let cases = [
        ("latest", PointSpec::Latest),
        ("lsn:123", PointSpec::Lsn(None, Lsn(123))),
        ("lsn:2/123", PointSpec::Lsn(Some(Epoch(2)), Lsn(123))),
        ("2026-11-22T13:59:59Z", time("2026-11-22T13:59:59Z")),
        (
            "2026-11-22T13:59:59.5+01:00",
            time("2026-11-22T12:59:59.5Z"),
        ),
        // Local: it is 15:00 there.
        ("14:03:07", time("2026-11-22T13:03:07Z")),
        ("14:03", time("2026-11-22T13:03:00Z")),
        // Not yet today, so yesterday.
        ("15:03:07", time("2026-11-21T14:03:07Z")),
        ("2026-11-20 08:00:00", time("2026-11-20T07:00:00Z")),
        ("-90s", time("2026-11-22T13:58:30Z")),
        ("-1h30m", time("2026-11-22T12:30:00Z")),
        ("-2d", time("2026-11-20T14:00:00Z")),
        ("before-upgrade", PointSpec::Label("before-upgrade".into())),
        ("2026", PointSpec::Label("2026".into())),
        ("90s", PointSpec::Label("90s".into())),
    ];
    for (text, expected) in cases {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn nothing_else_is() {
    for text in [
        "", "lsn:", "lsn:x", "lsn:-1", "lsn:1/", "lsn:+1", "-", "-90", "-s", "-90x", "a/b",
    ] {
        assert!(
            matches!(parse(text), Err(SpecError::NotAPoint(_))),
            "{text}"
        );
    }
    assert!(matches!(
        parse("-99999999999999999999d"),
        Err(SpecError::NotAPoint(_))
    ));
    assert!(matches!(
        parse("2026-11-22T14:00:01Z"),
        Err(SpecError::Future(_))
    ));
    for label in [
        "latest",
        "Latest",
        "lsn:1",
        "14:03",
        "-90s",
        "",
        "../x",
        "2024-06-01T010203Z",
        "20240601T010203Z",
        "2024-06-01T010203-02",
    ] {
        assert!(!label_is_usable(label), "{label}");
    }
    for label in ["2024-06-01", "20240601T010203", "before-2024"] {
        assert!(label_is_usable(label), "{label}");
        assert_eq!(parse(label), Ok(PointSpec::Label(label.to_owned())));
    }
}

/// A base at LSN 1 and 2, then writes with labels.
fn history() -> (Receiver, Primary) {
    let receiver = Receiver::new(Repository::in_memory());
    let mut primary = Primary::new(1);
    block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        primary.catch_up(&mut session, resume).await.expect("all");
        primary.write(0, 0, 2);
        primary.checkpoint("a");
        primary.write(0, 1, 1);
        primary.checkpoint("twice");
        primary.checkpoint("twice");
        primary.wall_ns += 60_000_000_000;
        primary.write(0, 2, 1);
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await.expect("all");
    });
    (receiver, primary)
}

#[test]
fn points_are_resolved_or_refused_with_the_choices() {
    let (receiver, primary) = history();
    block_on(async {
        let group = receiver.group(primary.group).await.expect("a group");
        let lsn_of = |spec| {
            let group = group.clone();
            async move { resolve(&group, &spec).await.map(|at| at.lsn.0) }
        };
        let wall = |lsn: u64| primary.records[&lsn].meta.wall_ns;
        assert_eq!(lsn_of(PointSpec::Latest).await.expect("a point"), 8);
        assert_eq!(
            lsn_of(PointSpec::Label("a".into())).await.expect("a point"),
            4
        );
        for lsn in 2..=8 {
            assert_eq!(
                lsn_of(PointSpec::Lsn(None, Lsn(lsn)))
                    .await
                    .expect("a point"),
                lsn
            );
            assert_eq!(
                lsn_of(PointSpec::Time(wall(lsn))).await.expect("a point"),
                lsn,
                "{lsn}"
            );
            let at = resolve(&group, &PointSpec::Lsn(None, Lsn(lsn))).await;
            let time = time_of(&group, at.expect("a point")).await;
            assert_eq!(time.expect("read"), Some(wall(lsn)), "{lsn}");
            let later = PointSpec::Time(wall(lsn) + 999_999);
            assert_eq!(lsn_of(later).await.expect("a point"), lsn);
        }
        assert_eq!(
            lsn_of(PointSpec::Time(wall(7) + 30_000_000_000))
                .await
                .expect("a point"),
            7
        );
        assert_eq!(lsn_of(PointSpec::Time(u64::MAX)).await.expect("a point"), 8);
        for within in [
            PointSpec::Time(wall(8)),
            PointSpec::Latest,
            PointSpec::Lsn(None, Lsn(8)),
        ] {
            assert_eq!(Beyond::of(&group.history(), &within), None, "{within:?}");
        }
        let beyond = Beyond::of(&group.history(), &PointSpec::Time(wall(8) + 1));
        let beyond = beyond.expect("nothing was received so late");
        assert_eq!(beyond.received_ns, wall(8));
        assert_eq!(beyond.last.lsn, Lsn(8));
        assert!(beyond.to_string().contains("lsn:1/8"), "{beyond}");
        let none = lsn_of(PointSpec::Label("none".into())).await;
        assert!(matches!(none, Err(PointError::NoLabel { .. })));
        let twice = lsn_of(PointSpec::Label("twice".into())).await;
        let Err(PointError::Ambiguous { choices, .. }) = twice else {
            panic!("{twice:?}")
        };
        assert_eq!(choices.to_string(), "lsn:1/6 or lsn:1/7");
        for lsn in [0, 1, 9] {
            let refused = lsn_of(PointSpec::Lsn(None, Lsn(lsn))).await;
            assert!(
                matches!(refused, Err(PointError::NotThere { .. })),
                "{lsn}: {refused:?}"
            );
        }
        let early = lsn_of(PointSpec::Time(wall(1) - 1)).await;
        assert!(
            matches!(early, Err(PointError::NotThere { .. })),
            "{early:?}"
        );
    });
}

#[test]
fn the_list_says_what_there_is() {
    let (receiver, primary) = history();
    let group = block_on(receiver.group(primary.group)).expect("a group");
    let list = PointList::of(&group.history());
    let names: Vec<&str> = list
        .checkpoints
        .iter()
        .map(|point| point.point.as_str())
        .collect();
    assert_eq!(names, ["a", "lsn:1/6", "lsn:1/7"]);
    let changed: Vec<u64> = list
        .checkpoints
        .iter()
        .map(|point| point.changed_bytes)
        .collect();
    assert_eq!(changed, [8192, 4096, 0]);
    assert_eq!(list.checkpoints[0].kind, "crash");
    assert_eq!((list.ranges[0].first_lsn, list.ranges[0].last_lsn), (2, 8));
    assert_eq!(list.latest.as_deref(), Some("lsn:1/8"));
    assert!(list.gaps.is_empty() && list.pending_pass.is_none());
}

#[test]
fn a_point_is_application_consistent_only_once_that_was_confirmed() {
    let receiver = Receiver::new(Repository::in_memory());
    let mut primary = Primary::new(1);
    block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        primary.catch_up(&mut session, resume).await.expect("all");
        let kinds = |session: &crate::receive::Session| {
            let list = PointList::of(&session.group().history());
            let one = |point: &crate::points::Point| {
                let freeze = point.freeze.as_ref();
                (point.kind, freeze.and_then(|f| f.reason.clone()))
            };
            list.checkpoints.iter().map(one).collect::<Vec<_>>()
        };
        let waits = || ("crash", Some("no confirmation has come".to_owned()));

        let first = primary.application_checkpoint("a");
        let second = primary.application_checkpoint("b");
        let plain = primary.checkpoint("c");
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await.expect("all");
        assert_eq!(kinds(&session), [waits(), waits(), ("crash", None)]);

        // In a later segment, the newer first; a plain checkpoint cannot be raised.
        primary.confirm(second, Some("froze nothing"));
        primary.confirm(first, None);
        primary.confirm(plain, None);
        // The first word counts; one about no checkpoint changes nothing.
        primary.confirm(second, None);
        primary.confirm(first + 1000, None);
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await.expect("all");
        let expected = [
            ("application", None),
            ("crash", Some("froze nothing".to_owned())),
            ("crash", None),
        ];
        assert_eq!(kinds(&session), expected);
    });

    // The same from the repository alone, in a process that starts anew.
    let again = Receiver::new(receiver.repository().clone());
    let group = block_on(again.group(primary.group)).expect("a group");
    let list = PointList::of(&group.history());
    let kinds: Vec<&str> = list.checkpoints.iter().map(|point| point.kind).collect();
    assert_eq!(kinds, ["application", "crash", "crash"]);
    let freeze = list.checkpoints[0].freeze.as_ref().expect("known");
    assert_eq!((freeze.window_ns, freeze.frozen.as_str()), (7, "/"));
}

#[test]
fn a_clock_that_jumps_back_makes_times_ambiguous_not_wrong() {
    let receiver = Receiver::new(Repository::in_memory());
    let mut primary = Primary::new(1);
    block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        primary.catch_up(&mut session, resume).await.expect("all");
        for _ in 0..5 {
            primary.wall_ns += 10_000_000_000;
            primary.write(0, 0, 1);
        }
        let shown_twice = primary.wall_ns - 15_000_000_000;
        primary.wall_ns -= 30_000_000_000;
        for _ in 0..5 {
            primary.wall_ns += 10_000_000_000;
            primary.write(0, 0, 1);
        }
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await.expect("all");
        let group = session.group();
        assert_eq!(group.history().epochs[0].eras().len(), 2);
        let twice = resolve(group, &PointSpec::Time(shown_twice)).await;
        assert!(
            matches!(twice, Err(PointError::Ambiguous { .. })),
            "{twice:?}"
        );
        let latest = resolve(group, &PointSpec::Time(u64::MAX))
            .await
            .expect("a point");
        assert_eq!(latest.lsn.0, primary.last());
    });
}

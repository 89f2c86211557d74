use super::*;
use crate::api::types::{CheckpointDone, DiskStatus, PassStatus, ReceivedStatus};
use std::io::Write as _;
use std::process::{Command, Stdio};

fn snapshot() -> Snapshot {
    let target = TargetStatus {
        url: "file:///srv/\"repo\"".into(),
        state: "shipping".into(),
        recoverable_wall_ns: Some(1_700_000_000_500_000_000),
        sessions_ended: 4,
        pass: Some(PassStatus {
            done_bytes: 1,
            total_bytes: 4097,
        }),
        ..TargetStatus::default()
    };
    let group = |name: &str| GroupStatus {
        name: name.into(),
        state: "running".into(),
        targets: vec![target.clone()],
        disks: vec![DiskStatus {
            name: "vda".into(),
            bytes: 7,
            ..DiskStatus::default()
        }],
        last_crash: Some(CheckpointDone {
            kind: "crash".into(),
            wall_ns: 2_000_000_000,
            ..CheckpointDone::default()
        }),
        last_application: Some(CheckpointDone {
            kind: "application".into(),
            wall_ns: 3_000_000_000,
            ..CheckpointDone::default()
        }),
        ..GroupStatus::default()
    };
    let buckets = Buckets {
        buckets: vec![(0.001, 3), (0.01, 2)],
        count: 6,
        sum: 0.5,
    };
    let numbers = GroupNumbers {
        requests: vec![("read", buckets.clone()), ("write", buckets.clone())],
        log_sync: buckets,
        checkpoints: vec![("crash", "ok", 2)],
        errors: vec![("log", 1)],
        gap_seconds: vec![12.5],
        ..GroupNumbers::default()
    };
    Snapshot {
        status: StatusReport {
            version: "1".into(),
            groups: vec![group("vm1"), group("vm2")],
            received: vec![ReceivedStatus {
                name: "vm1".into(),
                last_wall_ns: Some(1),
                refused_fenced: 5,
                alarm: Some("look".into()),
                ..ReceivedStatus::default()
            }],
            ..StatusReport::default()
        },
        groups: vec![numbers.clone(), numbers],
        histories: vec![HistoryNumbers {
            group: "vm1".into(),
            oldest_point_ns: Some(1_600_000_000_000_000_000),
            last_verified_ns: Some(1_650_000_000_000_000_000),
            last_compared_ns: Some(1_650_000_000_000_000_000),
            damaged_objects: Some(2),
        }],
        certificates: vec![("replica", "/etc/replica.pem".into(), 1_700_000_000)],
    }
}

#[test]
fn promtool_finds_nothing_to_say() {
    let text = render(&snapshot()).expect("valid");
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = started else {
        eprintln!("skipped: promtool is not installed");
        return;
    };
    let mut stdin = promtool.stdin.take().expect("piped");
    stdin.write_all(text.as_bytes()).expect("write");
    drop(stdin);
    let output = promtool.wait_with_output().expect("ran");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}

#[test]
fn numbers_are_where_they_belong() {
    let text = render(&snapshot()).expect("valid");
    for line in [
        "afterimage_build_info{version=\"1\"} 1",
        "afterimage_group_state{group=\"vm2\",state=\"running\"} 1",
        "afterimage_group_state{group=\"vm2\",state=\"failed\"} 0",
        "afterimage_pass_remaining_bytes{group=\"vm1\",target=\"file:///srv/\\\"repo\\\"\"} 4096",
        "afterimage_nbd_request_duration_seconds_bucket{group=\"vm1\",op=\"read\",le=\"0.01\"} 5",
        "afterimage_nbd_request_duration_seconds_bucket{group=\"vm1\",op=\"read\",le=\"+Inf\"} 6",
        "afterimage_errors_total{group=\"vm1\",kind=\"log\"} 1",
        "afterimage_history_gap_seconds_total{group=\"vm1\",target=\"file:///srv/\\\"repo\\\"\"} 12.5",
        "afterimage_oldest_point_timestamp_seconds{group=\"vm1\"} 1600000000",
        "afterimage_last_verified_timestamp_seconds{group=\"vm1\"} 1650000000",
        "afterimage_verify_damaged_objects{group=\"vm1\"} 2",
        "afterimage_last_checkpoint_timestamp_seconds{group=\"vm1\",kind=\"crash\"} 2",
        "afterimage_last_checkpoint_timestamp_seconds{group=\"vm1\",kind=\"application\"} 3",
        "afterimage_replication_errors_total{group=\"vm1\",target=\"file:///srv/\\\"repo\\\"\",kind=\"session\"} 4",
        "afterimage_received_errors_total{group=\"vm1\",kind=\"fenced\"} 5",
        "afterimage_received_alarm{group=\"vm1\"} 1",
        "afterimage_certificate_expiry_timestamp_seconds{certificate=\"replica\",file=\"/etc/replica.pem\"} 1700000000",
        "afterimage_log_sync_duration_seconds_bucket{group=\"vm1\",le=\"0.01\"} 5",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    assert!(text.contains("recoverable_timestamp_seconds{group=\"vm1\",target=\"file:///srv/\\\"repo\\\"\"} 1700000000.5"));
}

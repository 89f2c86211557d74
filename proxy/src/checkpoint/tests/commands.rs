//! Freezing and thawing by commands.

use super::super::agent::{Answer, Request, Trouble};
use super::super::exec::Exec;
use std::path::Path;
use std::time::Duration;

fn sh(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
}

fn exec(freeze: &str, thaw: &str) -> Exec {
    let timeout = Duration::from_secs(60);
    Exec::new(&sh(freeze), &sh(thaw), timeout, "vm1", "0123")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[tokio::test]
async fn commands_know_what_they_are_run_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let say = format!(
        "echo $AFTERIMAGE_GROUP $AFTERIMAGE_CHECKPOINT $AFTERIMAGE_STEP >> {}",
        out.display()
    );
    let mut exec = exec(&say, &say);
    let frozen = exec.ask(Request::Freeze, || ()).await;
    assert_eq!(frozen, Ok(Answer::Frozen { count: 1 }));
    let status = exec.ask(Request::Status, || ()).await;
    assert_eq!(status, Ok(Answer::Status { frozen: true }));
    let thawed = exec.ask(Request::Thaw, || ()).await;
    assert_eq!(thawed, Ok(Answer::Thawed { count: 1 }));
    assert_eq!(read(&out), "vm1 0123 freeze\nvm1 0123 thaw\n");
}

#[tokio::test]
async fn a_command_that_fails_says_why() {
    let mut exec = exec("echo no such database >&2; exit 3", "exit 1");
    let refused = exec.ask(Request::Freeze, || ()).await;
    let Err(Trouble::Refused(why)) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        why.contains('3') && why.contains("no such database"),
        "{why}"
    );
    assert!(exec.ask(Request::SyncThaw, || ()).await.is_err());
    let status = exec.ask(Request::Status, || ()).await;
    assert_eq!(status, Ok(Answer::Status { frozen: true }));
}

#[tokio::test]
async fn a_freeze_that_is_given_up_dies_with_its_children_before_the_thaw() {
    let folder = tempfile::tempdir().expect("a folder");
    let (begun, late) = (folder.path().join("begun"), folder.path().join("late"));
    let freeze = format!(
        "(sleep 2; echo frozen > {}) & echo $! > {}; wait",
        late.display(),
        begun.display()
    );
    let mut exec = exec(&freeze, "true");
    tokio::select! {
        ended = exec.ask(Request::Freeze, || ()) => panic!("{ended:?}"),
        () = async {
            while read(&begun).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    let thawed = exec.ask(Request::SyncThaw, || ()).await;
    assert_eq!(thawed, Ok(Answer::InStep));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(read(&late), "", "a child of the freeze lived on");
}

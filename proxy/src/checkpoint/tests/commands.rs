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

#[tokio::test]
async fn a_freeze_that_somebody_else_began_is_ended_before_the_thaw_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let (begun, late) = (folder.path().join("begun"), folder.path().join("late"));
    // A session of its own: the group's kill does not reach it.
    let freeze = format!(
        "setsid sh -c 'echo $$ > {}; sleep 2; echo frozen > {}'",
        begun.display(),
        late.display()
    );
    let mut child = tokio::process::Command::new("/bin/sh")
        .args(["-c", &freeze])
        .env("AFTERIMAGE_CHECKPOINT", "4567")
        .env("AFTERIMAGE_STEP", "freeze")
        .spawn()
        .expect("runs");
    while read(&begun).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let timeout = Duration::from_secs(60);
    let mut exec = Exec::new(&sh("true"), &sh("true"), timeout, "vm1", "4567");
    let thawed = exec.ask(Request::SyncThaw, || ()).await;
    assert_eq!(thawed, Ok(Answer::InStep));
    child.wait().await.expect("ended");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(read(&late), "", "the freeze lived on");
}

#[tokio::test]
async fn a_command_that_says_much_is_not_held_up() {
    let much = "head -c 300000 /dev/zero | tr '\\0' x >&2";
    let mut exec = exec(much, &format!("echo first >&2; {much}; exit 7"));
    let frozen = exec.ask(Request::Freeze, || ()).await;
    assert_eq!(frozen, Ok(Answer::Frozen { count: 1 }));
    let refused = exec.ask(Request::Thaw, || ()).await;
    let Err(Trouble::Refused(why)) = refused else {
        panic!("{refused:?}")
    };
    assert!(why.contains("first") && why.len() < 5000, "{}", why.len());
}

//! The command line as a user meets it: exit codes, messages, files.

use assert_cmd::Command;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

fn afterimage() -> Command {
    let mut command = Command::cargo_bin("afterimage").expect("built");
    command.env_remove("AFTERIMAGE_CONFIG");
    command
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run(args: &[&str]) -> Ran {
    let output = afterimage().args(args).output().expect("runs");
    Ran {
        code: output.status.code().expect("an exit code"),
        stdout: String::from_utf8(output.stdout).expect("text"),
        stderr: String::from_utf8(output.stderr).expect("text"),
    }
}

fn config(folder: &Path, text: &str) -> String {
    let file = folder.join("afterimage.toml");
    fs::write(&file, text).expect("write");
    file.display().to_string()
}

#[test]
fn wrong_usage_ends_with_2() {
    for args in [
        &["frobnicate"][..],
        &[],
        &["restore"],
        &["restore", "vm1@a b", "/tmp/x"],
        &["checkpoint", "../vm1"],
        &["checkpoint", "vm1", "--label", "latest"],
        &["checkpoint", "vm1", "--label", "10:00:00"],
        &["attach-help", "vm1"],
        &["attach-help", "vm1/../x"],
        &["recover", "vm1"],
        &["export"],
        &["export", "vm1", "--listen", "unix:/x"],
        &["points", "vm1", "--repository", "ftp://x"],
    ] {
        let ran = run(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{args:?}");
        assert!(!ran.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_wrong_configuration_ends_with_2_and_names_its_line() {
    let folder = tempfile::tempdir().expect("folder");
    let file = config(folder.path(), "[nbd]\n\nlisten_on = []\n");
    for command in [&["config", "check"][..], &["serve"], &["status"]] {
        let ran = run(&[&["--config", &file], command].concat());
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        let message = format!("afterimage: {file}:3: unknown field `listen_on`");
        assert!(ran.stderr.starts_with(&message), "{}", ran.stderr);
    }
}

#[test]
fn config_check_tells_what_it_read() {
    let folder = tempfile::tempdir().expect("folder");
    let file = config(
        folder.path(),
        "[[group]]\nname = \"vm1\"\nto = [\"file:///srv/repo\"]\n[[group.disk]]\nname = \"vda\"\npath = \"vm1.raw\"\n",
    );
    let ran = run(&["config", "check", "--config", &file]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("vm1"), "{}", ran.stdout);
    assert!(ran.stdout.contains("does not exist"), "{}", ran.stdout);
    let ran = run(&["config", "check", "--json", "--config", &file]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(json["groups"][0]["name"], "vm1");
    assert_eq!(json["groups"][0]["ring_bytes"], 128 << 20);
}

#[test]
fn a_missing_daemon_is_a_failure() {
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("api.sock");
    let text = format!("[http]\napi = \"unix:{}\"\n", socket.display());
    let file = config(folder.path(), &text);
    for command in [&["status"][..], &["checkpoint", "vm1"], &["detach", "vm1"]] {
        let ran = run(&[&["--config", &file], command].concat());
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        assert!(ran.stderr.contains("no daemon answers"), "{}", ran.stderr);
    }
}

#[test]
fn attach_help_knows_the_configuration() {
    let folder = tempfile::tempdir().expect("folder");
    let text = "[[group]]\nname = \"vm1\"\n[[group.disk]]\nname = \"vda\"\npath = \"vm1.raw\"\n";
    let file = config(folder.path(), text);
    let ran = run(&["attach-help", "vm1/vda", "--config", &file]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("export=vm1/vda"), "{}", ran.stdout);
    for (disk, says) in [
        ("vm1/vdb", "has no disk 'vdb'; it has vda"),
        ("vm2/vda", "not configured"),
    ] {
        let ran = run(&["attach-help", disk, "--config", &file]);
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains(says), "{}", ran.stderr);
    }
}

#[test]
fn certificates_are_made_once_with_private_keys() {
    let folder = tempfile::tempdir().expect("folder");
    let at = folder.path().join("pki").display().to_string();
    let ran = run(&["cert", "server", "localhost", "--ca", &at, "--out", &at]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("make an authority"), "{}", ran.stderr);
    for args in [
        &["cert", "ca", "--out", &at][..],
        &[
            "cert",
            "server",
            "localhost",
            "127.0.0.1",
            "--ca",
            &at,
            "--out",
            &at,
        ],
        &["cert", "client", "vm1", "vm2", "--ca", &at, "--out", &at],
        &[
            "cert", "client", "vm1", "--ca", &at, "--out", &at, "--name", "old", "--days", "-3",
        ],
    ] {
        let ran = run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    }
    for name in ["ca", "server", "client", "old"] {
        let key = Path::new(&at).join(format!("{name}.key"));
        let mode = fs::metadata(&key).expect("written").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let ran = run(&["cert", "ca", "--out", &at]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("is already there"), "{}", ran.stderr);
}

#[test]
fn manual_and_completions_are_generated() {
    let folder = tempfile::tempdir().expect("folder");
    let ran = run(&["man", &folder.path().display().to_string()]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(folder.path().join("afterimage-restore.1").exists());
    let ran = run(&["completions", "bash"]);
    assert_eq!(ran.code, 0);
    assert!(ran.stdout.contains("attach-help"));
}

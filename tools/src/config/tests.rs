use super::check::assemble;
use super::*;
use std::time::Duration;

const EXAMPLE: &str = r#"
[nbd]
listen = ["unix:/run/afterimage/nbd.sock"]       # tcp://… with tls = {…}; per listener: groups, owner, mode
[http]
api = "unix:/run/afterimage/api.sock"            # 0600: everything that can change or export
metrics = "127.0.0.1:9470"                       # only /metrics and /healthz, never the API
[[group]]
name = "vm1"
log = { path = "/var/lib/afterimage/vm1.log", size = "4GiB" }
ring = "128MiB"                                  # total over groups bounded by ring_budget
to = ["file:///srv/repo"]                        # or s3://bucket/prefix, or afterimage://dr.example:9471
ship_interval = "500ms"
  [[group.disk]]
  name = "vda"
  path = "/images/vm1.raw"
[replica]
listen = "0.0.0.0:9471"
repository = "file:///srv/repo"
tls = { cert = "…", key = "…", client_ca = "…" }
"#;

fn load(text: &str) -> Result<Config, ConfigError> {
    assemble(Path::new("/etc/afterimage/afterimage.toml"), text, &[])
}

fn refusal(text: &str) -> String {
    load(text).expect_err("refused").to_string()
}

fn with_group(extra: &str) -> String {
    format!("{extra}\n[[group]]\nname = \"vm1\"\n[[group.disk]]\nname = \"vda\"\npath = \"/a\"\n")
}

#[test]
fn the_example_of_the_manual_parses() {
    let config = load(EXAMPLE).expect("valid");
    let group = config.group("vm1").expect("configured");
    assert_eq!(group.log_size, 4 << 30);
    assert_eq!(group.ring_size, 128 << 20);
    assert_eq!(group.ship_interval, Duration::from_millis(500));
    assert_eq!(group.disks[0].path, Path::new("/images/vm1.raw"));
    assert_eq!(group.place.line, 8);
    assert_eq!(
        config.repository().map(|r| r.to_string()).as_deref(),
        Some("file:///srv/repo")
    );
}

#[test]
fn every_default_works() {
    let config = load("").expect("valid");
    assert_eq!(config.ring_dir, Path::new("/dev/shm"));
    assert_eq!(config.listeners.len(), 1);
    assert!(config.metrics.is_some_and(|m| m.ip().is_loopback()));
    let group = &load(&with_group("")).expect("valid").groups[0];
    assert_eq!(group.log_path, Path::new("/var/lib/afterimage/vm1.log"));
    assert_eq!(group.commit_interval, Duration::from_millis(20));
    assert!(group.to.is_empty());
}

#[test]
fn unknown_keys_are_refused_with_file_and_line() {
    for (text, line, key) in [
        ("\nrings = 1\n", 2, "rings"),
        ("[nbd]\nlisten = []\nbind = 1\n", 3, "bind"),
        (
            "[nbd]\nlisten = [{ address = \"unix:/a\", mod = \"1\" }]\n",
            2,
            "mod",
        ),
        (
            "[[group]]\nname = \"a\"\nshipinterval = \"1s\"\n",
            3,
            "shipinterval",
        ),
        ("[[group]]\nname = \"a\"\nlog = { pth = \"/\" }\n", 3, "pth"),
        (
            "[[group]]\nname = \"a\"\n[[group.disk]]\nname = \"b\"\npath = \"/\"\nsize = 1\n",
            6,
            "size",
        ),
        (
            "[replica]\nrepository = \"file:///r\"\ntls = { cert = \"\", key = \"\", ca = \"\" }\n",
            3,
            "ca",
        ),
    ] {
        let message = refusal(text);
        let place = format!("/etc/afterimage/afterimage.toml:{line}: unknown field `{key}`");
        assert!(message.starts_with(&place), "{message}");
    }
}

#[test]
fn wrong_values_name_their_line_and_the_right_form() {
    for (text, line, hint) in [
        ("ring_budget = \"much\"\n", 1, "is not a size"),
        (
            "[[group]]\nname = \"a\"\nship_interval = \"5\"\n",
            3,
            "is not a duration",
        ),
        (
            "[nbd]\nlisten = [\n  \"unix:/ok\",\n  \"udp://x\",\n]\n",
            4,
            "is not an address",
        ),
        ("[http]\nmetrics = \"everywhere\"\n", 2, "is not an address"),
        (
            "[[group]]\nname = \"a\"\nto = [\"ftp://x\"]\n",
            3,
            "is not a target",
        ),
        ("a = \n", 1, ""),
    ] {
        let message = refusal(text);
        let place = format!("/etc/afterimage/afterimage.toml:{line}: ");
        assert!(message.starts_with(&place), "{message}");
        assert!(message.contains(hint), "{message}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let tcp =
        |extra: &str| format!("[nbd]\nlisten = [{{ address = \"tcp://0.0.0.0:1\"{extra} }}]\n");
    for (text, line, hint) in [
        (
            with_group("[http]\napi = \"tcp://127.0.0.1:1\"\n"),
            2,
            "unix socket only",
        ),
        (
            with_group("[http]\nmetrics = \"0.0.0.0:1\"\n"),
            2,
            "loopback interface only",
        ),
        (with_group(&tcp("")), 2, "without TLS"),
        (
            with_group(&tcp(", plaintext = true, groups = [\"vm2\"]")),
            2,
            "group 'vm2', which is not",
        ),
        (
            with_group(&tcp(", plaintext = true, groups = []")),
            2,
            "groups = [], which lets nobody in",
        ),
        (
            with_group("ring_budget = \"1MiB\""),
            3,
            "more than ring_budget",
        ),
        (
            with_group("[replica]\nlisten = \"0.0.0.0:1\"\nrepository = \"file:///r\""),
            3,
            "needs tls",
        ),
        (
            with_group("[replica]\nrepository = \"afterimage://a:1\""),
            2,
            "not 'afterimage://a:1'",
        ),
        (
            with_group("[[group]]\nname = \"../x\""),
            2,
            "'../x' is refused",
        ),
        (
            with_group("[[group]]\nname = \"a\\u0000\""),
            2,
            "is refused",
        ),
        (with_group("[[group]]\nname = \"vm0\""), 2, "has no disk"),
        (
            format!("{}{}", with_group(""), with_group("")),
            9,
            "already stands at",
        ),
        (
            with_group("") + "[[group.disk]]\nname = \"vda\"\npath = \"/b\"\n",
            8,
            "already has a disk",
        ),
        (
            with_group("") + "[[group.disk]]\nname = \"vdb\"\npath = \"/a\"\n",
            9,
            "is already used as",
        ),
        (
            with_group("") + "[group.log]\nsize = \"1MiB\"\n",
            8,
            "too small",
        ),
        (
            with_group("") + "[group.checkpoint]\ncron = \"whenever\"\n",
            3,
            "not a cron schedule",
        ),
        (
            with_group("") + "[group.checkpoint]\n",
            3,
            "either 'every' or 'cron'",
        ),
    ] {
        let message = refusal(&text);
        let place = format!("/etc/afterimage/afterimage.toml:{line}: ");
        assert!(message.starts_with(&place), "{text}\n{message}");
        assert!(message.contains(hint), "{message}");
    }
}

#[test]
fn network_targets_need_certificates() {
    let text = "[[group]]\nname = \"a\"\nto = [\"afterimage://h:1\"]\n[[group.disk]]\nname = \"b\"\npath = \"/a\"\n";
    assert!(refusal(text).contains("needs certificates"));
    let tls = "[ship]\ntls = { cert = \"/c\", key = \"/k\", ca = \"/ca\" }\n";
    let config = load(&format!("{tls}{text}")).expect("valid");
    assert!(config.groups[0].to[0].tls.is_some());
    assert_eq!(config.repository(), None);
}

#[test]
fn groups_come_from_groups_d_too() {
    let folder = tempfile::tempdir().expect("folder");
    let main = folder.path().join("afterimage.toml");
    std::fs::write(&main, "ring_dir = \"rings\"\n").expect("write");
    std::fs::create_dir(folder.path().join("groups.d")).expect("folder");
    let part = folder.path().join("groups.d/vm1.toml");
    std::fs::write(&part, with_group("")).expect("write");
    std::fs::write(folder.path().join("groups.d/note.txt"), "not read").expect("write");
    let config = Config::load(Some(&main)).expect("valid");
    assert_eq!(config.groups[0].place.file, part);
    assert_eq!(config.ring_dir, folder.path().join("rings"));

    std::fs::write(&part, "ring_dir = \"/x\"\n").expect("write");
    let message = Config::load(Some(&main)).expect_err("refused").to_string();
    assert!(
        message.contains("groups.d/vm1.toml:1: unknown field"),
        "{message}"
    );
}

#[test]
fn a_missing_file_is_an_error_when_named() {
    let message = Config::load(Some(Path::new("/nonexistent/a.toml")))
        .expect_err("refused")
        .to_string();
    assert!(
        message.starts_with("/nonexistent/a.toml: cannot read"),
        "{message}"
    );
}

//! `docs/afterimage.toml` is what the program takes: every key of the schema, and no other.

use super::check::assemble;
use super::*;

const REFERENCE: &str = include_str!("../../../docs/afterimage.toml");

fn load(text: &str) -> Result<Config, ConfigError> {
    assemble(Path::new("/etc/afterimage/afterimage.toml"), text, &[])
}

/// The keys that the reader itself says it knows where an unknown one stands.
fn known_keys(text: &str) -> Vec<String> {
    let message = load(text).expect_err("an unknown key").to_string();
    let (_, expected) = message.split_once("expected ").expect("the known keys");
    let names = expected.split('`').skip(1).step_by(2);
    names.map(str::to_owned).collect()
}

#[test]
fn the_reference_parses() {
    let config = load(REFERENCE).expect("valid");
    assert_eq!((config.listeners.len(), config.groups.len()), (4, 2));
    assert_eq!(config.groups[0].guest.len(), 2);
}

#[test]
fn the_reference_has_every_key() {
    let tls = "cert = \"\", key = \"\"";
    let group = "[[group]]\nname = \"a\"\n";
    let tables = [
        ("top", "zz = 1".to_owned(), 10),
        ("nbd", "[nbd]\nzz = 1".to_owned(), 2),
        (
            "listener",
            "[nbd]\nlisten = [{ address = \"unix:/a\", zz = 1 }]".to_owned(),
            8,
        ),
        ("http", "[http]\nzz = 1".to_owned(), 2),
        ("ship", "[ship]\nzz = 1".to_owned(), 1),
        (
            "client tls",
            format!("[ship]\ntls = {{ {tls}, zz = 1 }}"),
            3,
        ),
        ("group", format!("{group}zz = 1"), 12),
        ("log", format!("{group}log = {{ zz = 1 }}"), 2),
        (
            "target",
            format!("{group}to = [{{ url = \"file:///a\", zz = 1 }}]"),
            2,
        ),
        ("checkpoint", format!("{group}checkpoint = {{ zz = 1 }}"), 4),
        (
            "app",
            format!("{group}checkpoint = {{ app = {{ zz = 1 }} }}"),
            2,
        ),
        ("guest", format!("{group}[[group.guest]]\nzz = 1"), 6),
        ("disk", format!("{group}[[group.disk]]\nzz = 1"), 3),
        ("replica", "[replica]\nzz = 1".to_owned(), 3),
        (
            "server tls",
            format!("[replica]\ntls = {{ {tls}, zz = 1 }}"),
            4,
        ),
    ];
    for (table, text, count_min) in tables {
        let keys = known_keys(&text);
        assert!(keys.len() >= count_min, "{table}: {keys:?}");
        for key in keys {
            let written = REFERENCE.contains(&format!("{key} = "))
                || REFERENCE.contains(&format!("[{key}]"))
                || REFERENCE.contains(&format!(".{key}]"));
            assert!(written, "{table}: {key} is not in docs/afterimage.toml");
        }
    }
}

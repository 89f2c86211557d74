//! The keys of the configuration files and their defaults.
//!
//! What is here has been parsed, not yet checked as a whole: [`super::check`] does that.

use super::units::{Interval, ListenAddress, Mode, Size, Target};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor, value};
use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use toml::Spanned;

/// Everything that `afterimage.toml` may hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Folder of the rings: a tmpfs, so that what was answered outlives the process.
    pub ring_dir: PathBuf,
    /// Most memory that all rings together may take.
    pub ring_budget: Size,
    /// Data path threads. Default: one per core.
    pub workers: Option<usize>,
    /// Which messages are logged: error, warn, info, debug, trace, or a filter as
    /// `info,afterimage_proxy=debug`. `AFTERIMAGE_LOG` goes before it.
    pub log_level: Spanned<String>,
    /// Folder that says which guests may be frozen; must survive a restart of the host.
    pub guest_state: PathBuf,
    /// Folder of the claims of backings that are block devices; must survive a restart of the host.
    pub claims: PathBuf,
    /// NBD server.
    pub nbd: Nbd,
    /// API and metrics.
    pub http: Http,
    /// Certificates for shipping to `afterimage://` targets.
    pub ship: Ship,
    /// Protected groups.
    pub group: Vec<Group>,
    /// Receiving end.
    pub replica: Option<Replica>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            ring_dir: "/dev/shm".into(),
            ring_budget: Size(1 << 30),
            workers: None,
            log_level: Spanned::new(0..0, "info".to_owned()),
            guest_state: "/var/lib/afterimage/guest".into(),
            claims: "/var/lib/afterimage/claims".into(),
            nbd: Nbd::default(),
            http: Http::default(),
            ship: Ship::default(),
            group: Vec::new(),
            replica: None,
        }
    }
}

/// What a file in `groups.d` may hold.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupFile {
    /// Protected groups.
    pub group: Vec<Group>,
}

/// `[nbd]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nbd {
    /// Where hypervisors connect.
    pub listen: Vec<Spanned<Listener>>,
    /// Where `export` serves images, when it is not told otherwise.
    pub images: PathBuf,
}

impl Default for Nbd {
    fn default() -> Self {
        Self {
            listen: vec![Spanned::new(
                0..0,
                Listener::at(ListenAddress::Unix("/run/afterimage/nbd.sock".into())),
            )],
            images: "/run/afterimage/images.sock".into(),
        }
    }
}

/// One entry of `nbd.listen`: an address, or a table with an address and more.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Where.
    pub address: ListenAddress,
    /// Only these groups; all without the key. An empty list is refused.
    pub groups: Option<Vec<Spanned<String>>>,
    /// TLS, for TCP.
    pub tls: Option<ServerTls>,
    /// Allows TCP to other hosts without TLS.
    pub plaintext: bool,
    /// Owner of the socket file.
    pub owner: Option<String>,
    /// Group of the socket file.
    pub group: Option<String>,
    /// Mode of the socket file.
    pub mode: Mode,
    /// When a write is answered. Default: `durable` where another host can connect, else `ring`.
    pub ack: Option<Ack>,
}

impl Listener {
    /// A listener with every default.
    #[must_use]
    pub fn at(address: ListenAddress) -> Self {
        Self {
            address,
            groups: None,
            tls: None,
            plaintext: false,
            owner: None,
            group: None,
            mode: Mode(0o660),
            ack: None,
        }
    }
}

impl<'de> Deserialize<'de> for Listener {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            address: ListenAddress,
            groups: Option<Vec<Spanned<String>>>,
            tls: Option<ServerTls>,
            #[serde(default)]
            plaintext: bool,
            owner: Option<String>,
            group: Option<String>,
            #[serde(default = "socket_mode")]
            mode: Mode,
            ack: Option<Ack>,
        }
        impl From<Table> for Listener {
            fn from(table: Table) -> Self {
                Self {
                    address: table.address,
                    groups: table.groups,
                    tls: table.tls,
                    plaintext: table.plaintext,
                    owner: table.owner,
                    group: table.group,
                    mode: table.mode,
                    ack: table.ack,
                }
            }
        }
        text_or_table(deserializer, Listener::at, |table: Table| table.into())
    }
}

fn socket_mode() -> Mode {
    Mode(0o660)
}

/// When a write is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ack {
    /// When it is in the ring: survives the process.
    Ring,
    /// When it is durable in the log: survives the host.
    Durable,
}

/// Certificate of a server and the authority of its clients.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// PEM file: certificate chain.
    pub cert: PathBuf,
    /// PEM file: private key.
    pub key: PathBuf,
    /// PEM file: who may sign clients' certificates. Without it any client may connect.
    pub client_ca: Option<PathBuf>,
    /// NBD only: whether clients must use TLS. They must, unless this says otherwise.
    #[serde(default = "yes")]
    pub required: bool,
}

fn yes() -> bool {
    true
}

/// Certificate of a client and the authority of its servers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    /// PEM file: certificate chain; its SAN says which groups this site may write.
    pub cert: PathBuf,
    /// PEM file: private key.
    pub key: PathBuf,
    /// PEM file: who may sign the replica's certificate.
    pub ca: PathBuf,
}

/// `[http]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Unix socket of the API, mode 0600.
    pub api: Spanned<ListenAddress>,
    /// Loopback TCP address of `/metrics` and `/healthz`; an empty string turns it off.
    pub metrics: Spanned<MetricsAddress>,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            api: Spanned::new(0..0, ListenAddress::Unix("/run/afterimage/api.sock".into())),
            metrics: Spanned::new(
                0..0,
                MetricsAddress(Some(SocketAddr::from(([127, 0, 0, 1], 9470)))),
            ),
        }
    }
}

/// A TCP address, or nothing when the string is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsAddress(pub Option<SocketAddr>);

impl<'de> Deserialize<'de> for MetricsAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Self(None));
        }
        text.parse()
            .map(|address| Self(Some(address)))
            .map_err(|_| {
                D::Error::custom(format!(
                    "'{text}' is not an address; write it like \"127.0.0.1:9470\", or \"\" for none"
                ))
            })
    }
}

/// `[ship]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ship {
    /// For every `afterimage://` target that has no `tls` of its own.
    pub tls: Option<ClientTls>,
}

/// One entry of a group's `to`: a URL, or a table with a URL and more.
#[derive(Debug, Clone)]
pub struct Sink {
    /// Where to.
    pub url: Target,
    /// Instead of `[ship] tls`.
    pub tls: Option<ClientTls>,
}

impl<'de> Deserialize<'de> for Sink {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            url: Target,
            tls: Option<ClientTls>,
        }
        text_or_table(
            deserializer,
            |url| Sink { url, tls: None },
            |table: Table| Sink {
                url: table.url,
                tls: table.tls,
            },
        )
    }
}

/// `[[group]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Name for people, exports, metrics and the replica.
    pub name: Spanned<String>,
    /// The log.
    #[serde(default)]
    pub log: Log,
    /// Staging memory.
    #[serde(default = "default_ring")]
    pub ring: Spanned<Size>,
    /// Where the history goes.
    #[serde(default)]
    pub to: Vec<Spanned<Sink>>,
    /// Longest time that a write waits for its segment.
    #[serde(default = "default_ship_interval")]
    pub ship_interval: Interval,
    /// Longest time between two syncs of the log while there is something to ship or destage.
    #[serde(default = "default_commit_interval")]
    pub commit_interval: Interval,
    /// When a write is answered; a listener's own `ack` goes before it.
    pub ack: Option<Ack>,
    /// What a guest sees when the log fails.
    #[serde(default)]
    pub on_log_error: OnLogError,
    /// What a guest sees while a disk's backing fails.
    #[serde(default)]
    pub on_backing_error: OnBackingError,
    /// Most bytes per second that a pass reads.
    pub pass_rate: Option<Size>,
    /// Checkpoints at set times.
    pub checkpoint: Option<Checkpoint>,
    /// How the guest is frozen for application-consistent checkpoints, in this order.
    #[serde(default)]
    pub guest: Vec<Spanned<GuestAgent>>,
    /// The disks.
    #[serde(default)]
    pub disk: Vec<Disk>,
}

fn default_ring() -> Spanned<Size> {
    Spanned::new(0..0, Size(128 << 20))
}

fn default_ship_interval() -> Interval {
    Interval::from_millis(500)
}

fn default_commit_interval() -> Interval {
    Interval::from_millis(20)
}

/// `[group.log]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// File or block device. Default: `/var/lib/afterimage/GROUP.log`.
    pub path: Option<PathBuf>,
    /// Size of a new log file.
    pub size: Spanned<Size>,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            path: None,
            size: Spanned::new(0..0, Size(4 << 30)),
        }
    }
}

/// `on_log_error`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLogError {
    /// Writes and flushes fail.
    #[default]
    Fail,
    /// The guest goes on without replication, after a durable marker forbade a replay.
    Detach,
}

/// `on_backing_error`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBackingError {
    /// Nothing while the log has room.
    #[default]
    Retry,
    /// Writes fail until it works again.
    Fail,
}

/// `[group.checkpoint]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// So often.
    pub every: Option<Interval>,
    /// At these times, as cron writes them (local time).
    pub cron: Option<Spanned<String>>,
    /// Application-consistent ones.
    pub app: Option<AppCheckpoint>,
    /// No guest is frozen longer; 8 s. Windows allows 10 s.
    pub freeze_limit: Option<Interval>,
}

/// `[group.checkpoint.app]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppCheckpoint {
    /// So often.
    pub every: Option<Interval>,
    /// At these times, as cron writes them (local time).
    pub cron: Option<Spanned<String>>,
}

pub(super) fn default_freeze_limit() -> Interval {
    Interval::from_millis(8000)
}

/// `[[group.guest]]`: an agent, or two commands. `{group}` stands for the group's name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestAgent {
    /// For messages. Default: `guest`, or `guest2` and so on.
    pub name: Option<String>,
    /// Unix socket of the chardev of QEMU's guest agent.
    pub qga: Option<PathBuf>,
    /// With `qga`: only these mount points.
    #[serde(default)]
    pub mounts: Vec<String>,
    /// Instead of `qga`: program and arguments that freeze.
    #[serde(default)]
    pub freeze: Vec<String>,
    /// With `freeze`: program and arguments that thaw; must work again and again, and without a
    /// freeze before it.
    #[serde(default)]
    pub thaw: Vec<String>,
    /// With `freeze`: time for one run of the thaw.
    #[serde(default = "default_thaw_timeout")]
    pub timeout: Interval,
}

fn default_thaw_timeout() -> Interval {
    Interval::from_millis(30_000)
}

/// `[[group.disk]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Name within the group; the export is `GROUP/DISK`.
    pub name: Spanned<String>,
    /// The backing: a raw image file or a block device.
    pub path: Spanned<PathBuf>,
    /// Says that the content is raw although it begins like a qcow2 image.
    #[serde(default)]
    pub raw: bool,
}

/// `[replica]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replica {
    /// TCP address for primaries. Without it only the repository is read.
    pub listen: Option<SocketAddr>,
    /// Where the history is kept.
    pub repository: Spanned<Target>,
    /// Certificate, key and the authority of the primaries' certificates.
    pub tls: Option<Spanned<ServerTls>>,
}

impl File {
    /// Makes paths of certificates absolute, as seen from the folder of the configuration.
    pub(super) fn place_at(&mut self, base: &Path) {
        if let Some(tls) = &mut self.ship.tls {
            tls.place_at(base);
        }
        for listener in &mut self.nbd.listen {
            if let Some(tls) = &mut listener.get_mut().tls {
                tls.place_at(base);
            }
        }
        if let Some(tls) = self
            .replica
            .as_mut()
            .and_then(|replica| replica.tls.as_mut())
        {
            tls.get_mut().place_at(base);
        }
        self.group.iter_mut().for_each(|group| group.place_at(base));
    }
}

impl Group {
    pub(super) fn place_at(&mut self, base: &Path) {
        for sink in &mut self.to {
            if let Some(tls) = &mut sink.get_mut().tls {
                tls.place_at(base);
            }
        }
    }
}

impl ServerTls {
    fn place_at(&mut self, base: &Path) {
        for path in [
            Some(&mut self.cert),
            Some(&mut self.key),
            self.client_ca.as_mut(),
        ] {
            path.into_iter().for_each(|path| *path = base.join(&*path));
        }
    }
}

impl ClientTls {
    fn place_at(&mut self, base: &Path) {
        for path in [&mut self.cert, &mut self.key, &mut self.ca] {
            *path = base.join(&*path);
        }
    }
}

/// Reads `T` from a string, or `Table` from a table, keeping the reader's positions.
fn text_or_table<'de, D, S, Table, T>(
    deserializer: D,
    from_text: impl Fn(S) -> T,
    from_table: impl Fn(Table) -> T,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    S: FromStr<Err: fmt::Display>,
    Table: Deserialize<'de>,
{
    struct Either<S, Table, T, F, G>(F, G, PhantomData<(S, Table, T)>);
    impl<'de, S, Table, T, F, G> Visitor<'de> for Either<S, Table, T, F, G>
    where
        S: FromStr<Err: fmt::Display>,
        Table: Deserialize<'de>,
        F: Fn(S) -> T,
        G: Fn(Table) -> T,
    {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a table")
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map(self.0).map_err(E::custom)
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            Table::deserialize(value::MapAccessDeserializer::new(map)).map(self.1)
        }
    }
    deserializer.deserialize_any(Either(from_text, from_table, PhantomData))
}

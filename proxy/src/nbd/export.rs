//! What can be opened, by whom, and what the handshake needs to know about it.

use super::budget::PayloadBudget;
use super::device::Device;
use super::session::{INLINE_PAYLOAD_DEFAULT, MetaContext, SessionConfig};
use crate::tls::Identity;
use afterimage_format::ids::{DiskIndex, GroupId};
use afterimage_format::nbd::constants::transmission_flag as flag;
use afterimage_format::nbd::reply::ReplyForm;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

/// A future that a trait object returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who serves an export once the handshake is done.
#[derive(Clone)]
pub enum Target {
    /// A disk of a group that this process captures: the thread that owns the group.
    Disk {
        /// The group.
        group: GroupId,
        /// The disk.
        disk: DiskIndex,
    },
    /// Something that stands by itself, such as an image.
    Device(Arc<dyn Device>),
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { group, disk } => write!(f, "disk {} of group {group}", disk.0),
            Self::Device(_) => f.write_str("device"),
        }
    }
}

/// An export as the handshake describes it. Every connection to one export must see the same.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Canonical name: `GROUP/DISK`, or `GROUP@POINT/DISK` for an image.
    pub name: String,
    /// For people.
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The medium rotates.
    pub rotational: bool,
    /// The dirty context tells something.
    pub has_dirty: bool,
    /// Who serves it.
    pub target: Target,
}

impl ExportInfo {
    /// Transmission flags, given how replies are framed.
    #[must_use]
    pub fn flags(&self, form: ReplyForm) -> u16 {
        let writable =
            flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        let mut flags =
            flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
        flags |= if self.read_only {
            flag::READ_ONLY
        } else {
            writable
        };
        if self.rotational {
            flags |= flag::ROTATIONAL;
        }
        if form != ReplyForm::Simple {
            flags |= flag::SEND_DF;
        }
        flags
    }
}

/// An export in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Canonical name.
    pub name: String,
    /// For people.
    pub description: String,
}

/// Why an export cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of that name.
    #[error("no such export")]
    Unknown,
    /// It is there, but not for this client.
    #[error("this client may not open it")]
    Forbidden,
    /// It cannot be opened at present: not recovered yet, detached, failed.
    #[error("not available at present")]
    Unavailable,
    /// The server is going down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Where a client comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// A unix socket; user and process as the kernel reports them.
    Unix {
        /// User.
        uid: u32,
        /// Process, 0 if unknown.
        pid: i32,
    },
    /// TCP.
    Tcp(SocketAddr),
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { uid, pid } => write!(f, "process {pid} of user {uid}"),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A client, and what it may open.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it comes from.
    pub address: PeerAddress,
    /// Groups that the listener serves; `None` is all.
    pub groups: Option<Arc<[String]>>,
    /// The connection is encrypted.
    pub tls: bool,
    /// What its certificate says, if it had to show one.
    pub identity: Option<Identity>,
    /// Every write is answered only when it is durable in the log.
    pub ack_durable: bool,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)?;
        match &self.identity {
            Some(identity) => write!(f, " ({})", identity.subject()),
            None => Ok(()),
        }
    }
}

impl Peer {
    /// Whether listener and certificate allow exports of `group`.
    #[must_use]
    pub fn may_open(&self, group: &str) -> bool {
        let by_listener = |groups: &Arc<[String]>| groups.iter().any(|allowed| allowed == group);
        let by_certificate = |identity: &Identity| identity.grant(group).is_some();
        self.groups.as_ref().is_none_or(by_listener)
            && self.identity.as_ref().is_none_or(by_certificate)
    }
}

/// The group an export name belongs to: what stands before `/` or `@`.
#[must_use]
pub fn group_of(export: &str) -> &str {
    export.split(['/', '@']).next().unwrap_or_default()
}

/// The exports of this process.
pub trait Exports: Send + Sync {
    /// What there is, for LIST. The handshake leaves out what the peer may not open.
    fn list<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>>;

    /// Looks an export up. The handshake has checked that the peer may open its group. May wait
    /// for a recovery.
    fn open<'a>(
        &'a self,
        name: &'a str,
        peer: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>>;

    /// Called before GO or EXPORT_NAME can be answered: returns when every request that can still be
    /// read from dead connections to this export has been executed or dropped for good. A client
    /// that reconnects sends again what was not answered; an old copy must not take effect after
    /// the new one.
    fn quiesce<'a>(&'a self, export: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>>;
}

/// What a handshake agreed on.
#[derive(Clone, Debug)]
pub struct Negotiated {
    /// The export.
    pub export: ExportInfo,
    /// How replies, and requests, are framed.
    pub form: ReplyForm,
    /// Selected metadata contexts.
    pub contexts: Vec<MetaContext>,
    /// Every write is answered only when it is durable in the log.
    pub ack_durable: bool,
    /// The answer of GO or EXPORT_NAME, which has not been sent: the first bytes for the client,
    /// from whoever serves it. So nobody can have a request under way that a quiesce, which looks
    /// at the connections being served, does not see.
    pub answer: Vec<u8>,
}

impl Negotiated {
    /// What a session needs; `budget` is shared by the connections of a group.
    #[must_use]
    pub fn session_config(&self, connection: u32, budget: PayloadBudget) -> SessionConfig {
        SessionConfig {
            connection,
            size: self.export.size,
            read_only: self.export.read_only,
            ack_durable: self.ack_durable,
            form: self.form,
            contexts: self.contexts.clone(),
            inline_payload_max: INLINE_PAYLOAD_DEFAULT,
            budget,
            answer: self.answer.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_stands_before_disk_and_point() {
        for name in ["vm1/vda", "vm1@latest/vda", "vm1@lsn:5", "vm1"] {
            assert_eq!(group_of(name), "vm1", "{name}");
        }
        assert_eq!(group_of("/vda"), "");
        assert_eq!(group_of(""), "");
    }
}

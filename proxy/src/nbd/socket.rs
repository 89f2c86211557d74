//! Listening sockets: made here or passed in, unix or TCP.
//!
//! Owns the socket file of a unix socket it made, and removes it at the end if it is still its
//! own. Always holds: nobody can connect before owner and mode are set; a socket file is replaced
//! only if nothing listens behind it; anything else at the path is left alone.

use rustix::fs::{Gid, Mode, Uid, chmod, chown};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Connections that wait to be accepted, as long as the kernel allows.
const BACKLOG: i32 = 1024;

/// Where to listen.
#[derive(Debug)]
pub enum ListenAddress {
    /// A unix socket to be made.
    Unix {
        /// Its file.
        path: PathBuf,
        /// User it shall belong to: a name or a number.
        owner: Option<String>,
        /// Group it shall belong to: a name or a number.
        group: Option<String>,
        /// Permission bits, as a rule 0660.
        mode: u32,
    },
    /// A TCP address.
    Tcp(SocketAddr),
    /// A listening socket that somebody else made, as systemd does.
    Passed(OwnedFd),
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("another process listens on {}; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket has the name.
    #[error("{} exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// No such user or group.
    #[error("{file} has no {name:?}; use a name from it or a number")]
    NoSuchName {
        /// Where it was looked up.
        file: &'static str,
        /// What was looked for.
        name: String,
    },
    /// A step failed.
    #[error("cannot {step} {}: {source}", path.display())]
    Unix {
        /// What.
        step: &'static str,
        /// The socket's file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The TCP address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// What was passed in is not a listening unix or TCP socket.
    #[error("the socket that was passed in cannot be used: {0}")]
    Passed(io::Error),
}

/// A socket that listens.
#[derive(Debug)]
pub(super) enum Socket {
    Unix {
        listener: UnixListener,
        /// Removed when this is dropped.
        _file: Option<SocketFile>,
    },
    Tcp(TcpListener),
}

/// A client's stream.
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream, SocketAddr),
}

impl Socket {
    pub(super) fn bind(address: ListenAddress) -> Result<Self, ListenError> {
        match address {
            ListenAddress::Unix {
                path,
                owner,
                group,
                mode,
            } => {
                let (listener, file) = bind_unix(&path, owner.as_deref(), group.as_deref(), mode)?;
                Ok(Self::Unix {
                    listener,
                    _file: Some(file),
                })
            }
            ListenAddress::Tcp(address) => {
                let error = |source| ListenError::Tcp { address, source };
                let listener = std::net::TcpListener::bind(address).map_err(error)?;
                listener.set_nonblocking(true).map_err(error)?;
                TcpListener::from_std(listener)
                    .map(Self::Tcp)
                    .map_err(error)
            }
            ListenAddress::Passed(fd) => Self::from_passed(fd).map_err(ListenError::Passed),
        }
    }

    fn from_passed(fd: OwnedFd) -> io::Result<Self> {
        if !rustix::net::sockopt::socket_acceptconn(&fd)? {
            return Err(io::Error::other("it does not listen"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        match rustix::net::sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => Ok(Self::Unix {
                listener: UnixListener::from_std(fd.into())?,
                _file: None,
            }),
            AddressFamily::INET | AddressFamily::INET6 => {
                Ok(Self::Tcp(TcpListener::from_std(fd.into())?))
            }
            other => Err(io::Error::other(format!("its family is {other:?}"))),
        }
    }

    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix { .. } => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                tune_tcp(&stream)?;
                Ok(Stream::Tcp(stream, address))
            }
        }
    }
}

/// Small replies go at once; a peer that is gone is noticed within about two minutes.
fn tune_tcp(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    use std::time::Duration;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream, 6)?;
    Ok(())
}

/// The file of a unix socket; removed on drop if it is still the same.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn bind_unix(
    path: &Path,
    owner: Option<&str>,
    group: Option<&str>,
    mode: u32,
) -> Result<(UnixListener, SocketFile), ListenError> {
    let at = |step| {
        move |source: io::Error| ListenError::Unix {
            step,
            path: path.into(),
            source,
        }
    };
    let owner = owner
        .map(|name| number_of("/etc/passwd", name))
        .transpose()?;
    let group = group
        .map(|name| number_of("/etc/group", name))
        .transpose()?;
    remove_stale(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| at("use the path")(e.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| at("make a socket for")(e.into()))?;
    rustix::net::bind(&fd, &address).map_err(|e| at("bind")(e.into()))?;
    let file = SocketFile {
        path: path.into(),
        identity: identity(path).map_err(at("look at"))?,
    };
    // Nobody can connect until `listen`, so nobody sees the socket with other permissions.
    chmod(path, Mode::from_raw_mode(mode)).map_err(|e| at("set the mode of")(e.into()))?;
    if owner.is_some() || group.is_some() {
        let (owner, group) = (owner.map(Uid::from_raw), group.map(Gid::from_raw));
        chown(path, owner, group).map_err(|e| at("set the owner of")(e.into()))?;
    }
    rustix::net::listen(&fd, BACKLOG).map_err(|e| at("listen on")(e.into()))?;
    let listener = UnixListener::from_std(fd.into()).map_err(at("listen on"))?;
    Ok((listener, file))
}

/// Removes a socket file that a dead process left.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let at = |step, source| ListenError::Unix {
        step,
        path: path.into(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("look at", error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| at("remove the stale", source))
        }
        Err(error) => Err(at("find out who listens on", error)),
    }
}

/// A user's or group's number: third field of its line.
fn number_of(file: &'static str, name: &str) -> Result<u32, ListenError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name))
        .and_then(|fields| fields.get(2)?.parse().ok())
        .ok_or_else(|| ListenError::NoSuchName {
            file,
            name: name.into(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn users_are_known_by_name_and_number() {
        assert_eq!(number_of("/etc/passwd", "root").expect("root"), 0);
        assert_eq!(number_of("/etc/group", "4711").expect("a number"), 4711);
        let error = number_of("/etc/group", "no-such-group").expect_err("unknown");
        assert!(error.to_string().contains("no-such-group"), "{error}");
    }

    fn unix(path: &Path) -> ListenAddress {
        ListenAddress::Unix {
            path: path.into(),
            owner: None,
            group: None,
            mode: 0o660,
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        let first = Socket::bind(unix(&path)).expect("replaces the stale one");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o660);
        let error = Socket::bind(unix(&path)).expect_err("in use");
        assert!(matches!(error, ListenError::InUse(_)), "{error}");
        drop(first);
        assert!(!path.exists(), "removed at the end");

        std::fs::write(&path, "data").expect("written");
        let error = Socket::bind(unix(&path)).expect_err("a file");
        assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read(&path).expect("still there"), b"data");

        let long = folder.path().join("x".repeat(120));
        let error = Socket::bind(unix(&long)).expect_err("too long");
        assert!(matches!(error, ListenError::Unix { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_passed_socket_must_listen() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let error = Socket::bind(ListenAddress::Passed(a.into())).expect_err("no listener");
        assert!(matches!(error, ListenError::Passed(_)), "{error}");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let socket = Socket::bind(ListenAddress::Passed(tcp.into())).expect("a listener");
        assert!(socket.local_address().is_some());
    }
}

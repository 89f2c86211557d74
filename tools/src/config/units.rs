//! Sizes, durations and addresses as they are written in the configuration.
//!
//! Each type parses itself from a string and says what it expected; the TOML reader adds file and
//! line to that.

use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Why a value of the configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("'{0}' is not a size; write it like \"128MiB\" or \"4GiB\"")]
    Size(String),
    /// Not a duration.
    #[error("'{0}' is not a duration; write it like \"500ms\", \"30s\", \"5m\", \"1h\" or \"2d\"")]
    Duration(String),
    /// Not an address to listen on.
    #[error(
        "'{0}' is not an address to listen on; write \"unix:/path/to.sock\" or \"tcp://host:port\" with a numeric host"
    )]
    Listen(String),
    /// Not an address of a sink or repository.
    #[error(
        "'{0}' is not a target; write \"file:///path\", \"s3://bucket/prefix\" or \"afterimage://host:port\""
    )]
    Target(String),
    /// Not a file mode.
    #[error("'{0}' is not a file mode; write it in octal, like \"0660\"")]
    Mode(String),
}

macro_rules! parsed_from_string {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = UnitError;
            fn try_from(text: String) -> Result<Self, UnitError> {
                text.parse()
            }
        }
    };
}

/// A number of bytes, written like `4GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Size(text.to_owned());
        let split = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        let scale: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(scale).map(Self).ok_or_else(wrong)
    }
}
parsed_from_string!(Size);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&bytesize::ByteSize(self.0), f)
    }
}

/// A length of time, written like `500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Interval(pub Duration);

impl Interval {
    /// So many milliseconds.
    #[must_use]
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
}

impl FromStr for Interval {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Duration(text.to_owned());
        let split = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        let milliseconds: u64 = match unit.trim() {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        number
            .checked_mul(milliseconds)
            .map(Self::from_millis)
            .ok_or_else(wrong)
    }
}
parsed_from_string!(Interval);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum ListenAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl ListenAddress {
    /// Whether a process on another host can connect.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }
}

impl FromStr for ListenAddress {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Listen(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') || path.len() > 107 || path.contains('\0') {
                return Err(wrong());
            }
            return Ok(Self::Unix(path.into()));
        }
        let address = text.strip_prefix("tcp://").ok_or_else(wrong)?;
        address.parse().map(Self::Tcp).map_err(|_| wrong())
    }
}
parsed_from_string!(ListenAddress);

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// Where a group's history goes, or where a repository lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub enum Target {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A bucket with a prefix.
    Bucket(String),
    /// A replica over the network: host and port.
    Replica {
        /// Name or address of the host; the certificate must be valid for it.
        host: String,
        /// TCP port.
        port: u16,
    },
}

impl FromStr for Target {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Target(text.to_owned());
        if let Some(path) = text.strip_prefix("file://") {
            if !path.starts_with('/') || !is_plain(path) {
                return Err(wrong());
            }
            return Ok(Self::Folder(path.into()));
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            if rest.is_empty() || rest.starts_with('/') || !is_plain(rest) {
                return Err(wrong());
            }
            return Ok(Self::Bucket(text.to_owned()));
        }
        let rest = text.strip_prefix("afterimage://").ok_or_else(wrong)?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
        if host.is_empty() || !host.chars().all(allowed) {
            return Err(wrong());
        }
        Ok(Self::Replica {
            host: host.to_owned(),
            port: port.parse().map_err(|_| wrong())?,
        })
    }
}
parsed_from_string!(Target);

/// Whether a path leads nowhere but down, and ends where it seems to.
fn is_plain(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| part != "..")
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "file://{}", path.display()),
            Self::Bucket(url) => f.write_str(url),
            Self::Replica { host, port } if host.contains(':') => {
                write!(f, "afterimage://[{host}]:{port}")
            }
            Self::Replica { host, port } => write!(f, "afterimage://{host}:{port}"),
        }
    }
}

/// Permission bits of a socket file, written in octal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mode(pub u32);

impl FromStr for Mode {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Self(mode)),
            _ => Err(UnitError::Mode(text.to_owned())),
        }
    }
}
parsed_from_string!(Mode);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!("4GiB".parse(), Ok(Size(4 << 30)));
        assert_eq!("128 MiB".parse(), Ok(Size(128 << 20)));
        assert_eq!("512".parse(), Ok(Size(512)));
        assert_eq!("1GB".parse(), Ok(Size(1_000_000_000)));
        for wrong in ["", "GiB", "-1", "4 giraffes", "99999999999999TiB", "1.5GiB"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!("500ms".parse(), Ok(Interval::from_millis(500)));
        assert_eq!("2d".parse(), Ok(Interval::from_millis(2 * 86_400_000)));
        for wrong in ["", "5", "5 parsecs", "s"] {
            assert!(wrong.parse::<Interval>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_come_back_as_written() {
        for text in ["unix:/run/a.sock", "tcp://127.0.0.1:10809", "tcp://[::1]:1"] {
            let address: ListenAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
            assert!(!address.is_remote());
        }
        assert!(
            "tcp://0.0.0.0:1"
                .parse::<ListenAddress>()
                .expect("valid")
                .is_remote()
        );
        for wrong in ["unix:run/a.sock", "tcp://localhost:1", "/run/a", "unix:/\0"] {
            assert!(wrong.parse::<ListenAddress>().is_err(), "{wrong}");
        }
        for text in [
            "file:///srv/repo",
            "s3://bucket/prefix",
            "afterimage://dr.example:9471",
            "afterimage://[::1]:9471",
        ] {
            assert_eq!(text.parse::<Target>().expect(text).to_string(), text);
        }
        for wrong in [
            "file://srv",
            "s3://",
            "afterimage://h",
            "afterimage://:1",
            "ftp://x/y",
            "file:///srv/../etc",
            "file:///srv/..",
            "file:///srv/re\0po",
            "s3://bucket/../other",
            "s3://bucket/a\0",
            "s3://..",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}

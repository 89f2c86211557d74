//! The NBD listeners: from the configuration, or passed by systemd.
//!
//! A socket that systemd passed takes the place of the configured listener of the same address, so
//! that rules come from the configuration and the queue of clients from systemd. A passed socket
//! that no listener names is a mistake and refused.

use afterimage_proxy::nbd::handshake::TlsPolicy;
use afterimage_proxy::nbd::listener::{ListenAddress, ListenError, Listener, ListenerConfig};
use afterimage_proxy::tls::{EndpointFiles, TlsError, server_config};
use listenfd::ListenFd;
use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::config::Config;
use crate::config::schema::{Ack, Listener as Configured, ServerTls};
use crate::config::units;

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListenersError {
    /// Its address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        source: ListenError,
    },
    /// Its certificates.
    #[error("TLS of {address}: {source}")]
    Tls {
        /// As configured.
        address: String,
        /// Why.
        source: TlsError,
    },
    /// A socket that systemd passed.
    #[error("a socket that systemd passed cannot be used: {0}")]
    Passed(#[source] std::io::Error),
    /// A socket that nobody asked for.
    #[error(
        "systemd passed the socket {0}, which is not in [nbd] listen; add it there, or take it out of the socket unit"
    )]
    NotConfigured(String),
}

/// Sockets by address, as systemd passed them.
#[derive(Debug, Default)]
pub(super) struct Passed(HashMap<String, OwnedFd>);

impl Passed {
    /// Takes what is there; for the first thread, at its start.
    ///
    /// # Errors
    /// A descriptor that is no listening socket.
    pub(super) fn take() -> Result<Self, ListenersError> {
        let mut passed = ListenFd::from_env();
        let mut sockets = HashMap::new();
        for index in 0..passed.len() {
            if let Ok(Some(listener)) = passed.take_unix_listener(index) {
                sockets.insert(unix_address(&listener), listener.into());
            } else if let Some(listener) = passed
                .take_tcp_listener(index)
                .map_err(ListenersError::Passed)?
            {
                sockets.insert(tcp_address(&listener)?, listener.into());
            }
        }
        Ok(Self(sockets))
    }
}

fn unix_address(listener: &UnixListener) -> String {
    let path = listener.local_addr().ok();
    let path = path.as_ref().and_then(|address| address.as_pathname());
    format!("unix:{}", path.unwrap_or(Path::new("?")).display())
}

fn tcp_address(listener: &TcpListener) -> Result<String, ListenersError> {
    let address = listener.local_addr().map_err(ListenersError::Passed)?;
    Ok(format!("tcp://{address}"))
}

/// Listens on every configured address, and on the socket for images. Clients queue from now on.
///
/// # Errors
/// Names the address.
pub(super) fn bind(config: &Config, passed: Passed) -> Result<Vec<Listener>, ListenersError> {
    let Passed(mut passed) = passed;
    let mut listeners = Vec::new();
    for configured in &config.listeners {
        let address = configured.address.to_string();
        let socket = passed.remove(&address);
        let listen = listener_config(configured, socket)?;
        let bound = Listener::bind(listen);
        listeners.push(bound.map_err(|source| ListenersError::Listen { address, source })?);
    }
    if let Some(unknown) = passed.into_keys().next() {
        return Err(ListenersError::NotConfigured(unknown));
    }
    let images = units::ListenAddress::Unix(config.images_socket.clone());
    if !config.listeners.iter().any(|l| l.address == images) {
        let configured = Configured::at(images);
        let address = configured.address.to_string();
        let bound = Listener::bind(listener_config(&configured, None)?);
        listeners.push(bound.map_err(|source| ListenersError::Listen { address, source })?);
    }
    Ok(listeners)
}

fn listener_config(
    configured: &Configured,
    passed: Option<OwnedFd>,
) -> Result<ListenerConfig, ListenersError> {
    let address = match (&configured.address, passed) {
        (_, Some(socket)) => ListenAddress::Passed(socket),
        (units::ListenAddress::Unix(path), None) => ListenAddress::Unix {
            path: path.clone(),
            owner: configured.owner.clone(),
            group: configured.group.clone(),
            mode: configured.mode.0,
        },
        (units::ListenAddress::Tcp(tcp), None) => ListenAddress::Tcp(*tcp),
    };
    let tls = match &configured.tls {
        None => TlsPolicy::Off,
        Some(tls) => policy(tls).map_err(|source| ListenersError::Tls {
            address: configured.address.to_string(),
            source,
        })?,
    };
    let names = configured.groups.as_ref();
    let groups = names.map(|names| names.iter().map(|name| name.get_ref().clone()).collect());
    Ok(ListenerConfig {
        groups,
        tls,
        ack_durable: match configured.ack {
            Some(ack) => ack == Ack::Durable,
            None => configured.address.is_remote(),
        },
        ..ListenerConfig::at(address)
    })
}

fn policy(tls: &ServerTls) -> Result<TlsPolicy, TlsError> {
    let config = server_config(&endpoint(tls), tls.client_ca.as_deref())?;
    Ok(if tls.required {
        TlsPolicy::Forced(config)
    } else {
        TlsPolicy::Offered(config)
    })
}

/// Certificate and key of a server.
#[must_use]
pub(super) fn endpoint(tls: &ServerTls) -> EndpointFiles {
    EndpointFiles {
        cert: tls.cert.clone(),
        key: tls.key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a listener of this configuration answers writes only once they are durable.
    fn durable(listen: &str) -> bool {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("afterimage.toml");
        std::fs::write(&file, format!("[nbd]\nlisten = [{listen}]\n")).expect("written");
        let config = Config::load(Some(&file)).expect("valid");
        let listener = listener_config(&config.listeners[0], None);
        listener.expect("a listener").ack_durable
    }

    #[test]
    fn writes_of_other_hosts_are_answered_when_durable_unless_told_otherwise() {
        for (listen, wanted) in [
            ("\"unix:/run/nbd.sock\"", false),
            (
                "{ address = \"unix:/run/nbd.sock\", ack = \"durable\" }",
                true,
            ),
            ("\"tcp://127.0.0.1:10809\"", false),
            ("\"tcp://[::1]:10809\"", false),
            (
                "{ address = \"tcp://127.0.0.1:10809\", ack = \"durable\" }",
                true,
            ),
            (
                "{ address = \"tcp://192.0.2.1:10809\", plaintext = true }",
                true,
            ),
            (
                "{ address = \"tcp://0.0.0.0:10809\", plaintext = true }",
                true,
            ),
            ("{ address = \"tcp://[::]:10809\", plaintext = true }", true),
            (
                "{ address = \"tcp://0.0.0.0:10809\", plaintext = true, ack = \"ring\" }",
                false,
            ),
        ] {
            assert_eq!(durable(listen), wanted, "{listen}");
        }
    }

    #[test]
    fn a_socket_of_systemd_keeps_the_rules_of_its_address() {
        let remote: units::ListenAddress = "tcp://0.0.0.0:10809".parse().expect("valid");
        let configured = Configured::at(remote);
        let socket = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let listener = listener_config(&configured, Some(socket.into()));
        assert!(listener.expect("a listener").ack_durable);
    }
}

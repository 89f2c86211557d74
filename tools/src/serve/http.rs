//! The sockets of API and metrics.

use anyhow::Context as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;

use crate::api::{Control, server};
use crate::config::Config;
use crate::config::units::ListenAddress;

/// Makes the folders of the sockets, as far as they are missing.
pub(super) fn make_folders(config: &Config) -> anyhow::Result<()> {
    let nbd = config
        .listeners
        .iter()
        .filter_map(|listener| match &listener.address {
            ListenAddress::Unix(path) => Some(path.as_path()),
            ListenAddress::Tcp(_) => None,
        });
    let own = [config.api_socket.as_path(), config.images_socket.as_path()];
    for socket in nbd.chain(own) {
        if let Some(folder) = socket.parent() {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
    }
    Ok(())
}

/// The listener for metrics. Scrapers queue until the rest is there.
///
/// # Errors
/// Names the address.
pub(super) async fn bind_metrics(config: &Config) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = config.metrics else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("cannot listen on {address} for metrics"))?;
    Ok(Some(listener))
}

/// Answers API and metrics until the tasks are dropped.
pub(super) async fn start(
    config: &Config,
    metrics: Option<TcpListener>,
    daemon: &Arc<dyn Control>,
) -> anyhow::Result<JoinSet<()>> {
    let mut tasks = JoinSet::new();
    let listener = bind_private(&config.api_socket)
        .with_context(|| format!("cannot listen on {}", config.api_socket.display()))?;
    let router = server::api(Arc::clone(daemon));
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the API ended");
        }
    });
    if let Some(listener) = metrics {
        let router = server::metrics(Arc::clone(daemon));
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the metrics ended");
            }
        });
    }
    Ok(tasks)
}

/// A socket that only its owner can use, at no moment anybody else: made under another name, put
/// in place when its mode is set. Takes the place of one that a dead daemon left.
fn bind_private(path: &Path) -> std::io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(std::io::Error::other(
            "another daemon answers there; stop it, or give this one another http.api",
        ));
    }
    let mut making = path.as_os_str().to_owned();
    making.push(".new");
    let making = Path::new(&making);
    match fs::remove_file(making) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(making)?;
    fs::set_permissions(making, fs::Permissions::from_mode(0o600))?;
    fs::rename(making, path)?;
    Ok(listener)
}

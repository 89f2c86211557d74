//! `afterimage export`: the disks of a moment over NBD, by the daemon or by this process.

use afterimage_proxy::nbd::export::{
    BoxFuture, ExportInfo as NbdExport, Exports, ListedExport, OpenError, Peer,
};
use afterimage_proxy::nbd::listener::{
    Attach, Connection, ListenAddress, Listener, ListenerConfig,
};
use afterimage_replica::image::Image;
use afterimage_replica::points;
use anyhow::{Context as _, bail};
use std::sync::Arc;
use std::time::Instant;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::history;
use crate::api::client::Client;
use crate::api::types::ExportInfo;
use crate::cli::Export;
use crate::cli::output::{Output, local_time, table, table_text};
use crate::cli::values::GroupPoint;
use crate::config::units::ListenAddress as Address;
use crate::config::{Config, ConfigError};
use crate::serve::images::Images;

/// Runs the command.
///
/// # Errors
/// When the moment does not exist, the daemon does not answer, or the address is taken.
pub async fn run(
    args: Export,
    load: impl Fn() -> Result<Config, ConfigError>,
    output: Output,
) -> anyhow::Result<()> {
    if args.foreground {
        return foreground(args, load, output).await;
    }
    let client = Client::new(&load()?.api_socket);
    if let Some(name) = &args.close {
        client.close_export(name).await?;
        output.result(name, |name| format!("{name} is not exported any more"))?;
    } else if args.list {
        output.result(&client.exports().await?, |exports| list(exports))?;
    } else if let Some(GroupPoint { group, point }) = &args.group {
        let info = client.export(group, &point.to_string()).await?;
        say(&info, output);
        output.result(&info, text)?;
    }
    Ok(())
}

/// The time of the image's moment; 0 if that cannot be read, which is no reason to withhold the image.
pub async fn time_of(image: &Image) -> u64 {
    if let Some(time) = image.checkpoint_ns() {
        return time;
    }
    let found = points::time_of(image.group(), image.position()).await;
    found.ok().flatten().unwrap_or_default()
}

/// Which moment it is, beside the URIs.
fn say(info: &ExportInfo, output: Output) {
    output.aside(&match info.wall_ns {
        0 => format!("{} as of LSN {}", info.group, info.lsn),
        time => format!(
            "{} as of LSN {}, {}",
            info.group,
            info.lsn,
            local_time(time)
        ),
    });
    if let Some(warning) = &info.warning {
        output.warn(warning);
    }
}

fn text(info: &ExportInfo) -> String {
    let mut text = String::new();
    for disk in &info.disks {
        text += &format!("{}\n", disk.uri);
    }
    text
}

fn list(exports: &[ExportInfo]) -> String {
    let mut rows = table(&["NAME", "LSN", "TIME", "URI"]);
    for info in exports {
        for disk in &info.disks {
            let time = match info.wall_ns {
                0 => String::new(),
                time => local_time(time),
            };
            rows.add_row([
                info.name.clone(),
                info.lsn.to_string(),
                time,
                disk.uri.clone(),
            ]);
        }
    }
    table_text(&rows)
}

/// Images and nothing else.
#[derive(Debug, Default)]
struct OnlyImages(Images);

impl Exports for OnlyImages {
    fn list<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        Box::pin(async { self.0.list() })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _peer: &'a Peer,
    ) -> BoxFuture<'a, Result<NbdExport, OpenError>> {
        Box::pin(async { self.0.find(name).ok_or(OpenError::Unknown) })
    }

    fn quiesce<'a>(&'a self, _export: &'a NbdExport) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Attach for OnlyImages {
    fn attach(&self, _connection: Connection) {
        // Only devices are exported here; they are served by the listener itself.
    }
}

async fn foreground(
    args: Export,
    load: impl Fn() -> Result<Config, ConfigError>,
    output: Output,
) -> anyhow::Result<()> {
    let (Some(wanted), Some(listen)) = (&args.group, &args.listen) else {
        bail!("--foreground needs a group and --listen, like --listen unix:/tmp/image.sock");
    };
    let repository = history::repository(&args.repository, || Ok(load()?)).await?;
    let begun = Instant::now();
    let (image, warning) = history::image(&repository, wanted).await?;
    let opened_in_us = begun.elapsed().as_micros() as u64;
    let address = match listen {
        Address::Unix(path) => ListenAddress::Unix {
            path: path.clone(),
            owner: None,
            group: None,
            mode: 0o600,
        },
        Address::Tcp(tcp) if tcp.ip().is_loopback() => ListenAddress::Tcp(*tcp),
        Address::Tcp(_) => bail!(
            "{listen} could be reached from other hosts; use a unix socket or the loopback interface"
        ),
    };
    let listener = Listener::bind(ListenerConfig::at(address))
        .with_context(|| format!("cannot listen on {listen}"))?;
    let images = Arc::new(OnlyImages::default());
    let wall_ns = time_of(&image).await;
    let told = (wall_ns, warning);
    let info = images
        .0
        .add(&wanted.group, image, told, opened_in_us, listen);
    say(&info, output);
    output.result(&info, text)?;
    let stop = CancellationToken::new();
    let serving = tokio::spawn(listener.run(
        Arc::clone(&images) as Arc<dyn Exports>,
        images as Arc<dyn Attach>,
        stop.clone(),
    ));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
    stop.cancel();
    serving.await?;
    Ok(())
}

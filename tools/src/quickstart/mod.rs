//! `afterimage quickstart`: the main job on real data, in half a minute, without root.
//!
//! The story: a disk with a file system is copied to a replica while an application writes; the
//! daemon is killed in the middle and loses nothing; then every file is encrypted, and the image
//! of one write earlier shows them as they were. It talks to the daemon as anybody would: over
//! NBD with a client of its own and over the API. Nothing is left behind unless `--keep` says so.

mod daemon;
mod disk;
mod fat;
mod load;
mod nbd;
mod report;
mod story;

use anyhow::{Context as _, bail, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

use crate::api::types::{ExportInfo, GroupStatus, PointInfo};
use crate::cli::Quickstart;
use crate::cli::output::{Output, bytes};
use daemon::{DISK, Daemon, GROUP, Places};
use load::{Load, Writer};
use report::{Checkpoint, Report};

/// How long the application writes before the kill and after it.
const WRITING: Duration = Duration::from_millis(2500);
/// And between the checkpoints.
const WRITING_ON: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(50);
/// No step takes longer on a machine that works.
const STEP_TIME_MAX: Duration = Duration::from_secs(120);

/// Runs the command.
///
/// # Errors
/// When a step fails, or something is not as it was promised.
pub async fn run(args: &Quickstart, output: Output) -> anyhow::Result<()> {
    let places = Places::create(args.folder.as_deref())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut story = Story {
        places: places.clone(),
        output,
        keep: args.keep,
        daemon: None,
        started: Instant::now(),
    };
    let result = tokio::select! {
        result = story.tell(args.disk.clone()) => result,
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    if let Some(daemon) = story.daemon.take() {
        match result {
            Ok(()) if args.keep => daemon.leave(),
            Ok(()) => daemon.stop().await?,
            Err(_) => daemon.abandon(),
        }
    }
    if args.keep {
        if result.is_err() {
            output.note(&format!(
                "kept: {} and {}",
                places.folder.display(),
                places.rings.display()
            ));
        }
    } else {
        places.remove();
    }
    result
}

struct Story {
    places: Places,
    output: Output,
    keep: bool,
    daemon: Option<Daemon>,
    started: Instant,
}

impl Story {
    fn say(&self, text: &str) {
        let elapsed = self.started.elapsed().as_secs_f64();
        self.output.note(&format!("{elapsed:5.1} s  {text}"));
    }

    fn daemon(&self) -> anyhow::Result<&Daemon> {
        self.daemon.as_ref().context("the daemon is not running")
    }

    async fn group(&self) -> anyhow::Result<GroupStatus> {
        let report = self.daemon()?.status().await?;
        let group = report.groups.into_iter().find(|g| g.name == GROUP);
        group.context("the daemon does not know its group")
    }

    async fn tell(&mut self, given: Option<PathBuf>) -> anyhow::Result<()> {
        self.say("Afterimage quickstart. Primary and replica share this machine; in earnest they do not.");
        let folder = self.places.folder.clone();
        let disk = tokio::task::spawn_blocking(move || match given {
            Some(path) => disk::copy(&path, &folder),
            None => disk::make(&folder),
        })
        .await??;
        let files_bytes = story::total_bytes(&disk.files);
        self.say(&format!(
            "disk: {}, {} ({} of files)",
            bytes(disk.bytes),
            disk.what,
            bytes(files_bytes)
        ));
        if disk.left_out > 0 {
            self.say(&format!(
                "{} of its data are left alone: only the first {} are encrypted and compared",
                bytes(disk.left_out),
                bytes(files_bytes - (disk.live().len() * disk::BLOCK) as u64)
            ));
        }
        self.places.configure(&disk.path)?;
        self.daemon = Some(Daemon::start(&self.places, self.keep).await?);
        self.say(&format!(
            "daemon started (process {}), disk exported as {GROUP}/{DISK}",
            self.daemon()?.pid()
        ));

        let writers = self.write_and_kill(&disk).await?;
        let writes_before: u64 = writers.iter().map(Writer::writes).sum();
        let (writers, recovered_ms) = self.restart_and_check(writers).await?;
        let writers = self.copy_to_the_end(writers).await?;
        self.checkpoint("before-lunch").await?;
        let writers = self.write_on(writers).await?;
        let writes: u64 = writers.iter().map(Writer::writes).sum();
        self.checkpoint("after-lunch").await?;

        let export = format!("{GROUP}/{DISK}");
        let before = self
            .hash(&disk, self.places.nbd(), export.clone(), "reading files")
            .await?;
        let last_good = self.group().await?.appended_lsn;
        let encrypting = self.encrypt(&disk, &export).await?;
        let after = self
            .hash(&disk, self.places.nbd(), export.clone(), "reading files")
            .await?;
        let ruined = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        ensure!(ruined == disk.files.len(), "the attack spared some files");
        self.say(&format!(
            "every file is encrypted now, the application's too: {ruined} of {} unreadable, {encrypting} writes",
            disk.files.len()
        ));
        let (group, rpo) = self.wait_shipped().await?;
        self.say(&format!(
            "the replica has it too, {} ms after the last write",
            rpo.as_millis()
        ));

        let (image, opened) = self.open_image(last_good).await?;
        let (socket, name) = image_export(&image, &self.places)?;
        self.say(&format!(
            "image of one write earlier (lsn:{last_good}) opened in {:.1} ms, no data copied",
            opened.as_secs_f64() * 1e3
        ));
        let restored = self.hash(&disk, socket, name, "comparing image").await?;
        let same = before.iter().zip(&restored).filter(|(a, b)| a == b).count();
        ensure!(
            same == disk.files.len(),
            "{} files of the image differ from what was there",
            disk.files.len() - same
        );
        self.say(&format!(
            "compared by hash with what was there: {same} of {} files identical",
            disk.files.len()
        ));

        let report = Report {
            seconds: self.started.elapsed().as_secs_f64(),
            disk_bytes: disk.bytes,
            files: disk.files.len() as u64,
            writes,
            writes_before_kill: writes_before,
            writes_lost: 0,
            recovered_ms,
            encrypting_writes: encrypting,
            log_used_bytes: group.log_used_bytes,
            last_lsn: group.appended_lsn,
            segments: group.targets.first().map_or(0, |t| t.segments),
            payload_bytes: group.targets.first().map_or(0, |t| t.payload_bytes),
            shipped_bytes: group.targets.first().map_or(0, |t| t.shipped_bytes),
            rpo_ms: rpo.as_millis() as u64,
            checkpoints: self.checkpoints().await?,
            left_out_bytes: disk.left_out,
            image_lsn: last_good,
            image_opened_us: opened.as_micros() as u64,
            files_identical: same as u64,
            kept: self.keep.then(|| self.places.folder.clone()),
            image,
        };
        report.print(self.output, &self.places, self.daemon()?.pid())
    }

    /// The application writes while the disk is copied, until the daemon is killed.
    async fn write_and_kill(&mut self, disk: &disk::Disk) -> anyhow::Result<Vec<Writer>> {
        let export = format!("{GROUP}/{DISK}");
        let load = Load::start(&self.places.nbd(), load::writers(&export, disk.live()))?;
        self.say("initial copy begins; meanwhile an application writes over 4 NBD connections");
        let bar = self.output.bytes_bar("initial copy", 0);
        let begun = Instant::now();
        while begun.elapsed() < WRITING || load.answered() == 0 {
            if let Some(pass) = self.group().await?.targets.first().and_then(|t| t.pass) {
                bar.set_length(pass.total_bytes);
                bar.set_position(pass.done_bytes);
            }
            ensure!(begun.elapsed() < STEP_TIME_MAX, "no write is answered");
            tokio::time::sleep(POLL).await;
        }
        bar.finish_and_clear();
        let daemon = self.daemon.take().context("the daemon is not running")?;
        let pid = daemon.pid();
        daemon.kill()?;
        let writers = tokio::task::spawn_blocking(|| load.wait_broken()).await?;
        let writes: u64 = writers.iter().map(Writer::writes).sum();
        self.say(&format!(
            "kill -9 {pid} in the middle of it, after {writes} answered writes"
        ));
        Ok(writers)
    }

    async fn restart_and_check(
        &mut self,
        mut writers: Vec<Writer>,
    ) -> anyhow::Result<(Vec<Writer>, u64)> {
        let begun = Instant::now();
        self.daemon = Some(Daemon::start(&self.places, self.keep).await?);
        let recovered_ms = begun.elapsed().as_millis() as u64;
        let socket = self.places.nbd();
        let checked = tokio::task::spawn_blocking(move || {
            let mut client = nbd::Client::connect(&socket, &format!("{GROUP}/{DISK}"))?;
            let mut sum = load::Checked::default();
            for writer in &mut writers {
                let checked = writer.check(&mut client)?;
                sum.blocks += checked.blocks;
                sum.lost += checked.lost;
            }
            Ok::<_, std::io::Error>((writers, sum))
        });
        let (writers, sum) = checked.await??;
        ensure!(
            sum.lost == 0,
            "{} of {} blocks lost their last answered write",
            sum.lost,
            sum.blocks
        );
        self.say(&format!(
            "restarted, recovered in {recovered_ms} ms; {} written blocks compared: 0 answered writes lost",
            sum.blocks
        ));
        Ok((writers, recovered_ms))
    }

    /// The application goes on until the replica has the whole disk.
    async fn copy_to_the_end(&mut self, writers: Vec<Writer>) -> anyhow::Result<Vec<Writer>> {
        let load = Load::start(&self.places.nbd(), writers)?;
        let bar = self.output.bytes_bar("initial copy", 0);
        let begun = Instant::now();
        loop {
            let group = self.group().await?;
            let target = group.targets.first().context("the group has no target")?;
            if let Some(pass) = target.pass {
                bar.set_length(pass.total_bytes);
                bar.set_position(pass.done_bytes);
            }
            if target.state == "shipping"
                && target.recoverable_wall_ns.is_some()
                && begun.elapsed() >= WRITING
            {
                break;
            }
            if begun.elapsed() > STEP_TIME_MAX {
                bail!(
                    "the initial copy does not end: {} ({:?})",
                    target.state,
                    target.error
                );
            }
            tokio::time::sleep(POLL).await;
        }
        bar.finish_and_clear();
        let writers = tokio::task::spawn_blocking(|| load.stop()).await??;
        let writes: u64 = writers.iter().map(Writer::writes).sum();
        self.say(&format!(
            "initial copy complete; {writes} writes answered so far"
        ));
        Ok(writers)
    }

    async fn checkpoint(&self, label: &str) -> anyhow::Result<()> {
        let client = self.places.client();
        let taken = client.checkpoint(GROUP, Some(label)).await?;
        self.say(&format!("checkpoint '{label}' at LSN {}", taken.lsn));
        Ok(())
    }

    /// The checkpoints that the replica lists.
    async fn checkpoints(&self) -> anyhow::Result<Vec<Checkpoint>> {
        let list = self.places.client().points(GROUP).await?;
        let labelled = |point: PointInfo| {
            let (label, lsn) = (point.label?, point.lsn);
            Some(Checkpoint { label, lsn })
        };
        Ok(list.points.into_iter().filter_map(labelled).collect())
    }

    /// The application writes for a moment.
    async fn write_on(&self, writers: Vec<Writer>) -> anyhow::Result<Vec<Writer>> {
        let load = Load::start(&self.places.nbd(), writers)?;
        tokio::time::sleep(WRITING_ON).await;
        Ok(tokio::task::spawn_blocking(|| load.stop()).await??)
    }

    async fn hash(
        &self,
        disk: &disk::Disk,
        socket: PathBuf,
        export: String,
        what: &'static str,
    ) -> anyhow::Result<story::Hashes> {
        let files = disk.files.clone();
        let bar = self.output.bytes_bar(what, story::total_bytes(&files));
        tokio::task::spawn_blocking(move || {
            let hashes = story::hash_files(&socket, &export, &files, |done| bar.inc(done));
            bar.finish_and_clear();
            hashes
        })
        .await?
    }

    async fn encrypt(&self, disk: &disk::Disk, export: &str) -> anyhow::Result<u64> {
        let (files, socket, export) = (disk.files.clone(), self.places.nbd(), export.to_owned());
        let bar = self
            .output
            .bytes_bar("encrypting", story::total_bytes(&files));
        tokio::task::spawn_blocking(move || {
            let writes = story::encrypt_files(&socket, &export, &files, |done| bar.inc(done));
            bar.finish_and_clear();
            writes
        })
        .await?
    }

    /// Waits until the replica lacks nothing; returns how long that took.
    async fn wait_shipped(&self) -> anyhow::Result<(GroupStatus, Duration)> {
        let begun = Instant::now();
        loop {
            let group = self.group().await?;
            let target = group.targets.first().context("the group has no target")?;
            if target.acked_lsn >= group.appended_lsn {
                return Ok((group, begun.elapsed()));
            }
            ensure!(
                begun.elapsed() < STEP_TIME_MAX,
                "the replica does not catch up: {:?}",
                target.error
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn open_image(&self, lsn: u64) -> anyhow::Result<(ExportInfo, Duration)> {
        let begun = Instant::now();
        let image = self
            .places
            .client()
            .export(GROUP, &format!("lsn:{lsn}"))
            .await?;
        Ok((image, begun.elapsed()))
    }
}

/// Socket and export name of the image's only disk.
fn image_export(image: &ExportInfo, places: &Places) -> anyhow::Result<(PathBuf, String)> {
    let disk = image.disks.first().context("the image has no disk")?;
    Ok((
        places.folder.join("images.sock"),
        format!("{}/{}", image.name, disk.name),
    ))
}

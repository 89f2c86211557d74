//! Death and return of the primary: what is left is recovered, maybe after more deaths, and compared
//! with what was promised.

use super::super::faults::Fault;
use super::super::host::{Life, WorldFile};
use super::super::plan::URL;
use super::super::port::{self, Source};
use super::super::tap;
use super::super::trace;
use super::super::verifier::Verifier;
use super::{Run, Running};
use afterimage_format::ring_header::RING_LATCH_WORD;
use afterimage_proxy::engine::recovery::RecoveryError;
use afterimage_proxy::engine::recovery::claims::ClaimRefusal;
use afterimage_proxy::io::Storage;
use afterimage_proxy::io::sim::FaultKind;
use afterimage_proxy::ship::ShipConfig;
use afterimage_proxy::ship::status::StatusCell;
use afterimage_proxy::ship::task::ShipTask;
use std::sync::Arc;
use std::time::Duration;

impl Run {
    pub(super) fn start_life(&mut self) -> Result<bool, String> {
        self.start_life_killed(None)
    }

    /// Starts the process. False: it died in recovery.
    pub(super) fn start_life_killed(&mut self, kill_after: Option<u64>) -> Result<bool, String> {
        let mut started = self.host.start(kill_after);
        if self.edited
            && matches!(
                started,
                Err(RecoveryError::Claim(ClaimRefusal::Edited { .. }))
            )
        {
            self.host.accepts_edits = true;
            started = self.host.start(kill_after);
            self.host.accepts_edits = false;
        }
        match started {
            Ok(Some(life)) => {
                self.edited = false;
                let (desk, port) = port::connect(&life, &self.host.geometry.disks);
                let status = StatusCell::new(URL);
                let port = Arc::new(port);
                let task = ShipTask {
                    port: port.clone(),
                    sink: self.site.sink(URL),
                    source: Box::new(Source::new(life.began_at.is_multiple_of(2))),
                    config: ShipConfig {
                        ship_interval: Duration::from_millis(3),
                        window_bytes: 64 << 10,
                        pass_bytes_per_second: None,
                        retry_min: Duration::from_millis(2),
                        retry_max: Duration::from_millis(50),
                    },
                    status: status.clone(),
                    jitter_seed: self.rng.next_u64(),
                };
                trace::note(&[20, life.began_at], || {
                    format!("the primary runs, its log goes to record {}", life.began_at)
                });
                let verifier = self
                    .verify_pause
                    .map(|pause| Verifier::begin(port, status.clone(), pause, self.turn));
                if let Some(verifier) = verifier.as_ref().filter(|_| self.settled) {
                    verifier.stop();
                }
                self.running = Some(Running {
                    life,
                    desk,
                    shipping: tokio::spawn(task.run()),
                    verifier,
                    status,
                });
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) if self.host.world.is_dead() => Ok(false),
            Err(error) => Err(format!("recovery refuses: {error}")),
        }
    }

    pub(super) fn stop_shipping(&mut self) -> Option<Life> {
        let running = self.running.take()?;
        running.shipping.abort();
        Some(running.life)
    }

    /// The process has died: what is left is recovered, maybe after more deaths, and compared.
    pub(super) async fn revive(&mut self) -> Result<(), String> {
        let mut power = std::mem::take(&mut self.power_goes);
        let durable = self.running.as_ref().map_or(0, |running| {
            running
                .life
                .began_at
                .max(running.life.engine.progress().durable.0)
        });
        // What the engine itself calls durable is shipped: it has to stay.
        let durable = durable.min(self.head()).max(self.clients.flushed);
        self.end_life()?;
        self.crash(power);
        let mut deaths = 0;
        if self.fault_rng.chance(1000) {
            self.break_recovery();
        }
        loop {
            let met = self.host.world.faults_taken_count();
            let kill = (deaths < 4 && self.rng.chance(self.plan.recovery_kills))
                .then(|| 1 + self.rng.below(120));
            match self.start_life_killed(kill) {
                Ok(true) => break,
                Ok(false) => {
                    deaths += 1;
                    trace::count(Fault::CrashInRecovery);
                    let again = self.rng.chance(3000);
                    power |= again;
                    self.crash(again);
                }
                Err(error) if self.log_wrong => {
                    trace::note(&[21], || format!("refused, as it should be: {error}"));
                    self.refusals += 1;
                    self.over = true;
                    return self.check_points(4).await;
                }
                Err(error)
                    if (power || !self.log_failed)
                        && self.host.world.faults_taken_count() > met =>
                {
                    // Whoever starts it starts it again, and the fault does not come back.
                    trace::note(&[25], || format!("a start met a fault: {error}"));
                    trace::count(Fault::FaultInRecovery);
                    self.crash(false);
                }
                Err(error) if self.log_failed && !power => {
                    trace::note(&[22], || format!("the log is done: {error}"));
                    self.refusals += 1;
                    self.over = true;
                    return self.check_points(4).await;
                }
                Err(error) => return Err(error),
            }
        }
        self.recoveries += 1;
        self.log_failed = false;
        let floor = if power {
            durable
        } else {
            self.clients.answered.max(durable)
        };
        // Nothing in a log says that its last write was lost, when nothing came behind it.
        let floor = if self.log_wrong && power { 0 } else { floor };
        // What was destaged before the loss may be newer than the log, too.
        let ahead = if self.log_wrong && power {
            self.head()
        } else {
            0
        };
        self.judge_recovery_ahead(floor, ahead)?;
        let survive = !power || self.plan.clients_elsewhere;
        self.clients.process_gone(survive);
        let began = self.head();
        (self.clients.answered, self.clients.flushed) = (began, began);
        (self.may_fail, self.clients.may_fail) = (false, false);
        self.clients.may_tear = false;
        self.host.world.forget_faults();
        self.faults_before = (
            self.host.world.faults_taken_count(),
            self.host.world.faults_taken().len(),
        );
        self.storage_broken = false;
        if self.log_wrong {
            self.over = true;
        }
        Ok(())
    }

    /// A storage fault waits for the recovery to come. Writes and syncs of the log are left out: one
    /// that fails ends the log, and that has incidents of its own.
    fn break_recovery(&mut self) {
        let disk = self.fault_rng.below(self.host.geometry.disks.len() as u64) as usize;
        let backing = self.host.backing_name(disk);
        let (file, kind) = match self.fault_rng.below(5) {
            0 => ("log", FaultKind::Read),
            1 => (backing, FaultKind::Read),
            2 => (backing, FaultKind::Sync),
            _ => (backing, FaultKind::Write),
        };
        self.host.world.fail_once(file, kind, 5);
    }

    /// The process is dead: takes what it still put into the ring, and lets go of it.
    pub(super) fn end_life(&mut self) -> Result<(), String> {
        let mut records = Vec::new();
        if let Some(running) = &mut self.running {
            let Life { engine, tap, .. } = &mut running.life;
            let storage = engine.storage_mut();
            // It may have died before it could say so.
            self.log_failed |= storage.ring_load(RING_LATCH_WORD) != 0;
            records = tap.read(storage, None);
            while let Some(released) = tap.skip(storage) {
                let logged = tap::read_log(WorldFile("log"), released);
                records.extend(logged.map_err(|error| format!("reading the log: {error}"))?);
                let here = tap.read(storage, None);
                if here.is_empty() {
                    break;
                }
                records.extend(here);
            }
        }
        for record in &records {
            self.take_record(record)?;
        }
        drop(self.stop_shipping());
        Ok(())
    }

    pub(super) fn crash(&mut self, power: bool) {
        self.crashes += 1;
        if power {
            trace::count(Fault::PowerCut);
            trace::note(&[23], || "the power goes".to_owned());
            self.host.world.power_cut();
        } else {
            trace::count(Fault::Kill);
            trace::note(&[24], || "the primary was killed".to_owned());
        }
        self.host.world.forget_faults();
    }

    /// The life that just began goes on from where it may, with the disks as they were there.
    pub(super) fn judge_recovery(&mut self, floor: u64) -> Result<(), String> {
        self.judge_recovery_ahead(floor, 0)
    }

    /// As above; the disks may instead be ahead of the log, by records up to `ahead`.
    fn judge_recovery_ahead(&mut self, floor: u64, ahead: u64) -> Result<(), String> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let began = running.life.began_at;
        if began < floor {
            return Err(format!(
                "recovered up to record {began}, and record {floor} was promised (answered {}, flushed {})",
                self.clients.answered, self.clients.flushed
            ));
        }
        if began > self.head() {
            let unseen = self.head() + 1..began + 1;
            let records = tap::read_log(WorldFile("log"), unseen);
            let records = records.map_err(|error| format!("reading the recovered log: {error}"))?;
            for record in &records {
                self.take_record(record)?;
            }
        }
        if began < ahead {
            self.compare_disks_ahead(began, ahead)?;
            self.model().truncate(began);
            return Ok(());
        }
        self.model().truncate(began);
        self.compare_disks(began)
    }

    /// The log has lost records that were on their way to the disks: every sector is as of some
    /// record from the last one left to the last one lost, or torn between two of them.
    fn compare_disks_ahead(&self, lsn: u64, ahead: u64) -> Result<(), String> {
        let model = self.logs.last().expect("the first log's at least");
        for disk in 0..model.sizes().len() {
            let content = self.host.backing(disk, true);
            if let Some(block) = model.differs_from_all(disk, lsn..=ahead, &content) {
                return Err(format!(
                    "block {block} of disk {disk} is not as of any record of {lsn} to {ahead}"
                ));
            }
        }
        Ok(())
    }

    pub(super) fn compare_disks(&self, lsn: u64) -> Result<(), String> {
        let model = self.logs.last().expect("the first log's at least");
        for disk in 0..model.sizes().len() {
            for durable in [false, true] {
                let content = self.host.backing(disk, durable);
                if let Some(block) = model.differs(disk, lsn, &content) {
                    let start = block as usize * 4096;
                    let bytes = &content[start..content.len().min(start + 4096)];
                    let when = model.when(disk, block, bytes);
                    return Err(format!(
                        "disk {disk} is not as of record {lsn} (durable: {durable}): block {block} has {when}"
                    ));
                }
            }
        }
        Ok(())
    }
}

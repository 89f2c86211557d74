//! Stops in good order, and the time when nothing breaks any more.

use super::super::faults::Fault;
use super::super::site::Way;
use super::super::trace;
use super::{CATCH_UP, PATIENCE, Run};
use afterimage_format::ids::Lsn;
use afterimage_format::superblock::SinkState;
use afterimage_proxy::engine::recovery::RecoveryError;
use afterimage_proxy::engine::recovery::claims::ClaimRefusal;
use afterimage_proxy::engine::{EngineEvent, Ticket};
use afterimage_proxy::ship::status::SinkState as ShippingState;
use std::time::Duration;

const BLOCK: u64 = 4096;

impl Run {
    /// Stops the primary in good order and starts it again.
    pub(super) async fn restart(&mut self) -> Result<(), String> {
        if !self.stop().await? {
            return Ok(());
        }
        trace::count(Fault::CleanRestart);
        if self.rng.chance(5000) {
            self.host.world.remove_ring("ring");
        }
        let head = self.head();
        let kill = self.edit_backings()?;
        match self.start_life_killed(kill) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) if self.log_wrong => {
                trace::note(&[41], || format!("refused, as it should be: {error}"));
                self.refusals += 1;
                self.over = true;
                return self.check_points(4).await;
            }
            Err(error) => return Err(error),
        }
        self.recoveries += 1;
        self.judge_recovery(head)?;
        self.clients.process_gone(true);
        (self.clients.answered, self.clients.flushed) = (head, head);
        Ok(())
    }

    /// Somebody may write to the backings while the group is down. After how many steps the next
    /// start is killed, if it is.
    fn edit_backings(&mut self) -> Result<Option<u64>, String> {
        let kill = self.down_rng.chance(4000);
        let kill = kill.then(|| 1 + self.down_rng.below(120));
        // Without clean claims nobody would notice.
        if self.storage_broken || self.log_wrong || !self.down_rng.chance(4000) {
            return Ok(kill);
        }
        for _ in 0..=self.down_rng.below(2) {
            let disks = self.host.geometry.disks.len() as u64;
            let disk = self.down_rng.below(disks) as usize;
            let blocks = self.host.geometry.disks[disk].div_ceil(BLOCK);
            let block = self.down_rng.below(blocks);
            let mut bytes = vec![0; self.model().valid(disk, block)];
            bytes.fill_with(|| self.down_rng.next_u64() as u8);
            self.host.edit(disk, block * BLOCK, &bytes);
            bytes.resize(BLOCK as usize, 0);
            self.model().edit(disk, block, &bytes);
            trace::count(Fault::Edited);
            trace::note(&[42, disk as u64, block], || {
                format!("somebody edits block {block} of disk {disk}")
            });
        }
        self.edited = true;
        let refused = self.host.start(None);
        if !matches!(
            refused,
            Err(RecoveryError::Claim(ClaimRefusal::Edited { .. }))
        ) {
            return Err("a start takes an edited backing in without being told to".to_owned());
        }
        Ok(kill)
    }

    /// Drains and leaves. False: the process died on the way, or its log has failed.
    pub(super) async fn stop(&mut self) -> Result<bool, String> {
        // Clients have gone by then; what they asked is answered first.
        for _ in 0..PATIENCE {
            if self.clients.in_flight() == 0 || self.log_failed {
                break;
            }
            let left = std::mem::take(&mut self.clients.left);
            self.one_turn().await?;
            self.clients.left = left;
        }
        let ticket = Ticket(u64::from(u32::MAX));
        let Some(running) = &mut self.running else {
            return Ok(false);
        };
        let recoveries = self.recoveries;
        running.life.engine.drain(ticket);
        for _ in 0..PATIENCE {
            let Some(running) = &mut self.running else {
                return Ok(false);
            };
            let now = self.host.now();
            running.desk.serve(&mut running.life, now);
            running.life.turn(now);
            self.host.now_ns += 100_000;
            if self.host.world.is_dead() {
                self.revive().await?;
                return Ok(false);
            }
            let Some(running) = &mut self.running else {
                return Ok(false);
            };
            let mut events = Vec::new();
            running.life.engine.take_events(&mut events);
            let drained = events
                .iter()
                .any(|event| matches!(event, EngineEvent::Drained { ticket: of } if *of == ticket));
            self.events.append(&mut events);
            self.listen()?;
            if drained {
                let head = self.head();
                self.compare_disks(head)?;
                let Some(life) = self.stop_shipping() else {
                    return Ok(false);
                };
                return match self.host.leave(life) {
                    Ok(()) => Ok(true),
                    Err(_) if self.host.world.is_dead() => {
                        self.revive().await?;
                        Ok(false)
                    }
                    // The claims say attached then, which is true.
                    Err(_) if self.storage_broken => Ok(true),
                    // It lost the write of its superblock behind the drain.
                    Err(RecoveryError::NotClean { .. }) if self.log_wrong => Ok(true),
                    Err(error) => Err(format!("leaving the disks: {error}")),
                };
            }
            if recoveries != self.recoveries || self.log_failed {
                return Ok(false);
            }
            tokio::task::yield_now().await;
        }
        if self.log_wrong && self.storage_broken {
            // What a backing lost is in the log alone, and a write to that went wrong.
            trace::note(&[43], || "it cannot drain, and goes on failing".to_owned());
            self.refusals += 1;
            self.over = true;
            self.check_points(4).await?;
            return Ok(false);
        }
        Err("the primary does not drain".to_owned())
    }

    /// Nothing breaks any more: everybody is answered and the replica catches up.
    pub(super) async fn settle_down(&mut self) -> Result<(), String> {
        trace::note(&[40], || "nothing breaks from here on".to_owned());
        let world = self.host.world.clone();
        if self.log_failed || self.log_wrong {
            // The log is done; what a start makes of it is to be seen.
            world.kill();
        } else if !world.is_dead() {
            world.forget_faults();
            world.kill_after(u64::MAX / 2);
        }
        self.later.clear();
        // A life that begins from here on has no verifier of its own either: it minds no log.
        self.settled = true;
        if let Some(running) = &self.running
            && let Some(verifier) = &running.verifier
        {
            verifier.stop();
        }
        self.site.shelf.heal();
        self.site.net.set_refused(false);
        self.site.net.set_slow(false);
        self.site.net.cut_all();
        if self.plan.way == Way::Remote && !self.site.runs() {
            self.site.start();
        }
        let mut reached = None;
        for _ in 0..CATCH_UP {
            self.one_turn().await?;
            if self.over {
                return Ok(());
            }
            self.host.now_ns += 1_000_000;
            tokio::time::sleep(Duration::from_millis(1)).await;
            let Some(running) = &self.running else {
                continue;
            };
            let progress = running.life.engine.progress();
            let status = running.status.get();
            let based = |sink: &SinkState| sink.rebase_after == Lsn::ZERO;
            let caught_up = self.clients.done()
                && running.life.engine.sinks().iter().all(based)
                && progress.durable == progress.appended
                && status.acked == progress.durable
                && status.state == ShippingState::Streaming
                && status.pass.is_none();
            if caught_up {
                reached = Some(progress.durable.0);
                break;
            }
        }
        let Some(reached) = reached else {
            let running = self.running.as_ref();
            let shipping = running.map(|running| running.status.get());
            let engine = running.map(|running| running.life.engine.status());
            return Err(format!(
                "the replica does not catch up: {shipping:?} {engine:?}"
            ));
        };
        let newest = self.site.check_points(&mut self.rng, &self.logs, 4).await?;
        match newest {
            Some((_, lsn)) if lsn >= reached => self.compare_in_peace().await,
            newest => Err(format!(
                "everything up to record {reached} is acknowledged, the newest point is {newest:?}"
            )),
        }
    }

    /// Nothing happens any more, and the replica is in step: every block is found to be the same.
    async fn compare_in_peace(&mut self) -> Result<(), String> {
        let running = self.running.as_mut();
        let Some(verifier) = running.and_then(|running| running.verifier.as_mut()) else {
            return Ok(());
        };
        verifier.one_more();
        for _ in 0..CATCH_UP {
            self.one_turn().await?;
            self.host.now_ns += 1_000_000;
            tokio::time::sleep(Duration::from_millis(1)).await;
            let running = self.running.as_ref();
            let Some(verifier) = running.and_then(|running| running.verifier.as_ref()) else {
                return Err("the primary died although nothing breaks any more".to_owned());
            };
            if let Some(compared) = verifier.outcome() {
                return match compared.is_whole() {
                    true => Ok(()),
                    false => Err(format!("not compared to the end: {compared:?}")),
                };
            }
        }
        Err("a comparison does not end".to_owned())
    }
}

//! Incidents take place.

use super::super::faults::Fault;
use super::super::plan::{FOR_GOOD, Incident};
use super::super::site::Way;
use super::super::store::Trouble;
use super::super::trace;
use super::{Later, Run};
use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
use afterimage_format::ids::DiskIndex;
use afterimage_format::op::Op;
use afterimage_proxy::engine::{EventRecord, Ticket};
use afterimage_proxy::io::sim::{FaultKind, SHORT, WrongWrite};

impl Run {
    pub(super) async fn happen(&mut self, incident: Incident) -> Result<(), String> {
        trace::note(&[30], || format!("incident: {incident:?}"));
        let disk = self.rng.below(self.host.geometry.disks.len() as u64) as usize;
        let world = self.host.world.clone();
        let backing = self.host.backing_name(disk).to_owned();
        if matches!(
            incident,
            Incident::LogRead
                | Incident::BackingWrite
                | Incident::BackingShort
                | Incident::BackingFull
                | Incident::BackingSync
        ) {
            // One of them nobody may notice. A second one within the repair of the first fails
            // what waits for the repair.
            self.may_fail |= self.storage_broken;
            self.storage_broken = true;
        }
        match incident {
            Incident::Kill(steps) => world.kill_after(steps),
            Incident::PowerCut(steps) => {
                self.power_goes = true;
                world.kill_after(steps);
            }
            Incident::CleanRestart => self.restart().await?,
            Incident::Disconnect => {
                let connection = self.rng.below(self.clients.connections() as u64) as usize;
                if self.clients.disconnect(connection) > 0 {
                    trace::count(Fault::Disconnect);
                }
            }
            Incident::Clock { site, ahead } => {
                if site {
                    self.site.jump_clock(ahead);
                } else {
                    self.host.jump_clock(ahead);
                }
                trace::count(if ahead {
                    Fault::ClockForward
                } else {
                    Fault::ClockBack
                });
            }
            Incident::BackingRead => {
                // Reads of clients and edges of writes may fail by it.
                self.may_fail = true;
                world.fail_once(&backing, FaultKind::Read, 5);
            }
            Incident::LogRead => world.fail_once("log", FaultKind::Read, 5),
            Incident::BackingWrite => world.fail_once(&backing, FaultKind::Write, 5),
            Incident::BackingShort => world.fail_once(&backing, FaultKind::Write, SHORT),
            Incident::BackingFull => world.fail_once(&backing, FaultKind::Write, 28),
            Incident::BackingSync => world.fail_once(&backing, FaultKind::Sync, 5),
            Incident::LogWrite(errno) => {
                self.may_fail = true;
                world.fail_once("log", FaultKind::Write, errno);
                self.power_goes = self.rng.chance(3000);
                world.kill_after(50 + self.rng.below(400));
            }
            Incident::LogSync => {
                self.may_fail = true;
                world.fail_once("log", FaultKind::Sync, 5);
                self.power_goes = self.rng.chance(3000);
                world.kill_after(50 + self.rng.below(400));
            }
            Incident::LogWrong(by) => {
                self.log_wrong = true;
                // A repair of a backing reads the log, too.
                self.may_fail = true;
                let wrong = by.map_or(WrongWrite::Lost, WrongWrite::Misdirected);
                world.wrong_once("log", wrong);
                self.power_goes = self.rng.chance(5000);
                world.kill_after(50 + self.rng.below(600));
            }
            other => self.happen_outside(other).await,
        }
        Ok(())
    }

    /// Incidents of network and replica.
    pub(super) async fn happen_outside(&mut self, incident: Incident) {
        if let Incident::NetRefuse(FOR_GOOD)
        | Incident::ReplicaKill(FOR_GOOD)
        | Incident::RepositoryFull(FOR_GOOD) = incident
        {
            trace::count(Fault::Outage);
        }
        match incident {
            Incident::NetCut => {
                trace::count_many(Fault::NetCut, u64::from(self.site.net.cut_all()));
            }
            Incident::NetRefuse(turns) => {
                self.site.net.set_refused(true);
                self.site.net.cut_all();
                self.after(turns, Later::NetOpens);
            }
            Incident::NetHalfOpen => {
                trace::count_many(Fault::NetHalfOpen, u64::from(self.site.net.half_open()));
            }
            Incident::NetSlow(slow) => self.site.net.set_slow(slow),
            Incident::NetHold(turns) => {
                self.site.net.hold();
                self.after(turns, Later::HoldEnds);
            }
            Incident::NetDuplicate => {
                trace::count_many(Fault::NetDuplicate, u64::from(self.site.net.duplicate()));
            }
            Incident::NetDeaf(turns) => {
                self.site.net.deafen();
                self.after(turns, Later::DeafEnds);
            }
            Incident::ReplicaKill(turns) => {
                self.site.kill();
                self.after(turns, Later::ReplicaStarts);
            }
            Incident::ReplicaKillAt(calls) => self.site.shelf.trouble_after(calls, Trouble::Kill),
            Incident::StoreFail(calls) => self.site.shelf.trouble_after(calls, Trouble::Fail),
            Incident::RepositoryFull(turns) => {
                self.site.shelf.set_full(true);
                self.after(turns, Later::RepositoryHasRoom);
            }
            Incident::LatePuts => self.site.shelf.land_late().await,
            Incident::Checkpoint => self.checkpoint(),
            _ => {}
        }
    }

    pub(super) async fn happen_later(&mut self, later: Later) {
        trace::note(&[31], || format!("over: {later:?}"));
        match later {
            Later::NetOpens => self.site.net.set_refused(false),
            Later::HoldEnds => {
                if self.site.net.release() {
                    trace::count(Fault::NetReorder);
                }
            }
            Later::DeafEnds => {
                if self.site.net.is_deaf() && self.site.net.cut_all() {
                    trace::count(Fault::AckLost);
                }
            }
            Later::RepositoryHasRoom => self.site.shelf.set_full(false),
            Later::ReplicaStarts => {
                if !self.site.runs() && self.plan.way == Way::Remote {
                    if self.rng.chance(5000) {
                        self.site.shelf.land_late().await;
                    }
                    self.site.start();
                }
            }
        }
    }

    pub(super) fn checkpoint(&mut self) {
        self.checkpoints += 1;
        let body = CheckpointBody {
            kind: CheckpointKind::Crash,
            trigger: CheckpointTrigger::Request,
            label: format!("point{}", self.checkpoints),
        };
        let event = EventRecord {
            op: Op::Checkpoint,
            disk: DiskIndex(0),
            first_block: 0,
            block_count: 0,
            aux: 0,
            body: body.encode().expect("a plain label"),
        };
        let now = self.host.now();
        let ticket = Ticket(self.checkpoints);
        if let Some(running) = &mut self.running {
            running.life.engine.append_event(now, ticket, event);
        }
    }
}

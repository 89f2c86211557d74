//! What a seed stands for: the group, its clients, and the incidents to come.

use super::host::Geometry;
use super::site::Way;
use afterimage_format::segment::SinkId;
use afterimage_proxy::engine::{Ack, EngineConfig};
use afterimage_proxy::io::sim::SimRng;

const BLOCK: u64 = 4096;
const MS: u64 = 1_000_000;

/// URL of the simulated replica.
pub const URL: &str = "afterimage://replica.test:9471";

/// Turns that no run reaches before its clients are done.
pub const FOR_GOOD: u64 = 1 << 32;

/// Something that happens to the system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Incident {
    /// The primary's process is killed after so many steps.
    Kill(u64),
    /// The primary's power goes after so many steps.
    PowerCut(u64),
    /// The primary is stopped and started in good order.
    CleanRestart,
    /// A client goes away with its requests in flight.
    Disconnect,
    /// A wall clock jumps: the replica's or the primary's, ahead or back.
    Clock {
        /// The replica's.
        site: bool,
        /// Ahead.
        ahead: bool,
    },
    /// The next read of a backing fails.
    BackingRead,
    /// Shipping's next read of the log fails.
    LogRead,
    /// The next write to a backing fails.
    BackingWrite,
    /// The next write to a backing ends short.
    BackingShort,
    /// The next write to a backing finds no room.
    BackingFull,
    /// The next sync of a backing fails.
    BackingSync,
    /// The next write to the log fails: EIO, ENOSPC or short.
    LogWrite(i32),
    /// The next sync of the log fails.
    LogSync,
    /// The next write to the log is lost, or goes so many bytes too far.
    LogWrong(Option<u64>),
    /// Every connection is cut.
    NetCut,
    /// Connections are refused for so many turns.
    NetRefuse(u64),
    /// The newest connection goes half-open.
    NetHalfOpen,
    /// The network is slow from now on, or no longer.
    NetSlow(bool),
    /// What is said is held back for so many turns.
    NetHold(u64),
    /// An old connection's bytes arrive once more.
    NetDuplicate,
    /// Acknowledgements no longer arrive; cut after so many turns.
    NetDeaf(u64),
    /// The replica is killed now, and stays away for so many turns.
    ReplicaKill(u64),
    /// The replica is killed so many store calls from now.
    ReplicaKillAt(u64),
    /// A store call fails so many calls from now.
    StoreFail(u64),
    /// The repository is full for so many turns.
    RepositoryFull(u64),
    /// A checkpoint is asked for.
    Checkpoint,
    /// What killed replicas had asked for appears.
    LatePuts,
}

/// What is damaged when everything is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Nothing.
    None,
    /// Bits of the log, then a kill.
    Log,
    /// Bits of the ring, then a kill.
    Ring,
    /// Bits of a claim, after a clean stop.
    Claim,
    /// Bits of the repository.
    Repository,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The group.
    pub geometry: Geometry,
    /// The way to the replica.
    pub way: Way,
    /// Requests that the clients make.
    pub requests: usize,
    /// Clients live on when the primary's power goes.
    pub clients_elsewhere: bool,
    /// Incidents with the number of answers at which they happen.
    pub incidents: Vec<(u64, Incident)>,
    /// Chance out of 10,000 that a life's recovery is killed, and killed again.
    pub recovery_kills: u32,
    /// Points are opened every so many turns.
    pub check_every: u64,
    /// Store calls take so many milliseconds at most.
    pub store_delay_ms: u64,
    /// What is damaged at the end.
    pub damage: Damage,
    /// The replica stores a layer after so many extents.
    pub seal_extents: usize,
}

impl Plan {
    /// The run of a seed.
    #[must_use]
    pub fn draw(rng: &mut SimRng) -> Self {
        let requests = 12 + rng.below(40) as usize;
        let elsewhere = rng.chance(2000);
        let ack = if elsewhere || rng.chance(1000) {
            Ack::Durable
        } else {
            Ack::Ring
        };
        let disks = (0..1 + rng.below(3)).map(|_| {
            let tail = if rng.chance(3000) {
                512 * rng.below(8)
            } else {
                0
            };
            (1 + rng.below(16)) * BLOCK + tail
        });
        let disks = disks.collect();
        let (small_ring, small_log) = (rng.chance(5000), rng.chance(5000));
        let geometry = Geometry {
            disks,
            ring_blocks: 8 + rng.below(if small_ring { 8 } else { 56 }),
            log_blocks: 8 + rng.below(if small_log { 12 } else { 120 }),
            sinks: vec![SinkId::of_url(URL)],
            config: EngineConfig {
                ack,
                commit_interval_ns: 2 * MS,
                log_delay_ns: MS / 5,
                destage_age_ns: (1 + rng.below(30)) * MS,
                destage_depth: 1 + rng.below(8) as usize,
                backing_retry_ns: MS,
                backing_retry_max_ns: 4 * MS,
                backing_patience_ns: 10_000 * MS,
                waiting_bytes_max: 256 << 10,
                ..EngineConfig::default()
            },
        };
        let mut plan = Self {
            geometry,
            way: if rng.chance(6500) {
                Way::Remote
            } else {
                Way::Direct
            },
            requests,
            clients_elsewhere: elsewhere,
            incidents: Vec::new(),
            recovery_kills: if rng.chance(5000) { 5000 } else { 0 },
            check_every: 40 + rng.below(160),
            store_delay_ms: if rng.chance(3000) {
                1 + rng.below(6)
            } else {
                0
            },
            seal_extents: usize::MAX,
            damage: match rng.below(20) {
                0 => Damage::Log,
                1 => Damage::Ring,
                2 => Damage::Claim,
                3..=4 => Damage::Repository,
                _ => Damage::None,
            },
        };
        let count = 1 + rng.below(5);
        for _ in 0..count {
            let at = 1 + rng.below(requests as u64);
            let incident = plan.incident(rng);
            plan.incidents.push((at, incident));
        }
        for _ in 0..rng.below(3) {
            plan.incidents
                .push((rng.below(requests as u64), Incident::Checkpoint));
        }
        if rng.chance(600) {
            // One of those after which the log is done, as the last.
            let incident = match rng.below(6) {
                0 => Incident::LogWrite(5),
                1 => Incident::LogWrite(28),
                2 => Incident::LogWrite(afterimage_proxy::io::sim::SHORT),
                3 => Incident::LogSync,
                4 => Incident::LogWrong(None),
                _ => Incident::LogWrong(Some((1 + rng.below(16)) * BLOCK)),
            };
            plan.incidents.push((requests as u64 / 2, incident));
        }
        plan.incidents.sort_by_key(|(at, _)| *at);
        plan
    }

    /// In some runs the replica stores its index all the time.
    pub fn draw_layers(&mut self, rng: &mut SimRng) {
        if rng.chance(3000) {
            self.seal_extents = 1 + rng.below(12) as usize;
        }
    }

    /// In some runs the target stays away until everything is over, while the clients write on.
    pub fn draw_outage(&mut self, rng: &mut SimRng) {
        if !rng.chance(700) {
            return;
        }
        let outage = match (self.way, rng.below(3)) {
            (Way::Remote, 0) => Incident::NetRefuse(FOR_GOOD),
            (Way::Remote, 1) => Incident::ReplicaKill(FOR_GOOD),
            _ => Incident::RepositoryFull(FOR_GOOD),
        };
        self.requests += 60;
        let at = rng.below(self.requests as u64 / 2);
        let after = self.incidents.partition_point(|(when, _)| *when <= at);
        self.incidents.insert(after, (at, outage));
    }

    fn incident(&self, rng: &mut SimRng) -> Incident {
        let steps = 1 + rng.below(400);
        let turns = 5 + rng.below(200);
        match rng.below(if self.way == Way::Remote { 40 } else { 24 }) {
            0..=4 => Incident::Kill(steps),
            5..=9 => Incident::PowerCut(steps),
            10 => Incident::CleanRestart,
            11..=12 => Incident::Disconnect,
            13 => Incident::Clock {
                site: rng.chance(3000),
                ahead: rng.chance(5000),
            },
            14 => Incident::BackingRead,
            15 => Incident::BackingWrite,
            16 => Incident::BackingShort,
            17 => Incident::BackingFull,
            18 => Incident::BackingSync,
            19 => Incident::LogRead,
            20 => Incident::StoreFail(rng.below(20)),
            21 => Incident::RepositoryFull(turns),
            22 => Incident::ReplicaKillAt(rng.below(30)),
            23 => Incident::LatePuts,
            24..=25 => Incident::NetCut,
            26 => Incident::NetRefuse(turns),
            27 => Incident::NetHalfOpen,
            28 => Incident::NetSlow(rng.chance(8000)),
            29..=30 => Incident::NetHold(turns * 4),
            31..=32 => Incident::NetDuplicate,
            33..=34 => Incident::NetDeaf(turns / 2),
            35..=36 => Incident::ReplicaKill(turns),
            _ => Incident::ReplicaKillAt(rng.below(30)),
        }
    }
}

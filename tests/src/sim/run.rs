//! Drives one run from its plan to its end and judges it.

use super::clients::Clients;
use super::faults::Fault;
use super::host::{Host, Life};
use super::model::LogModel;
use super::net::Net;
use super::plan::{Plan, URL};
use super::port::{self, Desk};
use super::site::{Site, Way};
use super::store::Shelf;
use super::tap::Record;
use super::trace::{self, Told};
use super::verifier::Verifier;
use afterimage_format::op::Op;
use afterimage_proxy::engine::EngineEvent;
use afterimage_proxy::engine::request::{Reply, ReplyBody};
use afterimage_proxy::io::sim::{FaultKind, SHORT, SimRng};
use afterimage_proxy::ship::remote::RemoteTimes;
use afterimage_proxy::ship::status::StatusCell;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Turns that an open request may take while nothing is broken.
const PATIENCE: u64 = 4_000;
/// Turns in which the replica must have caught up once nothing is broken any more.
const CATCH_UP: u64 = 6_000;
/// Bytes that the shipping task may have under way: its window, one segment of each kind.
const UNACKED_MAX: u64 = 2 << 20;

/// What runs add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Runs.
    pub seeds: u64,
    /// Kills and power cuts of the primary, those within recoveries included.
    pub crashes: u64,
    /// Recoveries that succeeded.
    pub recoveries: u64,
    /// Starts that were refused, after damage.
    pub refusals: u64,
    /// Requests answered.
    pub answers: u64,
    /// Records checked.
    pub records: u64,
    /// Points opened and compared with the model, all disks together.
    pub points: u64,
    /// Comparisons of the disks with the replica, every block the same.
    pub verified: u64,
}

impl Totals {
    /// Adds another's.
    pub fn merge(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.crashes += other.crashes;
        self.recoveries += other.recoveries;
        self.refusals += other.refusals;
        self.answers += other.answers;
        self.records += other.records;
        self.points += other.points;
        self.verified += other.verified;
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// Counts.
    pub totals: Totals,
    /// Trace and faults.
    pub told: Told,
    /// What was wrong, if something was.
    pub failure: Option<String>,
}

/// Runs a seed. `in_words`: keep the trace's words.
#[must_use]
pub fn run(seed: u64, in_words: bool) -> Outcome {
    trace::begin(in_words);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let runtime = runtime.map_err(|error| error.to_string())?;
        let mut run = Run::new(seed);
        let judged = runtime.block_on(run.drive());
        run.count_world();
        let totals = run.totals();
        drop(run);
        judged
            .map(|()| totals.clone())
            .map_err(|error| (error, totals).0)
    }));
    let (totals, failure) = match ended {
        Ok(Ok(totals)) => (totals, None),
        Ok(Err(error)) => (Totals::default(), Some(error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            (
                Totals::default(),
                Some(format!("panic: {}", text.unwrap_or_default())),
            )
        }
    };
    let told = trace::end();
    Outcome {
        totals,
        told,
        failure,
    }
}

/// A life of the primary's process with what hangs on it.
struct Running {
    life: Life,
    desk: Desk,
    shipping: JoinHandle<()>,
    verifier: Option<Verifier>,
    status: StatusCell,
}

/// Something that ends at a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Later {
    NetOpens,
    HoldEnds,
    DeafEnds,
    RepositoryHasRoom,
    ReplicaStarts,
}

struct Run {
    plan: Plan,
    rng: SimRng,
    /// Draws what happens while the group is down, apart from all else.
    down_rng: SimRng,
    /// Draws the faults that recoveries meet, apart from all else.
    fault_rng: SimRng,
    host: Host,
    site: Site,
    clients: Clients,
    logs: Vec<LogModel>,
    running: Option<Running>,
    turn: u64,
    later: BTreeMap<u64, Vec<Later>>,
    /// The power goes when the process dies.
    power_goes: bool,
    log_failed: bool,
    /// A write to the log went wrong silently: recovery may refuse.
    log_wrong: bool,
    storage_broken: bool,
    /// Requests may fail once one of the faults that were asked for takes place.
    may_fail: bool,
    /// Faults that had taken place when this life began, silent ones included; and the others alone.
    faults_before: (u64, usize),
    /// A backing was edited, and no start has taken that in yet.
    edited: bool,
    /// The disks are compared with the replica, with such pauses.
    verify_pause: Option<Duration>,
    verified: u64,
    /// Nothing breaks any more, and nobody asks for comparisons but the judge.
    settled: bool,
    checkpoints: u64,
    crashes: u64,
    recoveries: u64,
    refusals: u64,
    records: u64,
    over: bool,
    data: Vec<u8>,
    replies: Vec<Reply>,
    events: Vec<EngineEvent>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = SimRng::new(seed ^ 0x5eed);
        let mut plan = Plan::draw(&mut rng);
        plan.draw_outage(&mut SimRng::new(seed ^ 0x0a7e));
        plan.draw_layers(&mut SimRng::new(seed ^ 0x1a7e));
        trace::note(&[1, seed], || format!("{plan:?}"));
        let host = Host::new(rng.next_u64(), plan.geometry.clone());
        let times = RemoteTimes {
            connect: Duration::from_millis(300),
            silence: Duration::from_millis(300),
            keep_alive: Duration::from_millis(100),
        };
        let net = Net::new(rng.next_u64(), URL, times);
        let shelf = Shelf::new(rng.next_u64());
        shelf.set_delay(plan.store_delay_ms);
        let sizes = plan.geometry.disks.clone();
        let durable = plan.geometry.config.ack == afterimage_proxy::engine::Ack::Durable;
        let clients = Clients::new(&mut rng, &sizes, plan.requests, durable);
        let mut site = Site::new(plan.way, shelf, net, plan.seal_extents);
        if plan.way == Way::Remote {
            site.start();
        }
        let log = host.superblock().log;
        // Apart from all else, too.
        let mut verify_rng = SimRng::new(seed ^ 0x7e51);
        let verify_pause =
            (verify_rng.below(3) == 0).then(|| Duration::from_millis(verify_rng.below(5)));
        Self {
            down_rng: SimRng::new(seed ^ 0xed17),
            fault_rng: SimRng::new(seed ^ 0xfa17),
            host,
            site,
            clients,
            logs: vec![LogModel::new(log, &sizes)],
            running: None,
            turn: 0,
            later: BTreeMap::new(),
            power_goes: false,
            log_failed: false,
            log_wrong: false,
            storage_broken: false,
            may_fail: false,
            faults_before: (0, 0),
            edited: false,
            verify_pause,
            verified: 0,
            settled: false,
            checkpoints: 0,
            crashes: 0,
            recoveries: 0,
            refusals: 0,
            records: 0,
            over: false,
            data: Vec::new(),
            replies: Vec::new(),
            events: Vec::new(),
            plan,
            rng,
        }
    }

    fn totals(&self) -> Totals {
        Totals {
            seeds: 1,
            crashes: self.crashes,
            recoveries: self.recoveries,
            refusals: self.refusals,
            answers: self.clients.answers,
            records: self.records,
            points: self.site.compared,
            verified: self.verified,
        }
    }

    /// Faults that the simulated disks counted themselves.
    fn count_world(&self) {
        let stats = self.host.world.stats();
        for (fault, times) in [
            (Fault::LateWrite, stats.late_writes),
            (Fault::LateWriteLost, stats.late_writes_lost),
            (Fault::CutStore, stats.cut_stores),
            (Fault::SectorKept, stats.sectors_kept),
            (Fault::SectorLost, stats.sectors_lost),
            (Fault::SectorTorn, stats.sectors_torn),
            (Fault::WriteShort, stats.short_writes),
            (Fault::WriteLost, stats.lost_writes),
            (Fault::WriteMisdirected, stats.misdirected_writes),
        ] {
            trace::count_many(fault, times);
        }
        for taken in self.host.world.faults_taken() {
            let log = taken.file == "log";
            match (taken.kind, taken.errno) {
                (FaultKind::Read, _) => trace::count(Fault::ReadFailed),
                (FaultKind::Sync, _) if log => trace::count(Fault::LogSyncFailed),
                (FaultKind::Sync, _) => trace::count(Fault::BackingSyncFailed),
                (FaultKind::Write, 28) if log => trace::count(Fault::LogFull),
                (FaultKind::Write, 28) => trace::count(Fault::BackingFull),
                (FaultKind::Write, _) if log => trace::count(Fault::LogWriteFailed),
                (FaultKind::Write, SHORT) => {}
                (FaultKind::Write, _) => trace::count(Fault::WriteFailed),
            }
        }
        trace::note(&[2, self.host.world.trace()], || {
            format!("the disks' own trace is {:016x}", self.host.world.trace())
        });
    }

    async fn drive(&mut self) -> Result<(), String> {
        self.start_life()?;
        let mut incidents = std::mem::take(&mut self.plan.incidents)
            .into_iter()
            .peekable();
        loop {
            let asked = self.clients.done() && incidents.peek().is_none();
            if self.over || asked {
                break;
            }
            self.one_turn().await?;
            if self.over {
                break;
            }
            let answers = self.clients.answers;
            if let Some((_, incident)) =
                incidents.next_if(|(at, _)| *at <= answers || self.clients.done())
            {
                self.happen(incident).await?;
            }
            if self.turn.is_multiple_of(self.plan.check_every) {
                self.check_points(2).await?;
            }
        }
        if !self.over {
            self.settle_down().await?;
        }
        if !self.over {
            self.end().await?;
        }
        Ok(())
    }

    fn model(&mut self) -> &mut LogModel {
        self.logs.last_mut().expect("the first log's at least")
    }

    fn head(&self) -> u64 {
        self.logs.last().map_or(0, |model| model.head)
    }

    async fn one_turn(&mut self) -> Result<(), String> {
        self.turn += 1;
        trace::turn(self.turn);
        self.host.now_ns += 100_000;
        for later in self.later.remove(&self.turn).unwrap_or_default() {
            self.happen_later(later).await;
        }
        self.site.accept();
        self.live()?;
        if self.host.world.is_dead() {
            self.revive().await?;
        }
        if self.site.shelf.was_killed() {
            match self.plan.way {
                Way::Direct => self.host.world.kill(),
                Way::Remote => {
                    self.site.kill();
                    let turns = 1 + self.rng.below(100);
                    self.after(turns, Later::ReplicaStarts);
                }
            }
        }
        if self.rng.chance(4000) {
            self.host.now_ns += 1_000_000;
            tokio::time::sleep(Duration::from_millis(1)).await;
        } else {
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    fn after(&mut self, turns: u64, later: Later) {
        self.later.entry(self.turn + turns).or_default().push(later);
    }

    /// One turn of the primary's process.
    fn live(&mut self) -> Result<(), String> {
        let now = self.host.now();
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.desk.serve(&mut running.life, now);
        let wanted = self.rng.below(3);
        for _ in 0..wanted {
            let Some(running) = &mut self.running else {
                break;
            };
            if running.life.engine.congested() {
                break;
            }
            let sizes = &self.host.geometry.disks;
            let Some(request) = self.clients.next(&mut self.rng, sizes) else {
                continue;
            };
            let head = self.logs.last().map_or(0, |model| model.head);
            trace::note(
                &[
                    10,
                    request.disk as u64,
                    request.range.start,
                    request.range.end,
                ],
                || format!("asked: {request:?}"),
            );
            let (id, disk, asked) = self.clients.sent(request, &mut self.data, head, self.turn);
            let id = afterimage_proxy::engine::request::RequestId(id);
            running.life.engine.submit(now, id, disk, asked);
            self.listen()?;
        }
        if let Some(running) = &mut self.running {
            running.life.turn(now);
        }
        self.listen()
    }

    /// Takes what the engine has to say: records first, then answers and events.
    fn listen(&mut self) -> Result<(), String> {
        if self.host.world.is_dead() {
            // A dead process answers nobody.
            return Ok(());
        }
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let progress = running.life.engine.progress();
        let Life { engine, tap, .. } = &mut running.life;
        let records = tap.read(engine.storage_mut(), Some(progress.appended));
        engine.take_replies(&mut self.replies);
        engine.take_events(&mut self.events);
        running.desk.publish(progress);
        for record in &records {
            self.take_record(record)?;
        }
        self.excuse();
        let model = self.logs.last().expect("the first log's at least");
        for reply in std::mem::take(&mut self.replies) {
            trace::note(&[11, reply.id.0, u64::from(reply.result.is_ok())], || {
                let what = reply.result.as_ref().map(|_| ());
                format!("answer to {}: {what:?}", reply.id.0)
            });
            self.clients.answer(&reply, model)?;
            if let (Ok(ReplyBody::Data { buffer, .. }), Some(running)) =
                (reply.result, &mut self.running)
            {
                running.life.engine.recycle(buffer);
            }
        }
        for event in std::mem::take(&mut self.events) {
            trace::note(&[12], || format!("{event:?}"));
            match &event {
                EngineEvent::LogFailed { .. } => {
                    self.log_failed = true;
                    self.may_fail = true;
                }
                EngineEvent::Durable { ticket, lsn } if ticket.0 < port::TICKETS => {
                    self.clients.flushed = self.clients.flushed.max(lsn.0);
                }
                _ => {}
            }
            if let Some(running) = &mut self.running {
                running.desk.tell(event);
            }
        }
        self.judge_comparison()?;
        self.check_bounds()
    }

    /// What took place in this life excuses errors and torn blocks; what was only asked for does not.
    fn excuse(&mut self) {
        let world = &self.host.world;
        self.clients.may_fail = self.may_fail && world.faults_taken_count() > self.faults_before.0;
        if self.storage_broken && !self.clients.may_tear {
            let taken = world.faults_taken();
            let mut here = taken.iter().skip(self.faults_before.1);
            self.clients.may_tear =
                here.any(|fault| fault.kind == FaultKind::Write && fault.file.starts_with("disk"));
        }
    }

    /// What comparing has come to.
    fn judge_comparison(&mut self) -> Result<(), String> {
        let running = self.running.as_mut();
        let Some(verifier) = running.and_then(|running| running.verifier.as_mut()) else {
            return Ok(());
        };
        let (compared, whole) = verifier.judge()?;
        if whole {
            self.verified += 1;
            trace::note(&[14, compared.run], || format!("the same: {compared:?}"));
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<(), String> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let status = running.life.engine.status();
        if status.destaged > status.progress.durable && !status.detached {
            return Err(format!("destaged before durable: {status:?}"));
        }
        let limit = self.host.geometry.config.waiting_bytes_max as u64 + (1 << 20);
        if status.log_bytes_used > status.log_bytes
            || status.ring_bytes_used > status.ring_bytes
            || status.waiting_bytes > limit
        {
            return Err(format!("a bound of memory is exceeded: {status:?}"));
        }
        let shipping = running.status.get();
        if shipping.unacked_bytes > UNACKED_MAX {
            return Err(format!("shipping holds {} bytes", shipping.unacked_bytes));
        }
        if let Some((since, what)) = self.clients.oldest()
            && self.turn > since + PATIENCE
        {
            return Err(format!(
                "asked in turn {since} and never answered: {what}; {status:?}; {shipping:?}"
            ));
        }
        Ok(())
    }

    fn take_record(&mut self, record: &Record) -> Result<(), String> {
        self.records += 1;
        trace::note(
            &[
                13,
                record.lsn,
                record.first_block,
                u64::from(record.block_count),
            ],
            || {
                format!(
                    "record {}: {:?} disk {} blocks {}+{}",
                    record.lsn, record.op, record.disk.0, record.first_block, record.block_count
                )
            },
        );
        let model = self.logs.last_mut().expect("the first log's at least");
        if record.lsn != model.head + 1 {
            return Err(format!(
                "record {} follows record {}",
                record.lsn, model.head
            ));
        }
        match record.op {
            Op::Write | Op::Zero | Op::Trim => self.clients.take_record(record, model)?,
            Op::Checkpoint => model.add_checkpoint(record.lsn),
            Op::Epoch | Op::PassBegin | Op::PassEnd => {}
            Op::Verify if self.verify_pause.is_some() => {}
            other => return Err(format!("record {} is {other:?}, nobody asked", record.lsn)),
        }
        model.head = record.lsn;
        Ok(())
    }

    async fn check_points(&mut self, open: usize) -> Result<(), String> {
        self.site
            .check_points(&mut self.rng, &self.logs, open)
            .await?;
        Ok(())
    }

    /// The end: a stop in good order, and whatever is damaged after it.
    async fn end(&mut self) -> Result<(), String> {
        self.damage_and_judge().await
    }
}

#[path = "damage.rs"]
mod damage;
#[path = "ending.rs"]
mod ending;
#[path = "incidents.rs"]
mod incidents;
#[path = "recovery.rs"]
mod recovery;

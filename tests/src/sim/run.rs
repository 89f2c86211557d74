//! Drives one run from its plan to its end and judges it.

use super::clients::Clients;
use super::faults::Fault;
use super::host::WorldFile;
use super::host::{Host, Life};
use super::model::LogModel;
use super::net::Net;
use super::plan::{Incident, Plan, URL};
use super::port::{self, Desk, Source};
use super::site::{Site, Way};
use super::store::{Shelf, Trouble};
use super::tap::{self, Record};
use super::trace::{self, Told};
use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
use afterimage_format::ids::DiskIndex;
use afterimage_format::op::Op;
use afterimage_proxy::engine::request::{Reply, ReplyBody};
use afterimage_proxy::engine::{EngineEvent, EventRecord, Ticket};
use afterimage_proxy::io::sim::{FaultKind, SimRng, WrongWrite};
use afterimage_proxy::ship::ShipConfig;
use afterimage_proxy::ship::remote::RemoteTimes;
use afterimage_proxy::ship::status::{SinkState, StatusCell};
use afterimage_proxy::ship::task::ShipTask;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
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
        let plan = Plan::draw(&mut rng);
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
        let mut site = Site::new(plan.way, shelf, net);
        if plan.way == Way::Remote {
            site.start();
        }
        let log = host.superblock().log;
        Self {
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
            (Fault::ReadFailed, stats.reads_failed),
            (Fault::WriteShort, stats.short_writes),
            (Fault::WriteLost, stats.lost_writes),
            (Fault::WriteMisdirected, stats.misdirected_writes),
        ] {
            trace::count_many(fault, times);
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
                    self.clients.may_fail = true;
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
        self.check_bounds()
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
            Op::Checkpoint | Op::Epoch | Op::PassBegin | Op::PassEnd => {}
            other => return Err(format!("record {} is {other:?}, nobody asked", record.lsn)),
        }
        model.head = record.lsn;
        Ok(())
    }

    fn start_life(&mut self) -> Result<bool, String> {
        self.start_life_killed(None)
    }

    /// Starts the process. False: it died in recovery.
    fn start_life_killed(&mut self, kill_after: Option<u64>) -> Result<bool, String> {
        match self.host.start(kill_after) {
            Ok(Some(life)) => {
                let (desk, port) = port::connect(&life, &self.host.geometry.disks);
                let status = StatusCell::new(URL);
                let task = ShipTask {
                    port: Arc::new(port),
                    sink: self.site.sink(URL),
                    source: Box::new(Source::default()),
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
                self.running = Some(Running {
                    life,
                    desk,
                    shipping: tokio::spawn(task.run()),
                    status,
                });
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) if self.host.world.is_dead() => Ok(false),
            Err(error) => Err(format!("recovery refuses: {error}")),
        }
    }

    fn stop_shipping(&mut self) -> Option<Life> {
        let running = self.running.take()?;
        running.shipping.abort();
        Some(running.life)
    }

    /// The process has died: what is left is recovered, maybe after more deaths, and compared.
    async fn revive(&mut self) -> Result<(), String> {
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
        loop {
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
        self.judge_recovery(floor)?;
        let survive = !power || self.plan.clients_elsewhere;
        self.clients.process_gone(survive);
        let began = self.head();
        (self.clients.answered, self.clients.flushed) = (began, began);
        self.clients.may_fail = false;
        self.storage_broken = false;
        if self.log_wrong {
            self.over = true;
        }
        Ok(())
    }

    /// The process is dead: takes what it still put into the ring, and lets go of it.
    fn end_life(&mut self) -> Result<(), String> {
        let mut records = Vec::new();
        if let Some(running) = &mut self.running {
            let Life { engine, tap, .. } = &mut running.life;
            records = tap.read(engine.storage_mut(), None);
        }
        for record in &records {
            self.take_record(record)?;
        }
        drop(self.stop_shipping());
        Ok(())
    }

    fn crash(&mut self, power: bool) {
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
    fn judge_recovery(&mut self, floor: u64) -> Result<(), String> {
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
            let from = self.head() + 1;
            let records = tap::read_log(WorldFile("log"), from, began);
            let records = records.map_err(|error| format!("reading the recovered log: {error}"))?;
            for record in &records {
                self.take_record(record)?;
            }
        }
        self.model().truncate(began);
        self.compare_disks(began)
    }

    fn compare_disks(&self, lsn: u64) -> Result<(), String> {
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

    async fn check_points(&mut self, open: usize) -> Result<(), String> {
        self.site
            .check_points(&mut self.rng, &self.logs, open)
            .await?;
        Ok(())
    }

    async fn happen(&mut self, incident: Incident) -> Result<(), String> {
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
            self.clients.may_fail |= self.storage_broken;
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
                self.clients.may_fail = true;
                world.fail_once(&backing, FaultKind::Read, 5);
            }
            Incident::LogRead => world.fail_once("log", FaultKind::Read, 5),
            Incident::BackingWrite => {
                trace::count(Fault::WriteFailed);
                world.fail_once(&backing, FaultKind::Write, 5);
            }
            Incident::BackingShort => {
                world.fail_once(&backing, FaultKind::Write, afterimage_proxy::io::sim::SHORT);
            }
            Incident::BackingFull => {
                trace::count(Fault::BackingFull);
                world.fail_once(&backing, FaultKind::Write, 28);
            }
            Incident::BackingSync => {
                trace::count(Fault::BackingSyncFailed);
                world.fail_once(&backing, FaultKind::Sync, 5);
            }
            Incident::LogWrite(errno) => {
                trace::count(if errno == 28 {
                    Fault::LogFull
                } else {
                    Fault::LogWriteFailed
                });
                self.clients.may_fail = true;
                world.fail_once("log", FaultKind::Write, errno);
                self.power_goes = self.rng.chance(3000);
                world.kill_after(50 + self.rng.below(400));
            }
            Incident::LogSync => {
                trace::count(Fault::LogSyncFailed);
                self.clients.may_fail = true;
                world.fail_once("log", FaultKind::Sync, 5);
                self.power_goes = self.rng.chance(3000);
                world.kill_after(50 + self.rng.below(400));
            }
            Incident::LogWrong(by) => {
                self.log_wrong = true;
                // A repair of a backing reads the log, too.
                self.clients.may_fail = true;
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
    async fn happen_outside(&mut self, incident: Incident) {
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

    async fn happen_later(&mut self, later: Later) {
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

    fn checkpoint(&mut self) {
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

    /// Stops the primary in good order and starts it again.
    async fn restart(&mut self) -> Result<(), String> {
        if !self.stop().await? {
            return Ok(());
        }
        trace::count(Fault::CleanRestart);
        if self.rng.chance(5000) {
            self.host.world.remove_ring("ring");
        }
        let head = self.head();
        if !self.start_life()? {
            return Ok(());
        }
        self.recoveries += 1;
        self.judge_recovery(head)?;
        self.clients.process_gone(true);
        (self.clients.answered, self.clients.flushed) = (head, head);
        Ok(())
    }

    /// Drains and leaves. False: the process died on the way, or its log has failed.
    async fn stop(&mut self) -> Result<bool, String> {
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
                    Err(error) => Err(format!("leaving the disks: {error}")),
                };
            }
            if recoveries != self.recoveries || self.log_failed {
                return Ok(false);
            }
            tokio::task::yield_now().await;
        }
        Err("the primary does not drain".to_owned())
    }

    /// Nothing breaks any more: everybody is answered and the replica catches up.
    async fn settle_down(&mut self) -> Result<(), String> {
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
            let caught_up = self.clients.done()
                && progress.durable == progress.appended
                && status.acked == progress.durable
                && status.state == SinkState::Streaming
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
            Some((_, lsn)) if lsn >= reached => Ok(()),
            newest => Err(format!(
                "everything up to record {reached} is acknowledged, the newest point is {newest:?}"
            )),
        }
    }

    /// The end: a stop in good order, and whatever is damaged after it.
    async fn end(&mut self) -> Result<(), String> {
        self.damage_and_judge().await
    }
}

#[path = "damage.rs"]
mod damage;

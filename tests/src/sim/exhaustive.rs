//! The small scope, all of it: every sequence of a few operations on three blocks, a ring and a log
//! of eight blocks, which wrap, every crash point, every set of unsynced sectors.
//!
//! Operations: write of block 0, write of blocks 1 and 2, write of a part of block 0, zeroes over
//! blocks 0 and 1, FLUSH, FUA write of block 2. All sequences of up to three, and those of four of
//! the first, second, third and fifth; each after no, one or three writes that move ring and log on.
//! A crash point is every ring store, submission and hand-out of a completion until everything is
//! in the backing and the log is trimmed. At each: a kill (what was in flight lands whole, in part,
//! never), and power cuts. For sequences of up to two also a second kill at every step of the
//! recovery.
//!
//! Where the sets of unsynced sectors are more than [`SETS_MAX`], sectors go by blocks of 4 KiB
//! together (a frame's descriptor, a payload block, a superblock copy); where those are too many as
//! well, none, all, all but one and one alone. The report says how often.

use super::content;
use super::host::{Geometry, Host, Life};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use afterimage_proxy::engine::EngineConfig;
use afterimage_proxy::engine::request::{Reply, Request, RequestId};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const BLOCK: usize = BLOCK_SIZE;
const DISK: usize = 3 * BLOCK;
/// Most sets of sectors that are tried one by one at one crash point.
pub const SETS_MAX: usize = 128;
const TURNS_MAX: usize = 4_000;

/// An operation of the small scope.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    First,
    Others,
    Part,
    Zero,
    Flush,
    Fua,
}

const ALL: [Step; 6] = [
    Step::First,
    Step::Others,
    Step::Part,
    Step::Zero,
    Step::Flush,
    Step::Fua,
];
const SOME: [Step; 4] = [Step::First, Step::Others, Step::Part, Step::Flush];

/// A sequence, and how many writes come before it.
#[derive(Clone, Debug)]
struct Case {
    steps: Vec<Step>,
    before: u64,
}

/// What was tried.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Sequences with what comes before them.
    pub sequences: u64,
    /// Crash points.
    pub crash_points: u64,
    /// Recoveries compared with the model.
    pub recoveries: u64,
    /// Crash points whose sets of unsynced sectors were all tried.
    pub by_sector: u64,
    /// Those where the sectors of a block went together.
    pub by_block: u64,
    /// Those where not even these were all tried.
    pub sampled: u64,
    /// Kills at steps of a recovery.
    pub recovery_kills: u64,
}

impl Scope {
    fn merge(&mut self, other: &Self) {
        self.sequences += other.sequences;
        self.crash_points += other.crash_points;
        self.recoveries += other.recoveries;
        self.by_sector += other.by_sector;
        self.by_block += other.by_block;
        self.sampled += other.sampled;
        self.recovery_kills += other.recovery_kills;
    }
}

fn cases(longest: usize) -> Vec<Case> {
    let mut sequences: Vec<Vec<Step>> = vec![Vec::new()];
    let mut all = Vec::new();
    for len in 1..=longest {
        let alphabet: &[Step] = if len <= 3 { &ALL } else { &SOME };
        let longer = |sequence: &Vec<Step>| {
            let sequence = sequence.clone();
            alphabet.iter().map(move |step| {
                let mut longer = sequence.clone();
                longer.push(*step);
                longer
            })
        };
        if len == 4 {
            sequences.retain(|sequence| sequence.iter().all(|step| SOME.contains(step)));
        }
        sequences = sequences.iter().flat_map(longer).collect();
        all.extend(sequences.iter().cloned());
    }
    let changes = |steps: &Vec<Step>| steps.iter().any(|step| *step != Step::Flush);
    let befores = |steps: Vec<Step>| {
        let befores: &[u64] = if steps.len() < 4 { &[0, 1, 3] } else { &[1] };
        befores.iter().map(move |before| Case {
            steps: steps.clone(),
            before: *before,
        })
    };
    all.into_iter().filter(changes).flat_map(befores).collect()
}

/// Tries every case with up to `longest` operations.
///
/// # Errors
/// In words: the first case in which something promised is gone, or something is there that never
/// was.
pub fn run(longest: usize, jobs: usize) -> Result<Scope, String> {
    let cases = cases(longest);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let sums: Mutex<(Scope, Option<String>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                let mut tried = Scope::default();
                while !stop.load(Ordering::Relaxed)
                    && let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        try_case(case, &mut tried)
                    }));
                    let error = match judged {
                        Ok(Ok(())) => continue,
                        Ok(Err(error)) => error,
                        Err(panic) => {
                            let text = panic.downcast_ref::<String>().cloned();
                            format!("panic: {}", text.unwrap_or_default())
                        }
                    };
                    stop.store(true, Ordering::Relaxed);
                    if let Ok(mut sums) = sums.lock() {
                        sums.1 = Some(format!("{case:?}: {error}"));
                    }
                }
                if let Ok(mut sums) = sums.lock() {
                    sums.0.merge(&tried);
                }
            });
        }
    });
    match sums.into_inner().unwrap_or_default() {
        (scope, None) => Ok(scope),
        (_, Some(error)) => Err(error),
    }
}

/// A case carried out up to some step.
struct Execution {
    host: Host,
    life: Option<Life>,
    /// The disk before the first operation and after each record, with the operations that were
    /// complete then.
    states: Vec<(usize, Vec<u8>)>,
    /// Operations answered, and those promised to survive a power cut.
    answered: usize,
    flushed: usize,
    /// Steps of the storage, from the first operation on.
    steps: u64,
}

impl Execution {
    fn new(case: &Case, kill_after: Option<u64>) -> Result<Self, String> {
        let geometry = Geometry {
            ring_blocks: 8,
            log_blocks: 8,
            disks: vec![DISK as u64],
            sinks: Vec::new(),
            config: EngineConfig {
                commit_interval_ns: 1_000_000,
                log_delay_ns: 100_000,
                destage_age_ns: 2_000_000,
                ..EngineConfig::default()
            },
        };
        let host = Host::new(7, geometry);
        let life = host.start(None).map_err(|error| error.to_string())?;
        let mut execution = Self {
            host,
            life,
            states: vec![(0, vec![0; DISK])],
            answered: 0,
            flushed: 0,
            steps: 0,
        };
        for value in 0..case.before {
            execution.carry_out(Step::First, 1000 + value)?;
            execution.settle();
        }
        execution.states.drain(..case.before as usize);
        execution.states[0].0 = 0;
        (execution.answered, execution.flushed) = (0, 0);
        let began = execution.host.world.steps();
        if let Some(steps) = kill_after {
            execution.host.world.kill_after(steps);
        }
        for (value, step) in (1..).zip(&case.steps) {
            if !execution.carry_out(*step, value)? {
                break;
            }
        }
        execution.settle();
        execution.steps = execution.host.world.steps() - began;
        Ok(execution)
    }

    fn turn(&mut self) -> Vec<Reply> {
        let mut replies = Vec::new();
        self.host.now_ns += 100_000;
        let now = self.host.now();
        if let Some(life) = &mut self.life {
            life.turn(now);
            if !self.host.world.is_dead() {
                life.engine.take_replies(&mut replies);
            }
        }
        replies
    }

    /// False: the process died before the answer.
    fn carry_out(&mut self, step: Step, value: u64) -> Result<bool, String> {
        let (done, mut state) = self.states.last().cloned().unwrap_or_default();
        let range = match step {
            Step::First => 0..BLOCK,
            Step::Others => BLOCK..DISK,
            Step::Part => 1024..2560,
            Step::Zero => 0..2 * BLOCK,
            Step::Fua => 2 * BLOCK..DISK,
            Step::Flush => 0..0,
        };
        // A frame of this ring takes one block: a write of two is two records.
        for at in range.clone().step_by(BLOCK) {
            let part = at..range.end.min(at + BLOCK);
            match step {
                Step::Zero => state[range.clone()].fill(0),
                _ => content::fill(value, at as u64, &mut state[part.clone()]),
            }
            if part.end < range.end && step != Step::Zero {
                self.states.push((done, state.clone()));
            }
        }
        self.states.push((done + 1, state.clone()));
        let offset = range.start as u64;
        let request = match step {
            Step::Flush => Request::Flush,
            Step::Zero => Request::WriteZeroes {
                offset,
                len: range.len() as u64,
                fua: false,
                no_hole: false,
            },
            _ => Request::Write {
                offset,
                data: &state[range],
                fua: step == Step::Fua,
            },
        };
        let now = self.host.now();
        let life = self.life.as_mut().ok_or("no process runs")?;
        life.engine
            .submit(now, RequestId(value), DiskIndex(0), request);
        for _ in 0..TURNS_MAX {
            if self.host.world.is_dead() {
                return Ok(false);
            }
            if let Some(reply) = self.turn().pop() {
                if let Err(error) = reply.result {
                    return Err(format!("{step:?} fails with {error:?}"));
                }
                let done = done + 1;
                self.answered = done;
                if matches!(step, Step::Flush | Step::Fua) {
                    self.flushed = done;
                }
                return Ok(true);
            }
        }
        if self.host.world.is_dead() {
            return Ok(false);
        }
        Err(format!("{step:?} is never answered"))
    }

    /// Until the engine has nothing more to do, or the process is dead.
    fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            if self.host.world.is_dead() {
                return;
            }
            self.turn();
            let Some(life) = &self.life else { return };
            let status = life.engine.status();
            let idle = status.synced == status.progress.appended
                && life.engine.next_deadline().is_none()
                && status.log_bytes_used == 0;
            if idle {
                return;
            }
        }
    }
}

fn try_case(case: &Case, tried: &mut Scope) -> Result<(), String> {
    tried.sequences += 1;
    let steps = Execution::new(case, None)?.steps;
    for at in 1..=steps {
        let mut execution = Execution::new(case, Some(at))?;
        drop(execution.life.take());
        tried.crash_points += 1;
        let fail =
            |what: &str, error: String| format!("crash at step {at} of {steps}, {what}: {error}");
        for seed in 0..3 {
            let host = execution.host.fork(seed);
            tried.recoveries += 1;
            check(&host, &execution, execution.answered).map_err(|error| fail("kill", error))?;
        }
        if case.steps.len() <= 2 && case.before == 1 {
            kill_recoveries(&execution, tried).map_err(|error| fail("kill", error))?;
        }
        let landed = execution.host.world.late_writes() > 0;
        for late in [false, true].into_iter().take(1 + usize::from(landed)) {
            let host = execution.host.fork(9);
            if late {
                host.world.land_late_writes();
            }
            for set in sets(&host, tried) {
                let host = host.fork(11);
                let mut choices = set.iter().copied();
                host.world
                    .power_cut_choosing(&mut || choices.next().unwrap_or(0));
                tried.recoveries += 1;
                check(&host, &execution, execution.flushed)
                    .map_err(|error| fail(&format!("power cut keeping {set:?}"), error))?;
            }
        }
    }
    Ok(())
}

/// A second kill at every step of the recovery, then a third start.
fn kill_recoveries(execution: &Execution, tried: &mut Scope) -> Result<(), String> {
    for at in 1.. {
        let host = execution.host.fork(5);
        match host.start(Some(at)) {
            Ok(Some(_)) => return Ok(()),
            Err(error) if !host.world.is_dead() => return Err(error.to_string()),
            _ => {}
        }
        tried.recovery_kills += 1;
        tried.recoveries += 1;
        check(&host, execution, execution.answered)
            .map_err(|error| format!("and in recovery at step {at}: {error}"))?;
    }
    Ok(())
}

/// Recovers and compares: the disk is as after some operation, the `least`-th or a later one.
fn check(host: &Host, execution: &Execution, least: usize) -> Result<(), String> {
    let life = host
        .start(None)
        .map_err(|error| format!("recovery refuses: {error}"))?;
    if life.is_none() {
        return Err("the process died though nothing killed it".to_owned());
    }
    for durable in [false, true] {
        let content = host.backing(0, durable);
        let mut states = execution.states.iter().rev();
        match states
            .find(|(_, state)| *state == content)
            .map(|(after, _)| *after)
        {
            Some(after) if after >= least => {}
            // Equal states of several operations: the last of them counts, found above.
            Some(after) => {
                return Err(format!(
                    "the disk is as after operation {after}, {least} were promised"
                ));
            }
            None => return Err(format!("the disk is as it never was (durable: {durable})")),
        }
    }
    Ok(())
}

/// Sets of versions for the unsynced sectors.
fn sets(host: &Host, tried: &mut Scope) -> Vec<Vec<usize>> {
    let unsynced = host.world.unsynced();
    let versions: Vec<usize> = unsynced.iter().map(|(_, _, versions)| *versions).collect();
    let one_by_one: Vec<(usize, usize)> = versions.iter().copied().enumerate().collect();
    if let Some(sets) = combine(&one_by_one) {
        tried.by_sector += 1;
        return sets;
    }
    // Sectors of one block go together.
    let mut groups: Vec<(usize, usize)> = Vec::new();
    let mut group_of = Vec::new();
    let mut last = None;
    for (name, sector, versions) in &unsynced {
        let block = (name.clone(), sector / 8);
        if last.as_ref() != Some(&block) {
            groups.push((groups.len(), 0));
            last = Some(block);
        }
        if let Some((at, most)) = groups.last_mut() {
            *most = (*most).max(*versions);
            group_of.push(*at);
        }
    }
    let spread = |chosen: &[usize]| -> Vec<usize> {
        let sectors = group_of.iter().zip(&versions);
        sectors
            .map(|(group, most)| chosen[*group].min(*most))
            .collect()
    };
    if let Some(sets) = combine(&groups) {
        tried.by_block += 1;
        return sets.iter().map(|chosen| spread(chosen)).collect();
    }
    tried.sampled += 1;
    let most: Vec<usize> = groups.iter().map(|(_, most)| *most).collect();
    let none = vec![0; most.len()];
    let mut sets = vec![none.clone(), most.clone()];
    for at in 0..most.len() {
        let (mut without, mut alone) = (most.clone(), none.clone());
        (without[at], alone[at]) = (0, most[at]);
        sets.extend([without, alone]);
    }
    sets.iter().map(|chosen| spread(chosen)).collect()
}

/// All combinations of versions 0..=most of each, unless they are too many.
fn combine(each: &[(usize, usize)]) -> Option<Vec<Vec<usize>>> {
    let mut count: usize = 1;
    for (_, most) in each {
        count = count
            .checked_mul(most + 1)
            .filter(|count| *count <= SETS_MAX)?;
    }
    let mut sets = vec![Vec::new()];
    for (_, most) in each {
        sets = sets
            .into_iter()
            .flat_map(|set: Vec<usize>| {
                (0..=*most).map(move |version| {
                    let mut set = set.clone();
                    set.push(version);
                    set
                })
            })
            .collect();
    }
    Some(sets)
}

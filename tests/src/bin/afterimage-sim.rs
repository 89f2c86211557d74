//! Runs the simulation: some seeds, or seeds for some minutes; replays one in words.

use afterimage_tests::sim::exhaustive;
use afterimage_tests::sim::faults::{Fault, FaultCounts};
use afterimage_tests::sim::run::{Outcome, Totals, run};
use clap::Parser;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Simulates the whole system from seeds. A seed that fails is replayed with `--seed N --trace`.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Run seeds for so many minutes instead.
    #[arg(long)]
    minutes: Option<f64>,
    /// Print everything that happens.
    #[arg(long)]
    trace: bool,
    /// Print what the product logs as well.
    #[arg(long)]
    logs: bool,
    /// Threads, each with runs of its own.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Try every crash point of every short sequence instead, up to so many operations.
    #[arg(long, value_name = "OPERATIONS", num_args = 0..=1, default_missing_value = "4")]
    exhaustive: Option<usize>,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// A fault of which no run had one is no failure. For few seeds.
    #[arg(long)]
    allow_missing: bool,
}

type Sums = (Totals, FaultCounts, Vec<(u64, String)>);

/// Events of a failed run that are printed without `--trace`.
const LAST_EVENTS: usize = 60;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.logs {
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    }
    if let Some(longest) = args.exhaustive {
        return all(longest, args.jobs);
    }
    if let Some(seed) = args.seed {
        return one(seed, args.trace);
    }
    many(&args)
}

fn all(longest: usize, jobs: usize) -> ExitCode {
    let began = Instant::now();
    std::panic::set_hook(Box::new(|_| {}));
    match exhaustive::run(longest, jobs) {
        Ok(scope) => {
            println!(
                "{} sequences, {} crash points ({} with every set of sectors, {} with every set of blocks, {} sampled), {} kills in recovery, {} recoveries compared, in {:.1} s",
                scope.sequences,
                scope.crash_points,
                scope.by_sector,
                scope.by_block,
                scope.sampled,
                scope.recovery_kills,
                scope.recoveries,
                began.elapsed().as_secs_f64(),
            );
            println!("{} passed, 0 failed", scope.sequences);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("FAILED: {error}");
            println!("0 passed, 1 failed");
            ExitCode::FAILURE
        }
    }
}

fn one(seed: u64, trace: bool) -> ExitCode {
    let outcome = run(seed, true);
    let lines = &outcome.told.lines;
    let skip = match (trace, outcome.failure.is_some()) {
        (true, _) => 0,
        (false, true) => lines.len().saturating_sub(LAST_EVENTS),
        (false, false) => lines.len(),
    };
    for line in &lines[skip..] {
        println!("{line}");
    }
    println!("trace {:016x}, {:?}", outcome.told.hash, outcome.totals);
    match outcome.failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            println!("seed {seed} FAILED: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn many(args: &Args) -> ExitCode {
    let began = Instant::now();
    let until = args
        .minutes
        .map(|minutes| Duration::from_secs_f64(minutes * 60.0));
    let next = AtomicU64::new(args.first);
    let stop = AtomicBool::new(false);
    let sums: Mutex<Sums> = Mutex::default();
    // A panic is an outcome of a run; its message is in the outcome.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                let mut totals = Totals::default();
                let mut faults = FaultCounts::default();
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let over = match until {
                        Some(until) => began.elapsed() >= until,
                        None => seed >= args.first + args.seeds,
                    };
                    if over {
                        break;
                    }
                    let Outcome {
                        totals: of,
                        told,
                        failure,
                    } = run(seed, false);
                    totals.merge(&of);
                    faults.merge(&told.faults);
                    if let Some(failure) = failure {
                        stop.store(!args.keep_going, Ordering::Relaxed);
                        if let Ok(mut sums) = sums.lock() {
                            sums.2.push((seed, failure));
                        }
                    }
                }
                if let Ok(mut sums) = sums.lock() {
                    sums.0.merge(&totals);
                    sums.1.merge(&faults);
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let (totals, faults, mut failures) = sums.into_inner().unwrap_or_default();
    report(&totals, &faults, began.elapsed());
    failures.sort();
    for (seed, failure) in &failures {
        println!("seed {seed} FAILED: {failure}");
    }
    if let Some((seed, _)) = failures.first() {
        let replay = run(*seed, true);
        let lines = replay.told.lines;
        println!("its last events:");
        for line in &lines[lines.len().saturating_sub(LAST_EVENTS)..] {
            println!("{line}");
        }
        println!("replay it: afterimage-sim --seed {seed} --trace");
        println!("0 passed, {} failed", failures.len());
        return ExitCode::FAILURE;
    }
    let missing = faults.missing();
    if !missing.is_empty() && !args.allow_missing {
        println!("these faults never took place: {missing:?}");
        println!("0 passed, 1 failed");
        return ExitCode::FAILURE;
    }
    if totals.verified == 0 && !args.allow_missing {
        println!("no comparison of the disks with the replica ever ended");
        println!("0 passed, 1 failed");
        return ExitCode::FAILURE;
    }
    println!("{} passed, 0 failed", totals.seeds);
    ExitCode::SUCCESS
}

fn report(totals: &Totals, faults: &FaultCounts, took: Duration) {
    println!(
        "{} seeds in {:.1} s ({:.0}/s): {} crashes, {} recoveries, {} refused starts, {} requests answered, {} records, {} points compared, {} times all disks",
        totals.seeds,
        took.as_secs_f64(),
        totals.seeds as f64 / took.as_secs_f64().max(0.001),
        totals.crashes,
        totals.recoveries,
        totals.refusals,
        totals.answers,
        totals.records,
        totals.points,
        totals.verified,
    );
    for fault in Fault::ALL {
        println!("{:>10}  {}", faults.of(*fault), fault.text());
    }
}

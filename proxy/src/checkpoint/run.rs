//! Drives a sequence: real agents, real time, the group's log and the intent behind [`Host`].

use super::agent::Request;
use super::provider::{Order, Provider};
use super::sequence::{self, Action, Input, Report, Sequence};
use super::watchdog::SIGN_EVERY;
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::Lsn;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

/// What a step returns; errors are for people, nothing is decided by them.
pub type Step<T> = Pin<Box<dyn Future<Output = Result<T, String>> + Send>>;

/// What a sequence needs besides its agents.
pub trait Host: Send + Sync {
    /// Stores the intent durably.
    fn write_intent(&self) -> Step<()>;
    /// Returns when the watchdog has read the intent.
    fn arm_watchdog(&self) -> Step<()>;
    /// A guest is asked to freeze now.
    fn freezing(&self) {}
    /// The run goes on; said again and again once a freeze was asked.
    fn alive(&self) {}
    /// Appends the checkpoint; returns when it has its LSN and survives the process.
    fn mark(&self) -> Step<Lsn>;
    /// Appends what became of it, durably.
    fn store(&self, body: CheckpointConfirmBody) -> Step<()>;
    /// Removes the intent.
    fn remove_intent(&self);
    /// Something happened; for people. Told behind whatever it made necessary.
    fn stepped(&self, _: &sequence::Step) {}
    /// The result is known; guests may still have to be thawed.
    fn settled(&self, report: Report);
}

/// Runs a sequence to its end: until every guest is thawed for certain, however long that takes.
pub async fn run(mut sequence: Sequence, providers: Vec<Provider>, host: Arc<dyn Host>) {
    let begun = Instant::now();
    let (sender, mut inputs) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let mut agents = Vec::new();
    for (agent, provider) in providers.into_iter().enumerate() {
        let (orders, taken) = mpsc::unbounded_channel();
        tasks.spawn(provider.work(agent, taken, sender.clone()));
        agents.push(orders);
    }
    sequence.handle(begun.elapsed(), Input::Start);
    let mut sign = tokio::time::interval(SIGN_EVERY);
    sign.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = 0;
    loop {
        let mut finished = false;
        while let Some(action) = sequence.next_action() {
            finished |= matches!(action, Action::Finished);
            act(&sequence, action, &host, &agents, &sender, &mut tasks);
        }
        let steps = sequence.steps();
        steps[told..].iter().for_each(|step| host.stepped(step));
        told = steps.len();
        if finished {
            return;
        }
        let deadline = sequence.next_deadline().map(|at| begun + at);
        let input = tokio::select! {
            biased;
            Some(input) = inputs.recv() => input,
            () = sleep_until(deadline) => Input::Tick,
            _ = sign.tick(), if sequence.freeze_asked() => {
                host.alive();
                continue;
            }
        };
        sequence.handle(begun.elapsed(), input);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn act(
    sequence: &Sequence,
    action: Action,
    host: &Arc<dyn Host>,
    agents: &[mpsc::UnboundedSender<Order>],
    inputs: &mpsc::UnboundedSender<Input>,
    tasks: &mut JoinSet<()>,
) {
    let inputs = inputs.clone();
    // A task that has ended cannot be told; its answer never comes, and the deadline does.
    let tell = |agent: usize, order| agents.get(agent).map(|orders| orders.send(order));
    match action {
        Action::WriteIntent => {
            let written = host.write_intent();
            tasks.spawn(async move { drop(inputs.send(Input::Intent(written.await))) });
        }
        Action::ArmWatchdog => {
            let armed = host.arm_watchdog();
            tasks.spawn(async move { drop(inputs.send(Input::Watchdog(armed.await))) });
        }
        Action::Ask {
            agent,
            ask,
            request,
        } => {
            trace(agent, request);
            if request == Request::Freeze {
                host.freezing();
            }
            tell(agent, Order::Ask(ask, request));
        }
        Action::Cancel { agent } => {
            tell(agent, Order::Cancel);
        }
        Action::Mark => {
            let marked = host.mark();
            tasks.spawn(async move { drop(inputs.send(Input::Marked(marked.await))) });
        }
        Action::Store { lsn } => {
            let stored = host.store(body(sequence, lsn));
            tasks.spawn(async move { drop(inputs.send(Input::Stored(stored.await))) });
        }
        Action::Settled => host.settled(sequence.report()),
        Action::RemoveIntent => host.remove_intent(),
        Action::Finished => {}
    }
}

fn trace(agent: usize, request: Request) {
    tracing::trace!(agent, ?request, "asking");
}

/// What became of the checkpoint, as the log keeps it.
fn body(sequence: &Sequence, lsn: Lsn) -> CheckpointConfirmBody {
    let report = sequence.report();
    let ns = |time: Option<std::time::Duration>| time.map_or(0, |time| time.as_nanos() as u64);
    let froze = report.times.frozen.is_some();
    let frozen = report.frozen.join(" ");
    CheckpointConfirmBody {
        checkpoint: lsn,
        confirmed: report.reason.is_none(),
        window_ns: ns(report.times.window()),
        own_ns: ns(report.times.own()),
        frozen: if froze { frozen } else { String::new() },
        skipped: report.skipped.join(" "),
        reason: report.reason.map_or(String::new(), |why| why.to_string()),
    }
}

//! The order of an application-consistent checkpoint, as a state machine.
//!
//! Owns the decision what to do next and by when; no file, socket, clock or task. Inputs with the
//! time go in, actions come out, so that every order of events can be tested exactly.
//!
//! Always holds (design, section 7): nobody is frozen before the intent is durable and the watchdog
//! has it; the point is called application-consistent only if every agent froze something, all that
//! it froze was thawed, and the thaw was answered within `freeze_limit` of the first freeze being
//! asked; whoever was asked to freeze and did not answer a thaw as expected is asked to thaw until
//! an exchange that began after the freeze was answered and the status says thawed; the intent goes
//! away only after that. Every run ends in a point: one that was not confirmed is crash-consistent
//! and keeps the reason.
#![deny(clippy::disallowed_methods)]

mod outcome;
#[cfg(test)]
mod tests;

pub use outcome::{Reason, Report, Step, Times};

use super::agent::{Answer, Request, Survey, Trouble};
use afterimage_format::ids::Lsn;
use std::collections::VecDeque;
use std::time::Duration;

/// Part of the freeze limit that freezing may take; the rest is left for the thaw.
const FREEZE_SHARE_PERCENT: u32 = 75;
/// Part of the freeze limit that the marker may take.
const MARK_SHARE_PERCENT: u32 = 10;
/// Part of the freeze limit after which a thaw that was not answered is asked once more, in case it
/// got lost; either may be answered within the limit.
const THAW_SHARE_PERCENT: u32 = 90;
/// First deadline and longest deadline of an exchange that thaws after trouble.
const RESCUE_PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// First and longest pause between two attempts to thaw.
const RESCUE_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// Steps that a report keeps.
const STEPS_MAX: usize = 100;

/// Limits of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// No guest is frozen longer, as long as its agent answers. Windows allows 10 s.
    pub freeze: Duration,
    /// For each exchange before the freeze, for the intent and for the watchdog.
    pub prepare: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            freeze: Duration::from_secs(8),
            prepare: Duration::from_secs(5),
        }
    }
}

/// Number of an exchange; an answer to another than the newest of an agent is stale.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct Ask(pub u32);

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Store the intent durably, then [`Input::Intent`].
    WriteIntent,
    /// Make sure that the watchdog has the intent, then [`Input::Watchdog`].
    ArmWatchdog,
    /// Ask an agent; give up whatever it is being asked. [`Input::Sent`], then [`Input::Answered`].
    Ask {
        /// Which agent.
        agent: usize,
        /// Number of the exchange.
        ask: Ask,
        /// What.
        request: Request,
    },
    /// Give up what an agent is being asked.
    Cancel {
        /// Which agent.
        agent: usize,
    },
    /// Append the checkpoint to the log, without waiting for durability, then [`Input::Marked`].
    Mark,
    /// Append what became of the checkpoint, durably, then [`Input::Stored`].
    Store {
        /// LSN of the checkpoint.
        lsn: Lsn,
    },
    /// [`Sequence::report`] has the result; agents may still have to be thawed.
    Settled,
    /// Every agent is thawed: remove the intent and let the watchdog go.
    RemoveIntent,
    /// Nothing is left to do.
    Finished,
}

/// What has happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// The run begins.
    Start,
    /// The intent is durable, or could not be written.
    Intent(Result<(), String>),
    /// The watchdog has the intent, or could not be told.
    Watchdog(Result<(), String>),
    /// A request has left.
    Sent {
        /// Which agent.
        agent: usize,
        /// Number of the exchange.
        ask: Ask,
    },
    /// An exchange is over.
    Answered {
        /// Which agent.
        agent: usize,
        /// Number of the exchange.
        ask: Ask,
        /// How.
        result: Result<Answer, Trouble>,
    },
    /// The checkpoint has its LSN, or never will.
    Marked(Result<Lsn, String>),
    /// What became of it is durable, or never will be.
    Stored(Result<(), String>),
    /// Time has passed.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Intent,
    Watchdog,
    Preparing,
    Freezing(usize),
    Marking,
    Thawing,
    /// The result is known: it is stored, and whoever may be frozen is thawed.
    Ending,
    Over,
}

/// Where an agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// Never asked to freeze.
    Untouched,
    /// Ready to be frozen.
    Ready,
    /// Was asked to freeze; may be frozen now or later.
    Touched,
    /// Froze so many.
    Frozen(u32),
    /// Is being thawed after trouble.
    Rescue,
    /// Will be asked again then.
    Pause(Duration),
    /// Thawed for certain.
    Thawed,
}

#[derive(Debug)]
struct Agent {
    name: String,
    stand: Stand,
    asked: Option<(Ask, Request, Duration)>,
    /// How long the exchange that is under way may take.
    patience: Duration,
    survey: Survey,
    attempts: u32,
    /// The thaw was asked a second time.
    asked_again: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Marker {
    None,
    Asked,
    At(Lsn),
    Impossible,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    None,
    Asked,
    Done { durable: bool },
}

/// One checkpoint.
#[derive(Debug)]
pub struct Sequence {
    limits: Limits,
    phase: Phase,
    agents: Vec<Agent>,
    actions: VecDeque<Action>,
    next_ask: u32,
    /// Of the phase.
    deadline: Option<Duration>,
    marker: Marker,
    store: Store,
    settled: bool,
    released: bool,
    reason: Option<Reason>,
    /// Known before the start: nobody is to be frozen.
    refused: Option<Reason>,
    times: Times,
    steps: Vec<Step>,
}

impl Sequence {
    /// A checkpoint with these agents, frozen in this order, thawed at once.
    #[must_use]
    pub fn new(limits: Limits, agents: impl IntoIterator<Item = String>) -> Self {
        let agent = |name| Agent {
            name,
            stand: Stand::Untouched,
            asked: None,
            patience: limits.prepare,
            survey: Survey::default(),
            attempts: 0,
            asked_again: false,
        };
        Self {
            limits,
            phase: Phase::Idle,
            agents: agents.into_iter().map(agent).collect(),
            actions: VecDeque::new(),
            next_ask: 0,
            deadline: None,
            marker: Marker::None,
            store: Store::None,
            settled: false,
            released: false,
            reason: None,
            refused: None,
            times: Times::default(),
            steps: Vec::new(),
        }
    }

    /// The same, without freezing anybody for this reason.
    #[must_use]
    pub fn refusing(mut self, reason: Reason) -> Self {
        self.refused = Some(reason);
        self
    }

    /// Thaws agents that a run before may have left frozen: no checkpoint, no point. The intent is
    /// there already.
    #[must_use]
    pub fn thaw_only(agents: impl IntoIterator<Item = String>) -> Self {
        let mut sequence = Self::new(Limits::default(), agents);
        sequence.marker = Marker::Impossible;
        sequence.settled = true;
        sequence.reason = Some(Reason::Interrupted);
        for agent in &mut sequence.agents {
            agent.stand = Stand::Touched;
        }
        sequence
    }

    /// What is to be done next; empty it after each input.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Input::Tick`] is due at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let agents = self.agents.iter().filter_map(|agent| match agent.stand {
            Stand::Pause(until) => Some(until),
            _ => agent.asked.map(|(_, _, deadline)| deadline),
        });
        agents.chain(self.deadline).min()
    }

    /// What has happened so far, for people.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// What became of it. Complete once [`Action::Settled`] came.
    #[must_use]
    pub fn report(&self) -> Report {
        let lsn = match self.marker {
            Marker::At(lsn) => Some(lsn),
            _ => None,
        };
        let all = |list: fn(&Survey) -> &Vec<String>| {
            let lists = self.agents.iter().flat_map(|agent| {
                let one = list(&agent.survey).iter();
                one.map(|what| match self.agents.len() {
                    1 => what.clone(),
                    _ => format!("{}:{what}", agent.name),
                })
            });
            lists.collect()
        };
        Report {
            lsn,
            reason: self.reason.clone(),
            times: self.times,
            frozen: all(|survey| &survey.freezable),
            skipped: all(|survey| &survey.skipped),
            steps: self.steps.clone(),
            confirmed: self.confirmed(),
        }
    }

    /// Whether anybody was asked to freeze.
    #[must_use]
    pub fn freeze_asked(&self) -> bool {
        self.times.freeze_asked.is_some()
    }

    /// Names of the agents that may be frozen still.
    pub fn unthawed(&self) -> impl Iterator<Item = &str> {
        let may = |agent: &&Agent| {
            !matches!(agent.stand, Stand::Untouched | Stand::Ready | Stand::Thawed)
        };
        self.agents.iter().filter(may).map(|a| a.name.as_str())
    }

    /// Takes what has happened.
    pub fn handle(&mut self, now: Duration, input: Input) {
        match input {
            Input::Start => self.start(now),
            Input::Intent(result) => self.intent_written(now, result),
            Input::Watchdog(result) => self.watchdog_armed(now, result),
            Input::Sent { agent, ask } => self.sent(now, agent, ask),
            Input::Answered { agent, ask, result } => {
                let current = self.agents.get(agent).and_then(|a| a.asked);
                if let Some((_, request, _)) = current.filter(|(current, ..)| *current == ask) {
                    self.agents[agent].asked = None;
                    self.answered(now, agent, request, result);
                }
            }
            Input::Marked(result) => self.marked(now, result),
            Input::Stored(result) => {
                if let Err(why) = &result {
                    self.note(
                        now,
                        None,
                        format!("what became of it could not be stored: {why}"),
                    );
                }
                self.store = Store::Done {
                    durable: result.is_ok(),
                };
            }
            Input::Tick => {}
        }
        self.expire(now);
        self.conclude(now);
    }

    fn start(&mut self, now: Duration) {
        if self.phase != Phase::Idle {
            return;
        }
        if self.reason.is_some() {
            // Only to be thawed.
            self.phase = Phase::Ending;
            self.rescue_touched(now);
            return;
        }
        if let Some(reason) = self.refused.take() {
            return self.fail(now, reason);
        }
        self.enter(Phase::Intent, Some(now + self.limits.prepare));
        self.actions.push_back(Action::WriteIntent);
    }

    fn intent_written(&mut self, now: Duration, result: Result<(), String>) {
        if self.phase != Phase::Intent {
            return;
        }
        match result {
            Ok(()) => {
                self.note(now, None, "intent is durable");
                self.enter(Phase::Watchdog, Some(now + self.limits.prepare));
                self.actions.push_back(Action::ArmWatchdog);
            }
            Err(why) => self.fail(now, Reason::Intent(why)),
        }
    }

    fn watchdog_armed(&mut self, now: Duration, result: Result<(), String>) {
        if self.phase != Phase::Watchdog {
            return;
        }
        match result {
            Ok(()) => {
                self.note(now, None, "watchdog is armed");
                self.enter(Phase::Preparing, None);
                for agent in 0..self.agents.len() {
                    self.ask(now, agent, Request::Sync, self.limits.prepare);
                }
            }
            Err(why) => self.fail(now, Reason::Watchdog(why)),
        }
    }

    fn sent(&mut self, now: Duration, agent: usize, ask: Ask) {
        let asked = self.agents.get(agent).and_then(|a| a.asked);
        if let Some((current, Request::Thaw, _)) = asked
            && current == ask
            && !self.agents[agent].asked_again
        {
            self.times.thaw_sent = self.times.thaw_sent.max(Some(now));
        }
    }

    fn answered(
        &mut self,
        now: Duration,
        agent: usize,
        request: Request,
        result: Result<Answer, Trouble>,
    ) {
        match (request, result) {
            (Request::Sync, Ok(Answer::InStep)) => {
                self.note(now, Some(agent), "in step");
                self.ask(now, agent, Request::Status, self.limits.prepare);
            }
            (Request::Status, Ok(Answer::Status { frozen })) => {
                self.status_known(now, agent, frozen);
            }
            (Request::Survey, result @ (Ok(Answer::Survey(_)) | Err(Trouble::Refused(_)))) => {
                // An agent that cannot tell may freeze all the same; one that does not answer may not.
                if let Ok(Answer::Survey(survey)) = result {
                    if !survey.missing.is_empty() {
                        let reason = Reason::NotMounted {
                            agent: self.name(agent),
                            mounts: survey.missing,
                        };
                        return self.fail(now, reason);
                    }
                    let found = format!("thawed, can freeze {}", survey.freezable.join(" "));
                    self.note(now, Some(agent), found);
                    self.agents[agent].survey = survey;
                }
                self.agents[agent].stand = Stand::Ready;
                self.freeze_when_ready(now);
            }
            (Request::Freeze, Ok(Answer::Frozen { count: 0 })) => {
                let agent = self.name(agent);
                self.fail(now, Reason::NothingFrozen { agent });
            }
            (Request::Freeze, Ok(Answer::Frozen { count })) => {
                self.note(now, Some(agent), format!("frozen ({count})"));
                self.times.frozen = Some(now);
                self.agents[agent].stand = Stand::Frozen(count);
                self.freeze_next(now);
            }
            (Request::Thaw, Ok(Answer::Thawed { count })) => self.thawed(now, agent, count),
            (Request::SyncThaw, Ok(_)) => {
                let patience = self.agents[agent].patience;
                self.ask(now, agent, Request::Status, patience);
            }
            (request, Ok(other)) => {
                let trouble = Trouble::Garbled(format!("{other:?}"));
                self.trouble(now, agent, request, trouble);
            }
            (request, Err(trouble)) => self.trouble(now, agent, request, trouble),
        }
    }

    fn status_known(&mut self, now: Duration, agent: usize, frozen: bool) {
        if self.agents[agent].stand == Stand::Rescue {
            if frozen {
                self.pause(now, agent);
            } else {
                self.note(now, Some(agent), "thawed");
                self.agents[agent].stand = Stand::Thawed;
            }
        } else if frozen {
            let agent = self.name(agent);
            self.fail(now, Reason::AlreadyFrozen { agent });
        } else {
            self.ask(now, agent, Request::Survey, self.limits.prepare);
        }
    }

    fn freeze_when_ready(&mut self, now: Duration) {
        let ready = |agent: &Agent| agent.stand == Stand::Ready;
        if self.phase == Phase::Preparing && self.agents.iter().all(ready) {
            self.times.freeze_asked = Some(now);
            self.phase = Phase::Freezing(0);
            self.freeze(now, 0);
        }
    }

    fn freeze(&mut self, now: Duration, agent: usize) {
        let begun = self.times.freeze_asked.unwrap_or(now);
        let end = begun + self.limits.freeze * FREEZE_SHARE_PERCENT / 100;
        self.note(now, Some(agent), "freeze is asked");
        self.agents[agent].stand = Stand::Touched;
        self.ask(now, agent, Request::Freeze, end.saturating_sub(now));
    }

    fn freeze_next(&mut self, now: Duration) {
        let Phase::Freezing(at) = self.phase else {
            return;
        };
        if at + 1 < self.agents.len() {
            self.phase = Phase::Freezing(at + 1);
            self.freeze(now, at + 1);
            return;
        }
        let patience = self.limits.freeze * MARK_SHARE_PERCENT / 100;
        self.enter(Phase::Marking, Some(now + patience));
        self.marker = Marker::Asked;
        self.actions.push_back(Action::Mark);
    }

    fn marked(&mut self, now: Duration, result: Result<Lsn, String>) {
        let marking = self.phase == Phase::Marking;
        match result {
            Ok(lsn) => {
                self.marker = Marker::At(lsn);
                if !marking {
                    self.note(now, None, format!("checkpoint is at lsn:{lsn}"));
                    return;
                }
                // Thaw first, everything else later.
                self.enter(Phase::Thawing, None);
                let begun = self.times.freeze_asked.unwrap_or(now);
                let end = begun + self.limits.freeze * THAW_SHARE_PERCENT / 100;
                let patience = end.saturating_sub(now);
                for agent in 0..self.agents.len() {
                    self.ask(now, agent, Request::Thaw, patience);
                }
                self.note(
                    now,
                    None,
                    format!("checkpoint is at lsn:{lsn}, thaw is asked"),
                );
            }
            Err(why) => {
                self.marker = Marker::Impossible;
                self.fail(now, Reason::Log(why));
            }
        }
    }

    fn thawed(&mut self, now: Duration, agent: usize, count: u32) {
        let Stand::Frozen(frozen) = self.agents[agent].stand else {
            return;
        };
        self.note(now, Some(agent), format!("thawed ({count})"));
        if count != frozen {
            let reason = Reason::OtherThawed {
                agent: self.name(agent),
                frozen,
                thawed: count,
            };
            self.fail(now, reason);
            // Fewer thawed: some are frozen still. More: nothing is known.
            self.rescue(now, agent);
            return;
        }
        self.agents[agent].stand = Stand::Thawed;
        self.times.thawed = self.times.thawed.max(Some(now));
        if !self.agents.iter().all(|a| a.stand == Stand::Thawed) || self.reason.is_some() {
            return;
        }
        let window = self.times.window().unwrap_or_default();
        if window > self.limits.freeze {
            self.fail(now, Reason::TooLong { window });
        } else {
            self.enter(Phase::Ending, None);
        }
    }

    fn trouble(&mut self, now: Duration, agent: usize, request: Request, trouble: Trouble) {
        match self.agents[agent].stand {
            Stand::Rescue => {
                if self.agents[agent].attempts == 1 {
                    self.note(now, Some(agent), format!("not thawed yet: {trouble}"));
                }
                self.pause(now, agent);
            }
            _ => {
                let reason = Reason::Agent {
                    agent: self.name(agent),
                    request,
                    trouble,
                };
                self.fail(now, reason);
                if request == Request::Thaw && self.agents[agent].stand != Stand::Rescue {
                    self.rescue(now, agent);
                }
            }
        }
    }

    /// The point will be crash-consistent. Everybody who may be frozen is thawed; a thaw that is
    /// under way may still be answered.
    fn fail(&mut self, now: Duration, reason: Reason) {
        self.note(now, None, reason.to_string());
        if self.reason.is_none() {
            self.reason = Some(reason);
        }
        self.enter(Phase::Ending, None);
        self.rescue_touched(now);
        if self.marker == Marker::None {
            self.marker = Marker::Asked;
            self.actions.push_back(Action::Mark);
        }
    }

    fn rescue_touched(&mut self, now: Duration) {
        for agent in 0..self.agents.len() {
            let asked = self.agents[agent].asked.map(|(_, request, _)| request);
            match self.agents[agent].stand {
                Stand::Untouched | Stand::Ready => {
                    if self.agents[agent].asked.take().is_some() {
                        self.actions.push_back(Action::Cancel { agent });
                    }
                }
                Stand::Touched => self.rescue(now, agent),
                Stand::Frozen(_) if asked != Some(Request::Thaw) => self.rescue(now, agent),
                Stand::Frozen(_) | Stand::Rescue | Stand::Pause(_) | Stand::Thawed => {}
            }
        }
    }

    fn rescue(&mut self, now: Duration, agent: usize) {
        let state = &mut self.agents[agent];
        if state.stand != Stand::Rescue {
            state.stand = Stand::Rescue;
        }
        let patience = doubled(RESCUE_PATIENCE, state.attempts);
        state.attempts += 1;
        state.patience = patience;
        self.ask(now, agent, Request::SyncThaw, patience);
    }

    fn pause(&mut self, now: Duration, agent: usize) {
        let state = &mut self.agents[agent];
        let pause = doubled(RESCUE_PAUSE, state.attempts.saturating_sub(1));
        state.stand = Stand::Pause(now + pause);
    }

    /// Deadlines that have passed.
    fn expire(&mut self, now: Duration) {
        for agent in 0..self.agents.len() {
            if let Stand::Pause(until) = self.agents[agent].stand
                && until <= now
            {
                self.rescue(now, agent);
            }
            if let Some((_, request, deadline)) = self.agents[agent].asked
                && deadline <= now
            {
                if self.thaw_again(now, agent, request) {
                    continue;
                }
                self.agents[agent].asked = None;
                self.actions.push_back(Action::Cancel { agent });
                let patience = self.agents[agent].patience;
                self.answered(now, agent, request, Err(Trouble::Timeout(patience)));
            }
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            let late = |what: &str| format!("{what} took too long");
            let reason = match self.phase {
                Phase::Intent => Reason::Intent(late("storing it")),
                Phase::Watchdog => Reason::Watchdog(late("telling it")),
                _ => Reason::Log(late("the record of the checkpoint")),
            };
            self.fail(now, reason);
        }
    }

    /// Asks for the thaw once more if there is time, since the request may have got lost. The agent
    /// works in order, so that the answer to either says as much.
    fn thaw_again(&mut self, now: Duration, agent: usize, request: Request) -> bool {
        let end = self.times.freeze_asked.unwrap_or(now) + self.limits.freeze;
        let wanted = request == Request::Thaw && !self.agents[agent].asked_again && now < end;
        if wanted {
            self.agents[agent].asked_again = true;
            self.note(now, Some(agent), "thaw is asked again");
            self.ask(now, agent, Request::Thaw, end - now);
        }
        wanted
    }

    fn conclude(&mut self, now: Duration) {
        if self.phase != Phase::Ending {
            return;
        }
        if let (Marker::At(lsn), Store::None) = (&self.marker, self.store) {
            let lsn = *lsn;
            self.store = Store::Asked;
            self.actions.push_back(Action::Store { lsn });
        }
        let known = match self.marker {
            Marker::None | Marker::Asked => false,
            Marker::Impossible => true,
            Marker::At(_) => matches!(self.store, Store::Done { .. }),
        };
        if known && !self.settled {
            self.settled = true;
            if self.confirmed() {
                self.note(now, None, "confirmed: application-consistent");
            }
            self.actions.push_back(Action::Settled);
        }
        let thawed = self.unthawed().next().is_none();
        if thawed && !self.released {
            self.released = true;
            self.actions.push_back(Action::RemoveIntent);
        }
        if thawed && self.settled {
            self.enter(Phase::Over, None);
            self.actions.push_back(Action::Finished);
        }
    }

    fn confirmed(&self) -> bool {
        self.reason.is_none() && self.store == Store::Done { durable: true }
    }

    fn enter(&mut self, phase: Phase, deadline: Option<Duration>) {
        self.phase = phase;
        self.deadline = deadline;
    }

    fn ask(&mut self, now: Duration, agent: usize, request: Request, patience: Duration) {
        let ask = Ask(self.next_ask);
        self.next_ask += 1;
        self.agents[agent].patience = patience;
        self.agents[agent].asked = Some((ask, request, now + patience));
        self.actions.push_back(Action::Ask {
            agent,
            ask,
            request,
        });
    }

    fn name(&self, agent: usize) -> String {
        self.agents[agent].name.clone()
    }

    fn note(&mut self, now: Duration, agent: Option<usize>, what: impl Into<String>) {
        // A guest that does not answer for hours must not fill the memory with words.
        if self.steps.len() < STEPS_MAX {
            let what = what.into();
            let what = agent.map_or_else(
                || what.clone(),
                |agent| format!("{}: {what}", self.agents[agent].name),
            );
            self.steps.push(Step { at: now, what });
        }
    }
}

/// `first`, doubled `times` times, at most `last`.
fn doubled((first, last): (Duration, Duration), times: u32) -> Duration {
    first.saturating_mul(1 << times.min(16)).min(last)
}

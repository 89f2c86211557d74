//! The sequence against virtual guests in virtual time: each agent takes requests in order, as the
//! real one does, and goes on with what it was sent although nobody waits for the answer any more.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const MS: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(8);
/// File systems of a virtual guest.
const COUNT: u32 = 2;

/// How an agent behaves. Times are since the request came to its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freeze {
    /// Freezes, and answers after so long.
    AnswersAfter(Duration),
    /// Does nothing for so long, then freezes and answers.
    Queued(Duration),
    /// Freezes, then the connection ends.
    CutAfter,
    /// The connection ends, the request is executed so much later.
    CutThenFreezes(Duration),
    /// Freezes nothing, says so.
    Zero,
    /// Says an error, freezes nothing.
    Refuses,
    /// Freezes and answers nonsense.
    Garbles,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thaw {
    Works,
    /// Answers an error so often, and thaws each time all the same (VSS).
    SaysErrors(u32),
    /// Thaws nothing so often.
    Fails(u32),
    /// Says fewer than were frozen, once.
    Fewer,
    /// Dies so often instead of thawing.
    Cuts(u32),
    /// Loses the request once: no effect, no answer.
    Lost,
    /// Takes so long.
    Slow(Duration),
}

/// What becomes of the question what could be frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Lists,
    Refuses,
    Nothing,
    Nonsense,
    Cuts,
}

#[derive(Debug, Clone, Copy)]
struct Script {
    latency: Duration,
    survey: Told,
    freeze: Freeze,
    thaw: Thaw,
    frozen_before: bool,
}

const GOOD: Script = Script {
    latency: Duration::from_millis(3),
    survey: Told::Lists,
    freeze: Freeze::AnswersAfter(Duration::from_millis(5)),
    thaw: Thaw::Works,
    frozen_before: false,
};

struct Guest {
    script: Script,
    frozen_since: Option<Duration>,
    frozen_max: Duration,
    /// What is to happen when, in order.
    effects: Vec<(Duration, Effect)>,
    busy_until: Duration,
    thaws_left: u32,
}

#[derive(Debug, Clone)]
enum Effect {
    Freeze,
    Thaw,
    Answer(Ask, Result<Answer, Trouble>),
    AnswerStatus(Ask),
}

impl Guest {
    fn new(script: Script) -> Self {
        let thaws_left = match script.thaw {
            Thaw::SaysErrors(n) | Thaw::Fails(n) | Thaw::Cuts(n) => n,
            Thaw::Fewer | Thaw::Lost => 1,
            Thaw::Works | Thaw::Slow(_) => 0,
        };
        Self {
            script,
            frozen_since: script.frozen_before.then_some(Duration::ZERO),
            frozen_max: Duration::ZERO,
            effects: Vec::new(),
            busy_until: Duration::ZERO,
            thaws_left,
        }
    }

    fn ask(&mut self, now: Duration, ask: Ask, request: Request) {
        let turn = self.busy_until.max(now);
        let soon = turn + self.script.latency;
        for (_, effect) in &mut self.effects {
            // Asked again while the first is under way: whoever asks takes its answer.
            if let Effect::Answer(first, Ok(Answer::Thawed { .. })) = effect
                && request == Request::Thaw
            {
                *first = ask;
                return;
            }
        }
        let mut at = |when, effect| self.effects.push((when, effect));
        let end = match request {
            Request::Sync => {
                at(soon, Effect::Answer(ask, Ok(Answer::InStep)));
                soon
            }
            Request::Status => {
                at(soon, Effect::AnswerStatus(ask));
                soon
            }
            Request::Survey => {
                let survey = Survey {
                    freezable: vec!["/".into(), "/srv".into()],
                    skipped: vec!["/boot".into()],
                    missing: Vec::new(),
                };
                let answer = match self.script.survey {
                    Told::Lists => Some(Ok(Answer::Survey(survey))),
                    Told::Refuses => Some(Err(Trouble::Refused("unknown command".into()))),
                    Told::Nothing => None,
                    Told::Nonsense => Some(Err(Trouble::Garbled("nonsense".into()))),
                    Told::Cuts => Some(Err(Trouble::Disconnected)),
                };
                if let Some(answer) = answer {
                    at(soon, Effect::Answer(ask, answer));
                }
                soon
            }
            Request::Freeze => {
                let frozen = Ok(Answer::Frozen { count: COUNT });
                match self.script.freeze {
                    Freeze::AnswersAfter(late) => {
                        at(turn, Effect::Freeze);
                        at(turn + late, Effect::Answer(ask, frozen));
                        turn + late
                    }
                    Freeze::Queued(late) => {
                        at(turn + late, Effect::Freeze);
                        at(turn + late, Effect::Answer(ask, frozen));
                        turn + late
                    }
                    Freeze::CutAfter => {
                        at(turn, Effect::Freeze);
                        at(soon, Effect::Answer(ask, Err(Trouble::Disconnected)));
                        soon
                    }
                    Freeze::CutThenFreezes(late) => {
                        at(soon, Effect::Answer(ask, Err(Trouble::Disconnected)));
                        at(soon + late, Effect::Freeze);
                        soon + late
                    }
                    Freeze::Zero => {
                        at(soon, Effect::Answer(ask, Ok(Answer::Frozen { count: 0 })));
                        soon
                    }
                    Freeze::Refuses => {
                        let error = Err(Trouble::Refused("no".into()));
                        at(soon, Effect::Answer(ask, error));
                        soon
                    }
                    Freeze::Garbles => {
                        at(turn, Effect::Freeze);
                        let nonsense = Err(Trouble::Garbled("{{{".into()));
                        at(soon, Effect::Answer(ask, nonsense));
                        soon
                    }
                }
            }
            Request::Thaw | Request::SyncThaw => {
                let limps = self.thaws_left > 0;
                if limps && self.script.thaw == Thaw::Lost {
                    self.thaws_left = 0;
                    return;
                }
                self.thaws_left = self.thaws_left.saturating_sub(1);
                let says = |answer| match request {
                    Request::SyncThaw => Ok(Answer::InStep),
                    _ => answer,
                };
                let soon = match self.script.thaw {
                    Thaw::Slow(took) => turn + took,
                    _ => soon,
                };
                let answer = match (limps, self.script.thaw) {
                    (true, Thaw::SaysErrors(_)) => {
                        at(soon, Effect::Thaw);
                        says(Err(Trouble::Refused("VSS_E_HOLD_WRITES_TIMEOUT".into())))
                    }
                    (true, Thaw::Fails(_)) => says(Err(Trouble::Refused("cannot".into()))),
                    (true, Thaw::Fewer) => says(Ok(Answer::Thawed { count: COUNT - 1 })),
                    (true, Thaw::Cuts(_)) => Err(Trouble::Disconnected),
                    _ => {
                        at(soon, Effect::Thaw);
                        says(Ok(Answer::Thawed { count: COUNT }))
                    }
                };
                at(soon, Effect::Answer(ask, answer));
                soon
            }
        };
        self.busy_until = end;
    }

    fn set_frozen(&mut self, now: Duration, frozen: bool) {
        if let Some(since) = self.frozen_since {
            self.frozen_max = self.frozen_max.max(now.saturating_sub(since));
        }
        match (frozen, self.frozen_since) {
            (true, None) => self.frozen_since = Some(now),
            (false, Some(_)) => self.frozen_since = None,
            _ => {}
        }
    }
}

/// What the rest of the world does.
#[derive(Debug, Clone, Copy, Default)]
struct Host {
    intent_fails: bool,
    watchdog_fails: bool,
    /// How long the record takes.
    mark: Duration,
    log_fails: bool,
}

struct World {
    guests: Vec<Guest>,
    host: Host,
    now: Duration,
    pending: Vec<(Duration, Input)>,
    intent: bool,
    marked_while_frozen: Option<bool>,
    settled: Option<Report>,
    actions: Vec<&'static str>,
}

fn run(scripts: &[Script], host: Host) -> (World, Report) {
    let names = (0..scripts.len()).map(|at| format!("agent{at}"));
    drive(Sequence::new(Limits::default(), names), scripts, host)
}

fn drive(mut sequence: Sequence, scripts: &[Script], host: Host) -> (World, Report) {
    let mut world = World {
        guests: scripts.iter().copied().map(Guest::new).collect(),
        host,
        now: Duration::ZERO,
        pending: vec![(Duration::ZERO, Input::Start)],
        intent: false,
        marked_while_frozen: None,
        settled: None,
        actions: Vec::new(),
    };
    for _ in 0..100_000 {
        if !world.turn(&mut sequence) {
            let report = sequence.report();
            assert_eq!(sequence.unthawed().count(), 0);
            return (world, report);
        }
    }
    panic!("never ends: {:?}", sequence.report());
}

impl World {
    /// The next thing that happens. False when the sequence is finished.
    fn turn(&mut self, sequence: &mut Sequence) -> bool {
        let inputs = self.pending.iter().map(|(at, _)| *at);
        let effects = self.guests.iter().flat_map(|g| g.effects.iter());
        let effects = effects.map(|(at, _)| *at);
        let next = inputs.chain(effects).chain(sequence.next_deadline()).min();
        self.now = self.now.max(next.expect("something happens"));
        let due = |at: &Duration| *at <= self.now;
        let mut inputs = vec![Input::Tick];
        if let Some(at) = self.pending.iter().position(|(at, _)| due(at)) {
            inputs.push(self.pending.remove(at).1);
        }
        for (agent, guest) in self.guests.iter_mut().enumerate() {
            while let Some(at) = guest.effects.iter().position(|(at, _)| due(at)) {
                let (when, effect) = guest.effects.remove(at);
                let answered = |ask, result| Input::Answered { agent, ask, result };
                match effect {
                    Effect::Freeze => {
                        assert!(self.intent, "frozen without an intent");
                        guest.set_frozen(when, true);
                    }
                    Effect::Thaw => guest.set_frozen(when, false),
                    Effect::Answer(ask, result) => inputs.push(answered(ask, result)),
                    Effect::AnswerStatus(ask) => {
                        let frozen = guest.frozen_since.is_some();
                        inputs.push(answered(ask, Ok(Answer::Status { frozen })));
                    }
                }
            }
        }
        for input in inputs {
            sequence.handle(self.now, input);
        }
        while let Some(action) = sequence.next_action() {
            if !self.act(sequence, action) {
                return false;
            }
        }
        true
    }

    fn act(&mut self, sequence: &Sequence, action: Action) -> bool {
        let now = self.now;
        match action {
            Action::WriteIntent => {
                self.actions.push("intent");
                self.intent = !self.host.intent_fails;
                let result = self.intent.then_some(()).ok_or("disk full".into());
                self.pending.push((now + MS, Input::Intent(result)));
            }
            Action::ArmWatchdog => {
                self.actions.push("watchdog");
                let armed = !self.host.watchdog_fails;
                let result = armed.then_some(()).ok_or("gone".into());
                self.pending.push((now + MS, Input::Watchdog(result)));
            }
            Action::Ask {
                agent,
                ask,
                request,
            } => {
                self.guests[agent].ask(now, ask, request);
                self.pending.push((now, Input::Sent { agent, ask }));
            }
            Action::Cancel { .. } => {}
            Action::Mark => {
                self.actions.push("mark");
                let all = self.guests.iter().all(|g| g.frozen_since.is_some());
                self.marked_while_frozen = Some(all);
                let result = (!self.host.log_fails).then_some(Lsn(77));
                let input = Input::Marked(result.ok_or("failed".into()));
                self.pending.push((now + self.host.mark, input));
            }
            Action::Store { lsn } => {
                self.actions.push("store");
                assert_eq!(lsn, Lsn(77));
                self.pending.push((now + MS, Input::Stored(Ok(()))));
            }
            Action::Settled => {
                assert!(self.settled.is_none(), "settled twice");
                self.settled = Some(sequence.report());
            }
            Action::RemoveIntent => {
                for guest in &self.guests {
                    assert!(
                        guest.frozen_since.is_none() || guest.script.frozen_before,
                        "the intent goes while the guest is frozen"
                    );
                    let late = guest
                        .effects
                        .iter()
                        .any(|(_, e)| matches!(e, Effect::Freeze));
                    assert!(!late, "the intent goes while a freeze waits in the agent");
                }
                self.intent = false;
            }
            Action::Finished => return false,
        }
        true
    }
}

fn frozen_max(world: &World) -> Duration {
    let all = world.guests.iter().map(|guest| guest.frozen_max);
    all.max().unwrap_or_default()
}

#[test]
fn a_willing_guest_is_confirmed_in_the_order_of_the_design() {
    let (world, report) = run(&[GOOD], Host::default());
    assert_eq!(world.actions, ["intent", "watchdog", "mark", "store"]);
    assert!(report.confirmed && report.reason.is_none(), "{report:?}");
    assert_eq!(world.marked_while_frozen, Some(true));
    assert_eq!(report.frozen, ["/", "/srv"]);
    assert_eq!(report.skipped, ["/boot"]);
    // Freeze 5 ms, thaw 3 ms, nothing of ours between them.
    assert_eq!(report.times.window(), Some(8 * MS));
    assert_eq!(report.times.own(), Some(Duration::ZERO));
    assert_eq!(world.settled, Some(report));
}

#[test]
fn several_agents_are_all_frozen_at_the_marker_or_none_is_confirmed() {
    let slow = Script {
        freeze: Freeze::AnswersAfter(2000 * MS),
        ..GOOD
    };
    let (world, report) = run(&[GOOD, slow], Host::default());
    assert!(report.confirmed && world.marked_while_frozen == Some(true));
    let refusing = Script {
        freeze: Freeze::Refuses,
        ..GOOD
    };
    let (world, report) = run(&[GOOD, refusing, GOOD], Host::default());
    assert!(!report.confirmed && frozen_max(&world) < LIMIT);
    assert_eq!(world.guests[2].frozen_max, Duration::ZERO);
    assert!(report.reason.expect("kept").to_string().contains("agent1"));
}

#[test]
fn each_misbehaviour_thaws_in_time_and_leaves_a_crash_consistent_point_with_its_reason() {
    use Freeze::*;
    let freeze = |freeze| Script { freeze, ..GOOD };
    let thaw = |thaw| Script { thaw, ..GOOD };
    let cases = [
        (
            freeze(AnswersAfter(7000 * MS)),
            "freezing: agent0 did not answer",
        ),
        (
            freeze(Queued(60_000 * MS)),
            "freezing: agent0 did not answer",
        ),
        (freeze(CutAfter), "closed the connection"),
        (freeze(CutThenFreezes(30_000 * MS)), "closed the connection"),
        (freeze(Zero), "froze nothing"),
        (freeze(Refuses), "says: no"),
        (freeze(Garbles), "something else"),
        (thaw(Thaw::SaysErrors(1)), "VSS_E_HOLD_WRITES_TIMEOUT"),
        (thaw(Thaw::SaysErrors(3)), "VSS_E_HOLD_WRITES_TIMEOUT"),
        (thaw(Thaw::Fails(4)), "says: cannot"),
        (thaw(Thaw::Fewer), "froze 2 file systems and thawed 1"),
        (thaw(Thaw::Cuts(3)), "closed the connection"),
        (
            Script {
                frozen_before: true,
                ..GOOD
            },
            "frozen already",
        ),
    ];
    for (script, why) in cases {
        let (world, report) = run(&[script], Host::default());
        assert!(!report.confirmed, "{script:?}");
        assert_eq!(report.lsn, Some(Lsn(77)), "{script:?}");
        let reason = report.reason.expect("a reason").to_string();
        assert!(reason.contains(why), "{script:?}: {reason}");
        assert!(frozen_max(&world) <= LIMIT, "{script:?}");
        assert!(!world.intent, "{script:?}");
    }
}

#[test]
fn a_thaw_that_gets_lost_is_asked_again_in_time_and_a_slow_one_may_take_all_of_it() {
    let lost = Script {
        thaw: Thaw::Lost,
        ..GOOD
    };
    let (world, report) = run(&[GOOD, lost], Host::default());
    assert!(report.confirmed, "{report:?}");
    let frozen = frozen_max(&world);
    assert!(frozen > LIMIT * 8 / 10 && frozen < LIMIT, "{frozen:?}");
    // Our share ends with the first.
    assert_eq!(report.times.own(), Some(Duration::ZERO));
    for (took, confirmed) in [(7900, true), (8100, false)] {
        let slow = Script {
            thaw: Thaw::Slow(took * MS - 5 * MS),
            ..GOOD
        };
        let (_, report) = run(&[slow], Host::default());
        assert_eq!(report.confirmed, confirmed, "{report:?}");
    }
}

#[test]
fn an_agent_that_does_not_say_what_it_would_freeze_is_not_frozen_but_one_that_cannot_is() {
    let survey = |survey| Script { survey, ..GOOD };
    for deaf in [Told::Nothing, Told::Nonsense, Told::Cuts] {
        let (world, report) = run(&[GOOD, survey(deaf)], Host::default());
        assert_eq!(frozen_max(&world), Duration::ZERO, "{deaf:?}");
        assert!(!report.confirmed && report.lsn.is_some(), "{deaf:?}");
        let reason = report.reason.expect("a reason").to_string();
        assert!(reason.contains("agent1"), "{deaf:?}: {reason}");
        assert!(!world.intent, "{deaf:?}");
    }
    let (_, report) = run(&[GOOD, survey(Told::Refuses)], Host::default());
    assert!(report.confirmed, "{report:?}");
}

#[test]
fn nobody_is_frozen_when_the_host_cannot_see_it_through() {
    let hosts = [
        (
            Host {
                intent_fails: true,
                ..Host::default()
            },
            "intent",
        ),
        (
            Host {
                watchdog_fails: true,
                ..Host::default()
            },
            "watchdog",
        ),
    ];
    for (host, why) in hosts {
        let (world, report) = run(&[GOOD], host);
        assert_eq!(frozen_max(&world), Duration::ZERO, "{why}");
        assert_eq!(world.marked_while_frozen, Some(false));
        let reason = report.reason.expect("a reason").to_string();
        assert!(reason.contains(why), "{reason}");
    }
}

#[test]
fn a_refused_freeze_still_makes_a_point() {
    let sequence = Sequence::new(Limits::default(), ["agent0".to_owned()]);
    let full = sequence.refusing(Reason::LogNearlyFull { used_percent: 93 });
    let (world, report) = drive(full, &[GOOD], Host::default());
    assert_eq!(world.actions, ["mark", "store"]);
    assert!(!report.confirmed && report.lsn == Some(Lsn(77)));
    assert!(report.reason.expect("kept").to_string().contains("93 %"));
    assert_eq!(frozen_max(&world), Duration::ZERO);
}

#[test]
fn a_log_that_stalls_or_fails_does_not_hold_the_guest() {
    let stalls = Host {
        mark: Duration::from_secs(600),
        ..Host::default()
    };
    let (world, report) = run(&[GOOD], stalls);
    assert!(frozen_max(&world) < Duration::from_secs(1), "{report:?}");
    // The record came in the end: it is a point, and nobody confirmed it.
    assert!(!report.confirmed && report.lsn == Some(Lsn(77)));
    let fails = Host {
        log_fails: true,
        ..Host::default()
    };
    let (world, report) = run(&[GOOD], fails);
    assert!(frozen_max(&world) < Duration::from_secs(1));
    assert!(!report.confirmed && report.lsn.is_none());
}

#[test]
fn after_a_kill_the_guest_is_thawed_whatever_it_does() {
    for thaw in [
        Thaw::Works,
        Thaw::Fails(9),
        Thaw::Cuts(9),
        Thaw::SaysErrors(9),
    ] {
        let script = Script {
            thaw,
            frozen_before: true,
            ..GOOD
        };
        let sequence = Sequence::thaw_only(["agent0".to_owned()]);
        let (world, _) = drive(sequence, &[script], Host::default());
        assert_eq!(world.guests[0].frozen_since, None, "{thaw:?}");
        assert!(world.actions.is_empty(), "a thaw makes no point");
    }
}

fn scripts() -> impl Strategy<Value = Script> {
    let ms = |range: std::ops::Range<u64>| range.prop_map(Duration::from_millis);
    let freeze = prop_oneof![
        4 => ms(0..7500).prop_map(Freeze::AnswersAfter),
        1 => ms(0..100_000).prop_map(Freeze::Queued),
        1 => Just(Freeze::CutAfter),
        1 => ms(0..100_000).prop_map(Freeze::CutThenFreezes),
        1 => Just(Freeze::Zero),
        1 => Just(Freeze::Refuses),
        1 => Just(Freeze::Garbles),
    ];
    let thaw = prop_oneof![
        4 => Just(Thaw::Works),
        1 => (1..4_u32).prop_map(Thaw::SaysErrors),
        1 => (1..4_u32).prop_map(Thaw::Fails),
        1 => Just(Thaw::Fewer),
        1 => (1..4_u32).prop_map(Thaw::Cuts),
        1 => Just(Thaw::Lost),
    ];
    (ms(0..200), freeze, thaw).prop_map(|(latency, freeze, thaw)| Script {
        latency,
        survey: Told::Lists,
        freeze,
        thaw,
        frozen_before: false,
    })
}

proptest! {
    #[test]
    fn never_frozen_longer_than_the_limit_and_confirmed_only_when_true(
        scripts in prop::collection::vec(scripts(), 1..4),
        mark_ms in prop_oneof![Just(0_u64), 0..5000_u64],
    ) {
        let host = Host { mark: Duration::from_millis(mark_ms), ..Host::default() };
        let (world, report) = run(&scripts, host);
        // An agent that is busy for longer than 7.5 s does not answer in the sense of the promise.
        // Nor does one that is told to thaw and does not; that it is thawed in the end is asserted
        // for every agent.
        let thaws = |s: &Script| matches!(s.thaw, Thaw::Works | Thaw::SaysErrors(_));
        let obeys = scripts.iter().all(thaws);
        prop_assert!(!obeys || frozen_max(&world) <= LIMIT, "{:?} {report:?}", frozen_max(&world));
        prop_assert_eq!(report.confirmed, report.reason.is_none());
        prop_assert!(world.settled.is_some());
        if report.confirmed {
            prop_assert_eq!(world.marked_while_frozen, Some(true));
            prop_assert!(report.times.window().expect("measured") <= LIMIT);
            let works = |s: &Script| matches!(s.thaw, Thaw::Works | Thaw::Lost);
            prop_assert!(scripts.iter().all(works));
        }
        let steps: BTreeSet<_> = report.steps.iter().map(|step| step.at).collect();
        prop_assert!(!steps.is_empty());
    }
}

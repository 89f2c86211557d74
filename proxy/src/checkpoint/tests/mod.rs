//! Checkpoints through real sockets, files and processes against agents that misbehave. The clock
//! is tokio's and paused: it moves only when nothing else can, so that bounds are exact.

mod agent;
mod commands;

use super::intent::{AgentSpec, Intent, IntentFolder, Way};
use super::run::{Host, Step, run};
use super::sequence::{Limits, Report, Sequence};
use super::watchdog;
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::Lsn;
use agent::{Script, Shared};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(8);

/// A log that only counts.
struct Log {
    folder: IntentFolder,
    intent: Intent,
    guests: Vec<Shared>,
    guard: Arc<Mutex<Option<watchdog::Guard>>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    report: Option<Report>,
    stored: Option<CheckpointConfirmBody>,
    marked_while_frozen: Option<bool>,
}

impl Host for Log {
    fn write_intent(&self) -> Step<()> {
        let stored = self.folder.store(&self.intent).map_err(|e| e.to_string());
        Box::pin(async { stored })
    }

    fn arm_watchdog(&self) -> Step<()> {
        let (folder, intent) = (self.folder.clone(), self.intent.clone());
        let guard = Arc::clone(&self.guard);
        Box::pin(async move {
            let start = || {
                tokio::spawn(watchdog::serve(folder.clone(), false));
                Ok(())
            };
            let armed = watchdog::arm(&folder, &intent, start).await?;
            *guard.lock().expect("whole") = Some(armed);
            Ok(())
        })
    }

    fn freezing(&self) {
        if let Some(guard) = &*self.guard.lock().expect("whole") {
            guard.freezing(LIMIT);
        }
    }

    fn alive(&self) {
        if let Some(guard) = &*self.guard.lock().expect("whole") {
            guard.alive();
        }
    }

    fn mark(&self) -> Step<Lsn> {
        let frozen = |guest: &Shared| guest.lock().expect("whole").frozen_since.is_some();
        let all = self.guests.iter().all(frozen);
        self.seen.lock().expect("whole").marked_while_frozen = Some(all);
        Box::pin(async { Ok(Lsn(5)) })
    }

    fn store(&self, body: CheckpointConfirmBody) -> Step<()> {
        self.seen.lock().expect("whole").stored = Some(body);
        Box::pin(async { Ok(()) })
    }

    fn remove_intent(&self) {
        self.folder.remove(&self.intent).expect("removed");
        *self.guard.lock().expect("whole") = None;
    }

    fn settled(&self, report: Report) {
        self.seen.lock().expect("whole").report = Some(report);
    }
}

fn qga(path: &Path) -> AgentSpec {
    AgentSpec {
        name: "guest".to_owned(),
        way: Way::Qga {
            socket: path.to_owned(),
            mounts: Vec::new(),
        },
    }
}

/// One checkpoint of these agents, to its end.
async fn checkpoint(folder: &IntentFolder, agents: &[AgentSpec], guests: &[Shared]) -> Seen {
    let _lock = folder.lock("vm1").expect("works").expect("free");
    let intent = Intent::new("vm1", agents, Duration::from_secs(3600));
    let names = agents.iter().map(|agent| agent.name.clone());
    let providers = agents.iter().map(|a| a.provider("vm1", &intent.checkpoint));
    let providers = providers.collect();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let host = Log {
        folder: folder.clone(),
        intent,
        guests: guests.to_owned(),
        guard: Arc::default(),
        seen: Arc::clone(&seen),
    };
    run(
        Sequence::new(Limits::default(), names),
        providers,
        Arc::new(host),
    )
    .await;
    std::mem::take(&mut seen.lock().expect("whole"))
}

/// Runs two checkpoints against an agent: the first as scripted, the second must work.
async fn against(script: Script) -> (Seen, Duration) {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let path = folder.path().join("agent.sock");
    let (guest, server) = agent::start(&path, script);
    let agents = [qga(&path)];
    let first = checkpoint(&intents, &agents, &[Arc::clone(&guest)]).await;
    assert!(intents.list().expect("readable").is_empty(), "{script:?}");
    assert_eq!(
        guest.lock().expect("whole").frozen_since,
        None,
        "{script:?}"
    );
    let frozen_max = guest.lock().expect("whole").frozen_max;
    let second = checkpoint(&intents, &agents, &[Arc::clone(&guest)]).await;
    let report = second.report.expect("settled");
    assert!(report.confirmed, "the next after {script:?}: {report:?}");
    server.abort();
    (first, frozen_max)
}

#[tokio::test(start_paused = true)]
async fn willing_agents_are_confirmed() {
    let willing = [
        Script::Good,
        Script::WithoutIds,
        Script::RefusesIds,
        Script::LosesThaw,
        Script::SharedLosesThaw,
        Script::OtherId,
        Script::LateAnswerOfAnother,
        Script::Shared,
        Script::AnswersLate(Duration::from_secs(5)),
    ];
    for script in willing {
        let (seen, frozen_max) = against(script).await;
        let report = seen.report.expect("settled");
        assert!(report.confirmed, "{script:?}: {report:?}");
        assert_eq!(seen.marked_while_frozen, Some(true), "{script:?}");
        assert!(frozen_max <= LIMIT, "{script:?}");
        let stored = seen.stored.expect("stored");
        assert!(stored.confirmed && stored.reason.is_empty());
        assert_eq!(stored.frozen, "/ /srv /var");
        assert_eq!(stored.skipped, "/boot/efi(vfat)");
        assert_eq!(stored.checkpoint, Lsn(5));
    }
}

#[tokio::test(start_paused = true)]
async fn agents_that_misbehave_are_thawed_in_time_and_the_point_says_why() {
    let s = Duration::from_secs;
    let cases = [
        (Script::AnswersLate(s(7)), "freezing: guest did not answer"),
        (Script::Hangs(s(7)), "freezing: guest did not answer"),
        (Script::Hangs(s(100)), "freezing: guest did not answer"),
        (Script::Garbage, "freezing: guest answered something else"),
        (Script::Zero, "guest froze nothing"),
        (Script::Fewer, "froze 3 file systems and thawed 2"),
        (
            Script::ThawError,
            "thawing: guest says: couldn't hold writes",
        ),
        (Script::LosesThaws, "thawing: guest did not answer"),
        (Script::CutFrozen, "freezing: guest closed the connection"),
        (
            Script::DiesFrozen(s(2)),
            "freezing: guest closed the connection",
        ),
    ];
    for (script, why) in cases {
        let (seen, frozen_max) = against(script).await;
        let report = seen.report.expect("settled");
        assert!(!report.confirmed, "{script:?}");
        let stored = seen.stored.expect("stored");
        assert!(
            !stored.confirmed && stored.reason.contains(why),
            "{script:?}: {stored:?}"
        );
        assert!(frozen_max <= LIMIT, "{script:?}: {frozen_max:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn agents_that_cannot_be_brought_in_step_are_never_frozen() {
    let cases = [
        (Script::Deaf, "getting in step"),
        (Script::WrongSync, "getting in step"),
        (Script::FrozenBefore, "frozen already"),
    ];
    for (script, why) in cases {
        let folder = tempfile::tempdir().expect("a folder");
        let intents = IntentFolder::open(folder.path()).expect("made");
        let path = folder.path().join("agent.sock");
        let (guest, server) = agent::start(&path, script);
        let seen = checkpoint(&intents, &[qga(&path)], &[Arc::clone(&guest)]).await;
        assert_eq!(guest.lock().expect("whole").freezes, 0, "{script:?}");
        let stored = seen.stored.expect("a point all the same");
        assert!(stored.reason.contains(why), "{script:?}: {stored:?}");
        {
            let mut guest = guest.lock().expect("whole");
            (guest.healed, guest.frozen_since) = (true, None);
        }
        let next = checkpoint(&intents, &[qga(&path)], &[Arc::clone(&guest)]).await;
        let report = next.report.expect("settled");
        assert!(report.confirmed, "the next after {script:?}: {report:?}");
        server.abort();
    }
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let nobody = qga(&folder.path().join("nobody.sock"));
    let seen = checkpoint(&intents, &[nobody], &[]).await;
    let reason = seen.stored.expect("a point").reason;
    assert!(reason.contains("cannot be reached"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_mount_point_that_is_not_there_is_not_left_out_without_a_word() {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let path = folder.path().join("agent.sock");
    let (guest, server) = agent::start(&path, Script::Good);
    for (mounts, why) in [(["/", "/srv/db"], Some("/srv/db")), (["/", "/srv"], None)] {
        let mut agent = qga(&path);
        agent.way = Way::Qga {
            socket: path.clone(),
            mounts: mounts.map(str::to_owned).to_vec(),
        };
        let seen = checkpoint(&intents, &[agent], &[Arc::clone(&guest)]).await;
        let stored = seen.stored.expect("a point all the same");
        assert_eq!(stored.confirmed, why.is_none(), "{stored:?}");
        assert!(
            stored.reason.contains(why.unwrap_or_default()),
            "{stored:?}"
        );
        let freezes = guest.lock().expect("whole").freezes;
        assert_eq!(freezes, u32::from(why.is_none()));
    }
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn of_several_guests_none_stays_frozen_when_one_fails() {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let scripts = [Script::Good, Script::CutFrozen, Script::Good];
    let paths = ["a", "b", "c"].map(|name| folder.path().join(name));
    let started = paths.iter().zip(scripts);
    let started: Vec<_> = started.map(|(path, s)| agent::start(path, s)).collect();
    let guests: Vec<Shared> = started.iter().map(|(guest, _)| Arc::clone(guest)).collect();
    let agents = paths.each_ref().map(|path| qga(path));
    for confirmed in [false, true] {
        let seen = checkpoint(&intents, &agents, &guests).await;
        assert_eq!(seen.report.expect("settled").confirmed, confirmed);
        for guest in &guests {
            let guest = guest.lock().expect("whole");
            assert!(guest.frozen_since.is_none() && guest.frozen_max <= LIMIT);
        }
    }
    started.iter().for_each(|(_, server)| server.abort());
}

#[tokio::test(start_paused = true)]
async fn a_watchdog_that_stays_waits_for_its_turn() {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    // One that a daemon started serves the folder; it ends by itself once it has nothing to do.
    let first = tokio::spawn(watchdog::serve(intents.clone(), false));
    tokio::task::yield_now().await;
    let stays = tokio::spawn(watchdog::serve(intents.clone(), true));
    let third = watchdog::serve(intents.clone(), false).await;
    third.expect("it leaves the folder to the first one");
    first
        .await
        .expect("no panic")
        .expect("it ends in good order");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!stays.is_finished(), "it went with the one before it");
    let again = watchdog::serve(intents, false).await;
    again.expect("it leaves the folder to the one that stays");
    stays.abort();
}

#[tokio::test(start_paused = true)]
async fn the_watchdog_thaws_when_the_daemon_is_gone_at_any_moment_and_only_then() {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let path = folder.path().join("agent.sock");
    // Somebody froze it for the intent, and is gone.
    let (guest, server) = agent::start(&path, Script::FrozenBefore);
    let intent = Intent::new("vm1", &[qga(&path)], Duration::from_secs(3600));
    let lock = intents.lock("vm1").expect("works");
    intents.store(&intent).expect("stored");
    let start = || {
        tokio::spawn(watchdog::serve(intents.clone(), true));
        Ok(())
    };
    let guard = watchdog::arm(&intents, &intent, start)
        .await
        .expect("armed");
    tokio::time::sleep(Duration::from_secs(100)).await;
    let frozen = || guest.lock().expect("whole").frozen_since.is_some();
    assert!(frozen(), "thawed under a living daemon");
    drop(lock);
    drop(guard);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!frozen(), "nobody thawed");
    assert!(!intents.holds(&intent));
    // An intent that nobody ever announced is seen to as well.
    guest.lock().expect("whole").frozen_since = Some(tokio::time::Instant::now());
    let other = Intent::new("vm1", &[qga(&path)], Duration::from_secs(3600));
    intents.store(&other).expect("stored");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!frozen() && !intents.holds(&other));
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn an_old_agent_that_was_left_frozen_is_thawed_without_ids() {
    let folder = tempfile::tempdir().expect("a folder");
    let intents = IntentFolder::open(folder.path()).expect("made");
    let path = folder.path().join("agent.sock");
    let (guest, server) = agent::start(&path, Script::RefusesIds);
    guest.lock().expect("whole").frozen_since = Some(Instant::now());
    let intent = Intent::new("vm1", &[qga(&path)], Duration::from_secs(3600));
    intents.store(&intent).expect("stored");
    let thawed = tokio::time::timeout(LIMIT, watchdog::thaw(&intents, &intent)).await;
    thawed.expect("within the limit");
    assert_eq!(guest.lock().expect("whole").frozen_since, None);
    assert!(!intents.holds(&intent));
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_daemon_hangs_when_it_is_silent_while_its_guest_has_to_be_thawed() {
    let pair = || {
        let (ours, theirs) = UnixStream::pair().expect("made");
        (BufReader::new(ours), theirs)
    };
    let begun = Instant::now();
    let (mut ours, mut theirs) = pair();
    theirs.write_all(b"freezing 8000\n").await.expect("written");
    let hangs = tokio::time::timeout(LIMIT * 10, watchdog::hangs(&mut ours)).await;
    assert_eq!(hangs, Ok(true), "silent and not noticed");
    let after = begun.elapsed();
    assert!(after > LIMIT * 9 / 10 && after < LIMIT, "{after:?}");
    // Silence before a freeze is nothing, and one that gives signs may take its time.
    let (mut ours, mut theirs) = pair();
    let watched = tokio::spawn(async move { watchdog::hangs(&mut ours).await });
    tokio::time::sleep(Duration::from_secs(60)).await;
    for line in [b"freezing 8000\n".as_slice()]
        .into_iter()
        .chain([b"alive\n".as_slice(); 100])
    {
        theirs.write_all(line).await.expect("written");
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    assert!(!watched.is_finished(), "a living daemon hangs");
    drop(theirs);
    assert!(!watched.await.expect("no panic"), "one that has gone hangs");
}

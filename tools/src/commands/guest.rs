//! `afterimage guest`: what can be known of a guest before it is frozen in earnest; and the
//! watchdog, which is a process of its own.

use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::Lsn;
use afterimage_proxy::checkpoint::agent::{Answer, Request, Trouble};
use afterimage_proxy::checkpoint::intent::{AgentSpec, IntentFolder, Way};
use afterimage_proxy::checkpoint::provider::Provider;
use afterimage_proxy::checkpoint::qga::{Description, Qga};
use afterimage_proxy::checkpoint::run::{Host, Step, run};
use afterimage_proxy::checkpoint::sequence::Report;
use afterimage_proxy::checkpoint::watchdog;
use anyhow::{Context as _, bail};
use serde::Serialize;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cli::output::Output;
use crate::config::Config;
use crate::freezer::{self, Freezer};

/// For each answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is known of a guest.
#[derive(Debug, Default, Serialize)]
struct Checked {
    group: String,
    agents: Vec<CheckedAgent>,
    /// Steps of a freeze and thaw, if that was asked for.
    dry_run: Vec<String>,
    /// What speaks against application-consistent checkpoints.
    problems: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct CheckedAgent {
    name: String,
    way: String,
    version: String,
    system: String,
    freezable: Vec<String>,
    skipped: Vec<String>,
    notes: Vec<String>,
}

/// `afterimage guest check`.
///
/// # Errors
/// Something speaks against application-consistent checkpoints.
pub fn check(config: &Config, group: &str, freeze: bool, output: Output) -> anyhow::Result<()> {
    let group = config
        .group(group)
        .with_context(|| format!("group '{group}' is not configured here"))?;
    if group.guest.is_empty() {
        bail!(
            "how the guest of '{}' is frozen is not configured: add a [[group.guest]] at {}",
            group.name,
            group.place
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut checked = Checked {
        group: group.name.clone(),
        ..Checked::default()
    };
    runtime.block_on(async {
        for agent in &group.guest {
            let (known, problems) = check_agent(agent, &group.name).await;
            checked.agents.push(known);
            checked.problems.extend(problems);
        }
        if freeze && checked.problems.is_empty() {
            let report = dry_run(config, group).await?;
            let step = |step: &afterimage_proxy::checkpoint::sequence::Step| {
                format!("{:>10.3} ms  {}", step.at.as_secs_f64() * 1e3, step.what)
            };
            checked.dry_run = report.steps.iter().map(step).collect();
            let reason = report.reason.map(|reason| reason.to_string());
            checked.problems.extend(reason);
        }
        anyhow::Ok(())
    })?;
    output.result(&checked, text)?;
    if !checked.problems.is_empty() {
        bail!("the guest is not ready for application-consistent checkpoints");
    }
    Ok(())
}

async fn check_agent(agent: &AgentSpec, group: &str) -> (CheckedAgent, Vec<String>) {
    let mut known = CheckedAgent {
        name: agent.name.clone(),
        ..CheckedAgent::default()
    };
    let mut problems = Vec::new();
    let mut provider = agent.provider(group, "check");
    let asked = match &agent.way {
        Way::Qga { socket, .. } => {
            known.way = format!("QEMU guest agent at {}", socket.display());
            ask_agent(&mut provider, &mut known, &mut problems).await
        }
        Way::Exec { freeze, thaw, .. } => {
            known.way = format!("commands: '{}', '{}'", freeze.join(" "), thaw.join(" "));
            for program in [freeze, thaw].into_iter().filter_map(|c| c.first()) {
                if program.starts_with('/') && !Path::new(program).exists() {
                    problems.push(format!("{}: {program} does not exist", agent.name));
                }
            }
            Ok(())
        }
    };
    if let Err(trouble) = asked {
        problems.push(format!("{}: the agent {trouble}", agent.name));
    }
    (known, problems)
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Trouble>>) -> Result<T, Trouble> {
    let answered = tokio::time::timeout(PATIENCE, answer).await;
    answered.unwrap_or(Err(Trouble::Timeout(PATIENCE)))
}

async fn ask_agent(
    provider: &mut Provider,
    known: &mut CheckedAgent,
    problems: &mut Vec<String>,
) -> Result<(), Trouble> {
    in_time(provider.ask(Request::Sync, || ())).await?;
    if let Provider::Qga(qga) = provider {
        let description = in_time(Qga::describe(qga)).await?;
        judge(&description, known, problems);
    }
    let status = in_time(provider.ask(Request::Status, || ())).await?;
    if status == (Answer::Status { frozen: true }) {
        problems.push(format!("{}: the guest is frozen now", known.name));
    }
    match in_time(provider.ask(Request::Survey, || ())).await {
        Ok(Answer::Survey(survey)) => {
            if survey.freezable.is_empty() {
                problems.push(format!("{}: no file system can be frozen", known.name));
            }
            if !survey.missing.is_empty() {
                problems.push(format!(
                    "{}: nothing is mounted at {}; mount it, or take it out of `mounts`",
                    known.name,
                    survey.missing.join(" ")
                ));
            }
            known.freezable = survey.freezable;
            known.skipped = survey.skipped;
        }
        Ok(_) => {}
        Err(trouble) => known.notes.push(format!("file systems: {trouble}")),
    }
    Ok(())
}

fn judge(description: &Description, known: &mut CheckedAgent, problems: &mut Vec<String>) {
    known.version.clone_from(&description.version);
    known.system.clone_from(&description.system);
    if !description.missing.is_empty() {
        problems.push(format!(
            "{}: switched off or missing in the agent: {}",
            known.name,
            description.missing.join(", ")
        ));
    }
    if description.windows {
        known.notes.push(
            "Windows: the agent makes full VSS backups unless VssOption=5 (COPY) is set in the \
             guest's registry, which breaks backup chains of SQL Server; it cannot be seen from \
             here (docs/guests/windows.md)"
                .to_owned(),
        );
    }
}

fn text(checked: &Checked) -> String {
    let mut text = String::new();
    for agent in &checked.agents {
        text += &format!("{} of {}: {}\n", agent.name, checked.group, agent.way);
        let version = format!("{} {}", agent.version, agent.system);
        for (what, value) in [
            ("version", version.trim().to_owned()),
            ("would freeze", agent.freezable.join(" ")),
            ("cannot freeze", agent.skipped.join(" ")),
            ("note", agent.notes.join("; ")),
        ] {
            if !value.is_empty() {
                text += &format!("  {what}: {value}\n");
            }
        }
    }
    for step in &checked.dry_run {
        text += &format!("{step}\n");
    }
    for problem in &checked.problems {
        text += &format!("problem: {problem}\n");
    }
    if checked.problems.is_empty() {
        text += "ready for application-consistent checkpoints\n";
    }
    text
}

/// Freezes and thaws without a checkpoint, as safely as with one.
async fn dry_run(config: &Config, group: &crate::config::GroupConfig) -> anyhow::Result<Report> {
    let freezer = Freezer::take(&config.guest_state, group)
        .with_context(|| format!("guest_state {}", config.guest_state.display()))?
        .context("the guest is being frozen or thawed already")?;
    let report = Arc::new(Mutex::new(None));
    let host = DryHost {
        freezer: freezer.clone(),
        report: Arc::clone(&report),
    };
    run(
        freezer::sequence(group),
        freezer.providers(),
        Arc::new(host),
    )
    .await;
    let report = report.lock().unwrap_or_else(PoisonError::into_inner).take();
    report.context("the freeze broke off")
}

/// A run whose checkpoint goes nowhere.
struct DryHost {
    freezer: Freezer,
    report: Arc<Mutex<Option<Report>>>,
}

impl Host for DryHost {
    fn write_intent(&self) -> Step<()> {
        let stored = self.freezer.store();
        Box::pin(async { stored })
    }

    fn arm_watchdog(&self) -> Step<()> {
        let freezer = self.freezer.clone();
        // Whoever reads our standard error waits for its end, not for the watchdog's.
        Box::pin(async move { freezer.arm(Stdio::null).await })
    }

    fn freezing(&self) {
        self.freezer.freezing();
    }

    fn alive(&self) {
        self.freezer.alive();
    }

    fn mark(&self) -> Step<Lsn> {
        Box::pin(async { Ok(Lsn::ZERO) })
    }

    fn store(&self, _: CheckpointConfirmBody) -> Step<()> {
        Box::pin(async { Ok(()) })
    }

    fn remove_intent(&self) {
        self.freezer.release();
    }

    fn settled(&self, report: Report) {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }
}

/// `afterimage guest-watchdog`.
///
/// # Errors
/// The folder cannot be used.
pub fn watchdog(state: &Path, stay: bool) -> anyhow::Result<()> {
    // Fails for the leader of a process group, which is as far away from the daemon.
    rustix::process::setsid().ok();
    crate::serve::tell();
    let folder = IntentFolder::open(state).with_context(|| state.display().to_string())?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(watchdog::serve(folder, stay))?;
    Ok(())
}

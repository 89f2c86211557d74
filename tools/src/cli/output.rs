//! What commands print: text or JSON on standard output, progress on standard error.
//!
//! Standard output carries the result and nothing else. Progress is drawn only on a terminal.

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use super::Global;

/// How a count without an end is drawn: without a bar that would be full, and a total that is wrong.
const COUNTER: &str = "{msg:18} {spinner} {pos:>10}   {elapsed}";

/// How a command talks.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
    quiet: bool,
    progress: bool,
}

impl Output {
    /// As the global options say.
    #[must_use]
    pub fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            quiet: global.quiet,
            progress: !global.quiet && !global.json && io::stderr().is_terminal(),
        }
    }

    /// Whether the result is one JSON document.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    ///
    /// # Errors
    /// When standard output cannot be written. A closed pipe is no error.
    pub fn result<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        let mut printed = if self.json {
            serde_json::to_string_pretty(value)?
        } else {
            text(value)
        };
        if !printed.ends_with('\n') {
            printed.push('\n');
        }
        Self::write(&printed)
    }

    /// Writes text as it is.
    ///
    /// # Errors
    /// When standard output cannot be written. A closed pipe is no error.
    pub fn write(text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        match stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
        {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    /// Tells how things go: on standard output, or nowhere when that carries JSON.
    pub fn note(&self, text: &str) {
        if !self.json {
            // Whoever closed the pipe does not want to know.
            let _ = Self::write(&format!("{text}\n"));
        }
    }

    /// Tells something beside the result, on standard error.
    pub fn aside(&self, text: &str) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Warns on standard error, whatever else is printed.
    pub fn warn(&self, text: &str) {
        let _ = writeln!(io::stderr(), "warning: {text}");
    }

    /// A bar that counts bytes up to `total`.
    #[must_use]
    pub fn bytes_bar(&self, what: &'static str, total: u64) -> ProgressBar {
        let style = "{msg:18} {bar:30} {bytes:>10} of {total_bytes} {bytes_per_sec:>12} {eta:>4}";
        self.bar(what, total, style)
    }

    /// A bar that counts things up to `total`.
    #[must_use]
    pub fn count_bar(&self, what: &'static str, total: u64) -> ProgressBar {
        self.bar(what, total, "{msg:18} {bar:30} {pos:>10} of {len} {eta:>4}")
    }

    /// Counts things of which nobody knows how many there are.
    #[must_use]
    pub fn counter(&self, what: &'static str) -> ProgressBar {
        self.bar(what, 0, COUNTER)
    }

    fn bar(&self, what: &'static str, total: u64, style: &str) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total).with_message(what);
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// A table with a header, without lines: easy to read and to cut.
#[must_use]
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().copied());
    table
}

/// A table as text, without blanks at the ends of its lines.
#[must_use]
pub fn table_text(table: &Table) -> String {
    table
        .lines()
        .map(|line| line.trim().to_owned() + "\n")
        .collect()
}

/// Bytes for people.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).to_string()
}

/// A duration for people: two units at most.
#[must_use]
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// Local time for people; the exact instant is in the JSON.
#[must_use]
pub fn local_time(wall_ns: u64) -> String {
    match timestamp(wall_ns) {
        Some(time) => time
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%F %T%.3f")
            .to_string(),
        None => "?".to_owned(),
    }
}

/// Nanoseconds since 1970 as a timestamp.
#[must_use]
pub fn timestamp(wall_ns: u64) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(wall_ns)).ok()
}

/// How long ago that was, for people.
#[must_use]
pub fn age(wall_ns: u64, now: Timestamp) -> String {
    match timestamp(wall_ns) {
        Some(time) => match Duration::try_from(now.duration_since(time)) {
            Ok(age) => duration(age),
            Err(_) if now.duration_since(time) > SignedDuration::from_secs(-2) => {
                duration(Duration::ZERO)
            }
            Err(_) => "in the future".to_owned(),
        },
        None => "?".to_owned(),
    }
}

/// An error and its causes in one line; a cause that the message before it tells already is left out.
#[must_use]
pub fn reason(error: &anyhow::Error) -> String {
    let mut said = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !said.contains(&cause) {
            said += ": ";
            said += &cause;
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::anyhow!("no space").context("x: no space; make room");
        let error = error.context("cannot restore");
        assert_eq!(reason(&error), "cannot restore: x: no space; make room");
    }

    #[test]
    fn durations_are_short() {
        for (milliseconds, text) in [
            (7, "7 ms"),
            (1500, "1.5 s"),
            (61_000, "1 min 1 s"),
            (7_380_000, "2 h 3 min"),
            (180_000_000, "2 d 2 h"),
        ] {
            assert_eq!(duration(Duration::from_millis(milliseconds)), text);
        }
    }
}

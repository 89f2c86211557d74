//! How far the comparison of a group with its primary's verify records is.

use std::sync::{Mutex, PoisonError};

use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::wire::Comparisons;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, Notify, watch};

/// The first record that was not looked at lies behind this one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Place {
    /// Epoch of the last record that was.
    pub epoch: Epoch,
    /// Its LSN.
    pub lsn: Lsn,
    /// No segment of the epoch before this one has a record that was not looked at.
    pub sequence: u64,
}

#[derive(Debug, Default)]
struct State {
    /// `None` until what was kept of earlier comparisons has been read.
    place: Option<Place>,
    /// When a run last found every block to be the same, nanoseconds since 1970; 0 for never.
    whole_ns: u64,
    /// What differs, until a run finds that nothing does.
    alarm: Option<String>,
}

/// The comparison of one group in this process. Whoever compares moves it on; everybody may look.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Held by the one who compares.
    turn: AsyncMutex<()>,
    state: Mutex<State>,
    shown: watch::Sender<Comparisons>,
    more: Notify,
}

impl Comparison {
    /// What it has come to. Whoever begins to watch has seen nothing yet.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Comparisons> {
        let mut shown = self.shown.subscribe();
        let Comparisons {
            finished, current, ..
        } = *shown.borrow();
        if (finished.run, current.run) != (0, 0) {
            shown.mark_changed();
        }
        shown
    }

    /// What it has come to, as of now.
    #[must_use]
    pub fn now(&self) -> Comparisons {
        *self.shown.borrow()
    }

    /// When a run last found every block to be the same, nanoseconds since 1970, 0 for never; `None`
    /// while nobody has compared in this process.
    #[must_use]
    pub fn whole_ns(&self) -> Option<u64> {
        let state = self.state();
        state.place.map(|_| state.whole_ns)
    }

    /// What differs, for people.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        self.state().alarm.clone()
    }

    /// Waits for one's turn to compare: nothing is counted twice.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    pub(crate) fn place(&self) -> Option<Place> {
        self.state().place
    }

    /// What was kept is known.
    pub(crate) fn begin(&self, place: Place, whole_ns: u64) {
        let mut state = self.state();
        (state.place, state.whole_ns) = (Some(place), whole_ns);
    }

    pub(crate) fn set_alarm(&self, alarm: Option<String>) {
        self.state().alarm = alarm;
    }

    pub(crate) fn set_whole(&self, now_ns: u64) {
        self.state().whole_ns = now_ns;
    }

    /// Everything up to there was looked at. With `news` the primary is told in any case, else when
    /// the next record is acknowledged.
    pub(crate) fn advance(&self, place: Place, comparisons: Comparisons, news: bool) {
        self.state().place = Some(place);
        self.shown.send_if_modified(|shown| {
            let same =
                (shown.finished, shown.current) == (comparisons.finished, comparisons.current);
            *shown = comparisons;
            news || !same
        });
    }

    /// Segments have come.
    pub(crate) fn tell(&self) {
        self.more.notify_one();
    }

    /// Waits until some have come, perhaps before this was called.
    pub(crate) async fn told(&self) {
        self.more.notified().await;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! How far the comparison of a group with its primary's verify records is.

use std::sync::{Mutex, PoisonError};

use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::wire::Compared;
use tokio::sync::{Notify, watch};

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

/// The comparison of one group in this process. Whoever compares moves it on; everybody may look.
#[derive(Debug, Default)]
pub struct Comparison {
    /// `None` until what was kept of earlier comparisons has been read.
    place: Mutex<Option<Place>>,
    shown: watch::Sender<Compared>,
    more: Notify,
}

impl Comparison {
    /// What came of the newest run so far.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Compared> {
        self.shown.subscribe()
    }

    pub(crate) fn place(&self) -> Option<Place> {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything up to there was looked at.
    pub(crate) fn advance(&self, place: Place, compared: Compared) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
        self.shown.send_if_modified(|shown| {
            let news = *shown != compared;
            *shown = compared;
            news
        });
    }

    /// Verify records have come.
    pub(crate) fn tell(&self) {
        self.more.notify_one();
    }

    /// Waits until some have come, perhaps before this was called.
    pub(crate) async fn told(&self) {
        self.more.notified().await;
    }
}

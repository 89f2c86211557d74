//! The comparison of a group beside a session: it advances while the session waits.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use afterimage_format::wire::Compared;
use tokio::sync::watch;

use super::NowNs;
use super::session::Session;
use crate::compare;

/// Follows the verify records of one group.
pub(super) struct Comparing {
    following: Pin<Box<dyn Future<Output = Infallible> + Send>>,
    shown: watch::Receiver<Compared>,
}

impl Comparing {
    /// Beside this session.
    pub(super) fn beside(session: &Session, now: NowNs) -> Self {
        let group = session.group().clone();
        Self {
            shown: group.comparison().watch(),
            following: Box::pin(compare::follow(group, now)),
        }
    }

    /// Advances; ready when there is something to be told to the primary.
    pub(super) fn poll_news(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Poll::Ready(never) = self.following.as_mut().poll(context) {
            match never {}
        }
        if self.shown.has_changed().unwrap_or(false) {
            self.shown.mark_unchanged();
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// As [`Comparing::poll_news`]. The wait may be dropped.
    pub(super) async fn news(&mut self) {
        poll_fn(|context| self.poll_news(context)).await;
    }
}

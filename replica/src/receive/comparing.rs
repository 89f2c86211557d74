//! The comparison of a group beside a session: it advances while the session waits, on a thread of
//! its own where the runtime has several, so that it holds up no segment.

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use afterimage_format::wire::Comparisons;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::NowNs;
use super::session::Session;
use crate::aside::has_threads;
use crate::compare;

/// Follows the verify records of one group; ends with the session.
pub(super) struct Comparing {
    following: Pin<Box<dyn Future<Output = Infallible> + Send>>,
    news: Pin<Box<dyn Future<Output = watch::Receiver<Comparisons>> + Send>>,
}

impl Comparing {
    /// Beside this session.
    pub(super) fn beside(session: &Session, now: NowNs) -> Self {
        let group = session.group().clone();
        let news = next(group.comparison().watch());
        let following = compare::follow(group, now);
        Self {
            following: match has_threads() {
                true => Box::pin(spawned(following)),
                false => Box::pin(following),
            },
            news,
        }
    }

    /// Advances; ready when there is something to be told to the primary.
    pub(super) fn poll_news(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Poll::Ready(never) = self.following.as_mut().poll(context) {
            match never {}
        }
        match self.news.as_mut().poll(context) {
            Poll::Ready(shown) => {
                self.news = next(shown);
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// As [`Comparing::poll_news`]. The wait may be dropped.
    pub(super) async fn news(&mut self) {
        poll_fn(|context| self.poll_news(context)).await;
    }
}

fn next(
    mut shown: watch::Receiver<Comparisons>,
) -> Pin<Box<dyn Future<Output = watch::Receiver<Comparisons>> + Send>> {
    Box::pin(async move {
        match shown.changed().await {
            Ok(()) => shown,
            // The group is gone, and its session with it.
            Err(_) => pending().await,
        }
    })
}

async fn spawned(following: impl Future<Output = Infallible> + Send + 'static) -> Infallible {
    match AbortOnDropHandle::new(tokio::spawn(following)).await {
        Ok(never) => match never {},
        Err(error) => {
            tracing::error!(%error, "comparing broke off; it goes on with the next session");
            pending().await
        }
    }
}

//! Memory for segments that are announced and not yet committed, shared by all connections of a
//! receiver.
//!
//! Owns the count, the queue for it and whom to cut off. Always holds: at most `limit` bytes are
//! given, and whoever asks is served in turn; bodies of up to [`OWN_BYTES`] need none of it. The
//! first of the queue waits for `patience` at most: then as many bodies as it needs are cut off,
//! those that came slowest. Each of them has had its room for that long by then, since nobody
//! overtakes the queue. So a peer that trickles keeps nobody waiting for ever, and a slow one is let
//! be while there is room for others, or others make some.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// A body up to this length is read whoever has what, so that everybody is greeted and small
/// segments always come through.
pub(super) const OWN_BYTES: usize = 64 * 1024;

/// The room of a receiver.
#[derive(Debug)]
pub(super) struct Room {
    limit: usize,
    patience: Duration,
    free: Arc<Semaphore>,
    /// Held by the first of the queue.
    turn: AsyncMutex<()>,
    /// Bodies that come in.
    coming: Mutex<Vec<Arc<Coming>>>,
}

/// A body that comes in.
#[derive(Debug)]
struct Coming {
    bytes: u32,
    since: Instant,
    came: AtomicU64,
    cut_off: CancellationToken,
}

impl Coming {
    /// Bytes per second since it got its room, times 1024.
    fn pace(&self, now: Instant) -> u128 {
        let held = now.saturating_duration_since(self.since).as_micros().max(1);
        (u128::from(self.came.load(Ordering::Relaxed)) * 1_024_000_000) / held
    }
}

/// Room for a body that is read at present.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    coming: Arc<Coming>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Share {
    fn drop(&mut self) {
        let coming = &self.coming;
        self.room
            .coming()
            .retain(|other| !Arc::ptr_eq(other, coming));
    }
}

impl Share {
    /// The body has come: nobody can be cut off for it any more. What is left is to be held until
    /// it has been committed.
    pub(super) fn filled(mut self) -> Option<OwnedSemaphorePermit> {
        self.permit.take()
    }

    /// Completes when others need the room and this body came slowest.
    pub(super) async fn cut_off(&self) {
        self.coming.cut_off.cancelled().await;
    }

    /// Counts what is read from `stream` as of this body.
    pub(super) fn counting<R>(&self, stream: R) -> Counting<'_, R> {
        Counting {
            stream,
            came: &self.coming.came,
        }
    }
}

impl Room {
    /// `limit` bytes, for which nobody waits longer than `patience` as the first of the queue while
    /// peers that stall have them.
    pub(super) fn new(limit: usize, patience: Duration) -> Self {
        let limit = limit.min(u32::MAX as usize);
        Self {
            limit,
            patience,
            free: Arc::new(Semaphore::new(limit)),
            turn: AsyncMutex::new(()),
            coming: Mutex::default(),
        }
    }

    /// Room for a body of this length; what is longer than all there is gets all of it.
    pub(super) async fn take(self: &Arc<Self>, bytes: usize) -> Share {
        let wanted = bytes.min(self.limit) as u32;
        let permit = match bytes <= OWN_BYTES {
            true => None,
            // Nobody closes it.
            false => self.wait_for(wanted).await,
        };
        let coming = Arc::new(Coming {
            bytes: permit.as_ref().map_or(0, |_| wanted),
            since: Instant::now(),
            came: AtomicU64::new(0),
            cut_off: CancellationToken::new(),
        });
        if permit.is_some() {
            self.coming().push(coming.clone());
        }
        Share {
            room: self.clone(),
            coming,
            permit,
        }
    }

    async fn wait_for(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        let _turn = self.turn.lock().await;
        let mut free = std::pin::pin!(self.free.clone().acquire_many_owned(bytes));
        loop {
            match timeout(self.patience, &mut free).await {
                Ok(permit) => return permit.ok(),
                Err(_) => self.cut_off_slowest(bytes),
            }
        }
    }

    /// Cuts off whoever came slowest, until `bytes` will be free.
    fn cut_off_slowest(&self, bytes: u32) {
        let now = Instant::now();
        let mut coming = self.coming().clone();
        coming.sort_by_key(|body| body.pace(now));
        let mut freed = 0;
        for body in coming {
            if freed >= bytes {
                return;
            }
            freed = freed.saturating_add(body.bytes);
            body.cut_off.cancel();
        }
    }

    fn coming(&self) -> MutexGuard<'_, Vec<Arc<Coming>>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream whose bytes are counted.
pub(super) struct Counting<'a, R> {
    stream: R,
    came: &'a AtomicU64,
}

impl<R> AsyncRead for Counting<'_, R>
where
    R: AsyncRead + Unpin,
{
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        self.came.fetch_add(count as u64, Ordering::Relaxed);
        polled
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::io::AsyncReadExt;

    use super::*;

    const PART: usize = OWN_BYTES + 1;

    #[tokio::test]
    async fn room_is_given_in_turn_and_comes_back() {
        let room = Arc::new(Room::new(2 * PART, Duration::MAX));
        let first = room.take(PART).await;
        let second = room.take(PART).await.filled().expect("room of its own");
        let mut all = Box::pin(room.take(100 * PART));
        assert!(all.as_mut().now_or_never().is_none(), "none is left");
        let mut behind = Box::pin(room.take(PART));
        drop(second);
        assert!(all.as_mut().now_or_never().is_none(), "half of it is");
        assert!(behind.as_mut().now_or_never().is_none(), "in turn");
        let small = room.take(OWN_BYTES).now_or_never();
        assert!(small.is_some_and(|share| share.filled().is_none()));
        drop(first);
        let all = all.await;
        assert!(behind.as_mut().now_or_never().is_none(), "none is left");
        drop(all);
        behind.await;
    }

    #[tokio::test]
    async fn the_slowest_make_room() {
        let room = Arc::new(Room::new(4 * PART, Duration::from_millis(1)));
        let shares = [
            room.take(PART).await,
            room.take(PART).await,
            room.take(PART).await,
        ];
        let being_committed = room.take(PART).await.filled();
        for (share, came) in shares.iter().zip([1, PART, 2]) {
            let body = vec![0; came];
            let mut stream = share.counting(&body[..]);
            stream.read_to_end(&mut Vec::new()).await.expect("read");
        }
        let mut waits = Box::pin(room.take(2 * PART));
        let [slowest, fast, slow] = shares;
        tokio::select! {
            biased;
            () = async { slowest.cut_off().await; slow.cut_off().await } => {}
            _ = &mut waits => panic!("nothing is free"),
        }
        assert!(fast.cut_off().now_or_never().is_none());
        drop((slowest, slow));
        waits.await;
        drop((fast, being_committed));
    }
}

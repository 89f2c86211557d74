//! The sink that is a repository written by this very process: `file:` and `s3:` targets.
//!
//! Nothing is spawned for the commits: they, and the comparison of verify records, advance while
//! somebody waits for an acknowledgement. A wait may be dropped; what is under way is kept and goes
//! on with the next wait.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use afterimage_format::wire::{Ack, ErrorCode, Hello, HelloReply, RemoteError};
use afterimage_proxy::ship::BoxFuture;
use afterimage_proxy::ship::sink::{Sink, SinkConnection, SinkError};
use bytes::Bytes;

use super::comparing::Comparing;
use super::error::IngestError;
use super::peer::Peer;
use super::place::Place;
use super::session::{Session, Verified};
use super::{NowNs, Receiver};

/// A repository as a sink. It is opened when the first connection is: a repository that is away
/// is a target that is away.
pub struct DirectSink {
    place: Arc<Place>,
    now: NowNs,
}

impl DirectSink {
    /// The sink of this repository.
    #[must_use]
    pub const fn new(place: Arc<Place>, now: NowNs) -> Self {
        Self { place, now }
    }
}

impl Sink for DirectSink {
    fn url(&self) -> &str {
        self.place.url()
    }

    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn SinkConnection>, SinkError>> {
        Box::pin(async move {
            let receiver = self.place.receiver().await;
            let receiver = receiver.map_err(|error| refused(self.url(), &error.into()))?;
            Ok(Box::new(DirectConnection {
                url: self.url().to_owned(),
                receiver: receiver.clone(),
                now: self.now.clone(),
                session: None,
                waiting: VecDeque::new(),
                commit: None,
                comparing: None,
            }) as Box<dyn SinkConnection>)
        })
    }
}

fn refused(url: &str, error: &IngestError) -> SinkError {
    SinkError::Refused {
        peer: url.to_owned(),
        cause: error.to_remote(),
    }
}

type Commit = Pin<Box<dyn Future<Output = (Session, Result<Ack, IngestError>)> + Send>>;

/// What a wait for an acknowledgement ended with.
enum Ended {
    Commit(Session, Result<Ack, IngestError>),
    /// Comparing has come on.
    News(Ack),
}

struct DirectConnection {
    url: String,
    receiver: Receiver,
    now: NowNs,
    /// None before the hello, and while a commit has it.
    session: Option<Session>,
    waiting: VecDeque<Bytes>,
    commit: Option<Commit>,
    comparing: Option<Comparing>,
}

impl DirectConnection {
    /// The commit under way, or one of the next segment that waits.
    fn next_commit(&mut self) -> Option<&mut Commit> {
        if self.commit.is_none()
            && let Some(mut session) = self.session.take_if(|_| !self.waiting.is_empty())
            && let Some(bytes) = self.waiting.pop_front()
        {
            let now = self.now.clone();
            self.commit = Some(Box::pin(async move {
                let accepted = match Verified::check_aside(bytes).await {
                    Ok(verified) => session.accept(verified, now()).await,
                    Err(error) => Err(error),
                };
                (session, accepted)
            }));
        }
        self.commit.as_mut()
    }
}

impl SinkConnection for DirectConnection {
    fn hello(&mut self, hello: Hello) -> BoxFuture<'_, Result<HelloReply, SinkError>> {
        Box::pin(async move {
            let opened = self
                .receiver
                .hello(&hello, &Peer::Direct, (self.now)())
                .await;
            let opened = opened.map_err(|error| refused(&self.url, &error))?;
            let session = opened.session.as_ref();
            self.comparing = session.map(|session| Comparing::beside(session, self.now.clone()));
            self.session = opened.session;
            Ok(opened.reply)
        })
    }

    fn send(&mut self, segment: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        self.waiting.push_back(segment);
        Box::pin(async { Ok(()) })
    }

    fn ack(&mut self) -> BoxFuture<'_, Result<Ack, SinkError>> {
        Box::pin(async move {
            if self.next_commit().is_none() && self.session.is_none() {
                let cause = RemoteError {
                    code: ErrorCode::Protocol,
                    text: "no session: the last segment was refused, or no hello was said".into(),
                };
                return Err(SinkError::Refused {
                    peer: self.url.clone(),
                    cause,
                });
            }
            let ended = poll_fn(|context| {
                if let Some(commit) = self.commit.as_mut()
                    && let Poll::Ready(ended) = commit.as_mut().poll(context)
                {
                    return Poll::Ready(Ended::Commit(ended.0, ended.1));
                }
                match (
                    self.comparing.as_mut().map(|c| c.poll_news(context)),
                    &self.session,
                ) {
                    // While a commit has the session, its acknowledgement brings the news.
                    (Some(Poll::Ready(())), Some(session)) => {
                        Poll::Ready(Ended::News(session.ack()))
                    }
                    _ => Poll::Pending,
                }
            });
            let (session, accepted) = match ended.await {
                Ended::Commit(session, accepted) => (session, accepted),
                Ended::News(ack) => return Ok(ack),
            };
            self.commit = None;
            match accepted {
                Ok(ack) => {
                    self.session = Some(session);
                    Ok(ack)
                }
                Err(error) => {
                    self.waiting.clear();
                    Err(refused(&self.url, &error))
                }
            }
        })
    }
}

//! The simulated network between the shipping task and the replica: streams with a pump in between
//! that delays, holds, swallows, cuts, or delivers once more.

use super::faults::Fault;
use super::trace;
use afterimage_proxy::io::sim::SimRng;
use afterimage_proxy::ship::BoxFuture;
use afterimage_proxy::ship::remote::{Connection, RemoteTimes};
use afterimage_proxy::ship::sink::{Sink, SinkConnection, SinkError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::watch;

/// Bytes that each end of a connection may be ahead.
const PIPE_BYTES: usize = 16 << 10;

/// State of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Up,
    /// Nothing arrives any more, and nobody is told.
    HalfOpen,
    /// Towards the replica: what was sent arrives only when this is over.
    Held,
    /// Only the replica's answers are swallowed.
    Deaf,
    Cut,
}

struct Wire {
    link: watch::Sender<Link>,
    /// Everything the primary said, for saying it again.
    said: Arc<Mutex<Vec<u8>>>,
}

struct State {
    rng: SimRng,
    refused: bool,
    slow: bool,
    wires: Vec<Wire>,
    arrivals: Vec<DuplexStream>,
}

/// The network. Clones share it.
#[derive(Clone)]
pub struct Net {
    state: Arc<Mutex<State>>,
    url: Arc<str>,
    times: RemoteTimes,
}

impl Net {
    /// A network that works.
    #[must_use]
    pub fn new(seed: u64, url: &str, times: RemoteTimes) -> Self {
        let state = State {
            rng: SimRng::new(seed),
            refused: false,
            slow: false,
            wires: Vec::new(),
            arrivals: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            url: url.into(),
            times,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that the replica has not taken yet.
    #[must_use]
    pub fn arrivals(&self) -> Vec<DuplexStream> {
        std::mem::take(&mut self.state().arrivals)
    }

    /// New connections are refused, or no longer.
    pub fn set_refused(&self, refused: bool) {
        self.state().refused = refused;
    }

    /// Bytes take their time, or no longer.
    pub fn set_slow(&self, slow: bool) {
        self.state().slow = slow;
    }

    fn newest(&self, link: Link) -> bool {
        let state = self.state();
        let up = state
            .wires
            .iter()
            .rev()
            .find(|wire| *wire.link.borrow() == Link::Up);
        if let Some(wire) = up {
            wire.link.send_replace(link);
        }
        up.is_some()
    }

    /// Every connection is cut.
    pub fn cut_all(&self) -> bool {
        let wires = std::mem::take(&mut self.state().wires);
        let mut any = false;
        for wire in &wires {
            any |= *wire.link.borrow() != Link::Cut;
            wire.link.send_replace(Link::Cut);
        }
        any
    }

    /// The newest connection goes silent.
    pub fn half_open(&self) -> bool {
        self.newest(Link::HalfOpen)
    }

    /// What is said on the newest connection is held back, also when it has ended.
    pub fn hold(&self) -> bool {
        self.newest(Link::Held)
    }

    /// What was held back arrives.
    pub fn release(&self) -> bool {
        let state = self.state();
        let mut any = false;
        for wire in &state.wires {
            any |= wire.link.send_if_modified(|link| {
                let held = *link == Link::Held;
                if held {
                    *link = Link::Up;
                }
                held
            });
        }
        any
    }

    /// The replica's answers on the newest connection no longer arrive.
    pub fn deafen(&self) -> bool {
        self.newest(Link::Deaf)
    }

    /// Whether a connection is up on which answers do not arrive.
    #[must_use]
    pub fn is_deaf(&self) -> bool {
        self.state()
            .wires
            .iter()
            .any(|wire| *wire.link.borrow() == Link::Deaf)
    }

    /// Everything that was said on an old connection arrives once more, as a connection.
    pub fn duplicate(&self) -> bool {
        let mut state = self.state();
        let said = {
            let ended = state.wires.iter().rev().nth(1);
            let Some(wire) = ended else { return false };
            wire.said
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        };
        if said.is_empty() {
            return false;
        }
        let (mut ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        state.arrivals.push(theirs);
        tokio::spawn(async move {
            if ours.write_all(&said).await.is_ok() {
                let (mut answers, rest) = tokio::io::split(ours);
                let mut buffer = [0; 512];
                while answers.read(&mut buffer).await.is_ok_and(|got| got > 0) {}
                drop(rest);
            }
        });
        true
    }

    fn open(&self) -> Result<Box<dyn SinkConnection>, SinkError> {
        let mut state = self.state();
        if state.refused {
            trace::count(Fault::NetRefused);
            let cause = Arc::new(std::io::ErrorKind::ConnectionRefused.into());
            return Err(SinkError::Connect {
                peer: self.url.to_string(),
                cause,
            });
        }
        let (primary, near) = tokio::io::duplex(PIPE_BYTES);
        let (far, replica) = tokio::io::duplex(PIPE_BYTES);
        let (near_reads, near_writes) = tokio::io::split(near);
        let (far_reads, far_writes) = tokio::io::split(far);
        let (link, seen) = watch::channel(Link::Up);
        let said = Arc::new(Mutex::new(Vec::new()));
        let mut pump = |up: bool| Pump {
            link: seen.clone(),
            rng: SimRng::new(state.rng.next_u64()),
            slow: state.slow,
            up,
            said: said.clone(),
        };
        let (there, back) = (pump(true), pump(false));
        tokio::spawn(there.run(near_reads, far_writes));
        tokio::spawn(back.run(far_reads, near_writes));
        state.wires.push(Wire { link, said });
        state.arrivals.push(replica);
        let connection = Connection::start(self.url.to_string(), primary, self.times);
        Ok(Box::new(connection))
    }
}

impl Sink for Net {
    fn url(&self) -> &str {
        &self.url
    }

    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn SinkConnection>, SinkError>> {
        Box::pin(async { self.open() })
    }
}

struct Pump {
    link: watch::Receiver<Link>,
    rng: SimRng,
    slow: bool,
    /// Towards the replica.
    up: bool,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Pump {
    async fn run(mut self, mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>) {
        let mut buffer = vec![0; 8 << 10];
        loop {
            let got = tokio::select! {
                biased;
                _ = self.link.wait_for(|link| *link == Link::Cut) => return,
                got = from.read(&mut buffer) => got.unwrap_or(0),
            };
            if !self.may_pass().await {
                return;
            }
            if got == 0 {
                let _ = to.shutdown().await;
                return;
            }
            if self.slow && self.rng.chance(3000) {
                trace::count(Fault::NetDelay);
                let wait = 1 + self.rng.below(20);
                tokio::time::sleep(Duration::from_millis(wait)).await;
            }
            if self.up {
                let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                said.extend_from_slice(&buffer[..got]);
            }
            let written = tokio::select! {
                biased;
                _ = self.link.wait_for(|link| *link == Link::Cut) => return,
                written = to.write_all(&buffer[..got]) => written,
            };
            if written.is_err() {
                return;
            }
        }
    }

    /// Waits while the connection does not let this through. False: it never will.
    async fn may_pass(&mut self) -> bool {
        let up = self.up;
        let through = |link: &Link| match link {
            Link::Up | Link::Cut => true,
            Link::HalfOpen => false,
            Link::Held => !up,
            Link::Deaf => up,
        };
        match self.link.wait_for(through).await {
            Ok(link) => *link != Link::Cut,
            Err(_) => false,
        }
    }
}

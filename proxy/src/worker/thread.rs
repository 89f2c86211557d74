//! The loop of one worker thread: one io_uring for the storage and the sockets of its groups.
//!
//! A turn: one `io_uring_enter` submits everything queued in the last turn and takes what has
//! completed; then each group that something happened to gets its turn (completions, requests of
//! its connections, one tick of the engine, replies, next sends and receives). A thread without
//! work sleeps in `io_uring_enter` without a timeout; it has one only when an engine has a
//! deadline, or a client owes something: the rest of a payload, memory that others wait for.

use super::connection::Connection;
use super::group::{Group, Quiescing};
use super::mailbox::{Mailbox, Postbox};
use super::message::{
    Attachment, Command, GroupKey, GroupSnapshot, Message, NewGroup, SinkBacklog,
};
use crate::engine::Engine;
use crate::engine::request::{Now, Reply, RequestError};
use crate::io::Token;
use crate::io::socket::{SocketBuffers, SocketCompletion, Sockets};
use crate::io::storage::UringStorage;
use crate::io::uring::{Uring, Wait};
use crate::nbd::session::Session;
use rustix::time::{ClockId, clock_gettime};
use slab::Slab;
use std::io;
use std::time::Duration;
use tokio::sync::oneshot;

/// A gone client that still has answers to take (half-closed) is waited for so long.
const QUIESCE_NS: u64 = 5_000_000_000;
/// How long the thread looks for news before it sleeps, after it was busy with a client.
const SPIN_NS: u64 = 30_000;
/// No deadline.
const NEVER: u64 = u64::MAX;

const WAKE: Token = Token(0);
const RECEIVE: u64 = 1 << 62;
const SEND: u64 = 2 << 62;
const KIND_MASK: u64 = 3 << 62;

pub(super) struct Worker {
    uring: Uring,
    sockets: Sockets,
    mailbox: Mailbox<Message>,
    postbox: Postbox<Message>,
    groups: Slab<Group>,
    /// Group of each storage, by its number on the ring.
    group_of_client: Vec<usize>,
    /// When each group's engine wants a tick without news, by the group's number.
    deadlines: Vec<u64>,
    connections: Slab<Connection>,
    touched: Vec<GroupKey>,
    /// When clients are looked at that owe something; `NEVER` while none does.
    stall_check_ns: u64,
    /// When those who are waited for by a quiesce are ended; `NEVER` while nobody is.
    quiesce_check_ns: u64,
    /// A client was served in the last turn.
    busy: bool,
    ending: bool,
    completions: Vec<SocketCompletion>,
    clients: Vec<usize>,
    replies: Vec<Reply>,
}

/// The clocks as the engine wants them.
pub(super) fn now() -> Now {
    let read = |clock| {
        let time = clock_gettime(clock);
        u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000
            + u64::try_from(time.tv_nsec).unwrap_or_default()
    };
    Now {
        monotonic_ns: read(ClockId::Monotonic),
        wall_ns: read(ClockId::Realtime),
        boottime_ns: read(ClockId::Boottime),
    }
}

fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or_default()
}

impl Worker {
    pub(super) fn new(uring: Uring, mailbox: Mailbox<Message>, postbox: Postbox<Message>) -> Self {
        uring.set_driven(true);
        let sockets = Sockets::new(&uring);
        sockets.wait_event(WAKE, mailbox.eventfd());
        Self {
            uring,
            sockets,
            mailbox,
            postbox,
            groups: Slab::new(),
            group_of_client: Vec::new(),
            deadlines: Vec::new(),
            connections: Slab::new(),
            touched: Vec::new(),
            stall_check_ns: NEVER,
            quiesce_check_ns: NEVER,
            busy: false,
            ending: false,
            completions: Vec::new(),
            clients: Vec::new(),
            replies: Vec::new(),
        }
    }

    /// Runs until the last message was `End`.
    ///
    /// # Errors
    /// The io_uring failed: nothing on this thread can go on.
    pub(super) fn run(mut self) -> io::Result<()> {
        while !self.ending {
            self.enter()?;
            let now = now();
            self.busy = false;
            self.take_socket_completions();
            while let Some(message) = self.mailbox.take() {
                self.receive(now, message);
            }
            self.touch_ready();
            self.touch_due(now.monotonic_ns);
            let mut touched = std::mem::take(&mut self.touched);
            for group in touched.drain(..) {
                self.turn(group, now);
            }
            debug_assert!(self.touched.is_empty());
            self.touched = touched;
        }
        let groups: Vec<GroupKey> = self.groups.iter().map(|(key, _)| key).collect();
        for key in groups {
            self.remove(key);
        }
        Ok(())
    }

    /// Submits, and waits as long as nothing is due.
    fn enter(&mut self) -> io::Result<()> {
        if self.uring.enter(Wait::No)? > 0 || !self.mailbox.is_empty() {
            return Ok(());
        }
        let start = monotonic_ns();
        if self.busy && !self.waits_for_device() {
            // A client that waits for each answer sends its next request within microseconds.
            while monotonic_ns() < start + SPIN_NS {
                if self.uring.has_completions() || !self.mailbox.is_empty() {
                    self.uring.enter(Wait::No)?;
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let engines = self.deadlines.iter().copied().min().unwrap_or(NEVER);
        let wait = match engines.min(self.stall_check_ns).min(self.quiesce_check_ns) {
            NEVER => Wait::Forever,
            due if due <= start => Wait::No,
            due => Wait::For(Duration::from_nanos(due - start)),
        };
        if wait != Wait::No && self.mailbox.prepare_sleep() {
            self.uring.enter(wait)?;
            self.mailbox.awake();
        }
        Ok(())
    }

    fn waits_for_device(&self) -> bool {
        self.groups
            .iter()
            .any(|(_, group)| group.engine.waits_for_device())
    }

    fn touch(&mut self, key: GroupKey) {
        if let Some(group) = self.groups.get_mut(key)
            && !group.touched
        {
            group.touched = true;
            self.touched.push(key);
        }
    }

    fn touch_ready(&mut self) {
        let mut clients = std::mem::take(&mut self.clients);
        self.uring.take_ready(&mut clients);
        for client in clients.drain(..) {
            if let Some(group) = self.group_of_client.get(client) {
                self.touch(*group);
            }
        }
        self.clients = clients;
    }

    fn touch_due(&mut self, now_ns: u64) {
        for key in 0..self.deadlines.len() {
            if self.deadlines[key] <= now_ns {
                self.deadlines[key] = NEVER;
                self.touch(key);
            }
        }
        if self.stall_check_ns <= now_ns {
            self.drop_stalled(now_ns);
        }
        if self.quiesce_check_ns <= now_ns {
            self.drop_lingering(now_ns);
        }
    }

    /// Ends gone clients that a quiesce has waited for long enough.
    fn drop_lingering(&mut self, now_ns: u64) {
        self.quiesce_check_ns = NEVER;
        let mut touched = Vec::new();
        for (key, group) in &self.groups {
            for quiescing in &group.quiescing {
                if quiescing.due_ns > now_ns {
                    self.quiesce_check_ns = self.quiesce_check_ns.min(quiescing.due_ns);
                    continue;
                }
                for number in &quiescing.connections {
                    if let Some(connection) = self.connections.get_mut(*number) {
                        connection.kill();
                    }
                }
                touched.push(key);
            }
        }
        for group in touched {
            self.touch(group);
        }
    }

    /// Ends clients that keep others or us waiting, and sees when to look again.
    fn drop_stalled(&mut self, now_ns: u64) {
        self.stall_check_ns = NEVER;
        let mut touched = Vec::new();
        for (_, connection) in &mut self.connections {
            let group = self.groups.get(connection.group);
            let wanted = group.is_some_and(|group| group.budget.is_wanted());
            match connection.look(now_ns, wanted) {
                Ok(due) => self.stall_check_ns = self.stall_check_ns.min(due.unwrap_or(NEVER)),
                Err(why) => {
                    tracing::info!(peer = %connection.peer, "a client was cut off: {why}");
                    connection.kill();
                    touched.push(connection.group);
                }
            }
        }
        for group in touched {
            self.touch(group);
        }
    }

    fn take_socket_completions(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.sockets.poll(&mut completions);
        for completion in completions.drain(..) {
            let SocketCompletion {
                token,
                result,
                buffers,
            } = completion;
            if token == WAKE {
                self.sockets.wait_event(WAKE, self.mailbox.eventfd());
                continue;
            }
            let key = usize::try_from(token.0 & !KIND_MASK).unwrap_or(usize::MAX);
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            let group = connection.group;
            self.busy = true;
            match buffers {
                SocketBuffers::Received(buffer) => connection.received(result, buffer),
                SocketBuffers::Sent(pieces) => {
                    let engine = self.groups.get_mut(group).map(|group| &mut group.engine);
                    match engine {
                        Some(engine) => {
                            connection.sent(result, pieces, &mut |buffer| engine.recycle(buffer));
                        }
                        None => connection.sent(result, pieces, &mut drop),
                    }
                }
                SocketBuffers::None => {}
            }
            self.touch(group);
        }
        self.completions = completions;
    }

    fn receive(&mut self, now: Now, message: Message) {
        match message {
            Message::Add(new) => self.add(*new),
            Message::Group(key, command) if self.groups.contains(key) => {
                self.command(now, key, command);
                self.touch(key);
            }
            // Whoever asked sees its reply dropped.
            Message::Group(..) => {}
            Message::Stats(reply) => {
                let _ = reply.send(self.uring.stats());
            }
            Message::End => self.ending = true,
        }
    }

    fn add(&mut self, new: NewGroup) {
        let storage = UringStorage::new(&self.uring, new.parts);
        let client = storage.client();
        let engine = Engine::start(storage, new.start, new.config);
        let entry = self.groups.vacant_entry();
        let key = entry.key();
        entry.insert(Group::new(
            new.name,
            engine,
            new.budget,
            new.progress,
            new.events,
            new.detach_marker,
            self.postbox.clone(),
            key,
        ));
        if self.group_of_client.len() <= client {
            self.group_of_client.resize(client + 1, usize::MAX);
        }
        self.group_of_client[client] = key;
        if self.deadlines.len() <= key {
            self.deadlines.resize(key + 1, NEVER);
        }
        self.deadlines[key] = NEVER;
        self.touch(key);
        if new.reply.send(key).is_err() {
            self.remove(key);
        }
    }

    fn command(&mut self, now: Now, key: GroupKey, command: Command) {
        let group = &mut self.groups[key];
        match command {
            Command::Attach(attachment) => self.attach(key, *attachment),
            Command::Quiesce { disk, reply } => {
                self.quiesce(key, disk, reply, now.monotonic_ns);
            }
            Command::Snapshot { reply } => {
                let connections = &self.connections;
                let engine = &group.engine;
                let _ = reply.send(GroupSnapshot {
                    engine: engine.status(),
                    sinks: engine
                        .sinks()
                        .iter()
                        .map(|sink| SinkBacklog {
                            sink: sink.id,
                            log_bytes: engine.log_bytes_behind(sink.acked),
                        })
                        .collect(),
                    connections: group
                        .connections
                        .iter()
                        .filter_map(|key| connections.get(*key))
                        .map(|connection| (connection.disk, connection.peer.clone()))
                        .collect(),
                    payload_bytes: group.budget.used(),
                    durations: group.durations.histograms(),
                });
            }
            Command::Remove { reply } => {
                group.removing = Some(reply);
                for connection in &group.connections {
                    self.connections[*connection].kill();
                }
            }
            other => group.command(now, other),
        }
    }

    fn attach(&mut self, key: GroupKey, attachment: Attachment) {
        let group = &mut self.groups[key];
        if group.removing.is_some() {
            return;
        }
        let entry = self.connections.vacant_entry();
        let number = entry.key();
        let Ok(id) = u32::try_from(number) else {
            return;
        };
        let config = attachment
            .negotiated
            .session_config(id, group.budget.clone());
        let connection = Connection::new(key, attachment, Session::new(config));
        match connection {
            Ok(connection) => {
                entry.insert(connection);
                group.connections.push(number);
            }
            Err(error) => tracing::warn!(group = %group.name, %error, "cannot take a connection"),
        }
    }

    /// Answers once the connections of the disk whose peer is gone are over.
    fn quiesce(
        &mut self,
        key: GroupKey,
        disk: afterimage_format::ids::DiskIndex,
        reply: oneshot::Sender<()>,
        now_ns: u64,
    ) {
        let group = &mut self.groups[key];
        let gone: Vec<usize> = group
            .connections
            .iter()
            .copied()
            .filter(|number| {
                let connection = &self.connections[*number];
                connection.disk == disk && connection.peer_is_gone()
            })
            .collect();
        let due_ns = now_ns + QUIESCE_NS;
        if !gone.is_empty() {
            self.quiesce_check_ns = self.quiesce_check_ns.min(due_ns);
        }
        group.quiescing.push(Quiescing {
            connections: gone,
            due_ns,
            reply,
        });
    }

    /// One turn of one group.
    fn turn(&mut self, key: GroupKey, now: Now) {
        let Some(group) = self.groups.get_mut(key) else {
            return;
        };
        group.touched = false;
        group.complete_storage(now);
        let mut replies = std::mem::take(&mut self.replies);
        loop {
            let mut submitted = false;
            for number in &group.connections {
                let connection = &mut self.connections[*number];
                let disk = connection.disk;
                let engine = &mut group.engine;
                let durations = &mut group.durations;
                if connection.can_advance() && !engine.congested() {
                    submitted |= connection.advance(|id, request| {
                        durations.begin(id, &request, now.monotonic_ns);
                        engine.submit(now, id, disk, request);
                        !engine.congested()
                    });
                }
            }
            group.tick(now, &mut replies);
            let answered = !replies.is_empty();
            let answered_ns = if replies.is_empty() {
                0
            } else {
                monotonic_ns()
            };
            for reply in replies.drain(..) {
                group.durations.end(reply.id, answered_ns);
                let number = Session::connection_of(reply.id) as usize;
                // In a group that ends, a connection may be gone before its answers.
                if let Some(connection) = self.connections.get_mut(number)
                    && connection.group == key
                {
                    if matches!(reply.result, Err(RequestError::ShuttingDown)) {
                        // A guest would take an error for a failed disk. A connection that ends
                        // makes its client come back and send again what was not answered.
                        connection.kill();
                    }
                    if let Some(buffer) = connection.complete(reply) {
                        group.engine.recycle(buffer);
                    }
                }
            }
            // Answers may have made room for more of the same client, or memory for another.
            let wanted = answered && group.budget.is_wanted();
            if !submitted && !wanted {
                break;
            }
        }
        self.replies = replies;
        let wanted = group.budget.is_wanted();
        for number in &group.connections {
            let connection = &mut self.connections[*number];
            let engine = &mut group.engine;
            let token = *number as u64;
            connection.arm(
                &self.sockets,
                Token(RECEIVE | token),
                Token(SEND | token),
                &mut |buffer| engine.recycle(buffer),
            );
            // One whose time is over is ended before the next turn.
            let due = connection.look(now.monotonic_ns, wanted);
            let due = due.unwrap_or(Some(0)).unwrap_or(NEVER);
            self.stall_check_ns = self.stall_check_ns.min(due);
        }
        self.deadlines[key] = group.engine.next_deadline().unwrap_or(NEVER);
        self.end_connections(key);
    }

    /// Removes what is over, and tells who waits for that.
    fn end_connections(&mut self, key: GroupKey) {
        let group = &mut self.groups[key];
        let connections = &mut self.connections;
        let mut ended = false;
        let unanswered = group.removing.is_some();
        group.connections.retain(|number| {
            let over = connections[*number].is_over(unanswered);
            if over {
                connections.remove(*number);
                ended = true;
            }
            !over
        });
        if ended || !group.quiescing.is_empty() {
            let alive = &group.connections;
            let mut left = Vec::new();
            for mut quiescing in group.quiescing.drain(..) {
                let waited = &mut quiescing.connections;
                waited.retain(|number| alive.contains(number));
                if waited.is_empty() {
                    let _ = quiescing.reply.send(());
                } else {
                    left.push(quiescing);
                }
            }
            group.quiescing = left;
        }
        if group.removing.is_some() && group.connections.is_empty() {
            self.remove(key);
        }
    }

    /// Gives up a group: its storage waits for what is in flight. Its files go to who asked for that,
    /// or are closed.
    fn remove(&mut self, key: GroupKey) {
        let mut group = self.groups.remove(key);
        self.deadlines[key] = NEVER;
        let client = group.engine.storage_mut().client();
        self.group_of_client[client] = usize::MAX;
        for number in std::mem::take(&mut group.connections) {
            // Only at the end of the thread: the io_uring outlives them and drains.
            self.connections.remove(number);
        }
        let reply = group.removing.take();
        let parts = group.engine.into_storage().into_parts();
        if let Some(reply) = reply {
            let _ = reply.send(parts);
        }
    }
}

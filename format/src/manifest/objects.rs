//! Identities of repositories, name bindings, epoch terminators, results of checks and
//! comparisons.

use super::PEER_NAME_BYTES_MAX;
use super::envelope::{Kind, ObjectError};
use crate::cursor::{CursorError, Put, Reader};
use crate::ids::{Epoch, GroupId, LogId, Lsn, RepositoryId};
use crate::names::{self, NAME_BYTES_MAX};
use crate::wire::Compared;

/// Most bytes of a name binding.
pub const NAME_BINDING_BYTES_MAX: usize = 1024;
/// Most bytes of a terminator.
pub const TERMINATOR_BYTES_MAX: usize = 1024;

const BINDING: Kind = Kind {
    name: "name binding",
    magic: *b"AFTRNAME",
    version: 1,
    bytes_max: NAME_BINDING_BYTES_MAX,
};

/// Most bytes of the result of a check.
pub const CHECK_RESULT_BYTES_MAX: usize = 256;

const CHECK_RESULT: Kind = Kind {
    name: "check result",
    magic: *b"AFTRCHCK",
    version: 1,
    bytes_max: CHECK_RESULT_BYTES_MAX,
};

/// Most bytes of the result of a comparison.
pub const COMPARISON_RESULT_BYTES_MAX: usize = 256;

const COMPARISON_RESULT: Kind = Kind {
    name: "comparison result",
    magic: *b"AFTRCMPR",
    version: 1,
    bytes_max: COMPARISON_RESULT_BYTES_MAX,
};

const TERMINATOR: Kind = Kind {
    name: "epoch terminator",
    magic: *b"AFTRTERM",
    version: 1,
    bytes_max: TERMINATOR_BYTES_MAX,
};

/// Most bytes of a repository's identity.
pub const REPOSITORY_IDENTITY_BYTES_MAX: usize = 256;

const IDENTITY: Kind = Kind {
    name: "repository identity",
    magic: *b"AFTRREPO",
    version: 1,
    bytes_max: REPOSITORY_IDENTITY_BYTES_MAX,
};

/// Which repository this is, wherever it is mounted. Created once, before anything else in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RepositoryIdentity {
    /// The repository.
    pub repository: RepositoryId,
    /// Clock of the machine that made it, nanoseconds since 1970.
    pub created_ns: u64,
}

impl RepositoryIdentity {
    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put(&self.repository.to_bytes());
        body.put_u64(self.created_ns);
        IDENTITY.seal(&body)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let read = |body| {
            let mut reader = Reader::new(body);
            let out = Self {
                repository: RepositoryId::from_bytes(reader.array("repository UUID")?),
                created_ns: reader.u64("time")?,
            };
            reader.finish()?;
            Ok(out)
        };
        read(IDENTITY.open(bytes)?).map_err(|source| IDENTITY.body_error(source))
    }
}

/// Which group a name means at a replica, and whose certificate may write it. Created once, with
/// the group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NameBinding {
    /// The group.
    pub group: GroupId,
    /// The name.
    pub name: String,
    /// SAN of the certificate; empty for a repository that is written directly.
    pub peer: String,
    /// Clock of the replica at creation, nanoseconds since 1970.
    pub created_ns: u64,
}

impl NameBinding {
    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put(&self.group.to_bytes());
        body.put_u64(self.created_ns);
        body.put_string(&self.name, NAME_BYTES_MAX);
        body.put_string(&self.peer, PEER_NAME_BYTES_MAX);
        BINDING.seal(&body)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let read = |body| {
            let mut reader = Reader::new(body);
            let out = Self {
                group: GroupId::from_bytes(reader.array("group UUID")?),
                created_ns: reader.u64("time")?,
                name: reader.string(NAME_BYTES_MAX, "group name")?,
                peer: reader.string(PEER_NAME_BYTES_MAX, "peer name")?,
            };
            names::validate(&out.name).map_err(|_| CursorError::Invalid("group name"))?;
            reader.finish()?;
            Ok(out)
        };
        read(BINDING.open(bytes)?).map_err(|source| BINDING.body_error(source))
    }
}

/// Ends an epoch: stands under the key where its next segment would have been, so that nobody can
/// add to it any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terminator {
    /// The group.
    pub group: GroupId,
    /// The epoch that ends.
    pub epoch: Epoch,
    /// The sequence number that it takes.
    pub seq: u64,
    /// The epoch that comes next; greater.
    pub next_epoch: Epoch,
    /// The log of the next epoch.
    pub next_log: LogId,
    /// Clock of the replica, nanoseconds since 1970.
    pub ended_ns: u64,
}

impl Terminator {
    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put(&self.group.to_bytes());
        body.put_u64(self.epoch.0);
        body.put_u64(self.seq);
        body.put_u64(self.next_epoch.0);
        body.put(&self.next_log.to_bytes());
        body.put_u64(self.ended_ns);
        TERMINATOR.seal(&body)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let read = |body| {
            let mut reader = Reader::new(body);
            let out = Self {
                group: GroupId::from_bytes(reader.array("group UUID")?),
                epoch: Epoch(reader.u64("epoch")?),
                seq: reader.u64("sequence number")?,
                next_epoch: Epoch(reader.u64("next epoch")?),
                next_log: LogId::from_bytes(reader.array("next log UUID")?),
                ended_ns: reader.u64("time")?,
            };
            reader.finish()?;
            if out.next_epoch <= out.epoch || out.next_epoch > Epoch::MAX {
                return Err(CursorError::Invalid("next epoch"));
            }
            Ok(out)
        };
        read(TERMINATOR.open(bytes)?).map_err(|source| TERMINATOR.body_error(source))
    }
}

/// What a check of everything that a group has came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckResult {
    /// The group.
    pub group: GroupId,
    /// Its number; dense, from 1.
    pub number: u64,
    /// Clock of the checking machine at the end, nanoseconds since 1970.
    pub ended_ns: u64,
    /// When the newest check ended that found nothing wrong, this one included; 0 for none.
    pub whole_ns: u64,
    /// Objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Objects that are damaged, missing or do not belong.
    pub problems: u64,
}

impl CheckResult {
    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put(&self.group.to_bytes());
        body.put_u64(self.number);
        body.put_u64(self.ended_ns);
        body.put_u64(self.whole_ns);
        body.put_u64(self.objects);
        body.put_u64(self.bytes);
        body.put_u64(self.problems);
        CHECK_RESULT.seal(&body)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let read = |body| {
            let mut reader = Reader::new(body);
            let out = Self {
                group: GroupId::from_bytes(reader.array("group UUID")?),
                number: reader.u64("number")?,
                ended_ns: reader.u64("time")?,
                whole_ns: reader.u64("time of the last whole check")?,
                objects: reader.u64("objects")?,
                bytes: reader.u64("bytes")?,
                problems: reader.u64("problems")?,
            };
            reader.finish()?;
            Ok(out)
        };
        read(CHECK_RESULT.open(bytes)?).map_err(|source| CHECK_RESULT.body_error(source))
    }
}

/// What the comparison of a run of verify records came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ComparisonResult {
    /// The group.
    pub group: GroupId,
    /// Its number; dense, from 1.
    pub number: u64,
    /// Clock of the replica at the end, nanoseconds since 1970.
    pub ended_ns: u64,
    /// When the newest comparison ended that found every block the same, this one included; 0 for
    /// none.
    pub whole_ns: u64,
    /// Epoch of the run's last record.
    pub epoch: Epoch,
    /// LSN of the run's last record: what lies behind it is not compared yet.
    pub through: Lsn,
    /// What came of it.
    pub compared: Compared,
}

impl ComparisonResult {
    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put(&self.group.to_bytes());
        body.put_u64(self.number);
        body.put_u64(self.ended_ns);
        body.put_u64(self.whole_ns);
        body.put_u64(self.epoch.0);
        body.put_u64(self.through.0);
        self.compared.encode(&mut body);
        COMPARISON_RESULT.seal(&body)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let read = |body| {
            let mut reader = Reader::new(body);
            let out = Self {
                group: GroupId::from_bytes(reader.array("group UUID")?),
                number: reader.u64("number")?,
                ended_ns: reader.u64("time")?,
                whole_ns: reader.u64("time of the last comparison without a difference")?,
                epoch: Epoch(reader.u64("epoch")?),
                through: Lsn(reader.u64("last record")?),
                compared: Compared::decode(&mut reader)?,
            };
            reader.finish()?;
            Ok(out)
        };
        let body = COMPARISON_RESULT.open(bytes)?;
        read(body).map_err(|source| COMPARISON_RESULT.body_error(source))
    }
}

/// Whether an object under a segment key is a terminator rather than a segment; its first eight
/// bytes are enough.
#[must_use]
pub fn is_terminator(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&TERMINATOR.magic)
}

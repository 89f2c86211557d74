//! The kinds of faults, and how often each took place.

macro_rules! faults {
    ($($name:ident: $text:literal,)*) => {
        /// A kind of fault. A report in which one of them has the count 0 is a failure: the run did
        /// not show what it claims to show.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Fault {
            $(#[doc = $text] $name,)*
        }

        impl Fault {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// In words.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

faults! {
    Kill: "primary killed at a storage step",
    CrashInRecovery: "primary killed or power cut within a recovery",
    FaultInRecovery: "start refused by a storage fault within it, and repeated",
    Outage: "target away for longer than any client may wait",
    LateWrite: "write of a killed process lands after its death",
    LateWriteLost: "write of a killed process lands in part or never",
    CutStore: "store to the ring cut short by the kill",
    PowerCut: "power cut",
    SectorKept: "unsynced sector kept by a power cut",
    SectorLost: "unsynced sector lost by a power cut",
    SectorTorn: "unsynced sector torn by a power cut",
    CleanRestart: "clean stop and start",
    Edited: "backing edited while the group is down, and accepted",
    ReadFailed: "EIO on a read of log or backing",
    WriteFailed: "EIO on a write to a backing",
    WriteShort: "write that ends short",
    BackingFull: "ENOSPC on a backing",
    BackingSyncFailed: "sync of a backing that fails once",
    LogWriteFailed: "EIO or a short write on the log",
    LogFull: "ENOSPC on the log",
    LogSyncFailed: "sync of the log that fails once",
    WriteLost: "write to the log that says done and is lost",
    WriteMisdirected: "write to the log that goes elsewhere",
    FlipLog: "bit flipped in the log",
    FlipRing: "bit flipped in the ring",
    FlipClaim: "bit flipped in a claim",
    FlipRepository: "bit flipped in the repository",
    Disconnect: "client gone with requests in flight, sent again",
    NetCut: "connection cut",
    NetRefused: "connection refused",
    NetHalfOpen: "connection half-open",
    NetDelay: "delay on a connection",
    NetReorder: "old connection's bytes arrive after a newer connection began",
    NetDuplicate: "old connection's bytes arrive a second time",
    AckLost: "acknowledgement lost after the commit",
    ReplicaKilledBefore: "replica killed before a store call takes effect",
    ReplicaKilledAfter: "replica killed after a store call took effect",
    ReplicaLatePut: "object of a killed replica appears later",
    StoreFailedBefore: "store call fails",
    StoreFailedAfter: "store call takes effect and fails",
    RepositoryFull: "ENOSPC in the repository",
    ClockForward: "clock jumps ten years ahead",
    ClockBack: "clock jumps ten years back",
}

/// How often each kind took place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultCounts([u64; Fault::ALL.len()]);

impl Default for FaultCounts {
    fn default() -> Self {
        Self([0; Fault::ALL.len()])
    }
}

impl FaultCounts {
    /// Counts.
    pub fn add(&mut self, fault: Fault, times: u64) {
        self.0[fault as usize] += times;
    }

    /// Adds another run's.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// How often a kind took place.
    #[must_use]
    pub fn of(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    /// Kinds that never took place.
    #[must_use]
    pub fn missing(&self) -> Vec<Fault> {
        let all = Fault::ALL.iter().copied();
        all.filter(|fault| self.of(*fault) == 0).collect()
    }
}

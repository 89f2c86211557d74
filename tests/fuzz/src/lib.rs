//! Fuzz targets: functions that take any bytes, must not panic and say what must hold.
//!
//! The same functions run under libFuzzer (`tests/fuzz/run`, feature `libfuzzer`) and, over the kept
//! corpus and bytes made from it by a seeded generator, in the ordinary tests. A decoder's target
//! also makes the checksums right, so that what stands behind them is reached.

mod answers;
mod bytes_of;
mod conversation;
mod decoders;
mod forged;
mod handshake;
mod intake;
mod memory;
mod receive;
mod session;
mod texts;

#[cfg(test)]
mod tests;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: &[Target] = &[
    target("frame", decoders::frame),
    target("superblock", decoders::superblock),
    target("ring_header", decoders::ring_header),
    target("claim", decoders::claim),
    target("segment", decoders::segment),
    target("manifest", decoders::manifest),
    target("layer", decoders::layer),
    target("wire", decoders::wire),
    target("nbd", decoders::nbd),
    target("bodies", decoders::bodies),
    target("nbd_session", session::run),
    target("nbd_handshake", handshake::run),
    target("receive", receive::run),
    target("intake", intake::run),
    target("conversation", conversation::run),
    target("agent_wire", texts::agent_wire),
    target("intent", texts::intent),
    target("point", texts::point),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// The target of this name.
#[must_use]
pub fn target_of(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|target| target.name == name)
}

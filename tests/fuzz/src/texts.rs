//! Texts: what a guest's agent says, what an intent's file holds, what people write for a point.

use crate::memory::within;
use afterimage_proxy::checkpoint::intent::Intent;
use afterimage_proxy::checkpoint::qga::wire::{Line, Wire};
use afterimage_replica::points::{PointSpec, label_is_usable};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// JSON is held as a tree: a list of lists takes some tens of bytes for each of its text.
const MEMORY: usize = 64 << 10;
const MEMORY_FACTOR: usize = 256;

/// The lines are the same however the bytes arrive; the first byte says how.
pub(crate) fn agent_wire(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || {
        let Some((step, bytes)) = data.split_first() else {
            return;
        };
        let step = usize::from(*step).max(1);
        let mut wire = Wire::default();
        wire.push(bytes);
        let mut at_once = lines(&mut wire).into_iter();
        let mut wire = Wire::default();
        for part in bytes.chunks(step) {
            wire.push(part);
            for line in lines(&mut wire) {
                assert_eq!(Some(line), at_once.next(), "in steps of {step}");
            }
        }
        assert_eq!(at_once.next(), None, "in steps of {step}");
    });
}

fn lines(wire: &mut Wire) -> Vec<Line> {
    std::iter::from_fn(|| wire.next_line()).collect()
}

pub(crate) fn intent(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || {
        if let Ok(intent) = Intent::decode(data) {
            for agent in &intent.agents {
                drop(agent.provider(&intent.group, &intent.checkpoint));
            }
            let again = intent.encode().expect("what was read can be written");
            assert_eq!(Intent::decode(&again).ok(), Some(intent));
        }
    });
}

pub(crate) fn point(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let now = Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(1_800_000_000);
    let parsed = PointSpec::parse(text, now, &TimeZone::UTC);
    let label = matches!(&parsed, Ok(PointSpec::Label(label)) if label == text);
    assert_eq!(
        label,
        label_is_usable(text),
        "{text:?} is taken for {parsed:?}"
    );
    if let Ok(PointSpec::Time(ns)) = parsed {
        assert!(i128::from(ns) <= now.as_nanosecond(), "in the future");
    }
}

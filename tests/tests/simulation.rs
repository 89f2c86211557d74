//! A few seeds of the simulation, and that one seed is one run. The stage `sim` of `tests/run` runs
//! many more.

use afterimage_tests::sim::exhaustive;
use afterimage_tests::sim::run::run;

/// Seeds that once showed a bug, each with a line on what it was.
const FOUND: &[(u64, &str)] = &[
    (
        253,
        "after a drain the tail moved once more, with a superblock that said unclean",
    ),
    (
        494,
        "a recovery that had made room was killed; the next one wrote nothing again, being behind the tail",
    ),
    (
        5876,
        "a bit of the ring's last closed frame flipped, and what followed it was taken for nothing",
    ),
    (
        134,
        "a session ended between taking note of its pass's end and sending it: nobody sent it again",
    ),
    (
        71137,
        "what a failed sync had lost looked like a hole, and a pass left it out",
    ),
    (
        155_269,
        "the end of a pass waited for room while its session ended; the next one sent more blocks, and nobody noticed that the replica dropped the pass",
    ),
    (
        1410,
        "a marker of a killed start was found and not written again; a power cut brought back the one that says clean",
    ),
    (
        2743,
        "two edits of a backing before its new base: what lay between was added to the old one",
    ),
    (
        41499,
        "starts killed before their sync had written both copies of a marker, and a power cut tore both",
    ),
    (
        4_279_820,
        "a marker's second copy, cut in its first write, looked like a newer program's",
    ),
];

#[test]
fn a_few_seeds_hold_and_one_seed_is_one_run() {
    for seed in 1..=40 {
        let first = run(seed, false);
        assert_eq!(first.failure, None, "seed {seed}");
        let again = run(seed, false);
        assert_eq!(first.told.hash, again.told.hash, "seed {seed}");
        assert_eq!(first.totals, again.totals, "seed {seed}");
    }
}

#[test]
fn what_was_found_stays_found() {
    for (seed, what) in FOUND {
        assert_eq!(run(*seed, false).failure, None, "seed {seed}: {what}");
    }
}

#[test]
fn one_operation_survives_every_crash() {
    let scope = exhaustive::run(1, 2).expect("every crash point holds");
    assert!(
        scope.crash_points > 300 && scope.recovery_kills > 0,
        "{scope:?}"
    );
}

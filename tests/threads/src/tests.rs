//! The models. A lost wake-up shows as a deadlock, which loom reports with the interleaving.

use crate::budget::PayloadBudget;
use crate::mailbox::Mailbox;
use loom::thread;

/// Every interleaving with so many switches away from a thread that could go on: all of them for
/// these lengths take an hour.
fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(run);
}

/// What the worker does between two turns (`worker/thread.rs`, `enter`): take what is there, and
/// sleep only after having said so.
fn receive(mailbox: &Mailbox<u32>, count: usize) -> Vec<u32> {
    let mut received = Vec::new();
    while received.len() < count {
        match mailbox.take() {
            Some(message) => received.push(message),
            None if mailbox.prepare_sleep() => {
                mailbox.eventfd().wait();
                mailbox.awake();
            }
            None => {}
        }
    }
    received
}

#[test]
fn a_sleeping_worker_is_always_woken() {
    model(|| {
        let (postbox, mailbox) = Mailbox::new().expect("made");
        let sender = thread::spawn(move || postbox.send(7).expect("the worker lives"));
        assert_eq!(receive(&mailbox, 1), [7]);
        sender.join().expect("sent");
    });
}

#[test]
fn two_senders_wake_a_worker_for_both_messages() {
    model(|| {
        let (postbox, mailbox) = Mailbox::new().expect("made");
        let other = postbox.clone();
        let first = thread::spawn(move || postbox.send(1).expect("the worker lives"));
        let second = thread::spawn(move || other.send(2).expect("the worker lives"));
        let mut received = receive(&mailbox, 2);
        received.sort_unstable();
        assert_eq!(received, [1, 2]);
        first.join().expect("sent");
        second.join().expect("sent");
    });
}

#[test]
fn a_message_to_a_worker_that_was_awake_is_seen_before_it_sleeps() {
    model(|| {
        let (postbox, mailbox) = Mailbox::new().expect("made");
        let sender = thread::spawn(move || {
            postbox.send(1).expect("the worker lives");
            postbox.send(2).expect("the worker lives");
        });
        assert_eq!(receive(&mailbox, 2), [1, 2]);
        sender.join().expect("sent");
    });
}

#[test]
fn payload_memory_stays_within_the_limit_and_one_payload() {
    model(|| {
        let budget = PayloadBudget::new(10);
        let (one, two) = (budget.clone(), budget.clone());
        let payload = |budget: PayloadBudget, connection| {
            thread::spawn(move || {
                let mut taken = 0;
                for _ in 0..2 {
                    let waiting = budget.wait();
                    assert!(budget.is_wanted(), "everybody sees it");
                    if budget.take(connection, 6) {
                        drop(waiting);
                        taken += 6;
                        // The limit, and what one connection took beyond it.
                        assert!(budget.used() <= 10 + 12, "{}", budget.used());
                    }
                }
                budget.give_back(connection, taken, 0);
            })
        };
        let (one, two) = (payload(one, 1), payload(two, 2));
        one.join().expect("done");
        two.join().expect("done");
        assert_eq!(budget.used(), 0, "all of it was given back");
        assert!(!budget.is_wanted(), "nobody waits any more");
        // Nobody holds the right to go beyond the limit any more.
        assert!(budget.take(3, 10) && budget.take(3, 10));
    });
}

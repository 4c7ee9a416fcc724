//! The count of payloads with each order in which its threads can run.

use std::future::poll_fn;

use loom::{future::block_on, thread};

use crate::relay::Payload;

/// The source of the count once more, on primitives that `loom` schedules.
#[path = "queue.rs"]
#[expect(
    dead_code,
    clippy::duplicate_mod,
    reason = "what is tried is what runs"
)]
mod queue;

mod sync {
    use std::task::Waker;

    use loom::sync::Mutex;

    pub(super) use loom::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    /// What [`futures_util::task::AtomicWaker`] promises.
    #[derive(Debug, Default)]
    pub(super) struct AtomicWaker(Mutex<Option<Waker>>);

    impl AtomicWaker {
        pub(super) fn register(&self, waker: &Waker) {
            *self.0.lock().unwrap() = Some(waker.clone());
        }

        pub(super) fn wake(&self) {
            let waker = self.0.lock().unwrap().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

#[test]
fn whoever_waits_is_told_when_the_last_payload_has_gone() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let queue = queue::Queue::default();
        let payloads = [(); 2].map(|()| queue.enter(Payload::empty()));
        let gone = payloads.map(|payload| thread::spawn(move || drop(payload)));
        // A wake-up that is lost is a deadlock, which the model tells.
        block_on(poll_fn(|cx| queue.poll_empty(cx)));
        for thread in gone {
            thread.join().unwrap();
        }
    });
}

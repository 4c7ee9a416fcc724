//! How something that serves is told to end.

use tokio_util::sync::CancellationToken;

/// The two phases of an end: first no new work and time to finish, then no time.
#[derive(Debug, Clone, Default)]
#[expect(clippy::exhaustive_structs, reason = "a stop has two phases")]
pub struct Stop {
    /// Cancelled when nothing new is to be accepted and what is open may finish.
    pub accept: CancellationToken,
    /// Cancelled when what is still open is to be cut.
    pub force: CancellationToken,
}

impl Stop {
    /// A stop that nobody has asked for.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stop that is asked for with its parent, or by itself without it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            accept: self.accept.child_token(),
            force: self.force.child_token(),
        }
    }

    /// Both phases at once: who sees the first one also sees the second.
    pub fn now(&self) {
        self.force.cancel();
        self.accept.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
        task::{Context, Wake, Waker},
    };

    use super::*;

    /// Looks, when it is woken, whether there is time to finish.
    struct Look {
        stop: Stop,
        is_forced: AtomicBool,
    }

    impl Wake for Look {
        fn wake(self: Arc<Self>) {
            self.is_forced
                .store(self.stop.force.is_cancelled(), Relaxed);
        }
    }

    #[test]
    fn who_is_told_of_both_phases_at_once_never_sees_only_the_first() {
        let parent = Stop::new();
        let look = Arc::new(Look {
            stop: parent.child(),
            is_forced: AtomicBool::new(false),
        });
        let waker = Waker::from(Arc::clone(&look));
        let mut stopping = pin!(look.stop.accept.cancelled());
        let asked = stopping.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(asked.is_pending());
        parent.now();
        assert!(look.is_forced.load(Relaxed), "told to finish first");
    }
}

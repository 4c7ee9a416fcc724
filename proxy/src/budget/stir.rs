//! Periodic work that sleeps while there is nothing to do.

use std::{
    sync::atomic::{
        AtomicU8,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

/// Tells a task that looks after something again and again whether anything has happened to it. For one task.
///
/// The load in [`Self::note`] is relaxed, so what happens just as the task looks away may go unnoticed until more does, at most
/// for the longest rest. What it looks after bears that: it happens again and again, or can wait.
#[derive(Debug, Default)]
pub struct Stir {
    state: AtomicU8,
    bell: Notify,
}

/// Nothing has happened since the last look.
const QUIET: u8 = 0;
/// Something has.
const STIRRED: u8 = 1;
/// Nothing has, and the task waits for it.
const ASLEEP: u8 = 2;

impl Stir {
    /// Nothing has happened yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: AtomicU8::new(QUIET),
            bell: Notify::const_new(),
        }
    }

    /// Something happens. Costs a relaxed load, unless it is the first since the last look.
    pub fn note(&self) {
        if self.state.load(Relaxed) != STIRRED && self.state.swap(STIRRED, AcqRel) == ASLEEP {
            self.bell.notify_one();
        }
    }

    /// Waits for the next look: for `pause` if something has happened since the last one, and else until something does, at most
    /// for `longest`.
    ///
    /// # Cancel safety
    /// What happens meanwhile may be taken for seen.
    pub async fn rest(&self, pause: Duration, longest: Duration) {
        if self.state.swap(QUIET, AcqRel) == STIRRED {
            return sleep(pause).await;
        }
        if self
            .state
            .compare_exchange(QUIET, ASLEEP, AcqRel, Acquire)
            .is_ok()
        {
            // A bell that rang for an earlier wait ends this one early, which costs a look.
            let _late = timeout(longest, self.bell.notified()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn looks_follow_each_other_only_while_something_happens() {
        let stir = Stir::new();
        let rested = async || {
            let began = Instant::now();
            stir.rest(PAUSE, LONGEST).await;
            began.elapsed()
        };
        stir.note();
        assert_eq!(rested().await, PAUSE);
        assert_eq!(rested().await, LONGEST, "nothing since");
        let stirring = async {
            sleep(PAUSE * 7).await;
            stir.note();
            stir.note();
        };
        let (rest, ()) = tokio::join!(rested(), stirring);
        assert_eq!(rest, PAUSE * 7, "woken");
        assert_eq!(rested().await, PAUSE, "what woke it counts");
        assert_eq!(rested().await, LONGEST);
    }
}

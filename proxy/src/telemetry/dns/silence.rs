//! Whether name servers answer: told in the log when they stop and when they are back.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::SystemTime,
};

use parking_lot::Mutex;

/// How the latest queries went that were relayed.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// Queries without an answer since the last one that had one.
    failures: AtomicU32,
    since: Mutex<Option<SystemTime>>,
}

impl Silence {
    /// A query was answered, or was not. Costs a load while all are.
    pub(super) fn note(&self, answered: bool) {
        if !answered {
            if self.failures.fetch_add(1, Relaxed) + 1 == A_FEW {
                *self.since.lock() = Some(SystemTime::now());
                tracing::warn!("name servers do not answer; names of the mesh are served");
            }
        } else if self.failures.load(Relaxed) > 0 {
            self.failures.store(0, Relaxed);
            if self.since.lock().take().is_some() {
                tracing::info!("name servers answer again");
            }
        }
    }

    /// Since when nobody answers; `None` while somebody does.
    pub(super) fn since(&self) -> Option<SystemTime> {
        *self.since.lock()
    }
}

/// Queries in a row without an answer that are no accident.
const A_FEW: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_in_a_row_are_silence_until_one_is_answered() {
        let silence = Silence::default();
        for answered in [false, false, true, false, false] {
            silence.note(answered);
            assert_eq!(silence.since(), None);
        }
        silence.note(false);
        let since = silence.since();
        assert!(since.is_some());
        silence.note(false);
        assert_eq!(silence.since(), since);
        silence.note(true);
        assert_eq!(silence.since(), None);
    }
}

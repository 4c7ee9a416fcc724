//! What is still to be done before the proxy may serve.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use tokio::time::Instant;

/// The set of pending tasks. Clones share it.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Inner>);

/// One entry of a [`Readiness`]; pending until told otherwise.
#[derive(Debug, Clone)]
pub struct ReadinessTask {
    name: &'static str,
    readiness: Readiness,
}

#[derive(Debug)]
struct Inner {
    start: Instant,
    pending: Mutex<BTreeSet<&'static str>>,
}

impl Readiness {
    /// Nothing pending; times are told from now on.
    #[expect(clippy::new_without_default, reason = "it reads the clock")]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            start: Instant::now(),
            pending: Mutex::default(),
        }))
    }

    /// Adds a pending task.
    pub fn task(&self, name: &'static str) -> ReadinessTask {
        self.0.pending.lock().insert(name);
        ReadinessTask {
            name,
            readiness: self.clone(),
        }
    }

    /// Names of the pending tasks, sorted.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.pending.lock().iter().copied().collect()
    }
}

impl ReadinessTask {
    /// Clears the task. Clearing it again does nothing.
    pub fn ready(&self) {
        let left = {
            let mut pending = self.readiness.0.pending.lock();
            if !pending.remove(self.name) {
                return;
            }
            pending.len()
        };
        let after = self.readiness.0.start.elapsed();
        tracing::info!(target: "readiness", task = self.name, left, ?after, "task complete");
        if left == 0 {
            tracing::info!(target: "readiness", ?after, "ready");
        }
    }

    /// Makes the task pending again.
    pub fn pending(&self) {
        if self.readiness.0.pending.lock().insert(self.name) {
            tracing::warn!(target: "readiness", task = self.name, "no longer ready");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_names_are_sorted_and_come_back() {
        let readiness = Readiness::new();
        assert!(readiness.pending().is_empty());
        let pods = readiness.task("workload proxy manager");
        let state = readiness.task("state manager");
        assert_eq!(
            readiness.pending(),
            ["state manager", "workload proxy manager"]
        );
        state.ready();
        pods.ready();
        pods.ready();
        assert!(readiness.pending().is_empty());
        pods.pending();
        assert_eq!(readiness.pending(), ["workload proxy manager"]);
    }
}

//! The queue between those who log and the thread that writes.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use super::sync::{Arc, Condvar, Mutex};

/// Where records are appended. Clones share one queue.
#[derive(Debug, Clone, Default)]
pub(super) struct Queue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when there is something to write for an idle writer, and when it shall stop.
    work: Condvar,
    /// Told when the writer has ended.
    ended: Condvar,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct State {
    pending: Vec<u8>,
    idle: bool,
    stop: bool,
    ended: bool,
}

impl Queue {
    /// Appends one record, line feed included. Never waits for the writer: a record that does not
    /// fit is dropped and counted.
    pub(super) fn push(&self, record: &[u8]) {
        let mut state = self.0.state.lock();
        if state.ended || state.pending.len().saturating_add(record.len()) > QUEUE_BYTES {
            drop(state);
            self.0.dropped.inc();
            return;
        }
        state.pending.extend_from_slice(record);
        // A writer that lingers or writes comes back by itself: no system call for it.
        if std::mem::take(&mut state.idle) {
            drop(state);
            self.0.work.notify_one();
        }
    }

    /// Bytes that wait to be written.
    pub(super) fn bytes(&self) -> usize {
        self.0.state.lock().pending.len()
    }

    /// Counts the records that were dropped.
    pub(super) fn dropped(&self) -> Counter {
        self.0.dropped.clone()
    }

    /// Waits for records and swaps them with `batch`, which is empty. `false` when there are none
    /// and there will be none.
    pub(super) fn take(&self, batch: &mut Vec<u8>) -> bool {
        let mut state = self.0.state.lock();
        while state.pending.is_empty() && !state.stop {
            state.idle = true;
            self.0.work.wait(&mut state);
            state.idle = false;
            if !state.stop {
                // Records come in bursts: one write for those of the next moment.
                self.0.work.wait_for(&mut state, LINGER);
            }
        }
        std::mem::swap(&mut state.pending, batch);
        !batch.is_empty()
    }

    /// Waits a little, less if the writer shall stop.
    pub(super) fn rest(&self) {
        let mut state = self.0.state.lock();
        self.0.work.wait_for(&mut state, RETRY);
    }

    /// Has the writer stop once it has written what is queued.
    pub(super) fn stop(&self) {
        self.0.state.lock().stop = true;
        self.0.work.notify_one();
    }

    /// Tells that the writer has ended.
    pub(super) fn end(&self) {
        self.0.state.lock().ended = true;
        self.0.ended.notify_all();
    }

    /// Waits until the writer has ended, but no longer than `limit`.
    pub(super) fn wait_for_end(&self, limit: Duration) {
        let mut state = self.0.state.lock();
        let ended = &self.0.ended;
        ended.wait_while_for(&mut state, |state| !state.ended, limit);
    }
}

/// Most bytes that wait to be written; some 8,000 access lines.
pub(super) const QUEUE_BYTES: usize = 4 << 20;
/// How long an awakened writer waits for more records.
const LINGER: Duration = Duration::from_millis(2);
/// Pause before an output that would block is tried again.
const RETRY: Duration = Duration::from_millis(10);

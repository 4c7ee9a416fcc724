//! The queue between those who log and the thread that writes.

use std::{
    io::{self, ErrorKind, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;

/// Where records are appended. Clones share one queue.
#[derive(Debug, Clone, Default)]
pub(super) struct Queue(Arc<Shared>);

/// Owns the thread that writes. Dropping it ends the thread, after what is queued was written or
/// [`FLUSH_LIMIT`] has passed.
#[derive(Debug)]
pub(super) struct Writer(Queue);

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
    pending: Batch,
    idle: bool,
    stop: bool,
    ended: bool,
}

#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    records: u64,
}

impl Queue {
    /// Appends one record, line feed included. Never waits for the writer: a record that does not
    /// fit is dropped and counted.
    pub(super) fn push(&self, record: &[u8]) {
        let mut state = self.0.state.lock();
        if state.ended || state.pending.bytes.len().saturating_add(record.len()) > QUEUE_BYTES {
            drop(state);
            self.0.dropped.inc();
            return;
        }
        state.pending.bytes.extend_from_slice(record);
        state.pending.records += 1;
        // A writer that lingers or writes comes back by itself: no system call for it.
        if std::mem::take(&mut state.idle) {
            drop(state);
            self.0.work.notify_one();
        }
    }

    /// Bytes that wait to be written.
    pub(super) fn bytes(&self) -> usize {
        self.0.state.lock().pending.bytes.len()
    }

    /// Counts the records that were dropped.
    pub(super) fn dropped(&self) -> Counter {
        self.0.dropped.clone()
    }

    /// Waits for records and swaps them with `batch`, which is empty. `false` when there are none
    /// and there will be none.
    fn take(&self, batch: &mut Batch) -> bool {
        let mut state = self.0.state.lock();
        while state.pending.bytes.is_empty() && !state.stop {
            state.idle = true;
            self.0.work.wait(&mut state);
            state.idle = false;
            if !state.stop {
                // Records come in bursts: one write for those of the next moment.
                self.0.work.wait_for(&mut state, LINGER);
            }
        }
        std::mem::swap(&mut state.pending, batch);
        batch.records > 0
    }

    /// Writes all of `batch`, and tells whether the output took it. What it refuses for good is counted as dropped.
    fn write(&self, out: &mut impl Write, batch: &Batch) -> bool {
        let mut rest = batch.bytes.as_slice();
        while !rest.is_empty() {
            match out.write(rest) {
                Ok(0) => break,
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Somebody else made the shared stdout non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut state = self.0.state.lock();
                    self.0.work.wait_for(&mut state, RETRY);
                }
                Err(_) => break,
            }
        }
        let lost = rest.iter().filter(|&&byte| byte == b'\n').count();
        self.0
            .dropped
            .inc_by(u64::try_from(lost).unwrap_or(u64::MAX));
        rest.is_empty()
    }

    /// The life of the writer thread. How many records were dropped is told once the output takes some again: to an output that
    /// is gone, each telling would be a record that is dropped, of which there is to tell.
    fn run(&self, mut out: impl Write, tell: impl Fn(u64)) {
        let mut batch = Batch::default();
        let mut told = 0;
        while self.take(&mut batch) {
            let is_taken = self.write(&mut out, &batch);
            batch.records = 0;
            batch.bytes.clear();
            batch.bytes.shrink_to(KEPT_BYTES);
            let dropped = self.0.dropped.get();
            if is_taken && dropped > told {
                tell(dropped - told);
                told = dropped;
            }
        }
    }
}

impl Writer {
    /// Starts a thread that writes to `out`.
    pub(super) fn spawn(out: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Queue(Arc::default());
        let end = EndOnDrop(queue.clone());
        thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || {
                end.0.run(out, |records| {
                    tracing::warn!(
                        records,
                        "log records were dropped because standard output did not take them"
                    );
                });
            })?;
        Ok(Self(queue))
    }

    /// Where records go.
    pub(super) fn queue(&self) -> Queue {
        self.0.clone()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Queue(shared) = &self.0;
        let mut state = shared.state.lock();
        state.stop = true;
        shared.work.notify_one();
        // A thread that hangs in a write is left behind: the process is about to end.
        shared
            .ended
            .wait_while_for(&mut state, |state| !state.ended, FLUSH_LIMIT);
    }
}

/// Tells that the writer thread has ended, however it ended.
struct EndOnDrop(Queue);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let Queue(shared) = &self.0;
        shared.state.lock().ended = true;
        shared.ended.notify_all();
    }
}

/// Most bytes that wait to be written; some 8,000 access lines.
const QUEUE_BYTES: usize = 4 << 20;
/// What each of the two buffers keeps after a burst.
const KEPT_BYTES: usize = 64 << 10;
/// How long an awakened writer waits for more records.
const LINGER: Duration = Duration::from_millis(2);
/// Pause before an output that would block is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// How long the end of the process waits for the log.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;

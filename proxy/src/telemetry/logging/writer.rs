//! The thread that writes what is logged.

use std::{
    io::{self, ErrorKind, Write},
    thread,
    time::Duration,
};

use super::queue::Queue;

/// Owns the thread that writes. Dropping it ends the thread, after what is queued was written or
/// [`FLUSH_LIMIT`] has passed.
#[derive(Debug)]
pub(super) struct Writer(Queue);

impl Writer {
    /// Starts a thread that writes to `out`.
    pub(super) fn spawn(out: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Queue::default();
        let end = EndOnDrop(queue.clone());
        thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || {
                run(&end.0, out, |records| {
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
        self.0.stop();
        // A thread that hangs in a write is left behind: the process is about to end.
        self.0.wait_for_end(FLUSH_LIMIT);
    }
}

/// Tells that the writer thread has ended, however it ended.
struct EndOnDrop(Queue);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The life of the writer thread. How many records were dropped is told once the output takes some again: to an output that
/// is gone, each telling would be a record that is dropped, of which there is to tell.
fn run(queue: &Queue, mut out: impl Write, tell: impl Fn(u64)) {
    let mut batch = Vec::new();
    let mut told = 0;
    while queue.take(&mut batch) {
        let is_taken = write(queue, &mut out, &batch);
        batch.clear();
        batch.shrink_to(KEPT_BYTES);
        let dropped = queue.dropped().get();
        if is_taken && dropped > told {
            tell(dropped - told);
            told = dropped;
        }
    }
}

/// Writes all of `batch`, and tells whether the output took it. What it refuses for good is counted as dropped.
fn write(queue: &Queue, out: &mut impl Write, batch: &[u8]) -> bool {
    let mut rest = batch;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => break,
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Somebody else made the shared stdout non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => queue.rest(),
            Err(_) => break,
        }
    }
    let lost = rest.iter().filter(|&&byte| byte == b'\n').count();
    let lost = u64::try_from(lost).unwrap_or(u64::MAX);
    queue.dropped().inc_by(lost);
    rest.is_empty()
}

/// What each of the two buffers keeps after a burst.
const KEPT_BYTES: usize = 64 << 10;
/// How long the end of the process waits for the log.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;

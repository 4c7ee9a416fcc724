//! What the control plane told last, kept on disk for a start without it.
//!
//! **What is written.** Each response that was put in force is a transaction of the journal: its resources as they came, without
//! those that were refused, and the names that are gone. Nothing is taken from memory, so keeping costs none: the bytes are those
//! of the response, written before it is answered and let go of. Where superfluous bytes prevail the file is rewritten with what
//! still counts, which is found by an entry of some 60 bytes per name, for that moment.
//!
//! **What is read** is a prefix of the responses that were told, as far as whole ones go: the mesh was exactly that once, and it
//! is the last state that was answered for, since no answer goes out before its transaction is on disk. (A disk that takes longer
//! than [`PATIENCE`] is waited for no further; the delay is told.) So what is recalled never grants what
//! the control plane knew to be denied. Within that, an order is to be minded: workloads and policies are told in
//! transactions of their own, and the last one may be of workloads that name policies which did not arrive. Whoever recalls
//! a state must refuse where such a policy is missing, until the control plane has answered; and a journal is used only
//! if it holds both kinds completely. What remains is what every proxy lives with between the two: a policy that the same
//! push changes has its old rules for that moment, and where the control plane ended in it, until it returns.
//!
//! **What cannot be kept up is removed**: if the disk is full, the mesh too large, or more waits to be written than is good, the
//! file goes, since an old state could grant what was denied meanwhile. It begins anew with the next answers that tell everything,
//! which are asked for ([`Journal::needs_everything`]) after a while. A directory that cannot be written is not read either.
//!
//! **What cannot be read** (damaged, of another node, of a later version) is named, set aside, and changes nothing else.

mod format;
mod in_force;
mod live;
mod metrics;
mod store;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    task::spawn_blocking,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{Batch, Rejected};
pub use format::Unusable;
pub use metrics::JournalMetrics;
pub use store::KeepError;
use store::{Kept, Store};

/// Where and for whom a journal is kept.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "plain settings")]
pub struct Settings {
    /// A directory of this program alone; made if it is not there.
    pub directory: PathBuf,
    /// A mesh that takes more bytes than this is not kept.
    pub max_bytes: u64,
    /// Whose view of the mesh it is; a journal of another owner is not used.
    pub owner: String,
    /// Only what is asked for is told of workloads and services: nothing at first.
    pub on_demand: bool,
}

impl Settings {
    /// Kinds of which nothing need be told before the state counts as complete.
    fn unasked(&self) -> [bool; 2] {
        [self.on_demand, false]
    }
}

/// What was found at the start.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Recalled {
    /// When the last of it was told.
    pub told: SystemTime,
    /// How long the file is.
    pub bytes: u64,
}

/// Keeps what is told; clones share it.
#[derive(Debug, Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    work_tx: mpsc::Sender<Work>,
    /// Bytes that wait to be written.
    waiting: AtomicUsize,
    /// Told when something was not kept: the journal must end.
    lost: Notify,
    /// Since when nothing is kept, if everything should be told again for that reason.
    broken: Mutex<Option<Instant>>,
    metrics: JournalMetrics,
}

#[derive(Debug)]
struct Work {
    batch: Batch,
    refused: Vec<Rejected>,
    done_tx: SyncSender<()>,
}

/// Writes what a [`Journal`] is given.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    work: mpsc::Receiver<Work>,
    /// The last that was told was more than may be kept: that does not change by being told again.
    is_too_large: bool,
    inner: Arc<Inner>,
}

/// Opens the journal, and hands what it holds to `sink`, in the order in which it was told. Blocks; nothing is written before
/// the keeper runs.
///
/// # Errors
/// If the directory cannot be used. A file that cannot be used is no error: it is logged and set aside.
pub fn open(
    settings: Settings,
    metrics: JournalMetrics,
    sink: &mut dyn FnMut(Batch),
) -> io::Result<(Journal, Keeper, Option<Recalled>)> {
    let directory = settings.directory.clone();
    let (store, unusable) = Store::open(settings)?;
    if let Some(unusable) = unusable {
        let error = &unusable as &dyn std::error::Error;
        tracing::warn!(error, directory = %directory.display(), "the kept state of the mesh is not usable; it is set aside");
        metrics.unusable();
    }
    let recalled = store.found().map(|(told, bytes)| Recalled { told, bytes });
    store.recall(sink).map_err(io::Error::other)?;
    let (work_tx, work) = mpsc::channel(QUEUE);
    let inner = Arc::new(Inner {
        work_tx,
        waiting: AtomicUsize::new(0),
        lost: Notify::new(),
        broken: Mutex::new(None),
        metrics,
    });
    let journal = Journal {
        inner: Arc::clone(&inner),
    };
    let keeper = Keeper {
        store,
        work,
        is_too_large: false,
        inner,
    };
    Ok((journal, keeper, recalled))
}

impl Journal {
    /// Keeps what was applied, but for what was refused of it. Blocks until it is on disk, for [`PATIENCE`] at most.
    pub fn keep(&self, batch: Batch, refused: &[Rejected]) {
        let inner = &self.inner;
        let bytes = weight(&batch);
        let before = inner.waiting.fetch_add(bytes, Ordering::Relaxed);
        let (done_tx, done) = sync_channel(1);
        let work = Work {
            batch,
            refused: refused.to_vec(),
            done_tx,
        };
        let is_too_much = before > 0 && before.saturating_add(bytes) > MAX_WAITING_BYTES;
        if is_too_much || inner.work_tx.try_send(work).is_err() {
            inner.waiting.fetch_sub(bytes, Ordering::Relaxed);
            inner.lost.notify_one();
            return;
        }
        // While the disk is behind, nobody waits for it twice.
        if before > 0 {
            inner.metrics.late();
        } else if done.recv_timeout(PATIENCE).is_err() {
            inner.metrics.late();
            tracing::warn!(limit = ?PATIENCE, "the disk is slow: what was told is in force, but not kept yet");
        }
    }

    /// Whether everything should be told again, because the journal ended and nothing of it is left to go on with.
    #[must_use]
    pub fn needs_everything(&self) -> bool {
        let broken = *self.inner.broken.lock();
        broken.is_some_and(|since| since.elapsed() >= BEGIN_ANEW_AFTER)
    }
}

impl Keeper {
    /// Writes until told to stop, and what still waits then.
    ///
    /// # Panics
    /// If the writer does.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let work = tokio::select! {
                // A loss goes first, and waits for nothing: what is on disk may grant what was denied since.
                biased;
                () = self.inner.lost.notified() => None,
                work = self.work.recv() => match work {
                    Some(work) => Some(work),
                    None => break,
                },
                () = stop.cancelled() => break,
            };
            let step = move || match work {
                Some(work) => self.keep(work),
                None => self.give_up(),
            };
            self = match spawn_blocking(step).await {
                Ok(keeper) => keeper,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
        }
    }

    fn give_up(mut self) -> Self {
        self.store.give_up();
        self.ended("more waits to be written than is good");
        // What was told before is not all: a journal that begins with it would lack what was lost.
        while let Ok(work) = self.work.try_recv() {
            self.done(work);
        }
        self
    }

    fn keep(mut self, work: Work) -> Self {
        match self.store.append(&work.batch, &work.refused) {
            Ok(Kept::Published) => {
                self.is_too_large = false;
                *self.inner.broken.lock() = None;
            }
            Ok(Kept::Succeeded) => *self.inner.broken.lock() = None,
            Ok(Kept::Baseless) if !self.is_too_large => {
                self.inner.broken.lock().get_or_insert_with(Instant::now);
            }
            Ok(Kept::Begun | Kept::Baseless) => {}
            Err(error) => {
                self.is_too_large = matches!(error, KeepError::TooLarge { .. });
                self.ended(&error_text(&error));
            }
        }
        self.inner.metrics.size(self.store.size());
        self.done(work);
        self
    }

    /// Whatever has become of it, nobody is to wait for it any longer.
    fn done(&self, work: Work) {
        let Work { batch, done_tx, .. } = work;
        let bytes = weight(&batch);
        self.inner.waiting.fetch_sub(bytes, Ordering::Relaxed);
        // Whoever waits may have given up.
        let _ = done_tx.try_send(());
    }

    fn ended(&self, reason: &str) {
        tracing::error!(
            reason,
            "the state of the mesh is not kept any longer, and what was kept is removed"
        );
        self.inner.metrics.failed();
        self.inner.metrics.size(self.store.size());
        *self.inner.broken.lock() = (!self.is_too_large).then(Instant::now);
    }
}

/// What a batch holds of memory; never nothing, since it is counted, too.
fn weight(batch: &Batch) -> usize {
    let resources: usize = batch.encoded().iter().map(|one| one.len()).sum();
    let removed: usize = batch.removed().iter().map(String::len).sum();
    1 + resources + removed
}

/// The whole chain of causes.
fn error_text(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}

/// Finds what a file that anybody may have written amounts to.
#[cfg(any(fuzzing, test))]
pub fn fuzz(bytes: &[u8]) {
    let mut live = live::Live::default();
    let mut input = bytes;
    let _ = format::read(&mut input, bytes.len() as u64, FUZZ_OWNER, &mut live);
}

/// How long an answer waits for the disk.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Batches that may wait.
const QUEUE: usize = 64;
/// Bytes of resources that may wait, unless they are of one batch.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// How long nothing is kept before everything is asked for again; streams end every half an hour by themselves.
const BEGIN_ANEW_AFTER: Duration = Duration::from_secs(600);
#[cfg(any(fuzzing, test))]
const FUZZ_OWNER: &str = "fuzz";

#[cfg(test)]
mod tests;

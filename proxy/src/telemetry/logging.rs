//! Log records: to stdout, one a line, in the shape that log pipelines of the mesh know.
//!
//! [`init`] installs the one subscriber of the process. A record is formatted in a buffer of its
//! thread and appended to a bounded queue; a writer thread empties the queue. Whoever logs never
//! waits: records that find the queue full are dropped and counted.

mod filter;
mod format;
mod layer;
#[cfg(test)]
mod model;
mod queue;
mod writer;

use std::{io, os::fd::AsFd, sync::Arc};

use arc_swap::ArcSwap;
use prometheus_client::registry::Registry;
use tracing_subscriber::layer::SubscriberExt;

pub use filter::{Filter, FilterError};

use self::{layer::LogLayer, queue::Queue, writer::Writer};
use crate::config::Logging;

/// What the queue synchronises with; `model` has the same in a form that tries all orders.
mod sync {
    pub(super) use std::sync::Arc;

    pub(super) use parking_lot::{Condvar, Mutex};
}

/// Keeps the log open. Dropping it writes what is queued, within a bounded time.
#[derive(Debug)]
#[must_use = "dropping the guard ends the log"]
pub struct LogGuard {
    writer: Writer,
    levels: Levels,
}

/// Reads and changes the level filter while the process runs.
#[derive(Debug, Clone)]
pub struct Levels {
    initial: Arc<Filter>,
    current: Arc<ArcSwap<Filter>>,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The configured filter cannot be read.
    #[error("bad log filter")]
    Filter(#[from] FilterError),
    /// Standard output or the writer thread could not be had.
    #[error("no writer for log records")]
    Writer(#[source] io::Error),
    /// The process has a subscriber already.
    #[error("logging was set up before")]
    Twice(#[source] tracing::subscriber::SetGlobalDefaultError),
}

/// Sends log records of the whole process to stdout from now on.
///
/// # Errors
/// The filter is malformed, stdout is closed, or logging was set up before.
pub fn init(settings: &Logging) -> Result<LogGuard, LogError> {
    let levels = Levels::new(Filter::initial(&settings.filter)?);
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    let stdout = std::fs::File::from(stdout.map_err(LogError::Writer)?);
    let writer = Writer::spawn(stdout).map_err(LogError::Writer)?;
    let layer = LogLayer::new(settings.format, levels.clone(), writer.queue());
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::set_global_default(subscriber).map_err(LogError::Twice)?;
    Ok(LogGuard { writer, levels })
}

impl LogGuard {
    /// The level filter.
    pub fn levels(&self) -> Levels {
        self.levels.clone()
    }

    /// What waits to be written.
    pub fn backlog(&self) -> Backlog {
        Backlog(self.writer.queue())
    }

    /// Exports `culvert_log_records_dropped_total`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "culvert_log_records_dropped",
            "Log records dropped because standard output did not take them (unstable)",
            self.writer.queue().dropped(),
        );
    }
}

/// What waits to be written.
#[derive(Debug, Clone, Default)]
pub struct Backlog(Queue);

impl Backlog {
    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Levels {
    fn new(initial: Filter) -> Self {
        let initial = Arc::new(initial);
        Self {
            current: Arc::new(ArcSwap::new(Arc::clone(&initial))),
            initial,
        }
    }

    /// The filter in force.
    pub fn current(&self) -> Arc<Filter> {
        self.current.load_full()
    }

    /// Puts `clauses` on top of the filter in force.
    ///
    /// # Errors
    /// A clause is malformed; nothing changes.
    pub fn append(&self, clauses: &str) -> Result<(), FilterError> {
        self.set(self.current().with(clauses)?);
        Ok(())
    }

    /// Puts `clauses`, which may be empty, on top of the filter the process began with.
    ///
    /// # Errors
    /// A clause is malformed; nothing changes.
    pub fn reset(&self, clauses: &str) -> Result<(), FilterError> {
        self.set(self.initial.with(clauses)?);
        Ok(())
    }

    fn set(&self, filter: Filter) {
        self.current.store(Arc::new(filter));
        // Call sites remember what the old filter said about them.
        tracing::callsite::rebuild_interest_cache();
    }
}

/// The scope of records that are documents, such as the configuration at start: in text format
/// their message keeps its lines. All other messages are held to one line, whatever is in them.
pub const DOCUMENT_SCOPE: &str = "config";

#[cfg(test)]
pub(super) mod tests;

//! Why the proxy does not start.

use std::io;

/// The proxy did not start; nothing of it runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration asks for parts that this version does not have.
    #[error("{}", .0.join("\n"))]
    NotAvailable(Vec<&'static str>),
    /// A thread pool could not be made.
    #[error("cannot start the worker threads")]
    Runtime(#[source] io::Error),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
}

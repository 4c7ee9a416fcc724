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

    /// Both phases at once.
    pub fn now(&self) {
        self.accept.cancel();
        self.force.cancel();
    }
}

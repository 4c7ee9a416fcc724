//! How the serving of a pod is told to end.

use tokio_util::sync::CancellationToken;

/// The two phases of stopping. Each token belongs to a tree, so stopping the process stops every
/// pod.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Stop {
    /// Close the listeners; what is open may finish.
    pub accept: CancellationToken,
    /// Cut everything now. Fires after, or together with, `accept`.
    pub force: CancellationToken,
}

impl Stop {
    /// Not stopped.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops when `self` does, and can be stopped by itself.
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

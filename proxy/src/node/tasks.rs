//! The long-lived tasks of the process, by name.

use std::collections::HashMap;

use tokio::{
    runtime::Handle,
    task::{Id, JoinError, JoinSet},
};

/// Owns the long-lived tasks. None of them may end before a stop is asked for.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    pub(super) fn start(
        &mut self,
        name: &'static str,
        on: &Handle,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let id = self.running.spawn_on(task, on).id();
        self.names.insert(id, name);
    }

    /// The name of the next task that ends, with a panic told.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(super) async fn next_ended(&mut self) -> &'static str {
        match self.running.join_next_with_id().await {
            Some(end) => self.forget(end),
            None => std::future::pending().await,
        }
    }

    /// Waits until no task runs but those of these names.
    pub(super) async fn finished_but(&mut self, names: &[&str]) {
        while self.names.values().any(|name| !names.contains(name)) {
            self.next_ended().await;
        }
    }

    /// Ends what still runs.
    pub(super) async fn abort(&mut self) {
        self.running.shutdown().await;
        self.names.clear();
    }

    fn forget(&mut self, end: Result<(Id, ()), JoinError>) -> &'static str {
        let (id, panic) = match end {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let name = self.names.remove(&id).unwrap_or("unnamed");
        if let Some(error) = panic.filter(JoinError::is_panic) {
            tracing::error!(
                task = name,
                error = &error as &dyn std::error::Error,
                "a task ended by a panic"
            );
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_is_named() {
        let mut tasks = Tasks::default();
        tasks.start("lasting", &Handle::current(), std::future::pending());
        tasks.start("short", &Handle::current(), async {});
        assert_eq!(tasks.next_ended().await, "short");
        tasks.finished_but(&["lasting"]).await;
        tasks.abort().await;
        tasks.finished_but(&[]).await;
    }

    #[tokio::test]
    async fn a_panic_is_an_end() {
        let mut tasks = Tasks::default();
        tasks.start("broken", &Handle::current(), async { panic!("on purpose") });
        assert_eq!(tasks.next_ended().await, "broken");
    }
}

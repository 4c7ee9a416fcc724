//! The pods that are being served: one task each.

use std::{collections::HashMap, error::Error, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Launch, Pod, Settings, Stop, roster::Stage, zds::Candidate};
use crate::{
    config::WorkloadRef,
    listen::{self, Netns, Watch},
    telemetry::{PodMetrics, with_causes},
};

/// The real [`Stage`].
pub(super) struct Instances {
    settings: Arc<Settings>,
    launch: Arc<dyn Launch>,
    metrics: PodMetrics,
    stop: Stop,
    tasks: JoinSet<()>,
    /// Whom the tasks serve, those included that are being cut.
    running: HashMap<Id, Served>,
}

/// Whom a task serves.
#[derive(Debug, Clone)]
pub(super) struct Served {
    pub(super) uid: Arc<str>,
    pub(super) who: WorkloadRef,
    netns: Arc<Netns>,
    stop: Stop,
}

/// One pod that is up.
#[derive(Debug)]
pub(super) struct Instance {
    id: Id,
    stop: Stop,
    listening: Watch,
}

impl Instance {
    pub(super) fn id(&self) -> Id {
        self.id
    }
}

impl Instances {
    /// None yet. Firing a token of `stop` stops all.
    pub(super) fn new(
        settings: Arc<Settings>,
        launch: Arc<dyn Launch>,
        metrics: PodMetrics,
        stop: Stop,
    ) -> Self {
        Self {
            settings,
            launch,
            metrics,
            stop,
            tasks: JoinSet::new(),
            running: HashMap::new(),
        }
    }

    /// Waits for a task to end; `None` if there is none.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next_ended(&mut self) -> Option<(Id, Served)> {
        loop {
            let (id, panic) = match self.tasks.join_next_with_id().await? {
                Ok((id, ())) => (id, None),
                Err(error) => (error.id(), Some(error)),
            };
            self.metrics.stopped.inc();
            // Every task is entered when it is spawned, so there always is one.
            let Some(served) = self.running.remove(&id) else {
                continue;
            };
            if let Some(panic) = panic.filter(JoinError::is_panic) {
                let panic = &panic as &dyn Error;
                error!(uid = %served.uid, error = panic, "the proxy of a pod panicked");
            }
            return Some((id, served));
        }
    }

    /// Everyone who has a task.
    pub(super) fn served(&self) -> impl Iterator<Item = &Served> {
        self.running.values()
    }

    /// Waits for all tasks, as long as they take.
    pub(super) async fn finish(&mut self) {
        while self.next_ended().await.is_some() {}
    }
}

impl Stage for Instances {
    type Netns = Arc<Netns>;
    type Instance = Instance;

    fn same(one: &Arc<Netns>, other: &Arc<Netns>) -> bool {
        one.id() == other.id()
    }

    fn start(&mut self, candidate: &Candidate<Arc<Netns>>) -> Result<Instance, String> {
        let Candidate { uid, who, netns } = candidate;
        let Settings {
            sockets,
            ports,
            data,
            ..
        } = &*self.settings;
        let _register_here = data.enter();
        let listeners = listen::bind(netns, sockets, ports).map_err(|error| with_causes(&error))?;
        let listening = listeners.watch();
        let pod = Pod {
            uid: Arc::clone(uid),
            who: who.clone(),
            netns: Arc::clone(netns),
            listeners,
        };
        let stop = self.stop.child();
        // Here and not in the task: what it binds must be there when the agent is told so.
        let serving = self.launch.launch(pod, stop.clone());
        let task = until_forced(serving, Arc::clone(uid), stop.force.clone());
        let id = self.tasks.spawn_on(task, data).id();
        let served = Served {
            uid: Arc::clone(uid),
            who: who.clone(),
            netns: Arc::clone(netns),
            stop: stop.clone(),
        };
        self.running.insert(id, served);
        self.metrics.started.inc();
        info!(%uid, name = %who.name, namespace = %who.namespace, "pod is up");
        Ok(Instance {
            id,
            stop,
            listening,
        })
    }

    fn cut(&mut self, is_gone: impl Fn(&str, &Arc<Netns>) -> bool) {
        for served in self.running.values() {
            let Served {
                uid,
                who,
                netns,
                stop,
            } = served;
            if !stop.force.is_cancelled() && is_gone(uid, netns) {
                stop.now();
                info!(%uid, name = %who.name, namespace = %who.namespace, "pod is cut");
            }
        }
    }

    fn deaf(&self, instance: &Instance) -> Vec<u16> {
        instance.listening.deaf()
    }

    fn retire(&mut self, instance: Instance) {
        instance.stop.accept.cancel();
    }
}

/// The task of one pod. Whoever ignores the force token is dropped.
async fn until_forced(serving: BoxFuture<'static, ()>, uid: Arc<str>, force: CancellationToken) {
    tokio::select! {
        () = serving => {}
        () = overdue(force) => warn!(%uid, "the proxy of a pod did not stop in time and was dropped"),
    }
}

async fn overdue(force: CancellationToken) {
    force.cancelled().await;
    sleep(FORCED_LIMIT).await;
}

/// How long a pod may take to end after it was told to cut everything.
const FORCED_LIMIT: Duration = Duration::from_secs(2);

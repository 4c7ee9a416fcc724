//! Whether the pods that we believe in are served in truth.
//!
//! Two things can go wrong behind our back: a listener of ours is closed by someone else, and the CNI agent's rules in the pod are
//! lost. The first is repaired by opening it again ([`Roster::audit`](super::roster::Roster::audit)); of the second we can only tell.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use tokio::{task::JoinSet, time::Instant};
use tracing::{info, warn};

use crate::{
    config::WorkloadRef,
    listen::{self, Netns, Probed},
};

/// Finds out about all pods from time to time.
#[derive(Debug)]
pub(super) struct Audit {
    due: Instant,
    /// The probes of one round, unless they are done.
    probing: JoinSet<Vec<Finding>>,
    found: HashMap<Arc<str>, Probed>,
}

/// A pod to be probed.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) uid: Arc<str>,
    pub(super) who: WorkloadRef,
    pub(super) netns: Arc<Netns>,
}

type Finding = (Suspect, Probed);

impl Audit {
    /// The first round comes a full interval from now, or when [`Self::soon`] says so.
    pub(super) fn new() -> Self {
        Self {
            due: Instant::now() + INTERVAL,
            probing: JoinSet::new(),
            found: HashMap::new(),
        }
    }

    /// The agent has just named its pods.
    pub(super) fn soon(&mut self) {
        self.due = self.due.min(Instant::now() + SETTLING);
    }

    /// When a round is to begin.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Probes these pods. A round that is still under way goes on instead.
    pub(super) fn begin(&mut self, pods: Vec<Suspect>) {
        self.due = Instant::now() + INTERVAL;
        if !self.probing.is_empty() {
            return;
        }
        let there: HashSet<_> = pods.iter().map(|pod| &pod.uid).collect();
        self.found.retain(|uid, _| there.contains(uid));
        self.probing.spawn(async {
            let probe = async |pod: Suspect| {
                let probed = listen::probe(&pod.netns).await;
                (pod, probed)
            };
            stream::iter(pods)
                .map(probe)
                .buffer_unordered(AT_ONCE)
                .collect()
                .await
        });
    }

    /// Waits for the end of a round, and tells what has changed. Never ready while there is none.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(super) async fn ended(&mut self) {
        match self.probing.join_next().await {
            Some(Ok(findings)) => findings.into_iter().for_each(|one| self.note(one)),
            // A probe that panicked has told so; the next round tries again.
            Some(Err(_)) => {}
            None => std::future::pending().await,
        }
    }

    fn note(&mut self, (pod, probed): Finding) {
        let WorkloadRef {
            namespace, name, ..
        } = &pod.who;
        let before = self.found.insert(Arc::clone(&pod.uid), probed);
        let was = before.is_some_and(|before| before.is_unprotected());
        match (was, probed.is_unprotected()) {
            (false, true) => warn!(
                uid = %pod.uid, %namespace, %name,
                "connections of this pod are not redirected to the proxy: the rules in its network namespace are missing; \
                 restart the CNI agent, or the pod"
            ),
            (true, false) => {
                info!(uid = %pod.uid, %namespace, %name, "connections of this pod are redirected again");
            }
            (false, false) | (true, true) => {}
        }
    }

    /// What is known of a pod.
    pub(super) fn of(&self, uid: &str) -> Option<Probed> {
        self.found.get(uid).copied()
    }
}

/// An idle process sleeps at least this long.
const INTERVAL: Duration = Duration::from_secs(30);
/// Pods of a snapshot come in a burst that an audit should not make longer.
const SETTLING: Duration = Duration::from_secs(1);
/// Pods that are probed at a time.
const AT_ONCE: usize = 16;

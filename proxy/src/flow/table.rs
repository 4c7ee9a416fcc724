//! The flows of one pod, each with what decided it, and what they found out for those to come.
//!
//! A flow is entered before it is judged, so that no policy change falls between the verdict and
//! the entry; `judge` walks the table on every change of the mesh and ends what may no longer be.
//! The admin page lists the same entries.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use cert_agent::SpiffeId;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::silent::Silent;
use crate::{
    mesh::Workload,
    policy::{Denied, Note},
    telemetry::Watch,
};

/// Live flows of one pod. An entry costs about 300 bytes and leaves when its flow ends.
#[derive(Debug, Default)]
pub struct FlowTable {
    flows: Mutex<slab::Slab<Arc<Facts>>>,
    silent: Silent,
}

impl FlowTable {
    /// Enters a flow in which the pod shows itself as `shown`, if it does. It stays listed until the returned guard is dropped.
    #[must_use]
    pub(super) fn enter(
        self: &Arc<Self>,
        direction: Direction,
        shown: Option<SpiffeId>,
        watch: Watch,
    ) -> Entry {
        let facts = Arc::new(Facts {
            direction,
            shown,
            watch,
            began: Instant::now(),
            verdict: OnceLock::new(),
            revoked: OnceLock::new(),
            task: AtomicWaker::new(),
        });
        let key = self.flows.lock().insert(Arc::clone(&facts));
        Entry {
            facts,
            key,
            table: Arc::clone(self),
        }
    }

    /// Endpoints that did not answer the pod lately: others go first. At most 64.
    #[must_use]
    pub fn silent_endpoints(&self) -> Vec<Arc<Workload>> {
        self.silent.list()
    }

    /// The same, as flows use it.
    pub(super) fn silent(&self) -> &Silent {
        &self.silent
    }

    /// Copies out what is open now.
    #[must_use]
    pub fn open(&self) -> Vec<Arc<Facts>> {
        self.flows
            .lock()
            .iter()
            .map(|(_, facts)| Arc::clone(facts))
            .collect()
    }

    /// How many flows are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.lock().len()
    }

    /// Whether no flow is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which way a flow runs, and who talks to whom.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Direction {
    /// From the pod's application outwards.
    Outbound {
        /// Address of the application.
        source: SocketAddr,
        /// Address it dialled.
        original: SocketAddr,
        /// Address that was dialled for it.
        actual: SocketAddr,
        /// How the bytes travel.
        carried: Carried,
    },
    /// From a peer to the pod's application.
    Inbound {
        /// Address of the peer.
        source: SocketAddr,
        /// Address of the application.
        destination: SocketAddr,
        /// Who the peer proved to be; `None` over plaintext.
        identity: Option<SpiffeId>,
        /// The service that the peer said it dialled.
        service: Option<Arc<str>>,
    },
}

/// How the bytes of an outbound flow travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Carried {
    /// Plain TCP.
    Tcp,
    /// One HBONE tunnel.
    Hbone,
    /// From socket to socket, within this process.
    SameNode,
    /// A tunnel inside one to the gateway of another network.
    DoubleHbone,
}

/// One open flow as others see it.
#[derive(Debug)]
pub struct Facts {
    direction: Direction,
    shown: Option<SpiffeId>,
    watch: Watch,
    began: Instant,
    verdict: OnceLock<Note>,
    /// Boxed, since it is rare.
    revoked: OnceLock<Box<Revocation>>,
    /// The task of the flow.
    task: AtomicWaker,
}

impl Facts {
    /// Which way the flow runs, and who talks to whom.
    #[must_use]
    pub fn direction(&self) -> &Direction {
        &self.direction
    }

    /// Its names, identities and bytes.
    #[must_use]
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// How long it has been there.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// What policies said when it was judged; `None` for outbound flows, and before.
    #[must_use]
    pub fn verdict(&self) -> Option<&Note> {
        self.verdict.get()
    }

    /// Whether the pod, whose record is `local`, has proven to the peer to be somebody else. Never in plaintext.
    pub(super) fn is_disowned(&self, local: &Workload) -> bool {
        self.shown.is_some() && self.shown.as_ref() != local.identity()
    }

    /// Ends the flow. Its task sees it at its next step.
    pub(super) fn revoke(&self, why: Revocation) {
        // The first reason is the one that is told.
        let _ = self.revoked.set(Box::new(why));
        self.task.wake();
    }
}

/// Why an open flow may no longer be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Revocation {
    /// A policy change forbids what was allowed when it began.
    #[error("connection closed due to policy change")]
    Policy(#[source] Denied),
    /// The pod is no longer who it has shown itself to be.
    #[error("connection closed: the identity of the local workload has changed")]
    Identity,
}

/// Keeps a flow listed for as long as it lives.
#[derive(Debug)]
pub(super) struct Entry {
    facts: Arc<Facts>,
    key: usize,
    table: Arc<FlowTable>,
}

impl Entry {
    /// The flow as others see it.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Tells what policies said.
    pub(super) fn judged(&self, verdict: &Note) {
        // A flow is judged once before it opens; later judgements only end it.
        let _ = self.facts.verdict.set(verdict.clone());
    }

    /// Ready once the flow may no longer be.
    pub(super) fn poll_revoked(&self, cx: &mut Context<'_>) -> Poll<Revocation> {
        // First the task, then the look: a revocation in between wakes it.
        self.facts.task.register(cx.waker());
        match self.facts.revoked.get() {
            Some(why) => Poll::Ready(Revocation::clone(why)),
            None => Poll::Pending,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let _ = self.table.flows.lock().try_remove(self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::telemetry::{Labels, Party, Reporter, Security, ServiceName, Traffic};

    fn inbound(port: u16) -> Direction {
        Direction::Inbound {
            source: SocketAddr::from(([10, 0, 0, 1], port)),
            destination: SocketAddr::from(([10, 0, 0, 2], 80)),
            identity: None,
            service: None,
        }
    }

    fn watch() -> Watch {
        let labels = Labels {
            reporter: Reporter::Destination,
            security: Security::Unknown,
            source: Party::default(),
            destination: Party::default(),
            service: ServiceName::default(),
        };
        Traffic::default().open(&labels).watch()
    }

    #[test]
    fn an_entry_leaves_when_its_guard_is_dropped() {
        let table = Arc::new(FlowTable::default());
        let first = table.enter(inbound(1), None, watch());
        let second = table.enter(inbound(2), None, watch());
        assert_eq!(table.len(), 2);
        drop(first);
        assert_eq!(table.len(), 1);
        drop(second);
        assert!(table.is_empty());
    }

    #[test]
    fn a_revocation_is_seen_before_and_during_the_wait() {
        let table = Arc::new(FlowTable::default());
        let entry = table.enter(inbound(1), None, watch());
        let facts = table.open();
        let mut wait = waiting(&entry);
        assert!(wait.next().is_pending());
        facts[0].revoke(Revocation::Policy(Denied::NotAllowed));
        facts[0].revoke(Revocation::Identity);
        let first = Poll::Ready(Revocation::Policy(Denied::NotAllowed));
        assert!(wait.woken() && wait.next() == first);
    }

    /// Polls an entry by hand and tells whether it was woken since.
    struct Waiting<'a> {
        entry: &'a Entry,
        bell: Arc<Bell>,
    }

    #[derive(Default)]
    struct Bell(AtomicBool);

    impl std::task::Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn waiting(entry: &Entry) -> Waiting<'_> {
        Waiting {
            entry,
            bell: Arc::default(),
        }
    }

    impl Waiting<'_> {
        fn next(&mut self) -> Poll<Revocation> {
            let waker = Arc::clone(&self.bell).into();
            self.entry.poll_revoked(&mut Context::from_waker(&waker))
        }

        fn woken(&self) -> bool {
            self.bell.0.load(Ordering::SeqCst)
        }
    }
}

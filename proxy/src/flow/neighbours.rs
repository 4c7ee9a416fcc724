//! Flows between two pods of this process, without a tunnel (`SAME_NODE=direct`).
//!
//! A tunnel from one pod to another of the same node is encrypted and decrypted by one process, for a way that never leaves
//! the kernel. Where the operator allows it, the flow goes from the client's socket to the application's instead. What a
//! tunnel would have proven is asked for all the same: valid certificates of both sides that each other's verifier accepts,
//! the destination's own route and policies, and a new judgement on every change. Both sides report the flow as they would
//! report a tunnel's.
//!
//! This path is for flows that go well. Whatever stands against one sends it through a tunnel, which then fails at the right
//! place and with the right words.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use cert_agent::{Agent, SpiffeId, Svid};
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{Pod, Stop};
use crate::{
    config::WorkloadRef,
    mesh::Workload,
    route::{HBONE_PORT, Hop, Via},
};

#[cfg(test)]
mod tests;
mod visit;

pub(super) use visit::{Errand, Visit, visit};

/// The pods that this process serves, known to each other.
#[derive(Debug, Default)]
pub struct Neighbours(RwLock<HashMap<WorkloadRef, Arc<Neighbour>>>);

/// A pod that other pods of this process can reach.
#[derive(Debug)]
pub(super) struct Neighbour {
    pod: Weak<Pod>,
    stop: Stop,
    /// Flows of other pods that lead here.
    visits: TaskTracker,
    acquaintances: Acquaintances,
}

impl Neighbours {
    /// Lets other pods reach `pod` until `stop`. Ready once the last flow that came so has ended: those that remain when
    /// `stop` forces the end are cut.
    pub(super) async fn host(&self, pod: &Arc<Pod>, stop: &Stop) {
        let neighbour = Arc::new(Neighbour {
            pod: Arc::downgrade(pod),
            stop: stop.clone(),
            visits: TaskTracker::new(),
            acquaintances: Acquaintances::default(),
        });
        let listed = Listed::new(self, pod.who().clone(), &neighbour);
        stop.accept.cancelled().await;
        drop(listed);
        neighbour.visits.close();
        neighbour.visits.wait().await;
    }

    /// Whom `hop` leads to, if that is a pod of this process and both sides may do without a tunnel. The client must be at `from`,
    /// an address of `source`: it is what policies and the application see, and a tunnel would show no other.
    pub(super) fn find(
        &self,
        pod: &Pod,
        (source, from): (&Workload, IpAddr),
        hop: &Hop,
    ) -> Option<Arc<Neighbour>> {
        if !source.addresses().contains(&from) {
            return None;
        }
        let (settings, target) = (&pod.settings().same_node, &hop.workload);
        let may = |workload: &Workload| settings.is_direct(workload.namespace());
        if hop.via != Via::Workload || hop.to.port() != HBONE_PORT || !may(source) || !may(target) {
            return None;
        }
        let who = WorkloadRef::new(
            Arc::clone(target.namespace()),
            target.name(),
            Arc::clone(target.service_account()),
        );
        let neighbour = self.0.read().get(&who).map(Arc::clone)?;
        let local = neighbour.pod.upgrade()?.known_workload()?;
        let same = local.uid() == target.uid() && local.addresses().contains(&hop.to.ip());
        same.then_some(neighbour)
    }
}

/// Lists a pod for as long as it lives.
struct Listed<'a> {
    neighbours: &'a Neighbours,
    who: WorkloadRef,
    neighbour: &'a Arc<Neighbour>,
}

impl<'a> Listed<'a> {
    fn new(neighbours: &'a Neighbours, who: WorkloadRef, neighbour: &'a Arc<Neighbour>) -> Self {
        let mut listed = neighbours.0.write();
        listed.insert(who.clone(), Arc::clone(neighbour));
        drop(listed);
        Self {
            neighbours,
            who,
            neighbour,
        }
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let mut listed = self.neighbours.0.write();
        // A pod of the same name may have come meanwhile.
        if listed
            .get(&self.who)
            .is_some_and(|it| Arc::ptr_eq(it, self.neighbour))
        {
            listed.remove(&self.who);
        }
    }
}

/// Pairs of certificates that accept each other, by the identity of the source.
#[derive(Debug, Default)]
struct Acquaintances(Mutex<HashMap<SpiffeId, Acquaintance>>);

#[derive(Debug)]
struct Acquaintance {
    source: Weak<Svid>,
    own: Weak<Svid>,
    expected: Arc<[SpiffeId]>,
    /// The state of the revocation lists.
    lists: Option<u64>,
    until: Instant,
}

/// How long the verifiers are not asked again about the same two certificates. Trust anchors that change are seen after this
/// at the latest, as a tunnel sees them with its next connection; certificates that end are seen at once.
const REMEMBERED: Duration = Duration::from_secs(10);

/// Identities that are remembered for one pod. One more, and all are forgotten.
const MOST_REMEMBERED: usize = 256;

impl Acquaintances {
    /// Whether the sides, meeting now, would accept each other.
    fn agree(
        &self,
        agent: &Agent,
        (source, own): (&Arc<Svid>, &Arc<Svid>),
        expected: &Arc<[SpiffeId]>,
    ) -> bool {
        let (now, lists) = (
            SystemTime::now(),
            agent.revocations().changes().map(|seen| *seen.borrow()),
        );
        if !source.is_valid_at(now) || !own.is_valid_at(now) {
            return false;
        }
        let is_known = |known: &Acquaintance| {
            let is = |held: &Weak<Svid>, svid: &Arc<Svid>| held.as_ptr() == Arc::as_ptr(svid);
            is(&known.source, source)
                && is(&known.own, own)
                && known.expected == *expected
                && known.lists == lists
                && Instant::now() < known.until
        };
        if self.0.lock().get(source.id()).is_some_and(is_known) {
            return true;
        }
        if let Err(error) = source.would_meet(own, expected) {
            tracing::debug!(source = %source.id(), destination = %own.id(), %error, "no flow without a tunnel");
            return false;
        }
        let mut known = self.0.lock();
        if known.len() >= MOST_REMEMBERED {
            known.clear();
        }
        let acquaintance = Acquaintance {
            source: Arc::downgrade(source),
            own: Arc::downgrade(own),
            expected: Arc::clone(expected),
            lists,
            until: Instant::now() + REMEMBERED,
        };
        known.insert(source.id().clone(), acquaintance);
        true
    }
}

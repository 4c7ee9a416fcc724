//! What the node knows of the mesh: workloads, services, policies, and the indexes that find them.
//!
//! Resources come from the control plane ([`Mesh::apply`]) or a local file ([`Mesh::load`]), one update at a time; they are
//! converted and compared with what is held before readers are shut out, and one that says nothing new changes nothing. Many readers look
//! things up under a short read lock ([`Mesh::read`]) and keep the `Arc` records that they need.
//!
//! Memory is what decides the shape of the records: what the pods of a deployment have in common is stored once, and
//! indexes hold small numbers instead of keys.

mod convert;
mod index;
mod intake;
mod intern;
mod order;
mod origin;
mod policy;
mod port;
mod record;
mod service;
mod state;
mod turns;
mod workload;

pub use convert::{Invalid, Rejection};
pub use origin::Source;
pub use policy::{
    Action, Clause, Condition, Match, Policy, PolicyScope, Rule, ServiceAccount, StringMatch,
};
pub use port::{PortMap, TargetPort};
pub use service::{
    Cidr, Destination, GatewayAddress, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode,
    Scope, Service, Vip, Visibility, WeightedWaypoint,
};
pub use state::{Applicable, Counts, Endpoint, State};
pub use workload::{
    ApplicationTunnel, Health, Link, NetworkMode, Protocol, TunnelProtocol, Workload, WorkloadType,
};

use std::{ops::Deref, sync::Arc, time::SystemTime};

use cert_agent::SpiffeId;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use xds_client::{Batch, Kind, Versions, local::Document};

use crate::config::WorkloadRef;
use intake::{Intake, Taken};
use intern::Pool;
use record::Record;
use state::{Effects, Step};
use turns::Turns;

/// From where the mesh is looked at.
#[derive(Debug, Clone)]
pub struct View {
    /// The Kubernetes node; `None` makes every workload count as local.
    pub node_name: Option<Arc<str>>,
    /// The network this node is in; empty is the default network.
    pub network: Arc<str>,
    /// The cluster this node is in.
    pub cluster_id: Arc<str>,
}

/// A handle to the mesh state; clones share it.
#[derive(Debug, Clone)]
pub struct Mesh {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Turns<State>,
    /// Held for the whole of a write; taken before the state.
    pool: Mutex<Pool>,
    changes: watch::Sender<u64>,
}

/// What came of an update.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// Resources that were refused; what was held under their names stays in force.
    pub rejected: Vec<Rejection>,
    /// Workloads inserted, replaced or removed.
    pub workloads: usize,
    /// Services inserted, replaced or removed.
    pub services: usize,
    /// Policies inserted, replaced or removed.
    pub policies: usize,
    /// Identities of meshed workloads of this node that had none before the update.
    pub identities_appeared: Vec<SpiffeId>,
    /// Identities of meshed workloads of this node that have none after it.
    pub identities_departed: Vec<SpiffeId>,
}

impl Report {
    /// Whether anything is different now.
    #[must_use]
    pub fn is_effective(&self) -> bool {
        self.workloads + self.services + self.policies > 0
    }
}

impl Mesh {
    /// An empty mesh.
    #[must_use]
    pub fn new(view: View) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Turns::new(State::new(view)),
                pool: Mutex::default(),
                changes: watch::Sender::new(0),
            }),
        }
    }

    /// The state, for a short look: never across an await, and never a second time while the first is held, which could
    /// wait for a writer that waits for the first.
    pub fn read(&self) -> impl Deref<Target = State> + '_ {
        self.shared.state.read()
    }

    /// A number that grows with every effective change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// The record of a pod of this node; waits until `deadline` for it to be told of: a pod may be captured before the control
    /// plane has told of it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn local_workload(
        &self,
        who: &WorkloadRef,
        deadline: Instant,
    ) -> Option<Arc<Workload>> {
        let known = || self.read().local_workload(who).cloned();
        if let Some(known) = known() {
            return Some(known);
        }
        let mut changes = self.changes();
        let appears = async {
            loop {
                if let Some(known) = known() {
                    return Some(known);
                }
                changes.changed().await.ok()?;
            }
        };
        timeout_at(deadline, appears).await.ok().flatten()
    }

    /// Applies what the control plane told. Updates wait for each other; readers wait only while records that
    /// really changed are put in place, and of a large batch they may see a part before the rest: but all its policies at once, and
    /// never an address without an owner that moves from one record to another. Blocks the thread, which must be none that serves connections.
    pub fn apply(&self, batch: &Batch) -> Report {
        self.write(|intake| intake.batch(batch))
    }

    /// Makes what a local file told equal to `document`. What it refuses or could not read stays as it was. What the control plane told
    /// stays known: of a name that both tell, the last word is in force, and when its source removes it, the other's.
    pub fn load(&self, document: &Document) -> Report {
        self.write(|intake| intake.document(document))
    }

    /// Says that what is held was told at `told`, before this process started: it may have changed since. Waits for an update that
    /// is being taken in, as [`Self::apply`] does.
    pub fn recall(&self, told: SystemTime) {
        self.set_recalled(Some(told));
    }

    /// Says that the control plane has answered, and what is held is what it knows. Waits as [`Self::recall`] does.
    pub fn confirm(&self) {
        self.set_recalled(None);
    }

    fn set_recalled(&self, told: Option<SystemTime>) {
        {
            // An update that is taken in looks at the state all the while: who waited for that inside the lock would keep all others out.
            let _writing = self.shared.pool.lock();
            self.shared.state.write(|state| state.set_recalled(told));
        }
        let changes = &self.shared.changes;
        changes.send_modify(|generation| *generation += 1);
    }

    /// All workloads in order of their uid, each with who told of it.
    ///
    /// Copied in parts, with writers let in between: a change meanwhile may be seen or not.
    #[must_use]
    pub fn workloads(&self) -> Vec<(Arc<Workload>, Source)> {
        let mut all = self.gather(State::workload_page);
        all.sort_by(|(one, _), (other, _)| one.uid().cmp(other.uid()));
        all.dedup_by(|(later, _), (earlier, _)| later.uid() == earlier.uid());
        all
    }

    /// All services in order of their host names, each with who told of it; copied as [`Self::workloads`] are.
    #[must_use]
    pub fn services(&self) -> Vec<(Arc<Service>, Source)> {
        let mut all = self.gather(State::service_page);
        let order = |service: &Service| (Arc::clone(service.hostname()), Arc::clone(service.key()));
        all.sort_by_cached_key(|(service, _)| order(service));
        all.dedup_by(|(later, _), (earlier, _)| later.key() == earlier.key());
        all
    }

    /// All policies in order of their keys, each with who told of it.
    #[must_use]
    pub fn policies(&self) -> Vec<(Arc<Policy>, Source)> {
        let mut all: Vec<_> = self.read().policies_told().collect();
        all.sort_by(|(one, _), (other, _)| one.key.cmp(&other.key));
        all
    }

    /// Copies out page by page, each under a short lock of its own.
    fn gather<T>(&self, page: impl Fn(&State, usize, usize) -> Option<Vec<T>>) -> Vec<T> {
        let mut all = Vec::new();
        for from in (0..).step_by(PAGE) {
            match page(&self.read(), from, PAGE) {
                Some(more) => all.extend(more),
                None => break,
            }
        }
        all
    }

    /// Tells names and versions of what the control plane told, for as long as there is room.
    pub fn versions(&self, kind: Kind, versions: &mut Versions) {
        self.read().versions(kind, |name, version| {
            if !versions.is_over() {
                versions.add(name, version);
            }
        });
    }

    fn write(&self, take_in: impl FnOnce(&mut Intake<'_>)) -> Report {
        let mut pool = self.shared.pool.lock();
        // Nobody else writes while the pool is ours: what is read here is still so below.
        let (turns, more, rejected) = {
            let state = self.shared.state.read();
            let mut intake = Intake::new(&state, &mut pool);
            take_in(&mut intake);
            let Taken { steps, rejected } = intake.finish();
            let puts = |step: &&Step| matches!(step, Step::Put(Record::Workload(_), _));
            let more = steps.iter().filter(puts).count();
            let turns = order::turns(steps, &state, STEPS_AT_ONCE);
            (turns, more, rejected)
        };
        let mut report = self.put_in_force(turns, more, &mut pool);
        // What was refused may have left shared parts that nobody holds, too.
        pool.release(rejected.len());
        report.rejected = rejected;
        report
    }

    /// Takes the turns, in which there may be `more` workloads than before.
    fn put_in_force(
        &self,
        turns: impl Iterator<Item = Vec<Step>>,
        mut more: usize,
        pool: &mut Pool,
    ) -> Report {
        let mut effects = Effects::default();
        let mut turns = turns.peekable();
        while let Some(turn) = turns.next() {
            self.shared.state.write(|state| {
                state.reserve_for(std::mem::take(&mut more));
                state.apply(turn, &mut effects);
            });
            let released = effects.old.len();
            effects.old.clear();
            pool.release(released);
            if turns.peek().is_some() {
                Turns::<State>::pause();
            }
        }
        let [identities_appeared, identities_departed] = effects.identities(&self.read());
        if effects.total() > 0 {
            let changes = &self.shared.changes;
            changes.send_modify(|generation| *generation += 1);
        }
        Report {
            rejected: Vec::new(),
            workloads: effects.workloads,
            services: effects.services,
            policies: effects.policies,
            identities_appeared,
            identities_departed,
        }
    }
}

/// How many records are copied out before writers are let in.
const PAGE: usize = 1024;
/// How many records are put in place in one turn, unless more belong together: some 30 µs.
const STEPS_AT_ONCE: usize = 32;

#[cfg(test)]
mod tests;

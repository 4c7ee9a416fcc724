//! What the node knows of the mesh: workloads, services, policies, and the indexes that find them.
//!
//! One writer hands over resources ([`Mesh::apply`], [`Mesh::replace`]); they are converted and compared with what is
//! held before readers are shut out, and a resource that says nothing new changes nothing. Many readers look
//! things up under a short read lock ([`Mesh::read`]) and keep the `Arc` records that they need.
//!
//! Memory is what decides the shape of the records: what the pods of a deployment have in common is stored once, and
//! indexes hold small numbers instead of keys.

mod convert;
mod diff;
mod index;
mod intern;
mod policy;
mod port;
mod service;
mod state;
mod workload;

pub use convert::{Invalid, Rejection};
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

use std::{ops::Deref, sync::Arc};

use cert_agent::SpiffeId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use xds_client::{
    local::{Document, NamedPolicy},
    proto::workload::Address,
};

use intern::Pool;
use state::{Change, Record};

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
    state: RwLock<State>,
    /// Held for the whole of a write; taken before the state.
    pool: Mutex<Pool>,
    changes: watch::Sender<u64>,
}

/// Resources to apply. Added ones go in their order, the last of one name holds; removals go after them.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Workloads and services.
    pub addresses: Vec<Address>,
    /// Policies under their resource names.
    pub policies: Vec<NamedPolicy>,
    /// Names of workloads and services that are gone: a uid, else `namespace/hostname`. Unknown ones are ignored.
    pub removed_addresses: Vec<String>,
    /// Names of policies that are gone. Unknown ones are ignored.
    pub removed_policies: Vec<String>,
    /// Names of resources that exist, but could not be read: [`Mesh::replace`] keeps what it holds under them.
    pub unreadable: Vec<String>,
}

impl From<Document> for Update {
    fn from(document: Document) -> Self {
        Self {
            addresses: document.addresses,
            policies: document.policies,
            unreadable: document.rejected.into_iter().map(|one| one.name).collect(),
            ..Self::default()
        }
    }
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
    fn of(changes: &[Change]) -> Self {
        let mut report = Self::default();
        for change in changes {
            let (Change::Put(record) | Change::Drop(record)) = change;
            let count = match record {
                Record::Workload(_) => &mut report.workloads,
                Record::Service(_) => &mut report.services,
                Record::Policy(_) => &mut report.policies,
            };
            *count += 1;
        }
        report
    }

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
                state: RwLock::new(State::new(view)),
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

    /// Applies an update as one step. Updates wait for each other; readers wait only while records that
    /// really changed are put in place.
    pub fn apply(&self, update: Update) -> Report {
        self.write(update, Extent::Delta)
    }

    /// Makes the state equal to `full`: what it does not name is removed, what it refuses or cannot read stays.
    pub fn replace(&self, full: Update) -> Report {
        self.write(full, Extent::Full)
    }

    fn write(&self, update: Update, extent: Extent) -> Report {
        let mut pool = self.shared.pool.lock();
        let (records, rejected) = diff::convert(update.addresses, update.policies, &mut pool);
        let gone = diff::Gone {
            addresses: update.removed_addresses,
            policies: update.removed_policies,
        };
        // Nobody else writes while the pool is ours: what is read here is still so below.
        let changes = {
            let state = self.shared.state.read();
            let mut changes = diff::additions(&state, &records);
            let removals = diff::removals(&state, &gone, &changes);
            if extent == Extent::Full {
                let refused = rejected.iter().map(|one| &*one.name);
                let unreadable = update.unreadable.iter().map(|name| &**name);
                let unusable: Vec<_> = refused.chain(unreadable).collect();
                changes.extend(diff::absences(&state, &records, &unusable));
            }
            changes.extend(removals);
            changes
        };
        let mut report = Report::of(&changes);
        let mut old = Vec::new();
        if report.is_effective() {
            let identities = self.shared.state.write().apply(changes, &mut old);
            report.identities_appeared = identities.appeared;
            report.identities_departed = identities.departed;
            let changes = &self.shared.changes;
            changes.send_modify(|generation| *generation += 1);
        }
        // What was refused may have left shared parts that nobody holds, too.
        let released = old.len() + rejected.len();
        drop((records, old));
        pool.release(released);
        report.rejected = rejected;
        report
    }
}

/// Whether an update is all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Delta,
    Full,
}

#[cfg(test)]
mod tests;

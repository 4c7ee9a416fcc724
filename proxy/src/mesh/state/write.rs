//! Applying changes. Only `Mesh` calls this, under the write lock.

use std::sync::Arc;

use cert_agent::SpiffeId;

use super::{Map, State};
use crate::mesh::{Policy, PolicyScope, Protocol, Service, Workload, diff::Name};

/// Any record.
#[derive(Debug, Clone)]
pub(in crate::mesh) enum Record {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Arc<Policy>),
}

/// One step.
#[derive(Debug)]
pub(in crate::mesh) enum Change {
    /// Insert or replace.
    Put(Record),
    /// Remove.
    Drop(Record),
}

/// Identities that this node began or ceased to need.
#[derive(Debug, Default)]
pub(in crate::mesh) struct IdentityChanges {
    pub(in crate::mesh) appeared: Vec<SpiffeId>,
    pub(in crate::mesh) departed: Vec<SpiffeId>,
}

impl State {
    /// Whether exactly this record is held.
    pub(in crate::mesh) fn holds(&self, new: &Record) -> bool {
        match new {
            Record::Workload(new) => self.workload(new.uid()) == Some(new),
            Record::Service(new) => self.service_by_key(&new.key) == Some(new),
            Record::Policy(new) => self.policies.get(&new.key) == Some(new),
        }
    }

    /// The record that is held under a name.
    pub(in crate::mesh) fn find(&self, name: Name<'_>) -> Option<Record> {
        match name {
            Name::Workload(uid) => self.workload(uid).cloned().map(Record::Workload),
            Name::Service(key) => self.service_by_key(key).cloned().map(Record::Service),
            Name::Policy(key) => self.policies.get(key).cloned().map(Record::Policy),
        }
    }

    /// Everything that is held.
    pub(in crate::mesh) fn records(&self) -> impl Iterator<Item = Record> {
        let workloads = self.workloads().cloned().map(Record::Workload);
        let services = self.services().cloned().map(Record::Service);
        let policies = self.policies().cloned().map(Record::Policy);
        workloads.chain(services).chain(policies)
    }

    /// Applies all changes. Records that are no longer held are added to `old`, for the caller to drop when
    /// readers are let in again.
    pub(in crate::mesh) fn apply(
        &mut self,
        changes: Vec<Change>,
        old: &mut Vec<Record>,
    ) -> IdentityChanges {
        self.reserve(&changes);
        let mut identities = Touched::default();
        for change in changes {
            match change {
                Change::Put(Record::Workload(new)) => {
                    identities.touch(self, &new);
                    let replaced = self.put_workload(&new);
                    if let Some(replaced) = &replaced {
                        identities.touch(self, replaced);
                    }
                    self.count_identity(replaced.as_deref(), Some(&new));
                    old.extend(replaced.map(Record::Workload));
                }
                Change::Drop(Record::Workload(gone)) => {
                    identities.touch(self, &gone);
                    let dropped = self.drop_workload(gone.uid());
                    self.count_identity(dropped.as_deref(), None);
                    old.extend(dropped.map(Record::Workload));
                }
                Change::Put(Record::Service(new)) => {
                    old.extend(self.put_service(&new).map(Record::Service));
                }
                Change::Drop(Record::Service(gone)) => {
                    old.extend(self.drop_service(&gone.key).map(Record::Service));
                }
                Change::Put(Record::Policy(new)) => {
                    old.extend(self.put_policy(&new).map(Record::Policy));
                }
                Change::Drop(Record::Policy(gone)) => {
                    old.extend(self.drop_policy(&gone.key).map(Record::Policy));
                }
            }
        }
        identities.outcome(self)
    }

    fn reserve(&mut self, changes: &[Change]) {
        let is_workload = |change: &&Change| matches!(change, Change::Put(Record::Workload(_)));
        let workloads = changes.iter().filter(is_workload).count();
        let new = workloads.saturating_sub(self.workloads.len());
        self.workloads.reserve(new);
        self.by_uid.reserve(new);
        self.by_address.reserve(new);
    }

    fn count_identity(&mut self, old: Option<&Workload>, new: Option<&Workload>) {
        if let Some(id) = old.and_then(|old| self.needed_identity(old)).cloned()
            && let Some(count) = self.identities.get_mut(&id)
        {
            *count -= 1;
            if *count == 0 {
                self.identities.remove(&id);
            }
        }
        if let Some(id) = new.and_then(|new| self.needed_identity(new)).cloned() {
            *self.identities.entry(id).or_default() += 1;
        }
    }

    /// The identity that this node needs a certificate of because of a workload.
    fn needed_identity<'a>(&self, workload: &'a Workload) -> Option<&'a SpiffeId> {
        let tunnelled = workload.protocol() == Protocol::Hbone || workload.native_tunnel();
        let needed = tunnelled && self.is_local(workload);
        workload.identity().filter(|_| needed)
    }

    fn put_policy(&mut self, new: &Arc<Policy>) -> Option<Arc<Policy>> {
        let old = self.policies.insert(Arc::clone(&new.key), Arc::clone(new));
        if let Some(old) = &old {
            self.unscope(old);
        }
        let scoped = match new.scope {
            PolicyScope::Global => &mut self.global_policies,
            PolicyScope::Namespace => self
                .namespace_policies
                .entry(Arc::clone(&new.namespace))
                .or_default(),
            PolicyScope::WorkloadSelector => return old,
        };
        let position = scoped.partition_point(|held| held.key < new.key);
        scoped.insert(position, Arc::clone(new));
        old
    }

    fn drop_policy(&mut self, key: &str) -> Option<Arc<Policy>> {
        let old = self.policies.remove(key)?;
        self.unscope(&old);
        Some(old)
    }

    fn unscope(&mut self, old: &Policy) {
        let scoped = match old.scope {
            PolicyScope::Global => Some(&mut self.global_policies),
            PolicyScope::Namespace => self.namespace_policies.get_mut(&old.namespace),
            PolicyScope::WorkloadSelector => None,
        };
        let Some(scoped) = scoped else {
            return;
        };
        scoped.retain(|held| held.key != old.key);
        if scoped.is_empty() && old.scope == PolicyScope::Namespace {
            self.namespace_policies.remove(&old.namespace);
        }
    }
}

/// Identities that a batch touches, and whether this node needed them before it.
#[derive(Default)]
struct Touched(Map<SpiffeId, bool>);

impl Touched {
    /// Call before the workload is counted in or out.
    fn touch(&mut self, state: &State, workload: &Workload) {
        if let Some(id) = state.needed_identity(workload) {
            let needed = state.has_local_identity(id);
            self.0.entry(id.clone()).or_insert(needed);
        }
    }

    fn outcome(self, state: &State) -> IdentityChanges {
        let mut changes = IdentityChanges::default();
        for (id, was_needed) in self.0 {
            match (was_needed, state.has_local_identity(&id)) {
                (false, true) => changes.appeared.push(id),
                (true, false) => changes.departed.push(id),
                (true, true) | (false, false) => {}
            }
        }
        changes.appeared.sort_unstable();
        changes.departed.sort_unstable();
        changes
    }
}

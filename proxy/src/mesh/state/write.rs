//! Applying steps. Only `Mesh` calls this, under the write lock.

use std::sync::Arc;

use cert_agent::SpiffeId;
use xds_client::Kind;

use super::{Map, State};
use crate::mesh::{
    Policy, PolicyScope, Protocol, Service, Workload,
    origin::{Origin, Source},
};

/// Any record.
#[derive(Debug, Clone)]
pub(in crate::mesh) enum Record {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Arc<Policy>),
}

/// One step.
#[derive(Debug)]
pub(in crate::mesh) enum Step {
    /// Insert or replace.
    Put(Record, Origin),
    /// What is held was told again, under another version or by another source.
    Confirm(Record, Origin),
    /// Remove exactly this.
    Drop(Record),
    /// Remove what the control plane told under this name: a workload, else a service; or a policy.
    Remove(Kind, Box<str>),
}

/// What a batch of steps did.
#[derive(Default)]
pub(in crate::mesh) struct Effects {
    /// Records that are no longer held, to be dropped when readers are let in again.
    pub(in crate::mesh) old: Vec<Record>,
    pub(in crate::mesh) workloads: usize,
    pub(in crate::mesh) services: usize,
    pub(in crate::mesh) policies: usize,
    /// Identities that were concerned, and whether this node needed them before.
    identities: Map<SpiffeId, bool>,
}

impl State {
    /// Whether exactly this record is held.
    pub(in crate::mesh) fn holds(&self, new: &Record) -> bool {
        match new {
            Record::Workload(new) => self.workload(new.uid()) == Some(new),
            Record::Service(new) => self.service_by_key(&new.key) == Some(new),
            Record::Policy(new) => self.policy(&new.key) == Some(new),
        }
    }

    /// Where the resource came from that is held under this name: a workload, else a service; or a policy.
    pub(in crate::mesh) fn origin(&self, kind: Kind, name: &str) -> Option<&Origin> {
        match kind {
            Kind::Address => self
                .workload_origin(name)
                .or_else(|| self.service_origin(name)),
            Kind::Authorization => self.policies.get(name).map(|(_, origin)| origin),
        }
    }

    /// Where the record came from that is held under the name of this one.
    pub(in crate::mesh) fn origin_of(&self, record: &Record) -> Option<&Origin> {
        match record {
            Record::Workload(workload) => self.workload_origin(workload.uid()),
            Record::Service(service) => self.service_origin(&service.key),
            Record::Policy(policy) => self.origin(Kind::Authorization, &policy.key),
        }
    }

    fn workload_origin(&self, uid: &str) -> Option<&Origin> {
        let id = self.workload_id(uid)?;
        self.workloads.get(id).map(|held| &held.origin)
    }

    fn service_origin(&self, key: &str) -> Option<&Origin> {
        let entry = self.services.get(self.service_id(key)?)?;
        entry.record.as_ref().map(|(_, origin)| origin)
    }

    /// Everything that is held, and where it came from.
    pub(in crate::mesh) fn records(&self) -> impl Iterator<Item = (Record, &Origin)> {
        let workloads = self.workloads.iter();
        let workloads =
            workloads.map(|held| (Record::Workload(Arc::clone(&held.record)), &held.origin));
        let services = self
            .services
            .iter()
            .filter_map(|entry| entry.record.as_ref());
        let services = services.map(|(one, origin)| (Record::Service(Arc::clone(one)), origin));
        let policies = self.policies.values();
        let policies = policies.map(|(one, origin)| (Record::Policy(Arc::clone(one)), origin));
        workloads.chain(services).chain(policies)
    }

    /// Names and versions of what the control plane told.
    pub(in crate::mesh) fn versions(&self, kind: Kind, mut tell: impl FnMut(&str, &str)) {
        let mut tell = |name: &str, origin: &Origin| {
            if let Some(version) = origin.version() {
                tell(name, &version);
            }
        };
        match kind {
            Kind::Address => {
                for held in self.workloads.iter() {
                    tell(held.record.uid(), &held.origin);
                }
                for (service, origin) in self.services.iter().filter_map(|one| one.record.as_ref())
                {
                    tell(&service.key, origin);
                }
            }
            Kind::Authorization => {
                for (policy, origin) in self.policies.values() {
                    tell(&policy.key, origin);
                }
            }
        }
    }

    /// Applies steps in their order.
    pub(in crate::mesh) fn apply(
        &mut self,
        steps: impl Iterator<Item = Step>,
        effects: &mut Effects,
    ) {
        for step in steps {
            match step {
                Step::Put(Record::Workload(new), origin) => {
                    self.count_identity(None, Some(&new), effects);
                    let replaced = self.put_workload(&new, origin);
                    self.count_identity(replaced.as_deref(), None, effects);
                    effects.workloads += 1;
                    effects.old.extend(replaced.map(Record::Workload));
                }
                Step::Put(Record::Service(new), origin) => {
                    let replaced = self.put_service(&new, origin);
                    effects.services += 1;
                    effects.old.extend(replaced.map(Record::Service));
                }
                Step::Put(Record::Policy(new), origin) => {
                    let replaced = self.put_policy(&new, origin);
                    effects.policies += 1;
                    effects.old.extend(replaced.map(Record::Policy));
                }
                Step::Confirm(record, origin) => self.confirm(&record, origin),
                Step::Drop(Record::Workload(gone)) => self.forget_workload(gone.uid(), effects),
                Step::Drop(Record::Service(gone)) => self.forget_service(&gone.key, effects),
                Step::Drop(Record::Policy(gone)) => self.forget_policy(&gone.key, effects),
                Step::Remove(kind, name) => self.remove(kind, &name, effects),
            }
        }
    }

    /// Makes room for what `puts` workloads add at the least.
    pub(in crate::mesh) fn reserve_for(&mut self, puts: usize) {
        let more = puts.saturating_sub(self.workloads.len());
        self.workloads.reserve(more);
        self.by_uid.reserve(more);
        self.by_address.reserve(more);
    }

    fn confirm(&mut self, record: &Record, origin: Origin) {
        let held = match record {
            Record::Workload(one) => self
                .workload_id(one.uid())
                .and_then(|id| self.workloads.get_mut(id))
                .map(|held| &mut held.origin),
            Record::Service(one) => self
                .service_id(&one.key)
                .and_then(|id| self.services.get_mut(id)?.record.as_mut())
                .map(|(_, held)| held),
            Record::Policy(one) => self.policies.get_mut(&one.key).map(|(_, held)| held),
        };
        if let Some(held) = held {
            *held = origin;
        }
    }

    fn remove(&mut self, kind: Kind, name: &str, effects: &mut Effects) {
        let told = |origin: Option<&Origin>| {
            origin.is_some_and(|origin| origin.source() == Source::ControlPlane)
        };
        match kind {
            Kind::Address if self.workload_id(name).is_some() => {
                if told(self.workload_origin(name)) {
                    self.forget_workload(name, effects);
                }
            }
            Kind::Address if told(self.service_origin(name)) => self.forget_service(name, effects),
            Kind::Authorization if told(self.origin(kind, name)) => {
                self.forget_policy(name, effects);
            }
            Kind::Address | Kind::Authorization => {}
        }
    }

    fn forget_workload(&mut self, uid: &str, effects: &mut Effects) {
        let dropped = self.drop_workload(uid);
        self.count_identity(dropped.as_deref(), None, effects);
        effects.workloads += usize::from(dropped.is_some());
        effects.old.extend(dropped.map(Record::Workload));
    }

    fn forget_service(&mut self, key: &str, effects: &mut Effects) {
        let dropped = self.drop_service(key);
        effects.services += usize::from(dropped.is_some());
        effects.old.extend(dropped.map(Record::Service));
    }

    fn forget_policy(&mut self, key: &str, effects: &mut Effects) {
        let dropped = self.drop_policy(key);
        effects.policies += usize::from(dropped.is_some());
        effects.old.extend(dropped.map(Record::Policy));
    }

    fn count_identity(
        &mut self,
        old: Option<&Workload>,
        new: Option<&Workload>,
        effects: &mut Effects,
    ) {
        if let Some(id) = old.and_then(|old| self.needed_identity(old)).cloned()
            && let Some(count) = self.identities.get_mut(&id)
        {
            *count -= 1;
            if *count == 0 {
                self.identities.remove(&id);
                effects.identities.entry(id).or_insert(true);
            }
        }
        if let Some(id) = new.and_then(|new| self.needed_identity(new)).cloned() {
            let count = self.identities.entry(id.clone()).or_default();
            *count += 1;
            if *count == 1 {
                effects.identities.entry(id).or_insert(false);
            }
        }
    }

    /// The identity that this node needs a certificate of because of a workload. One that speaks HBONE by itself, as
    /// waypoints and gateways do, has its own.
    fn needed_identity<'a>(&self, workload: &'a Workload) -> Option<&'a SpiffeId> {
        let served = workload.protocol() == Protocol::Hbone && !workload.native_tunnel();
        let needed = served && self.is_local(workload);
        workload.identity().filter(|_| needed)
    }

    fn put_policy(&mut self, new: &Arc<Policy>, origin: Origin) -> Option<Arc<Policy>> {
        let held = (Arc::clone(new), origin);
        let old = self.policies.insert(Arc::clone(&new.key), held);
        let old = old.map(|(old, _)| old);
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
        let (old, _) = self.policies.remove(key)?;
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

impl Effects {
    /// How many records are different.
    pub(in crate::mesh) fn total(&self) -> usize {
        self.workloads + self.services + self.policies
    }

    /// Identities that this node began and ceased to need, taken over all steps.
    pub(in crate::mesh) fn identities(&mut self, state: &State) -> [Vec<SpiffeId>; 2] {
        let (mut appeared, mut departed) = (Vec::new(), Vec::new());
        for (id, was_needed) in std::mem::take(&mut self.identities) {
            match (was_needed, state.has_local_identity(&id)) {
                (false, true) => appeared.push(id),
                (true, false) => departed.push(id),
                (true, true) | (false, false) => {}
            }
        }
        [appeared, departed]
    }
}

//! Applying steps. Only `Mesh` calls this, under the write lock.

use std::sync::Arc;

use cert_agent::SpiffeId;
use xds_client::Kind;

use super::{Map, State};
use crate::mesh::{
    Protocol, Workload,
    origin::{Origin, Source},
    record::{Name, Record, Told},
};

/// One step; no two of an update concern one name.
#[derive(Debug)]
pub(in crate::mesh) enum Step {
    /// Insert or replace.
    Put(Record, Origin),
    /// What is in force was told again, under another version or by another source.
    Confirm(Record, Origin),
    /// The source tells of this name no more.
    Forget(Record, Source),
}

impl Step {
    pub(in crate::mesh) fn record(&self) -> &Record {
        match self {
            Self::Put(record, _) | Self::Confirm(record, _) | Self::Forget(record, _) => record,
        }
    }
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
    /// Whether exactly this record is in force.
    pub(in crate::mesh) fn holds(&self, new: &Record) -> bool {
        match new {
            Record::Workload(new) => self.workload(new.uid()) == Some(new),
            Record::Service(new) => self.service_by_key(&new.key) == Some(new),
            Record::Policy(new) => self.policy(&new.key) == Some(new),
        }
    }

    /// Where the record in force under this name came from.
    pub(in crate::mesh) fn origin(&self, name: Name<'_>) -> Option<&Origin> {
        match name {
            Name::Workload(uid) => self.workload_origin(uid),
            Name::Service(key) => self.service_origin(key),
            Name::Policy(key) => self.policies.get(key).map(|(_, origin)| origin),
        }
    }

    /// What this source tells under a name, in force or not.
    pub(in crate::mesh) fn told(&self, name: Name<'_>, source: Source) -> Option<Record> {
        if self.origin(name)?.source() == source {
            return self.in_force(name);
        }
        let shadow = self.shadows.get(name)?;
        (shadow.origin.source() == source).then(|| shadow.record.clone())
    }

    /// What is in force under the name of a step, before it and after it; nothing if that stays the same.
    pub(in crate::mesh) fn outcome(&self, step: &Step) -> [Option<Record>; 2] {
        match step {
            Step::Put(new, _) => [self.in_force(new.name()), Some(new.clone())],
            Step::Confirm(..) => [None, None],
            Step::Forget(gone, source) => {
                let name = gone.name();
                if self.origin(name).map(Origin::source) != Some(*source) {
                    return [None, None];
                }
                let shadow = self.shadows.get(name);
                [self.in_force(name), shadow.map(|told| told.record.clone())]
            }
        }
    }

    fn in_force(&self, name: Name<'_>) -> Option<Record> {
        match name {
            Name::Workload(uid) => self.workload(uid).cloned().map(Record::Workload),
            Name::Service(key) => self.service_by_key(key).cloned().map(Record::Service),
            Name::Policy(key) => self.policy(key).cloned().map(Record::Policy),
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

    /// Everything that was told, in force or not, and where it came from.
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
        let shadows = self.shadows.iter();
        let shadows = shadows.map(|told| (told.record.clone(), &told.origin));
        workloads.chain(services).chain(policies).chain(shadows)
    }

    /// Names and versions of what the control plane told, in force or not: it tells of a removal only whom it knows to hold the resource.
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
        for shadow in self.shadows.iter() {
            let name = shadow.record.name();
            if name.kind() == kind {
                tell(name.text(), &shadow.origin);
            }
        }
    }

    /// Applies steps in their order.
    pub(in crate::mesh) fn apply(
        &mut self,
        steps: impl IntoIterator<Item = Step>,
        effects: &mut Effects,
    ) {
        for step in steps {
            let gone = match step {
                Step::Put(record, origin) => self.tell(&record, origin, effects),
                Step::Confirm(record, origin) => self.confirm(record.name(), origin),
                Step::Forget(record, source) => self.forget(record.name(), source, effects),
            };
            effects.old.extend(gone.map(|told| told.record));
        }
    }

    /// Makes room for what `puts` workloads add at the least.
    pub(in crate::mesh) fn reserve_for(&mut self, puts: usize) {
        let more = puts.saturating_sub(self.workloads.len());
        self.workloads.reserve(more);
        self.by_uid.reserve(more);
        self.by_address.reserve(more);
    }

    /// Puts a record in force; returns what is held no longer. A record of another source stays as a shadow.
    fn tell(&mut self, record: &Record, origin: Origin, effects: &mut Effects) -> Option<Told> {
        let source = origin.source();
        let old = self.put_record(record, origin, effects)?;
        if old.origin.source() == source {
            return Some(old);
        }
        self.shadows.put(old)
    }

    /// What is in force counts as told by this origin, too; returns what is held no longer.
    fn confirm(&mut self, name: Name<'_>, origin: Origin) -> Option<Told> {
        let record = self.in_force(name)?;
        let source = origin.source();
        let old = std::mem::replace(self.origin_mut(name)?, origin);
        if old.source() == source {
            return None;
        }
        let origin = old;
        self.shadows.put(Told { record, origin })
    }

    /// Forgets what a source told under a name, and puts what the other tells in its place; returns what is held no longer.
    fn forget(&mut self, name: Name<'_>, source: Source, effects: &mut Effects) -> Option<Told> {
        let other = self.shadows.take(name);
        if self.origin(name)?.source() != source {
            return other;
        }
        match other {
            Some(told) if self.holds(&told.record) => {
                let Told { record, origin } = told;
                let origin = std::mem::replace(self.origin_mut(name)?, origin);
                Some(Told { record, origin })
            }
            Some(told) => self.put_record(&told.record, told.origin, effects),
            None => self.drop_record(name, effects),
        }
    }

    fn origin_mut(&mut self, name: Name<'_>) -> Option<&mut Origin> {
        match name {
            Name::Workload(uid) => {
                let id = self.workload_id(uid)?;
                self.workloads.get_mut(id).map(|held| &mut held.origin)
            }
            Name::Service(key) => {
                let id = self.service_id(key)?;
                let entry = self.services.get_mut(id)?;
                entry.record.as_mut().map(|(_, origin)| origin)
            }
            Name::Policy(key) => self.policies.get_mut(key).map(|(_, origin)| origin),
        }
    }

    /// Inserts or replaces the record in force; returns the one replaced.
    fn put_record(&mut self, new: &Record, origin: Origin, effects: &mut Effects) -> Option<Told> {
        match new {
            Record::Workload(new) => {
                self.count_identity(None, Some(new), effects);
                let old = self.put_workload(new, origin);
                self.count_identity(old.as_ref().map(|old| &*old.record), None, effects);
                effects.workloads += 1;
                old.map(|old| told(Record::Workload(old.record), old.origin))
            }
            Record::Service(new) => {
                effects.services += 1;
                let (old, origin) = self.put_service(new, origin)?;
                Some(told(Record::Service(old), origin))
            }
            Record::Policy(new) => {
                effects.policies += 1;
                let (old, origin) = self.put_policy(new, origin)?;
                Some(told(Record::Policy(old), origin))
            }
        }
    }

    /// Removes and returns the record in force.
    fn drop_record(&mut self, name: Name<'_>, effects: &mut Effects) -> Option<Told> {
        match name {
            Name::Workload(uid) => {
                let old = self.drop_workload(uid)?;
                self.count_identity(Some(&old.record), None, effects);
                effects.workloads += 1;
                Some(told(Record::Workload(old.record), old.origin))
            }
            Name::Service(key) => {
                let (old, origin) = self.drop_service(key)?;
                effects.services += 1;
                Some(told(Record::Service(old), origin))
            }
            Name::Policy(key) => {
                let (old, origin) = self.drop_policy(key)?;
                effects.policies += 1;
                Some(told(Record::Policy(old), origin))
            }
        }
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
}

fn told(record: Record, origin: Origin) -> Told {
    Told { record, origin }
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

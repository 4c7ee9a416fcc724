//! From resources to the steps that they take: none for what is held already.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};
use prost::{DecodeError, Message};
use xds_client::{
    Batch, Extent, Kind, Rejected,
    local::{Document, NamedPolicy},
    proto::{discovery::Resource, security::Authorization, workload::Address},
};

use super::{
    Rejection, State,
    convert::{Converter, Invalid},
    intern::Pool,
    origin::{Origin, Source},
    record::{Name, Record},
    state::Step,
};

/// Takes in resources one by one, each converted and let go of before the next, so that a whole mesh is
/// never held in two forms.
pub(super) struct Intake<'a> {
    state: &'a State,
    converter: Converter<'a>,
    /// One for each name at the most.
    steps: Vec<Step>,
    rejected: Vec<Rejection>,
    /// The places of the steps so far, by hashes of the names that they concern.
    touched: HashMap<u64, usize, RandomState>,
    /// Hashes of the names that were told of, usable or not.
    named: HashSet<u64, RandomState>,
    /// Whether something was told of that has no readable name: it may be anything.
    is_anything_told: bool,
}

/// What came of taking in.
pub(super) struct Taken {
    pub(super) steps: Vec<Step>,
    pub(super) rejected: Vec<Rejection>,
}

impl<'a> Intake<'a> {
    pub(super) fn new(state: &'a State, pool: &'a mut Pool) -> Self {
        Self {
            state,
            converter: Converter { pool },
            steps: Vec::new(),
            rejected: Vec::new(),
            touched: HashMap::default(),
            named: HashSet::default(),
            is_anything_told: false,
        }
    }

    /// What the control plane told.
    pub(super) fn batch(&mut self, batch: &Batch) {
        for (position, resource) in batch.resources().enumerate() {
            match resource {
                Ok(resource) => self.encoded(batch.kind(), resource),
                Err(error) => self.undecodable(batch.kind(), batch.name_at(position), error),
            }
        }
        match batch.extent() {
            Extent::Changes => {}
            Extent::Everything if self.is_anything_told => {
                tracing::warn!(
                    kind = ?batch.kind(),
                    "a resource without a readable name may be any: what was not named stays until everything is told again"
                );
            }
            Extent::Everything => self.remove_unnamed(&[batch.kind()], Source::ControlPlane),
        }
        for name in batch.removed() {
            self.remove(batch.kind(), name);
        }
    }

    /// All that a local file tells.
    pub(super) fn document(&mut self, document: &Document) {
        for address in &document.addresses {
            self.address(address);
        }
        for policy in &document.policies {
            self.policy(policy);
        }
        for unreadable in document.unusable() {
            self.unreadable(unreadable);
        }
        self.remove_unnamed(&Kind::ALL, Source::File);
    }

    /// A resource of the control plane. Of a version that is held, nothing else is looked at.
    fn encoded(&mut self, kind: Kind, resource: Resource) {
        let Resource { name, version, .. } = &resource;
        let origin = Origin::of_version(version);
        self.mention(kind, name);
        let held = Name::candidates(kind, name).find_map(|name| self.state.origin(name));
        if !version.is_empty() && held == Some(&origin) && !self.is_touched(kind, name) {
            return;
        }
        match self.decode(kind, &resource) {
            Ok(record) => self.record(record, origin),
            Err(reason) => self.reject(resource.name, reason),
        }
    }

    /// A resource of which at most the name can be read.
    fn undecodable(&mut self, kind: Kind, name: Option<String>, error: DecodeError) {
        match &name {
            Some(name) => self.mention(kind, name),
            None => self.is_anything_told = true,
        }
        self.reject(name.unwrap_or_else(|| UNREADABLE.into()), error.into());
    }

    fn decode(&mut self, kind: Kind, resource: &Resource) -> Result<Record, Invalid> {
        let content = resource.resource.as_ref().ok_or(Invalid::NoContent)?;
        let value = content.value.clone();
        match kind {
            Kind::Address => self.converter.address(&Address::decode(value)?),
            Kind::Authorization => {
                let policy = Authorization::decode(value)?;
                self.converter.policy(&resource.name, &policy)
            }
        }
    }

    /// A workload or service of a file.
    fn address(&mut self, address: &Address) {
        match self.converter.address(address) {
            Ok(record) => self.record(record, Origin::File),
            Err(reason) => self.reject(name_of(address), reason),
        }
    }

    /// A policy of a file.
    fn policy(&mut self, given: &NamedPolicy) {
        match self.converter.policy(&given.name, &given.policy) {
            Ok(record) => self.record(record, Origin::File),
            Err(reason) => self.reject(given.name.clone(), reason),
        }
    }

    /// A record of a file that exists, but could not be read: what is held under its name stays.
    fn unreadable(&mut self, unreadable: &Rejected) {
        for kind in Kind::ALL {
            self.mention(kind, &unreadable.name);
        }
    }

    /// A name that is gone. Removals go after everything else. Unknown names mean nothing, and what came from another
    /// source stays.
    fn remove(&mut self, kind: Kind, name: &str) {
        match Name::candidates(kind, name).find_map(|name| self.told(name, Source::ControlPlane)) {
            Some(gone) => self.step(Step::Forget(gone, Source::ControlPlane)),
            None => {
                tracing::debug!(%name, "removal of a resource that the control plane has not told of");
            }
        }
    }

    /// Removes what came from `source` and was not named, not even as something that cannot be used.
    fn remove_unnamed(&mut self, kinds: &[Kind], source: Source) {
        for (record, origin) in self.state.records() {
            let name = record.name();
            if origin.source() == source
                && kinds.contains(&name.kind())
                && !self.named.contains(&self.hash(name))
            {
                self.step(Step::Forget(record, source));
            }
        }
    }

    pub(super) fn finish(self) -> Taken {
        Taken {
            steps: self.steps,
            rejected: self.rejected,
        }
    }

    fn record(&mut self, record: Record, origin: Origin) {
        let name = record.name();
        self.named.insert(self.hash(name));
        if !self.state.holds(&record) {
            self.step(Step::Put(record, origin));
        } else if self.touching(name).is_some() || self.state.origin(name) != Some(&origin) {
            self.step(Step::Confirm(record, origin));
        }
    }

    /// Adds a step, in place of the one that concerned its name before: the last word counts.
    fn step(&mut self, step: Step) {
        let name = step.record().name();
        let (hash, before) = (self.hash(name), self.touching(name));
        if let Some(before) = before.and_then(|place| self.steps.get_mut(place)) {
            *before = step;
        } else {
            self.touched.insert(hash, self.steps.len());
            self.steps.push(step);
        }
    }

    /// The place of the step that concerns a name.
    fn touching(&self, name: Name<'_>) -> Option<usize> {
        if self.touched.is_empty() {
            return None;
        }
        let place = *self.touched.get(&self.hash(name))?;
        let found = self.steps.get(place)?.record().name() == name;
        found.then_some(place)
    }

    /// What a source tells under a name, after the steps so far.
    fn told(&self, name: Name<'_>, source: Source) -> Option<Record> {
        match self.touching(name).and_then(|place| self.steps.get(place)) {
            Some(Step::Put(record, _) | Step::Confirm(record, _)) => Some(record.clone()),
            Some(Step::Forget(..)) => None,
            None => self.state.told(name, source),
        }
    }

    fn reject(&mut self, name: String, reason: Invalid) {
        for kind in Kind::ALL {
            self.mention(kind, &name);
        }
        self.rejected.push(Rejection { name, reason });
    }

    fn mention(&mut self, kind: Kind, name: &str) {
        for name in Name::candidates(kind, name) {
            let hash = self.hash(name);
            self.named.insert(hash);
        }
    }

    fn is_touched(&self, kind: Kind, name: &str) -> bool {
        Name::candidates(kind, name).any(|name| self.touching(name).is_some())
    }

    fn hash(&self, name: Name<'_>) -> u64 {
        self.named.hasher().hash_one(name)
    }
}

fn name_of(address: &Address) -> String {
    use xds_client::proto::workload::address::Type;
    match &address.r#type {
        Some(Type::Workload(workload)) => workload.uid.clone(),
        Some(Type::Service(service)) => format!("{}/{}", service.namespace, service.hostname),
        None => String::new(),
    }
}

const UNREADABLE: &str = "(a resource without a readable name)";

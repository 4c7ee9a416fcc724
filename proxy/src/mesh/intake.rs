//! From resources to the steps that they take: none for what is held already.

use std::hash::{BuildHasher, Hash};

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use prost::{DecodeError, Message};
use xds_client::{
    Kind, Rejected,
    local::NamedPolicy,
    proto::{discovery::Resource, security::Authorization, workload::Address},
};

use super::{
    Rejection, State,
    convert::{Converter, Invalid},
    intern::Pool,
    origin::{Origin, Source},
    state::{Record, Step},
};

/// Takes in resources one by one, each converted and let go of before the next, so that a whole mesh is
/// never held in two forms.
pub(super) struct Intake<'a> {
    state: &'a State,
    converter: Converter<'a>,
    steps: Vec<Step>,
    rejected: Vec<Rejection>,
    /// Hashes of the names that the steps so far concern.
    touched: HashSet<u64, RandomState>,
    /// Hashes of the names that were told of, usable or not.
    named: HashSet<u64, RandomState>,
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
            touched: HashSet::default(),
            named: HashSet::default(),
        }
    }

    /// A resource of the control plane. Of a version that is held, nothing else is looked at.
    pub(super) fn encoded(&mut self, kind: Kind, resource: Result<Resource, DecodeError>) {
        let resource = match resource {
            Ok(resource) => resource,
            Err(error) => return self.reject(UNREADABLE.into(), error.into()),
        };
        let Resource { name, version, .. } = &resource;
        let origin = Origin::of_version(version);
        self.mention(kind, name);
        let held = self.state.origin(kind, name);
        if !version.is_empty() && held == Some(&origin) && !self.is_touched(kind, name) {
            return;
        }
        match self.decode(kind, &resource) {
            Ok(record) => self.record(record, origin),
            Err(reason) => self.reject(resource.name, reason),
        }
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
    pub(super) fn address(&mut self, address: &Address) {
        match self.converter.address(address) {
            Ok(record) => self.record(record, Origin::File),
            Err(reason) => self.reject(name_of(address), reason),
        }
    }

    /// A policy of a file.
    pub(super) fn policy(&mut self, given: &NamedPolicy) {
        match self.converter.policy(&given.name, &given.policy) {
            Ok(record) => self.record(record, Origin::File),
            Err(reason) => self.reject(given.name.clone(), reason),
        }
    }

    /// A record of a file that exists, but could not be read: what is held under its name stays.
    pub(super) fn unreadable(&mut self, unreadable: &Rejected) {
        for kind in Kind::ALL {
            self.mention(kind, &unreadable.name);
        }
    }

    /// A name that is gone. Removals go after everything else. Unknown names mean nothing, and what came from another
    /// source stays.
    pub(super) fn remove(&mut self, kind: Kind, name: &str) {
        let held = self.state.origin(kind, name).map(Origin::source);
        if held == Some(Source::ControlPlane) || self.is_touched(kind, name) {
            self.steps.push(Step::Remove(kind, name.into()));
        } else {
            tracing::debug!(%name, "removal of a resource that the control plane has not told of");
        }
    }

    /// Removes what came from `source` and was not named, not even as something that cannot be used.
    pub(super) fn remove_unnamed(&mut self, kinds: &[Kind], source: Source) {
        let unnamed = |(record, origin): (&Record, &Origin)| {
            let name = Name::of(record);
            origin.source() == source
                && kinds.contains(&name.kind())
                && !self.named.contains(&self.hash(name))
        };
        let gone = self.state.records();
        let gone = gone.filter(|(record, origin)| unnamed((record, origin)));
        let gone: Vec<_> = gone.map(|(record, _)| Step::Drop(record)).collect();
        self.steps.extend(gone);
    }

    pub(super) fn finish(self) -> Taken {
        Taken {
            steps: self.steps,
            rejected: self.rejected,
        }
    }

    fn record(&mut self, record: Record, origin: Origin) {
        let hash = self.hash(Name::of(&record));
        self.named.insert(hash);
        if self.touched.contains(&hash) || !self.state.holds(&record) {
            self.touched.insert(hash);
            self.steps.push(Step::Put(record, origin));
        } else if self.state.origin_of(&record) != Some(&origin) {
            self.steps.push(Step::Confirm(record, origin));
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
        !self.touched.is_empty()
            && Name::candidates(kind, name).any(|name| self.touched.contains(&self.hash(name)))
    }

    fn hash(&self, name: Name<'_>) -> u64 {
        self.named.hasher().hash_one(name)
    }
}

/// What a resource is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name<'a> {
    Workload(&'a str),
    Service(&'a str),
    Policy(&'a str),
}

impl<'a> Name<'a> {
    fn of(record: &'a Record) -> Self {
        match record {
            Record::Workload(workload) => Self::Workload(workload.uid()),
            Record::Service(service) => Self::Service(&service.key),
            Record::Policy(policy) => Self::Policy(&policy.key),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Workload(_) | Self::Service(_) => Kind::Address,
            Self::Policy(_) => Kind::Authorization,
        }
    }

    /// What a resource name may stand for, in the order in which it is tried.
    fn candidates(kind: Kind, name: &'a str) -> impl Iterator<Item = Self> {
        let (first, second) = match kind {
            Kind::Address => (Self::Workload(name), Some(Self::Service(name))),
            Kind::Authorization => (Self::Policy(name), None),
        };
        std::iter::once(first).chain(second)
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

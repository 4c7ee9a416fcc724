//! Any record, what it is known by, and who told of it.

use std::sync::Arc;

use xds_client::Kind;

use super::{Policy, Service, Workload, origin::Origin};

/// Any record.
#[derive(Debug, Clone)]
pub(super) enum Record {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Arc<Policy>),
}

impl Record {
    pub(super) fn name(&self) -> Name<'_> {
        match self {
            Self::Workload(workload) => Name::Workload(workload.uid()),
            Self::Service(service) => Name::Service(&service.key),
            Self::Policy(policy) => Name::Policy(&policy.key),
        }
    }
}

/// A record and where it came from.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) record: Record,
    pub(super) origin: Origin,
}

/// What a record is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name<'a> {
    Workload(&'a str),
    Service(&'a str),
    Policy(&'a str),
}

impl<'a> Name<'a> {
    /// What a resource name may stand for, in the order in which it is tried.
    pub(super) fn candidates(kind: Kind, name: &'a str) -> impl Iterator<Item = Self> {
        let (first, second) = match kind {
            Kind::Address => (Self::Workload(name), Some(Self::Service(name))),
            Kind::Authorization => (Self::Policy(name), None),
        };
        std::iter::once(first).chain(second)
    }

    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Workload(_) | Self::Service(_) => Kind::Address,
            Self::Policy(_) => Kind::Authorization,
        }
    }

    /// The name of its resource.
    pub(super) fn text(self) -> &'a str {
        match self {
            Self::Workload(name) | Self::Service(name) | Self::Policy(name) => name,
        }
    }
}

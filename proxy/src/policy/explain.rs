//! Why policies say what they say, for people to read. Judges with the same functions as [`super::authorize`].

use std::fmt;

use super::{
    Connection,
    matches::{self, Subject},
};
use crate::mesh::{Applicable, State, Workload};

/// Whether one policy matches, and what decided.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Matching {
    /// This rule matches; counted from 0.
    Rule(usize),
    /// None does: of each rule, what fails in its first clause that does not match. Empty for a policy without rules.
    None(Vec<Mismatch>),
}

/// A condition of a policy that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The rule, counted from 0.
    pub rule: usize,
    /// The clause of the rule, counted from 0.
    pub clause: usize,
    /// What was compared.
    pub field: Field,
}

/// What a condition compares. `Display` gives the key of the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field {
    /// Port of the destination.
    DestinationPort,
    /// Address of the peer.
    SourceIp,
    /// Address of the destination.
    DestinationIp,
    /// Namespace of the peer's identity.
    Namespace,
    /// The peer's identity.
    Principal,
    /// Namespace and service account of the peer's identity.
    ServiceAccount,
    /// Nothing: the match is empty, and matches nobody.
    Nothing,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DestinationPort => "destinationPorts",
            Self::SourceIp => "sourceIps",
            Self::DestinationIp => "destinationIps",
            Self::Namespace => "namespaces",
            Self::Principal => "principals",
            Self::ServiceAccount => "serviceAccounts",
            Self::Nothing => "empty match",
        })
    }
}

/// Every policy that `workload` is subject to, in the order in which [`super::authorize`] looks at them, with what it amounts
/// to for `connection`; `None` for one that is named and not known.
pub fn explain<'a>(
    state: &'a State,
    workload: &'a Workload,
    connection: &'a Connection<'a>,
) -> impl Iterator<Item = (Applicable<'a>, Option<Matching>)> {
    let subject = Subject::new(workload, connection);
    let policies = state.policies_for(workload);
    policies.map(move |applicable| match applicable {
        Applicable::Policy(policy) => (applicable, Some(matches::explain(policy, &subject))),
        Applicable::Missing(_) => (applicable, None),
    })
}

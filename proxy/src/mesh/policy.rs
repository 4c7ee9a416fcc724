//! Authorization policies as data; the room `policy` evaluates them.

use std::sync::Arc;

use ipnet::IpNet;

/// One policy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Policy {
    /// The primary key, `namespace/name`, by which workloads refer to it.
    pub key: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Which workloads it is for.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// Log only, never enforce.
    pub dry_run: bool,
    /// Any of these matches. None: it never matches.
    pub rules: Box<[Rule]>,
}

/// Which workloads a policy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PolicyScope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Let through.
    Allow,
    /// Refuse.
    Deny,
}

/// All clauses must match. None: it matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// The clauses.
    pub clauses: Box<[Clause]>,
}

/// One match must match. None: it matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Clause {
    /// The matches.
    pub matches: Box<[Match]>,
}

/// All conditions that are set must hold. None set: it never matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Match {
    /// Namespace of the peer's identity.
    pub namespaces: Condition<StringMatch>,
    /// The peer's identity without `spiffe://`.
    pub principals: Condition<StringMatch>,
    /// Namespace and service account of the peer's identity.
    pub service_accounts: Condition<ServiceAccount>,
    /// Source address.
    pub source_ips: Condition<IpNet>,
    /// Destination address.
    pub destination_ips: Condition<IpNet>,
    /// Destination port.
    pub destination_ports: Condition<u16>,
}

/// `x` and `not_x` of a match.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Condition<T> {
    /// One of these must match; empty asks for nothing.
    pub any_of: Box<[T]>,
    /// None of these may match.
    pub none_of: Box<[T]>,
}

impl<T> Condition<T> {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_unset(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

impl<T> Default for Condition<T> {
    fn default() -> Self {
        Self {
            any_of: Box::default(),
            none_of: Box::default(),
        }
    }
}

/// A test of a string, case-sensitive.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StringMatch {
    /// Equal.
    Exact(Box<str>),
    /// Starts with.
    Prefix(Box<str>),
    /// Ends with.
    Suffix(Box<str>),
    /// Not empty.
    Presence,
}

/// A service account of any trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceAccount {
    /// Namespace.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
}

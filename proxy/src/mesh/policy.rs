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

impl Policy {
    /// Why a rule of it can never match, whoever comes; `None` if each can.
    #[must_use]
    pub(super) fn hollow(&self) -> Option<Hollow> {
        let clauses = || self.rules.iter().flat_map(|rule| &rule.clauses);
        let is_hollow = |clause: &Clause| {
            !clause.matches.is_empty() && !clause.matches.iter().any(Match::is_set)
        };
        let has_scheme = |clause: &Clause| {
            let matches = clause.matches.iter();
            let mut principals = matches.flat_map(|one| &one.principals.any_of);
            principals.any(StringMatch::has_scheme)
        };
        if clauses().any(is_hollow) {
            Some(Hollow::NothingToCompare)
        } else if clauses().any(has_scheme) {
            Some(Hollow::Scheme)
        } else {
            None
        }
    }
}

/// Why a rule can never match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Hollow {
    /// A clause has matches, and none of them has a condition.
    #[error(
        "nothing to compare is left of a condition; layer-7 attributes are for waypoints, and the control plane leaves them out here"
    )]
    NothingToCompare,
    /// A principal is written as a URI.
    #[error("a principal begins with spiffe://, and is compared without")]
    Scheme,
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

impl Match {
    /// Whether it has any condition.
    #[must_use]
    pub fn is_set(&self) -> bool {
        let Self {
            namespaces,
            principals,
            service_accounts,
            source_ips,
            destination_ips,
            destination_ports,
        } = self;
        let all_unset = namespaces.is_unset()
            && principals.is_unset()
            && service_accounts.is_unset()
            && source_ips.is_unset()
            && destination_ips.is_unset()
            && destination_ports.is_unset();
        !all_unset
    }
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

impl StringMatch {
    /// Whether it asks for a text that begins with the scheme of identities.
    fn has_scheme(&self) -> bool {
        match self {
            Self::Exact(text) | Self::Prefix(text) => text.starts_with("spiffe://"),
            Self::Suffix(_) | Self::Presence => false,
        }
    }
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

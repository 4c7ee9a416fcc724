//! Whether one policy matches one connection.
//!
//! | level | its parts are joined by | without parts it |
//! |---|---|---|
//! | policy: rules | or | never matches |
//! | rule: clauses | and | always matches |
//! | clause: matches | or | always matches |
//! | match: kinds of fields | and | never matches |
//! | field: values | or | is not looked at |
//!
//! A negated field holds when none of its values matches.

use std::net::IpAddr;

use cert_agent::SpiffeId;
use ipnet::IpNet;

use super::{Connection, Field, Matching, Mismatch};
use crate::mesh::{Clause, Condition, Match, Policy, Rule, ServiceAccount, StringMatch, Workload};

/// A connection as the policies of one workload see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) connection: &'a Connection<'a>,
    /// What follows the trust domain in the peer's identity, if that is the workload's own trust domain.
    compatriot: Option<&'a str>,
}

impl<'a> Subject<'a> {
    pub(super) fn new(workload: &Workload, connection: &'a Connection<'a>) -> Self {
        let home = workload.identity().map(SpiffeId::trust_domain);
        let peer = connection.identity;
        let is_compatriot = peer.is_some_and(|peer| Some(peer.trust_domain()) == home);
        Self {
            connection,
            compatriot: peer
                .filter(|_| is_compatriot)
                .and_then(|peer| path(peer).strip_prefix(peer.trust_domain())),
        }
    }
}

pub(super) fn policy(policy: &Policy, subject: &Subject<'_>) -> bool {
    policy.rules.iter().any(|part| rule(part, subject))
}

fn rule(rule: &Rule, subject: &Subject<'_>) -> bool {
    rule.clauses.iter().all(|part| clause(part, subject))
}

fn clause(clause: &Clause, subject: &Subject<'_>) -> bool {
    let mut matches = clause.matches.iter();
    clause.matches.is_empty() || matches.any(|part| mismatch(part, subject).is_none())
}

/// What a policy amounts to for a connection, part by part.
pub(super) fn explain(policy: &Policy, subject: &Subject<'_>) -> Matching {
    let matching = policy.rules.iter().position(|part| rule(part, subject));
    if let Some(rule) = matching {
        return Matching::Rule(rule);
    }
    let rules = policy.rules.iter().enumerate();
    let of_rule = |(rule, part): (usize, &Rule)| {
        let number = part
            .clauses
            .iter()
            .position(|part| !clause(part, subject))?;
        let failing = part.clauses.get(number)?;
        let matches = failing.matches.iter();
        let fields = matches.filter_map(|part| mismatch(part, subject));
        let made = |field| Mismatch {
            rule,
            clause: number,
            field,
        };
        Some(fields.map(made).collect::<Vec<_>>())
    };
    Matching::None(rules.filter_map(of_rule).flatten().collect())
}

/// The first condition that does not hold, the cheap ones first; `None` if all hold. Without an identity there is no
/// principal and no account to match, and the namespace is the empty text.
fn mismatch(m: &Match, subject: &Subject<'_>) -> Option<Field> {
    let Connection {
        source,
        destination,
        identity,
    } = *subject.connection;
    let namespace = identity.map_or("", SpiffeId::namespace);
    if !m.is_set() {
        Some(Field::Nothing)
    } else if !condition(&m.destination_ports, |port| *port == destination.port()) {
        Some(Field::DestinationPort)
    } else if !condition(&m.source_ips, |range| contains(range, source.ip())) {
        Some(Field::SourceIp)
    } else if !condition(&m.destination_ips, |range| {
        contains(range, destination.ip())
    }) {
        Some(Field::DestinationIp)
    } else if !condition(&m.namespaces, |value| text(value, namespace)) {
        Some(Field::Namespace)
    } else if !condition(&m.principals, |value| {
        identity.is_some_and(|id| text(value, path(id)))
            || subject.compatriot.is_some_and(|rest| at_home(value, rest))
    }) {
        Some(Field::Principal)
    } else if !condition(&m.service_accounts, |account| {
        identity.is_some_and(|id| is_account(account, id))
    }) {
        Some(Field::ServiceAccount)
    } else {
        None
    }
}

fn condition<T>(condition: &Condition<T>, matches: impl Fn(&T) -> bool) -> bool {
    (condition.any_of.is_empty() || condition.any_of.iter().any(&matches))
        && !condition.none_of.iter().any(matches)
}

fn text(value: &StringMatch, actual: &str) -> bool {
    match value {
        StringMatch::Exact(expected) => actual == &**expected,
        StringMatch::Prefix(prefix) => actual.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => actual.ends_with(&**suffix),
        StringMatch::Presence => !actual.is_empty(),
    }
}

/// The identity as policies write it: without `spiffe://`.
fn path(identity: &SpiffeId) -> &str {
    let uri = identity.as_str();
    uri.strip_prefix("spiffe://").unwrap_or(uri)
}

/// As [`text`], of a peer of the workload's own trust domain, whom policies may also call by [`POINTER`]. `rest` follows the
/// trust domain. A pattern must name it whole: a part of a name stands for nothing.
fn at_home(value: &StringMatch, rest: &str) -> bool {
    match value {
        StringMatch::Exact(expected) => below_pointer(expected) == Some(rest),
        StringMatch::Prefix(prefix) => {
            below_pointer(prefix).is_some_and(|prefix| rest.starts_with(prefix))
        }
        StringMatch::Suffix(_) | StringMatch::Presence => false,
    }
}

fn below_pointer(pattern: &str) -> Option<&str> {
    let rest = pattern.strip_prefix(POINTER)?;
    rest.starts_with('/').then_some(rest)
}

/// The trust domain that stands for whichever is the mesh's own, as Istio documents it.
const POINTER: &str = "cluster.local";

fn is_account(account: &ServiceAccount, identity: &SpiffeId) -> bool {
    &*account.namespace == identity.namespace() && &*account.name == identity.service_account()
}

/// Families never mix: an IPv4 range says nothing about IPv6.
fn contains(range: &IpNet, ip: IpAddr) -> bool {
    range.contains(&ip.to_canonical())
}

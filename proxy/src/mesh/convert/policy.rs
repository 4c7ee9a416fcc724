//! Policies. An entry that cannot be read refuses the whole policy: leaving it out could let more through than was meant.

use std::sync::Arc;

use ipnet::IpNet;
use xds_client::proto::security as pb;

use super::{Converter, Invalid, known, port, range};
use crate::mesh::{
    Action, Clause, Condition, Match, Policy, PolicyScope, Rule, ServiceAccount, StringMatch,
    record::Record,
};

impl Converter<'_> {
    /// Converts a policy; workloads refer to it by `key`.
    pub(in crate::mesh) fn policy(
        &mut self,
        key: &str,
        policy: &pb::Authorization,
    ) -> Result<Record, Invalid> {
        if key.is_empty() {
            return Err(Invalid::Empty("name"));
        }
        let policy = Policy {
            key: self.pool.string(key),
            name: self.pool.string(&policy.name),
            namespace: self.pool.string(&policy.namespace),
            scope: match known(policy.scope, "scope")? {
                pb::Scope::Global => PolicyScope::Global,
                pb::Scope::Namespace => PolicyScope::Namespace,
                pb::Scope::WorkloadSelector => PolicyScope::WorkloadSelector,
            },
            action: match known(policy.action, "action")? {
                pb::Action::Allow => Action::Allow,
                pb::Action::Deny => Action::Deny,
            },
            dry_run: policy.dry_run,
            rules: all(&policy.rules, rule)?,
        };
        if let Some(why) = policy.hollow() {
            tracing::warn!(
                policy = %policy.key,
                reason = %why,
                "a rule of this policy never matches"
            );
        }
        Ok(Record::Policy(Arc::new(policy)))
    }
}

fn rule(given: &pb::Rule) -> Result<Rule, Invalid> {
    let clause = |given: &pb::Clause| {
        let matches = all(&given.matches, one_match)?;
        Ok(Clause { matches })
    };
    let clauses = all(&given.clauses, clause)?;
    Ok(Rule { clauses })
}

fn one_match(given: &pb::Match) -> Result<Match, Invalid> {
    Ok(Match {
        namespaces: Condition {
            any_of: strings(&given.namespaces, "namespaces")?,
            none_of: strings(&given.not_namespaces, "not_namespaces")?,
        },
        principals: Condition {
            any_of: strings(&given.principals, "principals")?,
            none_of: strings(&given.not_principals, "not_principals")?,
        },
        service_accounts: Condition {
            any_of: service_accounts(&given.service_accounts),
            none_of: service_accounts(&given.not_service_accounts),
        },
        source_ips: Condition {
            any_of: ranges(&given.source_ips, "source_ips")?,
            none_of: ranges(&given.not_source_ips, "not_source_ips")?,
        },
        destination_ips: Condition {
            any_of: ranges(&given.destination_ips, "destination_ips")?,
            none_of: ranges(&given.not_destination_ips, "not_destination_ips")?,
        },
        destination_ports: Condition {
            any_of: ports(&given.destination_ports, "destination_ports")?,
            none_of: ports(&given.not_destination_ports, "not_destination_ports")?,
        },
    })
}

fn strings(given: &[pb::StringMatch], field: &'static str) -> Result<Box<[StringMatch]>, Invalid> {
    use pb::string_match::MatchType;
    all(given, |one| match &one.match_type {
        Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
        Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
        Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.as_str().into())),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err(Invalid::StringMatch(field)),
    })
}

fn service_accounts(given: &[pb::ServiceAccountMatch]) -> Box<[ServiceAccount]> {
    let convert = |one: &pb::ServiceAccountMatch| ServiceAccount {
        namespace: one.namespace.as_str().into(),
        name: one.service_account.as_str().into(),
    };
    given.iter().map(convert).collect()
}

fn ranges(given: &[pb::Address], field: &'static str) -> Result<Box<[IpNet]>, Invalid> {
    all(given, |one| range(&one.address, one.length, field))
}

fn ports(given: &[u32], field: &'static str) -> Result<Box<[u16]>, Invalid> {
    all(given, |one| port(*one, field))
}

fn all<T, U>(
    given: &[T],
    convert: impl FnMut(&T) -> Result<U, Invalid>,
) -> Result<Box<[U]>, Invalid> {
    given.iter().map(convert).collect()
}

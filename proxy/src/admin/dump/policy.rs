//! Authorization policies.

use std::fmt::Display;

use serde::{Serialize, Serializer};

use super::Each;
use crate::mesh::{
    Action, Clause, Condition, Match, Policy, PolicyScope, ServiceAccount, StringMatch,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PolicyRecord<'a> {
    action: &'static str,
    dry_run: bool,
    name: &'a str,
    namespace: &'a str,
    rules: Rules<'a>,
    scope: &'static str,
}

impl<'a> PolicyRecord<'a> {
    pub(super) fn of(policy: &'a Policy) -> Self {
        Self {
            action: match policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            dry_run: policy.dry_run,
            name: &policy.name,
            namespace: &policy.namespace,
            rules: Rules(policy),
            scope: match policy.scope {
                PolicyScope::Global => "Global",
                PolicyScope::Namespace => "Namespace",
                PolicyScope::WorkloadSelector => "WorkloadSelector",
            },
        }
    }
}

/// Rules of clauses of matches.
struct Rules<'a>(&'a Policy);

impl Serialize for Rules<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let rules = self.0.rules.iter();
        serializer.collect_seq(rules.map(|rule| Each(|| rule.clauses.iter().map(ClauseRecord))))
    }
}

struct ClauseRecord<'a>(&'a Clause);

impl Serialize for ClauseRecord<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.matches.iter().map(MatchRecord::of))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MatchRecord<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<TextMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<TextMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<TextMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<Account<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<TextMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<Account<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ips: Vec<String>,
}

impl<'a> MatchRecord<'a> {
    fn of(given: &'a Match) -> Self {
        let [namespaces, not_namespaces] = shown(&given.namespaces, TextMatch::of);
        let [principals, not_principals] = shown(&given.principals, TextMatch::of);
        let [service_accounts, not_service_accounts] = shown(&given.service_accounts, Account::of);
        let [source_ips, not_source_ips] = shown(&given.source_ips, text);
        let [destination_ips, not_destination_ips] = shown(&given.destination_ips, text);
        Self {
            destination_ips,
            destination_ports: &given.destination_ports.any_of,
            namespaces,
            not_destination_ips,
            not_destination_ports: &given.destination_ports.none_of,
            not_namespaces,
            not_principals,
            not_service_accounts,
            not_source_ips,
            principals,
            service_accounts,
            source_ips,
        }
    }
}

/// What must match, and what must not.
fn shown<'a, T, U>(condition: &'a Condition<T>, show: impl Fn(&'a T) -> U) -> [Vec<U>; 2] {
    [&condition.any_of, &condition.none_of].map(|values| values.iter().map(&show).collect())
}

fn text(value: &impl Display) -> String {
    value.to_string()
}

/// `{"Exact": "a"}`; the names are those of the variants.
#[derive(Serialize)]
enum TextMatch<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Presence([(); 0]),
}

impl<'a> TextMatch<'a> {
    fn of(value: &'a StringMatch) -> Self {
        match value {
            StringMatch::Exact(text) => Self::Exact(text),
            StringMatch::Prefix(text) => Self::Prefix(text),
            StringMatch::Suffix(text) => Self::Suffix(text),
            StringMatch::Presence => Self::Presence([]),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Account<'a> {
    namespace: &'a str,
    service_account: &'a str,
}

impl<'a> Account<'a> {
    fn of(account: &'a ServiceAccount) -> Self {
        Self {
            namespace: &account.namespace,
            service_account: &account.name,
        }
    }
}

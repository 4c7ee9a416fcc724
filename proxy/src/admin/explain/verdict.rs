//! What policies say of the connection at its destination.

use serde::Serialize;

use crate::{
    flow::PATIENCE,
    mesh::{Action, Applicable, Policy, State, Workload},
    policy::{self, Connection, Field, Matching, Mismatch},
    route::Outbound,
    telemetry::Reason,
};

/// The verdict, and every policy that was asked.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Verdict {
    pub(super) allowed: bool,
    /// In the words of the authorization log.
    pub(super) because: String,
    /// Policies that the workload names and that have not arrived: a connection is held for them before it is let in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waits_for: Vec<String>,
    pub(super) policies: Vec<Judged>,
}

/// One policy.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Judged {
    pub(super) key: String,
    /// `ALLOW` or `DENY`; `None` if it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) action: Option<&'static str>,
    pub(super) dry_run: bool,
    pub(super) matches: bool,
    /// The rule that matches, or the fields that do not.
    pub(super) because: String,
}

impl Verdict {
    /// Asks as the proxy of `workload` does.
    pub(super) fn of(state: &State, workload: &Workload, connection: &Connection<'_>) -> Self {
        let verdict = policy::authorize(state, workload, connection);
        let decision = verdict.decision();
        let because = match &verdict.outcome {
            Err(denied) => denied.to_string(),
            Ok(_) => match &decision.policy {
                Some(policy) => format!("{}: {policy}", decision.event),
                None => decision.event.to_string(),
            },
        };
        let waits_for: Vec<_> = if verdict.is_allowed() {
            verdict.missing().map(ToString::to_string).collect()
        } else {
            Vec::new()
        };
        let because = if waits_for.is_empty() {
            because
        } else {
            let names = waits_for.join(", ");
            format!("waits for policy {names}, {PATIENCE:?} at most; without it: {because}")
        };
        let policies = policy::explain(state, workload, connection);
        Self {
            allowed: verdict.is_allowed(),
            because,
            waits_for,
            policies: policies
                .map(|(applicable, matching)| Judged::of(applicable, matching, connection))
                .collect(),
        }
    }

    /// What the access log of the source calls a denial: its peer answers 401 where there is a tunnel.
    pub(super) fn reason(&self, outbound: &Outbound) -> Reason {
        match outbound {
            Outbound::Hbone(_) | Outbound::Nested { .. } => Reason::DeniedByPeer,
            Outbound::Passthrough { .. }
            | Outbound::Direct { .. }
            | Outbound::Resolve(_)
            | Outbound::Refuse(_) => Reason::PolicyDenied,
        }
    }
}

impl Judged {
    fn of(
        applicable: Applicable<'_>,
        matching: Option<Matching>,
        connection: &Connection<'_>,
    ) -> Self {
        let Applicable::Policy(policy) = applicable else {
            return Self::missing(applicable);
        };
        let matches = matches!(matching, Some(Matching::Rule(_)));
        Self {
            key: policy.key.to_string(),
            action: Some(match policy.action {
                Action::Allow => "ALLOW",
                Action::Deny => "DENY",
            }),
            dry_run: policy.dry_run,
            matches,
            because: because(policy, matching, connection),
        }
    }

    fn missing(applicable: Applicable<'_>) -> Self {
        let key = match applicable {
            Applicable::Missing(key) => key.to_string(),
            Applicable::Policy(policy) => policy.key.to_string(),
        };
        Self {
            key,
            action: None,
            dry_run: false,
            matches: false,
            because: "the workload names it, but it is not known".to_owned(),
        }
    }
}

fn because(policy: &Policy, matching: Option<Matching>, connection: &Connection<'_>) -> String {
    match matching {
        Some(Matching::Rule(rule)) => format!("rule {} matches", rule + 1),
        Some(Matching::None(mismatches)) if mismatches.is_empty() && policy.rules.is_empty() => {
            "it has no rules".to_owned()
        }
        Some(Matching::None(mismatches)) => {
            let each = mismatches.iter().map(|one| mismatch(one, connection));
            each.collect::<Vec<_>>().join("; ")
        }
        None => String::new(),
    }
}

fn mismatch(one: &Mismatch, connection: &Connection<'_>) -> String {
    let Mismatch {
        rule,
        clause,
        field,
        ..
    } = one;
    let place = format!("rule {}, clause {}: {field}", rule + 1, clause + 1);
    let identity = connection.identity;
    let is = match field {
        Field::DestinationPort => connection.destination.port().to_string(),
        Field::SourceIp => connection.source.ip().to_string(),
        Field::DestinationIp => connection.destination.ip().to_string(),
        Field::Namespace => identity.map_or_else(String::new, |id| id.namespace().to_owned()),
        Field::Principal => identity.map_or_else(String::new, |id| id.as_str().to_owned()),
        Field::ServiceAccount => identity.map_or_else(String::new, |id| {
            format!("{}/{}", id.namespace(), id.service_account())
        }),
        Field::Nothing => return place,
    };
    if is.is_empty() {
        format!("{place} (the peer proves no identity)")
    } else {
        format!("{place} (is {is})")
    }
}

//! May this connection be: the authorization of inbound connections, as a pure function.
//!
//! [`authorize`] judges a connection by the policies that apply to the workload it reached: those
//! of its namespace, those of the whole mesh, and those its record names. The order is
//!
//! 1. dry-run DENY policies are only told;
//! 2. a matching DENY policy denies;
//! 3. dry-run ALLOW policies are only told;
//! 4. without an ALLOW policy, everything is allowed;
//! 5. a matching ALLOW policy allows;
//! 6. else the connection is denied.
//!
//! The answer carries what is to be logged as values; nothing is logged here. It can be asked again
//! at any time: `flow` re-judges live connections with the same function.

mod explain;
mod matches;

use std::{fmt, net::SocketAddr, sync::Arc};

use cert_agent::SpiffeId;

pub use explain::{Field, Matching, Mismatch, explain};
use matches::Subject;

use crate::mesh::{Action, Applicable, Policy, State, Workload};

/// What policies are asked about.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a query is built by its caller")]
pub struct Connection<'a> {
    /// The TCP peer; behind a waypoint or gateway that is the waypoint or gateway.
    pub source: SocketAddr,
    /// Pod address and resolved port.
    pub destination: SocketAddr,
    /// Who the peer proved to be; `None` in plaintext.
    pub identity: Option<&'a SpiffeId>,
}

/// Evidence that [`authorize`] said yes: nothing else makes one.
#[derive(Debug)]
#[must_use = "a permit is consumed by the connection that it allows"]
pub struct Permit(());

/// Why a connection is denied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// This DENY policy matches; its key is `namespace/name`.
    #[error("explicitly denied by: {0}")]
    Explicitly(Arc<str>),
    /// There are ALLOW policies and none matches.
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
    /// The workload names this policy, and the control plane, which may know it, has not answered since the start.
    #[error("policy {0} is not known, and the control plane has not answered yet")]
    Unconfirmed(Arc<str>),
}

/// The outcome, and what is to be logged about it.
#[derive(Debug)]
#[must_use]
#[non_exhaustive]
pub struct Verdict {
    /// The permit, or the reason of the denial.
    pub outcome: Result<Permit, Denied>,
    decision: Note,
    asides: Vec<Note>,
}

impl Verdict {
    /// Whether the connection may be.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.outcome.is_ok()
    }

    /// What decided; always the last of [`Self::notes`].
    #[must_use]
    pub fn decision(&self) -> &Note {
        &self.decision
    }

    /// Keys of policies that the workload names and that were not delivered.
    pub fn missing(&self) -> impl Iterator<Item = &Arc<str>> {
        let missing = self
            .asides
            .iter()
            .filter(|note| note.event == Event::Missing);
        missing.filter_map(|note| note.policy.as_ref())
    }

    /// Everything to be logged, in order: missing policies, dry runs, then what decided.
    pub fn notes(&self) -> impl Iterator<Item = &Note> {
        self.asides.iter().chain([&self.decision])
    }
}

/// One line of the authorization log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Note {
    /// What happened; displays as the message.
    pub event: Event,
    /// Key of the policy concerned, `namespace/name`.
    pub policy: Option<Arc<str>>,
}

/// What an authorization log line tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An enforced DENY policy matches.
    DenyMatch,
    /// An enforced ALLOW policy matches.
    AllowMatch,
    /// No enforced ALLOW policy applies.
    NoAllowPolicies,
    /// Enforced ALLOW policies apply and none matches.
    NoAllowMatch,
    /// A dry-run DENY policy matches.
    DryRunDenyMatch,
    /// A dry-run ALLOW policy matches.
    DryRunAllowMatch,
    /// Only dry-run ALLOW policies apply and none matches.
    DryRunNoAllowMatch,
    /// The workload names a policy that the control plane has not delivered; it is not enforced.
    Missing,
    /// The same, while the state is one that was recalled: nothing is allowed.
    Unconfirmed,
}

impl Event {
    /// Whether this is a defect of the mesh state, to be warned of, rather than part of a verdict.
    #[must_use]
    pub fn is_degradation(self) -> bool {
        self == Self::Missing
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DenyMatch => "deny policy match",
            Self::AllowMatch => "allow policy match",
            Self::NoAllowPolicies => "no allow policies, allow",
            Self::NoAllowMatch => "no allow policies matched",
            Self::DryRunDenyMatch => "dry-run: deny policy match",
            Self::DryRunAllowMatch => "dry-run: allow policy match",
            Self::DryRunNoAllowMatch => "dry-run: no allow policies match",
            Self::Missing => "policy not found, not enforced",
            Self::Unconfirmed => "policy not found, and the state is not confirmed",
        })
    }
}

/// Judges `connection` by the policies that apply to `workload`.
///
/// Takes one pass over the policies. It allocates only if there is something to say besides the
/// decision, or to build a denial.
pub fn authorize(state: &State, workload: &Workload, connection: &Connection<'_>) -> Verdict {
    let mut judgement = Judgement::default();
    let subject = Subject::new(workload, connection);
    for applicable in state.policies_for(workload) {
        match applicable {
            Applicable::Policy(policy) => judgement.weigh(policy, &subject),
            Applicable::Missing(key) if is_static_strict(key) => {
                judgement.weigh_static_strict(key, connection);
            }
            Applicable::Missing(key) if state.recalled().is_some() => {
                judgement.unconfirmed.get_or_insert(key);
            }
            Applicable::Missing(key) => judgement
                .missing
                .push(note(Event::Missing, Arc::clone(key))),
        }
    }
    judgement.pronounce()
}

/// What the policies seen so far amount to.
#[derive(Debug, Default)]
struct Judgement<'a> {
    denied_by: Option<&'a Arc<str>>,
    unconfirmed: Option<&'a Arc<str>>,
    allowed_by: Option<&'a Arc<str>>,
    has_allow: bool,
    has_dry_allow: bool,
    missing: Vec<Note>,
    dry_denials: Vec<Note>,
    dry_allows: Vec<Note>,
}

impl<'a> Judgement<'a> {
    /// Looks only as far as the verdict needs: the first match of a kind decides.
    fn weigh(&mut self, policy: &'a Policy, subject: &Subject<'_>) {
        let is_match = || matches::policy(policy, subject);
        match (policy.action, policy.dry_run) {
            (Action::Deny, false) => {
                if self.denied_by.is_none() && is_match() {
                    self.denied_by = Some(&policy.key);
                }
            }
            (Action::Allow, false) => {
                self.has_allow = true;
                if self.allowed_by.is_none() && is_match() {
                    self.allowed_by = Some(&policy.key);
                }
            }
            (Action::Deny, true) => {
                if is_match() {
                    let key = Arc::clone(&policy.key);
                    self.dry_denials.push(note(Event::DryRunDenyMatch, key));
                }
            }
            (Action::Allow, true) => {
                self.has_dry_allow = true;
                if is_match() {
                    let key = Arc::clone(&policy.key);
                    self.dry_allows.push(note(Event::DryRunAllowMatch, key));
                }
            }
        }
    }

    /// As the policy of that name would, which refuses peers without an identity and nobody else.
    fn weigh_static_strict(&mut self, key: &'a Arc<str>, connection: &Connection<'_>) {
        if connection.identity.is_none() {
            self.denied_by.get_or_insert(key);
        }
    }

    fn pronounce(mut self) -> Verdict {
        let mut asides = self.missing;
        asides.append(&mut self.dry_denials);
        if let Some(key) = self.denied_by {
            return Verdict {
                outcome: Err(Denied::Explicitly(Arc::clone(key))),
                decision: note(Event::DenyMatch, Arc::clone(key)),
                asides,
            };
        }
        if let Some(key) = self.unconfirmed {
            return Verdict {
                outcome: Err(Denied::Unconfirmed(Arc::clone(key))),
                decision: note(Event::Unconfirmed, Arc::clone(key)),
                asides,
            };
        }
        let dry_match = !self.dry_allows.is_empty();
        asides.append(&mut self.dry_allows);
        let (outcome, decision) = match (self.allowed_by, self.has_allow) {
            (Some(key), _) => (Ok(Permit(())), note(Event::AllowMatch, Arc::clone(key))),
            (None, true) => (Err(Denied::NotAllowed), plain(Event::NoAllowMatch)),
            (None, false) => {
                if self.has_dry_allow && !dry_match {
                    asides.push(plain(Event::DryRunNoAllowMatch));
                }
                (Ok(Permit(())), plain(Event::NoAllowPolicies))
            }
        };
        Verdict {
            outcome,
            decision,
            asides,
        }
    }
}

/// Whether this is the policy by which istiod makes mutual TLS mandatory. Its name says all that is in it, so it is in force
/// where a workload names it, delivered or not.
fn is_static_strict(key: &str) -> bool {
    let name = key.split_once('/').map(|(_, name)| name);
    name == Some("istio_converted_static_strict")
}

fn note(event: Event, policy: Arc<str>) -> Note {
    Note {
        event,
        policy: Some(policy),
    }
}

fn plain(event: Event) -> Note {
    Note {
        event,
        policy: None,
    }
}

#[cfg(test)]
mod tests;

//! The authorization log: which policy decided.

/// The scope of the log. The prefix is that of ztunnel, whose operators filter by it.
const SCOPE: &str = "ztunnel::state";

/// Writes verdicts of policy evaluation into the log, at the level that the operator chose.
#[derive(Debug, Clone, Copy)]
pub struct AuthorizationLog {
    at_info: bool,
}

/// One remark of an evaluation. Policies are named `NAMESPACE/NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthorizationEvent<'a> {
    /// A DENY policy matched.
    Denied(&'a str),
    /// An ALLOW policy matched.
    Allowed(&'a str),
    /// There is no ALLOW policy, so everything is allowed.
    NoAllowPolicies,
    /// ALLOW policies exist and none matched.
    NoneMatched,
    /// A DENY policy under dry run would have matched.
    DryRunDenied(&'a str),
    /// An ALLOW policy under dry run would have matched.
    DryRunAllowed(&'a str),
    /// Only ALLOW policies under dry run exist, and none matched.
    DryRunNoneMatched,
    /// A policy was looked at and did not match.
    NotMatched(&'a str),
    /// A workload names a policy that was not delivered.
    Missing(&'a str),
    /// The same, where nothing is allowed for that.
    Unconfirmed(&'a str),
}

impl AuthorizationLog {
    /// `at_info` lifts verdicts from debug to info.
    pub fn new(at_info: bool) -> Self {
        Self { at_info }
    }

    /// Logs one remark within the current span.
    pub fn report(self, event: AuthorizationEvent<'_>) {
        use AuthorizationEvent as Event;
        let (policy, message) = match event {
            Event::Denied(policy) => (Some(policy), "deny policy match"),
            Event::Allowed(policy) => (Some(policy), "allow policy match"),
            Event::NoAllowPolicies => (None, "no allow policies, allow"),
            Event::NoneMatched => (None, "no allow policies matched"),
            Event::DryRunDenied(policy) => (Some(policy), "dry-run: deny policy match"),
            Event::DryRunAllowed(policy) => (Some(policy), "dry-run: allow policy match"),
            Event::DryRunNoneMatched => (None, "dry-run: no allow policies match"),
            Event::NotMatched(policy) => {
                return tracing::trace!(target: SCOPE, policy, "policy does not match");
            }
            Event::Unconfirmed(policy) => {
                return tracing::warn!(target: SCOPE, policy, "policy is not known, refused until the control plane answers");
            }
            Event::Missing(policy) => {
                return tracing::warn!(target: SCOPE, policy, "policy is not known");
            }
        };
        if self.at_info {
            tracing::info!(target: SCOPE, policy, "{message}");
        } else {
            tracing::debug!(target: SCOPE, policy, "{message}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::LogFormat, telemetry::logging::tests::capture};
    use AuthorizationEvent as Event;

    #[test]
    fn verdicts_have_their_wording_and_level() {
        let cases = [
            (Event::Denied("ns/p"), "deny policy match\tpolicy=\"ns/p\""),
            (
                Event::Allowed("ns/p"),
                "allow policy match\tpolicy=\"ns/p\"",
            ),
            (Event::NoAllowPolicies, "no allow policies, allow\t"),
            (Event::NoneMatched, "no allow policies matched\t"),
            (
                Event::DryRunDenied("ns/p"),
                "dry-run: deny policy match\tpolicy=\"ns/p\"",
            ),
            (
                Event::DryRunAllowed("ns/p"),
                "dry-run: allow policy match\tpolicy=\"ns/p\"",
            ),
            (
                Event::DryRunNoneMatched,
                "dry-run: no allow policies match\t",
            ),
        ];
        for (event, expected) in cases {
            for (at_info, level) in [(true, "info"), (false, "debug")] {
                let log = AuthorizationLog::new(at_info);
                let lines = capture(LogFormat::Text, "off,state=debug", |_| log.report(event));
                assert_eq!(lines, [format!("{level}\tstate\t{expected}")]);
            }
        }
        let log = AuthorizationLog::new(true);
        let lines = capture(LogFormat::Text, "info", |_| {
            log.report(Event::NotMatched("ns/p"));
            log.report(Event::Missing("ns/p"));
        });
        assert_eq!(lines, ["warn\tstate\tpolicy is not known\tpolicy=\"ns/p\""]);
    }
}

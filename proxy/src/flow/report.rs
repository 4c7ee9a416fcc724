//! The beginning and the end of a flow, as metrics and the access log tell them.

use super::failure::Failure;
use crate::{
    policy::{Event, Note},
    telemetry::{Access, AuthorizationEvent, AuthorizationLog, ResponseFlag},
};

/// Closes the record of a flow.
pub(super) fn close(access: Access, end: Result<(), Failure>) {
    match end {
        Ok(()) => access.close(ResponseFlag::None, None),
        Err(failure) => access.close(failure.flag(), Some(&failure)),
    }
}

/// Logs one remark of a policy verdict.
pub(super) fn note(log: AuthorizationLog, note: &Note) {
    let policy = note.policy.as_deref().unwrap_or_default();
    log.report(match note.event {
        Event::DenyMatch => AuthorizationEvent::Denied(policy),
        Event::AllowMatch => AuthorizationEvent::Allowed(policy),
        Event::NoAllowPolicies => AuthorizationEvent::NoAllowPolicies,
        Event::NoAllowMatch => AuthorizationEvent::NoneMatched,
        Event::DryRunDenyMatch => AuthorizationEvent::DryRunDenied(policy),
        Event::DryRunAllowMatch => AuthorizationEvent::DryRunAllowed(policy),
        Event::DryRunNoAllowMatch => AuthorizationEvent::DryRunNoneMatched,
        Event::Missing => AuthorizationEvent::Missing(policy),
    });
}

//! The life of an open flow and its end, as metrics and the access log tell it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use super::{failure::Failure, table::Entry};
use crate::{
    listen::PortLease,
    policy::{Event, Note},
    relay::Outcome,
    telemetry::{Access, AuthorizationEvent, AuthorizationLog},
};

/// Closes the record of a flow.
pub(super) fn close(access: Access, end: Result<(), Failure>) {
    match end {
        Ok(()) => access.close(None),
        Err(failure) => access.close(Some((failure.reason(), &failure))),
    }
}

/// The end of a flow whose tunnel broke because it was `cut`, however it looked from inside.
pub(super) fn unless_cut(cut: bool, end: Result<(), Failure>) -> Result<(), Failure> {
    if cut { Err(Failure::PeerRevoked) } else { end }
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

/// What is kept of an open flow besides its two sides. Boxed, because the compiler would hold it
/// twice in the flow's future.
pub(super) struct Told {
    pub(super) access: Access,
    pub(super) entry: Entry,
    _ports: [Option<PortLease>; 2],
}

impl Told {
    /// `ports` are the source ports that the flow occupies.
    pub(super) fn new(access: Access, entry: Entry, ports: [Option<PortLease>; 2]) -> Box<Self> {
        Box::new(Self {
            access,
            entry,
            _ports: ports,
        })
    }

    /// Reports the end. The sides of the flow are closed by now, so its ports become free.
    pub(super) fn close(self: Box<Self>, end: Result<(), Failure>) {
        close(self.access, end);
    }
}

/// Runs the relay of a flow until it ends, or until a policy change ends it.
pub(super) struct Guarded<'a, P> {
    entry: &'a Entry,
    pump: P,
}

impl<'a, P> Guarded<'a, P> {
    pub(super) fn new(entry: &'a Entry, pump: P) -> Self {
        Self { entry, pump }
    }
}

impl<P: Future<Output = Outcome> + Unpin> Future for Guarded<'_, P> {
    type Output = Result<(), Failure>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        // First the verdict: a revoked flow moves no further byte.
        if let Poll::Ready(why) = this.entry.poll_revoked(cx) {
            return Poll::Ready(Err(Failure::Revoked(why)));
        }
        Pin::new(&mut this.pump)
            .poll(cx)
            .map(|outcome| Failure::of(outcome).map_or(Ok(()), Err))
    }
}

//! The life of an open flow and its end, as metrics and the access log tell it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use super::{failure::Failure, table::Entry};
use crate::{
    listen::{self, PortLease},
    policy::{Event, Note},
    relay::{Count, Endpoint, Pump},
    telemetry::{Access, AuthorizationEvent, AuthorizationLog, Meter, TcpFacts},
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
        Event::Unconfirmed => AuthorizationEvent::Unconfirmed(policy),
    });
}

/// What is kept of an open flow besides its two sides. Boxed, because the compiler would hold it
/// twice in the flow's future.
pub(super) struct Told {
    pub(super) access: Access,
    pub(super) entry: Entry,
    _ports: Box<[PortLease]>,
}

impl Told {
    /// `ports` are the source ports that the flow occupies.
    pub(super) fn new(access: Access, entry: Entry, ports: [Option<PortLease>; 2]) -> Box<Self> {
        let ports: Box<[PortLease]> = match ports {
            [None, None] => Box::default(),
            [Some(port), None] | [None, Some(port)] => Box::new([port]),
            [Some(one), Some(other)] => Box::new([one, other]),
        };
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

/// Runs the relay of a flow until it ends, or until a policy change ends it, and has the flow's span told of it.
pub(super) struct Guarded<'a, D, U, C = Meter> {
    told: &'a Told,
    pump: Pump<'a, D, U, C>,
}

impl<'a, D: Endpoint, U: Endpoint, C: Count> Guarded<'a, D, U, C> {
    pub(super) fn new(told: &'a Told, pump: Pump<'a, D, U, C>) -> Self {
        Self { told, pump }
    }

    fn trace(&self, ended: bool) {
        let access = &self.told.access;
        let trace = access.trace();
        if trace.awaits_first_byte() && access.meter().totals().1 > 0 {
            trace.first_byte();
        }
        if ended {
            let facts = |socket: Option<&_>| {
                let (rtt, retransmits) = listen::round_trip(socket?).ok()?;
                Some(TcpFacts { rtt, retransmits })
            };
            trace.tcp(|| self.pump.sockets().map(facts));
        }
    }
}

impl<D, U, C> Future for Guarded<'_, D, U, C>
where
    D: Endpoint + Unpin,
    U: Endpoint + Unpin,
    C: Count,
{
    type Output = Result<(), Failure>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        // First the verdict: a revoked flow moves no further byte.
        let end = if let Poll::Ready(why) = this.told.entry.poll_revoked(cx) {
            Poll::Ready(Err(Failure::Revoked(why)))
        } else {
            Pin::new(&mut this.pump)
                .poll(cx)
                .map(|outcome| Failure::of(outcome).map_or(Ok(()), Err))
        };
        this.trace(end.is_ready());
        end
    }
}

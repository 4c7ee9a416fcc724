//! Asking the policies of a pod, and waiting for those that its record names and that have not arrived.
//!
//! A record and the policies that it names come in messages of different types, in either order. A flow that is let in before
//! its policies are there may be one that they forbid, so it waits for them: until [`PATIENCE`] after their absence was first
//! noticed, since a name may also be one that nobody will ever tell of. Then the flow is judged by the others, and a warning
//! told, as every proxy of the mesh does: who names a policy that does not exist would otherwise lose the whole workload.

use std::{sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use super::{
    Pod,
    failure::Failure,
    report,
    table::{Entry, Revocation},
};
use crate::{
    mesh::Workload,
    policy::{self, Connection, Permit},
};

/// Policies that the record of a pod names in vain, and since when that is known.
#[derive(Debug, Default)]
pub(super) struct Awaited(Mutex<HashMap<Arc<str>, Instant, RandomState>>);

impl Awaited {
    /// Until when to wait for these, if that is still to come. Names that are not among them are forgotten.
    fn until<'a>(&self, missing: impl Iterator<Item = &'a Arc<str>>) -> Option<Instant> {
        let missing: Vec<_> = missing.collect();
        let now = Instant::now();
        let mut since = self.0.lock();
        since.retain(|name, _| missing.contains(&name));
        let each = missing
            .into_iter()
            .map(|name| *since.entry(Arc::clone(name)).or_insert(now));
        let until = each.max()? + PATIENCE;
        (until > now).then_some(until)
    }
}

/// Asks the policies of the pod, logs what they say, and notes what decided. The record that counts is the present one: the flow is
/// listed by now, so that a change after this look is the judge's to see, and one before it must not be missed. `local` stands in
/// for a record that has gone.
///
/// # Errors
/// [`Failure::Denied`]; [`Failure::Revoked`] if the pod has shown itself to the peer, perhaps long ago, as somebody it is no longer.
/// # Cancel safety
/// Nothing is lost.
pub(super) async fn authorize(
    pod: &Pod,
    local: &Arc<Workload>,
    connection: &Connection<'_>,
    entry: &Entry,
) -> Result<Permit, Failure> {
    let mut changes = pod.shared().mesh.changes();
    let verdict = loop {
        changes.mark_unchanged();
        let verdict = {
            let state = pod.shared().mesh.read();
            let local = state.local_workload(pod.who()).unwrap_or(local);
            if entry.facts().is_disowned(local) {
                return Err(Failure::Revoked(Revocation::Identity));
            }
            policy::authorize(&state, local, connection)
        };
        let until = pod.awaited().until(verdict.missing());
        let Some(until) = until.filter(|_| verdict.is_allowed()) else {
            break verdict;
        };
        // Whatever comes of it, the next look tells.
        let _ = timeout_at(until, changes.changed()).await;
    };
    entry.judged(verdict.decision());
    for note in verdict.notes() {
        report::note(pod.shared().verdicts, note);
    }
    verdict.outcome.map_err(Failure::Denied)
}

/// How long a policy that has not arrived is waited for. istiod tells of both kinds within one push; this is far more.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::{enter, pod_with, tell, told};

    #[tokio::test]
    async fn who_has_met_the_pod_as_somebody_else_is_refused() {
        let pod = pod_with(None);
        let told_of = |trust_domain: &str| {
            tell(pod.shared(), vec![told("web", [10, 0, 0, 2], trust_domain)]);
            pod.known_workload().expect("told")
        };
        let local = told_of("one");
        let connection = Connection {
            source: ([10, 0, 0, 1], 40000).into(),
            destination: ([10, 0, 0, 2], 80).into(),
            identity: None,
        };
        let (met, plain) = (enter(&pod, local.identity().cloned()), enter(&pod, None));
        let asked = async |entry| authorize(&pod, &local, &connection, entry).await;
        assert!(asked(&met).await.is_ok());
        // A stream of a connection that was made before, looked at after the judge has.
        let _now = told_of("two");
        let refused = asked(&met).await.map(|_| ());
        assert!(
            matches!(refused, Err(Failure::Revoked(Revocation::Identity))),
            "{refused:?}"
        );
        assert!(asked(&plain).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_waited_for_once_and_anew_after_it_was_there() {
        let awaited = Awaited::default();
        let (one, two): (Arc<str>, Arc<str>) = ("ns/one".into(), "ns/two".into());
        let began = Instant::now();
        assert_eq!(awaited.until([].into_iter()), None);
        assert_eq!(awaited.until([&one].into_iter()), Some(began + PATIENCE));
        tokio::time::advance(PATIENCE / 2).await;
        assert_eq!(awaited.until([&one].into_iter()), Some(began + PATIENCE));
        let later = Instant::now() + PATIENCE;
        assert_eq!(awaited.until([&one, &two].into_iter()), Some(later));
        tokio::time::advance(PATIENCE).await;
        assert_eq!(awaited.until([&one, &two].into_iter()), None, "enough");
        assert_eq!(awaited.until([&two].into_iter()), None);
        let again = Some(Instant::now() + PATIENCE);
        assert_eq!(
            awaited.until([&one, &two].into_iter()),
            again,
            "one was there"
        );
    }
}

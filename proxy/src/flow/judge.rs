//! Judges open flows again when something changes that their verdict hangs on.

use std::{sync::Arc, time::Duration};

use cert_agent::SpiffeId;
use tokio::time::sleep;

use super::{
    Direction, Pod,
    table::{Facts, Revocation},
};
use crate::{
    mesh::{Applicable, Policy, State, Workload},
    policy::{self, Connection},
};

/// Changes that follow each other faster than this are judged together.
const QUIET: Duration = Duration::from_millis(20);

/// Revokes flows of `pod` that may no longer be, each time its policies or its identity change: inbound ones that a policy
/// forbids, and those of both directions in which the pod has shown an identity that is no longer its own.
///
/// Judged with the pod's current record, so that a policy attached later counts too; a pod without a record is judged by the last
/// one. Where an outbound flow leads is no matter of a verdict: it keeps its path, and who may not be reached any longer says so
/// at the other end. Never ends by itself while the mesh lives.
pub(super) async fn run(pod: &Pod) {
    let mut changes = pod.shared().mesh.changes();
    let mut last_known = pod.known_workload();
    let mut last_basis = None;
    loop {
        if let Some(local) = &last_known {
            let basis = Basis::of(&pod.shared().mesh.read(), local);
            if last_basis.as_ref() != Some(&basis) {
                revoke_forbidden(pod, local);
                last_basis = Some(basis);
            }
        }
        if changes.changed().await.is_err() {
            break;
        }
        sleep(QUIET).await;
        changes.mark_unchanged();
        last_known = pod.known_workload().or(last_known);
    }
    // The mesh is gone: the process is stopping, and flows end with their listeners.
    std::future::pending::<()>().await;
}

/// What of the mesh the verdicts about a pod's flows hang on. Most changes of a mesh concern others.
#[derive(Debug)]
struct Basis {
    identity: Option<SpiffeId>,
    policies: Vec<Arc<Policy>>,
    missing: Vec<Arc<str>>,
}

impl Basis {
    fn of(state: &State, local: &Workload) -> Self {
        let mut basis = Self {
            identity: local.identity().cloned(),
            policies: Vec::new(),
            missing: Vec::new(),
        };
        for applicable in state.policies_for(local) {
            match applicable {
                Applicable::Policy(policy) => basis.policies.push(Arc::clone(policy)),
                Applicable::Missing(key) => basis.missing.push(Arc::clone(key)),
            }
        }
        basis
    }
}

impl PartialEq for Basis {
    /// A policy that is another record counts as another policy: what has not changed keeps its record.
    fn eq(&self, other: &Self) -> bool {
        let policies = self.policies.iter().zip(&other.policies);
        self.identity == other.identity
            && self.missing == other.missing
            && self.policies.len() == other.policies.len()
            && policies.into_iter().all(|(one, two)| Arc::ptr_eq(one, two))
    }
}

fn revoke_forbidden(pod: &Pod, local: &Workload) {
    for flow in pod.flows().open() {
        if let Some(why) = judge(&pod.shared().mesh.read(), local, &flow) {
            flow.revoke(why);
        }
    }
}

/// Why a flow may no longer be, if it may not.
fn judge(state: &State, local: &Workload, flow: &Facts) -> Option<Revocation> {
    if flow.is_disowned(local) {
        return Some(Revocation::Identity);
    }
    match flow.direction() {
        Direction::Outbound { .. } => None,
        Direction::Inbound {
            source,
            destination,
            identity,
            ..
        } => {
            let connection = Connection {
                source: *source,
                destination: *destination,
                identity: identity.as_ref(),
            };
            let verdict = policy::authorize(state, local, &connection);
            verdict.outcome.err().map(Revocation::Policy)
        }
    }
}

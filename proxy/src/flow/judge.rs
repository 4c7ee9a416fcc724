//! Judges open flows again when the mesh changes.

use std::time::Duration;

use tokio::time::sleep;

use super::{Direction, Pod, table::Facts};
use crate::{
    mesh::{State, Workload},
    policy::{self, Connection},
};

/// Changes that follow each other faster than this are judged together.
const QUIET: Duration = Duration::from_millis(20);

/// Revokes inbound flows of `pod` that its policies no longer allow, each time the mesh changes.
/// Judged with the pod's current record, so that a policy attached later counts too. Never ends
/// by itself while the mesh lives.
pub(super) async fn run(pod: &Pod) {
    let mut changes = pod.shared().mesh.changes();
    let mut last_known = pod.known_workload();
    while changes.changed().await.is_ok() {
        sleep(QUIET).await;
        changes.mark_unchanged();
        last_known = pod.known_workload().or(last_known);
        if let Some(local) = &last_known
            && !pod.flows().is_empty()
        {
            revoke_forbidden(pod, local);
        }
    }
    // The mesh is gone: the process is stopping, and flows end with their listeners.
    std::future::pending::<()>().await;
}

fn revoke_forbidden(pod: &Pod, local: &Workload) {
    for flow in pod.flows().open() {
        if !may_go_on(&pod.shared().mesh.read(), local, &flow) {
            flow.revoke();
        }
    }
}

fn may_go_on(state: &State, local: &Workload, flow: &Facts) -> bool {
    match flow.direction() {
        Direction::Outbound { .. } => true,
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
            policy::authorize(state, local, &connection).outcome.is_ok()
        }
    }
}

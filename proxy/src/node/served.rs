//! Who is served now, for the admin server.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, Weak},
};

use parking_lot::Mutex;

use crate::{
    admin::{PodPhase, Pods, ShownPod},
    config::WorkloadRef,
    flow::FlowTable,
    pods::{self, PodState},
};

/// The workloads that are served, and the pods that the agent named. Clones share.
#[derive(Debug, Clone, Default)]
pub(super) struct Served(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Named by the agent; not there before pods are followed.
    named: OnceLock<pods::View>,
    tables: Mutex<Tables>,
}

/// Tables go with their pods.
#[derive(Debug, Default)]
struct Tables {
    by_uid: HashMap<Arc<str>, Weak<FlowTable>>,
    without_uid: Vec<(WorkloadRef, Weak<FlowTable>)>,
}

impl Served {
    /// Tells who names pods.
    pub(super) fn follow(&self, named: pods::View) {
        // There is one agent.
        let _ = self.0.named.set(named);
    }

    /// Notes that `who` is served. A later one of the same uid takes its place.
    pub(super) fn enter(&self, uid: Option<Arc<str>>, who: WorkloadRef, flows: &Arc<FlowTable>) {
        let mut tables = self.0.tables.lock();
        tables.by_uid.retain(|_, table| table.strong_count() > 0);
        tables
            .without_uid
            .retain(|(_, table)| table.strong_count() > 0);
        let table = Arc::downgrade(flows);
        match uid {
            Some(uid) => drop(tables.by_uid.insert(uid, table)),
            None => tables.without_uid.push((who, table)),
        }
    }
}

impl Pods for Served {
    fn pods(&self) -> Vec<ShownPod> {
        let tables = self.0.tables.lock();
        let named = self.0.named.get().map(pods::View::pods).unwrap_or_default();
        let named = named.iter().map(|pod| {
            let PodState {
                uid, who, phase, ..
            } = pod;
            let phase = match phase {
                pods::PodPhase::Pending => PodPhase::Pending,
                pods::PodPhase::Up => PodPhase::Up,
            };
            ShownPod {
                uid: Some(Arc::clone(uid)),
                who: who.clone(),
                phase,
                probed: pod.probed,
                flows: tables.by_uid.get(uid).and_then(Weak::upgrade),
            }
        });
        let others = tables.without_uid.iter().filter_map(|(who, table)| {
            Some(ShownPod {
                uid: None,
                who: who.clone(),
                phase: PodPhase::Up,
                probed: None,
                flows: Some(table.upgrade()?),
            })
        });
        named.chain(others).collect()
    }
}

//! What the admin server shows of the pods: of a room on its own floor, so it asks through a trait.

use std::sync::Arc;

use crate::{config::WorkloadRef, flow::FlowTable, listen::Probed};

/// Tells of the pods that this process serves.
pub trait Pods: Send + Sync + 'static {
    /// All of them now, in a stable order.
    fn pods(&self) -> Vec<ShownPod>;
}

/// One pod.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "built by `node`")]
pub struct ShownPod {
    /// The uid that the CNI agent gave it; `None` for what no agent named.
    pub uid: Option<Arc<str>>,
    /// Its names.
    pub who: WorkloadRef,
    /// How far it has come.
    pub phase: PodPhase,
    /// What is known of the rules in its namespace; `None` if nothing is.
    pub probed: Option<Probed>,
    /// Its open flows; `None` while it is not served.
    pub flows: Option<Arc<FlowTable>>,
}

/// How far a pod has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum PodPhase {
    /// Its listeners could not be bound; tried again.
    Pending,
    /// Served, or being cut.
    Up,
}

//! What the admin dump shows of the pods.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::{config::WorkloadRef, listen::Probed};

/// The pods as of now, for readers on other threads. Clones share.
#[derive(Debug, Clone, Default)]
pub struct View(Arc<ArcSwap<Vec<PodState>>>);

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PodState {
    /// The Kubernetes uid.
    pub uid: Arc<str>,
    /// The pod's names.
    pub who: WorkloadRef,
    /// How far it has come.
    pub phase: PodPhase,
    /// What the last audit has found of the rules in its namespace; `None` before the first.
    pub probed: Option<Probed>,
}

impl PodState {
    /// Whether nobody takes its traffic.
    pub(super) fn is_unprotected(&self) -> bool {
        self.phase == PodPhase::Pending || self.probed.is_some_and(|it| it.is_unprotected())
    }
}

/// How far a pod has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PodPhase {
    /// Its listeners could not be bound; tried again.
    Pending,
    /// Served, or being cut.
    Up,
}

impl View {
    /// All pods in order of their uid, each uid once.
    pub fn pods(&self) -> Arc<Vec<PodState>> {
        self.0.load_full()
    }

    /// Replaces what is shown. Of several states of one uid the first stands.
    pub(super) fn show(&self, mut pods: Vec<PodState>) {
        pods.sort_by(|one, other| one.uid.cmp(&other.uid));
        pods.dedup_by(|later, earlier| later.uid == earlier.uid);
        self.0.store(Arc::new(pods));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, phase: PodPhase) -> PodState {
        PodState {
            uid: uid.into(),
            who: WorkloadRef::new("shop", "web-1", "web"),
            phase,
            probed: None,
        }
    }

    #[test]
    fn shows_each_uid_once() {
        let view = View::default();
        assert!(view.pods().is_empty());
        view.show(vec![
            pod("b", PodPhase::Up),
            pod("a", PodPhase::Pending),
            pod("b", PodPhase::Pending),
        ]);
        let shown = [pod("a", PodPhase::Pending), pod("b", PodPhase::Up)];
        assert_eq!(**view.pods(), shown);
    }
}

//! What is done with a pod once its listeners are bound: for the room that serves connections.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::Stop;
use crate::{
    config::WorkloadRef,
    listen::{Netns, PodListeners},
};

/// A pod whose listeners are bound.
#[derive(Debug)]
#[non_exhaustive]
pub struct Pod {
    /// The Kubernetes uid of the pod.
    pub uid: Arc<str>,
    /// Its names, by which its workload record is found.
    pub who: WorkloadRef,
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// Its listeners, registered with the runtime that polls the future of [`Launch::launch`].
    pub listeners: PodListeners,
}

/// Serves pods.
pub trait Launch: Send + Sync + 'static {
    /// Serves one pod until `stop`. The future owns everything that belongs to the pod: what is
    /// left is dropped with it, soon after [`Stop::force`]. If it ends, or panics, unasked, the
    /// pod is started again.
    ///
    /// Called within the runtime that polls the future, and before the agent hears that the pod
    /// is served: what else the pod needs is bound here, and not by the future.
    fn launch(&self, pod: Pod, stop: Stop) -> BoxFuture<'static, ()>;
}

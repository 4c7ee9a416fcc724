//! How the pods that `pods` finds come to be served by `flow`.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::{net::TcpListener, runtime::Handle};

use super::StartError;
use crate::{
    config::{Config, Identity, WorkloadRef},
    flow::{self, Shared, Stop},
    listen::{self, Netns},
    pods::{self, Launch},
};

/// Serves captured pods with the parts that all of them share.
pub(super) struct Launcher {
    shared: Arc<Shared>,
}

impl Launcher {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl Launch for Launcher {
    fn launch(&self, pod: pods::Pod, stop: Stop) -> BoxFuture<'static, ()> {
        let pods::Pod {
            who,
            netns,
            listeners,
            ..
        } = pod;
        let serving = flow::Pod::new(Arc::clone(&self.shared), who, netns, listeners.transparent);
        Box::pin(serving.serve(listeners, stop))
    }
}

/// Serves one workload in the process's own network namespace.
pub(super) fn dedicated(
    config: &Config,
    shared: &Arc<Shared>,
    who: &WorkloadRef,
    data: &Handle,
    stop: Stop,
) -> Result<impl Future<Output = ()> + Send + use<>, StartError> {
    let netns = Netns::current().map_err(StartError::Netns)?;
    let listeners = {
        let _registered_there = data.enter();
        listen::bind(&netns, &config.sockets, &config.ports).map_err(StartError::Listen)?
    };
    let pod = flow::Pod::new(
        Arc::clone(shared),
        who.clone(),
        netns,
        listeners.transparent,
    );
    Ok(with_deadline(
        pod.serve(listeners, stop.clone()),
        stop,
        config.drain.deadline,
    ))
}

/// Serves HBONE to the proxy's own pod. The application never sees the client's address: the
/// listener's own namespace has no rules that would bring the answers back.
pub(super) fn own(
    identity: &Identity,
    shared: &Arc<Shared>,
    listener: TcpListener,
    stop: Stop,
) -> Result<impl Future<Output = ()> + Send + use<>, StartError> {
    let account = identity
        .own
        .as_ref()
        .map(|own| Arc::clone(&own.service_account))
        .unwrap_or_default();
    let who = WorkloadRef::new(
        Arc::clone(&identity.pod_namespace),
        Arc::clone(&identity.pod_name),
        account,
    );
    let netns = Netns::current().map_err(StartError::Netns)?;
    let pod = flow::Pod::new(Arc::clone(shared), who, netns, false);
    Ok(pod.serve_hbone(listener, stop))
}

/// Cuts what is still open when the drain deadline has passed.
async fn with_deadline(
    serving: impl Future<Output = ()>,
    stop: Stop,
    deadline: std::time::Duration,
) {
    let late = async {
        stop.accept.cancelled().await;
        tokio::time::sleep(deadline).await;
        stop.force.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = serving => {}
        () = late => {}
    }
}

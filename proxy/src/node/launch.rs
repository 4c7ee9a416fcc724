//! How the pods that `pods` finds come to be served by `flow`.

use std::{net::Ipv4Addr, sync::Arc};

use futures_util::future::{BoxFuture, OptionFuture};
use tokio::{net::TcpListener, runtime::Handle};
use tokio_util::sync::CancellationToken;

use super::{StartError, served::Served};
use crate::{
    config::{Config, DnsCapture, Identity, WorkloadRef},
    dns,
    flow::{self, Shared, Stop},
    listen::{self, Netns, PodListeners},
    pods::{self, Launch},
};

/// Serves captured pods with the parts that all of them share.
pub(super) struct Launcher {
    shared: Arc<Shared>,
    names: Option<Names>,
    served: Served,
    /// Where SOCKS5 is served, if it is.
    socks5: Option<u16>,
}

impl Launcher {
    /// `served` is told of every workload that is served.
    pub(super) fn new(
        config: &Config,
        shared: Arc<Shared>,
        names: Option<Names>,
        served: Served,
    ) -> Self {
        Self {
            shared,
            names,
            served,
            socks5: config.capture.socks5.then_some(config.ports.socks5),
        }
    }
}

/// Where and how names are served.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) capture: DnsCapture,
    pub(super) shared: Arc<dns::Shared>,
}

impl Names {
    /// Binds the sockets of a pod, and serves them. Without them the pod is served all the same: its connections matter more.
    ///
    /// The sockets register with the runtime that this runs on.
    fn serve(
        self,
        who: WorkloadRef,
        netns: Arc<Netns>,
        end: dns::End,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        match listen::bind_dns(&netns, &self.shared.sockets, &self.capture) {
            Ok(sockets) => {
                let names = dns::Names::new(self.shared, who, netns);
                Some(names.serve(sockets, end))
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                let WorkloadRef {
                    namespace, name, ..
                } = &who;
                tracing::error!(%namespace, %name, error, "names are not served to this pod");
                None
            }
        }
    }
}

impl Launcher {
    /// Serves one workload: its connections, and names as long as it has any. When it returns, the sockets of both are
    /// there.
    fn serve(
        &self,
        (uid, who): (Option<Arc<str>>, WorkloadRef),
        netns: Arc<Netns>,
        listeners: PodListeners,
        stop: Stop,
    ) -> impl Future<Output = ()> + Send + use<> {
        let end = dns::End {
            retire: stop.accept.clone(),
            stop: CancellationToken::new(),
        };
        let names = self.names.clone().and_then(|names| {
            let end = end.clone();
            names.serve(who.clone(), Arc::clone(&netns), end)
        });
        let shared = Arc::clone(&self.shared);
        let transparent = listeners.transparent;
        let flows = flow::Pod::new(shared, who.clone(), Arc::clone(&netns), transparent);
        let socks5 = self.socks5(&flows, &who, netns, stop.clone());
        self.served.enter(uid, who, flows.flows());
        let force = stop.force.clone();
        async move {
            let flows = async {
                tokio::join!(flows.serve(listeners, stop), OptionFuture::from(socks5));
                end.stop.cancel();
            };
            let names = force.run_until_cancelled_owned(OptionFuture::from(names));
            tokio::join!(flows, names);
        }
    }
}

impl Launcher {
    /// Binds the SOCKS5 listener, if one is wanted, and serves it. Without it the pod is served all the same.
    fn socks5(
        &self,
        flows: &Arc<flow::Pod>,
        who: &WorkloadRef,
        netns: Arc<Netns>,
        stop: Stop,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let port = self.socks5?;
        let listener = match listen::bind_socks5(&netns, &self.shared.settings.sockets, port) {
            Ok(listener) => listener,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                let WorkloadRef {
                    namespace, name, ..
                } = who;
                tracing::error!(%namespace, %name, error, "SOCKS5 is not served to this pod");
                return None;
            }
        };
        let names = self.names.as_ref().map(|names| -> Arc<dyn flow::Resolve> {
            let names = dns::Names::new(Arc::clone(&names.shared), who.clone(), netns);
            Arc::new(Asking(names))
        });
        Some(Arc::clone(flows).serve_socks5(listener, names, stop))
    }
}

/// Lets flows ask for names.
#[derive(Debug)]
struct Asking(Arc<dns::Names>);

impl flow::Resolve for Asking {
    fn ipv4<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<Ipv4Addr>> {
        Box::pin(self.0.first_address(name))
    }
}

impl Launch for Launcher {
    fn launch(&self, pod: pods::Pod, stop: Stop) -> BoxFuture<'static, ()> {
        Box::pin(self.serve((Some(pod.uid), pod.who), pod.netns, pod.listeners, stop))
    }
}

/// Serves one workload in the process's own network namespace.
pub(super) fn dedicated(
    config: &Config,
    launcher: &Launcher,
    who: &WorkloadRef,
    data: &Handle,
    stop: Stop,
) -> Result<impl Future<Output = ()> + Send + use<>, StartError> {
    let netns = Netns::current().map_err(StartError::Netns)?;
    let _registered_there = data.enter();
    let listeners = listen::bind(&netns, &config.sockets, &config.ports);
    let listeners = listeners.map_err(StartError::Listen)?;
    let serving = launcher.serve((None, who.clone()), netns, listeners, stop.clone());
    Ok(with_deadline(serving, stop, config.drain.deadline))
}

/// Serves HBONE to the proxy's own pod. The application never sees the client's address: the
/// listener's own namespace has no rules that would bring the answers back.
pub(super) fn own(
    identity: &Identity,
    (shared, served): (&Arc<Shared>, &Served),
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
    let pod = flow::Pod::new(Arc::clone(shared), who.clone(), netns, false);
    served.enter(None, who, pod.flows());
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

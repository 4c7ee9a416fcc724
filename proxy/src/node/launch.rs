//! How the pods that `pods` finds come to be served by `flow`.

use std::{error::Error, net::Ipv4Addr, sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, OptionFuture};
use tokio::{net::TcpListener, runtime::Handle, time::sleep};
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
    ) -> impl Future<Output = ()> + Send + use<> {
        let Self { capture, shared } = self;
        let there = (Arc::clone(&netns), Arc::clone(&shared));
        let bind = move || listen::bind_dns(&there.0, &there.1.sockets, &capture);
        let bound = bound(("DNS", &who), bind, end.retire.clone());
        async move {
            if let Some(sockets) = bound.await {
                let names = dns::Names::new(shared, who, netns);
                names.serve(sockets, end).await;
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
        let names = self.names.clone().map(|names| {
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
        let there = (Arc::clone(&netns), Arc::clone(&self.shared));
        let bind = move || listen::bind_socks5(&there.0, &there.1.settings.sockets, port);
        let bound = bound(("SOCKS5", who), bind, stop.accept.clone());
        let names = self.names.as_ref().map(|names| -> Arc<dyn flow::Resolve> {
            let names = dns::Names::new(Arc::clone(&names.shared), who.clone(), netns);
            Arc::new(Asking(names))
        });
        let flows = Arc::clone(flows);
        Some(async move {
            if let Some(listener) = bound.await {
                flows.serve_socks5(listener, names, stop).await;
            }
        })
    }
}

/// Binds what a pod does without if it must: at once, and if that fails again and again until `stop`, which leaves `None`. The
/// obstacle may be one that goes: a port that the pod's last proxy still holds, or a want of descriptors.
fn bound<T, E, B>(
    (what, who): (&'static str, &WorkloadRef),
    mut bind: B,
    stop: CancellationToken,
) -> impl Future<Output = Option<T>> + Send + use<T, E, B>
where
    T: Send,
    E: Error + Send + 'static,
    B: FnMut() -> Result<T, E> + Send,
{
    let (namespace, name) = (Arc::clone(&who.namespace), Arc::clone(&who.name));
    let first = bind();
    if let Err(error) = &first {
        let error = error as &dyn Error;
        tracing::error!(%namespace, %name, error, "{what} is not served to this pod yet, trying again");
    }
    async move {
        if let Ok(bound) = first {
            return Some(bound);
        }
        let mut pause = FIRST_RETRY;
        loop {
            // Pods that were in want of the same do not try at the same time.
            let jittered = pause.mul_f64(rand::random_range(0.75..=1.0));
            stop.run_until_cancelled(sleep(jittered)).await?;
            if let Ok(bound) = bind() {
                tracing::info!(%namespace, %name, "{what} is served to this pod now");
                return Some(bound);
            }
            pause = (pause * 2).min(LAST_RETRY);
        }
    }
}

const FIRST_RETRY: Duration = Duration::from_millis(250);
/// An attempt costs two sockets.
const LAST_RETRY: Duration = Duration::from_secs(15);

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
async fn with_deadline(serving: impl Future<Output = ()>, stop: Stop, deadline: Duration) {
    let late = async {
        stop.accept.cancelled().await;
        sleep(deadline).await;
        stop.force.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = serving => {}
        () = late => {}
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tokio::time::Instant;

    use super::*;

    /// Binds at the third attempt.
    fn third() -> impl FnMut() -> Result<u8, io::Error> + Send {
        let mut attempts = 0;
        move || {
            attempts += 1;
            let taken = || io::ErrorKind::AddrInUse.into();
            (attempts == 3).then_some(attempts).ok_or_else(taken)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_bound_at_once_is_bound_when_the_obstacle_has_gone() {
        let who = WorkloadRef::new("shop", "web", "web");
        let (began, stop) = (Instant::now(), CancellationToken::new());
        let at_once = bound(("DNS", &who), || Ok::<_, io::Error>(1), stop.clone());
        assert_eq!(at_once.await, Some(1));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(bound(("DNS", &who), third(), stop.clone()).await, Some(3));
        assert!(began.elapsed() <= 3 * FIRST_RETRY);
        let never = bound(("DNS", &who), third(), stop.clone());
        stop.cancel();
        assert_eq!(never.await, None);
    }
}

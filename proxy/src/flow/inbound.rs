//! What peers send to the pod in HBONE (port 15008): one TLS connection, many CONNECT streams.

mod stream;

use std::{
    error::Error,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cert_agent::{SpiffeId, SvidError, Tracker, peer_id};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

#[cfg(test)]
pub(super) use self::stream::budget;
pub(super) use self::stream::{Arrival, opened};
use super::{Direction, Pod, Stop, accept, handshakes::Handshakes, table::Entry};
use crate::{
    budget::Owner,
    listen,
    telemetry::{Access, Attempt, Limit, Reason, Reporter, Step},
    tunnel::{self, AcceptError, Cut, Incoming, Retirement, ServeError, Tls},
};

/// Serves the HBONE listener of `pod`.
pub(super) async fn serve(pod: Arc<Pod>, listener: Arc<TcpListener>, stop: Stop) {
    let shared = pod.shared();
    let handshakes = Handshakes::new(&shared.settings.limits, shared.limits.clone());
    let draining = stop.accept.clone();
    let handle = move |pod, socket, peer| {
        let (handshakes, draining) = (Arc::clone(&handshakes), draining.clone());
        connection(pod, socket, peer, handshakes, draining)
    };
    accept::serve(pod, listener, Reporter::Destination, stop, handle).await;
}

/// One TLS connection, from its handshake until its last stream has ended.
async fn connection(
    pod: Arc<Pod>,
    socket: TcpStream,
    peer: SocketAddr,
    handshakes: Arc<Handshakes>,
    draining: CancellationToken,
) {
    let retire = draining.child_token();
    let here = socket.local_addr().ok().map(listen::canonical);
    let slot = handshakes.begin(peer.ip());
    let shaken = tokio::select! {
        biased; // who has to make room does so first
        () = slot.given_way.cancelled() => Err(Refused::Crowded),
        shaken = Box::pin(shake(&pod, socket, (peer, here), &retire)) => shaken,
    };
    drop(slot);
    let (tls, caller, (age, tracker)) = match shaken {
        Ok(shaken) => shaken,
        Err(refused) => return reject(&pod, (peer, here), refused.reason(), &refused),
    };
    let _held = pod.share().hold(Owner::Tunnel);
    let (caller, settings) = (Arc::new(caller), Arc::clone(&pod.settings().tunnel));
    let cut = {
        let caller = Arc::clone(&caller);
        let first = move || caller.cut.store(true, Ordering::Release);
        Cut::new(tracker, tls.peer_certificates(), first)
    };
    let streams = Streams(Arc::clone(&pod), caller);
    let serving = Box::pin(tunnel::serve(tls, &settings, retire.clone(), cut, streams));
    match age.retire(&retire, serving).await {
        Ok(()) => {}
        Err(error @ ServeError::PrefaceTimeout(_)) => {
            reject(&pod, (peer, here), Reason::Http2, &error);
        }
        Err(error @ ServeError::Cut) => tracing::info!(%peer, "{error}"),
        Err(error) => {
            if let Some(limit) = error.limit() {
                pod.shared().limits.hit(limit, &peer);
            }
            tracing::debug!(%peer, error = &error as &dyn Error, "HBONE connection ended");
        }
    }
}

/// The streams of a connection.
struct Streams(Arc<Pod>, Arc<Caller>);

impl tunnel::Host for Streams {
    fn carry(&self, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static {
        stream::carry(Arc::clone(&self.0), Arc::clone(&self.1), incoming)
    }

    fn limited(&self, limit: Limit) {
        self.0.shared().limits.hit(limit, &self.1.peer);
    }
}

/// Who is at the other end of a TLS connection, and where it arrived.
#[derive(Debug)]
struct Caller {
    peer: SocketAddr,
    here: SocketAddr,
    identity: SpiffeId,
    /// Whom the caller met.
    shown: SpiffeId,
    /// Ends the connection once its streams have ended.
    retire: CancellationToken,
    /// Whether the connection was cut because the peer's certificate is revoked.
    cut: AtomicBool,
}

impl Caller {
    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    fn enter(&self, pod: &Pod, direction: Direction, access: &Access) -> Entry {
        let shown = Some(self.shown.clone());
        pod.flows().enter(direction, shown, access.meter().watch())
    }

    fn calls(&self, destination: SocketAddr, connect: &tunnel::Connect) -> Direction {
        Direction::Inbound {
            source: self.peer,
            destination,
            identity: Some(self.identity.clone()),
            service: connect.forwarded_host().map(Into::into),
        }
    }
}

/// Why a TLS connection did not come to be.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the local address cannot be read")]
    NoAddress,
    #[error("gave way to newer connections: too many handshakes are under way")]
    Crowded,
    #[error("failed to fetch information about local workload")]
    UnknownLocal,
    #[error("identity error: the local workload has no valid identity")]
    NoIdentity,
    #[error("identity error: no certificate for the local workload within {0:?}")]
    NoCertificate(Duration),
    #[error("identity error")]
    Certificate(#[from] SvidError),
    #[error(transparent)]
    Tls(#[from] AcceptError),
    #[error("the peer's certificate carries no SPIFFE identity")]
    Stranger,
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::NoAddress => Reason::NoSocket,
            Self::Crowded => Reason::Overloaded,
            Self::UnknownLocal => Reason::UnknownLocal,
            Self::NoIdentity => Reason::NoIdentity,
            Self::NoCertificate(_) | Self::Certificate(_) => Reason::NoCertificate,
            Self::Tls(error) => error.reason(),
            Self::Stranger => Reason::PeerIdentityMismatch,
        }
    }
}

async fn shake(
    pod: &Pod,
    socket: TcpStream,
    (peer, here): (SocketAddr, Option<SocketAddr>),
    retire: &CancellationToken,
) -> Result<(Tls<TcpStream>, Caller, (Retirement, Option<Tracker>)), Refused> {
    let here = here.ok_or(Refused::NoAddress)?;
    let settings = &pod.settings().tunnel;
    let limit = settings.handshake_timeout;
    let deadline = Instant::now() + limit;
    // One limit for all of it: past that, the peer has given up.
    let local = pod.workload_by(deadline).await;
    let local = local.ok_or(Refused::UnknownLocal)?;
    let identity = local.identity().ok_or(Refused::NoIdentity)?;
    let svid = timeout_at(deadline, pod.shared().agent.svid(identity))
        .await
        .map_err(|_| Refused::NoCertificate(limit))??;
    let buffers = &pod.shared().buffers;
    let accepting = tunnel::accept(socket, svid.server_config(), buffers, limit);
    let accepting = async {
        let accepted = timeout_at(deadline, accepting).await;
        accepted.unwrap_or(Err(AcceptError::Timeout(limit)))
    };
    let step = (Step::Handshake, Reporter::Destination);
    let tls = pod.shared().timed(step, accepting).await?;
    let age = Retirement::new(settings.max_age, svid.not_after(), tls.peer_certificates());
    let identity = peer_id(tls.peer_certificates()).ok_or(Refused::Stranger)?;
    Ok((
        tls,
        Caller {
            peer,
            here,
            identity,
            shown: svid.id().clone(),
            retire: retire.clone(),
            cut: AtomicBool::new(false),
        },
        (age, svid.client_tracker()),
    ))
}

/// Tells of a connection, or a request on one, that does not become a flow.
pub(super) fn reject(
    pod: &Pod,
    (source, destination): (SocketAddr, Option<SocketAddr>),
    reason: Reason,
    error: &(dyn Error + 'static),
) {
    let attempt = Attempt {
        reporter: Reporter::Destination,
        source,
        destination,
    };
    pod.shared().traffic.reject(attempt, reason, error);
}

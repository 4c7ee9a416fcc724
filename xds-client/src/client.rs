//! Follows the control plane: opens streams, keeps them, hands what they bring to a sink, answers, and starts again after
//! every kind of end. What was learnt stays in force meanwhile, without limit.

mod backoff;
mod grpc;
mod metrics;

use std::{error::Error, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::{
    Batch, Demand, Kind, Mode, Rejected, Session, Versions,
    proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node},
};
use backoff::Backoff;
#[cfg(any(test, fuzzing))]
pub(crate) use grpc::responses;
use metrics::Ended;
pub use metrics::Metrics;

/// Where resources go.
pub trait Sink: Send + Sync + 'static {
    /// Tells names and versions of what is held by way of [`apply`](Self::apply), until there is no room for more.
    fn held(&self, kind: Kind, versions: &mut Versions);

    /// Puts a batch in force as far as it can be used, and tells what cannot, a resource that cannot be read by its
    /// [name](Batch::name_at) if it has one. Runs on a thread that may block.
    fn apply(&self, batch: Batch) -> Vec<Rejected>;
}

/// Opens streams to a control plane.
pub trait Connect: Send + Sync + 'static {
    /// A fresh connection and a stream over it. Resolves when the first response is about to come: istiod sends no headers
    /// before.
    fn open(
        &self,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> BoxFuture<'_, Result<Responses, OpenError>>;

    /// Resolves when it is worth trying again sooner than planned.
    ///
    /// # Cancel safety
    /// Must lose nothing.
    fn improved(&self) -> BoxFuture<'_, ()>;
}

/// The responses of a stream.
pub type Responses = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Something on this side is missing, such as roots or a token.
    #[error("the connection cannot be prepared")]
    Local(#[source] Box<dyn Error + Send + Sync>),
    /// The control plane does not answer, or proves not to be it.
    #[error("the control plane cannot be reached")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// It answered, and refused.
    #[error("the control plane refuses: {}: {}", .0.code(), .0.message())]
    Refused(Status),
}

/// Follows one control plane for as long as it runs.
#[expect(missing_debug_implementations, reason = "its parts are trait objects")]
pub struct Client {
    node: Node,
    connector: Arc<dyn Connect>,
    sink: Arc<dyn Sink>,
    mode: Mode,
    demand: Demand,
    metrics: Metrics,
    synced: watch::Sender<bool>,
    tried: watch::Sender<bool>,
    /// Kinds that had their first response.
    answered: [bool; 2],
    /// The peer reads less than expected: versions are left out for good.
    versions_refused: bool,
}

impl Client {
    /// A client that will follow everything, and is not connected yet.
    #[must_use]
    pub fn new(
        node: Node,
        connector: Arc<dyn Connect>,
        sink: Arc<dyn Sink>,
        metrics: Metrics,
    ) -> Self {
        Self {
            node,
            connector,
            sink,
            mode: Mode::Everything,
            demand: Demand::default(),
            metrics,
            synced: watch::Sender::new(false),
            tried: watch::Sender::new(false),
            answered: [false; 2],
            versions_refused: false,
        }
    }

    /// Follows only the workloads and services of this node, and those that are asked for through `demand`.
    #[must_use]
    pub fn on_demand(self, demand: Demand) -> Self {
        Self {
            mode: Mode::OnDemand,
            demand,
            // The first response about workloads says nothing then.
            answered: [true, false],
            ..self
        }
    }

    /// Becomes true when the first response of each kind is in force, whether or not all of it could be used, and stays so.
    #[must_use]
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Becomes true when a stream, or the attempt at one, has ended, and stays so.
    #[must_use]
    pub fn tried(&self) -> watch::Receiver<bool> {
        self.tried.subscribe()
    }

    /// Follows until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let following = async {
            let mut backoff = Backoff::default();
            loop {
                let end = self.stream(&mut backoff).await;
                self.metrics.connected(false);
                self.tried.send_replace(true);
                self.metrics.terminated(end.reason());
                self.versions_refused |= end.is_too_large();
                let pause = backoff.pause(rand::random());
                end.log(pause, backoff.failures());
                tokio::select! {
                    () = sleep(pause) => {}
                    () = self.connector.improved() => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            never = following => never,
        }
    }

    /// One stream, from dialling to its end.
    async fn stream(&mut self, backoff: &mut Backoff) -> End {
        let (requests_tx, requests) = mpsc::channel(REQUESTS_UNDERWAY);
        let awaited = self.demand.begin();
        let room = if self.versions_refused {
            0
        } else {
            VERSIONS_ROOM
        };
        let held = |kind| {
            let mut versions = Versions::with_room(room);
            self.sink.held(kind, &mut versions);
            versions
        };
        let (mut session, first) = Session::open(&self.node, self.mode, held, &awaited);
        for request in first {
            if let Err(end) = send(&requests_tx, request).await {
                return end;
            }
        }
        let mut responses = match timeout(FIRST_RESPONSE_LIMIT, self.connector.open(requests)).await
        {
            Err(_) => return End::Silent,
            Ok(Err(error)) => return End::Unopened(error),
            Ok(Ok(responses)) => responses,
        };
        self.metrics.connected(true);
        self.demand.opened();
        let opened = Instant::now();
        let end = loop {
            tokio::select! {
                response = responses.next() => {
                    let step = match response {
                        None => Err(End::Complete),
                        Some(Err(status)) => Err(End::Broken(status)),
                        Some(Ok(response)) => self.take(&mut session, response, &requests_tx).await,
                    };
                    if let Err(end) = step {
                        break end;
                    }
                    if backoff.failures() > 0 && opened.elapsed() >= HEALTHY {
                        backoff.reset();
                    }
                }
                () = self.demand.wanted() => {
                    if let Err(end) = self.ask(&mut session, &requests_tx).await {
                        break end;
                    }
                }
                // Looked at after every question and answer: nothing else fills the table.
                () = sleep_until(opened + FORGET_INTERVAL), if self.demand.is_full() => {
                    break End::Renewal;
                }
            }
        };
        if opened.elapsed() >= HEALTHY {
            backoff.reset();
        }
        end
    }

    /// Applies a response and answers it.
    async fn take(
        &mut self,
        session: &mut Session,
        response: DeltaDiscoveryResponse,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), End> {
        let url = response.type_url.clone();
        let (batch, receipt) = session.receive(response);
        let rejected = match batch {
            Some(batch) => self.apply(batch).await,
            None => vec![Rejected {
                name: url,
                reason: "this type was not asked for".into(),
            }],
        };
        send(requests, receipt.answer(&rejected)).await
    }

    async fn apply(&mut self, batch: Batch) -> Vec<Rejected> {
        let kind = batch.kind();
        self.metrics.received(kind, batch.content_bytes());
        let told = (self.mode == Mode::OnDemand).then(|| Told::by(&batch));
        let began = Instant::now();
        let sink = Arc::clone(&self.sink);
        let applied = spawn_blocking(move || sink.apply(batch)).await;
        let rejected = match applied {
            Ok(rejected) => rejected,
            // A sink that panics leaves its state in doubt: the owner of this task decides.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.metrics.applied(kind, rejected.len(), began.elapsed());
        for one in rejected.iter().take(REJECTIONS_LOGGED) {
            tracing::warn!(name = %one.name, reason = %one.reason, "a resource of the control plane is refused");
        }
        if let Some(told) = told {
            told.to(&self.demand);
        }
        if let Some(answered) = self.answered.get_mut(kind as usize) {
            *answered = true;
        }
        if self.answered == [true; 2] {
            self.synced
                .send_if_modified(|synced| !std::mem::replace(synced, true));
        }
        rejected
    }

    async fn ask(
        &self,
        session: &mut Session,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), End> {
        for request in self.demand.requests(session) {
            send(requests, request).await?;
        }
        Ok(())
    }
}

/// The names that a batch answers.
struct Told {
    delivered: Vec<String>,
    absent: Vec<String>,
}

impl Told {
    fn by(batch: &Batch) -> Self {
        let resources = batch.resources().flatten();
        Self {
            delivered: resources
                .flat_map(|one| one.aliases.into_iter().chain([one.name]))
                .collect(),
            absent: batch.removed().to_vec(),
        }
    }

    fn to(&self, demand: &Demand) {
        demand.delivered(self.delivered.iter().map(|name| &**name));
        demand.absent(&self.absent);
    }
}

/// How a stream, or the attempt at one, ended.
#[derive(Debug)]
enum End {
    Unopened(OpenError),
    Silent,
    Broken(Status),
    /// The peer no longer takes requests.
    Clogged,
    Complete,
    /// We ended it, to forget names that do not exist.
    Renewal,
}

impl End {
    fn reason(&self) -> Ended {
        match self {
            Self::Unopened(OpenError::Local(_)) => Ended::Error,
            Self::Unopened(OpenError::Unreachable(_) | OpenError::Refused(_)) | Self::Silent => {
                Ended::ConnectionError
            }
            Self::Broken(status) if is_routine(status) => Ended::Reconnect,
            Self::Broken(_) | Self::Clogged => Ended::Error,
            Self::Complete | Self::Renewal => Ended::Complete,
        }
    }

    /// Whether our first request was more than the peer reads.
    fn is_too_large(&self) -> bool {
        let Self::Unopened(OpenError::Refused(status)) = self else {
            return false;
        };
        status.code() == Code::ResourceExhausted && status.message().contains("larger than max")
    }

    fn log(&self, pause: Duration, failures: u32) {
        match self {
            Self::Unopened(error) => {
                let error = error as &dyn Error;
                tracing::warn!(error, retry_in = ?pause, failures, "no stream to the control plane");
            }
            Self::Silent => tracing::warn!(
                limit = ?FIRST_RESPONSE_LIMIT, retry_in = ?pause, failures,
                "the control plane did not answer in time"
            ),
            Self::Broken(status) => tracing::info!(
                code = %status.code(), message = status.message(), retry_in = ?pause,
                "the stream to the control plane ended"
            ),
            Self::Clogged => tracing::warn!(
                limit = ?SEND_LIMIT, retry_in = ?pause,
                "the control plane takes no requests; the stream is given up"
            ),
            Self::Complete | Self::Renewal => {
                tracing::info!(retry_in = ?pause, "the stream to the control plane is complete");
            }
        }
    }
}

/// Ends that belong to the life of a control plane: its age limit, a restart, a new leader.
fn is_routine(status: &Status) -> bool {
    let leaving = ["transport is closing", "received prior goaway"];
    let is_leaving = || leaving.iter().any(|text| status.message().contains(text));
    let routine = [Code::Unknown, Code::Cancelled, Code::DeadlineExceeded];
    routine.contains(&status.code()) || (status.code() == Code::Unavailable && is_leaving())
}

async fn send(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    request: DeltaDiscoveryRequest,
) -> Result<(), End> {
    match timeout(SEND_LIMIT, requests.send(request)).await {
        // A closed channel is a stream that ended: its end is read next, with its reason.
        Ok(_) => Ok(()),
        Err(_) => Err(End::Clogged),
    }
}

/// Requests that wait for the peer to read.
const REQUESTS_UNDERWAY: usize = 16;
/// How long the peer may take no request.
const SEND_LIMIT: Duration = Duration::from_secs(30);
/// Under load istiod lets clients wait for their turn; pings tell whether it lives.
const FIRST_RESPONSE_LIMIT: Duration = Duration::from_secs(120);
/// istiod reads 4 MiB; the rest is for node metadata and framing.
const VERSIONS_ROOM: usize = (4 << 20) - (512 << 10);
/// A stream that lasted this long was of use.
const HEALTHY: Duration = Duration::from_secs(10);
/// Streams are renewed for forgotten names at most this often.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
/// One bad push must not flood the log; the control plane is told of all.
const REJECTIONS_LOGGED: usize = 20;

#[cfg(test)]
mod tests;

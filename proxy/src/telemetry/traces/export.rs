//! Sends spans to a collector, in batches.

use std::{fmt, time::Duration};

use futures_util::future::BoxFuture;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    metadata::{KeyAndValueRef, MetadataMap},
    transport::Channel,
};

use super::{
    Lost,
    proto::{
        ExportTraceServiceRequest, Resource, ResourceSpans, Scope, ScopeSpans, Span,
        trace_service_client::TraceServiceClient,
    },
    span::string,
};
use crate::config;

/// Why a collector is not reached.
pub type ConnectError = Box<dyn std::error::Error + Send + Sync>;

/// Empties the queue of [`Traces`](super::Traces). Somebody has to run it.
pub struct Exporter {
    pub(super) queued: mpsc::Receiver<Vec<Span>>,
    resource: Resource,
    metadata: MetadataMap,
    delay: Duration,
    lost: Lost,
    exported: Counter,
}

impl Exporter {
    pub(super) fn new(
        settings: &config::Traces,
        queued: mpsc::Receiver<Vec<Span>>,
        lost: Lost,
        exported: Counter,
    ) -> Self {
        let headers = settings.headers.iter();
        let headers = headers.map(|header| (header.name.clone(), header.value.clone()));
        Self {
            queued,
            resource: Resource {
                attributes: vec![string("service.name", settings.service.clone())],
            },
            metadata: MetadataMap::from_headers(headers.collect()),
            delay: settings.delay,
            lost,
            exported,
        }
    }

    /// The spans come from this pod or node.
    #[must_use]
    pub fn located(mut self, places: &[(&str, &str)]) -> Self {
        let known = places.iter().filter(|(_, value)| !value.is_empty());
        let attributes = known.map(|(key, value)| string(key, (*value).to_owned()));
        self.resource.attributes.extend(attributes);
        self
    }

    /// Sends what comes until `stop` fires, and then what has come. `connect` makes a connection; it is asked again after
    /// each failure, with a growing pause. What cannot be sent is lost and counted; nothing is sent twice.
    pub async fn run(
        mut self,
        connect: impl Fn() -> BoxFuture<'static, Result<Channel, ConnectError>>,
        stop: CancellationToken,
    ) {
        let (mut channel, mut failures) = (None, 0_u32);
        loop {
            let batch = tokio::select! {
                batch = self.batch() => batch,
                () = stop.cancelled() => break,
            };
            let sent = self.send(&mut channel, &connect, batch);
            let sent = tokio::select! {
                sent = sent => sent,
                () = stop.cancelled() => break,
            };
            if sent {
                failures = 0;
                continue;
            }
            channel = None;
            failures = failures.saturating_add(1);
            let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures - 1));
            if timeout(pause.min(LONGEST_PAUSE), stop.cancelled())
                .await
                .is_ok()
            {
                break;
            }
        }
        self.delay = Duration::ZERO;
        let rest = async {
            while let Ok(first) = self.queued.try_recv() {
                let batch = self.fill(first).await;
                if !self.send(&mut channel, &connect, batch).await {
                    return;
                }
            }
        };
        let _ = timeout(LAST, Box::pin(rest)).await;
    }

    /// The next spans, as many as there are within the delay.
    ///
    /// # Cancel safety
    /// Spans are lost with the process only: it is dropped when that ends.
    async fn batch(&mut self) -> Vec<Span> {
        match self.queued.recv().await {
            Some(first) => self.fill(first).await,
            None => std::future::pending().await,
        }
    }

    async fn fill(&mut self, mut batch: Vec<Span>) -> Vec<Span> {
        let until = Instant::now() + self.delay;
        while batch.len() < BATCH {
            match timeout_at(until, self.queued.recv()).await {
                Ok(Some(mut spans)) => batch.append(&mut spans),
                Ok(None) | Err(_) => break,
            }
        }
        batch
    }

    /// Whether the collector is there.
    async fn send(
        &self,
        channel: &mut Option<Channel>,
        connect: impl Fn() -> BoxFuture<'static, Result<Channel, ConnectError>>,
        batch: Vec<Span>,
    ) -> bool {
        let count = batch.len();
        let call = async {
            let open = match channel.take() {
                Some(open) => open,
                None => connect().await?,
            };
            let kept = channel.insert(open).clone();
            let answer = TraceServiceClient::new(kept)
                .export(self.request(batch))
                .await?;
            Ok::<_, ConnectError>(answer.into_inner())
        };
        match timeout(LIMIT, call).await {
            Ok(Ok(answer)) => {
                let refused = answer.partial_success.map_or(0, |it| it.rejected_spans);
                let refused = usize::try_from(refused).unwrap_or_default().min(count);
                self.lost.count(REFUSED, refused);
                self.exported
                    .inc_by(u64::try_from(count - refused).unwrap_or(u64::MAX));
                return true;
            }
            Ok(Err(error)) => tracing::warn!(
                spans = count,
                error = &*error as &dyn std::error::Error,
                "no collector took spans"
            ),
            Err(_) => tracing::warn!(spans = count, "no collector took spans within {LIMIT:?}"),
        }
        self.lost.count(UNREACHABLE, count);
        false
    }

    fn request(&self, spans: Vec<Span>) -> Request<ExportTraceServiceRequest> {
        let scope = Scope {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let spans = ResourceSpans {
            resource: Some(self.resource.clone()),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope),
                spans,
            }],
        };
        let mut request = Request::new(ExportTraceServiceRequest {
            resource_spans: vec![spans],
        });
        for header in self.metadata.iter() {
            if let KeyAndValueRef::Ascii(key, value) = header {
                request.metadata_mut().insert(key, value.clone());
            }
        }
        request.set_timeout(LIMIT);
        request
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

pub(super) const REFUSED: &str = "refused";
pub(super) const UNREACHABLE: &str = "unreachable";
/// Spans of one request, and a few more.
const BATCH: usize = 512;
/// For connecting, asking and the answer.
const LIMIT: Duration = Duration::from_secs(10);
/// For what is left when the process ends.
const LAST: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

//! A collector of spans: OTLP over gRPC, with the messages of OpenTelemetry itself.

use std::{sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1::{Span, span::Event},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tonic::{Request, Response, Status, service::Routes};
use tower::Service as _;

use crate::{traffic, world::Pod};

/// A running collector; stops when dropped.
#[derive(Debug)]
pub struct Collector {
    taken: Arc<watch::Sender<Vec<Taken>>>,
    endpoint: String,
    _serving: JoinSet<()>,
}

/// One span that came.
#[derive(Debug, Clone)]
pub struct Taken {
    /// The span.
    pub span: Span,
    /// Who sent it.
    pub resource: Vec<KeyValue>,
    /// The header `x-token` of the request.
    pub token: Option<String>,
}

impl Taken {
    /// An attribute of the span, as text.
    #[must_use]
    pub fn attribute(&self, key: &str) -> Option<String> {
        find(&self.span.attributes, key)
    }

    /// An attribute of its sender.
    #[must_use]
    pub fn sender(&self, key: &str) -> Option<String> {
        find(&self.resource, key)
    }
}

/// An identifier as OTLP writes it in JSON.
fn hexadecimal(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn listed(attributes: &[KeyValue]) -> Value {
    let one = |it: &KeyValue| json!({"key": it.key, "value": find(attributes, &it.key)});
    attributes.iter().map(one).collect()
}

impl From<&Taken> for Value {
    /// With the names that OTLP has in JSON; values are text.
    fn from(taken: &Taken) -> Self {
        let span = &taken.span;
        let event = |it: &Event| json!({"name": it.name, "timeUnixNano": it.time_unix_nano});
        json!({
            "resource": listed(&taken.resource),
            "traceId": hexadecimal(&span.trace_id),
            "spanId": hexadecimal(&span.span_id),
            "parentSpanId": hexadecimal(&span.parent_span_id),
            "name": span.name,
            "kind": span.kind,
            "startTimeUnixNano": span.start_time_unix_nano,
            "endTimeUnixNano": span.end_time_unix_nano,
            "attributes": listed(&span.attributes),
            "events": span.events.iter().map(event).collect::<Self>(),
        })
    }
}

fn find(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|one| one.key == key)?;
    let value = found.value.as_ref()?.value.as_ref()?;
    if let any_value::Value::StringValue(text) = value {
        return Some(text.clone());
    }
    if let any_value::Value::IntValue(number) = value {
        return Some(number.to_string());
    }
    Some(format!("{value:?}"))
}

impl Collector {
    /// Listens in a pod.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(pod: &Pod) -> anyhow::Result<Self> {
        let at = pod.at(PORT);
        let listener = traffic::listen(pod.netns(), at)?;
        let taken = Arc::new(watch::Sender::default());
        let service = TraceServiceServer::new(Collecting(Arc::clone(&taken)));
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, Routes::new(service)));
        Ok(Self {
            taken,
            endpoint: format!("http://{at}"),
            _serving: serving,
        })
    }

    /// Where it is reached.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// All that came so far.
    #[must_use]
    pub fn taken(&self) -> Vec<Taken> {
        self.taken.borrow().clone()
    }

    /// Waits until what has come is enough for `probe`.
    ///
    /// # Panics
    /// When it is not within ten seconds.
    pub async fn until<T>(&self, what: &str, mut probe: impl FnMut(&[Taken]) -> Option<T>) -> T {
        let (mut taken, mut found) = (self.taken.subscribe(), None);
        let search = taken.wait_for(|taken| {
            found = probe(taken);
            found.is_some()
        });
        let ended = tokio::time::timeout(LIMIT, search).await.map(drop);
        found.unwrap_or_else(|| panic!("{ended:?}: {what}\n{:#?}", self.taken()))
    }
}

struct Collecting(Arc<watch::Sender<Vec<Taken>>>);

#[tonic::async_trait]
impl TraceService for Collecting {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let token = request.metadata().get("x-token");
        let token = token.and_then(|it| it.to_str().ok()).map(str::to_owned);
        self.0.send_modify(|taken| {
            for part in request.into_inner().resource_spans {
                let resource = part.resource.map(|it| it.attributes).unwrap_or_default();
                for span in part.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                    taken.push(Taken {
                        span,
                        resource: resource.clone(),
                        token: token.clone(),
                    });
                }
            }
        });
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn serve(listener: TcpListener, routes: Routes) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let routes = routes.clone();
        connections.spawn(async move {
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                routes.clone().call(request.map(tonic::body::Body::new))
            });
            let serving = http2::Builder::new(TokioExecutor::new());
            let _ended = serving
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

const PORT: u16 = 4317;
const LIMIT: Duration = Duration::from_secs(10);

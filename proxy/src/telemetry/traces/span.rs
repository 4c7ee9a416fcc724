//! The span of one flow, from its first step to its report.

use std::{
    error::Error,
    fmt,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    Queue, TraceContext,
    proto::{self, any_value::Value, span::Kind},
};
use crate::telemetry::{
    Kept, Reason, Reporter, Security, names::Names, refusals::in_words, route::Route,
};

/// The span of one flow; nothing at all where nobody takes it. Dropped without a report, it is not told.
#[derive(Debug, Default)]
pub struct Trace(Option<Box<Recorded>>);

struct Recorded {
    queue: Arc<Queue>,
    context: TraceContext,
    parent: Option<u64>,
    reporter: Reporter,
    wall: SystemTime,
    began: Instant,
    /// When the last phase ended.
    mark: Instant,
    phases: [Option<(Instant, Instant)>; PHASES.len()],
    first_byte: OnceLock<Instant>,
    tcp: OnceLock<[Option<TcpFacts>; 2]>,
}

/// What a flow waits for before its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TracePhase {
    /// Who is who, and where to.
    Resolve,
    /// May it.
    Policy,
    /// TCP, to a peer or an application; or the wait for a shared connection.
    Connect,
    /// The TLS handshake of a connection that was made for this flow.
    Tls,
    /// The answer to CONNECT.
    Request,
}

/// What the kernel knows of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "plain facts")]
pub struct TcpFacts {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Segments that were sent again, all in all.
    pub retransmits: u32,
}

impl Trace {
    pub(super) fn begin(
        queue: &Arc<Queue>,
        reporter: Reporter,
        parent: Option<TraceContext>,
    ) -> Self {
        let trace_id = parent.map_or_else(rand::random, |parent| parent.trace_id);
        let now = Instant::now();
        Self(Some(Box::new(Recorded {
            context: TraceContext {
                trace_id,
                span_id: rand::random(),
                sampled: queue.samples(trace_id, parent),
            },
            queue: Arc::clone(queue),
            parent: parent.map(|parent| parent.span_id),
            reporter,
            wall: SystemTime::now(),
            began: now,
            mark: now,
            phases: [None; PHASES.len()],
            first_byte: OnceLock::new(),
            tcp: OnceLock::new(),
        })))
    }

    /// What the next hop is told, if there is a trace.
    #[must_use]
    pub fn context(&self) -> Option<TraceContext> {
        Some(self.0.as_ref()?.context)
    }

    /// The phase that began when the one before ended has ended.
    pub fn ended(&mut self, phase: TracePhase) {
        if let Some(span) = &mut self.0 {
            let now = Instant::now();
            span.set(phase, (span.mark, now));
            span.mark = now;
        }
    }

    /// A phase took place between these moments, if the flow existed when it began.
    pub fn took_place(&mut self, phase: TracePhase, (from, to): (Instant, Instant)) {
        if let Some(span) = &mut self.0
            && span.began <= from
        {
            span.set(phase, (from, to));
            span.mark = span.mark.max(to);
        }
    }

    /// Whether the first byte of the server is yet to be noted.
    #[must_use]
    pub fn awaits_first_byte(&self) -> bool {
        let span = self.0.as_ref();
        span.is_some_and(|span| span.first_byte.get().is_none())
    }

    /// The server has sent its first byte.
    pub fn first_byte(&self) {
        if let Some(span) = &self.0 {
            span.first_byte.get_or_init(Instant::now);
        }
    }

    /// Notes what `facts` tells of the connections of the flow: downstream, upstream. Not called where nobody takes it.
    pub fn tcp(&self, facts: impl FnOnce() -> [Option<TcpFacts>; 2]) {
        if let Some(span) = &self.0 {
            span.tcp.get_or_init(facts);
        }
    }

    /// Tells of a connection that did not become a flow.
    pub fn reject(
        self,
        (source, destination): (SocketAddr, Option<SocketAddr>),
        reason: Reason,
        error: &(dyn Error + 'static),
    ) {
        let Some(span) = self.0 else {
            return;
        };
        if !span.is_told(true) {
            return;
        }
        let mut attributes = endpoint("source", source);
        attributes.extend(
            destination
                .into_iter()
                .flat_map(|it| endpoint("destination", it)),
        );
        span.report(attributes, Some((reason, error)));
    }

    /// Tells of a flow that has ended.
    pub(in crate::telemetry) fn close(
        &mut self,
        names: &Names,
        route: &Route,
        (sent, received): (u64, u64),
        failure: Option<(Reason, &(dyn Error + 'static))>,
    ) {
        let Some(span) = self.0.take() else {
            return;
        };
        // An end that was asked for is no failure.
        let failure = failure.filter(|(reason, _)| *reason != Reason::Drained);
        if !span.is_told(failure.is_some()) {
            return;
        }
        let mut attributes = endpoint("source", route.source);
        attributes.extend(endpoint("destination", route.destination));
        let text = |key, value: Option<&str>| value.map(|value| text(key, value));
        let proven = |id: &'_ Kept| match names.security {
            Security::MutualTls => id.clone(),
            Security::Unknown => None,
        };
        let identities = [&names.source, &names.destination].map(|party| proven(&party.principal));
        let [source_identity, destination_identity] = identities;
        attributes.extend(
            [
                text("culvert.source.pod", route.source_pod.as_deref()),
                text(
                    "culvert.source.namespace",
                    names.source.namespace.as_deref(),
                ),
                text("culvert.source.identity", source_identity.as_deref()),
                text("culvert.destination.pod", route.destination_pod.as_deref()),
                text(
                    "culvert.destination.namespace",
                    names.destination.namespace.as_deref(),
                ),
                text(
                    "culvert.destination.identity",
                    destination_identity.as_deref(),
                ),
                text(
                    "culvert.destination.service",
                    names.service.hostname.as_deref(),
                ),
                text("culvert.security", Some(names.security.as_str())),
                route
                    .hbone
                    .as_ref()
                    .map(|to| string("culvert.hbone.authority", to.to_string())),
            ]
            .into_iter()
            .flatten(),
        );
        attributes.push(integer("culvert.bytes_sent", sent));
        attributes.push(integer("culvert.bytes_received", received));
        span.report(attributes, failure);
    }
}

impl Recorded {
    fn set(&mut self, phase: TracePhase, times: (Instant, Instant)) {
        let place = PHASES.iter().position(|(one, _)| *one == phase);
        if let Some(slot) = place.and_then(|place| self.phases.get_mut(place)) {
            *slot = Some(times);
        }
    }

    fn is_told(&self, failed: bool) -> bool {
        self.context.sampled || (failed && self.queue.errors_always)
    }

    fn report(
        self: Box<Self>,
        mut attributes: Vec<proto::KeyValue>,
        failure: Option<(Reason, &(dyn Error + 'static))>,
    ) {
        let end = Instant::now();
        attributes.push(text("network.transport", "tcp"));
        let sides = self.tcp.get().into_iter().flatten().zip(TCP_SIDES);
        for (facts, (rtt, retransmits)) in sides {
            if let Some(facts) = facts {
                let micros = u64::try_from(facts.rtt.as_micros()).unwrap_or(u64::MAX);
                attributes.push(integer(rtt, micros));
                attributes.push(integer(retransmits, facts.retransmits.into()));
            }
        }
        let status = failure.map(|(reason, error)| {
            attributes.push(text("error.type", reason.as_str()));
            let code = proto::status::Code::Error.into();
            let message = in_words(error).to_string();
            proto::Status { message, code }
        });
        let event = |name: &str, at| proto::span::Event {
            time_unix_nano: self.nanos(at),
            name: name.to_owned(),
        };
        let mut events = vec![event("accept", self.began)];
        let first_byte = self.first_byte.get().copied();
        events.extend(first_byte.map(|at| event("first byte", at)));
        events.push(event("close", end));
        let (name, kind) = match self.reporter {
            Reporter::Source => ("outbound", Kind::Client),
            Reporter::Destination => ("inbound", Kind::Server),
        };
        let mut spans = self.children();
        spans.push(proto::Span {
            attributes,
            events,
            status,
            ..self.span(name, kind, (self.began, end))
        });
        self.queue.send(spans);
    }

    /// The phases.
    fn children(&self) -> Vec<proto::Span> {
        let phases = PHASES.iter().zip(&self.phases);
        let taken = phases.filter_map(|((_, name), times)| Some((*name, (*times)?)));
        let child = |(name, times)| proto::Span {
            span_id: rand::random::<u64>().to_be_bytes().into(),
            parent_span_id: self.context.span_id.to_be_bytes().into(),
            ..self.span(name, Kind::Internal, times)
        };
        taken.map(child).collect()
    }

    fn span(&self, name: &str, kind: Kind, (from, to): (Instant, Instant)) -> proto::Span {
        let context = self.context;
        proto::Span {
            trace_id: context.trace_id.to_be_bytes().into(),
            span_id: context.span_id.to_be_bytes().into(),
            parent_span_id: self
                .parent
                .map_or_else(Vec::new, |id| id.to_be_bytes().into()),
            name: name.to_owned(),
            kind: kind.into(),
            start_time_unix_nano: self.nanos(from),
            end_time_unix_nano: self.nanos(to),
            flags: context.sampled.into(),
            ..proto::Span::default()
        }
    }

    /// A moment in nanoseconds since 1970.
    fn nanos(&self, at: Instant) -> u64 {
        let wall = self.wall + at.saturating_duration_since(self.began);
        let since_epoch = wall.duration_since(SystemTime::UNIX_EPOCH);
        u64::try_from(since_epoch.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorded")
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}

fn endpoint(side: &str, at: SocketAddr) -> Vec<proto::KeyValue> {
    vec![
        string(&format!("{side}.address"), at.ip().to_string()),
        integer(&format!("{side}.port"), at.port().into()),
    ]
}

fn text(key: &str, value: &str) -> proto::KeyValue {
    string(key, value.to_owned())
}

pub(super) fn string(key: &str, value: String) -> proto::KeyValue {
    attribute(key, Value::StringValue(value))
}

fn integer(key: &str, value: u64) -> proto::KeyValue {
    attribute(
        key,
        Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)),
    )
}

fn attribute(key: &str, value: Value) -> proto::KeyValue {
    proto::KeyValue {
        key: key.to_owned(),
        value: Some(proto::AnyValue { value: Some(value) }),
    }
}

/// In the order in which they are told.
const PHASES: [(TracePhase, &str); 5] = [
    (TracePhase::Resolve, "resolve"),
    (TracePhase::Policy, "policy"),
    (TracePhase::Connect, "connect"),
    (TracePhase::Tls, "tls"),
    (TracePhase::Request, "request"),
];
const TCP_SIDES: [(&str, &str); 2] = [
    (
        "culvert.downstream.tcp.rtt_us",
        "culvert.downstream.tcp.retransmits",
    ),
    (
        "culvert.upstream.tcp.rtt_us",
        "culvert.upstream.tcp.retransmits",
    ),
];

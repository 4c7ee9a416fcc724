//! Which spans are told, and what becomes of those that nobody takes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use prometheus_client::registry::Registry;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{super::Reason, *};
use crate::config::Sampler;

const HERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

fn settings(sampler: Sampler, queue: usize) -> config::Traces {
    config::Traces {
        endpoint: "http://collector:4317".parse().unwrap(),
        roots: None,
        headers: Vec::new(),
        service: "culvert".to_owned(),
        sampler,
        errors_always: true,
        queue,
        delay: Duration::from_millis(10),
    }
}

/// A queue whose content the test reads itself.
struct Stage {
    traces: Traces,
    exporter: Exporter,
    registry: Registry,
}

fn stage(sampler: Sampler, queue: usize) -> Stage {
    stage_with(&settings(sampler, queue))
}

fn stage_with(settings: &config::Traces) -> Stage {
    let mut registry = Registry::default();
    let (traces, exporter) = Traces::new(settings, &mut registry);
    Stage {
        traces,
        exporter,
        registry,
    }
}

impl Stage {
    /// A connection that is refused, with or without a parent.
    fn refuse(&self, parent: Option<TraceContext>) {
        let trace = self.traces.begin(Reporter::Destination, parent);
        let error = std::io::Error::other("no");
        trace.reject((HERE, None), Reason::ConnectRefused, &error);
    }

    fn taken(&mut self) -> Vec<proto::Span> {
        self.exporter.queued.try_recv().unwrap_or_default()
    }

    fn metric(&self, line: &str) -> bool {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines().any(|one| one == line)
    }
}

fn parent(sampled: bool) -> TraceContext {
    TraceContext {
        trace_id: 7,
        span_id: 8,
        sampled,
    }
}

#[test]
fn without_a_taker_there_is_nothing() {
    let mut trace = Traces::default().begin(Reporter::Source, Some(parent(true)));
    trace.ended(TracePhase::Resolve);
    assert_eq!(trace.context(), None);
    assert!(!trace.awaits_first_byte());
    assert_eq!(size_of::<Trace>(), size_of::<usize>());
}

#[test]
fn a_part_of_the_traces_that_begin_here_is_told() {
    let sampled = |ratio| {
        let stage = stage(Sampler::new(ratio, true), 1);
        let begin = |_: &usize| stage.traces.begin(Reporter::Source, None);
        let told = |trace: Trace| trace.context().unwrap().sampled;
        (0..1000).filter(|it| told(begin(it))).count()
    };
    assert_eq!((sampled(0.0), sampled(1.0)), (0, 1000));
    let some = sampled(0.25);
    assert!((150..350).contains(&some), "{some}");
}

#[test]
fn a_trace_of_a_peer_goes_on_as_the_peer_says() {
    for (follows, expected) in [(true, [true, false]), (false, [false, false])] {
        let stage = stage(Sampler::new(0.0, follows), 1);
        for (told, expected) in [true, false].into_iter().zip(expected) {
            let trace = stage
                .traces
                .begin(Reporter::Destination, Some(parent(told)));
            let context = trace.context().unwrap();
            assert_eq!((context.trace_id, context.sampled), (7, expected));
            assert_ne!(context.span_id, 8);
        }
    }
}

#[test]
fn failures_are_told_unless_nobody_wants_to_know() {
    let mut stage = stage(Sampler::new(0.0, true), 4);
    stage.refuse(Some(parent(false)));
    let spans = stage.taken();
    let [span] = spans.as_slice() else {
        panic!("{spans:?}");
    };
    assert_eq!(span.trace_id, 7_u128.to_be_bytes());
    assert_eq!(span.parent_span_id, 8_u64.to_be_bytes());
    assert_eq!(span.name, "inbound");
    assert_eq!(span.status.as_ref().unwrap().message, "no");
    let mut quiet = settings(Sampler::new(0.0, true), 4);
    quiet.errors_always = false;
    let mut stage = stage_with(&quiet);
    stage.refuse(None);
    assert!(stage.taken().is_empty());
}

#[tokio::test(start_paused = true)]
async fn phases_are_children_and_lie_within_their_flow() {
    let mut stage = stage(Sampler::new(1.0, true), 4);
    let before = Instant::now();
    tokio::time::advance(Duration::from_secs(1)).await;
    let mut trace = stage.traces.begin(Reporter::Source, None);
    let began = Instant::now();
    // A connection that was there before the flow took none of its time.
    trace.took_place(TracePhase::Tls, (before, began));
    tokio::time::advance(Duration::from_millis(5)).await;
    trace.ended(TracePhase::Resolve);
    tokio::time::advance(Duration::from_millis(7)).await;
    trace.ended(TracePhase::Connect);
    trace.first_byte();
    trace.reject(
        (HERE, Some(HERE)),
        Reason::ConnectRefused,
        &std::io::Error::other("no"),
    );
    let spans = stage.taken();
    let names: Vec<_> = spans.iter().map(|span| &*span.name).collect();
    assert_eq!(names, ["resolve", "connect", "outbound"]);
    let [resolve, connect, flow] = spans.as_slice() else {
        panic!("{spans:?}");
    };
    let millis =
        |span: &proto::Span| (span.end_time_unix_nano - span.start_time_unix_nano) / 1_000_000;
    assert_eq!((millis(resolve), millis(connect), millis(flow)), (5, 7, 12));
    assert_eq!(resolve.end_time_unix_nano, connect.start_time_unix_nano);
    for child in [resolve, connect] {
        assert_eq!(child.trace_id, flow.trace_id);
        assert_eq!(child.parent_span_id, flow.span_id);
    }
    let events: Vec<_> = flow.events.iter().map(|event| &*event.name).collect();
    assert_eq!(events, ["accept", "first byte", "close"]);
}

#[test]
fn a_full_queue_loses_spans_and_says_so() {
    let stage = stage(Sampler::new(1.0, true), 2);
    assert!(stage.metric("culvert_trace_spans_lost_total{reason=\"queue_full\"} 0"));
    for _ in 0..5 {
        stage.refuse(None);
    }
    assert!(stage.metric("culvert_trace_spans_lost_total{reason=\"queue_full\"} 3"));
}

/// What no collector takes within its time is lost, and counted; the next attempt follows after a pause.
#[tokio::test(start_paused = true)]
async fn a_collector_that_is_silent_costs_its_batch() {
    let stage = stage(Sampler::new(1.0, true), 100);
    let stop = CancellationToken::new();
    let attempts = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let asked = Arc::clone(&attempts);
    let connect = move || -> BoxFuture<'static, Result<Channel, ConnectError>> {
        asked.lock().push(Instant::now());
        Box::pin(std::future::pending())
    };
    let Stage {
        traces,
        exporter,
        registry,
    } = stage;
    let mut running = JoinSet::new();
    running.spawn(exporter.run(connect, stop.clone()));
    let began = Instant::now();
    let lost = |count: u64| {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let line = format!("culvert_trace_spans_lost_total{{reason=\"unreachable\"}} {count}");
        text.lines().any(|one| one == line)
    };
    for _ in 0..3 {
        let trace = traces.begin(Reporter::Source, None);
        trace.reject(
            (HERE, None),
            Reason::ConnectRefused,
            &std::io::Error::other("no"),
        );
    }
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert!(lost(3));
    let trace = traces.begin(Reporter::Source, None);
    trace.reject(
        (HERE, None),
        Reason::ConnectRefused,
        &std::io::Error::other("no"),
    );
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(lost(4));
    let attempts = attempts.lock().clone();
    assert_eq!(attempts.len(), 2);
    assert!(attempts[1] - began >= Duration::from_secs(11));
    // A stop waits no longer than a moment.
    stop.cancel();
    running.join_next().await.unwrap().unwrap();
}

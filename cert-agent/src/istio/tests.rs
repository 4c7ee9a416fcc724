//! Against a certificate service in this process, over pipes and under a paused clock.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use futures_util::{StreamExt as _, stream};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Response,
    metadata::MetadataValue,
    transport::{Endpoint, Server},
};
use tower::service_fn;

use super::*;
use crate::{
    Agent, AgentOptions, Clock, CsrSource, InProcessCa, SvidError,
    testing::{HOUR, id, paused_clock},
};
use proto::{
    IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";

/// The authority, how it is reached, and what it was asked.
struct World {
    ca: InProcessCa,
    behaviour: Mutex<Behaviour>,
    calls: Mutex<Vec<Call>>,
    /// Calls that were given up.
    cancelled: watch::Sender<usize>,
    connects: AtomicUsize,
    unreachable: AtomicBool,
    connect_latency: Mutex<Duration>,
    is_current: AtomicBool,
    token: Mutex<Option<&'static str>>,
    servers: Mutex<JoinSet<()>>,
    open: Mutex<Vec<AbortHandle>>,
}

#[derive(Clone, Default)]
struct Behaviour {
    latency: Duration,
    /// Never answers for this identity.
    hangs_for: Option<&'static str>,
    refusal: Option<Status>,
}

#[derive(Clone)]
struct Call {
    at: Instant,
    headers: MetadataMap,
    message: IstioCertificateRequest,
}

impl World {
    fn new() -> Arc<Self> {
        Self::with(Clock::system(), HOUR)
    }

    fn with(clock: Clock, lifetime: Duration) -> Arc<Self> {
        let ca = InProcessCa::random().unwrap();
        Arc::new(Self {
            ca: ca.with_lifetime(lifetime).with_clock(clock),
            behaviour: Mutex::default(),
            calls: Mutex::default(),
            cancelled: watch::Sender::new(0),
            connects: AtomicUsize::new(0),
            unreachable: AtomicBool::new(false),
            connect_latency: Mutex::default(),
            is_current: AtomicBool::new(true),
            token: Mutex::new(Some("Bearer token")),
            servers: Mutex::default(),
            open: Mutex::default(),
        })
    }

    fn authority(self: &Arc<Self>) -> IstioCa<Line> {
        IstioCa::new(Line(Arc::clone(self)), IstioOptions::default())
    }

    fn connects(&self) -> usize {
        self.connects.load(Ordering::Relaxed)
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().clone()
    }

    fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock());
    }

    fn refuse(&self, status: impl Into<Option<Status>>) {
        let status = status.into();
        self.behave(|behaviour| behaviour.refusal = status);
    }

    /// Ends all connections, as a server does that is restarted.
    fn cut(&self) {
        for server in self.open.lock().drain(..) {
            server.abort();
        }
    }

    /// How many connections are open.
    async fn open(&self) -> usize {
        // Whoever noticed the end has a turn to act on it.
        sleep(Duration::from_millis(1)).await;
        let open = self.open.lock();
        open.iter().filter(|server| !server.is_finished()).count()
    }
}

/// The way to the authority.
struct Line(Arc<World>);

impl Connect for Line {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, ConnectError>> {
        Box::pin(async {
            let latency = *self.0.connect_latency.lock();
            sleep(latency).await;
            if self.0.unreachable.load(Ordering::Relaxed) {
                return Err("connection refused".into());
            }
            self.0.connects.fetch_add(1, Ordering::Relaxed);
            self.0.is_current.store(true, Ordering::Relaxed);
            let (near, mut far) = tokio::io::duplex(65_536);
            let service = IstioCertificateServiceServer::new(Service(Arc::clone(&self.0)));
            let serving = self.0.servers.lock().spawn(async move {
                // The server goes on with its end of a pipe by itself, so it gets another one.
                let (mut outer, inner) = tokio::io::duplex(65_536);
                let incoming = stream::iter([Ok::<_, io::Error>(inner)]).chain(stream::pending());
                let router = Server::builder().add_service(service);
                tokio::select! {
                    _ = router.serve_with_incoming(incoming) => {}
                    _ = tokio::io::copy_bidirectional(&mut far, &mut outer) => {}
                }
            });
            self.0.open.lock().push(serving);
            let mut only = Some(TokioIo::new(near));
            let once = service_fn(move |_| {
                let gone = || io::Error::from(io::ErrorKind::NotConnected);
                std::future::ready(only.take().ok_or_else(gone))
            });
            let endpoint = Endpoint::from_static("https://ca.example:15012");
            Ok(endpoint.connect_with_connector(once).await?)
        })
    }

    fn metadata(&self) -> BoxFuture<'_, Result<MetadataMap, ConnectError>> {
        let token = *self.0.token.lock();
        Box::pin(std::future::ready(match token {
            Some(token) => {
                let mut metadata = MetadataMap::new();
                metadata.insert("authorization", MetadataValue::from_static(token));
                Ok(metadata)
            }
            None => Err("the token is empty".into()),
        }))
    }

    fn is_current(&self) -> BoxFuture<'_, bool> {
        let is_current = self.0.is_current.load(Ordering::Relaxed);
        Box::pin(std::future::ready(is_current))
    }
}

struct Service(Arc<World>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let world = &self.0;
        let headers = request.metadata().clone();
        let message = request.into_inner();
        let at = Instant::now();
        world.calls.lock().push(Call {
            at,
            headers,
            message: message.clone(),
        });
        let guard = Unanswered(&world.cancelled);
        let Behaviour {
            latency,
            hangs_for,
            refusal,
        } = world.behaviour.lock().clone();
        let whom = impersonated(&message).unwrap_or_else(|| WEB.to_owned());
        if hangs_for == Some(whom.as_str()) {
            std::future::pending::<()>().await;
        }
        sleep(latency).await;
        std::mem::forget(guard);
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let csr = pem::parse(&message.csr).unwrap().into_contents().into();
        let request = SigningRequest {
            id: &whom.parse().unwrap(),
            csr: &csr,
        };
        let signed = world.ca.sign(request).await.unwrap();
        let all = signed.chain.iter().chain(&signed.roots);
        let pem = |der: &[u8]| pem::encode(&pem::Pem::new("CERTIFICATE", der));
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: all.map(|certificate| pem(certificate)).collect(),
        }))
    }
}

/// Counts a call that ended without an answer.
struct Unanswered<'a>(&'a watch::Sender<usize>);

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count += 1);
    }
}

fn impersonated(message: &IstioCertificateRequest) -> Option<String> {
    let fields = &message.metadata.as_ref()?.fields;
    assert_eq!(fields.len(), 1);
    match &fields.get(IMPERSONATED)?.kind {
        Some(Kind::StringValue(id)) => Some(id.clone()),
        other => panic!("{other:?}"),
    }
}

async fn sign(authority: &IstioCa<Line>, whom: &str) -> Result<SignedChain, ObtainError> {
    let id = id(whom);
    let (_, csr) = crate::key::key_and_request(&id).unwrap();
    let request = SigningRequest { id: &id, csr: &csr };
    authority.sign(request).await
}

#[tokio::test(start_paused = true)]
async fn asks_for_the_workload_with_all_that_goes_with_it() {
    let world = World::new();
    let signed = sign(&world.authority(), WEB).await.unwrap();
    assert_eq!((signed.chain.len(), signed.roots.len()), (1, 1));
    let calls = world.calls();
    let [call] = calls.as_slice() else {
        panic!("{} calls", calls.len())
    };
    assert_eq!(impersonated(&call.message).as_deref(), Some(WEB));
    assert_eq!(call.message.validity_duration, 86_400);
    let csr = pem::parse(&call.message.csr).unwrap();
    assert_eq!(csr.tag(), "CERTIFICATE REQUEST");
    assert_eq!(call.headers.get("authorization").unwrap(), "Bearer token");
    assert_eq!(call.headers.get("grpc-timeout").unwrap(), "81000000u");
}

#[tokio::test(start_paused = true)]
async fn a_proxy_of_one_workload_names_nobody() {
    let world = World::new();
    let options = IstioOptions {
        caller: Caller::Itself,
        lifetime: Duration::ZERO,
        ..IstioOptions::default()
    };
    let authority = IstioCa::new(Line(Arc::clone(&world)), options);
    sign(&authority, DB).await.unwrap();
    let message = &world.calls()[0].message;
    assert_eq!(message.metadata, None);
    assert_eq!(
        message.validity_duration, 1,
        "zero is for the server to fill"
    );
}

#[tokio::test(start_paused = true)]
async fn calls_share_a_connection_until_nobody_needs_it() {
    let world = World::new();
    let authority = world.authority();
    assert_eq!(world.connects(), 0, "nothing is opened in advance");
    let (web, db) = tokio::join!(sign(&authority, WEB), sign(&authority, DB));
    web.and(db).unwrap();
    sleep(Duration::from_secs(80)).await;
    sign(&authority, WEB).await.unwrap();
    sleep(Duration::from_secs(80)).await;
    assert_eq!((world.connects(), world.open().await), (1, 1));
    sleep(Duration::from_secs(90)).await;
    assert_eq!(world.open().await, 0, "it is let go");
    sign(&authority, WEB).await.unwrap();
    assert_eq!((world.connects(), world.open().await), (2, 1));
    drop(authority);
    assert_eq!(world.open().await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ended_unnoticed_is_replaced() {
    let world = World::new();
    let authority = world.authority();
    for connects in 1..=3 {
        sign(&authority, WEB).await.unwrap();
        assert_eq!(world.connects(), connects);
        world.cut();
    }
    assert_eq!(world.calls().len(), 3, "no request is made twice");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_during_its_first_call_is_told() {
    let world = World::new();
    world.behave(|behaviour| behaviour.hangs_for = Some(WEB));
    let authority = world.authority();
    let cut = async {
        sleep(Duration::from_secs(1)).await;
        world.cut();
    };
    let (outcome, ()) = tokio::join!(sign(&authority, WEB), cut);
    let error = outcome.unwrap_err();
    assert_eq!(error.retry(), Retry::Soon);
    let text = error.to_string();
    assert!(text.starts_with("signing gRPC error ("), "{text}");
    assert_eq!(
        world.calls().len(),
        1,
        "the keeper decides when to ask again"
    );
}

#[tokio::test(start_paused = true)]
async fn an_authority_out_of_reach_is_told_with_the_cause() {
    let world = World::new();
    world.unreachable.store(true, Ordering::Relaxed);
    let authority = world.authority();
    let error = sign(&authority, WEB).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot reach the certificate authority: connection refused"
    );
    assert_eq!(error.retry(), Retry::Soon);
    world.unreachable.store(false, Ordering::Relaxed);
    sign(&authority, WEB).await.unwrap();
}

/// A network that is silent takes each attempt its time.
#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_connection_fail_with_it() {
    let world = World::new();
    world.unreachable.store(true, Ordering::Relaxed);
    *world.connect_latency.lock() = Duration::from_secs(5);
    let authority = world.authority();
    let start = Instant::now();
    let ids = (0..8).map(|n| format!("spiffe://td/ns/n/sa/a{n}"));
    let ids: Vec<_> = ids.collect();
    let all = ids.iter().map(|id| sign(&authority, id));
    for outcome in futures_util::future::join_all(all).await {
        let error = outcome.unwrap_err().to_string();
        assert!(error.ends_with(": connection refused"), "{error}");
    }
    assert_eq!(start.elapsed().as_secs(), 5);
    // Who comes later tries for itself.
    world.unreachable.store(false, Ordering::Relaxed);
    sign(&authority, WEB).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_a_token_nothing_is_asked() {
    let world = World::new();
    *world.token.lock() = None;
    let authority = world.authority();
    let error = sign(&authority, WEB).await.unwrap_err();
    assert!(
        error.to_string().ends_with(": the token is empty"),
        "{error}"
    );
    assert_eq!((world.connects(), error.retry()), (0, Retry::Soon));
    for token in ["Bearer one", "Bearer two"] {
        *world.token.lock() = Some(token);
        sign(&authority, WEB).await.unwrap();
        let shown = world.calls().pop().unwrap();
        assert_eq!(shown.headers.get("authorization").unwrap(), token);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_without_an_answer_is_cancelled_at_its_deadline() {
    let world = World::new();
    world.behave(|behaviour| behaviour.hangs_for = Some(WEB));
    let authority = world.authority();
    let start = Instant::now();
    let (hung, other) = tokio::join!(sign(&authority, WEB), sign(&authority, DB));
    other.expect("another identity does not wait");
    let error = hung.unwrap_err();
    assert!(matches!(error, ObtainError::Deadline(_)), "{error:?}");
    assert_eq!(start.elapsed().as_secs(), 80);
    let mut cancelled = world.cancelled.subscribe();
    cancelled.wait_for(|count| *count == 1).await.unwrap();
    // The connection may be the reason.
    sign(&authority, DB).await.unwrap();
    assert_eq!(world.connects(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_given_up_is_cancelled() {
    let world = World::new();
    world.behave(|behaviour| behaviour.hangs_for = Some(WEB));
    let authority = world.authority();
    let given_up = timeout(Duration::from_secs(5), sign(&authority, WEB)).await;
    assert!(given_up.is_err());
    let mut cancelled = world.cancelled.subscribe();
    cancelled.wait_for(|count| *count == 1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn refusals_say_how_soon_to_ask_again() {
    let world = World::new();
    let authority = world.authority();
    for (status, retry, text) in [
        (
            Status::unauthenticated("request impersonation authentication failure"),
            Retry::Soon,
            "signing gRPC error (Unauthenticated): request impersonation authentication failure",
        ),
        (
            Status::invalid_argument("CSR signing error (x\u{1b}[2J)"),
            Retry::Slowly,
            "signing gRPC error (InvalidArgument): CSR signing error (x\\u{1b}[2J)",
        ),
        (
            Status::unimplemented("unknown service"),
            Retry::Slowly,
            "signing gRPC error (Unimplemented): unknown service",
        ),
        (
            Status::internal("failed to sign certificate request"),
            Retry::Soon,
            "signing gRPC error (Internal): failed to sign certificate request",
        ),
    ] {
        world.refuse(status);
        let error = sign(&authority, WEB).await.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.retry()), (text, retry));
    }
    assert_eq!(world.connects(), 1, "the connection is not to blame");
    world.refuse(Status::unavailable("shutting down"));
    sign(&authority, WEB).await.unwrap_err();
    world.refuse(None);
    sign(&authority, WEB).await.unwrap();
    assert_eq!(world.connects(), 2);
}

#[tokio::test(start_paused = true)]
async fn new_trust_roots_take_a_new_connection() {
    let world = World::new();
    let authority = world.authority();
    sign(&authority, WEB).await.unwrap();
    world.is_current.store(false, Ordering::Relaxed);
    world.unreachable.store(true, Ordering::Relaxed);
    sign(&authority, WEB)
        .await
        .expect("the old one is as good as it was");
    assert_eq!(world.connects(), 1);
    world.unreachable.store(false, Ordering::Relaxed);
    sign(&authority, WEB).await.unwrap();
    sign(&authority, WEB).await.unwrap();
    assert_eq!((world.connects(), world.open().await), (2, 1));
}

/// An agent that runs until it is dropped.
struct Running {
    agent: Agent,
    _task: JoinSet<()>,
}

fn agent(world: &Arc<World>, clock: Clock) -> Running {
    let options = AgentOptions {
        clock,
        ..AgentOptions::default()
    };
    let agent = Agent::new(Arc::new(CsrSource::new(world.authority())), options);
    let (running, mut task) = (agent.clone(), JoinSet::new());
    task.spawn(async move { running.run(CancellationToken::new()).await });
    Running { agent, _task: task }
}

/// istio-csr takes its time and grants an hour.
#[tokio::test(start_paused = true)]
async fn a_slow_authority_with_short_certificates_is_asked_about_twice_an_hour() {
    let clock = paused_clock();
    let world = World::with(clock.clone(), HOUR);
    world.behave(|behaviour| behaviour.latency = Duration::from_secs(8));
    let running = agent(&world, clock);
    running.agent.prefetch(&id(WEB));
    let start = Instant::now();
    running.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 8);
    sleep(2 * HOUR).await;
    let calls = world.calls();
    assert!((3..=6).contains(&calls.len()), "{}", calls.len());
    for pair in calls.windows(2) {
        let pause = (pair[1].at - pair[0].at).as_secs();
        assert!((20 * 60..=45 * 60).contains(&pause), "{pause} s");
        assert_ne!(
            pair[0].message.csr, pair[1].message.csr,
            "each has its own key"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_workload_that_the_authority_does_not_know_yet_is_asked_for_again_at_once() {
    let world = World::new();
    world.refuse(Status::unauthenticated(
        "request impersonation authentication failure",
    ));
    let running = agent(&world, Clock::system());
    let known = async {
        sleep(Duration::from_millis(2500)).await;
        world.refuse(None);
    };
    let start = Instant::now();
    let web = id(WEB);
    let (svid, ()) = tokio::join!(running.agent.svid(&web), known);
    svid.unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_authority_says_reaches_the_connection() {
    let world = World::new();
    world.refuse(Status::invalid_argument("CSR signing error (no)"));
    let running = agent(&world, Clock::system());
    let error = running.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, SvidError::Unavailable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.ends_with("signing gRPC error (InvalidArgument): CSR signing error (no)"),
        "{text}"
    );
}

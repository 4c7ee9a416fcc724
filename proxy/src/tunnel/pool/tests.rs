//! The rules of sharing, over TLS on in-memory transports.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use cert_agent::Svid;
use futures_util::future::BoxFuture;
use http::Response;
use tokio::{
    io::{DuplexStream, duplex},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Credentials, Cut, Dial, Key, Pool, Shelf,
    lease::{Load, State, Tunnel},
};
use crate::{
    config,
    relay::Buffers,
    telemetry::Reason,
    tunnel::{
        Answer, ConnectError, Tls, accept, serve,
        testing::{Tasks, echo, put, request, soon, spiffe, svids, take},
    },
};

/// What the far ends do with their TLS sessions.
pub(super) type Serving = Arc<dyn Fn(Tls<DuplexStream>) -> BoxFuture<'static, ()> + Send + Sync>;

/// A mesh of one server identity, and of clients whose pool is under test.
pub(super) struct World {
    pub(super) svids: Vec<Arc<Svid>>,
    pub(super) serving: Serving,
    pub(super) dials: AtomicUsize,
    /// What the next dials do instead of connecting.
    failure: Option<(io::ErrorKind, Duration)>,
    /// How many dials panic first.
    panics: usize,
    tasks: Tasks,
}

impl World {
    pub(super) async fn new(serving: Serving) -> Self {
        Self {
            svids: svids(&["server", "client", "other"]).await,
            serving,
            dials: AtomicUsize::new(0),
            failure: None,
            panics: 0,
            tasks: Tasks::default(),
        }
    }

    pub(super) fn pool(self) -> Pool<Self> {
        Pool::new(Arc::default(), self, Buffers::new())
    }
}

impl Dial for World {
    type Io = DuplexStream;

    fn dial(&self, _: SocketAddr) -> BoxFuture<'_, io::Result<DuplexStream>> {
        Box::pin(async {
            let before = self.dials.fetch_add(1, SeqCst);
            assert!(before >= self.panics, "as some dials do here");
            if let Some((kind, after)) = self.failure {
                sleep(after).await;
                return Err(kind.into());
            }
            let (near, far) = duplex(256 << 10);
            let (config, serving) = (self.svids[0].server_config(), Arc::clone(&self.serving));
            self.tasks.spawn(async move {
                let limit = Duration::from_secs(10);
                if let Ok(tls) = accept(far, config, &Buffers::new(), limit).await {
                    serving(tls).await;
                }
            });
            Ok(near)
        })
    }

    fn tls<'a>(
        &'a self,
        key: &'a Key,
    ) -> BoxFuture<'a, Result<Credentials, Box<dyn std::error::Error + Send + Sync>>> {
        Box::pin(async {
            let svid = self.svids.iter().find(|svid| *svid.id() == key.source);
            let svid = svid.ok_or("no certificate")?;
            Ok(Credentials {
                config: svid.client_config(&key.expected),
                not_after: svid.not_after(),
                tracker: None,
            })
        })
    }
}

pub(super) fn key(source: &str) -> Key {
    Key {
        source: spiffe(source),
        expected: Arc::from([spiffe("server")]),
        destination: "10.0.0.5:15008".parse().unwrap(),
        source_ip: "10.0.0.1".parse().unwrap(),
    }
}

/// Far ends that echo, each stream on its own.
pub(super) fn echoing() -> Serving {
    Arc::new(|tls| {
        Box::pin(async move {
            let config = config::Tunnel::default();
            let _ = serve(tls, &config, CancellationToken::new(), Cut::never(), echo).await;
        })
    })
}

/// Far ends as the HTTP/2 library makes them, which accept and hold every stream.
fn library(limit: u32, each: fn(usize) -> bool) -> Serving {
    let asked = Arc::new(AtomicUsize::new(0));
    Arc::new(move |tls| {
        let asked = Arc::clone(&asked);
        Box::pin(async move {
            let mut builder = h2::server::Builder::new();
            builder.max_concurrent_streams(limit);
            let mut server = builder.handshake::<_, bytes::Bytes>(tls).await.unwrap();
            let mut held = Vec::new();
            while let Some(Ok((request, mut answer))) = server.accept().await {
                if each(asked.fetch_add(1, SeqCst)) {
                    let send = answer.send_response(Response::new(()), false).unwrap();
                    held.push((request, send));
                } else {
                    answer.send_reset(h2::Reason::REFUSED_STREAM);
                }
            }
        })
    })
}

async fn open(pool: &Pool<World>, count: usize) -> Vec<Answer> {
    let key = key("client");
    let request = request();
    let asking = (0..count).map(|_| pool.connect(&key, &request));
    let answers = soon(futures_util::future::join_all(asking)).await;
    answers.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn a_hundred_streams_share_a_connection_and_one_more_opens_the_second() {
    let pool = World::new(echoing()).await.pool();
    let mut held = open(&pool, 100).await;
    assert_eq!(pool.connections(), 1);
    held.extend(open(&pool, 1).await);
    assert_eq!(pool.connections(), 2);
    // A full connection is used again once it has room.
    held.swap_remove(0);
    held.extend(open(&pool, 1).await);
    assert_eq!(pool.dial.dials.load(SeqCst), 2);
}

#[tokio::test]
async fn a_burst_of_250_opens_three_connections_at_once() {
    let pool = World::new(echoing()).await.pool();
    let mut held = open(&pool, 250).await;
    assert_eq!(pool.dial.dials.load(SeqCst), 3);
    for answer in &mut held {
        put(&mut answer.stream, "x").await;
        assert_eq!(soon(take(&mut answer.stream)).await.unwrap().unwrap(), "x");
    }
}

#[tokio::test]
async fn two_identities_never_share() {
    let pool = World::new(echoing()).await.pool();
    for (source, connections) in [("client", 1), ("other", 2), ("client", 2)] {
        pool.connect(&key(source), &request()).await.unwrap();
        assert_eq!(pool.connections(), connections);
    }
    let mut elsewhere = key("client");
    elsewhere.destination.set_port(1);
    pool.connect(&elsewhere, &request()).await.unwrap();
    let mut several = key("client");
    several.expected = Arc::from([spiffe("another"), spiffe("server")]);
    pool.connect(&several, &request()).await.unwrap();
    assert_eq!(pool.connections(), 4);
}

#[tokio::test]
async fn an_unexpected_server_is_refused() {
    let pool = World::new(echoing()).await.pool();
    let mut wrong = key("client");
    wrong.expected = Arc::from([spiffe("other")]);
    let error = pool.connect(&wrong, &request()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PeerIdentityMismatch);
    assert!(error.to_string().starts_with("io error:"), "{error}");
    assert_eq!(
        pool.connections(),
        0,
        "nothing is kept for a key without connection"
    );
    let error = pool.connect(&key("nobody"), &request()).await.unwrap_err();
    assert_eq!(error.to_string(), "identity error");
    assert_eq!(error.reason(), Reason::NoCertificate);
}

#[tokio::test(start_paused = true)]
async fn all_waiters_share_one_failure() {
    let mut world = World::new(echoing()).await;
    world.failure = Some((io::ErrorKind::TimedOut, Duration::from_secs(10)));
    let pool = world.pool();
    let start = Instant::now();
    let (key, request) = (key("client"), request());
    let asking = (0..50).map(|_| pool.connect(&key, &request));
    for result in futures_util::future::join_all(asking).await {
        let error = result.unwrap_err();
        assert_eq!(error.reason(), Reason::HboneTimeout);
        let text = error.to_string();
        let expected = "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008";
        assert!(text.starts_with(expected), "{text}");
    }
    assert_eq!(start.elapsed(), Duration::from_secs(10));
    assert_eq!(pool.dial.dials.load(SeqCst), 1);
    assert_eq!(pool.connections(), 0);
}

#[tokio::test]
async fn a_panic_costs_one_attempt() {
    let mut world = World::new(echoing()).await;
    world.panics = 1;
    let pool = world.pool();
    let (key, request) = (key("client"), request());
    let first = soon(pool.connect(&key, &request)).await;
    assert!(matches!(first, Err(ConnectError::Open(_))), "{first:?}");
    assert!(soon(pool.connect(&key, &request)).await.is_ok());
    assert_eq!(pool.connections(), 1);
}

#[tokio::test]
async fn a_waiter_that_leaves_does_not_stop_the_attempt_of_the_others() {
    let pool = World::new(echoing()).await.pool();
    let (key, request) = (key("client"), request());
    let (left, stayed) = tokio::join!(
        timeout(Duration::ZERO, pool.connect(&key, &request)),
        pool.connect(&key, &request)
    );
    assert!(left.is_err() && stayed.is_ok());
    assert_eq!(pool.dial.dials.load(SeqCst), 1);
}

#[tokio::test]
async fn the_limit_of_the_peer_counts() {
    let pool = World::new(library(10, |_| true)).await.pool();
    let held = open(&pool, 1).await;
    let more = open(&pool, 29).await;
    assert_eq!(held.len() + more.len(), 30);
    assert!(pool.connections() >= 3, "{}", pool.connections());
    let burst = World::new(library(10, |_| true)).await.pool();
    assert_eq!(open(&burst, 30).await.len(), 30);
}

#[tokio::test]
async fn a_refused_stream_is_tried_once_more() {
    let pool = World::new(library(100, |asked| asked > 0)).await.pool();
    open(&pool, 1).await;
    assert_eq!(pool.dial.dials.load(SeqCst), 2);
    let never = World::new(library(100, |_| false)).await.pool();
    let error = soon(never.connect(&key("client"), &request()))
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Http2(_)), "{error}");
    assert_eq!(never.dial.dials.load(SeqCst), 2);
}

#[tokio::test]
async fn after_goaway_streams_finish_and_the_next_uses_a_new_connection() {
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let pool = World::new(Arc::new(move |tls| {
        let stop = stopping.child_token();
        Box::pin(async move {
            let _ = serve(tls, &config::Tunnel::default(), stop, Cut::never(), echo).await;
        })
    }))
    .await
    .pool();
    let mut old = open(&pool, 1).await;
    stop.cancel();
    // The server drains whatever connects now; a new connection is what counts.
    let moved = async {
        while pool.dial.dials.load(SeqCst) == 1 {
            let _ = pool.connect(&key("client"), &request()).await;
        }
    };
    soon(moved).await;
    put(&mut old[0].stream, "still here").await;
    assert_eq!(
        soon(take(&mut old[0].stream)).await.unwrap().unwrap(),
        "still here"
    );
}

#[tokio::test]
async fn a_request_that_a_goaway_left_out_moves_to_a_new_connection() {
    let asked = Arc::new(tokio::sync::Notify::new());
    let (seen, first) = (Arc::clone(&asked), AtomicUsize::new(1));
    let serving: Serving = Arc::new(move |tls| {
        let (asked, first) = (Arc::clone(&seen), first.swap(0, SeqCst) == 1);
        Box::pin(async move {
            if !first {
                return echoing()(tls).await;
            }
            let mut server = h2::server::handshake(tls).await.unwrap();
            let (_request, mut answer) = server.accept().await.unwrap().unwrap();
            let _send = answer.send_response(Response::new(()), false).unwrap();
            tokio::select! {
                () = asked.notified() => {}
                _ = server.accept() => unreachable!("nothing else was asked yet"),
            }
            // The next request is on its way meanwhile.
            sleep(Duration::from_millis(50)).await;
            server.abrupt_shutdown(h2::Reason::NO_ERROR);
            let _ = poll_fn(|cx| server.poll_closed(cx)).await;
        })
    });
    let pool = World::new(serving).await.pool();
    let _first = open(&pool, 1).await;
    asked.notify_one();
    let mut second = open(&pool, 1).await;
    assert_eq!(pool.dial.dials.load(SeqCst), 2);
    put(&mut second[0].stream, "x").await;
    let got = soon(take(&mut second[0].stream)).await;
    assert_eq!(got.unwrap().unwrap(), "x");
}

#[tokio::test]
async fn a_request_to_a_server_that_has_hung_up_is_put_again_once() {
    let hanging_up = |often: usize| -> Serving {
        let served = AtomicUsize::new(0);
        Arc::new(move |tls| {
            let hang_up = served.fetch_add(1, SeqCst) < often;
            Box::pin(async move {
                if !hang_up {
                    return echoing()(tls).await;
                }
                let mut server = h2::server::handshake(tls).await.unwrap();
                let asked = server.accept().await;
                assert!(asked.unwrap().is_ok());
            })
        })
    };
    for (often, served) in [(1, true), (2, false)] {
        let pool = World::new(hanging_up(often)).await.pool();
        let answer = soon(pool.connect(&key("client"), &request())).await;
        assert_eq!(answer.is_ok(), served, "{answer:?}");
        assert_eq!(pool.dial.dials.load(SeqCst), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn new_streams_stay_off_connections_that_carry_bulk() {
    async fn bulk(answer: &mut Answer) {
        for _ in 0..48 {
            put(&mut answer.stream, vec![0; 64 << 10]).await;
            let mut got = 0;
            while got < 64 << 10 {
                got += take(&mut answer.stream).await.unwrap().unwrap().len();
            }
        }
    }
    let pool = World::new(echoing()).await.pool();
    let mut held = open(&pool, 1).await;
    for connections in 2..=4 {
        for elephant in &mut held {
            bulk(elephant).await;
        }
        held.extend(open(&pool, 1).await);
        assert_eq!(pool.dial.dials.load(SeqCst), connections);
    }
    let mut mice = open(&pool, 50).await;
    assert_eq!(
        pool.dial.dials.load(SeqCst),
        4,
        "the last one carries nothing yet"
    );
    for elephant in &mut held {
        bulk(elephant).await;
    }
    mice.extend(open(&pool, 50).await);
    assert_eq!(pool.dial.dials.load(SeqCst), 4, "there is an end to it");
    // Bulk that is over counts no longer.
    tokio::time::advance(Duration::from_secs(2)).await;
    drop(mice);
    held.extend(open(&pool, 50).await);
    assert_eq!(pool.dial.dials.load(SeqCst), 4);
}

#[tokio::test]
async fn a_closed_connection_is_forgotten() {
    let pool = World::new(Arc::new(|tls| {
        Box::pin(async move {
            let mut server = h2::server::handshake(tls).await.unwrap();
            let (_request, mut answer) = server.accept().await.unwrap().unwrap();
            let _send = answer.send_response(Response::new(()), false).unwrap();
            let _ = timeout(Duration::from_millis(50), server.accept()).await;
        })
    }))
    .await
    .pool();
    for dials in 1..4 {
        let mut answer = open(&pool, 1).await;
        let _end = soon(take(&mut answer[0].stream)).await;
        let forgotten = async {
            while pool.connections() > 0 {
                tokio::task::yield_now().await;
            }
        };
        soon(forgotten).await;
        assert_eq!(pool.dial.dials.load(SeqCst), dials);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unused_connection_is_released_and_closes() {
    let ended = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&ended);
    let pool = World::new(Arc::new(move |tls| {
        let seen = Arc::clone(&seen);
        Box::pin(async move {
            let config = config::Tunnel::default();
            let end = serve(tls, &config, CancellationToken::new(), Cut::never(), echo).await;
            end.expect("closed with GOAWAY(NO_ERROR)");
            seen.fetch_add(1, SeqCst);
        })
    }))
    .await
    .pool();
    drop(open(&pool, 3).await);
    sleep(Duration::from_secs(299)).await;
    assert_eq!((pool.connections(), ended.load(SeqCst)), (1, 0));
    sleep(Duration::from_secs(2)).await;
    assert_eq!((pool.connections(), ended.load(SeqCst)), (0, 1));

    let held = open(&pool, 1).await;
    sleep(Duration::from_secs(900)).await;
    assert_eq!(pool.connections(), 1, "a stream keeps its connection");
    pool.release();
    drop(held);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(ended.load(SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn what_a_burst_opened_beside_another_connection_goes_soon() {
    let pool = World::new(echoing()).await.pool();
    drop(open(&pool, 250).await);
    assert_eq!(pool.connections(), 3);
    sleep(Duration::from_secs(21)).await;
    assert_eq!(pool.connections(), 1);
    sleep(Duration::from_secs(270)).await;
    assert_eq!(pool.connections(), 1);
}

#[tokio::test]
async fn dropping_the_pool_ends_its_connections() {
    let pool = World::new(echoing()).await.pool();
    let mut held = open(&pool, 1).await;
    drop(pool);
    assert!(soon(take(&mut held[0].stream)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn beyond_its_capacity_the_shelf_lets_go_of_the_longest_idle() {
    let shelf = Shelf::with_capacity(3);
    let (_opened, state) = tokio::sync::watch::channel(State::Opening);
    let take = |port| {
        let mut key = key("client");
        key.destination.set_port(port);
        shelf.lease(&key, || {
            Arc::new(Tunnel::new(
                Arc::new(Load::new(100, crate::tunnel::PoolMetrics::default())),
                state.clone(),
            ))
        })
    };
    let busy = take(1);
    for port in [2, 3, 2, 4] {
        drop(take(port));
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(shelf.len(), 3, "3 was idle longest");
    let again = take(2);
    assert_eq!(shelf.len(), 3, "2 is still there");
    let (third, fourth) = (take(5), take(6));
    assert_eq!(shelf.len(), 4, "nothing idle was left for the last");
    drop((busy, again, third, fourth));
}

#[tokio::test(start_paused = true)]
async fn connections_of_age_end_with_their_last_stream_and_new_streams_go_elsewhere() {
    let settings = config::Tunnel {
        max_age: config::MaxAge::For(Duration::from_secs(60)),
        ..Default::default()
    };
    let world = World::new(echoing()).await;
    let pool = Pool::new(Arc::new(settings), world, Buffers::new());
    let mut old = pool.connect(&key("client"), &request()).await.unwrap();
    sleep(Duration::from_secs(50)).await;
    let young = pool.connect(&key("client"), &request()).await.unwrap();
    assert_eq!(pool.dial.dials.load(SeqCst), 1);
    drop(young);
    sleep(Duration::from_secs(12)).await;
    assert_eq!(pool.connections(), 0);
    // What is open goes on.
    put(&mut old.stream, "still here").await;
    assert_eq!(take(&mut old.stream).await.unwrap().unwrap(), "still here");
    let mut new = pool.connect(&key("client"), &request()).await.unwrap();
    assert_eq!(pool.dial.dials.load(SeqCst), 2);
    drop(old);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(
        pool.dial.tasks.ended(),
        1,
        "the far end of the old one is gone"
    );
    put(&mut new.stream, "hello").await;
    assert_eq!(take(&mut new.stream).await.unwrap().unwrap(), "hello");
}

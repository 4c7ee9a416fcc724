//! The wire protocol, as a foreign client sees the proxy's inbound side. The outbound side is in `hbone_client.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use http::{Method, Request};
use testkit::{
    Authority, Cluster,
    mesh::{Match, Policy},
    raw::{
        Hello, RawClient,
        frames::{END_STREAM, Frame, kind, setting},
    },
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn only_peers_of_the_mesh_get_through_the_handshake() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let authority = foreign.world.authority();
    let id = foreign.peer.spiffe_id();
    let refused = [
        ("ALPN http/1.1", foreign.hello().alpn(&["http/1.1"])),
        ("no certificate", Hello::anonymous()),
        (
            "another trust domain",
            Hello::new(
                &authority
                    .issue("spiffe://elsewhere.example/ns/shop/sa/peer")
                    .unwrap(),
            ),
        ),
        (
            "no SPIFFE id",
            Hello::new(&authority.issue("https://peer.example/").unwrap()),
        ),
        (
            "another root",
            Hello::new(&Authority::new("other").unwrap().issue(&id).unwrap()),
        ),
        (
            "an expired certificate",
            Hello::new(&authority.issue_expired(&id).unwrap()),
        ),
        ("TLS 1.2", foreign.hello().tls12()),
    ];
    for (what, hello) in refused {
        assert!(
            foreign.try_client(&hello).await.is_err(),
            "{what} was accepted"
        );
    }
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    for hello in [
        foreign.hello(),
        foreign.hello().alpn(&[]),
        foreign.hello().alpn(&["http/1.1", "h2"]),
    ] {
        let client = foreign.try_client(&hello).await.unwrap();
        assert_eq!(client.server_id, Some(foreign.api.spiffe_id()));
        client
            .tunnel(&foreign.target(8080))
            .await
            .unwrap()
            .ping(b"hello")
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn tls_1_2_is_an_opt_in() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign
        .cluster_with(&[("TLS12_ENABLED", "true")])
        .await
        .unwrap();
    assert!(foreign.try_client(&foreign.hello().tls12()).await.is_ok());
    assert!(foreign.try_client(&foreign.hello()).await.is_ok());
}

#[tokio::test]
async fn the_server_announces_its_limits() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let client = foreign.client().await;
    let expected = [
        (setting::ENABLE_PUSH, None),
        (setting::MAX_CONCURRENT_STREAMS, Some(200)),
        (setting::INITIAL_WINDOW_SIZE, Some(4 << 20)),
        (setting::MAX_FRAME_SIZE, Some(1 << 20)),
        (setting::MAX_HEADER_LIST_SIZE, Some(65_536)),
    ];
    client.frames.announces(&expected, 16_711_681).await;
}

#[tokio::test]
async fn refusals_have_their_status_and_leave_the_connection_usable() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = foreign.mesh();
    mesh.policy(Policy::deny("no-9090", vec![Match::port(9090)]));
    let cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.api])
        .await
        .unwrap();
    let forbidden = foreign.api.serve(9090, Behaviour::Echo).unwrap();
    let talk = foreign.talk_over(cluster, Behaviour::Echo).await;
    let cases = [
        (format!("{}", foreign.api.ip4()), 400),
        (foreign.peer.at(8080).to_string(), 400),
        (foreign.target(15001), 503),
        (foreign.target(15006), 503),
        (foreign.target(15008), 503),
        ("unknown.shop.svc.cluster.local:80".to_owned(), 503),
        (foreign.target(9090), 401),
        (foreign.target(9999), 503),
    ];
    for (authority, status) in cases {
        let mut tunnel = talk.client.tunnel(&authority).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), status, "{authority}");
        assert!(
            tunnel.headers.is_empty(),
            "{authority}: {:?}",
            tunnel.headers
        );
        assert!(
            tunnel.recv.is_end_stream() || tunnel.read_to_end().await.unwrap().is_empty(),
            "{authority}"
        );
    }
    assert!(
        forbidden.peers().is_empty(),
        "a denied request reached the application"
    );
    talk.carries(b"usable").await;

    let log = talk.cluster.proxy(0).log();
    let denied = log
        .wait("denial", |line| {
            line.is_access("connection complete") && line.level == "error"
        })
        .await;
    assert!(
        denied
            .field("error")
            .contains("explicitly denied by: shop/no-9090"),
        "{}",
        denied.raw
    );
}

#[tokio::test]
async fn other_methods_than_connect_are_refused() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let uri = format!("https://{}/", talk.target);
    let get = Request::builder()
        .method(Method::GET)
        .uri(uri)
        .body(())
        .unwrap();
    let mut answer = talk.client.send(get).await.unwrap();
    assert_eq!(answer.status.as_u16(), 400);
    assert!(answer.recv.is_end_stream() || answer.read_to_end().await.unwrap().is_empty());
    talk.carries(b"usable").await;
}

#[tokio::test]
async fn a_blackholed_application_is_given_up_after_ten_seconds() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let rules = "table inet hole { chain out { type filter hook output priority 0; tcp dport 7777 drop; }; }";
    foreign
        .api
        .netns()
        .command("nft", &["-f", "-"], rules)
        .unwrap();
    let client = foreign.client().await;
    let start = tokio::time::Instant::now();
    assert_eq!(client.status(&foreign.target(7777)).await.unwrap(), 503);
    let waited = start.elapsed();
    assert!(
        waited > Duration::from_secs(8) && waited < Duration::from_secs(13),
        "{waited:?}"
    );
}

#[tokio::test]
async fn success_names_the_destination_in_baggage_and_needs_no_header() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let mut tunnel = talk.tunnel().await;
    assert_eq!(tunnel.status.as_u16(), 200);
    let baggage = tunnel.headers["baggage"].to_str().unwrap();
    assert_eq!(
        baggage,
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=api-deploy,service.name=api-app,service.version=v1"
    );
    tunnel.ping(b"works").await.unwrap();
    assert_eq!(talk.app.accepted(1).await[0].ip(), foreign.peer.ip4());
}

#[tokio::test]
async fn response_baggage_can_be_turned_off() {
    let foreign = ForeignClient::new().unwrap();
    let cluster = foreign
        .cluster_with(&[("ENABLE_RESPONSE_BAGGAGE", "false")])
        .await
        .unwrap();
    let talk = foreign.talk_over(cluster, Behaviour::Echo).await;
    let tunnel = talk.tunnel().await;
    assert_eq!((tunnel.status.as_u16(), tunnel.headers.len()), (200, 0));
}

#[tokio::test]
async fn a_connect_with_scheme_is_malformed() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let mut wire = foreign.wire().await;
    let target = foreign.target(8080);
    wire.headers(
        1,
        &[
            (":method", "CONNECT"),
            (":scheme", "https"),
            (":path", "/"),
            (":authority", &target),
        ],
    )
    .await
    .unwrap();
    let reset = wire.until(|frame| frame.stream == 1).await.unwrap();
    assert_eq!(
        (reset.kind, reset.error_code()),
        (kind::RST_STREAM, Some(1))
    );
    wire.headers(3, &[(":method", "CONNECT"), (":authority", &target)])
        .await
        .unwrap();
    let answer = wire.until(|frame| frame.stream == 3).await.unwrap();
    assert_eq!(answer.kind, kind::HEADERS);
    assert_eq!(answer.flags & END_STREAM, 0);
}

#[tokio::test]
async fn hostile_headers_change_nothing() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let zeros = format!("00-{}", "0".repeat(52));
    let long = "x".repeat(20_000);
    let hostile: [&[(&str, &str)]; 6] = [
        &[("traceparent", &zeros)],
        &[("traceparent", "00-zz")],
        &[(
            "baggage",
            "k8s.namespace.name=a\"b\\c,service.name==,,=,k8s.pod.name=\"",
        )],
        &[("baggage", &long)],
        &[("forwarded", "for=\"1.2.3.4:5\";host=\"a\"b\";host=")],
        &[
            ("x-forwarded-network", "elsewhere"),
            ("forwarded", ";;;"),
            ("unknown", "\""),
        ],
    ];
    for headers in hostile {
        let tunnel = talk.client.tunnel_with(&talk.target, headers);
        let mut tunnel = tunnel.await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200);
        tunnel.ping(b"works").await.unwrap();
        tunnel.finish().unwrap();
        tunnel.read_to_end().await.unwrap();
    }
    let log = talk.cluster.proxy(0).log();
    wait::until(wait::SOON, "all are logged", async || {
        (log.since(0, |line| line.is_access("connection complete"))
            .len()
            == hostile.len())
        .then_some(())
    })
    .await;
    let scraped = talk.cluster.proxy(0).metrics().await;
    scraped.expect("peer text is escaped");
    let bad_port = format!("{}:70000", foreign.api.ip4());
    let bad_port = talk.client.tunnel(&bad_port).await;
    assert!(bad_port.is_err() || bad_port.unwrap().status.as_u16() == 400);
    talk.carries(b"usable").await;
}

/// Waits until peers hold `count` connections to the proxy.
async fn sockets_open(cluster: &Cluster<'_>, count: f64) {
    let labels = [("reporter", "destination")];
    let fits = |open| open == count;
    cluster
        .proxy(0)
        .metric("istio_tcp_sockets_open", &labels, fits)
        .await;
}

#[tokio::test]
async fn garbage_harms_nobody_else() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let mut tunnel = talk.tunnel().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x16, 0x03, 0x01, 0xff, 0xff, 0x00],
        &[0; 4096],
    ] {
        let mut stream = foreign.peer.connect(foreign.hbone()).await.unwrap();
        let _ = stream.write_all(bytes).await;
    }
    let mut wrong = foreign.tls().await;
    wrong
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let ended = wrong.read_to_end(&mut rest);
    let _eof_or_error = wait::soon("the proxy gives up on a wrong preface", ended).await;

    let mut wire = foreign.wire().await;
    wire.stream
        .write_all(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1])
        .await
        .unwrap();
    wire.stream.flush().await.unwrap();
    let goaway = wire
        .until(|frame| frame.kind == kind::GOAWAY)
        .await
        .unwrap();
    assert_eq!(goaway.error_code(), Some(6), "FRAME_SIZE_ERROR");
    drop(wire);

    tunnel.ping(b"unharmed").await.unwrap();
    sockets_open(&talk.cluster, 1.0).await;
}

#[tokio::test]
async fn silent_peers_are_dropped() {
    let foreign = ForeignClient::new().unwrap();
    let cluster = foreign.cluster().await.unwrap();
    let mut silent = foreign.peer.connect(foreign.hbone()).await.unwrap();
    // Past TLS, then no preface.
    let mut mute = foreign.tls().await;
    let limit = Duration::from_secs(14);
    let mut rest = Vec::new();
    let ended = silent.read_to_end(&mut rest);
    let _eof_or_error = wait::within(limit, "a peer without a handshake is dropped", ended).await;
    let mut rest = Vec::new();
    let ended = mute.read_to_end(&mut rest);
    let _eof_or_error = wait::within(limit, "a peer without a preface is dropped", ended).await;
    sockets_open(&cluster, 0.0).await;
}

#[tokio::test]
async fn ends_and_resets_of_the_application_reach_the_client() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let sink = foreign.api.serve(8081, Behaviour::Sink).unwrap();
    let rude = foreign.api.serve(8082, Behaviour::Reset).unwrap();

    let mut tunnel = talk.client.tunnel(&foreign.target(8081)).await.unwrap();
    tunnel.write(b"request").await.unwrap();
    tunnel.finish().unwrap();
    assert_eq!(
        tunnel.read_to_end().await.unwrap(),
        traffic::receipt(b"request"),
        "half-close"
    );

    let mut tunnel = talk.client.tunnel(&foreign.target(8082)).await.unwrap();
    tunnel.write(b"x").await.unwrap();
    assert_eq!(tunnel.reset().await.unwrap(), h2::Reason::CONNECT_ERROR);
    talk.carries(b"the connection stays").await;

    let mut tunnel = talk.tunnel().await;
    tunnel.ping(b"once").await.unwrap();
    let log = talk.cluster.proxy(0).log();
    let mark = log.mark();
    tunnel.send.send_reset(h2::Reason::CANCEL);
    drop(tunnel);
    let line = log
        .wait_from(mark, "end", |line| {
            line.is_access("connection complete") && line.field("bytes_recv") == "4"
        })
        .await;
    assert_eq!(
        (line.level.as_str(), line.field("error")),
        ("info", ""),
        "CANCEL is a graceful end"
    );
    assert_eq!((sink.peers().len(), rude.peers().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_stream_does_not_stop_its_neighbour() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let _stall = foreign.api.serve(8081, Behaviour::Stall).unwrap();
    let mut stalled = talk.client.tunnel(&foreign.target(8081)).await.unwrap();
    let flood = traffic::pattern(16 << 20);
    let filled = tokio::time::timeout(Duration::from_secs(2), stalled.write(&flood)).await;
    assert!(filled.is_err(), "back-pressure does not reach the client");
    talk.carries(&traffic::pattern(2 << 20)).await;
}

#[tokio::test]
async fn a_client_that_answers_no_ping_is_dropped() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let mut wire = foreign.wire().await;
    wire.headers(
        1,
        &[
            (":method", "CONNECT"),
            (":authority", &foreign.target(8080)),
        ],
    )
    .await
    .unwrap();
    wire.until(|frame| frame.stream == 1 && frame.kind == kind::HEADERS)
        .await
        .unwrap();
    app.accepted(1).await;
    let dropped = async {
        let mut pings = 0;
        while let Ok(frame) = wire.next_within(Duration::from_secs(30)).await {
            pings += usize::from(frame.kind == kind::PING);
        }
        pings
    };
    let pings = wait::within(Duration::from_secs(40), "the proxy drops the peer", dropped).await;
    assert_eq!(pings, 1);
}

#[tokio::test]
async fn ipv6_pods_are_served_alike() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let app = foreign.api.serve(8080, Behaviour::Whoami).unwrap();
    let hello = foreign.hello();
    let client = RawClient::connect(foreign.peer.netns(), foreign.api.at6(15008), &hello)
        .await
        .unwrap();
    assert_eq!(
        client.status(&foreign.target(8080)).await.unwrap(),
        400,
        "its other address is not where the tunnel ends"
    );
    let tunnel = client
        .tunnel(&foreign.api.at6(8080).to_string())
        .await
        .unwrap();
    assert_eq!(tunnel.status.as_u16(), 200);
    assert_eq!(app.accepted(1).await[0].ip(), foreign.peer.ip6());
}

#[tokio::test]
async fn a_connection_of_age_takes_no_new_streams_and_ends_with_its_last() {
    let foreign = ForeignClient::new().unwrap();
    let settings = [("HBONE_MAX_AGE", "3s")];
    let cluster = foreign.cluster_with(&settings).await.unwrap();
    let mut talk = foreign.talk_over(cluster, Behaviour::Echo).await;
    let mut open = talk.tunnel().await;
    open.ping(b"young").await.unwrap();
    let goaway = |frame: &Frame| frame.kind == kind::GOAWAY;
    let told = talk.client.frames.wait("no more streams", goaway).await;
    assert_eq!(told.error_code(), Some(0), "in peace");
    // What is open goes on, and what is new takes a new connection.
    open.ping(b"of age").await.unwrap();
    let young = foreign.client().await;
    let mut other = young.tunnel(&talk.target).await.unwrap();
    other.ping(b"elsewhere").await.unwrap();
    assert!(talk.client.tunnel(&talk.target).await.is_err());
    open.finish().unwrap();
    open.read_to_end().await.unwrap();
    drop(open);
    talk.client.ended(Duration::from_secs(5)).await.unwrap();
    other.ping(b"still there").await.unwrap();
}

use std::{io::Read, net::SocketAddr, time::Duration};

use prometheus_client::{
    collector::Collector, encoding::DescriptorEncoder, metrics::counter::Counter,
    registry::Registry,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::*;
use crate::{
    admin::http1::bind,
    admin::serve_readiness,
    telemetry::{Labels, Party, Readiness, Reporter, ResponseFlag, Security, ServiceName, Traffic},
};

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

/// Sends `request`, reads to the end of the connection, takes chunks apart.
async fn ask(to: SocketAddr, request: &str) -> Answer {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap(); // a half-closed client is still answered
    let mut all = Vec::new();
    let read = stream.read_to_end(&mut all);
    timeout(Duration::from_secs(30), read)
        .await
        .unwrap()
        .unwrap();
    let split = all
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .expect("a head");
    let head = String::from_utf8(all[..split].to_vec())
        .unwrap()
        .to_lowercase();
    let mut body = all[split + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = unchunk(&body);
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body }
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = rest
            .windows(2)
            .position(|w| w == b"\r\n")
            .expect("a chunk size");
        let size = std::str::from_utf8(&rest[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
    }
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")
}

/// A server that ends with its test.
struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinSet<()>,
}

fn start<F: Future<Output = ()> + Send + 'static>(
    serve: impl FnOnce(TcpListener, CancellationToken) -> F,
) -> Server {
    let listener = bind(0, false).unwrap();
    let port = listener.local_addr().unwrap().port();
    let stop = CancellationToken::new();
    let mut task = JoinSet::new();
    task.spawn(serve(listener, stop.clone()));
    Server {
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        stop,
        task,
    }
}

fn stats(registry: Registry) -> Server {
    stats_with(registry, Traffic::default())
}

fn stats_with(registry: Registry, traffic: Traffic) -> Server {
    let exposition = Exposition::new(registry, traffic);
    start(|listener, stop| serve_stats(listener, exposition, stop))
}

fn counters(n: usize) -> Registry {
    let mut registry = Registry::default();
    for i in 0..n {
        registry.register(
            format!("culvert_test_{i}"),
            "A counter",
            Counter::<u64>::default(),
        );
    }
    registry
}

#[tokio::test]
async fn both_paths_answer_the_same_text_and_others_are_not_found() {
    let server = stats(counters(1));
    let expected = "# HELP culvert_test_0 A counter.\n# TYPE culvert_test_0 counter\nculvert_test_0_total 0\n# EOF\n";
    for path in ["/metrics", "/stats/prometheus", "/metrics?x=y"] {
        let answer = ask(server.address, &get(path, "")).await;
        assert_eq!(answer.status, 200);
        assert!(
            answer
                .head
                .contains("content-type: text/plain; charset=utf-8"),
            "{}",
            answer.head
        );
        assert_eq!(String::from_utf8(answer.body).unwrap(), expected);
    }
    for path in ["/", "/metrics/", "/stats"] {
        let answer = ask(server.address, &get(path, "")).await;
        assert_eq!((answer.status, answer.body.len()), (404, 0));
        assert!(!answer.head.contains("content-type"), "{}", answer.head);
    }
}

#[tokio::test]
async fn a_large_exposition_is_the_same_plain_and_compressed() {
    let server = stats(counters(5_000));
    let plain = ask(server.address, &get("/metrics", "")).await;
    assert!(!plain.head.contains("content-encoding"), "{}", plain.head);
    assert!(plain.body.len() > 10 * CHUNK_BYTES && plain.body.ends_with(b"\n# EOF\n"));
    for (accepted, encoding) in [("br, gzip", "gzip"), ("deflate", "deflate")] {
        let headers = format!("accept-encoding: {accepted}\r\n");
        let packed = ask(server.address, &get("/metrics", &headers)).await;
        let expected = format!("content-encoding: {encoding}");
        assert!(packed.head.contains(&expected), "{}", packed.head);
        assert!(packed.body.len() < plain.body.len() / 4);
        let mut unpacked = Vec::new();
        match encoding {
            "gzip" => flate2::read::GzDecoder::new(&*packed.body).read_to_end(&mut unpacked),
            _ => flate2::read::ZlibDecoder::new(&*packed.body).read_to_end(&mut unpacked),
        }
        .unwrap();
        assert!(unpacked == plain.body, "identity and {encoding} differ");
    }
}

/// A table of so many series, each with a flow that has ended.
fn traffic(series: usize) -> Traffic {
    let traffic = Traffic::default();
    for name in 0..series {
        open_and_close(&traffic, &format!("client-{name}"));
    }
    traffic
}

fn open_and_close(traffic: &Traffic, client: &str) {
    let meter = traffic.open(&Labels {
        reporter: Reporter::Source,
        security: Security::MutualTls,
        source: Party::identified(client),
        destination: Party::default(),
        service: ServiceName::default(),
    });
    meter.close(ResponseFlag::None);
}

#[tokio::test]
async fn scrapers_that_do_not_read_hold_up_nobody() {
    let traffic = traffic(5_000);
    let server = stats_with(counters(1), traffic.clone());
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = get("/metrics", "");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut start = [0; 15];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200 OK");
        stalled.push(stream);
    }
    // All twenty are in the middle of their answers: no lock of the table is held meanwhile.
    open_and_close(&traffic, "a new one");
    let whole = ask(
        server.address,
        &get("/metrics", "accept-encoding: gzip\r\n"),
    )
    .await;
    let mut text = String::new();
    let mut decoder = flate2::read::GzDecoder::new(&*whole.body);
    decoder.read_to_string(&mut text).unwrap();
    assert_eq!(
        text.matches("istio_tcp_connections_closed_total{").count(),
        5_001
    );
    // And they can read on.
    let mut rest = Vec::new();
    let reading = stalled[19].read_to_end(&mut rest);
    timeout(Duration::from_secs(30), reading)
        .await
        .unwrap()
        .unwrap();
    assert!(String::from_utf8_lossy(&rest).contains("# EOF"));
}

#[test]
fn content_type_and_encoding_follow_the_request() {
    const OPEN: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";
    const PLAIN: &str = "text/plain; charset=utf-8";
    let cases: &[(&[&str], &[&str], &str, Encoding)] = &[
        (&[], &[], PLAIN, Encoding::Identity),
        (
            &["application/openmetrics-text;version=1.0.0,text/plain;q=0.5"],
            &["gzip"],
            OPEN,
            Encoding::Gzip,
        ),
        (
            &["text/html, Application/OpenMetrics-Text"],
            &["deflate, GZIP;q=0.5"],
            OPEN,
            Encoding::Gzip,
        ),
        (
            &["text/plain", "application/openmetrics-text"],
            &["br", "gzip"],
            OPEN,
            Encoding::Gzip,
        ),
        (
            &["application/openmetrics-text2"],
            &["zstd"],
            PLAIN,
            Encoding::Identity,
        ),
        (&[], &["zstd, deflate, gzip;q=0"], PLAIN, Encoding::Deflate),
        (
            &["*/*"],
            &["gzip;q=0.000, identity"],
            PLAIN,
            Encoding::Identity,
        ),
    ];
    for (accept, encodings, content_type, encoding) in cases {
        let mut headers = HeaderMap::new();
        for value in *accept {
            headers.append(ACCEPT, HeaderValue::from_static(value));
        }
        for value in *encodings {
            headers.append(ACCEPT_ENCODING, HeaderValue::from_static(value));
        }
        let expected = Shape {
            content_type,
            encoding: *encoding,
        };
        assert_eq!(Shape::of(&headers), expected, "{headers:?}");
    }
}

#[tokio::test]
async fn a_failing_collector_is_an_internal_error() {
    #[derive(Debug)]
    struct Failing;
    impl Collector for Failing {
        fn encode(&self, _: DescriptorEncoder<'_>) -> fmt::Result {
            Err(fmt::Error)
        }
    }
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Failing));
    let server = stats(registry);
    let answer = ask(server.address, &get("/metrics", "")).await;
    assert_eq!(answer.status, 500);
    assert!(!answer.body.is_empty());
}

#[tokio::test]
async fn readiness_lists_what_is_pending() {
    let readiness = Readiness::new();
    let pods = readiness.task("workload proxy manager");
    let state = readiness.task("state manager");
    let server = start(|listener, stop| serve_readiness(listener, readiness, stop));
    let ready = || {
        ask(
            server.address,
            "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        )
    };
    let answer = ready().await;
    assert_eq!(answer.status, 500);
    assert_eq!(
        answer.body,
        b"not ready, pending: state manager, workload proxy manager\n"
    );
    state.ready();
    assert_eq!(
        ready().await.body,
        b"not ready, pending: workload proxy manager\n"
    );
    pods.ready();
    let answer = ready().await;
    assert_eq!(
        (answer.status, answer.body.as_slice()),
        (200, b"ready\n".as_slice())
    );
    assert!(
        answer.head.contains("content-type: text/plain"),
        "{}",
        answer.head
    );
    pods.pending();
    assert_eq!(ready().await.status, 500);
    for (method, path, status) in [
        ("HEAD", "/healthz/ready", 405),
        ("POST", "/healthz/ready", 405),
        ("GET", "/healthz/ready/", 404),
        ("POST", "/", 404),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = ask(server.address, &request).await;
        assert_eq!(
            (answer.status, answer.body.len()),
            (status, 0),
            "{method} {path}"
        );
        assert!(!answer.head.contains("content-type"), "{}", answer.head);
    }
}

/// How long `server` keeps a connection on which `sent` was sent and nothing follows.
async fn kept(server: &Server, sent: &[u8]) -> Duration {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(sent).await.unwrap();
    let start = Instant::now();
    let mut answer = Vec::new();
    let end = timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    // A reset is an end as well.
    drop(end.expect("the server closes the connection"));
    start.elapsed()
}

#[tokio::test]
async fn silent_slow_and_idle_connections_end_soon() {
    let server = stats(counters(1));
    let idle = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
    let (silent, slow, idle) = tokio::join!(
        kept(&server, b""),
        kept(&server, b"GET /metrics HTTP/1.1\r\nhos"),
        kept(&server, idle),
    );
    for took in [silent, slow, idle] {
        let expected = Duration::from_millis(1_800)..Duration::from_secs(6);
        assert!(expected.contains(&took), "{took:?}");
    }
}

#[tokio::test]
async fn an_endless_head_and_garbage_are_cut() {
    let server = stats(counters(1));
    for garbage in [
        vec![b'A'; 64 << 10],
        b"\x16\x03\x01\x00\xa5\x01\x00".to_vec(),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // The server may close before all is sent.
        let _ = stream.write_all(&garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        drop(
            timeout(Duration::from_secs(10), read)
                .await
                .expect("an end"),
        );
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
    assert_eq!(ask(server.address, &get("/metrics", "")).await.status, 200);
}

#[tokio::test]
async fn stopping_closes_the_listener_and_ends() {
    let mut server = stats(counters(1));
    assert_eq!(ask(server.address, &get("/metrics", "")).await.status, 200);
    let _idle = TcpStream::connect(server.address).await.unwrap();
    server.stop.cancel();
    let ended = timeout(Duration::from_secs(10), server.task.join_next()).await;
    assert!(matches!(ended, Ok(Some(Ok(())))), "{ended:?}");
    TcpStream::connect(server.address)
        .await
        .expect_err("nobody listens");
}

//! Peers of the HBONE port that misbehave, each followed by normal traffic through the same proxy, with memory bounded and no panic
//! ([`Calm::unharmed`]). `bad_neighbours.rs` has the other half.
//!
//! |  | Who | What becomes of it |
//! |---|---|---|
//! | 1 | silent, by hundreds | its own handshakes give way |
//! | 2 | with half a `ClientHello`, or garbage in its place | the same |
//! | 3 | without certificate, or with one of another root | refused |
//! | 4 | past TLS, with HTTP/1, a wrong preface, or none | closed |
//! | 5 | opens streams and resets them in one go | GOAWAY |
//! | 6 | opens streams, waits, and resets them, on and on | GOAWAY |
//! | 7 | never ends its header list | GOAWAY |
//! | 8 | SETTINGS and nothing else | GOAWAY |
//! | 9 | PING and nothing else | GOAWAY |
//! | 10 | empty DATA | GOAWAY |
//! | 11 | updates of windows that nothing used | GOAWAY |
//! | 12 | frames of unknown types and PRIORITY | GOAWAY |
//! | 13 | headers of a megabyte | refused, or GOAWAY |
//! | 14 | ten thousand CONNECTs on one connection | those beyond the limit are refused |
//! | 15 | CONNECTs to where nobody may go | refused |
//! | 16 | a window of zero, for ever | holds what was read from the application |
//! | 17 | reads nothing from its socket | the same |
//! | 18 | one byte in each frame | carried |
//! | 19 | ends its side of hundreds of streams, and stays | they are kept |
//! | 33 | one byte in each frame, to who never reads | GOAWAY, and their memory comes back |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use testkit::{
    Authority,
    raw::{
        Hello, Wire,
        frames::{ACK, END_HEADERS, Frame, block, encode, kind, setting},
    },
    stage::{Calm, ForeignClient},
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};

/// `ENHANCE_YOUR_CALM`
const CALM: u32 = 11;

/// A GOAWAY that arrives says why.
fn told(code: Option<u32>) {
    assert!(code.is_none_or(|code| code == CALM), "{code:?}");
}

fn connect(stream: u32, authority: &str) -> Vec<u8> {
    let fields = [(":method", "CONNECT"), (":authority", authority)];
    encode(kind::HEADERS, END_HEADERS, stream, &block(&fields))
}

fn reset(stream: u32) -> Vec<u8> {
    encode(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8])
}

async fn connections(foreign: &ForeignClient, count: usize) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..count {
        open.push(foreign.peer.connect(foreign.hbone()).await.unwrap());
    }
    open
}

#[tokio::test]
async fn n01_silent_clients_make_room_for_others() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let _silent = connections(&foreign, 600).await;
    calm.hit("handshakes_per_peer").await;
    calm.unharmed().await;
}

#[tokio::test]
async fn n02_half_a_handshake_is_none() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let mut open = connections(&foreign, 150).await;
    // The head of a record of 512 bytes with a ClientHello of 508, and a little of it.
    let half = [0x16, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 7, 7, 7];
    let many_records = [0x16, 3, 1, 0, 1, 0].repeat(20_000);
    for (index, stream) in open.iter_mut().enumerate() {
        let garbage = traffic::pattern(20_000);
        let bytes: &[u8] = [&half[..], &many_records, &garbage][index % 3];
        let _refused_while_writing = stream.write_all(bytes).await;
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n03_strangers_are_refused() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let other = Authority::new("other").unwrap();
    let other = other.issue(&foreign.peer.spiffe_id()).unwrap();
    for _ in 0..50 {
        for hello in [Hello::anonymous(), Hello::new(&other)] {
            assert!(foreign.try_client(&hello).await.is_err());
        }
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n04_other_protocols_behind_tls_are_closed() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let no_preface = connect(1, "a:1");
    let long_line = [b"GET /", vec![b'x'; 100_000].as_slice()].concat();
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r!".as_slice(),
        &no_preface,
        &long_line,
        &[0xff; 4096],
    ] {
        let mut stream = foreign.tls().await;
        let _closed_while_writing = stream.write_all(bytes).await;
        let mut rest = Vec::new();
        let end = wait::soon("the proxy closes", stream.read_to_end(&mut rest));
        let _eof_or_error = end.await;
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n05_streams_that_are_reset_at_once_end_the_connection() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let pair = |n: u32| [connect(2 * n + 1, "a:1"), reset(2 * n + 1)].concat();
    let flood: Vec<u8> = (0..10_000).flat_map(pair).collect();
    told(calm.flood(&flood).await);
    calm.hit("http2").await;
    calm.unharmed().await;
}

#[tokio::test]
async fn n06_resets_without_end_do_too() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[("HTTP2_MAX_RESETS", "20")]).await;
    let application = calm.application().to_string();
    let mut wire = foreign.wire().await;
    let mut last = None;
    for stream in (1..=401).step_by(2) {
        wire.stream
            .write_all(&connect(stream, &application))
            .await
            .unwrap();
        let answer = wire.until(|frame| frame.stream == stream || frame.kind == kind::GOAWAY);
        let answer = answer.await.unwrap();
        assert_eq!(answer.kind, kind::HEADERS);
        last = Some(wire.stream.write_all(&reset(stream)).await);
    }
    assert!(last.is_some_and(|written| written.is_ok()));
    let goaway = wire.until(|frame| frame.kind == kind::GOAWAY).await;
    assert_eq!(goaway.unwrap().error_code(), Some(CALM));
    calm.hit("resets").await;
    calm.unharmed().await;
}

#[tokio::test]
async fn n07_a_header_list_that_never_ends_is_not_waited_for() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let begin = encode(kind::HEADERS, 0, 1, &block(&[(":method", "CONNECT")]));
    let empty = encode(kind::CONTINUATION, 0, 1, &[]);
    let full = encode(kind::CONTINUATION, 0, 1, &block(&[("x", "y")]).repeat(3000));
    for more in [empty, full] {
        let flood = [begin.clone(), more.repeat(1000)].concat();
        told(calm.flood(&flood).await);
    }
    calm.hit("http2").await;
    calm.unharmed().await;
}

/// Sends so many of a frame on a connection, which ends for it, while another one goes on.
async fn flood(frame: &[u8], limit: &str) {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let other = foreign.client().await;
    let application = calm.application().to_string();
    let mut lasting = other.tunnel(&application).await.unwrap();
    let flood = [&connect(1, &application), &*frame.repeat(50_000)].concat();
    told(calm.flood(&flood).await);
    calm.hit(limit).await;
    lasting.ping(b"not my fault").await.unwrap();
    calm.unharmed().await;
}

#[tokio::test]
async fn n08_settings_without_end_end_the_connection() {
    let window = [
        &setting::INITIAL_WINDOW_SIZE.to_be_bytes()[..],
        &[0, 1, 0, 0],
    ]
    .concat();
    flood(&encode(kind::SETTINGS, 0, 0, &window), "control_frames").await;
}

#[tokio::test]
async fn n09_so_do_pings() {
    let ping = encode(kind::PING, 0, 0, &[7; 8]);
    let pong = encode(kind::PING, ACK, 0, &[7; 8]);
    flood(&[ping, pong].concat(), "control_frames").await;
}

#[tokio::test]
async fn n10_so_does_empty_data() {
    flood(&encode(kind::DATA, 0, 1, &[]), "http2").await;
}

#[tokio::test]
async fn n11_so_do_updates_of_windows_that_nothing_used() {
    let one = encode(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]);
    let all = encode(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
    flood(&[one, all].concat(), "control_frames").await;
}

#[tokio::test]
async fn n12_so_do_frames_that_mean_nothing() {
    const PRIORITY: u8 = 2;
    let priority = encode(PRIORITY, 0, 1, &[0, 0, 0, 3, 16]);
    let unknown = encode(0x77, 0xff, 99, b"what?");
    flood(&[priority, unknown].concat(), "control_frames").await;
}

#[tokio::test]
async fn n13_giant_headers_are_refused() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let application = calm.application().to_string();
    let client = foreign.client().await;
    let giant = "x".repeat(200_000);
    for _ in 0..20 {
        let headers = [("baggage", giant.as_str())];
        let asked = client.tunnel_with(&application, &headers);
        if let Ok(answer) = asked.await {
            assert_eq!(answer.status.as_u16(), 431);
        }
    }
    calm.hit("header_bytes").await;
    calm.unharmed().await;
}

#[tokio::test]
async fn n14_ten_thousand_requests_at_once_are_two_hundred_and_refusals() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let target = foreign.target(8081);
    let stalled = foreign.api.serve(8081, Behaviour::Stall).unwrap();
    let requests: Vec<u8> = (0..10_000)
        .flat_map(|n| connect(2 * n + 1, &target))
        .collect();
    // The library takes a thousand errors on streams from a peer, and no more.
    told(calm.flood(&requests).await);
    for limit in ["streams", "http2"] {
        calm.hit(limit).await;
    }
    assert!(stalled.peers().len() <= 200, "{}", stalled.peers().len());
    calm.unharmed().await;
}

#[tokio::test]
async fn n15_nobody_goes_where_nobody_may() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let client = foreign.client().await;
    let targets =
        [15000, 15001, 15006, 15008, 15020, 15021, 15053, 15080].map(|p| foreign.target(p));
    let elsewhere = [
        "127.0.0.1:15000",
        "[::1]:15000",
        "169.254.169.254:80",
        "0.0.0.0:8080",
        "localhost:8080",
        "a:0",
    ];
    for _ in 0..10 {
        for target in targets.iter().map(String::as_str).chain(elsewhere) {
            let status = client.status(target).await.unwrap();
            assert!([400, 401, 404, 503].contains(&status), "{target}: {status}");
        }
    }
    calm.unharmed().await;
}

/// A client that asks the application for much on many streams, and takes nothing of it.
async fn greedy(foreign: &ForeignClient, window: u32) -> Wire<impl Sized> {
    let mut wire = foreign.wire().await;
    let size = [
        &setting::INITIAL_WINDOW_SIZE.to_be_bytes()[..],
        &window.to_be_bytes(),
    ]
    .concat();
    wire.send(kind::SETTINGS, 0, 0, &size).await.unwrap();
    let more = (1_u32 << 30).to_be_bytes();
    wire.send(kind::WINDOW_UPDATE, 0, 0, &more).await.unwrap();
    let target = foreign.target(8081);
    for stream in 0..100 {
        let request = connect(2 * stream + 1, &target);
        wire.stream.write_all(&request).await.unwrap();
    }
    wire
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn n16_a_window_that_never_opens_holds_little() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let source = foreign.api.serve(8081, Behaviour::Source(1 << 20)).unwrap();
    let _held = greedy(&foreign, 0).await;
    source.accepted(100).await;
    calm.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn n17_so_does_a_reader_that_never_reads() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let source = foreign.api.serve(8081, Behaviour::Source(1 << 20)).unwrap();
    let _held = greedy(&foreign, 1 << 30).await;
    source.accepted(100).await;
    calm.unharmed().await;
}

#[tokio::test]
async fn n18_single_bytes_are_carried() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let _sink = foreign.api.serve(8081, Behaviour::Sink).unwrap();
    let client = foreign.client().await;
    let mut tunnel = client.tunnel(&foreign.target(8081)).await.unwrap();
    let bytes = traffic::pattern(30_000);
    for byte in bytes.chunks(1) {
        tunnel.write(byte).await.unwrap();
    }
    tunnel.finish().unwrap();
    let receipt = tunnel.read_to_end().await.unwrap();
    assert_eq!(receipt, traffic::receipt(&bytes));
    calm.unharmed().await;
}

#[tokio::test]
async fn n19_streams_that_are_half_closed_for_ever_are_kept() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let stalled = foreign.api.serve(8081, Behaviour::Stall).unwrap();
    let (mut clients, mut tunnels) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let client = foreign.client().await;
        for _ in 0..150 {
            let mut tunnel = client.tunnel(&foreign.target(8081)).await.unwrap();
            tunnel.finish().unwrap();
            tunnels.push(tunnel);
        }
        clients.push(client);
    }
    assert_eq!(stalled.accepted(300).await.len(), 300);
    calm.unharmed().await;
}

/// Sends on stream 1 until neither the application nor what lies before it takes more; at most 8 MiB.
async fn fill<S: AsyncRead + AsyncWrite + Unpin>(wire: &mut Wire<S>) {
    const CHUNK: usize = 16 << 10;
    // What SETTINGS announce holds for who has acknowledged them.
    wire.send(kind::SETTINGS, ACK, 0, &[]).await.unwrap();
    let mut window = 4 << 20;
    while window >= 64 * CHUNK {
        for _ in 0..32 {
            let chunk = encode(kind::DATA, 0, 1, &[0; CHUNK]);
            wire.stream.write_all(&chunk).await.unwrap();
            window -= CHUNK;
        }
        while let Ok(frame) = wire.next_within(Duration::from_millis(300)).await {
            let more = frame.increment().filter(|_| frame.stream == 1);
            window += more.map_or(0, |more| more as usize);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn n33_single_bytes_that_nobody_reads_are_held_within_bounds() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let stalled = foreign.api.serve(8081, Behaviour::Stall).unwrap();
    let mut wire = foreign.wire().await;
    let request = connect(1, &foreign.target(8081));
    wire.stream.write_all(&request).await.unwrap();
    stalled.accepted(1).await;
    fill(&mut wire).await;
    let before = calm.proxy().resident_bytes().unwrap();
    let bytes = encode(kind::DATA, 0, 1, b"x").repeat(1000);
    let mut most = before;
    // They would fit into what is left of the window.
    for _ in 0..200 {
        if wire.stream.write_all(&bytes).await.is_err() {
            break;
        }
        most = most.max(calm.proxy().resident_bytes().unwrap());
    }
    let goaway = |frame: &Frame| frame.kind == kind::GOAWAY;
    // A reset may be faster.
    told(
        wire.until(goaway)
            .await
            .ok()
            .and_then(|end| end.error_code()),
    );
    most = most.max(calm.proxy().resident_bytes().unwrap());
    calm.hit("http2").await;
    // The library's table takes 33 MB at last, and for a moment as much again where it grew from.
    assert!(most < before + (80 << 20), "{before}, then {most}");
    calm.unharmed().await;
}

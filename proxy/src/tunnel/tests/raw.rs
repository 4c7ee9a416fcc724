//! Against peers that speak in bytes.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    telemetry::{Limit, Limits},
    tunnel::{
        Cut, Host, Incoming, ServeError,
        client::handshake,
        serve,
        testing::{Tasks, client, echo, request, serve_in, soon},
    },
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn frame(io: &mut DuplexStream) -> Frame {
    let mut head = [0; 9];
    soon(io.read_exact(&mut head)).await.unwrap();
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let mut payload = vec![0; length];
    io.read_exact(&mut payload).await.unwrap();
    Frame {
        kind: head[3],
        flags: head[4],
        stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
        payload,
    }
}

/// The next frame of `kind`.
async fn next(io: &mut DuplexStream, kind: u8) -> Frame {
    loop {
        let frame = frame(io).await;
        if frame.kind == kind {
            return frame;
        }
    }
}

fn settings(frame: &Frame) -> Vec<(u16, u32)> {
    let pair = |chunk: &[u8]| {
        let value = u32::from_be_bytes([chunk[2], chunk[3], chunk[4], chunk[5]]);
        (u16::from_be_bytes([chunk[0], chunk[1]]), value)
    };
    let mut all: Vec<_> = frame.payload.chunks(6).map(pair).collect();
    all.sort_unstable();
    all
}

#[tokio::test]
async fn a_server_announces_the_agreed_settings_and_window() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    peer.write_all(&[PREFACE, EMPTY_SETTINGS].concat())
        .await
        .unwrap();
    let first = frame(&mut peer).await;
    assert_eq!((first.kind, first.flags, first.stream), (SETTINGS, 0, 0));
    let expected = [(3, 200), (4, 4_194_304), (5, 1_048_576), (6, 65_536)];
    assert_eq!(settings(&first), expected);
    let window = next(&mut peer, WINDOW_UPDATE).await;
    assert_eq!(
        (window.stream, window.payload),
        (0, 16_711_681_u32.to_be_bytes().to_vec())
    );
}

#[tokio::test]
async fn a_client_announces_the_agreed_settings_and_window() {
    let tasks = Tasks::default();
    let (mut peer, near) = duplex(64 << 10);
    tasks.spawn(async move {
        let _ = handshake(near, &config::Tunnel::default()).await;
    });
    let mut preface = [0; 24];
    soon(peer.read_exact(&mut preface)).await.unwrap();
    assert_eq!(preface, PREFACE);
    let first = frame(&mut peer).await;
    assert_eq!((first.kind, first.flags), (SETTINGS, 0));
    let expected = [(2, 0), (4, 4_194_304), (5, 1_048_576), (6, 16_384)];
    assert_eq!(settings(&first), expected);
    let window = next(&mut peer, WINDOW_UPDATE).await;
    assert_eq!(
        (window.stream, window.payload),
        (0, 16_711_681_u32.to_be_bytes().to_vec())
    );
}

#[tokio::test]
async fn connect_with_a_scheme_is_a_stream_error() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    peer.write_all(&[PREFACE, EMPTY_SETTINGS].concat())
        .await
        .unwrap();
    // :method CONNECT, :scheme http, :authority a:1; END_HEADERS
    let block = b"\x02\x07CONNECT\x86\x01\x03a:1";
    let length = u8::try_from(block.len()).unwrap();
    let head = [0, 0, length, 1, 4, 0, 0, 0, 1];
    peer.write_all(&[&head, &block[..]].concat()).await.unwrap();
    let reset = next(&mut peer, RST_STREAM).await;
    assert_eq!(
        (reset.stream, reset.payload),
        (1, vec![0, 0, 0, 1]),
        "PROTOCOL_ERROR"
    );
}

#[tokio::test]
async fn a_flood_of_resets_ends_the_connection() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    let mut flood = [PREFACE, EMPTY_SETTINGS].concat();
    let block = b"\x02\x07CONNECT\x01\x03a:1";
    for stream in (1..200).step_by(2) {
        flood.extend([
            0,
            0,
            u8::try_from(block.len()).unwrap(),
            1,
            4,
            0,
            0,
            0,
            stream,
        ]);
        flood.extend(block);
        flood.extend([0, 0, 4, RST_STREAM, 0, 0, 0, 0, stream, 0, 0, 0, 8]);
    }
    peer.write_all(&flood).await.unwrap();
    let goaway = next(&mut peer, GOAWAY).await;
    assert_eq!(goaway.payload[4..8], [0, 0, 0, 11], "ENHANCE_YOUR_CALM");
}

/// HEADERS of a CONNECT to a:1.
fn connect(stream: u8) -> Vec<u8> {
    let block = b"\x02\x07CONNECT\x01\x03a:1";
    let length = u8::try_from(block.len()).unwrap();
    [&[0, 0, length, HEADERS, 4, 0, 0, 0, stream], &block[..]].concat()
}

/// Accepts a stream, and does nothing with it.
async fn held(incoming: Incoming) {
    let _stream = incoming.responder.accept(None);
    std::future::pending::<()>().await;
}

/// Carries nothing, and keeps what it hears of limits.
struct Limited(Limits);

impl Host for Limited {
    fn carry(&self, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static {
        held(incoming)
    }

    fn limited(&self, limit: Limit) {
        self.0.hit(limit, &"peer");
    }
}

#[tokio::test]
async fn streams_and_headers_beyond_the_limits_are_counted_while_the_connection_goes_on() {
    let limits = Limits::default();
    let (tasks, host) = (Tasks::default(), Limited(limits.clone()));
    let (mut peer, far) = duplex(64 << 10);
    tasks.spawn(async move {
        let config = config::Tunnel {
            server_max_streams: 3,
            server_max_header_bytes: 4096,
            ..config::Tunnel::default()
        };
        let _ = serve(far, &config, CancellationToken::new(), Cut::never(), host).await;
    });
    // A literal field without a name of 126 times x, as often as it takes to exceed the list.
    let field = [&[0, 1, b'n', 126][..], &[b'x'; 126]].concat();
    let block = [&b"\x02\x07CONNECT\x01\x03a:1"[..], &field.repeat(40)].concat();
    let [.., high, low] = block.len().to_be_bytes();
    let long = [&[0, high, low, HEADERS, 4, 0, 0, 0, 3], &*block].concat();
    let malformed = b"\x00\x00\x01\x01\x04\x00\x00\x00\x05\x86";
    let open = [PREFACE, EMPTY_SETTINGS, &connect(1)].concat();
    peer.write_all(&open).await.unwrap();
    assert_eq!(next(&mut peer, HEADERS).await.stream, 1);
    peer.write_all(&long).await.unwrap();
    assert_eq!(next(&mut peer, HEADERS).await.stream, 3, "431");
    assert_eq!(next(&mut peer, RST_STREAM).await.stream, 3);
    peer.write_all(malformed).await.unwrap();
    assert_eq!(next(&mut peer, RST_STREAM).await.stream, 5);
    let streams: Vec<u8> = (7..17).step_by(2).flat_map(connect).collect();
    peer.write_all(&streams).await.unwrap();
    for refused in [11, 13, 15] {
        let reset = next(&mut peer, RST_STREAM).await;
        assert_eq!((reset.stream, reset.payload), (refused, vec![0, 0, 0, 7]));
    }
    let ping = [0, 0, 8, PING, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    peer.write_all(&ping).await.unwrap();
    next(&mut peer, PING).await;
    let hits = || [Limit::HeaderBytes, Limit::Streams, Limit::Http2].map(|one| limits.hits(one));
    assert_eq!(hits(), [1, 3, 0]);
    // Also what is refused in the turn in which the connection breaks.
    peer.write_all(&[connect(17), connect(17)].concat())
        .await
        .unwrap();
    let goaway = next(&mut peer, GOAWAY).await;
    assert_eq!(goaway.payload[4..8], [0, 0, 0, 1], "PROTOCOL_ERROR");
    assert_eq!(soon(peer.read(&mut [0; 9])).await.unwrap(), 0);
    assert_eq!(hits(), [1, 4, 0]);
}

#[tokio::test]
async fn streams_that_arrive_while_a_drain_begins_are_served() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    let stop = CancellationToken::new();
    serve_in(&tasks, far, &stop, echo);
    let open = [PREFACE, EMPTY_SETTINGS, &connect(1)].concat();
    peer.write_all(&open).await.unwrap();
    assert_eq!(next(&mut peer, HEADERS).await.stream, 1);
    stop.cancel();
    let goaway = next(&mut peer, GOAWAY).await;
    assert_eq!(
        goaway.payload[..4],
        [0x7f, 0xff, 0xff, 0xff],
        "none is lost yet"
    );
    let ping = next(&mut peer, PING).await;
    // Sent by a client that has not heard of the drain: before the answer to the PING.
    peer.write_all(&connect(3)).await.unwrap();
    let answer = next(&mut peer, HEADERS).await;
    assert_eq!(
        (answer.stream, &answer.payload[..]),
        (3, &[0x88][..]),
        "200"
    );
    let pong = [&[0, 0, 8, PING, 1, 0, 0, 0, 0], &ping.payload[..]].concat();
    peer.write_all(&pong).await.unwrap();
    let last = next(&mut peer, GOAWAY).await;
    assert_eq!(
        last.payload[..4],
        [0, 0, 0, 3],
        "the last stream that is served"
    );
    let data = [0, 0, 1, DATA, 1, 0, 0, 0, 3, b'x'];
    peer.write_all(&data).await.unwrap();
    let echoed = next(&mut peer, DATA).await;
    assert_eq!((echoed.stream, &echoed.payload[..]), (3, &b"x"[..]));
}

#[tokio::test]
async fn streams_get_a_smaller_window_than_was_announced_until_more_is_needed() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    peer.write_all(&[PREFACE, EMPTY_SETTINGS].concat())
        .await
        .unwrap();
    assert!(settings(&next(&mut peer, SETTINGS).await).contains(&(4, 4 << 20)));
    peer.write_all(&[0, 0, 0, SETTINGS, 1, 0, 0, 0, 0])
        .await
        .unwrap();
    let changed = loop {
        let frame = next(&mut peer, SETTINGS).await;
        if frame.flags == 0 {
            break frame;
        }
    };
    assert_eq!(settings(&changed), [(4, 1 << 20)]);
}

#[tokio::test(start_paused = true)]
async fn a_client_without_preface_is_let_go() {
    let (_peer, far) = duplex(64 << 10);
    let config = config::Tunnel::default();
    let end = serve(far, &config, CancellationToken::new(), Cut::never(), echo).await;
    assert!(matches!(end, Err(ServeError::PrefaceTimeout(_))));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_answering_pings_gets_goaway() {
    let tasks = Tasks::default();
    let (mut peer, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    peer.write_all(&[PREFACE, EMPTY_SETTINGS].concat())
        .await
        .unwrap();
    let start = Instant::now();
    let ping = next(&mut peer, PING).await;
    assert_eq!((ping.flags, start.elapsed().as_secs()), (0, 10));
    let goaway = next(&mut peer, GOAWAY).await;
    assert_eq!(goaway.payload[4..8], [0; 4], "NO_ERROR");
    assert_eq!(start.elapsed().as_secs(), 30);
    assert_eq!(soon(peer.read(&mut [0; 9])).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_answering_pings_loses_its_streams() {
    let tasks = Tasks::default();
    let (near, mut peer) = duplex(64 << 10);
    peer.write_all(EMPTY_SETTINGS).await.unwrap();
    let sender = client(&tasks, near).await;
    let start = Instant::now();
    let config = config::Tunnel::default();
    assert!(config.answer_timeout > Duration::from_secs(1));
    let error = loop {
        // Asked again and again, since the answer has a limit of its own.
        let error = sender.connect(&request()).await.unwrap_err();
        if start.elapsed() >= Duration::from_secs(30) {
            break error;
        }
    };
    assert_eq!(start.elapsed().as_secs(), 30, "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_is_alive_though_it_answers_no_ping() {
    let tasks = Tasks::default();
    let (near, mut peer) = duplex(64 << 10);
    peer.write_all(EMPTY_SETTINGS).await.unwrap();
    let _sender = client(&tasks, near).await;
    let start = Instant::now();
    for _ in 0..12 {
        sleep(Duration::from_secs(5)).await;
        peer.write_all(&[0, 0, 0, 0x20, 0, 0, 0, 0, 0])
            .await
            .unwrap();
    }
    let mut all = Vec::new();
    soon(peer.read_to_end(&mut all)).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 90, "20 s without a byte");
}

//! Two sockets and a pump between them.

mod ends;
mod splice;

use std::{
    io::ErrorKind, sync::atomic::AtomicU64, sync::atomic::Ordering::Relaxed, time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{Appetite, Buffers, Count, Ending, Outcome, Side, Socket, pump};

/// Counts both ways.
#[derive(Default)]
struct Tally {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Count for Tally {
    fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// A client and a server with a pump in between, whose outcome and counts the task returns.
async fn relayed(buffers: &Buffers) -> (TcpStream, TcpStream, JoinSet<(Outcome, u64, u64)>) {
    let (client, downstream) = pair().await;
    let (upstream, server) = pair().await;
    let buffers = buffers.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let tally = Tally::default();
        let (downstream, upstream) = (Socket::new(downstream), Socket::new(upstream));
        let outcome = pump(downstream, upstream, &tally, &buffers).await;
        (
            outcome,
            tally.received.into_inner(),
            tally.sent.into_inner(),
        )
    });
    (client, server, tasks)
}

async fn outcome(mut tasks: JoinSet<(Outcome, u64, u64)>) -> (Outcome, u64, u64) {
    let end = tokio::time::timeout(Duration::from_secs(5), tasks.join_next());
    end.await.expect("the pump ends").unwrap().unwrap()
}

#[tokio::test]
async fn half_close_reaches_the_server_and_its_answer_comes_back() {
    let buffers = Buffers::new();
    let (mut client, mut server, tasks) = relayed(&buffers).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    server.write_all(b"long answer").await.unwrap();
    drop(server);
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "long answer");
    let (outcome, received, sent) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Clean), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Downstream);
    assert_eq!((received, sent), (8, 11));
    assert_eq!(buffers.taken(), 0);
}

#[tokio::test]
async fn a_flow_that_is_closed_one_way_is_probed_before_it_is_forgotten() {
    let (mut client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let often = TcpKeepalive::new().with_time(Duration::from_secs(10));
    SockRef::from(&upstream).set_tcp_keepalive(&often).unwrap();
    let (tally, buffers) = (Tally::default(), Buffers::new());
    let (downstream, upstream) = (Socket::new(downstream), Socket::new(upstream));
    let mut flow = pump(downstream, upstream, &tally, &buffers);
    client.shutdown().await.unwrap();
    tokio::select! {
        outcome = &mut flow => panic!("the server has not ended: {outcome:?}"),
        end = server.read_u8() => assert_eq!(end.unwrap_err().kind(), ErrorKind::UnexpectedEof),
    }
    let idle = flow.sockets().map(|socket| {
        let socket = SockRef::from(socket.unwrap());
        socket.tcp_keepalive_time().unwrap().as_secs()
    });
    assert_eq!(
        idle,
        [30, 10],
        "sooner than in a minute, and never later than before"
    );
    let keepalive = flow
        .sockets()
        .map(|socket| SockRef::from(socket.unwrap()).keepalive().unwrap());
    assert_eq!(keepalive, [false, true], "no more than was asked for");
}

#[tokio::test]
async fn a_reset_ends_the_flow_and_names_its_side() {
    let (mut client, server, tasks) = relayed(&Buffers::new()).await;
    client.write_all(b"x").await.unwrap();
    server.readable().await.unwrap();
    SockRef::from(&server)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(server);
    let end = client.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    let (outcome, ..) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Upstream);
}

#[tokio::test]
async fn an_idle_flow_holds_no_buffer() {
    let buffers = Buffers::new();
    let (mut client, mut server, _tasks) = relayed(&buffers).await;
    for _ in 0..3 {
        client.write_all(b"ping").await.unwrap();
        server.read_exact(&mut [0; 4]).await.unwrap();
        server.write_all(b"pong").await.unwrap();
        client.read_exact(&mut [0; 4]).await.unwrap();
        while buffers.taken() > 0 {
            tokio::task::yield_now().await;
        }
    }
    assert!(buffers.kept_bytes() <= 16 << 10, "{buffers:?}");
}

fn byte(position: usize, seed: usize) -> u8 {
    u8::try_from((position * 31 + seed) % 251).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_whole_both_ways_at_once() {
    const BYTES: usize = 8 << 20;
    let (client, server, _tasks) = relayed(&Buffers::new()).await;
    let run = |socket: TcpStream, seed: usize| async move {
        let data: Vec<u8> = (0..BYTES).map(|i| byte(i, seed)).collect();
        let (mut read, mut write) = socket.into_split();
        let sending = async move {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut got = Vec::with_capacity(BYTES);
        tokio::join!(sending, async { read.read_to_end(&mut got).await.unwrap() });
        got
    };
    let (at_client, at_server) = tokio::join!(run(client, 1), run(server, 2));
    assert!(at_server.len() == BYTES && at_client.len() == BYTES);
    assert!((0..BYTES).all(|i| at_server[i] == byte(i, 1)));
    assert!((0..BYTES).all(|i| at_client[i] == byte(i, 2)));
}

#[test]
fn appetite_follows_the_traffic() {
    let mut appetite = Appetite::default();
    assert_eq!(appetite.bytes(), 4 << 10);
    for _ in 0..9 {
        appetite.learn(appetite.bytes(), 64 << 10);
    }
    assert_eq!(appetite.bytes(), 64 << 10, "never beyond the limit");
    appetite.learn(100, 64 << 10);
    assert_eq!(appetite.bytes(), 64 << 10, "one small read is no trend");
    appetite.learn(100, 64 << 10);
    assert_eq!(appetite.bytes(), 16 << 10);
    assert_eq!(Appetite::at_least(20_000).bytes(), 64 << 10);
    assert_eq!(Appetite::at_least(usize::MAX).bytes(), 256 << 10);
}

#[test]
fn trim_frees_what_nobody_needed_since_the_last() {
    let buffers = Buffers::new();
    let many: Vec<_> = (0..10).map(|_| buffers.take(Appetite::default())).collect();
    drop(many);
    assert_eq!(buffers.kept_bytes(), 40 << 10);
    buffers.trim(); // starts the count
    drop([(); 4].map(|()| buffers.take(Appetite::default())));
    buffers.trim();
    assert_eq!(buffers.kept_bytes(), 16 << 10);
}

#[test]
fn the_future_is_small() {
    let size = size_of::<super::Pump<'_, Socket, Socket, Tally>>();
    assert!(size <= 320, "{size} bytes");
}

//! Application sockets on both ends of a tunnel.

use std::{future::poll_fn, io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use crate::{
    relay::{Buffers, Count, Ending, Endpoint, Leave, Outcome, Pump, Socket, pump},
    tunnel::{
        Incoming, Stream,
        testing::{Tasks, client, connected, echo, put, request, serve_in, soon, take},
    },
};

struct Nothing;

impl Count for Nothing {
    fn received(&self, _: u64) {}
    fn sent(&self, _: u64) {}
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// A client socket and a server socket with a whole tunnel in between.
struct World {
    client: TcpStream,
    server: TcpStream,
    /// The outcome of the client's pump, then that of the server's or the other way round.
    outcomes: tokio::sync::mpsc::Receiver<(&'static str, Outcome)>,
    buffers: Buffers,
    _tasks: Tasks,
}

async fn world() -> World {
    let tasks = Tasks::default();
    let buffers = Buffers::new();
    let (near, far) = duplex(256 << 10);
    let (outcome_tx, outcomes) = tokio::sync::mpsc::channel(2);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (pool, tell) = (buffers.clone(), outcome_tx.clone());
    serve_in(
        &tasks,
        far,
        &CancellationToken::new(),
        move |incoming: Incoming| {
            let (pool, tell) = (pool.clone(), tell.clone());
            async move {
                let upstream = TcpStream::connect(address).await.unwrap();
                let stream = incoming.responder.accept(None).unwrap();
                let outcome = pump(stream, Socket::new(upstream), &Nothing, &pool).await;
                tell.send(("server", outcome)).await.unwrap();
            }
        },
    );
    let sender = client(&tasks, near).await;
    let (app, downstream) = pair().await;
    let pool = buffers.clone();
    tasks.spawn(async move {
        let stream = sender.connect(&request()).await.unwrap().stream;
        let outcome = pump(Socket::new(downstream), stream, &Nothing, &pool).await;
        outcome_tx.send(("client", outcome)).await.unwrap();
        std::future::pending::<()>().await; // keeps the connection
    });
    let (server, _) = soon(listener.accept()).await.unwrap();
    World {
        client: app,
        server,
        outcomes,
        buffers,
        _tasks: tasks,
    }
}

fn reset(socket: TcpStream) {
    let linger = Some(Duration::ZERO);
    socket2::SockRef::from(&socket).set_linger(linger).unwrap();
    drop(socket);
}

async fn is_reset(socket: &mut TcpStream) -> bool {
    let end = soon(socket.read(&mut [0; 1])).await;
    end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn an_application_may_half_close_and_still_be_answered() {
    let mut world = world().await;
    world.client.write_all(b"question").await.unwrap();
    world.client.shutdown().await.unwrap();
    let mut text = String::new();
    soon(world.server.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "question");
    world.server.write_all(b"answer").await.unwrap();
    drop(world.server);
    text.clear();
    soon(world.client.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "answer");
    for _ in 0..2 {
        let (_, outcome) = soon(world.outcomes.recv()).await.unwrap();
        assert!(matches!(outcome.ending, Ending::Clean), "{outcome:?}");
    }
    assert_eq!(world.buffers.taken(), 0);
}

#[tokio::test]
async fn a_reset_of_the_server_application_reaches_the_client_as_one() {
    let mut world = world().await;
    world.server.write_all(b"part").await.unwrap();
    let mut part = [0; 4];
    soon(world.client.read_exact(&mut part)).await.unwrap();
    reset(world.server);
    assert!(is_reset(&mut world.client).await);
    let (who, outcome) = soon(world.outcomes.recv()).await.unwrap();
    assert_eq!(who, "server");
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
}

#[tokio::test]
async fn a_reset_of_the_client_application_ends_both_pumps() {
    let mut world = world().await;
    world.client.write_all(b"part").await.unwrap();
    let mut part = [0; 4];
    soon(world.server.read_exact(&mut part)).await.unwrap();
    reset(world.client);
    assert!(is_reset(&mut world.server).await);
    for _ in 0..2 {
        let (who, outcome) = soon(world.outcomes.recv()).await.unwrap();
        assert!(
            !matches!(outcome.ending, Ending::Failed(_)),
            "{who} {outcome:?}"
        );
    }
}

#[tokio::test]
async fn many_resets_leave_the_connection_to_its_other_streams() {
    let tasks = Tasks::default();
    let sender = connected(&tasks, &CancellationToken::new(), echo).await;
    let mut lasting = soon(sender.connect(&request())).await.unwrap().stream;
    let buffers = Buffers::new();
    // The library's peers end a connection for its hundred-and-first empty DATA frame.
    for round in 0..150 {
        let mut stream = soon(sender.connect(&request())).await.unwrap().stream;
        put(&mut stream, "unfinished").await;
        soon(poll_fn(|cx| {
            stream.poll_leave(cx, Leave::Reset, &buffers, false)
        }))
        .await;
        drop(stream);
        put(&mut lasting, "ping").await;
        let answer = soon(take(&mut lasting)).await;
        assert_eq!(answer.unwrap().unwrap(), "ping", "round {round}");
    }
}

fn byte(position: usize, seed: usize) -> u8 {
    u8::try_from((position * 31 + seed) % 251).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_whole_both_ways_at_once() {
    const BYTES: usize = 12 << 20;
    let world = world().await;
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
    let both = async { tokio::join!(run(world.client, 1), run(world.server, 2)) };
    let (at_client, at_server) = soon(both).await;
    assert!(at_server.len() == BYTES && at_client.len() == BYTES);
    assert!((0..BYTES).all(|i| at_server[i] == byte(i, 1)));
    assert!((0..BYTES).all(|i| at_client[i] == byte(i, 2)));
}

#[tokio::test]
async fn an_idle_flow_holds_no_buffer() {
    let mut world = world().await;
    for _ in 0..5 {
        world.client.write_all(b"ping").await.unwrap();
        world.server.read_exact(&mut [0; 4]).await.unwrap();
        world.server.write_all(b"pong").await.unwrap();
        world.client.read_exact(&mut [0; 4]).await.unwrap();
    }
    let idle = async {
        while world.buffers.taken() > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(idle).await;
}

#[tokio::test]
async fn a_stalled_server_application_stops_the_client_application() {
    let world = world().await;
    let block = vec![0; 1 << 20];
    let mut sent = 0;
    let (_read, mut write) = world.client.into_split();
    let fill = async {
        loop {
            sent += write.write(&block).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_millis(1500), fill)
        .await
        .unwrap_err();
    // Two socket buffers on either side, the stream window and the send buffer.
    assert!(sent < 40 << 20, "{sent} bytes went somewhere");
}

#[test]
fn the_future_is_small() {
    let size = size_of::<Pump<'_, Socket, Stream, Nothing>>();
    assert!(size <= 400, "{size} bytes");
}
